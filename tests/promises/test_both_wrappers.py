"""Whatever takes a model gives the same on a RoutedModel and on a HookedMoE of the same weights.

Prompts are tokens here, so that each wrapper's rule for a BOS does not matter. A bridge computes attention in
another way, which moves numbers by rounding: counts and choices are equal, measured numbers nearly.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import (
    HookedMoE,
    RoutedModel,
    RouteRecord,
    RoutingStats,
    SteeringPlan,
    answer_task,
    bias_experts,
    collect_generation,
    collect_routing,
    evaluate_steering,
    expert_logit_attribution,
    expert_logit_lens,
    force_experts,
    gradient_attribution,
    mean_ablate,
    mean_expert_outputs,
    mediation,
    patch_expert_outputs,
    patch_router,
    replay_hooks,
    route_around,
    route_prompt,
    scale_experts,
    steer_hooks,
    swap_experts,
    sweep,
    virtual_ablation,
    zero_ablate,
)
from moe_lens.detection import risk_difference
from moe_lens.evaluation import answers_with, continuation_log_probs
from moe_lens.statistics import iterate_routing
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokenizer, tokens

SEQUENCES = [tokens(1, length, seed=length)[0].tolist() for length in (3, 6, 5)]
PADDED = ("deepseek_v4", "deepseek_v4_hash")
"""Families whose numbers depend on padding, in Hugging Face's own forward."""


@cache
def wrapped(recipe: str) -> tuple[RoutedModel, HookedMoE]:
    return (
        RoutedModel(tiny_model(recipe), tokenizer()),
        HookedMoE.from_hf(tiny_model(recipe), tokenizer()),
    )


def the_same(recipe: str, run: Callable[[Any], list[Any]], tolerance: float = 1e-4) -> None:
    """`run` gives a list, whose floats are equal to rounding and everything else exactly."""
    routed, bridge = (run(model) for model in wrapped(recipe))
    assert len(routed) == len(bridge) > 0
    for ours, theirs in zip(routed, bridge, strict=True):
        if not isinstance(ours, Tensor):
            assert ours == theirs
        elif ours.is_floating_point():
            size = float(theirs.nan_to_num(0, 0, 0).abs().max().clamp(min=1)) if theirs.numel() else 1.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * size, equal_nan=True)
        else:
            assert torch.equal(ours, theirs)


def score(logits: Tensor) -> Tensor:
    return logits[:, -1, 7]


@some_kinds
def test_statistics(recipe: str) -> None:
    def run(model: Any) -> list[Any]:
        options = {"batch_size": 2, "progress": False}
        stats = collect_routing(
            model, SEQUENCES, per_prompt=True, positions=True, vocabulary=True, span="last", **options
        )
        first, *_ = iterate_routing(model, SEQUENCES, **options)
        route = route_prompt(model, torch.tensor(SEQUENCES[1]))
        means = mean_expert_outputs(model, SEQUENCES, span=None, **options)
        return [
            *(tensor for _, tensor in sorted(stats.tensors().items())),
            stats.n_tokens,
            stats.shape.layers,
            first.counts,
            first.mean_margin,
            route.indices,
            route.weights,
            route.tokens,
            means.counts,
            means.values,
        ]

    the_same(recipe, run)


@some_kinds
def test_caches_and_records(recipe: str) -> None:
    given = tokens(2, 5)
    plan = SteeringPlan(deactivate=[(wrapped(recipe)[0].moe_layers[-1], 0)])

    def run(model: Any) -> list[Any]:
        with torch.no_grad():
            logits, cache = model.run_with_cache(given)
            record = RouteRecord.from_cache(cache, weights=True)
            frozen = model.run_with_hooks(given, fwd_hooks=[*hooks(model), *replay_hooks(record)])
            other = model.run_with_hooks(tokens(2, 5, seed=1), fwd_hooks=replay_hooks(record))
        assert torch.equal(frozen, logits)
        return [logits, record.indices.long(), other, RoutingStats.from_cache(cache).rates]

    def hooks(model: Any) -> list[Any]:
        return [] if plan.refused_layers(model) else steer_hooks(plan)

    the_same(recipe, run)


@some_kinds
def test_generation(recipe: str) -> None:
    layer = wrapped(recipe)[0].moe_layers[-1]
    hooks = scale_experts([(layer, 0)], 0.5, positions="generated")

    def run(model: Any) -> list[Any]:
        options = {"batch_size": 2, "progress": False}
        found = collect_generation(model, SEQUENCES, max_new_tokens=5, hooks=hooks, **options)
        assert found.decode is not None
        return [found.prefill.rates, found.decode.rates, found.texts, *found.tokens]

    the_same(recipe, run)


