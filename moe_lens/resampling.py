"""Bootstrap over clusters: weights of resampled clusters, the interval of a mean; and many seeds from one."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped

from moe_lens.checks import whole_number
from moe_lens.errors import DataError


def clustered_interval(
    values: Shaped[np.ndarray, "unit"],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling whole clusters.

    Prompts about the same entity are not independent, so entities are drawn with replacement, each with all
    its prompts (Davison & Hinkley 1997, section 3.8). The resampled mean is sum of values / number of units.

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
    if not 0 < level < 1:
        raise DataError(f"level must lie in (0, 1); got {level}.")
    n_resamples = whole_number(n_resamples, "n_resamples", least=1)
    _, member_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(member_of, weights=values), np.bincount(member_of)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(n_resamples, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
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
