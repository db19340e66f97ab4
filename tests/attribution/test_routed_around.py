"""Virtual ablation against routing around experts one at a time, by other means."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from moe_lens import hook_names, scale_experts, zero_ablate
from moe_lens.attribution.routed_around import virtual_ablation
from moe_lens.errors import DataError, HookError, MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import hook_census, prompt, tiny_model, tokenizer, tokens

PLAIN = ["olmoe", "mixtral", "llama4", "phimoe", "gemma4", "jetmoe"]
BY_STEERING = ["deepseek_v3", "minimax_m2", "ernie4_5_moe", "nemotron_h_latent", "deepseek_v4", "lfm2_moe"]


def _loss(model, given, hooks=()) -> torch.Tensor:
    """Mean cross-entropy a prompt, written otherwise than in moe_lens."""
    with torch.no_grad():
        logits = model.run_with_hooks(given, fwd_hooks=list(hooks))
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(row[:-1].double(), own[1:])
            for row, own in zip(logits, given, strict=True)
        ]
    )


def _places(found):
    """A few (layer, row, pos, slot) of all."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(found.estimate.shape)
    return [(torch.rand(4, generator=generator) * size).long().tolist() for _ in range(6)]


@pytest.mark.parametrize("family", PLAIN)
def test_exact_is_a_logit_of_minus_infinity(hooked, family) -> None:
    model, given = hooked(family), tokens(2, 5)
    found: Any = virtual_ablation(model, given, progress=False)
    torch.testing.assert_close(found.loss.double(), _loss(model, given), rtol=0, atol=1e-5)
    for layer, row, pos, slot in _places(found):
        number, expert = found.layers[layer], int(found.indices[layer, row, pos, slot])
        seen = []

        def remove(logits, hook, row=row, pos=pos, expert=expert):
            logits = logits.clone()
            logits[row, pos, expert] = -torch.inf
            return logits

        hooks = [
            (hook_names.router_logits(number), remove),
            (hook_names.topk_indices(number), lambda indices, hook, seen=seen: seen.append(indices.clone())),
        ]
        change = _loss(model, given, hooks) - _loss(model, given)
        assert float(found.exact[layer, row, pos, slot]) == pytest.approx(float(change[row]), abs=2e-6)
        came = set(seen[0][row, pos].tolist()) - set(found.indices[layer, row, pos].tolist())
        assert came == {int(found.replacement[layer, row, pos, slot])}
        assert float(change[1 - row].abs()) < 1e-6


@pytest.mark.parametrize("family", BY_STEERING)
def test_exact_is_the_route_of_a_plan_at_one_token(hooked, family) -> None:
    """Routers with biases and groups: the steered route of a whole run, put in at one token.

    Their weights do not depend on experts that do not run.
    """
    model, given = hooked(family), tokens(2, 5)
    found: Any = virtual_ablation(model, given, progress=False)
    for layer, row, pos, slot in _places(found):
        number, expert = found.layers[layer], int(found.indices[layer, row, pos, slot])
        with model.hooks(steer_hooks(SteeringPlan(deactivate=[(number, expert)]))):
            _, cache = model.run_with_cache(given)
        steered = cache["topk_indices", number][row, pos]
        assert expert not in steered

        def put(indices, hook, row=row, pos=pos, steered=steered):
            indices = indices.clone()
            indices[row, pos] = steered
            return indices

        change = _loss(model, given, [(hook_names.topk_indices(number), put)]) - _loss(model, given)
        assert float(found.exact[layer, row, pos, slot]) == pytest.approx(float(change[row]), abs=2e-6)
        came = set(steered.tolist()) - set(found.indices[layer, row, pos].tolist())
        assert int(found.replacement[layer, row, pos, slot]) in came


@pytest.mark.parametrize("family", ["olmoe", "llama4", "deepseek_v2_grouped", "nemotron_h_latent", "jetmoe"])
def test_the_estimate_is_right_where_all_is_nearly_linear(family) -> None:
    """Experts whose outputs are a hundredth: their changes are small ones."""
    hf_model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if "experts.down_proj" in name or "mlp.output_linear" in name:
                parameter.mul_(0.01)
    model = HookedMoE.from_hf(hf_model, tokenizer())
    found: Any = virtual_ablation(
        model, tokens(2, 5), lambda logits, tokens: 10 * logits[:, -1, 9].double(), progress=False
    )
    assert found.correlation > 0.995
    largest = float(found.exact.abs().max())
    assert largest > 1e-4
    assert float((found.exact - found.estimate).abs().max()) < 0.06 * largest


