"""What paired and unpaired counts share: sums and tokens of independent units under two conditions.

counts.sums_1, counts.tokens_1                 # [unit expert], [unit]
counts.strata, counts.fewest_units             # which units are drawn together; how many the smaller side has
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from moe_lens.errors import DataError
from moe_lens.results import Result

Counts = TypeVar("Counts", bound="UnitCounts")


@dataclass(frozen=True, eq=False, repr=False)
class UnitCounts(Result):
    """Counts of each expert under two conditions, one row per independent unit: what scores are made of.

    `PairedCounts` and `UnpairedCounts` are the two kinds.

    Attributes:
        sums_1, sums_2: [unit expert], float64, how often the expert was among the top-k (or its summed
            softmax probability) under the first and under the second condition.
        tokens_1, tokens_2: [unit], float64, how many tokens were counted.
    """

    sums_1: Float[np.ndarray, "unit expert"]
    tokens_1: Float[np.ndarray, "unit"]
    sums_2: Float[np.ndarray, "unit expert"]
    tokens_2: Float[np.ndarray, "unit"]

    @property
    def n_units(self) -> int:
        """Number of units."""
        return self.sums_1.shape[0]

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.sums_1.shape[1]

    @property
    def strata(self) -> Int[np.ndarray, "unit"]:
        """Units of one number are drawn from one population: all, unless groups are disjoint."""
        return np.zeros(self.n_units, dtype=np.int64)

    @property
    def fewest_units(self) -> int:
        """How many units have tokens under the condition that has fewer of them."""
        return int(min((self.tokens_1 > 0).sum(), (self.tokens_2 > 0).sum()))

    def experts(self: Counts, columns: Any) -> Counts:
        """The same units, some of the experts."""
        values = [getattr(self, field.name) for field in fields(self)]
        return self.trusted(
            *(v[:, columns] if isinstance(v, np.ndarray) and v.ndim == 2 else v for v in values)
        )

    @classmethod
    def trusted(cls: type[Counts], *arrays: np.ndarray | None) -> Counts:
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


def unit_numbers(clusters: Any, n_rows: int) -> np.ndarray:
    """[row], the number of each row's unit, in the order of their first rows."""
    try:
        labels = list(clusters)
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    except TypeError as error:
        raise DataError(f"clusters must be a list of labels, strings or numbers: {error}.") from error
    if len(labels) != n_rows:
        raise DataError(f"{n_rows} pairs need as many cluster labels; got {len(labels)}.")
    return np.array([numbers[label] for label in labels])


def check_condition(number: int, sums: np.ndarray, tokens: np.ndarray) -> None:
    """Raise DataError for negative numbers, or sums above the number of tokens."""
    if (sums < 0).any() or (tokens < 0).any():
        raise DataError(f"sums_{number} and tokens_{number} must not be negative.")
    if (above := sums > tokens[:, None] * (1 + 1e-6)).any():
        unit, expert = np.argwhere(above)[0]
        raise DataError(
            f"sums_{number}[{unit}, {expert}] is {sums[unit, expert]:g}, above the unit's {tokens[unit]:g} "
            "tokens; an expert is chosen at most once per token."
        )
