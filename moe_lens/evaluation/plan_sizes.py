"""`SweepResult`: how the effect grows with the size of the plan, beside random sets of the same size.

found = sweep(model, scores, development_task, sizes=(2, 4, 8, 16))
size = found.best_size()                               # to be evaluated on other prompts
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from moe_lens.errors import DataError
from moe_lens.evaluation.report import Limit
from moe_lens.files import atomic_write, read_json

_KIND: Final = "moe_lens.SweepResult"
_SCHEMA: Final = 1


@dataclass(frozen=True)
class SweepPoint:
    """One size in one direction.

    Attributes:
        size: experts named (deactivated, activated, or each of both).
        direction: "+" toward the first condition of the scores, "−" toward the second.
        mean: of the behaviour. low, high: its bootstrap interval over clusters.
        collateral: name -> value.
        control_means: behaviour under each random set of that size, in any layers.
    """

    size: int
    direction: str
    mean: float
    low: float
    high: float
    collateral: dict[str, float]
    control_means: list[float]

    @property
    def band(self) -> tuple[float, float]:
        """Interval that holds the middle 90 % of the random sets; NaN without any."""
        if not self.control_means:
            return float("nan"), float("nan")
        low, high = np.quantile(self.control_means, [0.05, 0.95])
        return float(low), float(high)


@dataclass(frozen=True)
class SweepResult:
    """The points of a sweep, and the unsteered model.

    Attributes:
        points: by size, then direction.
        unsteered: mean behaviour. unsteered_collateral: name -> value.
        limits: collateral measure -> how much worse a plan may make it.
    """

    task: str
    model: str
    mode: str
    unsteered: float
    unsteered_collateral: dict[str, float]
    limits: dict[str, Limit]
    points: tuple[SweepPoint, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that were possible, ascending."""
        return tuple(sorted({point.size for point in self.points}))

    def point(self, size: int, direction: str) -> SweepPoint:
        """The point of a size and direction. Raises DataError if it was not measured."""
        sign = "−" if direction == "-" else direction  # the hyphen is on every keyboard
        for point in self.points:
            if (point.size, point.direction) == (size, sign):
                return point
        raise DataError(f"The sweep has no size {size!r} in direction {direction!r}; sizes are {self.sizes}.")

    def gap(self, size: int) -> float:
        """Two-way gap: mean behaviour in direction "+" minus that in direction "−"."""
        return self.point(size, "+").mean - self.point(size, "−").mean

    def excess(self, size: int) -> float:
        """How far the worst collateral measure lies beyond its limit; at most 0 if all keep theirs."""
        worst = -np.inf
        for point in self.points:
            for name, limit in self.limits.items() if point.size == size else ():
                change = point.collateral[name] - self.unsteered_collateral[name]
                harm = change * (1 if limit.larger_is_worse else -1) - limit.limit
                worst = max(worst, harm if np.isfinite(harm) else np.inf)  # NaN: the plan broke the model
        return float(worst)

    def best_size(self, tolerance: float = 0.1) -> int:
        """The smallest size whose gap is within `tolerance` of the largest, among those within the limits.

        A smaller plan does less damage. If no size keeps the limits, the one that exceeds them least.
        """
        gentle = [size for size in self.sizes if self.excess(size) <= 1e-12]
        if not gentle:
            return min(self.sizes, key=self.excess)
        largest = max(self.gap(size) for size in gentle)
        return min(size for size in gentle if self.gap(size) >= largest - tolerance)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a point: size, direction, mean, low, high, random sets (mean, 5 %, 95 %), collateral."""
        rows = []
        for point in self.points:
            random = np.mean(point.control_means) if point.control_means else np.nan
            low, high = point.band
            row = {"size": point.size, "direction": point.direction, "mean": point.mean}
            row |= {"low": point.low, "high": point.high}
            row |= {"random_mean": random, "random_5%": low, "random_95%": high}
            rows.append({**row, **point.collateral})
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write the sweep as JSON, atomically."""
        with atomic_write(path) as temporary:
            content = {"kind": _KIND, "schema": _SCHEMA, **asdict(self)}
            temporary.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "SweepResult":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        content: dict[str, Any] = read_json(path, _KIND, _SCHEMA)
        try:
            del content["kind"], content["schema"]
            content["points"] = tuple(SweepPoint(**point) for point in content["points"])
            content["limits"] = {name: Limit(**limit) for name, limit in content["limits"].items()}
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error

    def __str__(self) -> str:
        table = self.to_dataframe().round(3).to_string(index=False)
        return f"{self.task} ({self.model}), unsteered {self.unsteered:.3f}, {self.mode}\n{table}"
