"""Scores of counts, with intervals, p-values and q-values whose unit is the prompt, not the token.

counts = PairedCounts.of_pairs(events_1, tokens_1, events_2, tokens_2, clusters)   # [pair expert], [pair]
delta = score("risk_difference", counts)                                           # [expert]
low, high = interval("risk_difference", counts)
q = q_values(sign_flip_p("risk_difference", counts))

A unit is a cluster of pairs of prompts. Units are independent of each other; tokens within a prompt and the
two prompts of a pair need not be: so whole units are resampled, and whole units swap their conditions. Of two
groups of different prompts (`UnpairedCounts`) each is resampled by itself, and labels are permuted
(unpaired_statistics.py).

How well this holds for pairs was measured on a synthetic top-4 router over 32 experts. Its tokens depend
strongly on each other within prompts of 5–50 tokens, and the first condition's prompts are as long as the
second's, or three times as long (repeat it with `python -m tests.detection.test_calibration`). Coverage of 95
% intervals where the rates are 0.02–0.5 (and 0.003–0.02), in %, mean over such experts, a quarter of them
with a planted difference:

    units                      20                       50                       200
    risk_difference            95.5–97.6 (93.4–93.5)    95.1–95.9 (94.3–95.2)    93.9–95.8 (94.7–95.1)
    log_odds_ratio             93.3–95.0 (87.1–90.8)    93.3–94.7 (93.5–93.6)    92.6–95.7 (94.2–94.5)
    probability_difference     95.8–98.0 (95.2–95.8)    95.0–95.7 (94.4–94.8)    94.1–95.3 (95.0–95.2)
    paired_t                   94.9–96.0 (93.1–93.6)    94.9–95.7 (93.7–95.7)    94.3–95.4 (94.1–95.2)

With 50 units, 90 % intervals hold 88.2–90.9 % (87.6–90.1), 99 % ones 98.1–99.7 % (97.8–99.1). So do not trust
log odds of rare experts under 20 units; and an expert that never fired gets [0, 0], whatever its true rate.

p ≤ 0.05 / 0.01 / 0.001 without a difference, 8 to 200 units: at most 6.7 / 1.6 / 0.25 % of the experts of any
class of rates (the nominal share, within simulation error), also where the first prompts are ten times as
long. The exception is probability_difference for experts of rates below 0.02 where lengths are very unequal:
up to 8.2 / 2.4 / 0.55 %. Mean false discovery proportion among 320 experts, 0 to 20 % of the layers changed,
with q ≤ 0.05 and 0.2: at most 0.03 and 0.15. Power needs units: q ≤ 0.05 finds 2 % of the experts raised by
1.5 logits with 20 units, 28–48 % with 50, 83–92 % with 100. unpaired_statistics.py has the table of unpaired
groups.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Float32, Int

from moe_lens.checks import share, whole_number
from moe_lens.detection.rare_experts import binomial_p, widened
from moe_lens.detection.scores import Score, score_of, variances
from moe_lens.detection.unit_counts import UnitCounts, as_floats
from moe_lens.detection.unpaired_counts import UnpairedCounts
from moe_lens.errors import DataError

EXACT_UNITS: Final = 12  # up to this many units, all sign flips are enumerated
_FEW_EVENTS: Final = 20  # expected under a condition; below, unequal lengths mislead sign flips
_NEWTON_STEPS: Final = 20
_CHUNK: Final = 2**19  # elements of a [unit expert] or [resample expert] block that is worked on at once


def score(name: str | Score, counts: UnitCounts) -> Float[np.ndarray, "expert"]:
    """The score of each expert, positive where it goes with the first condition; 0 where it never fires.

    >>> from moe_lens.detection import SCORES, PairedCounts
    >>> counts = PairedCounts.of_pairs([[3.0], [1.0]], [4, 4], [[1.0], [0.0]], [4, 4])
    >>> {name: round(float(score(name, counts)[0]), 3) for name in SCORES}
    {'risk_difference': 0.375, 'log_odds_ratio': 1.609, 'probability_difference': 0.375, 'paired_t': 3.0}

    The classes in scores.py have the formulas and their sources.

    Args:
        name: of one of `SCORES`, or your own `Score`; the same in the functions below.

    Raises:
        DataError: an unknown score, or fewer units than it needs.
    """
    formula = score_of(name)
    check_counts("A score", counts, formula.least_units)
    return formula.of(counts)


def bootstrap_scores(
    name: str | Score, counts: UnitCounts, n_resamples: int = 1000, seed: int = 0
) -> Float32[np.ndarray, "resample expert"]:
    """The scores on bootstrap resamples of the units (n drawn from n, with replacement).

    >>> from moe_lens.detection import PairedCounts
    >>> counts = PairedCounts.of_pairs([[3.0], [1.0]], [4, 4], [[1.0], [0.0]], [4, 4])
    >>> bootstrap_scores("risk_difference", counts, n_resamples=100).shape
    (100, 1)

    The same draws for all experts, so a row is one imagined data set (Efron & Tibshirani 1993).

    Raises:
        DataError: an unknown score, fewer than two units, or a bad n_resamples or seed.
    """
    formula = check_settings(name, n_resamples=n_resamples, seed=seed)
    check_counts("A bootstrap", counts, 2)
    weights = _bootstrap_weights(counts, n_resamples, seed)
    scores = np.empty((n_resamples, counts.n_experts), dtype=np.float32)
    for columns in chunks(counts, n_resamples):
        scores[:, columns] = formula.resampled(counts.experts(columns), weights)
    return scores


def interval(
    name: str | Score, counts: UnitCounts, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> tuple[Float[np.ndarray, "expert"], Float[np.ndarray, "expert"]]:
    """Lower and upper bounds of a confidence interval of each score, from resampled units.

    >>> from moe_lens.detection import PairedCounts
    >>> counts = PairedCounts.of_pairs([[3.0], [1.0], [2.0]], [4, 4, 4], [[1.0], [0.0], [1.0]], [4, 4, 4])
    >>> low, high = interval("risk_difference", counts)
    >>> bool(low[0] < 1 / 3 < high[0])
    True

    The smallest interval around two others: the bootstrap percentile interval with its quantiles widened for
    few units (expanded percentile; Hesterberg 2015, arXiv 1411.5279), and score ± t × the linearised
    jackknife standard error (t with n − 1 degrees of freedom). The first is too short for rates of
    rare experts, the second for their log odds. Among a dozen variants (percentile, BCa, three kinds of
    bootstrap-t, ...) this came closest to its level throughout; the module's docstring says how close.

    Two groups of different prompts are resampled each by itself; t has Welch and Satterthwaite's degrees of
    freedom. Where some units are in both groups, all units are resampled together. A difference of rates gets
    at least Newcombe's interval where an expert is rare (rare_experts.py), unless all units are in both
    groups: then each is compared with itself, as those of pairs are.

    The interval of paired_t is that of the mean difference, divided by the observed standard error.

    Raises:
        DataError: an unknown score, fewer than two units, a level outside (0, 1), or n_resamples or a seed
            that is not a whole number.
    """
    formula = check_settings(name, level=level, n_resamples=n_resamples, seed=seed)
    check_counts("An interval", counts, 2)
    weights = _bootstrap_weights(counts, n_resamples, seed)
    low, high = np.empty(counts.n_experts), np.empty(counts.n_experts)
    for columns in chunks(counts, n_resamples):
        part = counts.experts(columns)
        centre = formula.effect(part)
        error, t, tail = _errors(formula.influences(part), counts.strata, level)
        lower, upper = _tails(formula.resampled_effect(part, weights), tail)
        lower = np.minimum(np.minimum(lower, centre), centre - t * error)
        upper = np.maximum(np.maximum(upper, centre), centre + t * error)
        low[columns] = formula.as_score(lower, centre, error)
        high[columns] = formula.as_score(upper, centre, error)
    if formula.is_rate_difference and isinstance(counts, UnpairedCounts) and not counts.is_crossed:
        low, high = widened(counts, low, high, level)
    return np.clip(low, *formula.bounds), np.clip(high, *formula.bounds)


def sign_flip_p(
    name: str | Score, counts: UnitCounts, *, n_permutations: int = 1000, seed: int = 0
) -> Float[np.ndarray, "expert"]:
    """Two-sided p-values of "the conditions do not differ": units swap their conditions at random.

    >>> from moe_lens.detection import PairedCounts
    >>> counts = PairedCounts.of_pairs([[3.0], [1.0], [2.0]], [4, 4, 4], [[1.0], [0.0], [1.0]], [4, 4, 4])
    >>> sign_flip_p("risk_difference", counts)                    # all of 3 units agree: 2 of 2³ sign flips
    array([0.25])

    What is flipped is the contribution of unit u to the risk difference, with P the pooled rate of both
    conditions: e_u = (A1u − P N1u) / N1 − (A2u − P N2u) / N2. The e_u add up to the score. Where the two
    prompts of a unit are equally long this is the classic paired test, exact if swapping them changes
    nothing; otherwise it holds approximately. log_odds_ratio has the same null and test; paired_t flips
    the units' rate differences.

    - Up to 12 units: all flips, exact. Otherwise p = (1 + b) / (1 + n_permutations), b the number of random
      flips at least as extreme (Phipson & Smyth 2010).
      It is no smaller than 1 / (n_permutations + 1): more flips tell more of experts in between.
    - Where b = 0 and it is smaller: the Chernoff bound 2 min_t exp(Σ ln cosh(t e_u) − t |Σ e_u|) of the exact
      p-value (Hoeffding 1963; Robinson 1982 for this distribution). It has no Monte Carlo error and is never
      too small; too large by a factor of about 10, or of 1 where m units all agree (2 · 2⁻ᵐ).
    - Where fewer than 20 events are expected under a condition, and lengths differ: at least the p-value of
      the binomial test that takes all tokens for independent. Sign flips alone are wrong there: an expert
      seen ten times in long prompts and never in a few short ones is no evidence. Not for
      probability_difference, which counts no events.

    Raises:
        DataError: an unknown score, fewer than two units, or a bad n_permutations or seed.
    """
    formula = check_settings(name, n_permutations=n_permutations, seed=seed)
    check_counts("A p-value", counts, 2)
    exact = counts.n_units <= EXACT_UNITS
    signs = _all_flips(counts.n_units) if exact else _random_flips(counts.n_units, n_permutations, seed)
    p = np.empty(counts.n_experts)
    for columns in chunks(counts, len(signs)):
        contributions = formula.null_contributions(counts.experts(columns))
        size = np.abs(contributions.sum(0))
        # equal sums differ by rounding; they are ties
        least = size * (1 - 1e-9) - 1e-12 * np.abs(contributions).sum(0)
        b = (np.abs(signs @ contributions) >= least).sum(0)
        p[columns] = b / len(signs) if exact else (1 + b) / (1 + n_permutations)
        if not exact and (sure := b == 0).any():
            p[columns][sure] = np.minimum(p[columns][sure], chernoff_bound(contributions[:, sure]))
    if formula.counts_events and isinstance(counts, UnpairedCounts) and not counts.is_crossed:
        return np.maximum(p, binomial_p(counts))
    if formula.counts_events and not np.array_equal(counts.tokens_1, counts.tokens_2):
        p = np.maximum(p, _few_events_p(counts))
    return p


def q_values(p: Any) -> Float[np.ndarray, "expert"]:
    """Benjamini–Hochberg q-values: choosing all experts with q ≤ 0.05 makes at most 5 % false discoveries.

    >>> q_values([0.01, 0.04, 0.5]).round(3).tolist()
    [0.03, 0.06, 0.5]

    In the mean over repetitions (Benjamini & Hochberg 1995; `scipy.stats.false_discovery_control`).

    Raises:
        DataError: no p-values, or some outside [0, 1].
    """
    values = as_floats("p", p)
    if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"p must be a list of p-values, in [0, 1]; got {values!r}.")
    from scipy import stats

    return np.asarray(stats.false_discovery_control(values), dtype=np.float64)


def check_settings(
    name: Any, level: Any = 0.95, n_resamples: Any = 1, n_permutations: Any = 1, seed: Any = 0
) -> Score:
    """The score of that name. Raises DataError for bad settings, before a long computation starts."""
    formula = score_of(name)
    share(level, "level", remedy="0.95 is usual.")
    whole_number(n_resamples, "n_resamples", least=1, remedy="1000 is usual.")
    whole_number(n_permutations, "n_permutations", least=1, remedy="1000 is usual.")
    whole_number(seed, "seed")
    return formula


def _bootstrap_weights(counts: UnitCounts, n_resamples: int, seed: int) -> np.ndarray:
    """[resample unit], how often each unit was drawn; those of a stratum for each other."""
    generator, strata = np.random.default_rng(seed), counts.strata
    weights = np.zeros((n_resamples, counts.n_units))
    empty = np.ones(n_resamples, dtype=bool)  # of tokens under a condition, which no score can be made of
    while empty.any():
        for stratum in np.unique(strata):
            units = np.flatnonzero(strata == stratum)
            share = np.full(len(units), 1 / len(units))
            weights[np.ix_(empty, units)] = generator.multinomial(len(units), share, int(empty.sum()))
        empty = (weights @ counts.tokens_1 == 0) | (weights @ counts.tokens_2 == 0)
    return weights


def _errors(
    influences: Float[np.ndarray, "unit expert"], strata: Int[np.ndarray, "unit"], level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[expert] each: standard error, quantile t, and the tail of the expanded percentile interval.

    Degrees of freedom are Welch and Satterthwaite's; with one stratum of n units they are n − 1. The tail is
    widened by how much smaller a bootstrap's variance is, (n − 1) / n with one stratum.
    """
    from scipy import stats  # here, since loading a plan or scores should not wait for it

    n = np.bincount(strata)[:, None]
    parts = variances(influences, strata)
    total = parts.sum(0)
    shares = np.where(total > 0, parts, 1.0)  # any will do where nothing varies
    shares = shares / shares.sum(0)
    freedom = 1 / (shares**2 / (n - 1)).sum(0)
    t = stats.t.ppf((1 + level) / 2, freedom)
    shrunk = (shares * (n - 1) / n).sum(0)
    return np.sqrt(total), t, stats.norm.cdf(-t / np.sqrt(shrunk))


