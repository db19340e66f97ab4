"""Experts that few prompts of two groups choose: a binomial test and an interval on effective numbers.

Where an expert fires in a handful of prompts, their spread is no estimate of a variance, and intervals and
tests made of it promise too much. What is known then comes from all prompts together: how strongly tokens of
a prompt depend on each other. The tokens of a group are divided by its design effect, 1 + (m − 1) ρ, with m
the mean length of a token's prompt and ρ the correlation of two of its tokens (Rao & Scott 1992, for
clustered binary data), and count as independent.
"""

from typing import Final

import numpy as np
from jaxtyping import Bool, Float

from moe_lens.detection.unit_counts import UnitCounts

_FEW: Final = 20
"""Where fewer effective events than this are expected in a group, its prompts are too few to go by."""


def effective_tokens(
    counts: UnitCounts,
) -> tuple[Float[np.ndarray, "expert"], Float[np.ndarray, "expert"]]:
    """Tokens of both conditions over their design effects: how many independent tokens they are worth.

    >>> from moe_lens.detection import UnpairedCounts
    >>> alike = UnpairedCounts.of_prompts([[4], [0], [4]], [4, 4, 4], [[0], [4]], [4, 4])
    >>> effective_tokens(alike)                    # all tokens of a prompt are alike: a prompt is worth one
    (array([3.]), array([2.]))
    """
    squares, independent, within = 0.0, 0.0, 0.0  # what was seen; what independence gives; what ρ = 1 adds
    for sums, tokens in ((counts.sums_1, counts.tokens_1), (counts.sums_2, counts.tokens_2)):
        n, rate = (tokens > 0).sum(), sums.sum(0) / tokens.sum()
        variance = rate * (1 - rate)  # of one token
        squares = squares + n / (n - 1) * ((sums - rate * tokens[:, None]) ** 2).sum(0)
        independent = independent + variance * tokens.sum()
        within = within + variance * (tokens * (tokens - 1)).sum()
    correlation = np.clip((squares - independent) / np.maximum(within, 1e-12), 0, 1)
    first, second = (
        of_group.sum() / (1 + max(float((of_group**2).sum() / of_group.sum()) - 1, 0.0) * correlation)
        for of_group in (counts.tokens_1, counts.tokens_2)
    )
    return first, second


def binomial_p(counts: UnitCounts) -> Float[np.ndarray, "expert"]:
    """Binomial p-value of the split of the effective events over the groups; 0 where many are expected."""
    from scipy import stats

    n1, n2 = effective_tokens(counts)
    a1 = np.rint(counts.sums_1.sum(0) / counts.tokens_1.sum() * n1)
    a2 = np.rint(counts.sums_2.sum(0) / counts.tokens_2.sum() * n2)
    share = n1 / (n1 + n2)
    tail = np.minimum(stats.binom.cdf(a1, a1 + a2, share), stats.binom.sf(a1 - 1, a1 + a2, share))
    return np.where(_is_rare(counts, n1, n2), np.minimum(1, 2 * tail), 0)


def widened(
    counts: UnitCounts, low: Float[np.ndarray, "expert"], high: Float[np.ndarray, "expert"], level: float
) -> tuple[Float[np.ndarray, "expert"], Float[np.ndarray, "expert"]]:
    """Bounds of a difference of rates, widened for rare experts to hold Newcombe's interval.

    That is made of the Wilson score intervals of both rates, on effective tokens (Newcombe 1998, method 10).
    """
    from scipy import stats

    z = float(stats.norm.ppf((1 + level) / 2))
    n1, n2 = effective_tokens(counts)
    r1, r2 = counts.sums_1.sum(0) / counts.tokens_1.sum(), counts.sums_2.sum(0) / counts.tokens_2.sum()
    (low_1, high_1), (low_2, high_2) = _wilson(r1, n1, z), _wilson(r2, n2, z)
    lower = r1 - r2 - np.sqrt((r1 - low_1) ** 2 + (high_2 - r2) ** 2)
    upper = r1 - r2 + np.sqrt((high_1 - r1) ** 2 + (r2 - low_2) ** 2)
    rare = _is_rare(counts, n1, n2)
    return np.where(rare, np.minimum(low, lower), low), np.where(rare, np.maximum(high, upper), high)


def _is_rare(counts: UnitCounts, n1: np.ndarray, n2: np.ndarray) -> Bool[np.ndarray, "expert"]:
    pooled = (counts.sums_1 + counts.sums_2).sum(0) / (counts.tokens_1 + counts.tokens_2).sum()
    return pooled * np.minimum(n1, n2) < _FEW


def _wilson(rate: np.ndarray, n: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return np.minimum(centre - half, rate), np.maximum(centre + half, rate)
