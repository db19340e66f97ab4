"""The ablations: zero, keep only, route around, mean, swap; each against an oracle of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import (
    HookedMoE,
    collect_routing,
    force_experts,
    hook_names,
    keep_only,
    mean_ablate,
    mean_expert_outputs,
    route_around,
    swap_experts,
    zero_ablate,
)
from moe_lens.errors import DataError, HookError
from moe_lens.model.registration import routing_layers
from tests import router_oracle as oracle
from tests.families import core_family, some_kinds
from tests.model.test_expert_points import routed_outputs
from tests.tiny_models import FAMILIES, prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]
BY_ORDER_OF_LOGITS = (
    *FAMILIES,
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "deepseek_v2",
    "llama4",
    "jamba",
    "gemma4",
)


def run(model: Any, hooks: Any = (), given: Any = None) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens(2, 6) if given is None else given, fwd_hooks=list(hooks))


def with_points(recipe: str) -> Any:
    model = HookedMoE.from_hf(tiny_model(recipe), tokenizer())
    model.set_use_expert_out(True)
    return model


def chosen(model: Any, hooks: Any = ()) -> dict[int, Tensor]:
    with torch.no_grad(), model.hooks(list(hooks)):
        _, cache = model.run_with_cache(tokens(2, 6))
    return {n: cache["topk_indices", n] for n in model.moe_layers}


@some_kinds
def test_zero_and_keep_are_the_whole(hooked: Hooked, recipe: str) -> None:
    """What the experts of one layer add up to, by Hugging Face's modules: without some + only those = all."""
    model = hooked(recipe)
    layer = model.moe_layers[0]
    some = {layer: chosen(model)[layer][0, 0, :1].tolist()}
    totals = [
        routed_outputs(model, lambda hooks=hooks: run(model, hooks))[layer]
        for hooks in ([], zero_ablate(some), keep_only(some))
    ]
    torch.testing.assert_close(totals[1] + totals[2], totals[0], rtol=1e-5, atol=1e-6)
    assert bool((totals[1] != totals[0]).any())
    assert bool((totals[2] != totals[0]).any())