def _tails(
    values: Float[np.ndarray, "resample expert"], tail: Float[np.ndarray, "expert"]
) -> tuple[np.ndarray, np.ndarray]:
    """The quantiles `tail` and 1 − `tail` of each column, which are each column's own."""
    if np.ptp(tail) == 0:
        lower, upper = np.quantile(values, [tail[0], 1 - tail[0]], axis=0)
        return lower, upper
    values = np.sort(values, axis=0)
    last = len(values) - 1
    found = []
    for place in (tail * last, (1 - tail) * last):
        below = np.floor(place).astype(int)
        first, second = (
            np.take_along_axis(values, row[None], 0)[0] for row in (below, np.minimum(below + 1, last))
        )
        found.append(first + (place - below) * (second - first))
    return found[0], found[1]


def _all_flips(n_units: int) -> np.ndarray:
    """[flip unit], the half of all 2^n flips whose first sign is +; the other half gives the same sizes."""
    return np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=n_units - 1)], dtype=np.float64)


def _random_flips(n_units: int, n_permutations: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, 1])  # apart from the bootstrap's draws
    return 2.0 * generator.integers(0, 2, (n_permutations, n_units)) - 1


def chernoff_bound(contributions: np.ndarray) -> np.ndarray:
    """Upper bound of the exact two-sided sign-flip p-value, for each column; every t > 0 gives one.

    Newton's method on the exponent, a convex function of t. Its slope is concave and negative at the start:
    the steps approach the minimum from below and never pass it.
    """
    sizes = np.abs(contributions)
    total = np.abs(contributions.sum(0))
    scale = sizes.max(0)
    x, total = sizes / scale, total / scale
    t = total / (x**2).sum(0)
    for _ in range(_NEWTON_STEPS):
        tanh = np.tanh(t * x)
        slope, curvature = (x * tanh).sum(0) - total, (x**2 * (1 - tanh**2)).sum(0)
        t = np.minimum(t - np.minimum(slope, 0) / np.maximum(curvature, 1e-12), 1e4)
    exponent = (t * x + np.log1p(np.exp(-2 * t * x)) - np.log(2)).sum(0) - t * total
    return np.clip(2 * np.exp(exponent), np.finfo(np.float64).tiny, 1)


