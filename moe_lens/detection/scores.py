"""What a score of an expert is: a formula on samples and resamples, and what intervals and tests need of it.

SCORES["risk_difference"].of(counts)          # [expert], from PairedCounts

A new score is one subclass of `Score` with a name, a label, `pooled` and `slope`. An instance of it can stand
wherever the name of a score can: `detect(model, pairs, score=MyScore())`.
"""

import math
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Int

from moe_lens.detection.paired_counts import PairedCounts
from moe_lens.detection.unit_counts import UnitCounts
from moe_lens.errors import DataError

LARGEST_T: Final = 1e6  # what paired_t says where all units differ by the same amount
_SUMS: Final = ("counts", "probability_sums")


class Score:
    """One number per expert from paired counts, positive where the expert goes with the first condition.

    >>> import numpy as np
    >>> class LogRateRatio(Score):
    ...     name, label = "log_rate_ratio", "log ratio of activation rates (nats)"
    ...     def pooled(self, a1, n1, a2, n2):
    ...         return np.log((a1 + 0.5) / (n1 + 0.5)) - np.log((a2 + 0.5) / (n2 + 0.5))
    ...     def slope(self, a, n):
    ...         return n / (a + 0.5)
    >>> counts = PairedCounts.of_pairs([[3.0], [1.0]], [4, 4], [[1.0], [0.0]], [4, 4])
    >>> LogRateRatio().of(counts).round(3).tolist()
    [1.099]

    A score of the form f(rate 1) − f(rate 2), with rates over all units, defines `pooled` and `slope`; all
    else follows. A score of another form overrides the methods after these two, as `PairedT` does.

    Attributes:
        name: what `ExpertScores.score` and files call it.
        label: for the axes of figures, with its unit.
        sums: what is summed: "counts", how often the expert was among the top-k, or "probability_sums", its
            softmax probability.
        bounds: the smallest and the largest value that the score can take; intervals are cut there.
        least_units: how many units the score itself needs; intervals and tests need two.
        needs_pairs: whether the score is about pairs, so that two groups of different prompts have none.
        is_rate_difference: whether it is rate 1 − rate 2, so that an interval for rare experts is known.
    """

    name: str = ""
    label: str = ""
    sums: str = "counts"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    least_units: int = 1
    needs_pairs: bool = False
    is_rate_difference: bool = False

    @property
    def counts_events(self) -> bool:
        """Whether what is summed are events, so that a binomial test guards rare experts."""
        return self.sums == "counts"

    def pooled(self, a1: Any, n1: Any, a2: Any, n2: Any) -> Any:
        """The score from sums A and numbers of tokens N under both conditions.

        Args:
            a1, a2: [expert], or [resample expert].
            n1, n2: numbers, or [resample 1].
        """
        raise NotImplementedError(f"{type(self).__name__} must define pooled(a1, n1, a2, n2).")

    def slope(self, a: Any, n: Any) -> Any:
        """The derivative of one condition's part of the score with respect to its rate A / N."""
        raise NotImplementedError(f"{type(self).__name__} must define slope(a, n).")

    def of(self, counts: UnitCounts) -> Float[np.ndarray, "expert"]:
        """The score of each expert over all units."""
        return self.pooled(
            counts.sums_1.sum(0), counts.tokens_1.sum(), counts.sums_2.sum(0), counts.tokens_2.sum()
        )

    def effect(self, counts: UnitCounts) -> Float[np.ndarray, "expert"]:
        """What the interval is made for: the score, or a number that `as_score` turns into it."""
        return self.of(counts)

    def resampled_effect(
        self, counts: UnitCounts, weights: Float[np.ndarray, "resample unit"]
    ) -> Float[np.ndarray, "resample expert"]:
        """`effect` on resamples; `weights` say how often each unit was drawn."""
        return self.pooled(
            weights @ counts.sums_1,
            (weights @ counts.tokens_1)[:, None],
            weights @ counts.sums_2,
            (weights @ counts.tokens_2)[:, None],
        )

    def resampled(
        self, counts: UnitCounts, weights: Float[np.ndarray, "resample unit"]
    ) -> Float[np.ndarray, "resample expert"]:
        """The score on resamples."""
        return self.resampled_effect(counts, weights)

    def as_score(
        self,
        bound: Float[np.ndarray, "expert"],
        effect: Float[np.ndarray, "expert"],
        error: Float[np.ndarray, "expert"],
    ) -> Float[np.ndarray, "expert"]:
        """A bound of the effect as a bound of the score; `error` is the standard error of the effect."""
        return np.clip(bound, *self.bounds)

    def influences(self, counts: UnitCounts) -> Float[np.ndarray, "unit expert"]:
        """n − 1 times how far leaving out each unit moves the effect, linearly; n units are in its stratum.

        Their standard error is that of the jackknife: exactly for a difference of rates, to first order for a
        curved score.
        """
        parts = []
        for sums, tokens in ((counts.sums_1, counts.tokens_1), (counts.sums_2, counts.tokens_2)):
            a, n = sums.sum(0), tokens.sum()
            moved = (sums - a / n * tokens[:, None]) / (n - tokens)[:, None]
            parts.append(moved * self.slope(a, n))
        return (parts[0] - parts[1]) * (_sizes(counts.strata) - 1)[:, None]

    def null_contributions(self, counts: UnitCounts) -> Float[np.ndarray, "unit expert"]:
        """What changes its sign when a unit swaps its conditions: its part of the risk difference.

        (A1u − P N1u) / N1 − (A2u − P N2u) / N2, with P the pooled rate of both conditions.
        """
        n1, n2 = counts.tokens_1.sum(), counts.tokens_2.sum()
        pooled = (counts.sums_1.sum(0) + counts.sums_2.sum(0)) / (n1 + n2)
        share_1, share_2 = (counts.tokens_1 / n1)[:, None], (counts.tokens_2 / n2)[:, None]
        contributions = (counts.sums_1 / n1 - pooled * share_1) - (counts.sums_2 / n2 - pooled * share_2)
        # what rounding leaves of a zero would count as evidence
        scale = counts.sums_1 / n1 + counts.sums_2 / n2 + pooled * (share_1 + share_2)
        contributions[np.abs(contributions) <= 1e-14 * scale] = 0
        return contributions

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class RiskDifference(Score):
    """A1/N1 − A2/N2, in [-1, 1] (SteerMoE, arXiv 2509.09660)."""

    name = "risk_difference"
    label = "risk difference of activation"
    bounds = (-1.0, 1.0)
    is_rate_difference = True

    def pooled(self, a1: Any, n1: Any, a2: Any, n2: Any) -> Any:
        """Over the common denominator, so that equal differences are equal in float64 and tie."""
        return (a1 * n2 - a2 * n1) / (n1 * n2)

    def slope(self, a: Any, n: Any) -> Any:
        """1: the score is the rate itself."""
        return 1.0