def test_the_estimate_is_what_a_gradient_says(hooked) -> None:
    """By finite differences: the layer's output moved a little towards that of the other route."""
    model, given = hooked("olmoe"), tokens(1, 4)
    found: Any = virtual_ablation(model, given, exact=False)
    layer, pos, slot, step = 1, 2, 0, 0.01
    outputs = {}

    def keep(value, hook):
        outputs[hook.name] = value.detach().clone()

    def without(logits, hook):
        logits = logits.clone()
        logits[0, pos, found.indices[layer, 0, pos, slot]] = -torch.inf
        return logits

    name = "blocks.1.mlp.hook_out"
    _loss(model, given, [(name, keep)])
    before = outputs[name]
    _loss(model, given, [(hook_names.router_logits(layer), without), (name, keep)])
    towards = outputs[name] - before

    def moved(by):
        return _loss(model, given, [(name, lambda value, hook: before + by * towards)])[0]

    slope = float(moved(step) - moved(-step)) / (2 * step)
    assert float(found.estimate[layer, 0, pos, slot]) == pytest.approx(slope, rel=1e-2, abs=1e-5)
    assert found.exact is found.correlation is found.correlation_by_layer is None
    assert "estimate only" in repr(found)


def test_correlations_are_pearsons(hooked) -> None:
    found: Any = virtual_ablation(hooked("qwen2_moe"), tokens(2, 5), progress=False)
    both = torch.stack([found.estimate.flatten(), found.exact.flatten()]).double()
    assert found.correlation == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    assert found.layers == (0, 2, 3)
    for layer, correlation in enumerate(found.correlation_by_layer):
        both = torch.stack([found.estimate[layer].flatten(), found.exact[layer].flatten()]).double()
        assert correlation == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    assert f"correlation of estimate and exact {found.correlation:.2f}" in repr(found)


def test_prompts_of_different_lengths_and_batches(hooked) -> None:
    model = hooked("jamba")  # with a state space, where padding would leak
    prompts = [prompt(4), prompt(2, seed=1), prompt(4, seed=2)]
    found: Any = virtual_ablation(model, prompts, batch_size=5, progress=False)
    assert found.exact.shape[1:3] == (3, 5)  # with a BOS
    for row, each in enumerate(prompts):
        alone: Any = virtual_ablation(model, each, batch_size=1, progress=False)
        length = alone.exact.shape[2]
        torch.testing.assert_close(found.exact[:, row, -length:], alone.exact[:, 0], rtol=0, atol=2e-6)
        torch.testing.assert_close(
            found.estimate[:, row, -length:], alone.estimate[:, 0], rtol=1e-3, atol=2e-6
        )
        assert torch.equal(found.replacement[:, row, -length:], alone.replacement[:, 0])
        assert bool(torch.isnan(found.exact[:, row, :-length]).all())
        assert bool((found.indices[:, row, :-length] == -1).all())
    assert -1 <= found.correlation <= 1
    table = found.by_expert()
    layer, expert = 0, int(found.indices[0, 1, -1, 0])
    mine = (found.indices[layer] == expert) & ~torch.isnan(found.exact[layer])
    assert float(table[layer, expert]) == pytest.approx(float(found.exact[layer][mine].mean()), abs=1e-6)
    never = [e for e in range(model.n_experts) if not bool((found.indices[layer] == e).any())]
    assert bool(torch.isnan(table[layer, never]).all())


def test_a_metric_of_ones_own_under_steering(hooked) -> None:
    model, given = hooked("mixtral"), tokens(2, 4)

    def metric(logits, tokens):
        return -logits[:, -1].gather(-1, tokens[:, :1])[:, 0]

    plan = SteeringPlan(deactivate=[(0, 0), (1, 3)])
    with model.hooks(steer_hooks(plan)):
        found: Any = virtual_ablation(model, given, metric, progress=False)
        _, cache = model.run_with_cache(given)
    assert not bool((found.indices[0] == 0).any() | (found.replacement[0] == 0).any())
    assert not bool((found.indices[1] == 3).any() | (found.replacement[1] == 3).any())
    assert torch.equal(found.indices[0], cache["topk_indices", 0])
    edited = found.indices.clone()
    edited[1, 0, -1, 0] = found.replacement[1, 0, -1, 0]
    # Mixtral's weights are a softmax over the two chosen
    hook = (hook_names.topk_indices(1), lambda indices, hook: edited[1])
    with torch.no_grad():
        logits = model.run_with_hooks(given, fwd_hooks=[*steer_hooks(plan), hook])
    change = float(metric(logits, given)[0] - found.loss[0])
    assert float(found.exact[1, 0, -1, 0]) == pytest.approx(change, abs=2e-6)


def test_layers_with_a_table_are_left_out(hooked) -> None:
    found: Any = virtual_ablation(hooked("deepseek_v4_hash"), tokens(1, 4), exact=False)
    assert found.layers == (1, 2)
    assert found.estimate.shape[0] == 2


def test_half_precision(hooked) -> None:
    found: Any = virtual_ablation(hooked("olmoe", torch.bfloat16), tokens(1, 4), progress=False)
    assert found.exact.dtype == torch.float32
    assert bool(torch.isfinite(found.exact).all())


