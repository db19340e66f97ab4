"""force_experts, bias_experts, scale_experts: against Hugging Face's routers and hooks written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import SteeringPlan, bias_experts, force_experts, hook_names, scale_experts, steer_hooks
from moe_lens.errors import DataError, HookError
from moe_lens.interventions.edits import experts_by_layer
from moe_lens.model.hooked_moe import HookedMoE
from tests import router_oracle as oracle
from tests.families import core_family, some_kinds
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]


def run(model: Any, hooks: Any = (), given: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens(2, 6) if given is None else given, fwd_hooks=list(hooks))


def routes(model: Any, hooks: Any = ()) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> (indices, weights) [batch pos k] of a run under these hooks."""
    with torch.no_grad(), model.hooks(list(hooks)):
        _, cache = model.run_with_cache(tokens(2, 6))
    return {n: (cache["topk_indices", n], cache["topk_weights", n]) for n in model.moe_layers}


def at(layer: int, spell: Any, function: Any) -> tuple[str, Any]:
    return spell(layer), function


@some_kinds
def test_forced_experts_run_where_they_are_meant_and_nowhere_else(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer, k = model.moe_layers[0], model.top_k
    forced = list(range(model.n_experts))[-k:]
    plain, got = routes(model), routes(model, force_experts({layer: forced}, positions=[1, -1]))
    indices, _ = got[layer]
    for column in (1, 5):
        assert set(indices[0, column].tolist()) == set(indices[1, column].tolist()) == set(forced)
    others = [0, 2, 3, 4]
    assert torch.equal(indices[:, others], plain[layer][0][:, others])
    rule = model.routing_rule(layer)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(2, 6))
    if recipe != "deepseek_v4_hash":  # that rule takes its experts from a table
        expected = rule.weigh(cache["router_logits", layer], indices)
        torch.testing.assert_close(got[layer][1].float(), expected.float())


