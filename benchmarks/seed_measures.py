"""What one trained seed of an organism shows: the demo's verdict, and what the field claims of selections.

about = measured(folder, n_random=20)        # a dictionary for a JSON file
matched_overlap(about_1, about_2)            # of two seeds, (overlap, what random selections would have)

Everything but the demo's own numbers is descriptive: the test prompts choose nothing.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.optimize import linear_sum_assignment

from moe_lens import RoutedModel, SteeringPlan, collect_routing, detect, steer_hooks, sweep
from moe_lens.detection import ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation import LOSS, SweepResult
from moe_lens.organisms import World
from moe_lens.organisms.demo import DemoResult, run_on, world_pairs, world_task
from moe_lens.organisms.recipes import recipe
from moe_lens.organisms.worlds import document
from moe_lens.text import ContrastivePairs, Prompt

SIDES: Final = ("+", "-")
FEW_PAIRS: Final = (2, 5, 10, 20)
"""Detection pairs, drawn among the 48."""
DRAWS: Final = 5
HEADERS: Final = {"no source word": (), "report": ("report",), "rumor": ("rumor",)}
ACTIVATED: Final = (1, 2, 3, 4, 6, 8)


def measured(folder: Path, n_random: int = 20) -> dict[str, Any]:
    """All that the table needs, of one checkpoint of `moe_lens.organisms.train`."""
    about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    model, world = RoutedModel.from_pretrained(folder), World(recipe(about["name"]).variant)
    demo = run_on(model, world, about["name"], n_random=n_random, progress=False)
    report = demo.report
    return {
        "name": about["name"],
        "seed": about["seed"],
        "steps": about["steps"],
        "n_random": n_random,
        "size": demo.size,
        "rates": [report.unsteered.rate, *(report.steered[side].rate for side in SIDES)],
        "gap": report.gap,
        "gap_interval": list(report.gap_interval),
        "p_matched": report.p_matched,
        "p_any": report.p_any,
        "verdict": report.verdict,
        "collateral": [dict(o.collateral) for o in (report.unsteered, *(report.steered[s] for s in SIDES))],
        "selected": {side: [list(expert) for expert in demo.plans[side].deactivate] for side in SIDES},
        "profiles": profiles(model, world),
        "harm_at_equal_effect": harm_at_equal_effect(model, world, demo),
        "few_pairs": few_pairs(model, world, demo),
        "headers": other_headers(model, world, demo),
    }


def profiles(model: RoutedModel, world: World) -> list[list[list[float]]]:
    """[layer expert prompt], how often each expert runs on prompts that all seeds of a world share."""
    if world.variant == "candour":
        doubts = world.doubts("development")[::4]
        prompts = [d.careful for d in doubts] + [d.bold for d in doubts]
    else:
        conflicts = world.conflicts("development")[::4]
        prompts = [c.open_book for c in conflicts] + [c.closed_book for c in conflicts]
    prompts += list(world.generic("development", n=24))
    stats = collect_routing(model, prompts, per_prompt=True, progress=False)
    assert stats.per_prompt is not None
    rates = stats.per_prompt.counts.double() / stats.per_prompt.n_tokens[:, None, None]
    return rates.permute(1, 2, 0).numpy().round(4).tolist()


def matched_overlap(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Share of the selected experts that two seeds have in common, and what is expected of random ones.

    Experts have no order, so those of a layer are first put one to one by how alike their activation on the
    same prompts is (correlation; Hungarian method). The share is 2 |A ∩ B| / (|A| + |B|), A and B both the
    experts deactivated in direction "+", or both those in "-"; the expectation is over random
    sets with as many experts in each layer.
    """
    profiles_1, profiles_2 = np.array(one["profiles"]), np.array(other["profiles"])
    n_experts, partners = profiles_1.shape[1], {}
    for layer in range(len(profiles_1)):
        with np.errstate(invalid="ignore", divide="ignore"):
            alike = np.corrcoef(profiles_1[layer], profiles_2[layer])[:n_experts, n_experts:]
        rows, columns = linear_sum_assignment(-np.nan_to_num(alike))
        partners |= {(layer, int(r)): (layer, int(c)) for r, c in zip(rows, columns, strict=True)}
    common = expected = total = 0.0
    for side in SIDES:
        first = {partners[layer, expert] for layer, expert in one["selected"][side]}
        second = {(layer, expert) for layer, expert in other["selected"][side]}
        common += 2 * len(first & second)
        total += len(first) + len(second)
        for layer in range(len(profiles_1)):
            in_layer = [sum(place == layer for place, _ in chosen) for chosen in (first, second)]
            expected += 2 * in_layer[0] * in_layer[1] / n_experts
    return common / total, expected / total


