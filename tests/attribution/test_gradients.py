"""Gradient attribution against finite differences, and against the patches that it estimates."""

from typing import Any

import pytest
import torch

from moe_lens import hook_names, zero_ablate
from moe_lens.attribution.gradients import gradient_attribution
from moe_lens.errors import DataError
from tests.tiny_models import hook_census, prompt, tokens

FAMILIES = ["olmoe", "qwen2_moe", "llama4", "deepseek_v3", "gpt_oss", "jetmoe", "gemma4", "nemotron_h_latent"]


def metric(logits):
    return logits[:, -1].log_softmax(-1)[:, 9].sum() + 0.1 * logits[0, 1, 7]


def _value(model, given, name, edit) -> float:
    with torch.no_grad():
        return float(metric(model.run_with_hooks(given, fwd_hooks=[(name, lambda x, hook: edit(x.clone()))])))


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_derivative_of_scaling_the_activation(with_outputs, family) -> None:
    model, given = with_outputs(family), tokens(2, 5)
    found = gradient_attribution(model, given, metric)
    assert found.metric == pytest.approx(float(metric(model(given)).detach()), abs=1e-4)
    for layer in (0, len(found.layers) - 1):
        for kind, values in (("expert_out", found.expert_out), ("router_logits", found.router_logits)):
            name = getattr(hook_names, kind)(found.layers[layer])
            index = (0, 1, int(found.indices[layer, 0, 1, 0]) if kind == "router_logits" else 0)
            step = 1e-2

            def scaled(by, name=name, index=index):
                def edit(x):
                    x[index] = x[index] * (1 + by)
                    return x

                return _value(model, given, name, edit)

            slope = (scaled(step) - scaled(-step)) / (2 * step)
            assert float(values[(layer, *index)]) == pytest.approx(slope, rel=0.03, abs=2e-3)


@pytest.mark.parametrize("family", ["olmoe", "llama4", "deepseek_v3", "ernie4_5_moe"])
def test_estimates_small_patches(with_outputs, family) -> None:
    """A baseline near this run: patched in one by one with hooks, each expert output and router logit."""
    model, given = with_outputs(family), tokens(2, 4)
    _, cache = model.run_with_cache(given)
    generator = torch.Generator().manual_seed(0)
    layers = model.moe_layers
    near = {
        spell(n): cache[spell(n)] * (1 + 0.02 * torch.randn(cache[spell(n)].shape, generator=generator))
        for n in layers
        for spell in (hook_names.router_logits, hook_names.expert_out)
    }
    found = gradient_attribution(model, given, metric, baseline=near)
    now = found.metric
    estimates, exact = [], []
    for place, layer in enumerate(layers):
        for pos in (1, 3):
            for slot in range(model.top_k):
                name = hook_names.expert_out(layer)

                def put(x, name=name, pos=pos, slot=slot):
                    x[1, pos, slot] = near[name][1, pos, slot]
                    return x

                estimates.append(float(found.expert_out[place, 1, pos, slot]))
                exact.append(_value(model, given, name, put) - now)
    estimates, exact = torch.tensor(estimates), torch.tensor(exact)
    assert float((estimates - exact).abs().max()) < 0.1 * float(exact.abs().max()) + 1e-5


def test_router_logits_that_choose_nobody_else_get_the_patch_right(with_outputs) -> None:
    model, given = with_outputs("mixtral"), tokens(1, 4)
    _, cache = model.run_with_cache(given)
    baseline = {name: value.clone() for name, value in cache.items()}
    name, step = hook_names.router_logits(1), 1e-2
    best = int(cache[name][0, -1].argmax())
    baseline[name][0, -1, best] += step
    found = gradient_attribution(model, given, metric, baseline=baseline)
    exact = _value(model, given, name, lambda x: baseline[name]) - found.metric
    assert float(found.router_logits.sum()) == pytest.approx(exact, rel=0.05)
    assert float(found.router_logits[1, 0, -1, best]) == pytest.approx(float(found.router_logits.sum()))
    assert not bool(found.expert_out.any())
    assert found.same_expert is not None
    assert bool(found.same_expert.all())


def test_a_slot_with_another_expert_is_marked(with_outputs) -> None:
    model = with_outputs("olmoe")
    _, other = model.run_with_cache(tokens(2, 4, seed=5))
    found: Any = gradient_attribution(model, tokens(2, 4), metric, baseline=other)
    chosen = torch.stack([other["topk_indices", layer] for layer in found.layers])
    assert torch.equal(found.same_expert, chosen == found.indices)
    assert not bool(found.same_expert.all())


