"""Saliencies and super experts against loops over the caches, as the papers' code computes them."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import HookedMoE, RoutedModel, collect_by_prompt, collect_routing, hook_names, organisms
from moe_lens.errors import DataError
from moe_lens.statistics import SALIENCIES, Saliency, saliency, super_experts
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokenizer

PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", "w3 w3 w7 w2", "w30 w31 w32 w5 w6 w7"]


def by_loop(model: Any, prompts: list[str]) -> dict[str, dict[tuple[int, int], float]]:
    """Saliency -> (layer, expert) -> value, token by token from a cache."""
    norms, weights = defaultdict(list), defaultdict(list)
    largest: dict[tuple[int, int], float] = defaultdict(float)
    n_tokens = 0
    model.set_use_expert_out(True)
    for prompt in prompts:
        _, cache = model.run_with_cache(prompt)
        for layer in model.moe_layers:
            outputs, chosen, given = (
                cache[hook_names.name(layer, point)][0]
                for point in ("hook_expert_out", hook_names.TOPK_INDICES, hook_names.TOPK_WEIGHTS)
            )
            for pos in range(len(chosen)):
                n_tokens += layer == model.moe_layers[0]
                for slot, expert in enumerate(chosen[pos].tolist()):
                    cell = (layer, expert)
                    vector = outputs[pos, slot].double()
                    norms[cell].append(float(vector.pow(2).sum().sqrt()))
                    weights[cell].append(float(given[pos, slot]))
                    largest[cell] = max(largest[cell], float(vector.abs().max()))
    model.set_use_expert_out(False)
    weighted = {c: [g * n for g, n in zip(weights[c], norms[c], strict=True)] for c in norms}
    return {
        "reap": {c: float(np.mean(weighted[c])) for c in norms},
        "ean": {c: float(np.mean(norms[c])) for c in norms},
        "ean_sum": {c: sum(norms[c]) / n_tokens for c in norms},
        "weighted_ean_sum": {c: sum(weighted[c]) / n_tokens for c in norms},
        "frequency": {c: len(norms[c]) / n_tokens for c in norms},
        "weighted_frequency": {c: sum(weights[c]) / n_tokens for c in norms},
        "max": largest,
        "max_norm": {c: max(norms[c]) for c in norms},
    }


@some_kinds
def test_saliencies_are_those_of_a_loop(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe), tokenizer())
    expected = by_loop(model, PROMPTS)
    units = collect_by_prompt(model, PROMPTS, outputs=True, progress=False)
    assert set(expected) == set(SALIENCIES)
    for kind in SALIENCIES:
        found, whole = saliency(units, kind), saliency(sum(units[1:], units[0]), kind)
        assert (found.low is None) == kind.startswith("max")
        assert whole.low is None
        for row, layer in enumerate(found.shape.layers):
            for expert in range(found.shape.n_experts):
                wanted = expected[kind].get((layer, expert), 0.0)
                assert float(found.values[row, expert]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert torch.allclose(found.values, whole.values, rtol=1e-9)
    model.detach()


def test_by_prompt_is_the_same_from_the_bridge_in_any_order_of_lengths_and_adds_up() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer=tokenizer())
    units = collect_by_prompt(model, PROMPTS, outputs=True, vocabulary=True, progress=False)
    assert [unit.n_tokens for unit in units] == [6, 3, 5, 7]  # in the order given, with BOS
    whole = collect_routing(model, PROMPTS, outputs=True, vocabulary=True, progress=False)
    added = sum(units[1:], units[0])
    assert torch.equal(added.counts, whole.counts)
    assert added.vocabulary is not None
    assert whole.vocabulary is not None
    assert torch.equal(added.vocabulary.keys, whole.vocabulary.keys)
    assert torch.equal(added.vocabulary.counts, whole.vocabulary.counts)
    joined = collect_by_prompt(model, PROMPTS, clusters="abab", outputs=True, progress=False)
    assert [unit.n_tokens for unit in joined] == [6 + 5, 3 + 7]
    with pytest.raises(DataError, match="4 prompts need as many cluster labels; got 3"):
        collect_by_prompt(model, PROMPTS, clusters="abc", progress=False)


def test_intervals_hold_a_known_ratio_about_as_often_as_they_say() -> None:
    """Twenty units with a shared effect on each unit's tokens; the mean of g·‖f‖ over all is 1."""
    rng = np.random.default_rng(0)
    (unit,) = collect_by_prompt(organisms.load("null"), ["the"], outputs=True, progress=False)
    assert unit.outputs is not None
    held, repeats = 0, 200
    for _ in range(repeats):
        units = []
        for effect in rng.gamma(4, 0.25, 20):
            chosen = unit.counts * int(rng.integers(1, 9))
            sums = chosen.double() * effect
            outputs = replace(unit.outputs, chosen=chosen, weighted_norm_sums=sums)
            units.append(replace(unit, n_tokens=int(chosen.sum(-1)[0]) // 2, counts=chosen, outputs=outputs))
        found = saliency(units, "reap", n_resamples=200)
        row, expert = (unit.counts > 0).nonzero()[0].tolist()
        assert found.low is not None
        assert found.high is not None
        held += float(found.low[row, expert]) <= 1 <= float(found.high[row, expert])
    assert 0.88 <= held / repeats <= 0.99


def test_an_expert_of_one_prompt_has_no_interval_and_one_of_two_has_that_of_two() -> None:
    model = organisms.load("specialised")
    world = organisms.world("specialised")
    prompts = [c.closed_book for c in world.conflicts("detection")[:6]]
    prompts += [world.conflicts("detection")[0].open_book, *world.generic("test", n=1)]
    units = collect_by_prompt(model, prompts, outputs=True, progress=False)
    n_prompts = torch.stack([unit.counts > 0 for unit in units]).sum(0)
    found = saliency(units, "reap")
    assert found.low is not None
    assert found.high is not None
    assert bool((n_prompts == 1).any())
    assert bool((n_prompts == 2).any())
    assert torch.equal(found.low.isnan(), n_prompts < 2)
    assert torch.equal(found.high.isnan(), n_prompts < 2)
    assert bool((found.low[n_prompts > 1] >= 0).all())
    means = saliency(units, "frequency")  # divides by all tokens, of which every prompt has some
    assert means.low is not None
    assert not bool(means.low.isnan().any())


def test_lowest_are_of_every_layer_and_spare_super_experts() -> None:
    model = organisms.load("specialised")
    units = collect_by_prompt(model, ["Question : what is", "Document : the"], outputs=True, progress=False)
    found, stars = saliency(units), super_experts(units)
    lowest = found.lowest(6, spare=stars)
    assert not set(lowest) & set(stars.experts)
    for layer in model.moe_layers:
        row = found.values[layer].tolist()
        kept = [e for e in range(8) if (layer, e) not in lowest and (layer, e) not in stars.experts]
        assert len([e for other, e in lowest if other == layer]) == 6
        assert max(row[e] for other, e in lowest if other == layer) <= min([row[e] for e in kept] or [np.inf])
    assert found.lowest(1, each_layer=False) == [min(found.lowest(8), key=lambda e: found.values[e].item())]
    assert {layer for layer, _ in found.lowest(1, layers="middle")} == {1, 2}
    with pytest.raises(DataError, match="only 8 experts of a layer"):
        found.lowest(9)


@pytest.mark.parametrize("seed", range(5))
def test_super_experts_are_those_of_the_description(seed: int) -> None:
    rng = np.random.default_rng(seed)
    (unit,) = collect_by_prompt(organisms.load("null"), ["the"], outputs=True, progress=False)
    assert unit.outputs is not None
    sizes = rng.exponential(1, (4, 8))
    sizes[1, 3], sizes[2, 7], sizes[3, 0] = 500.0, 300.0, 40.0
    stats = replace(unit, outputs=replace(unit.outputs, max_abs=torch.from_numpy(sizes)))
    for percentile, share in ((99.5, 0.1), (90.0, 0.1), (90.0, 0.0), (0.0, 0.05)):
        values = sorted(sizes.ravel().tolist())
        place = percentile / 100 * (len(values) - 1)
        below = int(place)
        above = values[min(below + 1, len(values) - 1)]
        cut = values[below] + (place - below) * (above - values[below])
        expected = {
            (layer, e) for layer in range(4) for e in range(8) if sizes[layer, e] > cut
            and sizes[layer, e] > max(values) * share
        }  # fmt: skip
        found = super_experts(stats, percentile=percentile, share_of_max=share)
        assert set(found.experts) == expected
        assert [float(sizes[e]) for e in found.experts] == sorted(
            (float(sizes[e]) for e in expected), reverse=True
        )
    assert super_experts(stats, percentile=90.0).among([(0, 0), (2, 7)]) == [(2, 7)]
    assert super_experts(stats, percentile=90.0, layers="late").experts == ()
    assert [super_experts([stats, unit]).experts, len(super_experts(unit))] == [((1, 3),), 1]


def test_bad_input_is_refused() -> None:
    model = organisms.load("null")
    without = collect_routing(model, "the", progress=False)
    assert isinstance(saliency(without, "frequency"), Saliency)
    assert torch.allclose(saliency(without, "frequency").values, without.rates)
    for call in (lambda: saliency(without), lambda: super_experts(without)):
        with pytest.raises(DataError, match="collect them with outputs=True"):
            call()
    with pytest.raises(DataError, match="kind must be one of reap"):
        saliency(without, "reaper")
    with pytest.raises(DataError, match="saliency needs RoutingStats"):
        saliency([])
    with pytest.raises(DataError, match="different models"):
        saliency([without, collect_routing(organisms.load("planted"), "the", progress=False)], "frequency")
    outputs = collect_routing(model, "the", outputs=True, progress=False)
    with pytest.raises(DataError, match="percentile must be a number from 0 to below 100"):
        super_experts(outputs, percentile=100.0)
