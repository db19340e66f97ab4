"""The number of prompts that is promised to be enough is enough: by formula, and by brute force."""

import inspect
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from moe_lens.errors import DataError
from moe_lens.evaluation import AssumedAnswers, RequiredPrompts, SteeringReport, required_prompts
from moe_lens.evaluation.outcomes import ANY_LAYER, DIRECTIONS, LAYER_MATCHED, Outcome
from moe_lens.steering.plan import SteeringPlan
from tests.families import broad

SIZE, CORRELATION = 3, 0.3


def by_formula(assumed: AssumedAnswers, gap: float, power: float, level: float = 0.95) -> float:
    """Clusters whose mean difference, normal, lies so many standard errors above 0."""
    rates = (assumed.rate + gap / 2, assumed.rate - gap / 2)
    size = assumed.prompts_per_cluster
    design = 1 + (size - 1) * assumed.correlation
    variance = sum(rate * (1 - rate) for rate in rates) * design / size
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) ** 2 * variance / gap**2


@pytest.mark.parametrize(
    ("assumed", "gap", "power"),
    [
        (AssumedAnswers(0.5), 0.3, 0.8),
        (AssumedAnswers(0.5, 5, 0.4), 0.2, 0.8),
        (AssumedAnswers(0.3, 2, 0.1), 0.25, 0.95),
    ],
)
def test_assumptions_need_what_the_formula_says(assumed: AssumedAnswers, gap: float, power: float) -> None:
    """Within what 200 draws and the width of the search leave open; the design effect alone is 1.2 to 2.6."""
    needed = required_prompts(assumed, gap=gap, power=power, n_simulations=200)
    assert needed.by == "interval"
    assert needed.n_clusters == pytest.approx(by_formula(assumed, gap, power), rel=0.25)
    assert needed.n_prompts == needed.n_clusters * assumed.prompts_per_cluster  # type: ignore[operator]
    assert [n for n, _ in needed.tried] == sorted(n for n, _ in needed.tried)
    assert dict(needed.tried)[needed.n_clusters or 0] >= power


def process(
    generator: np.random.Generator, n: int, gap: float, n_random: int = 6, share_changed: float = 0.7
) -> SteeringReport:
    """A task of n clusters: prompts that both plans change together or not at all, and idle random sets.

    Rates of clusters are normal on the probit scale, so that this is another process than the assumed one.
    """
    labels = np.repeat(np.arange(n), SIZE)
    levels = generator.normal(0, 0.8, n)[labels]
    base = (levels + generator.normal(0, 1, len(labels)) > 0).astype(float)
    moved = generator.random(len(labels)) < share_changed  # these answer anew, by a coin, under each plan
    coins = {side: generator.random(len(labels)) for side in ("+", "-")}
    chance = {"+": 0.5 + gap / share_changed / 2, "-": 0.5 - gap / share_changed / 2}
    steered = {side: np.where(moved, coins[side] < chance[side], base).astype(float) for side in ("+", "-")}

    def idle() -> Outcome:
        own = generator.random(len(labels)) < 0.1
        return Outcome(np.where(own, generator.random(len(labels)) < 0.5, base).astype(float), {})

    plan = SteeringPlan([(0, 0)])
    return SteeringReport(
        "task", "m", {"+": plan, "-": plan}, tuple(map(str, labels)), Outcome(base, {}),
        {side: Outcome(values, {}) for side, values in steered.items()},
        {kind: {side: [idle() for _ in range(n_random)] for side in DIRECTIONS}
         for kind in (LAYER_MATCHED, ANY_LAYER)},
        None, {}, 0.05, 0.95, int(generator.integers(2**31)),
    )  # fmt: skip


def reached(n: int, gap: float, n_sets: int, seed: int = 9) -> float:
    generator = np.random.default_rng(seed)
    return float(np.mean([process(generator, n, gap).verdict for _ in range(n_sets)]))