@some_kinds
def test_forcing_the_routers_own_sets_changes_nothing(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    own = {n: indices.flip(-1) for n, (indices, _) in routes(model).items()}  # in another order
    assert torch.equal(run(model, force_experts(own)), run(model))


@some_kinds
def test_neutral_biases_and_factors_change_nothing(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    zeros = {n: torch.zeros(model.n_experts) for n in model.moe_layers}
    every = {n: range(model.n_experts) for n in model.moe_layers}
    plain = run(model)
    assert torch.equal(run(model, bias_experts(zeros)), plain)
    assert torch.equal(run(model, scale_experts(every, 1.0)), plain)


@some_kinds
def test_a_bias_routes_as_hugging_faces_router_does_with_it(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    bias = torch.linspace(-2, 2, model.n_experts)
    hf_model = tiny_model(recipe)
    with torch.no_grad(), oracle.rerouted(hf_model, lambda logits: logits + bias.to(logits)):
        expected = hf_model(tokens(2, 6)).logits
    torch.testing.assert_close(
        run(model, bias_experts(dict.fromkeys(model.moe_layers, bias))), expected, rtol=1e-4, atol=1e-5
    )


@core_family
def test_scaling_multiplies_the_weights_of_those_experts_alone(hooked: Hooked, recipe: str) -> None:
    model, layer = hooked(recipe), hooked(recipe).moe_layers[-1]
    plain, got = routes(model)[layer], routes(model, scale_experts([(layer, 1), (layer, 0)], 2.5))[layer]
    assert torch.equal(got[0], plain[0])
    for batch in range(2):
        for pos in range(6):
            for slot in range(model.top_k):
                factor = 2.5 if int(plain[0][batch, pos, slot]) < 2 else 1.0
                assert float(got[1][batch, pos, slot]) == float(plain[1][batch, pos, slot] * factor)


@core_family
def test_unselected_tokens_of_half_precision_stay_bit_for_bit(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe, torch.bfloat16)
    layer = model.moe_layers[0]
    hooks = [
        *bias_experts({layer: torch.ones(model.n_experts)}, positions=[5]),
        *scale_experts({layer: range(model.n_experts)}, 0.5, positions=[5]),
    ]
    got, plain = run(model, hooks), run(model)
    assert torch.equal(got[:, :5], plain[:, :5])
    assert not torch.equal(got[:, 5], plain[:, 5])


def test_they_compose_in_one_list_and_force_overrules(hooked: Hooked) -> None:
    model = hooked("olmoe")
    plan = SteeringPlan(activate=[(0, 5)], deactivate=[(0, 0), (1, 1)])
    bias = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    hooks = [
        *force_experts({0: [0, 1, 2]}, positions=[3]),
        *steer_hooks(plan),
        *scale_experts([(0, 5)], 0.25),
        *bias_experts({2: bias}),
    ]
    got, steered = routes(model, hooks), routes(model, steer_hooks(plan))
    assert set(got[0][0][0, 3].tolist()) == {0, 1, 2}
    free = [0, 1, 2, 4, 5]
    assert torch.equal(got[0][0][:, free], steered[0][0][:, free])
    assert bool((got[0][0][:, free] == 5).any(-1).all())
    for pos in free:
        [ours] = got[0][1][0, pos][got[0][0][0, pos] == 5].tolist()
        [theirs] = steered[0][1][0, pos][steered[0][0][0, pos] == 5].tolist()
        assert ours == theirs * 0.25
    assert not bool((got[1][0] == 1).any())
    before = run(model, [*bias_experts({0: bias}), *steer_hooks(plan)])
    by_hand = [at(0, hook_names.router_logits, lambda z, hook: z + bias), *steer_hooks(plan)]
    assert torch.equal(before, run(model, by_hand))


@pytest.mark.parametrize("recipe", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_phases_in_generation(hooked: Hooked, recipe: str) -> None:
    """positions="generated" leaves the prompt's route alone, and changes what is written after it."""
    model = hooked(recipe)
    layer, k = model.moe_layers[0], model.top_k
    seen: list[Tensor] = []
    hooks = [
        *force_experts({layer: list(range(k))}, positions="generated"),
        (hook_names.topk_indices(layer), lambda value, hook: seen.append(value.clone())),
    ]
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }
    with model.hooks(hooks), torch.no_grad():
        model.generate([prompt(3), prompt(5, 1)], **settings)
    assert [x.shape[1] for x in seen] == [6, 1, 1, 1]
    assert all(set(row.tolist()) == set(range(k)) for step in seen[1:] for row in step.flatten(0, 1))
    assert not bool((seen[0].sort(-1).values == torch.arange(k)).all())


def test_without_batch_dimension(hooked: Hooked) -> None:
    model, given = hooked("olmoe"), tokens(1, 4)
    hooks = scale_experts([(0, 0), (0, 1), (0, 2)], 0.0, positions=[2])
    with torch.no_grad():
        alone = model.run_with_hooks(given, fwd_hooks=hooks, remove_batch_dim=True)
    assert torch.equal(alone, run(model, hooks, given))


def test_hooks_are_gone_after_an_exception(hooked: Hooked) -> None:
    model = hooked("olmoe")
    plain = run(model)
    hooks = bias_experts({0: torch.arange(6.0)})

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    for spell in (hook_names.router_logits, hook_names.topk_weights):
        with pytest.raises(ZeroDivisionError):
            run(model, [*hooks, at(2, spell, fail)])
        assert torch.equal(run(model), plain)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: force_experts({}), DataError, "at least one layer"),
        (lambda: force_experts({0: [1, 1, 2]}), DataError, "different numbers"),
        (lambda: force_experts({0: [0.5, 1.0, 2.0]}), DataError, "give k experts"),
        (lambda: force_experts({-1: [0, 1, 2]}), DataError, "layer must be a whole number"),
        (lambda: bias_experts({0: [0.0, float("nan")]}), DataError, "without NaN"),
        (lambda: bias_experts({}), DataError, "mapping from layers"),
        (lambda: scale_experts([(0, 1)], float("inf")), DataError, "finite"),
        (lambda: scale_experts([], 1.0), DataError, "No experts"),
        (lambda: scale_experts([(0, 1, 2)], 1.0), DataError, "pairs"),
        (lambda: scale_experts([3], 1.0), DataError, "pairs"),
        (lambda: scale_experts([(0, -1)], 1.0), DataError, "pairs"),
        (lambda: scale_experts("01", 1.0), DataError, "pairs"),
    ],
)
def test_what_is_malformed_is_refused_when_it_is_built(build: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        build()


def test_what_does_not_fit_is_refused_before_the_forward(hooked: Hooked) -> None:
    model = hooked("olmoe")  # 3 layers, 6 experts, top 3
    for hooks, match in (
        (force_experts({0: [0, 1]}), "Give exactly 3"),
        (force_experts({0: [0, 1, 6]}), "experts 0 to 5"),
        (bias_experts({0: torch.zeros(5)}), "5 numbers"),
        (scale_experts([(0, 6)], 1.0), "experts 0 to 5"),
        (scale_experts([(7, 0)], 1.0), "layer 7 has no router"),
    ):
        with pytest.raises(HookError, match=match):
            run(model, hooks)
    too_short = force_experts({0: torch.tensor([[0, 1, 2]] * 4)})
    with pytest.raises(HookError, match="has 4 columns, and column 5"):
        run(model, too_short)
    with pytest.raises(HookError, match="3 prompts, and 2 are running"):
        run(model, force_experts({0: torch.tensor([[[0, 1, 2]] * 6] * 3)}))
    [(_, hook)] = scale_experts([(0, 1)], 2.0)
    with pytest.raises(HookError, match="use the hook list"):
        run(model, [(hook_names.topk_weights(1), hook)])


def test_experts_are_named_in_three_ways() -> None:
    expected = {0: [2, 3], 1: [2, 3]}
    assert experts_by_layer([(1, 3), (0, 2), (0, 3), (1, 2), (0, 2)]) == {0: [2, 3], 1: [3, 2]}
    assert experts_by_layer({1: torch.tensor([2, 3]), 0: [2, 3]}) == expected
    assert experts_by_layer([2, 3], layers=[1, 0]) == expected
    assert experts_by_layer(2, layers=1) == {1: [2]}


def test_sets_are_forced_in_all_three_ways(hooked: Hooked) -> None:
    model = hooked("mixtral")
    expected = run(model, force_experts({0: [0, 3], 1: [0, 3]}))
    assert torch.equal(run(model, force_experts([(0, 0), (0, 3), (1, 0), (1, 3)])), expected)
    assert torch.equal(run(model, force_experts([0, 3], layers=[0, 1])), expected)
    with pytest.raises(HookError, match="has 1 columns"):  # [pos k] is by column, also of one column
        run(model, force_experts({0: torch.tensor([[0, 3]])}))


def test_a_forced_route_carries_gradients_to_its_weights() -> None:
    model = HookedMoE.from_hf(tiny_model("mixtral"), tokenizer())
    logits = model.run_with_hooks(tokens(1, 3), fwd_hooks=force_experts({0: [0, 1], 1: [1, 2]}))
    logits.sum().backward()
    router: Any = oracle.routers(model.original_model)[1]
    assert bool((router.weight.grad[1:3] != 0).any())


def test_a_bias_carries_gradients_to_what_it_is_made_of() -> None:
    model, layer = HookedMoE.from_hf(tiny_model("olmoe")), 1
    given, bias = tokens(2, 5), torch.zeros(model.n_experts, requires_grad=True)
    model.run_with_hooks(given, fwd_hooks=bias_experts({layer: bias})).logsumexp(-1).sum().backward()
    by_hand = torch.zeros(model.n_experts, requires_grad=True)
    hook = (hook_names.router_logits(layer), lambda logits, hook: logits + by_hand)
    model.run_with_hooks(given, fwd_hooks=[hook]).logsumexp(-1).sum().backward()
    assert bias.grad is not None
    assert by_hand.grad is not None
    assert float(by_hand.grad.abs().max()) > 0
    assert torch.equal(bias.grad, by_hand.grad)
