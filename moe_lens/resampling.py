"""Bootstrap over units: of a mean, of any number that sums give, weights of clusters; many seeds from one."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from moe_lens.checks import share, whole_number
from moe_lens.errors import DataError


def clustered_interval(
    values: Shaped[np.ndarray, "unit"],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the mean, resampling whole clusters.

    Prompts about the same entity are not independent, so entities are drawn with replacement, each with all
    its prompts (Davison & Hinkley 1997, section 3.8). The resampled mean is sum of values / number of units.
    The bounds are percentiles of these means, widened for few clusters (expanded percentile; Hesterberg 2015,
    arXiv 1411.5279): plain percentiles of 12 clusters hold 87 to 94 %, these 93 to 96 %
    (docs/calibration.md).

    Args:
        values: one per unit (prompt), for example an effect in [-1, 1].
        clusters: one label per unit; units of the same label stay together.
        level: confidence level of the interval, in (0, 1).
        n_resamples: how often the clusters are drawn.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        DataError: no values, not one label per value, a level outside (0, 1), or n_resamples below 1.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or len(clusters) != len(values):
        raise DataError(
            f"{len(clusters)} cluster labels for values of shape {values.shape}; need one per value."
        )
    share(level, "level")
    n_resamples = whole_number(n_resamples, "n_resamples", least=1)
    _, member_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(member_of, weights=values), np.bincount(member_of)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(n_resamples, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    tail = tail_of(len(sums), level)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def cluster_weights(
    clusters: Sequence[str], n_resamples: int, seed: int
) -> Float[np.ndarray, "resample unit"]:
    """How often each unit is drawn when whole clusters are resampled with replacement.

    >>> weights = cluster_weights(["a", "a", "b"], 100, seed=0)
    >>> bool((weights[:, 0] == weights[:, 1]).all()), weights[:, 1:].sum(1).tolist() == [2.0] * 100
    (True, True)
    """
    _, member_of = np.unique(np.asarray(clusters), return_inverse=True)
    n_clusters = int(member_of.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(
        n_clusters, np.full(n_clusters, 1 / n_clusters), n_resamples
    )
    return drawn[:, member_of].astype(np.float64)


def spawned_seeds(seed: int, n: int) -> list[int]:
    """`n` seeds whose random numbers are independent of each other and of those of other seeds' children.

    >>> spawned_seeds(3, 2) == spawned_seeds(3, 5)[:2], len({*spawned_seeds(3, 5), *spawned_seeds(4, 5)})
    (True, 10)

    numpy's `SeedSequence.spawn`; each seed is 128 bits, so that no two are alike.
    """
    children = np.random.SeedSequence(seed).spawn(n)
    return [int.from_bytes(child.generate_state(4).astype("<u4").tobytes(), "little") for child in children]


def interval_of(
    formula: Callable[..., np.ndarray],
    tables: Sequence[np.ndarray],
    *,
    strata: Int[np.ndarray, "unit"] | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap interval of a number that is computed from sums over independent units.

    Units are drawn with replacement, and the sums of each draw given to the formula. The bounds are the
    percentiles of what it gives, widened for few units (expanded percentile; Hesterberg 2015, arXiv
    1411.5279). Draws for which the formula gives NaN (an expert that no unit of the draw chose) are left out.

    >>> events, tokens = np.array([1.0, 2.0, 3.0]), np.array([4.0, 4.0, 4.0])
    >>> low, high = interval_of(lambda a, n: a / n, [events, tokens])
    >>> bool(low < 0.5 < high)
    True

    Args:
        formula: of the resampled sums, one array [resample *columns] a table, to [resample *value].
        tables: [unit *columns] each.
        strata: units of one number are drawn for each other only; None: all for all.
        level: confidence level, in (0, 1).
        n_resamples: how often the units are drawn.
        seed: of the draws; the same seed gives the same interval.

    Returns: lower and upper bounds, [*value]; NaN where every draw gives NaN, and with a single unit
    (of a stratum).

    Raises:
        DataError: a level outside (0, 1), n_resamples below 1, or a bad seed.
    """
    share(level, "level")
    draws = whole_number(n_resamples, "n_resamples", least=1)
    generator = np.random.default_rng(whole_number(seed, "seed"))
    n_units = len(tables[0])
    stratum = np.zeros(n_units, dtype=np.int64) if strata is None else strata
    weights, fewest = np.zeros((draws, n_units)), n_units
    for number in np.unique(stratum):
        units = np.flatnonzero(stratum == number)
        weights[:, units] = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), draws)
        fewest = min(fewest, len(units))
    sums = []
    for table in tables:
        flat = np.asarray(table, dtype=np.float64).reshape(n_units, -1)
        sums.append((weights @ flat).reshape(draws, *np.shape(table)[1:]))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = formula(*sums)
    if fewest < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    tail = tail_of(fewest, level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN
        low, high = np.nanquantile(values, [tail, 1 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def tail_of(n_units: int, level: float) -> float:
    """The share of draws to leave out on either side, so that few units do not give too short an interval.

    >>> round(tail_of(10, 0.95), 4), round(tail_of(1000, 0.95), 4)
    (0.0086, 0.0248)
    """
    from scipy import stats  # here, since loading results should not wait for it

    if n_units < 2:
        return (1 - level) / 2  # all draws are alike
    t = stats.t.ppf((1 + level) / 2, n_units - 1)
    return float(stats.norm.cdf(-t * (n_units / (n_units - 1)) ** 0.5))