@some_kinds
@pytest.mark.parametrize("positions", [None, "prompt", -1, "last"], ids=str)
def test_interventions(recipe: str, positions: Any) -> None:
    given, last = tokens(2, 6), wrapped(recipe)[0].moe_layers[-1]
    n_experts, k = wrapped(recipe)[0].n_experts, wrapped(recipe)[0].top_k
    lists = {
        "zero_ablate": zero_ablate([(last, 0), (last, 1)], positions=positions),
        "bias_experts": bias_experts({last: torch.linspace(-1, 1, n_experts)}, positions=positions),
        "force_experts": force_experts({last: list(range(k))}, positions=positions),
        "swap_experts": swap_experts([(last, 0, 1)], positions=positions),
    }
    if wrapped(recipe)[0].routing_rule(last).cannot_steer([], [0]) is None:
        lists["route_around"] = route_around([(last, 0)], positions=positions)

    def run(model: Any) -> list[Any]:
        means = mean_expert_outputs(model, SEQUENCES, batch_size=1, progress=False, span=None)
        mean = mean_ablate([(last, int(means.counts[-1].argmax()))], means, positions=positions)
        model.set_use_expert_out(True)
        try:
            with torch.no_grad():
                return [model.run_with_hooks(given, fwd_hooks=hooks) for hooks in (*lists.values(), mean)]
        finally:
            model.set_use_expert_out(False)

    the_same(recipe, run)


@some_kinds
def test_sweeps(recipe: str) -> None:
    clean, corrupted = tokens(1, 4, seed=1), tokens(1, 4, seed=2)

    def run(model: Any) -> list[Any]:
        model.set_use_expert_out(True)
        _, cache = model.run_with_cache(clean)
        model.set_use_expert_out(False)
        points = ("router_logits", "topk_indices", "topk_weights", "route")
        routes = [
            patch_router(
                model, cache, corrupted, lambda logits: score(logits).mean(), point=point, progress=False
            )
            for point in points
        ]
        outputs = [
            patch_expert_outputs(
                model, cache, corrupted, lambda logits: score(logits).mean(), by=by, progress=False
            )
            for by in ("expert", "pos")
        ]
        found = gradient_attribution(model, corrupted, lambda logits: score(logits).sum(), baseline=cache)
        return [*routes, *outputs, found.router_logits, found.expert_out, found.indices, found.same_expert]

    the_same(recipe, run)


@some_kinds
def test_mediation(recipe: str) -> None:
    def run(model: Any) -> list[Any]:
        found = mediation(model, tokens(2, 4, seed=1), tokens(2, 4, seed=2), score, progress=False)
        return [found.clean, found.corrupted, found.clean_route_in, found.corrupted_route_up_to]

    the_same(recipe, run)


@some_kinds
def test_logit_attribution(recipe: str) -> None:
    def run(model: Any) -> list[Any]:
        options = {"batch_size": 2, "progress": False}
        found = expert_logit_attribution(model, SEQUENCES, "w3", "w4", **options)
        names = [name.replace(".moe", ".mlp") for name in found.part_names]  # of the hybrid, in a bridge
        parts = found.parts
        if names[-1] == "unembed.bias" and not bool(parts[-1].any()):  # a bridge's, where the model has none
            names, parts = names[:-1], parts[:-1]
        lens = expert_logit_lens(model, SEQUENCES, model.moe_layers[-1], **options)
        return [found.experts, found.indices, parts, names, found.logit, found.soft_cap, lens]

    the_same(recipe, run)


@some_kinds
def test_virtual_ablation(recipe: str) -> None:
    def run(model: Any) -> list[Any]:
        found = virtual_ablation(model, SEQUENCES[:1], progress=False)
        return [found.exact, found.estimate, found.indices, found.replacement, found.loss]

    the_same(recipe, run)


@some_kinds
def test_measures_and_gradients_of_padded_prompts(recipe: str) -> None:
    given = SEQUENCES[:1] if recipe in PADDED else SEQUENCES  # all at once

    def run(model: Any) -> list[Any]:
        found = gradient_attribution(model, given, lambda logits: score(logits).sum())
        says = answers_with(model, SEQUENCES, ["w1", "w2", "w3"], batch_size=2)
        texts = ["w1 w2", "w2", "w3"]
        return [
            found.router_logits,
            found.expert_out,
            says,
            torch.tensor(continuation_log_probs(model, SEQUENCES, texts, batch_size=2)),
        ]

    the_same(recipe, run)


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3", "llama4"])
def test_reports_and_sweeps_of_plans(recipe: str) -> None:
    model = wrapped(recipe)[0]
    layer = model.moe_layers[-1]
    task = answer_task(SEQUENCES, ["w1"] * 3, alternatives=["w4"] * 3, neutral_texts=["w5 w6 w7"])

    def run(model: Any) -> list[Any]:
        parts = [collect_routing(model, SEQUENCES[n : n + 1], progress=False) for n in (0, 1)]
        report = evaluate_steering(
            model,
            SteeringPlan(deactivate=[(layer, 1)]),
            task,
            reverse=SteeringPlan(deactivate=[(layer, 2)]),
            n_random=4,
            progress=False,
        )
        result = sweep(model, risk_difference(*parts), task, sizes=(1,), n_random=1, progress=False)
        numbers = [report.unsteered.rate, report.gap, report.p_any, report.p_matched, result.gap(1)]
        return [torch.tensor(numbers), report.verdict, report.model == result.model]

    the_same(recipe, run)