def test_leaves_the_model_as_it_was(hooked) -> None:
    model, given = hooked("olmoe"), tokens(1, 4)
    model.zero_grad(set_to_none=True)  # other tests share the model
    census, before = hook_census(model), model(given).detach()
    with torch.no_grad():
        virtual_ablation(model, given, progress=False)
    calls = []

    def fails_later(logits, tokens):
        calls.append(1)
        return logits[:, -1, 9] if len(calls) < 4 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        virtual_ablation(model, given, fails_later, batch_size=2, progress=False)
    assert hook_census(model) == census
    assert not model.use_expert_out
    assert torch.equal(model(given), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refused(hooked) -> None:
    full = HookedMoE.from_hf(tiny_model("mixtral", num_local_experts=2), tokenizer())
    with pytest.raises(MoELensError, match=r"Layer 0 .* no expert to take another's place"):
        virtual_ablation(full, tokens(1, 3))
    tables = HookedMoE.from_hf(tiny_model("deepseek_v4", mlp_layer_types=["hash_moe"] * 3), tokenizer())
    with pytest.raises(HookError, match="tables by token id"):
        virtual_ablation(tables, tokens(1, 3))
    model, given = hooked("olmoe"), tokens(2, 4)
    with pytest.raises(DataError, match="one token"):
        virtual_ablation(model, tokens(2, 1))
    found: Any = virtual_ablation(model, tokens(2, 1), lambda x, t: x[:, 0, 9], progress=False)
    assert found.exact.shape[2] == 1
    for metric in (lambda x, t: x.sum(), lambda x, t: 1.0, lambda x, t: x[:, -1].argmax(-1)):
        with pytest.raises(DataError, match="metric must give one number for each of the 2"):
            virtual_ablation(model, given, metric)
    with pytest.raises(DataError, match="NaN"):
        virtual_ablation(model, given, lambda x, t: x[:, -1, 0] * torch.nan)
    with pytest.raises(DataError, match="without gradient"):
        virtual_ablation(model, given, lambda x, t: x.detach()[:, -1, 0])
    for batch_size in (0, -1, 1.5, True):
        with pytest.raises(DataError, match="batch_size"):
            virtual_ablation(model, given, batch_size=batch_size)


def test_hooks_by_prompt_keep_to_their_prompts(hooked: Any) -> None:
    """The exact runs stack tokens of several prompts; a mask by prompt must follow them."""
    model, given = hooked("olmoe"), tokens(2, 4)
    mask = torch.tensor([[True] * 4, [False] * 4])
    with model.hooks(scale_experts(range(6), 0.1, layers=[0], positions=mask)):
        together = [virtual_ablation(model, given, batch_size=size, progress=False) for size in (2, 5)]
    for row in range(2):
        hooks = scale_experts(range(6), 0.1, layers=[0], positions=mask[row])
        with model.hooks(hooks) if row == 0 else nullcontext():
            alone = virtual_ablation(model, given[row : row + 1], progress=False)
        for each in together:
            assert each.exact is not None
            assert alone.exact is not None
            torch.testing.assert_close(each.exact[:, row], alone.exact[:, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(each.estimate[:, row], alone.estimate[:, 0], rtol=1e-4, atol=1e-5)


def test_tokens_without_any_weight_are_refused(hooked: Any) -> None:
    model = hooked("qwen3_moe_k1")
    hooks = zero_ablate([0, 1, 2], layers=[0])
    with model.hooks(hooks), pytest.raises(HookError, match="weights of a token to 0"):
        virtual_ablation(model, tokens(1, 4), progress=False)


def test_hooks_are_the_hooks_around_it(hooked) -> None:
    model, given = hooked("olmoe"), tokens(2, 4)
    hooks = scale_experts({0: [1, 2], 2: [3]}, 0.5)
    found = virtual_ablation(model, given, hooks=hooks, progress=False)
    with model.hooks(hooks):
        around = virtual_ablation(model, given, progress=False)
    for name in ("exact", "estimate", "loss"):
        assert torch.equal(getattr(found, name), getattr(around, name))
    plain = virtual_ablation(model, given, exact=False, progress=False)
    assert not torch.equal(found.loss, plain.loss)


def test_it_shows_itself_in_a_line_and_a_table(hooked) -> None:
    found: Any = virtual_ablation(hooked("olmoe"), [prompt(3), prompt(1)], progress=False)
    assert str(found).splitlines()[0] == repr(found)
    assert str(found).splitlines()[1].startswith("  by layer 0: ")
    table: Any = found.to_dataframe()
    assert table["n_tokens"].sum() == int((found.indices >= 0).sum())
    assert table["change"].abs().is_monotonic_decreasing
    row = table.iloc[-1]
    place = found.layers.index(row["layer"])
    changes = found.exact[place][found.indices[place] == int(row["expert"])]
    assert row["change"] == pytest.approx(float(changes.mean()), abs=1e-6)
    assert row["n_tokens"] == len(changes)
    assert "<th>change</th>" in found._repr_html_()
