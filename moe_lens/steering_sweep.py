"""How the effect grows with the size of the plan, in both directions, beside random sets of the same size.

found = sweep(model, scores, development_task, sizes=(2, 4, 8, 16))
size = found.best_size()                               # to be evaluated on other prompts
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from moe_lens.contrast import ExpertScores
from moe_lens.controls import random_sets
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation import clustered_interval
from moe_lens.files import atomic_write
from moe_lens.hooked_moe import HookedMoE
from moe_lens.moe_shape import as_index
from moe_lens.steering_evaluation import check_model_and_task, measure_outcome
from moe_lens.steering_plan import SteeringPlan
from moe_lens.steering_report import DIRECTIONS, Limit, Outcome, read_json
from moe_lens.tasks import SteeringTask

Mode = Literal["deactivate", "activate", "both"]
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


def sweep(
    model: HookedMoE,
    scores: ExpertScores,
    task: SteeringTask,
    *,
    sizes: Sequence[int],
    directions: Sequence[str] = DIRECTIONS,
    mode: Mode = "deactivate",
    n_random: int = 5,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> SweepResult:
    """Measure a task under plans of several sizes, and under random sets of the same sizes.

    Choose a size here, on development prompts; `evaluate_steering` then judges it on others.

    >>> from moe_lens import organisms, sweep
    >>> from moe_lens.demo import detect_document_experts, document_task
    >>> model, world = organisms.load("planted"), organisms.world("planted")
    >>> scores = detect_document_experts(model, world)
    >>> task = document_task(world, "development")
    >>> found = sweep(model, scores, task, sizes=(2, 4), n_random=0, progress=False)
    >>> found.sizes, found.gap(4) > found.gap(2)
    ((2, 4), True)

    Args:
        scores: the plans take the experts with the most negative and most positive ones.
        sizes: numbers of experts; those that the model has no room for are left out.
        directions: "+" (toward the scores' first condition), "−" (toward the second), or both.
        mode: "deactivate" (the gentler lever), "activate", or "both" (as many of each).
        n_random: random sets of each size, in any layers; may be 0.

    Raises:
        DataError: no sizes, an unknown direction or mode. PlanError: no size is possible.
    """
    check_model_and_task(model, task, seed, level)
    _check_sweep(sizes, directions, mode, n_random)
    plans = _plans(model, scores, sizes, directions, mode)
    unsteered = measure_outcome(model, task, SteeringPlan())
    points = []
    with tqdm(total=len(plans) * (1 + n_random), unit="run", disable=not progress) as bar:

        def measure(plan: SteeringPlan) -> Outcome:
            outcome = measure_outcome(model, task, plan)
            bar.update()
            return outcome

        for number, ((size, direction), plan) in enumerate(plans.items()):
            outcome = measure(plan)
            low, high = clustered_interval(outcome.values, task.clusters, level=level, seed=seed)
            sets = random_sets(model, plan, n_random, seed=10_000 * (seed + 1) + number)
            random = [measure(one).rate for one in sets]
            points.append(
                SweepPoint(size, direction, outcome.rate, low, high, dict(outcome.collateral), random)
            )
    limits = {name: Limit(one.limit, one.larger_is_worse) for name, one in task.collateral.items()}
    return SweepResult(
        task.name,
        model.moe_shape.model,
        mode,
        unsteered.rate,
        dict(unsteered.collateral),
        limits,
        tuple(points),
    )


def _plans(
    model: HookedMoE, scores: ExpertScores, sizes: Sequence[int], directions: Sequence[str], mode: str
) -> dict[tuple[int, str], SteeringPlan]:
    """(size, direction) -> plan, of the sizes that are possible in every direction."""
    plans: dict[tuple[int, str], SteeringPlan] = {}
    reason: PlanError | None = None
    for size in sorted(set(sizes)):
        numbers = (size if mode != "deactivate" else 0, size if mode != "activate" else 0)
        try:
            both = {
                (size, direction): SteeringPlan.from_scores(scores if direction == "+" else -scores, *numbers)
                for direction in directions
            }
        except PlanError as error:  # fewer experts of one sign, or more than fit a layer
            reason = error
            continue
        if refused := [layer for plan in both.values() for layer in plan.refused_layers(model)]:
            reason = PlanError(f"layer {refused[0]} cannot be steered so.")
            continue
        plans |= both
    if not plans:
        raise PlanError(f"No plan of {tuple(sizes)} experts is possible on this model: {reason}")
    return plans


def _check_sweep(sizes: Sequence[int], directions: Sequence[str], mode: str, n_random: int) -> None:
    if not isinstance(sizes, Iterable) or not (sizes := list(sizes)) or not all(map(as_index, sizes)):
        raise DataError(f"sizes must be numbers of experts from 1 on, at least one; got {sizes!r}.")
    if not directions or not set(directions) <= set(DIRECTIONS):
        raise DataError(f"directions must be of {DIRECTIONS}; got {directions!r}.")
    if mode not in get_args(Mode):
        raise DataError(f"mode must be one of {get_args(Mode)}; got {mode!r}.")
    if as_index(n_random) is None:
        raise DataError(f"n_random must be a number from 0 on; got {n_random!r}.")
