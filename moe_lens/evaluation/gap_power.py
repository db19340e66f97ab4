"""How many prompts would show what a plan does to a behaviour: asked before a long run.

required_prompts(evaluate_steering(model, plan, few_prompts), gap=0.2)         # from a pilot, by the verdict
required_prompts(AssumedAnswers(rate=0.5, prompts_per_cluster=4, correlation=0.2), gap=0.2)

Data sets of n clusters are drawn with the gap in them; the smallest n at which enough of them show it is the
answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float

from moe_lens.checks import share, short, whole_number
from moe_lens.detection.power import smallest_with_power
from moe_lens.errors import DataError
from moe_lens.evaluation.outcomes import DIRECTIONS, Outcome
from moe_lens.evaluation.report import SteeringReport
from moe_lens.resampling import clustered_interval
from moe_lens.results import Result

if TYPE_CHECKING:
    import pandas

LEAST: Final = 10
"""Clusters that are asked for, at least: with fewer, bootstrap intervals are too narrow."""
_N_RESAMPLES: Final = 500

Shown = Callable[[np.random.Generator, int], bool]
"""Whether a data set of n clusters, drawn anew with the gap in it, shows that."""


@dataclass(frozen=True, repr=False)
class AssumedAnswers(Result):
    """What a task is expected to give, where there is no pilot: zeros and ones, beta-binomial in clusters.

    The same prompts under the plan and under its reverse are drawn as independent; where most of them answer
    alike under both, fewer are needed.

    >>> AssumedAnswers(rate=0.5, prompts_per_cluster=4, correlation=0.2)
    AssumedAnswers(mean 0.5 of both directions, 4 prompts a cluster, correlation 0.2)

    Attributes:
        rate: the share of prompts that show the behaviour, mean of both directions, in (0, 1).
        prompts_per_cluster: prompts about the same thing.
        correlation: of two prompts of a cluster under the same plan, in (0, 1).

    Raises:
        DataError: numbers outside these ranges.
    """

    rate: float
    prompts_per_cluster: int = 1
    correlation: float = 0.1

    def __post_init__(self) -> None:
        share(self.rate, "rate")
        share(self.correlation, "correlation")
        whole_number(self.prompts_per_cluster, "prompts_per_cluster", least=1)

    def summary(self) -> str:
        """All of it."""
        size = self.prompts_per_cluster
        return (
            f"mean {self.rate:g} of both directions, {size} prompt{'s' * (size > 1)} a cluster, correlation "
            f"{self.correlation:g}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class RequiredPrompts(Result):
    """How many clusters of prompts show a two-way gap.

    Attributes:
        gap: the two-way gap, in the measure's unit. power: the probability with which it is to be shown.
        level: of the intervals. by: what shows it: "verdict", random sets included, or "interval", which lies
        above 0. prompts_per_cluster: on average. n_clusters: the answer; None if more than were tried. tried:
        (clusters, the power that they have), in ascending order.
    """

    gap: float
    power: float
    level: float
    by: str
    prompts_per_cluster: float
    n_clusters: int | None
    tried: tuple[tuple[int, float], ...]

    @property
    def n_prompts(self) -> int | None:
        """As many prompts, in clusters as large as the pilot's."""
        return None if self.n_clusters is None else math.ceil(self.n_clusters * self.prompts_per_cluster)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a number of clusters that was tried: n_clusters, power."""
        import pandas

        return pandas.DataFrame(self.tried, columns=["n_clusters", "power"])

    def summary(self) -> str:
        """The numbers of clusters and prompts, for what."""
        needed = (
            f"more than {self.tried[-1][0]} clusters"
            if self.n_clusters is None
            else f"{self.n_clusters} clusters ({self.n_prompts} prompts)"
        )
        return f"{needed} for a gap of {self.gap:g} with power {self.power:g}, by the {self.by}"


def required_prompts(
    pilot: SteeringReport | AssumedAnswers,
    *,
    gap: float,
    power: float = 0.8,
    level: float | None = None,
    n_simulations: int = 100,
    most: int = 2048,
    seed: int = 0,
) -> RequiredPrompts:
    """How many clusters of prompts `evaluate_steering` needs to show a two-way gap of this size.

    >>> assumed = AssumedAnswers(rate=0.5, prompts_per_cluster=4, correlation=0.2)
    >>> needed = required_prompts(assumed, gap=0.25, n_simulations=40)   # by a normal's formula 24
    >>> 14 <= needed.n_clusters <= 40, needed.n_prompts == 4 * needed.n_clusters
    (True, True)

    From a report: its clusters are drawn with replacement, with its own gap taken out and the asked one put
    in, half of it on each side of the unsteered mean (as far as zeros and ones have room there), and the
    report's verdict is asked, against its random sets. What else prompts differ in stays. Of zeros and ones
    the spread is that of as many prompts that change as in the pilot, or of as many as the gap needs. From
    assumptions, which know no random sets: the bootstrap interval of the gap must lie above 0; the verdict
    asks for more.

    The error of the simulated power is √(0.16 / n_simulations) at 0.8; a pilot's own error comes on top, so
    give it 20 clusters or more. The answer is at least 10 clusters.

    Args:
        pilot: from `evaluate_steering`, whose clusters are like those to come; or `AssumedAnswers`.
        gap: mean behaviour under the plan minus that under its reverse, above 0; for zeros and ones below 1.
        power: with which probability it is to be shown, in (0, 1).
        level: of the intervals; None: the report's, or 0.95.
        n_simulations: data sets per number of clusters.
        most: clusters that are tried, at most.
        seed: of the draws.

    Raises:
        DataError: numbers out of range; a pilot in which the difference of both directions is the same for
            every prompt; a gap for which rates would leave [0, 1].
    """
    gap, power = _positive(gap), share(power, "power")
    whole_number(n_simulations, "n_simulations", least=1)
    whole_number(most, "most", least=LEAST)
    whole_number(seed, "seed")
    if level is not None:
        share(level, "level")
    if isinstance(pilot, SteeringReport):
        report = pilot if level is None else replace(pilot, level=level)
        shown, level, by = _by_verdict(report, gap), report.level, "verdict"
        per_cluster = len(report.clusters) / len(set(report.clusters))
    else:
        level, by, per_cluster = level or 0.95, "interval", float(pilot.prompts_per_cluster)
        shown = _by_interval(pilot, gap, level)
    tried: dict[int, float] = {}

    @cache
    def power_at(n_clusters: int) -> float:
        generator = np.random.default_rng([seed, n_clusters])
        hits = sum(shown(generator, n_clusters) for _ in range(n_simulations))
        tried[n_clusters] = hits / n_simulations
        return tried[n_clusters]

    n_clusters, _ = smallest_with_power(power_at, power, LEAST, most)
    return RequiredPrompts(gap, power, level, by, per_cluster, n_clusters, tuple(sorted(tried.items())))


def _positive(gap: Any) -> float:
    if isinstance(gap, bool) or not isinstance(gap, int | float | np.number) or not 0 < gap < math.inf:
        raise DataError(
            f"gap must be a number above 0: mean behaviour under the plan minus that under its reverse; got "
            f"{short(gap)}."
        )
    return float(gap)


def _by_interval(assumed: AssumedAnswers, gap: float, level: float) -> Shown:
    high, low = assumed.rate + gap / 2, assumed.rate - gap / 2
    if high >= 1 or low <= 0:
        raise DataError(
            f"A gap of {gap:g} around {assumed.rate:g} needs rates of {high:g} and {low:g}; rates are "
            "between 0 and 1."
        )
    size, scale = assumed.prompts_per_cluster, 1 / assumed.correlation - 1

    def shown(generator: np.random.Generator, n: int) -> bool:
        answers = [
            generator.random((n, size)) < generator.beta(rate * scale, (1 - rate) * scale, (n, 1))
            for rate in (high, low)
        ]
        differences = (answers[0].astype(float) - answers[1]).ravel()
        labels = np.repeat(np.arange(n), size)
        return _lies_above(differences, labels, level, int(generator.integers(2**31)))

    return shown


def _lies_above(values: np.ndarray, clusters: np.ndarray, level: float, seed: int) -> bool:
    labels = [str(label) for label in clusters.tolist()]
    return clustered_interval(values, labels, level=level, n_resamples=_N_RESAMPLES, seed=seed)[0] > 0


def _by_verdict(report: SteeringReport, gap: float) -> Shown:
    values = {side: report.steered[side].values for side in DIRECTIONS}
    plus, minus = _with_gap(values["+"], values["-"], gap, report.unsteered.rate)
    with_gap = replace(
        report, steered={"+": Outcome(plus, _none(report)), "-": Outcome(minus, _none(report))}
    )
    _, member_of = np.unique(np.asarray(report.clusters), return_inverse=True)
    members = [np.flatnonzero(member_of == number) for number in range(int(member_of.max()) + 1)]

    def shown(generator: np.random.Generator, n: int) -> bool:
        chosen = [members[number] for number in generator.integers(len(members), size=n)]
        return _of_prompts(with_gap, chosen, int(generator.integers(2**31))).verdict

    return shown


def _of_prompts(report: SteeringReport, clusters: list[np.ndarray], seed: int) -> SteeringReport:
    """The report on these clusters of its prompts, each of which is one by itself."""
    rows = np.concatenate(clusters)

    def of(outcome: Outcome) -> Outcome:
        return Outcome(outcome.values[rows], outcome.collateral)

    return replace(
        report,
        clusters=tuple(str(number) for number, own in enumerate(clusters) for _ in own),
        unsteered=of(report.unsteered),
        steered={side: of(report.steered[side]) for side in DIRECTIONS},
        controls={
            kind: {side: [of(outcome) for outcome in sets[side]] for side in DIRECTIONS}
            for kind, sets in report.controls.items()
        },
        bottom=None,
        seed=seed,
    )


def _none(report: SteeringReport) -> dict[str, float]:
    """No harm, which the verdict does not ask about."""
    return dict.fromkeys(report.limits, 0.0)


def _with_gap(
    plus: Float[np.ndarray, "prompt"], minus: Float[np.ndarray, "prompt"], gap: float, middle: float
) -> tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]:
    """Values whose means lie half the gap above and below the middle, and that otherwise differ as before.

    Zeros and ones: if a share m of the prompts changes, the differences vary by m − gap². A larger gap than m
    makes it m.
    """
    differences = plus - minus
    own = differences.mean()
    if np.ptp(differences) < 1e-12:
        raise DataError(
            "In this pilot every prompt differs by the same between the plan and its reverse, so that "
            "nothing is known of how much prompts vary. Give more prompts, or AssumedAnswers."
        )
    scale = 1.0
    if np.isin([plus, minus], (0.0, 1.0)).all():
        share(gap, "gap", remedy="Values of zeros and ones differ by no more.")
        changed = np.square(differences).mean()
        scale = math.sqrt((max(changed, gap) - gap**2) / (changed - own**2))
        middle = min(max(middle, gap / 2), 1 - gap / 2)
    return (
        middle + gap / 2 + scale * (plus - plus.mean()),
        middle - gap / 2 + scale * (minus - minus.mean()),
    )