def test_by_expert_and_experts_that_did_not_run(hooked) -> None:
    found = gradient_attribution(hooked("olmoe"), tokens(2, 4), metric)
    table = found.by_expert()
    assert torch.equal(table.gather(-1, found.indices), found.expert_out)
    torch.testing.assert_close(table.sum(-1), found.expert_out.sum(-1))
    # GPT-OSS weighs by a softmax over the chosen: other logits have no part in it
    found = gradient_attribution(hooked("gpt_oss"), tokens(2, 4), metric)
    unchosen = torch.ones_like(found.router_logits).scatter(-1, found.indices, 0).bool()
    assert not bool(found.router_logits[unchosen].any())
    assert bool(found.router_logits.any())


def test_padding_gets_nothing_and_changes_nothing(hooked) -> None:
    model = hooked("olmoe")
    texts = [prompt(2), prompt(5, seed=1)]
    both = gradient_attribution(model, texts, lambda logits: logits[:, -1, 9].sum())
    for row, text in enumerate(texts):
        alone = gradient_attribution(model, text, lambda logits: logits[0, -1, 9])
        length = alone.expert_out.shape[2]
        torch.testing.assert_close(
            both.router_logits[:, row, -length:], alone.router_logits[:, 0], rtol=1e-3, atol=1e-5
        )
        assert not bool(both.expert_out[:, row, :-length].any())


def test_leaves_the_model_as_it_was(hooked) -> None:
    model, given = hooked("olmoe"), tokens(1, 4)
    census = hook_census(model)
    with torch.no_grad():
        found = gradient_attribution(model, given, metric)
    assert not found.router_logits.requires_grad
    with pytest.raises(ZeroDivisionError):
        gradient_attribution(model, given, lambda logits: 1 / 0)
    assert hook_census(model) == census
    assert not model.use_expert_out
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bad_input_is_refused(hooked, with_outputs) -> None:
    model, given = hooked("olmoe"), tokens(2, 4)
    for wrong in (lambda x: 1.0, lambda x: x[:, -1, 0], lambda x: x.argmax(), lambda x: x.detach().sum()):
        with pytest.raises(DataError, match="metric"):
            gradient_attribution(model, given, wrong)
    with pytest.raises(DataError, match=r"metric gives nan"):
        gradient_attribution(model, given, lambda logits: logits.sum() * torch.nan)
    _, without_outputs = model.run_with_cache(given)
    lacks, none = r"baseline lacks .*set_use_expert_out", "baseline holds no routing"
    for baseline, says in ((without_outputs, lacks), ({}, none), (7, none), ("x", none)):
        with pytest.raises(DataError, match=says):
            gradient_attribution(model, given, metric, baseline=baseline)
    model = with_outputs("olmoe")
    _, other = model.run_with_cache(tokens(2, 5))
    with pytest.raises(DataError, match="of shape"):
        gradient_attribution(model, given, metric, baseline=other)
    spoilt = {name: value * torch.nan for name, value in model.run_with_cache(given)[1].items()}
    with pytest.raises(DataError, match="NaN"):
        gradient_attribution(model, given, metric, baseline=spoilt)


def test_hooks_are_the_hooks_around_it(hooked) -> None:
    model, given = hooked("olmoe"), tokens(2, 5)
    hooks = zero_ablate({0: [1, 2], 2: [3]})
    found = gradient_attribution(model, given, metric, hooks=hooks)
    with model.hooks(hooks):
        around = gradient_attribution(model, given, metric)
    assert torch.equal(found.router_logits, around.router_logits)
    assert torch.equal(found.expert_out, around.expert_out)
    assert found.metric == around.metric != gradient_attribution(model, given, metric).metric


def test_it_shows_itself_in_a_line_and_a_table(hooked) -> None:
    found = gradient_attribution(hooked("olmoe"), [prompt(3), prompt(1)], metric)
    assert repr(found).startswith("GradientAttribution(OlmoeForCausalLM, 2 prompts: metric ")
    table: Any = found.to_dataframe()
    assert len(table) == len(found.layers) * found.shape.n_experts
    assert table["expert_out"].sum() == pytest.approx(float(found.expert_out.sum()), abs=1e-5)
    assert table["router_logit"].sum() == pytest.approx(float(found.router_logits.sum()), abs=1e-5)
    row = table.iloc[0]
    place = found.layers.index(row["layer"])
    here = found.indices[place] == int(row["expert"])
    assert row["expert_out"] == pytest.approx(float(found.expert_out[place][here].sum()), abs=1e-6)
    assert "<th>router_logit</th>" in found._repr_html_()
