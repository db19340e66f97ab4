"""Counts of each expert in two groups of different prompts.

counts = UnpairedCounts.of_prompts(events_1, tokens_1, events_2, tokens_2)       # [prompt expert], [prompt]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from moe_lens.detection.unit_counts import UnitCounts, as_floats, check_condition, unit_numbers
from moe_lens.errors import DataError


@dataclass(frozen=True, eq=False, repr=False)
class UnpairedCounts(UnitCounts):
    """Counts of each expert in two groups of prompts, one row per unit (a prompt, or a cluster of prompts).

    >>> counts = UnpairedCounts.of_prompts([[3.0], [1.0]], [4, 4], [[1.0], [0.0], [2.0]], [4, 4, 8])
    >>> counts.n_units, counts.tokens_1.tolist(), counts.strata.tolist()
    (5, [4.0, 4.0, 0.0, 0.0, 0.0], [0, 0, 1, 1, 1])

    Attributes:
        sums_1, sums_2: as in `UnitCounts`; 0 where a unit has no prompt in that group.
        tokens_1, tokens_2: likewise.

    Raises:
        DataError: shapes that do not fit together, NaN, negative numbers, a unit without any tokens, or sums
            above the number of tokens.
    """

    def __post_init__(self) -> None:
        names = ("sums_1", "tokens_1", "sums_2", "tokens_2")
        arrays = {name: as_floats(name, getattr(self, name)) for name in names}
        shape = arrays["sums_1"].shape
        if len(shape) != 2 or 0 in shape:
            raise DataError(f"sums_1 must be [unit expert], at least one of each; its shape is {shape}.")
        for name, array in arrays.items():
            if array.shape != (expected := shape[:1] if name.startswith("tokens") else shape):
                raise DataError(
                    f"{name} has shape {array.shape}; with sums_1 of {shape} it must be {expected}."
                )
            object.__setattr__(self, name, array)
        for number in (1, 2):
            check_condition(number, arrays[f"sums_{number}"], arrays[f"tokens_{number}"])
        if len(empty := np.flatnonzero(self.tokens_1 + self.tokens_2 == 0)):
            raise DataError(
                f"Unit {empty[0]} has no counted tokens (of {len(empty)} such units); leave such prompts "
                "out, or count a wider span."
            )

    @classmethod
    def of_prompts(
        cls,
        sums_1: Any,
        tokens_1: Any,
        sums_2: Any,
        tokens_2: Any,
        clusters_1: Sequence[Any] | None = None,
        clusters_2: Sequence[Any] | None = None,
    ) -> "UnpairedCounts":
        """From one row per prompt of each group; prompts with the same label become one unit.

        >>> counts = UnpairedCounts.of_prompts([[1], [3]], [4, 4], [[0], [1]], [4, 4], "ab", "bc")
        >>> counts.sums_1.tolist(), counts.sums_2.tolist(), counts.strata.tolist()
        ([[1.0], [3.0], [0.0]], [[0.0], [0.0], [1.0]], [0, 0, 0])

        Args:
            sums_1: [prompt expert], counts or sums in the first group.
            tokens_1: [prompt], counted tokens in the first group.
            sums_2: [prompt_2 expert], the same in the second group, which may have another number of prompts.
            tokens_2: [prompt_2].
            clusters_1: one label per prompt of the first group, None: each prompt is its own unit.
            clusters_2: the same for the second group; a label that both groups have is one unit.

        Raises:
            DataError: as of the class, or another number of labels than of prompts.
        """
        one, two = as_floats("sums_1", sums_1), as_floats("sums_2", sums_2)
        if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1]:
            raise DataError(
                f"sums_1 and sums_2 must be [prompt expert] of as many experts; their shapes are {one.shape} "
                f"and {two.shape}."
            )
        labels: list[Any] = []
        for number, (rows, given) in enumerate(((one, clusters_1), (two, clusters_2)), start=1):
            own = [(number, row) for row in range(len(rows))] if given is None else list(given)
            unit_numbers(own, len(rows))
            labels += own
        unit = unit_numbers(labels, len(one) + len(two))
        n_units, places = int(unit.max()) + 1, (unit[: len(one)], unit[len(one) :])
        arrays = []
        for sums, tokens, rows in ((one, tokens_1, places[0]), (two, tokens_2, places[1])):
            summed, counted = np.zeros((n_units, one.shape[1])), np.zeros(n_units)
            np.add.at(summed, rows, sums)
            np.add.at(counted, rows, as_floats("tokens", tokens))
            arrays += [summed, counted]
        return cls(*arrays)

    @property
    def is_disjoint(self) -> bool:
        """Whether no unit has prompts in both groups."""
        return not bool(((self.tokens_1 > 0) & (self.tokens_2 > 0)).any())

    @property
    def is_crossed(self) -> bool:
        """Whether every unit has prompts in both groups, so that each is compared with itself, like pairs."""
        return bool(((self.tokens_1 > 0) & (self.tokens_2 > 0)).all())

    @property
    def strata(self) -> Int[np.ndarray, "unit"]:
        """0 and 1 for the units of the first and of the second group; all 0 if some are in both."""
        in_second = (self.tokens_1 == 0).astype(np.int64)
        return in_second if self.is_disjoint else np.zeros_like(in_second)