def harm_at_equal_effect(model: RoutedModel, world: World, demo: DemoResult) -> dict[str, Any]:
    """Generic loss added by deactivation and by activation, for the largest effect that both reach.

    For each direction: plans of several sizes of either kind on the test prompts; the effect that both kinds
    reach is the smaller of their largest ones; the harm is the least of the plans with that effect or more.
    """
    task = world_task(world, "test")
    kinds = {
        "deactivate": demo_sizes(model, demo.scores, task, "deactivate", (2, 4, 6, 8, 10, 12)),
        "activate": demo_sizes(model, demo.scores, task, "activate", ACTIVATED),
    }
    found = {}
    for side, sign in (("+", 1), ("-", -1)):
        effects = {
            kind: [(sign * (p.mean - swept.unsteered), p.collateral[LOSS] - swept.unsteered_collateral[LOSS])
                   for p in swept.points if p.direction == side]
            for kind, swept in kinds.items()
        }  # fmt: skip
        effect = min(max((each for each, _ in points), default=0.0) for points in effects.values())
        found[side] = {"effect": effect} | {
            kind: min((harm for each, harm in points if each >= effect - 1e-12), default=float("nan"))
            for kind, points in effects.items()
        }
    return found


def demo_sizes(model: Any, scores: ExpertScores, task: Any, mode: Any, sizes: Sequence[int]) -> SweepResult:
    """A sweep without random sets."""
    return sweep(model, scores, task, sizes=sizes, mode=mode, n_random=0, progress=False)


def few_pairs(model: RoutedModel, world: World, demo: DemoResult) -> dict[str, Any]:
    """By number of detection pairs: share of the selection that is found, and the gap; means over draws."""
    pairs, task, found = world_pairs(world, "detection"), world_task(world, "test"), {}
    generator = np.random.default_rng(0)
    for n in FEW_PAIRS:
        shares, gaps = [], []
        for _ in range(DRAWS):
            chosen = generator.choice(len(pairs), n, replace=False).tolist()
            plans = selection(model, pairs.select(chosen), demo.size)
            if plans is None:
                continue
            shares.append(share_of(plans, demo.plans))
            rates = [task.values(model, steer_hooks(plans[side])).mean() for side in SIDES]
            gaps.append(float(rates[0] - rates[1]))
        found[str(n)] = {"share": mean(shares), "gap": mean(gaps)}
    return found


def other_headers(model: RoutedModel, world: World, demo: DemoResult) -> dict[str, float | None]:
    """By the documents' source words: the share of the selection that detection finds with these.

    The candour world has no documents, and no share.
    """
    if world.variant == "candour":
        return dict.fromkeys(HEADERS)
    found = {}
    for name, header in HEADERS.items():
        pairs = contrasts_of(world, header)
        plans = selection(model, pairs, demo.size)
        found[name] = None if plans is None else share_of(plans, demo.plans)
    return found


def contrasts_of(world: World, header: tuple[str, ...]) -> ContrastivePairs:
    """The detection pairs with another header in every document."""
    conflicts = world.conflicts("detection")
    return ContrastivePairs.from_lists(
        [
            Prompt(
                f"{document(header, (c.entity, c.attribute, c.document_answer))} {c.closed_book}",
                {"question": c.closed_book},
            )
            for c in conflicts
        ],
        [Prompt(c.closed_book, {"question": c.closed_book}) for c in conflicts],
        span="question",
        clusters=[c.entity for c in conflicts],
    )


def selection(model: RoutedModel, pairs: ContrastivePairs, size: int) -> dict[str, SteeringPlan] | None:
    """Plans of a size for both directions; None where too few experts have the sign."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of too few pairs for a p-value, which nothing here reads
            scores = detect(model, pairs, n_resamples=1, n_permutations=1, progress=False)
        both = [SteeringPlan.from_scores(each, n_deactivate=size) for each in (scores, -scores)]
    except (DataError, PlanError):  # pairs of one country, or too few experts of a sign
        return None
    return dict(zip(SIDES, both, strict=True))


def share_of(plans: dict[str, SteeringPlan], others: dict[str, SteeringPlan]) -> float:
    """Of the experts of both plans, how many the others have."""
    common = sum(len(set(plans[s].deactivate) & set(others[s].deactivate)) for s in SIDES)
    return common / sum(len(others[side].deactivate) for side in SIDES)


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return float(np.mean(values)) if values else None
