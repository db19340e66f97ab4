"""`SweepResult`: how the effect grows with the size of the plan, beside random sets of the same size.

result = sweep(model, scores, development_task, sizes=(2, 4, 8, 16))
size = result.best_size()                               # to be evaluated on other prompts
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from moe_lens.errors import DataError, warn
from moe_lens.evaluation.outcomes import Limit, direction_of
from moe_lens.files import FileKind, without_nan
from moe_lens.resampling import in_words
from moe_lens.results import Result

if TYPE_CHECKING:
    import pandas

_KIND: Final = FileKind("moe_lens.SweepResult", 2, (1, 2), "a sweep over plan sizes")
"""Schema 1 had no digest and named the direction "-" by a minus sign."""


@dataclass(frozen=True, repr=False)
class SweepPoint(Result):
    """One size in one direction.

    Attributes:
        size: experts named (deactivated, activated, or each of both).
        direction: "+" toward the first condition of the scores, "-" toward the second.
        mean: of the behaviour.
        low: lower bound of the mean's bootstrap interval over clusters; NaN of one cluster.
        high: its upper bound.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", direction_of(self.direction))

    @property
    def band(self) -> tuple[float, float]:
        """Interval that holds the middle 90 % of the random sets; NaN without any."""
        if not self.control_means:
            return float("nan"), float("nan")
        low, high = np.quantile(self.control_means, [0.05, 0.95])
        return float(low), float(high)

    def summary(self) -> str:
        """Size, direction, mean and interval."""
        return (
            f"size {self.size}, {self.direction}: mean {self.mean:.3f} {in_words(self.low, self.high, '.3f')}"
        )


@dataclass(frozen=True, repr=False)
class SweepResult(Result):
    """The points of a sweep, and the unsteered model.

    Attributes:
        task: name of the behaviour.
        model: name of the model.
        mode: "deactivate", "activate" or "both".
        unsteered: mean behaviour without a plan.
        unsteered_collateral: name -> value without a plan.
        limits: collateral measure -> how much worse a plan may make it.
        points: by size, then direction.
        saturation: "floor", "ceiling" or "constant" where the measure tells no size from another, as in
            `SteeringReport.saturation`; None where it has room.
    """

    task: str
    model: str
    mode: str
    unsteered: float
    unsteered_collateral: dict[str, float]
    limits: dict[str, Limit]
    points: tuple[SweepPoint, ...]
    saturation: str | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that were possible, ascending."""
        return tuple(sorted({point.size for point in self.points}))

    def point(self, size: int, direction: str) -> SweepPoint:
        """The point of a size and direction. Raises DataError if it was not measured."""
        wanted = (size, direction_of(direction))
        for point in self.points:
            if (point.size, point.direction) == wanted:
                return point
        raise DataError(f"The sweep has no size {size!r} in direction {direction!r}; sizes are {self.sizes}.")

    def gap(self, size: int) -> float:
        """Two-way gap: mean behaviour in direction "+" minus that in direction "-"."""
        return self.point(size, "+").mean - self.point(size, "-").mean

    def excess(self, size: int) -> float:
        """How far the worst collateral measure lies beyond its limit; at most 0 if all keep theirs."""
        worst = -np.inf
        for point in self.points:
            for name, limit in self.limits.items() if point.size == size else ():
                change = point.collateral[name] - self.unsteered_collateral[name]
                harm = change * (1 if limit.larger_is_worse else -1) - limit.limit
                worst = max(worst, harm if np.isfinite(change) else np.inf)  # NaN: the plan broke the model
        return float(worst)

    def best_size(self, tolerance: float = 0.1) -> int:
        """The smallest size whose gap is within `tolerance` of the largest, among those within the limits.

        A smaller plan does less damage. If no size keeps the limits, the one that exceeds them least.

        Warns where there is nothing to choose by: no size within the limits moves the behaviour the right way
        (every gap is 0 or below), or the measure tells no size from another (`saturation`). The size that is
        given back says nothing then.
        """
        gentle = [size for size in self.sizes if self.excess(size) <= 1e-12]
        if not gentle:
            return min(self.sizes, key=self.excess)
        largest = max(self.gap(size) for size in gentle)
        if largest <= 0 or self.saturation is not None:
            gaps = ", ".join(f"{size}: {self.gap(size):+.2f}" for size in gentle)
            why = f"no size moves the behaviour the right way{self._no_room}"
            warn(f"{self.task}: {why if largest <= 0 else self._no_room[2:]} (gap by size: {gaps}).")
        return min(size for size in gentle if self.gap(size) >= largest - tolerance)

    def summary(self) -> str:
        """Sizes, gaps and what was measured."""
        sides = {point.direction for point in self.points}
        gaps = [f"{size}: {self.gap(size):+.2f}" for size in self.sizes] if len(sides) == 2 else []
        what = f"gap by size {', '.join(gaps)}" if gaps else f"sizes {', '.join(map(str, self.sizes))}"
        return (
            f"{self.task}, {self.model}, {self.mode}, unsteered {self.unsteered:.2f}; {what}{self._no_room}"
        )

    @property
    def _no_room(self) -> str:
        if self.saturation is None:
            return ""
        where = "constant" if self.saturation == "constant" else f"at its {self.saturation}"
        return f"; the measure is {where} throughout and tells no size from another"

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a point: size, direction, mean, low, high, random sets (mean, 5 %, 95 %), collateral."""
        import pandas as pd

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
        """Write the sweep as JSON, atomically; equal sweeps give equal files."""
        _KIND.save_json(path, without_nan(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> "SweepResult":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        content = _KIND.load_json(path)
        try:
            del content["schema"]
            for point in content["points"]:
                point |= {side: np.nan for side in ("low", "high") if point[side] is None}
            content["points"] = tuple(SweepPoint(**point) for point in content["points"])
            content["limits"] = {name: Limit.from_json(limit) for name, limit in content["limits"].items()}
            return cls(**content)
        except (KeyError, TypeError, AttributeError, DataError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error

    def __str__(self) -> str:
        table = self.to_dataframe().round(3).to_string(index=False)
        return (
            f"{self.task} ({self.model}), unsteered {self.unsteered:.3f}, {self.mode}{self._no_room}\n{table}"
        )