def _few_events_p(counts: UnitCounts) -> np.ndarray:
    """Binomial p-value of the split of the events over the conditions; 0 where many are expected."""
    from scipy import stats

    n1, n2 = counts.tokens_1.sum(), counts.tokens_2.sum()
    a1, a2 = np.rint(counts.sums_1.sum(0)), np.rint(counts.sums_2.sum(0))
    tail = np.minimum(
        stats.binom.cdf(a1, a1 + a2, n1 / (n1 + n2)), stats.binom.sf(a1 - 1, a1 + a2, n1 / (n1 + n2))
    )
    expected = (a1 + a2) * min(n1, n2) / (n1 + n2)
    return np.where(expected < _FEW_EVENTS, np.minimum(1, 2 * tail), 0)


def chunks(counts: UnitCounts, n_rows: int) -> Iterator[slice]:
    """Slices of the experts, small enough that a block of work stays near the processor."""
    width = max(1, _CHUNK // max(counts.n_units, n_rows))
    return (slice(start, start + width) for start in range(0, counts.n_experts, width))


def check_counts(what: str, counts: Any, least: int) -> None:
    """Raise DataError for what are no counts, or of fewer units than needed."""
    if not isinstance(counts, UnitCounts):
        raise DataError(f"{what} needs PairedCounts or UnpairedCounts; got {type(counts).__name__}.")
    if counts.fewest_units < least:
        raise DataError(
            f"{what} needs at least {least} independent units (clusters of prompts) under each condition; "
            f"there is {counts.fewest_units}. Give more prompts of different clusters; intervals are "
            "reliable from about 20 units on."
        )
