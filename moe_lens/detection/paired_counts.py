"""Counts of each expert under two conditions, paired by prompt: what scores and tests are made of.

counts = PairedCounts.of_pairs(events_1, tokens_1, events_2, tokens_2, clusters)   # [pair expert], [pair]
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_lens.errors import DataError
from moe_lens.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class PairedCounts(Result):
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

    sums_1: Float[np.ndarray, "unit expert"]
    tokens_1: Float[np.ndarray, "unit"]
    sums_2: Float[np.ndarray, "unit expert"]
    tokens_2: Float[np.ndarray, "unit"]
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
        unit = _unit_numbers(clusters, pairs.n_units)
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
    def n_units(self) -> int:
        """Number of units."""
        return self.sums_1.shape[0]

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.sums_1.shape[1]

    @property
    def rate_differences(self) -> Float[np.ndarray, "unit expert"]:
        """Rate under the first condition minus rate under the second, of each unit."""
        if self.mean_differences is not None:
            return self.mean_differences
        return self.sums_1 / self.tokens_1[:, None] - self.sums_2 / self.tokens_2[:, None]

    def experts(self, columns: slice) -> "PairedCounts":
        """The same units, some of the experts."""
        means = self.mean_differences
        return self._trusted(
            self.sums_1[:, columns],
            self.tokens_1,
            self.sums_2[:, columns],
            self.tokens_2,
            None if means is None else means[:, columns],
        )

    @classmethod
    def _trusted(cls, *arrays: np.ndarray | None) -> "PairedCounts":
        """From arrays that were checked before: checking them again would cost as much as the statistics."""
        counts = cls.__new__(cls)
        for field, array in zip(fields(cls), arrays, strict=True):
            object.__setattr__(counts, field.name, array)
        return counts

    def summary(self) -> str:
        """Numbers of units and experts, and of tokens under both conditions."""
        tokens = f"{self.tokens_1.sum():.0f} and {self.tokens_2.sum():.0f}"
        return f"{self.n_units} units, {self.n_experts} experts, {tokens} tokens"


def as_floats(name: str, values: Any) -> np.ndarray:
    """A float64 array of finite numbers; DataError, naming it, for anything else."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{name} must be an array of numbers: {error}.") from error
    if not np.isfinite(array).all():
        raise DataError(f"{name} holds NaN or infinite values; counts and sums must be finite.")
    return array


def _unit_numbers(clusters: Any, n_pairs: int) -> np.ndarray:
    """[pair], the number of each pair's unit, in the order of their first pairs."""
    try:
        labels = list(clusters)
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    except TypeError as error:
        raise DataError(f"clusters must be a list of labels, strings or numbers: {error}.") from error
    if len(labels) != n_pairs:
        raise DataError(f"{n_pairs} pairs need as many cluster labels; got {len(labels)}.")
    return np.array([numbers[label] for label in labels])


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
        _check_condition(number, arrays[f"sums_{number}"], arrays[f"tokens_{number}"])
    return arrays


def _check_condition(number: int, sums: np.ndarray, tokens: np.ndarray) -> None:
    if (sums < 0).any() or (tokens < 0).any():
        raise DataError(f"sums_{number} and tokens_{number} must not be negative.")
    if len(empty := np.flatnonzero(tokens == 0)):
        raise DataError(
            f"Unit {empty[0]} has no counted tokens under condition {number} (of {len(empty)} such units); "
            "leave such pairs out, or count a wider span."
        )
    if (above := sums > tokens[:, None] * (1 + 1e-6)).any():
        unit, expert = np.argwhere(above)[0]
        raise DataError(
            f"sums_{number}[{unit}, {expert}] is {sums[unit, expert]:g}, above the unit's {tokens[unit]:g} "
            "tokens; an expert is chosen at most once per token."
        )
