"""What an evaluation of steering found: numbers beside their controls, and a verdict in words.

report = evaluate_steering(model, plan, task)          # steering_evaluation.py
print(report)                                          # table and verdict
report.verdict, report.explanation
report.save("report.json"); SteeringReport.load("report.json")
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from math import isfinite, nan
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from moe_lens.errors import DataError, MoELensError
from moe_lens.files import atomic_write, read_json
from moe_lens.resampling import cluster_weights, clustered_interval
from moe_lens.steering.plan import SteeringPlan, plan_from_json

DIRECTIONS: Final = ("+", "−")
"""The plan's own direction, and the opposite one."""
LAYER_MATCHED: Final = "layer-matched"
ANY_LAYER: Final = "any layer"
_KIND: Final = "moe_lens.SteeringReport"
_SCHEMA: Final = 1
_N_RESAMPLES: Final = 1000


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model does under one plan.

    Attributes:
        values: [prompt], the behaviour.
        collateral: name -> what should not suffer.
    """

    values: Float[np.ndarray, "prompt"]
    collateral: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Mean behaviour: a share in [0, 1] where the values are zeros and ones."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Limit:
    """How much worse a plan may make a collateral measure."""

    limit: float
    larger_is_worse: bool


def gap_p_value(plus: Sequence[float], minus: Sequence[float]) -> float:
    """Exact p-value of the two-way gap `plus[0] − minus[0]` against the other sets of both lists.

    Under the null hypothesis the plan's set is exchangeable with the random sets of its own list, in each of
    the two lists independently. The gap is then one of the (M + 1)(M' + 1) differences plus[i] − minus[j],
    each as probable as the others, and p is the share of them that are at least as large (a permutation test
    over the product of two symmetric groups). It never falls below 1 / ((M + 1)(M' + 1)).

    >>> gap_p_value([0.9, 0.5, 0.4], [0.1, 0.5, 0.6])
    0.1111111111111111
    """
    x, y = np.asarray(plus, dtype=float), np.asarray(minus, dtype=float)
    if not len(x) or not len(y) or not np.isfinite([*x, *y]).all():
        raise DataError("gap_p_value needs finite numbers, at least one under each direction.")
    gaps = x[:, None] - y[None, :]
    return float((gaps >= x[0] - y[0] - 1e-12).mean())


class Excess(NamedTuple):
    """How far the two-way gap exceeds all but a share alpha of the gaps between random sets.

    `value` is the gap minus the (1 − alpha) quantile of the random sets' differences plus[i] − minus[j];
    `low` and `high` are its bootstrap interval, the prompts' clusters resampled for plan and controls alike.
    """

    value: float
    low: float
    high: float


class ByDirection(dict[str, Any]):
    """What belongs to "+" and "−" (a minus sign); a hyphen, which is on every keyboard, serves too.

    >>> ByDirection({"+": 1, "−": 2})["-"]
    2
    """

    def __missing__(self, key: Any) -> Any:
        if key == "-":
            return self["−"]
        raise DataError(f'There is no direction {key!r}; take "+" or "-".')


@dataclass(frozen=True, eq=False)
class SteeringReport:
    """The effect of a plan and of its opposite, beside random sets of as many experts.

    >>> from moe_lens import SteeringPlan, answer_task, evaluate_steering, organisms
    >>> model, conflicts = organisms.load("null"), organisms.world("null").conflicts("test")[:12]
    >>> task = answer_task(
    ...     [c.open_book for c in conflicts], [c.document_answer for c in conflicts],
    ...     clusters=[c.entity for c in conflicts],
    ... )
    >>> plan, reverse = SteeringPlan(deactivate=[(2, 5), (3, 7)]), SteeringPlan(deactivate=[(0, 1), (2, 2)])
    >>> report = evaluate_steering(model, plan, task, reverse=reverse, n_random=4, progress=False)
    >>> report.verdict, sorted(report.controls)
    (False, ['any layer', 'layer-matched'])

    Raises:
        DataError: an outcome missing, or not of one finite value a prompt; alpha or level outside (0, 1).

    Attributes:
        task, model: their names.
        plans: direction ("+" the plan, "−" the reverse) -> plan.
        clusters: of each prompt; resampled whole for the intervals.
        unsteered: without any plan.
        steered: direction -> outcome.
        controls: "layer-matched" and "any layer" -> direction -> outcomes of random sets of the size of that
            direction's plan.
        bottom: of as many experts with the smallest |score|; None where the scores are unknown.
        limits: collateral measure -> how much worse a plan may make it.
        alpha: error rate of the verdict. level: of the intervals. seed: of random sets and bootstrap.
    """

    task: str
    model: str
    plans: dict[str, SteeringPlan]
    clusters: tuple[str, ...]
    unsteered: Outcome
    steered: dict[str, Outcome]
    controls: dict[str, dict[str, list[Outcome]]]
    bottom: Outcome | None
    limits: dict[str, Limit]
    alpha: float
    level: float
    seed: int

    def __post_init__(self) -> None:
        sides, kinds = set(DIRECTIONS), {LAYER_MATCHED, ANY_LAYER}
        complete = set(self.plans) == set(self.steered) == sides and set(self.controls) == kinds
        if not complete or not all(set(lists) == sides for lists in self.controls.values()):
            raise DataError(f"A report needs both directions {DIRECTIONS}, with controls {sorted(kinds)}.")
        object.__setattr__(self, "plans", ByDirection(self.plans))
        object.__setattr__(self, "steered", ByDirection(self.steered))
        object.__setattr__(
            self, "controls", {kind: ByDirection(both) for kind, both in self.controls.items()}
        )
        lists = [outcomes for both in self.controls.values() for outcomes in both.values()]
        if not all(lists):
            raise DataError("A report needs at least one random set of each kind and direction.")
        bottom = [] if self.bottom is None else [self.bottom]
        for outcome in [self.unsteered, *self.steered.values(), *bottom, *chain(*lists)]:
            if outcome.values.shape != (len(self.clusters),) or not np.isfinite(outcome.values).all():
                raise DataError(
                    f"Every outcome needs a finite value for each of {len(self.clusters)} prompts."
                )
            if missing := [name for name in self.limits if not isfinite(outcome.collateral.get(name, nan))]:
                raise DataError(f"An outcome lacks the collateral measure {missing[0]!r}.")
        for name, share in (("alpha", self.alpha), ("level", self.level)):
            if not isinstance(share, float) or not 0 < share < 1:
                raise DataError(f"{name} must be a number between 0 and 1; got {share!r}.")

    @property
    def gap(self) -> float:
        """Two-way gap: mean behaviour under the plan minus that under the reverse."""
        return self.steered["+"].rate - self.steered["−"].rate

    @cached_property
    def gap_interval(self) -> tuple[float, float]:
        """Bootstrap interval of the gap over the clusters of prompts."""
        return self._interval(self.steered["+"].values - self.steered["−"].values)

    @property
    def p_matched(self) -> float:
        """`gap_p_value` against random sets with as many experts in each layer as the two plans."""
        return self._p(LAYER_MATCHED)

    @property
    def p_any(self) -> float:
        """`gap_p_value` against random sets in any layers."""
        return self._p(ANY_LAYER)

    @property
    def excess_matched(self) -> Excess:
        """How far the gap exceeds those of layer-matched random sets; for what, see `Excess`."""
        return self._excesses[LAYER_MATCHED]

    @property
    def excess_any(self) -> Excess:
        """How far the gap exceeds those of random sets in any layers."""
        return self._excesses[ANY_LAYER]

    @property
    def verdict(self) -> bool:
        """Whether the two-way gap exceeds its controls.

        It does if both p-values are at most alpha, and if, with the prompts resampled, the gap still exceeds
        all but a share alpha of the random sets' gaps, of both kinds. The p-values alone hold for the prompts
        at hand: a plan that does a little more than random sets on these may do no more on others.
        """
        sure = all(excess.low > 0 for excess in self._excesses.values())
        return sure and self.gap_interval[0] > 0 and max(self.p_matched, self.p_any) <= self.alpha

    @property
    def explanation(self) -> str:
        """The verdict in words: which criteria hold, which directions move, what suffers."""
        low, high = self.gap_interval
        gap = f"The two-way gap of {self.gap:+.2f} [{low:+.2f}, {high:+.2f}]"
        ps = f"p = {self.p_matched:.3f} against layer-matched, {self.p_any:.3f} against any-layer random sets"
        if self.verdict:
            first = f"{gap} exceeds its controls ({ps})."
        else:
            why = ", and ".join(self._failed())
            first = f"No effect beyond the controls: {gap[0].lower()}{gap[1:]} ({ps}); {why}."
        return " ".join([first, self._excess_words(), self._directions(), *self._collateral_words()])

    def effect_interval(self, direction: str) -> tuple[float, float]:
        """Bootstrap interval of the mean change against the unsteered model, in direction "+" or "−".

        Raises:
            DataError: another direction.
        """
        return self._interval(self.steered[direction].values - self.unsteered.values)

    def harms(self) -> dict[str, dict[str, float]]:
        """Collateral measure -> direction -> how much worse than unsteered."""
        return {
            name: {
                direction: (outcome.collateral[name] - self.unsteered.collateral[name])
                * (1 if limit.larger_is_worse else -1)
                for direction, outcome in self.steered.items()
            }
            for name, limit in self.limits.items()
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row a condition: unsteered, both directions, bottom set, and the random sets (mean, sd)."""
        rows = [self._row("unsteered", [self.unsteered], 0)]
        for direction in DIRECTIONS:
            outcome = self.steered[direction]
            row = self._row(f"steered {direction}", [outcome], len(self.plans[direction]))
            row["low"], row["high"] = self._interval(outcome.values)
            rows.append(row)
        rows[0]["low"], rows[0]["high"] = self._interval(self.unsteered.values)
        if self.bottom is not None:
            rows.append(self._row("least-scoring experts", [self.bottom], len(self.plans["+"])))
        for kind, sides in self.controls.items():
            for direction, outcomes in sides.items():
                name = f"{len(outcomes)} random sets, {kind}, as {direction}"
                rows.append(self._row(name, outcomes, len(self.plans[direction])))
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """The table and the verdict as Markdown."""
        frame = self.to_dataframe()
        lines = [list(frame.columns), ["---"] * len(frame.columns)]
        lines += [[_shown(value) for value in row] for row in frame.itertuples(index=False)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{self.explanation}\n"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; the verdict too."""
        content = {name: getattr(self, name) for name in ("task", "model", "alpha", "level", "seed")}
        return {
            "kind": _KIND,
            "schema": _SCHEMA,
            **content,
            "clusters": list(self.clusters),
            "plans": {direction: plan.to_json() for direction, plan in self.plans.items()},
            "limits": {name: asdict(limit) for name, limit in self.limits.items()},
            "unsteered": _to_json(self.unsteered),
            "steered": {direction: _to_json(outcome) for direction, outcome in self.steered.items()},
            "controls": {
                kind: {direction: [_to_json(o) for o in outcomes] for direction, outcomes in sides.items()}
                for kind, sides in self.controls.items()
            },
            "bottom": None if self.bottom is None else _to_json(self.bottom),
            "gap": self.gap,
            "gap_interval": list(self.gap_interval),
            "p_matched": self.p_matched,
            "p_any": self.p_any,
            "excess_matched": list(self.excess_matched),
            "excess_any": list(self.excess_any),
            "verdict": self.verdict,
            "explanation": self.explanation,
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "SteeringReport":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        content = read_json(path, _KIND, _SCHEMA)
        try:
            return cls(
                task=content["task"],
                model=content["model"],
                plans={side: plan_from_json(plan) for side, plan in content["plans"].items()},
                clusters=tuple(content["clusters"]),
                unsteered=_from_json(content["unsteered"]),
                steered={side: _from_json(o) for side, o in content["steered"].items()},
                controls={
                    kind: {side: [_from_json(o) for o in outcomes] for side, outcomes in sides.items()}
                    for kind, sides in content["controls"].items()
                },
                bottom=None if content["bottom"] is None else _from_json(content["bottom"]),
                limits={name: Limit(**limit) for name, limit in content["limits"].items()},
                alpha=content["alpha"],
                level=content["level"],
                seed=content["seed"],
            )
        except (KeyError, TypeError, AttributeError, ValueError, MoELensError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error

    def __str__(self) -> str:
        frame = self.to_dataframe().map(_shown)
        return f"{self.task} ({self.model})\n{frame.to_string(index=False)}\n\n{self.explanation}"

    def _p(self, kind: str) -> float:
        rates = {
            side: [self.steered[side].rate, *(o.rate for o in self.controls[kind][side])]
            for side in DIRECTIONS
        }
        return gap_p_value(rates["+"], rates["−"])

    @cached_property
    def _excesses(self) -> dict[str, Excess]:
        return {kind: self._excess(kind) for kind in self.controls}

    def _excess(self, kind: str) -> Excess:
        weights = cluster_weights(self.clusters, _N_RESAMPLES, self.seed)
        weights = np.vstack([np.ones(weights.shape[1]), weights])  # first the prompts as they are
        rates = {}
        for side in DIRECTIONS:
            outcomes = [self.steered[side], *self.controls[kind][side]]
            values = np.stack([outcome.values for outcome in outcomes], axis=1)  # [prompt set]
            rates[side] = weights @ values / weights.sum(1, keepdims=True)
        gaps = rates["+"][:, :, None] - rates["−"][:, None, :]  # [resample set set]
        controls = gaps[:, 1:, 1:].reshape(len(gaps), -1)
        excess = gaps[:, 0, 0] - np.quantile(controls, 1 - self.alpha, axis=1)
        low, high = np.quantile(excess[1:], [(1 - self.level) / 2, (1 + self.level) / 2])
        return Excess(float(excess[0]), float(low), float(high))

    def _failed(self) -> list[str]:
        """Why the verdict is no."""
        failed = []
        if not self.gap_interval[0] > 0:
            failed.append("its interval reaches 0 or lies below")
        for words, p, excess in (
            ("layer-matched random sets", self.p_matched, self.excess_matched),
            ("random sets in any layers", self.p_any, self.excess_any),
        ):
            if p > self.alpha:
                failed.append(f"{words} do as much")
            elif not excess.low > 0:
                failed.append(f"on other prompts {words} may do as much")
        return failed

    def _excess_words(self) -> str:
        parts = [
            f"{excess.value:+.2f} [{excess.low:+.2f}, {excess.high:+.2f}] ({kind})"
            for kind, excess in self._excesses.items()
        ]
        share = f"{100 * (1 - self.alpha):g} %"
        return f"Beyond {share} of the random sets' gaps it lies by {' and '.join(parts)}."

    def _interval(self, values: Float[np.ndarray, "prompt"]) -> tuple[float, float]:
        return clustered_interval(values, self.clusters, level=self.level, seed=self.seed)

    def _row(self, name: str, outcomes: Sequence[Outcome], n_experts: int) -> dict[str, Any]:
        rates = np.array([outcome.rate for outcome in outcomes])
        row: dict[str, Any] = {"condition": name, "experts": n_experts, "mean": rates.mean()}
        row |= {"low": np.nan, "high": np.nan, "sd": rates.std(ddof=1) if len(rates) > 1 else np.nan}
        for measure in self.limits:
            row[measure] = float(np.mean([outcome.collateral[measure] for outcome in outcomes]))
        return row

    def _directions(self) -> str:
        words = []
        for direction in DIRECTIONS:
            low, high = self.effect_interval(direction)
            change = self.steered[direction].rate - self.unsteered.rate
            meant = low > 0 if direction == "+" else high < 0
            moved = "moves as meant" if meant else "does not move as meant"
            n_activated = len(self.plans[direction].activate)
            how = f", by activating {n_activated} expert{'s' * (n_activated > 1)}," if n_activated else ""
            words.append(
                f"{direction}{how} {moved} ({change:+.2f} [{low:+.2f}, {high:+.2f}] against unsteered)"
            )
        return f"Direction {'; direction '.join(words)}."

    def _collateral_words(self) -> list[str]:
        words = []
        for name, sides in self.harms().items():
            limit = self.limits[name]
            worst = max(sides, key=lambda side: sides[side])
            fine = sides[worst] <= limit.limit + 1e-12
            words.append(
                f"Collateral: {name} gets worse by at most {max(0.0, sides[worst]):.2f} (direction {worst}), "
                f"{'within' if fine else 'MORE than'} the limit of {limit.limit:g}."
            )
        return words


def _to_json(outcome: Outcome) -> dict[str, Any]:
    return {"values": outcome.values.tolist(), "collateral": dict(outcome.collateral)}


def _from_json(content: dict[str, Any]) -> Outcome:
    return Outcome(np.asarray(content["values"], dtype=np.float64), dict(content["collateral"]))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3f}"
    return str(value)
