"""How many clusters of prompts would show an effect: asked before a long run, answered by the test itself.

required_pairs(detect(model, few_pairs), effect=0.1)                     # from a pilot
required_pairs(AssumedRouting(rate=0.1, n_tokens=20, correlation=0.1, n_experts=1024), effect=0.1)

Data sets of n clusters are drawn, the effect is put in, and the p-values of `detect` are made of them; the
smallest n at which enough of them are small enough is the answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from moe_lens.checks import share, whole_number
from moe_lens.detection.detecting import evidence_of, unit_counts
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.detection.floors import units_needed
from moe_lens.detection.paired_counts import PairedCounts
from moe_lens.detection.paired_statistics import sign_flip_p
from moe_lens.detection.scores import SCORES, Score, variances
from moe_lens.detection.unit_counts import UnitCounts
from moe_lens.detection.unpaired_counts import UnpairedCounts
from moe_lens.detection.unpaired_statistics import permutation_p
from moe_lens.errors import DataError
from moe_lens.results import Result

if TYPE_CHECKING:
    import pandas

_SHARES: Final = (0.1, 0.5, 0.9)
"""Which experts stand for all of a pilot: those that vary more than this share of the experts."""
_RISK: Final = SCORES["risk_difference"]

Draw = Callable[[np.random.Generator, int], UnitCounts]
"""Counts of n units, one column for each expert that is asked about, with the effect in them."""


@dataclass(frozen=True, repr=False)
class AssumedRouting(Result):
    """What a run is expected to count, where there is no pilot: beta-binomial counts.

    The two prompts of a pair are drawn as independent; those that share much need fewer.

    >>> AssumedRouting(rate=0.1, n_tokens=20, correlation=0.1, n_experts=1024).rate
    0.1

    Attributes:
        rate: activation rate of the expert under the second condition, in (0, 1); k / n_experts on average.
        n_tokens: counted tokens a cluster, under each condition.
        correlation: of whether two tokens of a cluster choose the expert, in (0, 1). 0.05 to 0.2 is usual.
        n_experts: of all layers.
        paired: whether prompts come in pairs, or in two groups of as many clusters.

    Raises:
        DataError: numbers outside these ranges.
    """

    rate: float
    n_tokens: int
    correlation: float
    n_experts: int
    paired: bool = True

    def __post_init__(self) -> None:
        share(self.rate, "rate")
        share(self.correlation, "correlation")
        whole_number(self.n_tokens, "n_tokens", least=1)
        whole_number(self.n_experts, "n_experts", least=1)

    def summary(self) -> str:
        """All of it."""
        kind = "pairs" if self.paired else "two groups"
        return (
            f"rate {self.rate:g}, {self.n_tokens} tokens a cluster, correlation {self.correlation:g}, "
            f"{self.n_experts} experts, {kind}"
        )


class PowerRow(NamedTuple):
    """What one expert needs, which stands for those that vary as much from cluster to cluster.

    `share`: of the experts that vary less. `layer` and `expert`: −1 without a pilot. `rate`: its activation
    rate. `n_clusters`: None if more than were tried. `power`: reached in the simulation.
    """

    share: float
    layer: int
    expert: int
    rate: float
    n_clusters: int | None
    power: float


@dataclass(frozen=True, eq=False, repr=False)
class RequiredPairs(Result):
    """How many clusters show a difference of activation rates.

    Attributes:
        effect: the difference of rates, in (0, 1). power: the probability with which an expert of that
        difference is to be found, in (0, 1). q: the q-value that counts as found. n_experts: among how many.
        n_affected: how many of them have such a difference. paired: whether clusters are of pairs; otherwise
        half of them (or the pilot's share) are of each group. prompts_per_cluster: pairs in a cluster of the
        pilot (prompts, if not paired), on average. rows: what experts of little, middling and much noise
        need.
    """

    effect: float
    power: float
    q: float
    n_experts: int
    n_affected: int
    paired: bool
    prompts_per_cluster: float
    rows: tuple[PowerRow, ...]

    @property
    def n_clusters(self) -> int | None:
        """What an expert of middling noise needs; None if more than were tried."""
        return self.rows[len(self.rows) // 2].n_clusters

    @property
    def n_prompts(self) -> int | None:
        """As many pairs (prompts of both groups, if not paired), with clusters as large as the pilot's."""
        return None if self.n_clusters is None else math.ceil(self.n_clusters * self.prompts_per_cluster)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an expert: share, layer, expert, rate, n_clusters, power."""
        import pandas

        return pandas.DataFrame(self.rows, columns=list(PowerRow._fields))

    def summary(self) -> str:
        """The numbers of clusters, for an expert of middling noise and for those of most."""
        counted = [f"{row.n_clusters or 'too many'} for {100 * row.share:g}%" for row in self.rows]
        numbers = ", ".join(counted) if len(counted) > 1 else str(self.n_clusters or "too many")
        return (
            f"clusters needed {numbers}{' of the experts' if len(counted) > 1 else ''}: difference of rates "
            f"{self.effect:g}, power {self.power:g}, q ≤ {self.q:g} among {self.n_experts} experts"
        )


def required_pairs(
    pilot: ExpertScores | AssumedRouting,
    *,
    effect: float,
    power: float = 0.8,
    q: float = 0.05,
    n_affected: int = 1,
    n_permutations: int = 1000,
    n_simulations: int = 200,
    most: int = 4096,
    seed: int = 0,
) -> RequiredPairs:
    """How many clusters of prompts `detect` needs to find an expert with this difference of rates.

    >>> assumed = AssumedRouting(rate=0.1, n_tokens=20, correlation=0.1, n_experts=32)
    >>> needed = required_pairs(assumed, effect=0.3, n_simulations=20)
    >>> 11 <= needed.n_clusters <= 30
    True

    A pilot's clusters are drawn with replacement; its own differences are taken out, the effect is put into
    the first condition, and what is left of each cluster is scaled by √(p (1 − p)), as a rate's spread is. An
    expert counts as found if p ≤ q · max(1, n_affected · power) / n_experts, where Benjamini and Hochberg's
    line stands if as many are found as expected. Simulation error of the power: √(0.16 / n_simulations) at
    0.8; the pilot's own error comes on top, so give it 20 clusters or more.

    Args:
        pilot: from `detect` or `compare_routing`, whose numbers of tokens, clusters and experts are those of
            the run to come; or `AssumedRouting`.
        effect: the difference of activation rates, in (0, 1).
        power: with which probability it is to be found, in (0, 1).
        q: which q-value counts as found, in (0, 1).
        n_affected: how many experts have such a difference: the more, the fewer clusters each needs.
        n_permutations: of the test.
        n_simulations: data sets per number of clusters.
        most: clusters that are tried, at most.
        seed: of the draws.

    Raises:
        DataError: numbers out of range, scores without evidence, or an effect larger than a rate can differ.
    """
    share(effect, "effect", remedy="It is a difference of activation rates.")
    share(power, "power")
    share(q, "q")
    for name, value in (("n_permutations", n_permutations), ("n_simulations", n_simulations)):
        whole_number(value, name, least=1)
    whole_number(most, "most", least=4)
    if isinstance(pilot, AssumedRouting):
        asked, draw, paired = [(0.5, -1, -1, pilot.rate)], _assumed(pilot, effect), pilot.paired
        n_experts, per_cluster = pilot.n_experts, 1.0
    else:
        evidence, _ = evidence_of(pilot)
        counts = unit_counts(_RISK, pilot.stats_1, pilot.stats_2, evidence.clusters, evidence.clusters_2)
        columns = _representative(_RISK, counts)
        asked = [_named(pilot, below, column) for below, column in columns]
        draw = _resampled(counts.experts([column for _, column in columns]), effect)
        n_experts, paired = counts.n_experts, evidence.is_paired
        per_cluster = (len(evidence.clusters) + len(evidence.clusters_2 or ())) / counts.n_units
    whole_number(n_affected, "n_affected", least=1, most=n_experts)
    small_enough = q * max(1.0, n_affected * power) / n_experts

    def found(n_clusters: int) -> np.ndarray:
        generator, hits = np.random.default_rng([seed, n_clusters]), np.zeros(len(asked))
        for number in range(n_simulations):
            p = _p_values(draw(generator, n_clusters), n_permutations, number)
            hits += p <= small_enough * (1 + 1e-9)
        return hits / n_simulations

    least = units_needed(1, small_enough, paired) * (1 if paired else 2)
    found_at = _remembered(found)
    rows = []
    for column, about in enumerate(asked):
        power_at = partial(_of_column, found_at, column)
        rows.append(PowerRow(*about, *smallest_with_power(power_at, power, least, most)))
    return RequiredPairs(effect, power, q, n_experts, n_affected, paired, per_cluster, tuple(rows))


def _p_values(counts: UnitCounts, n_permutations: int, seed: int) -> np.ndarray:
    if isinstance(counts, UnpairedCounts):
        return permutation_p(_RISK, counts, n_permutations=n_permutations, seed=seed)
    return sign_flip_p(_RISK, counts, n_permutations=n_permutations, seed=seed)


def _of_column(power_of: Callable[[int], np.ndarray], column: int, n: int) -> float:
    return float(power_of(n)[column])


def _remembered(function: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    known: dict[int, np.ndarray] = {}

    def of(n: int) -> np.ndarray:
        if n not in known:
            known[n] = function(n)
        return known[n]

    return of


def smallest_with_power(
    power_at: Callable[[int], float], power: float, least: int, most: int
) -> tuple[int | None, float]:
    """The smallest n with that power, to within 4 %, and its power; None if `most` has less."""
    low, high = least - 1, min(least, most)
    while power_at(high) < power:
        if high >= most:
            return None, float(power_at(high))
        low, high = high, min(2 * high, most)
    while high - low > max(1, high // 25):
        middle = (low + high) // 2
        low, high = (low, middle) if power_at(middle) >= power else (middle, high)
    return high, float(power_at(high))


def _assumed(assumed: AssumedRouting, effect: float) -> Draw:
    """Beta-binomial counts."""
    if assumed.rate + effect >= 1:
        raise DataError(f"A rate of {assumed.rate:g} cannot grow by {effect:g}; rates are at most 1.")
    scale = 1 / assumed.correlation - 1

    def side(generator: np.random.Generator, rate: float, n: int) -> tuple[np.ndarray, np.ndarray]:
        rates = generator.beta(rate * scale, (1 - rate) * scale, (n, 1))
        return generator.binomial(assumed.n_tokens, rates), np.full(n, assumed.n_tokens)

    def draw(generator: np.random.Generator, n: int) -> UnitCounts:
        n_1, n_2 = (n, n) if assumed.paired else ((n + 1) // 2, n // 2)
        both = (*side(generator, assumed.rate + effect, n_1), *side(generator, assumed.rate, n_2))
        return PairedCounts.of_pairs(*both) if assumed.paired else UnpairedCounts.of_prompts(*both)

    return draw


def _resampled(counts: UnitCounts, effect: float) -> Draw:
    """A pilot's units, without their own differences and with the effect."""
    tokens = counts.tokens_1.sum() + counts.tokens_2.sum()
    pooled = (counts.sums_1.sum(0) + counts.sums_2.sum(0)) / tokens
    raised = np.where(pooled + effect < 1, pooled + effect, pooled - effect)
    if (raised < 0).any():
        rate = pooled[raised < 0][0]
        raise DataError(f"A rate of {rate:.2g} cannot differ by {effect:g}; rates are in [0, 1].")
    growth = np.sqrt(raised * (1 - raised) / np.maximum(pooled * (1 - pooled), 1e-12))
    sides = []
    for sums, of_side, rate, scale in (
        (counts.sums_1, counts.tokens_1, raised, growth),
        (counts.sums_2, counts.tokens_2, pooled, np.ones_like(growth)),
    ):
        own = sums.sum(0) / of_side.sum()
        sides += [(rate * of_side[:, None] + scale * (sums - own * of_side[:, None])), of_side]
    strata = counts.strata
    kind = UnpairedCounts if isinstance(counts, UnpairedCounts) else PairedCounts

    def draw(generator: np.random.Generator, n: int) -> UnitCounts:
        drawn = []
        for stratum in np.unique(strata):
            units = np.flatnonzero(strata == stratum)
            drawn.append(generator.choice(units, max(2, round(n * len(units) / len(strata)))))
        rows = np.concatenate(drawn)
        return kind.trusted(*(values[rows] for values in sides), *([None] * (kind is PairedCounts)))

    return draw


def _representative(score: Score, counts: UnitCounts) -> list[tuple[float, int]]:
    """(share of the experts that vary less, column) of three experts, among those that fire."""
    noise = np.sqrt(variances(score.influences(counts), counts.strata).sum(0))
    fires = np.flatnonzero(noise > 0)
    if not len(fires):
        raise DataError("No expert's rate varies from cluster to cluster in this pilot; give more prompts.")
    order = fires[np.argsort(noise[fires], kind="stable")]
    return [(share, int(order[min(int(share * len(order)), len(order) - 1)])) for share in _SHARES]


def _named(pilot: ExpertScores, share: float, column: int) -> tuple[float, int, int, float]:
    row, expert = divmod(column, pilot.shape.n_experts)
    both = pilot.stats_1.counts + pilot.stats_2.counts
    rate = float(both[row, expert]) / (pilot.stats_1.n_tokens + pilot.stats_2.n_tokens)
    return share, pilot.shape.layers[row], expert, rate
