"""`SteeringReport`: what an evaluation of steering says, in numbers, words and a file.

report = evaluate_steering(model, plan, task)          # evaluating.py
print(report)                                          # table and verdict
report.verdict, report.explanation
report.save("report.json"); SteeringReport.load("report.json")
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from moe_lens.errors import DataError, MoELensError
from moe_lens.evaluation import verdict
from moe_lens.evaluation.outcomes import Limit, Outcome, SteeringOutcomes
from moe_lens.files import FileKind, without_nan
from moe_lens.resampling import in_words
from moe_lens.results import Result
from moe_lens.steering.plan import plan_from_json

if TYPE_CHECKING:
    import pandas

_KIND: Final = FileKind("moe_lens.SteeringReport", 2, (1, 2), "a steering report")
"""Schema 1 had no digest and named the direction "-" by a minus sign."""
_SETTINGS: Final = ("task", "model", "alpha", "level", "seed", "joint_controls")


@dataclass(frozen=True, eq=False, repr=False)
class SteeringReport(SteeringOutcomes, Result):
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

    Where its measure sits at its floor or ceiling under every condition, `saturation` and its words say so.

    Attributes:
        task: name of the behaviour.
        model: name of the model.
        plans: direction ("+" the plan, "-" the reverse) -> plan.
        clusters: of each prompt; resampled whole for the intervals.
        unsteered: without any plan.
        steered: direction -> outcome.
        controls: "layer-matched" and "any layer" -> direction -> outcomes of random sets of the size of that
            direction's plan.
        bottom: of as many experts with the smallest |score|; None where the scores are unknown.
        limits: collateral measure -> how much worse a plan may make it.
        alpha: error rate of the verdict.
        level: of the intervals.
        seed: of random sets and bootstrap.
        joint_controls: the i-th random sets of both directions are one draw, as they must be if the plans
            share experts (`random_pairs`, `gap_p_value`).

    Raises:
        DataError: an outcome missing, or not of one finite value a prompt; alpha or level outside (0, 1).
    """

    @property
    def explanation(self) -> str:
        """The verdict in words: which criteria hold, which directions move, what suffers."""
        return verdict.explanation(self)

    def summary(self) -> str:
        """The verdict, the gap and its p-values; or that the measure has no room to show any."""
        gap = f"gap {self.gap:+.2f} {in_words(*self.gap_interval)}"
        if self.saturation is not None and not self.verdict:
            where = "constant" if self.saturation == "constant" else f"at its {self.saturation}"
            return f"the measure is {where} under every condition and shows nothing: {gap}"
        return (
            f"{'exceeds' if self.verdict else 'not beyond'} its controls: {gap}, p = {self.p_matched:.3f} "
            f"layer-matched, {self.p_any:.3f} any layer"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a condition: unsteered, both directions, bottom set, and the random sets (mean, sd)."""
        return verdict.table(self)

    def to_markdown(self) -> str:
        """The table and the verdict as Markdown."""
        return verdict.markdown(self)

    def __str__(self) -> str:
        frame = self.to_dataframe().map(verdict.shown)
        return f"{self.task} ({self.model})\n{frame.to_string(index=False)}\n\n{self.explanation}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; the verdict too."""
        return _KIND.sealed(without_nan(self._content()))

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically; equal reports give equal files."""
        _KIND.save_json(path, without_nan(self._content()))

    def _content(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _SETTINGS},
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
            "saturation": self.saturation,
            "explanation": self.explanation,
        }

    @classmethod
    def load(cls, path: str | Path) -> "SteeringReport":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        content = _KIND.load_json(path)
        try:
            return cls(
                task=content["task"],
                model=content["model"],
                plans={side: plan_from_json(plan) for side, plan in content["plans"].items()},
                clusters=tuple(content["clusters"]),
                unsteered=_from_json(content["unsteered"]),
                steered={side: _from_json(outcome) for side, outcome in content["steered"].items()},
                controls={
                    kind: {side: [_from_json(o) for o in outcomes] for side, outcomes in sides.items()}
                    for kind, sides in content["controls"].items()
                },
                bottom=None if content["bottom"] is None else _from_json(content["bottom"]),
                limits={name: Limit.from_json(limit) for name, limit in content["limits"].items()},
                alpha=content["alpha"],
                level=content["level"],
                seed=content["seed"],
                joint_controls=content.get("joint_controls", False),
            )
        except (KeyError, TypeError, AttributeError, ValueError, MoELensError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error


def _to_json(outcome: Outcome) -> dict[str, Any]:
    return {"values": outcome.values.tolist(), "collateral": dict(outcome.collateral)}


def _from_json(content: dict[str, Any]) -> Outcome:
    return Outcome(np.asarray(content["values"], dtype=np.float64), dict(content["collateral"]))
