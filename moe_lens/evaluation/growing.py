"""What searches over sets of experts share: the best of some sets, and sets that grow expert by expert."""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from moe_lens.steering.choosing import Expert

Experts = tuple[Expert, ...]
Gain = Callable[[Experts], float | None]
"""How far a set moves what is searched for, more being better; None if it is not admissible."""
TIES: Final = 1e-12
"""Gains no further apart are equal."""


def best_of(sets: Iterable[Experts], gain: Gain) -> tuple[float, Experts] | None:
    """The admissible set that gains most, and what it gains; the first of equals.

    >>> best_of([((0, 1),), ((0, 2),), ((0, 3),)], {((0, 1),): 0.1, ((0, 2),): 0.3}.get)
    (0.3, ((0, 2),))
    """
    found: tuple[float, Experts] | None = None
    for experts in sets:
        gained = gain(experts)
        if gained is not None and (found is None or gained > found[0] + TIES):
            found = (gained, experts)
    return found


def growing(
    gain: Gain, candidates: Callable[[Experts], Iterable[Expert]], size: int, goal: float | None = None
) -> Iterator[tuple[float, Experts]]:
    """Sets of one expert, two, ... up to `size`, with their gains: each adds the one that then gains most.

    It ends where no expert gains anything, or, with a goal, once it is reached.

    Args:
        candidates: from a set to the experts that may join it.
    """
    chosen: Experts = ()
    gained = 0.0
    while len(chosen) < size and (goal is None or gained < goal - TIES):
        found = best_of(((*chosen, expert) for expert in candidates(chosen)), gain)
        if found is None or found[0] <= gained + TIES:
            return
        gained, chosen = found
        yield found
