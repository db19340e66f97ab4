"""The smallest p-value that few clusters can give, and what it rules out: said before a run and after it.

smallest_p(6, None, n_permutations=1000)       # 6 clusters of pairs: 2 of 2^6 sign flips
units_needed(1024, 0.05, paired=True)          # clusters with which one expert alone can have q ≤ 0.05
"""

import math
from collections.abc import Sequence
from typing import Final

from moe_lens.errors import warn

MOST_EXACT: Final = 2**11
"""Up to so many ways to choose the first group's units, all are enumerated: as many as flips of 12 units."""
_Q: Final = 0.05
"""What is called significant in warnings and summaries."""


def smallest_p(n_1: int, n_2: int | None, n_permutations: int) -> float:
    """The smallest p-value that detection can give, however large the effect.

    >>> smallest_p(6, None, 1000), round(smallest_p(4, 4, 1000), 4)
    (0.03125, 0.0286)

    Args:
        n_1: units of pairs; or units of the first group.
        n_2: units of the second group; None for pairs, and where units are in both groups.
        n_permutations: of the test.
    """
    if n_2 is None:
        floor = 2.0 ** (1 - n_1)
        return floor if n_1 <= 12 else min(floor, 1 / (1 + n_permutations))
    ways = math.comb(n_1 + n_2, n_1)
    floor = (2 if n_1 == n_2 else 1) / ways
    return floor if ways <= MOST_EXACT else max(floor, min(1 / (1 + n_permutations), 2.0 ** (1 - n_1 - n_2)))


def units_needed(n_experts: int, q: float, paired: bool) -> int:
    """How many units let a single expert among so many have this q-value: in each group, if not of pairs.

    >>> units_needed(32, 0.05, paired=True), units_needed(32, 0.05, paired=False)
    (11, 7)
    """
    n = 2
    while (2.0 ** (1 - n) if paired else 2 / math.comb(2 * n, n)) * n_experts > q:
        n += 1
    return n


def floor_of(clusters: Sequence[str], clusters_2: Sequence[str] | None, n_permutations: int) -> float:
    """`smallest_p` of these labels: of pairs (`clusters_2` None), or of the prompts of two groups."""
    first, second = set(clusters), set(clusters_2 or ())
    if first & second:  # units in both groups: signs are flipped
        return smallest_p(len(first | second), None, n_permutations)
    return smallest_p(len(first), None if clusters_2 is None else len(second), n_permutations)


def experts_together(floor: float, n_experts: int) -> int:
    """How many experts must have the smallest p-value so that their q is 0.05; more than there are: never."""
    return math.ceil(floor * n_experts / _Q * (1 - 1e-9))


def warn_of_floor(
    clusters: Sequence[str], clusters_2: Sequence[str] | None, n_permutations: int, n_experts: int
) -> None:
    """A warning where no expert can have q ≤ 0.05 by itself, with how many clusters would do."""
    floor = floor_of(clusters, clusters_2, n_permutations)
    together = experts_together(floor, n_experts)
    if together <= 1:
        return
    labels = {*clusters, *(clusters_2 or ())}
    paired = clusters_2 is None or bool(set(clusters) & set(clusters_2))
    needed = units_needed(n_experts, _Q, paired)
    each = "clusters" if paired else "clusters in each group"
    rules_out = (
        f"none of {n_experts} experts can have q ≤ {_Q}"
        if together > n_experts
        else f"q ≤ {_Q} takes at least {together} of {n_experts} experts with that p-value"
    )
    warn(
        f"{len(labels)} clusters give no p-value below {floor:.2g}, so {rules_out}; one expert alone needs "
        f"{needed} {each}."
    )