class ProbabilityDifference(RiskDifference):
    """The risk difference of summed softmax probabilities: a difference of mean router probability."""

    name = "probability_difference"
    label = "difference of mean router probability"
    sums = "probability_sums"


class LogOddsRatio(Score):
    """Difference of ln((A + ½) / (N − A + ½)), nats (Haldane 1956, Anscombe 1956).

    With unequal N the halves pull rare experts towards ln(N2/N1), not 0: look at q before you believe a rare
    one. 0 where the expert never fires, or always does.
    """

    name = "log_odds_ratio"
    label = "log odds ratio of activation"

    def pooled(self, a1: Any, n1: Any, a2: Any, n2: Any) -> Any:
        """The ratio; 0 where both rates are 0 or both are 1, as unequal lengths alone would give a score."""
        ratio = np.log((a1 + 0.5) / (n1 - a1 + 0.5)) - np.log((a2 + 0.5) / (n2 - a2 + 0.5))
        same = ((a1 == 0) & (a2 == 0)) | ((a1 == n1) & (a2 == n2))
        return np.where(same, 0.0, ratio)

    def slope(self, a: Any, n: Any) -> Any:
        """Of the log odds with their halves."""
        return n / (a + 0.5) + n / (n - a + 0.5)


class PairedT(Score):
    """Mean of the units' rate differences over its standard error (`scipy.stats.ttest_rel`), within ±10⁶.

    0 where no unit differs. Its interval is that of the mean difference, with bounds divided by the observed
    standard error.
    """

    name = "paired_t"
    label = "paired t statistic"
    least_units = 2
    needs_pairs = True

    def of(self, counts: UnitCounts) -> Float[np.ndarray, "expert"]:
        """The t statistic of the units' rate differences."""
        return _t_statistic(self.effect(counts), standard_error(_rate_differences(counts)))

    def effect(self, counts: UnitCounts) -> Float[np.ndarray, "expert"]:
        """The mean rate difference."""
        return _rate_differences(counts).mean(0)

    def resampled_effect(
        self, counts: UnitCounts, weights: Float[np.ndarray, "resample unit"]
    ) -> Float[np.ndarray, "resample expert"]:
        """The mean rate difference of the units drawn."""
        return weights @ _rate_differences(counts) / counts.n_units

    def resampled(
        self, counts: UnitCounts, weights: Float[np.ndarray, "resample unit"]
    ) -> Float[np.ndarray, "resample expert"]:
        """The t statistic of the units drawn."""
        n, differences = counts.n_units, _rate_differences(counts)
        centre = differences.mean(0)
        centred = differences - centre  # else the variance is a small difference of large numbers
        shift = weights @ centred / n
        variance = np.maximum(weights @ centred**2 / n - shift**2, 0)
        return _t_statistic(centre + shift, np.sqrt(variance / (n - 1)))

    def as_score(
        self,
        bound: Float[np.ndarray, "expert"],
        effect: Float[np.ndarray, "expert"],
        error: Float[np.ndarray, "expert"],
    ) -> Float[np.ndarray, "expert"]:
        """The bound over the standard error; the score itself where that is 0."""
        t = _t_statistic(effect, error)
        known = np.abs(t) < LARGEST_T
        scale = np.where((error > 0) & known, error, 1)
        return np.where(known, bound / scale, t)

    def influences(self, counts: UnitCounts) -> Float[np.ndarray, "unit expert"]:
        """The units' rate differences, of which the effect is the mean."""
        return _rate_differences(counts)

    def null_contributions(self, counts: UnitCounts) -> Float[np.ndarray, "unit expert"]:
        """The units' rate differences."""
        return _rate_differences(counts)