@broad
def test_a_pilot_promises_what_the_process_behind_it_keeps() -> None:
    """Pilots with another gap than the one that is asked about."""
    told = []
    for seed in range(4):
        pilot = process(np.random.default_rng(seed), 60, gap=0.3)
        needed = required_prompts(pilot, gap=0.2, n_simulations=60, seed=seed)
        assert needed.by == "verdict"
        assert needed.prompts_per_cluster == SIZE
        told.append(needed.n_clusters or 0)
    mean = round(float(np.mean(told)))
    assert 0.65 <= reached(mean, 0.2, 100) <= 0.95
    assert reached(mean // 2, 0.2, 60) < 0.65


@pytest.mark.broad
def test_larger_gaps_need_fewer_and_more_power_more() -> None:
    pilot = process(np.random.default_rng(1), 40, gap=0.3)

    def needed(**changes: Any) -> int:
        found = required_prompts(pilot, **{"gap": 0.25, "n_simulations": 20, "most": 400, **changes})
        return found.n_clusters or 401

    middle = needed()
    assert needed(gap=0.5) < middle < needed(gap=0.15)
    assert needed(power=0.5) < middle <= needed(level=0.999)


@pytest.mark.broad
def test_a_pilots_other_measures_and_sizes_do_not_matter() -> None:
    """Values need not be zeros and ones: in another unit the answer is the same."""
    pilot = process(np.random.default_rng(2), 30, gap=0.3)

    def scaled(outcome: Outcome) -> Outcome:
        return Outcome(7.0 * outcome.values - 2.0, {})

    other = SteeringReport(
        pilot.task, pilot.model, dict(pilot.plans), pilot.clusters, scaled(pilot.unsteered),
        {side: scaled(pilot.steered[side]) for side in DIRECTIONS},
        {kind: {side: [scaled(one) for one in sets[side]] for side in DIRECTIONS}
         for kind, sets in pilot.controls.items()},
        None, {}, 0.05, 0.95, 0,
    )  # fmt: skip
    own = pilot.gap  # with its own gap nothing is put in or taken out, and zeros and ones keep their spread
    options: Any = {"n_simulations": 20, "most": 400}
    assert (
        required_prompts(pilot, gap=own, **options).n_clusters
        == required_prompts(other, gap=7.0 * own, **options).n_clusters
    )


def test_what_random_sets_do_as_well_is_never_shown() -> None:
    pilot = process(np.random.default_rng(3), 40, gap=0.3)
    loud = {
        kind: {"+": [pilot.steered["+"]] * 6, "-": [pilot.steered["-"]] * 6}
        for kind in (LAYER_MATCHED, ANY_LAYER)
    }
    report = SteeringReport(
        pilot.task, pilot.model, dict(pilot.plans), pilot.clusters, pilot.unsteered, dict(pilot.steered),
        loud, None, {}, 0.05, 0.95, 0,
    )  # fmt: skip
    needed = required_prompts(report, gap=pilot.gap * 0.9, n_simulations=5, most=40)
    assert needed.n_clusters is None
    assert needed.n_prompts is None
    assert "more than 40 clusters" in repr(needed)
    assert all(power == 0 for _, power in needed.tried)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gap": 0.0}, "gap must be a number above 0"),
        ({"gap": -0.2}, "gap must be"),
        ({"gap": math.nan}, "gap must be"),
        ({"gap": True}, "gap must be"),
        ({"gap": "0.2"}, "gap must be"),
        ({"gap": 1.0}, "gap must be a number between 0 and 1"),
        ({"gap": 0.2, "power": 1.0}, "power must be"),
        ({"gap": 0.2, "level": 95}, "level must be"),
        ({"gap": 0.2, "n_simulations": 0}, "n_simulations must be"),
        ({"gap": 0.2, "most": 9}, "most must be"),
    ],
)
def test_what_cannot_be_asked_is_said(options: dict[str, Any], words: str) -> None:
    pilot = process(np.random.default_rng(4), 12, gap=0.3)
    unchecked: Any = inspect.unwrap(required_prompts)  # without the annotations, which tests check
    with pytest.raises(DataError, match=words):
        unchecked(pilot, **options)


def test_pilots_and_assumptions_that_say_nothing_are_refused() -> None:
    pilot = process(np.random.default_rng(5), 12, gap=0.3)
    ones, zeros = (Outcome(np.full(12 * SIZE, value), {}) for value in (1.0, 0.0))
    whole = SteeringReport(
        pilot.task, pilot.model, dict(pilot.plans), pilot.clusters, pilot.unsteered,
        {"+": ones, "-": zeros}, dict(pilot.controls), None, {}, 0.05, 0.95, 0,
    )  # fmt: skip
    with pytest.raises(DataError, match="every prompt differs by the same"):
        required_prompts(whole, gap=0.2)
    with pytest.raises(DataError, match=r"needs rates of 1\.05 and 0\.75"):
        required_prompts(AssumedAnswers(0.9), gap=0.3)
    for wrong in ((1.0, 1, 0.1), (0.5, 0, 0.1), (0.5, 1, 0.0)):
        with pytest.raises(DataError, match="must be"):
            AssumedAnswers(*wrong)


def test_it_shows_itself() -> None:
    needed = RequiredPrompts(0.2, 0.8, 0.95, "verdict", 2.5, 13, ((10, 0.7), (13, 0.82)))
    assert repr(needed) == (
        "RequiredPrompts(13 clusters (33 prompts) for a gap of 0.2 with power 0.8, by the verdict)"
    )
    assert needed.to_dataframe()["n_clusters"].tolist() == [10, 13]
    assert "<th>power</th>" in needed._repr_html_()