@some_kinds
def test_zero_leaves_the_route_and_the_others_weights(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = model.moe_layers[0]
    every = list(range(model.n_experts))
    plain = chosen(model)[layer]
    assert torch.equal(chosen(model, zero_ablate({layer: every}))[layer], plain)
    by_hand = [(hook_names.topk_weights(layer), lambda w, hook: w.masked_fill(hook.chosen == 1, 0.0))]
    assert torch.equal(run(model, zero_ablate([(layer, 1)])), run(model, by_hand))
    nobody = run(model, zero_ablate({layer: every}, positions=[3]))
    torch.testing.assert_close(nobody[:, :3], run(model)[:, :3], rtol=1e-5, atol=1e-5)
    assert not torch.equal(nobody[:, 3], run(model)[:, 3])


@pytest.mark.parametrize("recipe", BY_ORDER_OF_LOGITS)
def test_route_around_is_a_logit_of_minus_infinity_in_hugging_faces_router(recipe: str) -> None:
    model, hf_model = HookedMoE.from_hf(tiny_model(recipe)), tiny_model(recipe)
    hooks = route_around({n: [1, 2] for n in model.moe_layers})

    def without(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, [1, 2]] = -1e4  # as good as -inf, which the identity router would multiply by 0
        return logits

    with torch.no_grad(), oracle.rerouted(hf_model, without):
        expected = hf_model(tokens(2, 6)).logits
    torch.testing.assert_close(run(model, hooks), expected, rtol=1e-4, atol=1e-5)


@some_kinds
def test_route_around_lets_the_next_best_take_the_place(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer, plain = model.moe_layers[-1], chosen(model)[model.moe_layers[-1]]
    expert = int(plain.flatten().mode().values)
    around = chosen(model, route_around([(layer, expert)], positions=[1, 2, 4]))[layer]
    assert torch.equal(around[:, [0, 3, 5]], plain[:, [0, 3, 5]])
    meant = around[:, [1, 2, 4]]
    assert not bool((meant == expert).any())
    if model.routing_rule(layer).__class__.__name__ not in (
        "GroupLimitedSoftmax",
        "SparseMixer",
    ) and not getattr(model.routing_rule(layer), "groups", None):
        for row, column in ((0, 1), (1, 2), (0, 4)):
            before = set(plain[row, column].tolist())
            assert before - {expert} <= set(around[row, column].tolist())


def test_route_around_refuses_tables_and_too_many(hooked: Hooked) -> None:
    model = hooked("deepseek_v4_hash")
    table = next(n for n in model.moe_layers if type(model.routing_rule(n)).__name__ == "FixedExperts")
    with pytest.raises(HookError, match="table"):
        run(model, route_around([(table, 0)]))
    with pytest.raises(HookError, match="at most"):
        run(hooked("olmoe"), route_around({0: [0, 1, 2, 3]}))
    with pytest.raises(HookError, match=r"experts (are )?0 to 5"):
        run(hooked("olmoe"), route_around([(0, 6)]))


@core_family
def test_means_are_those_of_a_loop_over_tokens(hooked: Hooked, recipe: str) -> None:
    model = with_points(recipe)
    texts = [prompt(3), prompt(6, 1), prompt(4, 2)]
    means = mean_expert_outputs(model, texts, batch_size=2)
    assert model.use_expert_out
    sums: dict[tuple[int, int], list[Tensor]] = {}
    for text in texts:
        _, cache = model.run_with_cache(text)
        for row, layer in enumerate(model.moe_layers):
            n_special = cache["topk_indices", layer].shape[1] - len(text.split())  # a BOS, or none
            for pos in range(n_special, n_special + len(text.split())):
                for slot, expert in enumerate(cache["topk_indices", layer][0, pos].tolist()):
                    sums.setdefault((row, expert), []).append(cache["expert_out", layer][0, pos, slot])
    for row in range(len(model.moe_layers)):
        for expert in range(model.n_experts):
            found = sums.get((row, expert), [])
            assert int(means.counts[row, expert]) == len(found)
            if found:
                torch.testing.assert_close(means.values[row, expert], torch.stack(found).mean(0))
            else:
                assert bool(means.values[row, expert].isnan().all())
    assert torch.equal(means.counts, collect_routing(model, texts, span="all").counts)


@some_kinds
def test_a_mean_over_one_token_leaves_that_token_as_it_is(with_outputs: Hooked, recipe: str) -> None:
    model = with_outputs(recipe)
    model.set_use_expert_out(False)
    given = tokens(1, 4)
    means = mean_expert_outputs(model, given, span=slice(2, 3))
    assert not model.use_expert_out  # left as it was
    model.set_use_expert_out(True)
    row, layer = 0, model.moe_layers[0]
    there = [(layer, e) for e in range(model.n_experts) if int(means.counts[row, e])]
    plain, got = run(model, given=given), run(model, mean_ablate(there, means), given)
    torch.testing.assert_close(
        run(model, mean_ablate(there, means, positions=2), given), plain, rtol=1e-4, atol=1e-5
    )
    if any(
        int(expert) in {e for _, e in there}
        for expert in model.run_with_cache(given)[1]["topk_indices", layer][0, [0, 1, 3]].flatten()
    ):
        assert not torch.equal(got, plain)


@core_family
def test_mean_ablation_writes_the_mean_at_the_routers_weight(recipe: str) -> None:
    model = with_points(recipe)
    layer = model.moe_layers[-1]
    means = mean_expert_outputs(model, tokens(4, 8, seed=3))
    expert = int(means.counts[-1].argmax())

    def by_hand(outputs: Tensor, hook: Any) -> Tensor:
        outputs = outputs.clone()
        outputs[hook.chosen == expert] = means.values[-1, expert]
        return outputs

    expected = run(model, [(hook_names.expert_out(layer), by_hand)])
    assert torch.equal(run(model, mean_ablate(expert, means, layers=layer)), expected)
    assert not torch.equal(expected, run(model))


@pytest.mark.parametrize("recipe", [*FAMILIES, "gpt_oss", "llama4", "jetmoe", "nemotron_h_latent"])
def test_swapping_both_ways_is_swapping_the_parameters(recipe: str) -> None:
    """The oracle: a Hugging Face model in which the two experts' parameters have changed places."""
    model = with_points(recipe)
    layer = model.moe_layers[-1]
    first = int(chosen(model)[layer][0, 0, 0])
    second = (first + 1) % model.n_experts
    oracle_model = HookedMoE.from_hf(tiny_model(recipe))
    block: Any = routing_layers(oracle_model)[layer].block
    modules = [block.input_linear, block.output_linear] if recipe == "jetmoe" else [block.experts]
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if parameter.shape[0] == model.n_experts:
                    parameter[[first, second]] = parameter[[second, first]].clone()
    expected = run(oracle_model)
    got = run(model, swap_experts([(layer, first, second), (layer, second, first)]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, run(model))


@some_kinds
def test_swapping_an_expert_with_itself_changes_nothing(with_outputs: Hooked, recipe: str) -> None:
    model = with_outputs(recipe)
    itself = [(n, e, e) for n in model.moe_layers for e in range(model.n_experts)]
    assert torch.equal(run(model, swap_experts(itself)), run(model))


def test_a_swap_may_run_an_expert_twice_for_a_token(hooked: Hooked) -> None:
    """Everyone says what expert 0 says: as if all weights were expert 0's."""
    model = with_points("mixtral")
    all_zero = [(0, e, 0) for e in range(1, model.n_experts)]
    outputs: list[Tensor] = []
    run(
        model,
        [
            *swap_experts(all_zero),
            (hook_names.expert_out(0), lambda value, hook: outputs.append(value.clone())),
        ],
    )
    assert torch.equal(outputs[0][:, :, 0], outputs[0][:, :, 1])


def test_without_points_on_outputs_the_error_says_what_to_do(hooked: Hooked) -> None:
    model = hooked("olmoe")
    means = mean_expert_outputs(model, tokens(3, 8))
    some = int(means.counts[0].argmax())
    for hooks in (swap_experts([(0, 1, 2)]), mean_ablate([(0, some)], means)):
        with pytest.raises(HookError, match=r"set_use_expert_out\(True\)"):
            run(model, hooks)


def test_what_is_malformed_or_does_not_fit_is_refused() -> None:
    model = with_points("olmoe")
    means = mean_expert_outputs(model, tokens(1, 2))
    never = (means.counts[0] == 0).nonzero()[0].item()
    for build, match in (
        (lambda: swap_experts([(0, 1)]), "triples"),
        (lambda: swap_experts([]), "triples"),
        (lambda: swap_experts([(0, 1, 2), (0, 1, 3)]), "two others"),
        (lambda: mean_ablate([(0, never)], means), "never chosen"),
        (lambda: mean_ablate([(9, 0)], means), "have no experts"),
        (lambda: mean_ablate([(0, 17)], means), "have no experts"),
        (lambda: zero_ablate([]), "No experts"),
        (lambda: route_around({0: "a"}), "numbers"),
        (lambda: keep_only([(0, 1)], positions=[]), "positions"),
    ):
        with pytest.raises(DataError, match=match):
            build()
    with pytest.raises(HookError, match="experts 0 to 5"):
        run(model, swap_experts([(0, 1, 6)]))
    other = HookedMoE.from_hf(tiny_model("olmoe_norm_gqa"), tokenizer())
    other.set_use_expert_out(True)
    some = int(means.counts[0].argmax())
    with pytest.raises(HookError, match="another model"):
        run(other, mean_ablate([(0, some)], means))
    assert "never chosen" in repr(means)


def test_ablations_compose_with_each_other_and_in_generation() -> None:
    model = with_points("olmoe")
    means = mean_expert_outputs(model, tokens(4, 8))
    some = int(means.counts[1].argmax())
    hooks = [
        *route_around([(0, 1)], positions="generated"),
        *zero_ablate([(2, 0)], positions="prompt"),
        *mean_ablate([(1, some)], means),
        *swap_experts([(1, (some + 1) % 6, some)]),
    ]
    settings: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }
    with model.hooks(hooks), torch.no_grad():
        cached = model.generate(tokens(1, 4), return_type="tokens", **settings)
        whole = model.generate(tokens(1, 4), return_type="tokens", use_past_kv_cache=False, **settings)
    assert torch.equal(cached, whole)


def test_means_are_taken_under_hooks(hooked: Hooked) -> None:
    model, given = hooked("olmoe"), tokens(3, 8)
    hooks = force_experts({0: [0, 1, 2]})
    found = mean_expert_outputs(model, given, hooks=hooks, progress=False)
    assert found.counts[0].tolist() == [24, 24, 24, 0, 0, 0]  # no special tokens in tokens()
    with model.hooks(hooks):
        around = mean_expert_outputs(model, given, progress=False)
    assert torch.equal(found.counts, around.counts)
    assert torch.equal(found.values.nan_to_num(), around.values.nan_to_num())


def test_means_show_themselves_in_a_line_and_a_table(hooked: Hooked) -> None:
    means = mean_expert_outputs(hooked("olmoe"), tokens(3, 8), progress=False)
    assert repr(means).startswith("ExpertMeans(OlmoeForCausalLM: ")
    table: Any = means.to_dataframe().set_index(["layer", "expert"])
    assert table["n_tokens"].sum() == 3 * 8 * 3 * 3  # tokens, layers, k
    layer, expert = (means.counts > 0).nonzero()[-1].tolist()
    norm = float(means.values[layer, expert].square().sum().sqrt())
    assert table["norm"][layer, expert] == pytest.approx(norm)
    assert "<td>" in means._repr_html_()