SCORES: Final[dict[str, Score]] = {
    score.name: score for score in (RiskDifference(), LogOddsRatio(), ProbabilityDifference(), PairedT())
}
"""The scores that are known by their names."""


def score_of(score: Any) -> Score:
    """The score of a name in `SCORES`; a `Score` of the user's own is given back.

    Raises:
        DataError: an unknown name, or a `Score` that is not complete or bears a known name.
    """
    if isinstance(score, str) and score in SCORES:
        return SCORES[score]
    if not isinstance(score, Score):
        raise DataError(
            f"There is no score {score!r}; choose from {', '.join(SCORES)}, or give an instance of a Score."
        )
    if not (isinstance(score.name, str) and score.name and isinstance(score.label, str) and score.label):
        raise DataError(f"{score!r} needs a name and a label, both strings that are not empty.")
    if score.sums not in _SUMS:
        raise DataError(f"{score!r}: sums must be one of {', '.join(_SUMS)}; got {score.sums!r}.")
    if score.name in SCORES and type(score) is not type(SCORES[score.name]):
        raise DataError(f"{score!r} bears the name of a score that exists; give it another one.")
    return score


def standard_error(values: Float[np.ndarray, "unit expert"]) -> Float[np.ndarray, "expert"]:
    """Standard error of the mean over units."""
    return values.std(0, ddof=1) / np.sqrt(len(values))


def variances(
    values: Float[np.ndarray, "unit expert"], strata: Int[np.ndarray, "unit"]
) -> Float[np.ndarray, "stratum expert"]:
    """Squared standard error of the mean over the units of each stratum."""
    parts = [values[strata == stratum] for stratum in np.unique(strata)]
    return np.stack([part.var(0, ddof=1) / len(part) for part in parts])


def _sizes(strata: Int[np.ndarray, "unit"]) -> Int[np.ndarray, "unit"]:
    """How many units are in the stratum of each."""
    return np.bincount(strata)[strata]


def _rate_differences(counts: UnitCounts) -> Float[np.ndarray, "unit expert"]:
    if not isinstance(counts, PairedCounts):
        raise DataError("paired_t needs pairs of prompts; two groups of different prompts have none.")
    return counts.rate_differences


def _t_statistic(mean: np.ndarray, error: np.ndarray) -> np.ndarray:
    mean = np.where(np.abs(mean) < 1e-14, 0.0, mean)  # rounding; rates are at most 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.clip(np.where(mean == 0, 0.0, mean / error), -LARGEST_T, LARGEST_T)
