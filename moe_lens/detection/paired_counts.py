"""Counts of each expert under two conditions, paired by prompt: what scores and tests are made of.

counts = PairedCounts.of_pairs(events_1, tokens_1, events_2, tokens_2, clusters)   # [pair expert], [pair]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_lens.detection.unit_counts import UnitCounts, as_floats, check_condition, unit_numbers
from moe_lens.errors import DataError


@dataclass(frozen=True, eq=False, repr=False)
class PairedCounts(UnitCounts):
    """Counts of each expert under two conditions, one row per unit (a cluster of pairs of prompts).

    >>> import numpy as np
    >>> events = np.array([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    >>> counts = PairedCounts(events, np.full(3, 4.0), np.zeros((3, 2)), np.full(3, 8.0))
    >>> counts.rate_differences[:, 0].tolist()
    [0.75, 0.25, 0.5]

    Attributes:
        sums_1, sums_2: [unit expert], float64, how often the expert was among the top-k (or its summed
            softmax probability) under the first and under the second condition.
        tokens_1, tokens_2: [unit], float64, how many tokens were counted.
        mean_differences: [unit expert], for paired_t: the difference of the rates, averaged over the pairs
            of a unit. None where every unit is one pair, or is to be taken as one.

    Raises:
        DataError: shapes that do not fit together, NaN, negative numbers, a unit without tokens, or sums
            above the number of tokens.
    """

    mean_differences: Float[np.ndarray, "unit expert"] | None = None

    def __post_init__(self) -> None:
        for name, array in _checked(**vars(self)).items():
            object.__setattr__(self, name, array)

    @classmethod
    def of_pairs(
        cls, sums_1: Any, tokens_1: Any, sums_2: Any, tokens_2: Any, clusters: Sequence[Any] | None = None
    ) -> "PairedCounts":
        """From one row per pair of prompts; pairs with the same cluster label become one unit.

        >>> counts = PairedCounts.of_pairs([[1], [3], [0]], [4, 4, 4], [[0], [1], [0]], [4, 4, 4], "aab")
        >>> counts.sums_1.tolist(), counts.tokens_1.tolist(), counts.rate_differences.tolist()
        ([[4.0], [0.0]], [8.0, 4.0], [[0.375], [0.0]])

        Args:
            sums_1: [pair expert], counts or sums under the first condition.
            tokens_1: [pair], counted tokens under the first condition.
            sums_2: [pair expert], the same under the second condition.
            tokens_2: [pair].
            clusters: one label per pair; units are in the order of their first pairs. By default every pair
                is its own unit.

        Raises:
            DataError: as of the class, or another number of clusters than of pairs.
        """
        pairs = cls(**_checked(sums_1, tokens_1, sums_2, tokens_2))
        if clusters is None:
            return pairs
        unit = unit_numbers(clusters, pairs.n_units)
        n_pairs = np.bincount(unit)
        if len(n_pairs) == pairs.n_units:
            return pairs
        order, starts = np.argsort(unit, kind="stable"), np.cumsum(n_pairs) - n_pairs

        def per_unit(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values[order], starts, axis=0)

        return cls(
            per_unit(pairs.sums_1),
            per_unit(pairs.tokens_1),
            per_unit(pairs.sums_2),
            per_unit(pairs.tokens_2),
            per_unit(pairs.rate_differences) / n_pairs[:, None],
        )

    @property
    def rate_differences(self) -> Float[np.ndarray, "unit expert"]:
        """Rate under the first condition minus rate under the second, of each unit."""
        if self.mean_differences is not None:
            return self.mean_differences
        return self.sums_1 / self.tokens_1[:, None] - self.sums_2 / self.tokens_2[:, None]


def _checked(
    sums_1: Any, tokens_1: Any, sums_2: Any, tokens_2: Any, mean_differences: Any = None
) -> dict[str, Any]:
    """The fields of PairedCounts as float64 arrays that fit together; raises DataError where they do not."""
    arrays = {"sums_1": sums_1, "tokens_1": tokens_1, "sums_2": sums_2, "tokens_2": tokens_2}
    if mean_differences is not None:
        arrays["mean_differences"] = mean_differences
    arrays = {name: as_floats(name, values) for name, values in arrays.items()}
    shape = arrays["sums_1"].shape
    if len(shape) != 2 or 0 in shape:
        raise DataError(f"sums_1 must be [unit expert], with at least one of each; its shape is {shape}.")
    for name, array in arrays.items():
        if array.shape != (expected := shape[:1] if name.startswith("tokens") else shape):
            raise DataError(f"{name} has shape {array.shape}; with sums_1 of {shape} it must be {expected}.")
    for number in (1, 2):
        if len(empty := np.flatnonzero(arrays[f"tokens_{number}"] == 0)):
            raise DataError(
                f"Unit {empty[0]} has no counted tokens under condition {number} (of {len(empty)} such "
                "units); leave such pairs out, or count a wider span."
            )
        check_condition(number, arrays[f"sums_{number}"], arrays[f"tokens_{number}"])
    return arrays
