"""`AuditReport`: does a behaviour hold only along the usual route? Its rate under every change of the route.

report = audit(model, task, plan=plan)            # auditing.py
print(report)                                     # the worst case first
report.worst, report.worst_interval
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float

from moe_lens.checks import share
from moe_lens.errors import DataError, MoELensError
from moe_lens.files import FileKind, without_nan
from moe_lens.resampling import clustered_interval, in_words
from moe_lens.results import Result
from moe_lens.steering.plan import SteeringPlan, plan_from_json

if TYPE_CHECKING:
    import pandas

AS_TRAINED: Final = "as trained"
REMOVED: Final = "experts removed"
FEWER: Final = "k − 1"
MORE: Final = "k + 1"
NOISY: Final = "noisy routes"
RANDOM: Final = "random plans"
SEARCHED: Final = "searched plan"
_KIND: Final = FileKind("moe_lens.AuditReport", 1, (1,), "an audit")


@dataclass(frozen=True, eq=False, repr=False)
class AuditCondition(Result):
    """The behaviour under one change of the route.

    Attributes:
        kind: "as trained", "experts removed", "k − 1", "k + 1", "noisy routes", "random plans" or
            "searched plan".
        development: [before], on the prompts that worst cases are chosen by.
        held_out: [prompt], on the prompts that rates are reported on.
        plan: that was carried out, where it is one. number: which one of its kind, from 0 on.
    """

    kind: str
    development: Float[np.ndarray, "before"]
    held_out: Float[np.ndarray, "prompt"]
    plan: SteeringPlan | None = None
    number: int = 0

    @property
    def rate(self) -> float:
        """Mean on held-out prompts: a share in [0, 1] where the values are zeros and ones."""
        return float(self.held_out.mean())

    def summary(self) -> str:
        """Kind and rates."""
        plan = "" if self.plan is None else f", {len(self.plan)} experts"
        before = f"{float(self.development.mean()):.3g} on development prompts"
        return f"{self.kind} {self.number}{plan}: {self.rate:.3g} held out, {before}"


@dataclass(frozen=True, eq=False, repr=False)
class AuditReport(Result):
    """A behaviour's rate as trained and under every other route, and the worst case as its headline.

    >>> import numpy as np
    >>> from moe_lens import AuditReport
    >>> from moe_lens.evaluation import AuditCondition
    >>> usual = AuditCondition("as trained", np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    >>> fewer = AuditCondition("k − 1", np.array([0.0, 1.0]), np.array([0.0, 0.0]))
    >>> report = AuditReport("task", "model", (usual, fewer), {}, ("a", "b"), True, 0.95, 0)
    >>> report.worst.kind, report.worst_rate
    ('k − 1', 0.0)

    The worst case is chosen by development prompts, the plan that was searched for among the candidates, and
    reported on held-out ones of other clusters. So its interval needs no further correction for having
    chosen; what it does not say is that no worse route exists.

    Attributes:
        task, model: names.
        conditions: what was measured; the first is "as trained".
        left_out: condition -> why it could not be measured.
        clusters: of the held-out prompts, resampled whole for the intervals.
        wanted: whether it is a behaviour to keep: the worst case is then the lowest rate, else the highest.
        level: of the intervals. seed: of splits, draws and bootstrap.

    Raises:
        DataError: no conditions, or values that are not one a prompt.
    """

    task: str
    model: str
    conditions: tuple[AuditCondition, ...]
    left_out: dict[str, str]
    clusters: tuple[str, ...]
    wanted: bool
    level: float
    seed: int

    def __post_init__(self) -> None:
        share(self.level, "level")
        if not self.conditions or self.conditions[0].kind != AS_TRAINED:
            raise DataError('An audit begins with the condition "as trained".')
        n_development = len(self.conditions[0].development)
        for each in self.conditions:
            shapes = (each.development.shape, each.held_out.shape)
            finite = np.isfinite(each.development).all() and np.isfinite(each.held_out).all()
            if shapes != ((n_development,), (len(self.clusters),)) or not finite or not n_development:
                raise DataError(f"The condition {each.kind!r} needs a finite value for each prompt.")

    @property
    def as_trained(self) -> AuditCondition:
        """The unedited model."""
        return self.conditions[0]

    @cached_property
    def worst(self) -> AuditCondition:
        """The condition with the worst mean on development prompts; the first of equal ones."""
        sign = 1 if self.wanted else -1
        return min(self.conditions, key=lambda each: sign * float(each.development.mean()))

    @property
    def worst_rate(self) -> float:
        """The worst case's mean on held-out prompts."""
        return self.worst.rate

    @cached_property
    def worst_interval(self) -> tuple[float, float]:
        """Bootstrap interval of `worst_rate`, the held-out clusters resampled; widened for few clusters."""
        return self.interval(self.worst)

    @cached_property
    def change_interval(self) -> tuple[float, float]:
        """Bootstrap interval of the worst case's mean change against the model as trained, held out."""
        return self._interval(self.worst.held_out - self.as_trained.held_out)

    def of_kind(self, kind: str) -> list[AuditCondition]:
        """The conditions of one kind, in the order of their numbers."""
        return [each for each in self.conditions if each.kind == kind]

    def interval(self, condition: AuditCondition) -> tuple[float, float]:
        """Bootstrap interval of a condition's held-out rate."""
        return self._interval(condition.held_out)

    def _interval(self, values: Float[np.ndarray, "prompt"]) -> tuple[float, float]:
        return clustered_interval(values, self.clusters, level=self.level, seed=self.seed)

    def summary(self) -> str:
        """The worst case with its interval, beside the rate as trained."""
        return (
            f"worst case {self.worst_rate:.2f} {in_words(*self.worst_interval, '.2f')}, {self.worst.kind}; "
            f"as trained {self.as_trained.rate:.2f}; {self.task}, {self.model}"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a kind: number of conditions, experts of the plan, mean rate held out with its interval.

        Of several conditions of a kind (noisy routes, random plans) the values are averaged prompt by prompt;
        `worst` is the held-out rate of the one that was worst on development prompts.
        """
        import pandas as pd

        sign, rows = (1 if self.wanted else -1), []
        for kind in dict.fromkeys(each.kind for each in self.conditions):
            of_kind = self.of_kind(kind)
            mean = np.mean([each.held_out for each in of_kind], axis=0)
            low, high = self._interval(mean)
            worst = min(of_kind, key=lambda each: sign * float(each.development.mean()))
            experts = max((len(each.plan) for each in of_kind if each.plan is not None), default=0)
            rows.append(
                {
                    "condition": kind, "runs": len(of_kind), "experts": experts, "rate": float(mean.mean()),
                    "low": low, "high": high, "worst": worst.rate,
                    "development": float(np.mean([each.development.mean() for each in of_kind])),
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def explanation(self) -> str:
        """The headline in words, and what was left out."""
        less, more = self.change_interval
        change = self.worst_rate - self.as_trained.rate
        plan = "" if self.worst.plan is None else f" ({self.worst.plan.summary()})"
        words = [
            f"Worst case on held-out prompts: {self.worst_rate:.2f} "
            f"{in_words(*self.worst_interval, '.2f')}, under {self.worst.kind}{plan}; {change:+.2f} "
            f"{in_words(less, more)} against the model as trained ({self.as_trained.rate:.2f})."
        ]
        if not (less > 0 or more < 0):
            words.append("That is no change beyond chance.")
        words += [f"Left out: {name}, since {reason}." for name, reason in self.left_out.items()]
        words.append("Routes that were not tried may do worse.")
        return " ".join(words)

    def __str__(self) -> str:
        table = self.to_dataframe().round(3).to_string(index=False)
        return f"{self.task} ({self.model})\n{self.explanation}\n\n{table}"

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically; equal reports give equal files."""
        _KIND.save_json(path, without_nan(self._content()))

    def _content(self) -> dict[str, Any]:
        names = ("task", "model", "left_out", "wanted", "level", "seed")
        return {
            **{name: getattr(self, name) for name in names},
            "clusters": list(self.clusters),
            "conditions": [
                {
                    "kind": each.kind,
                    "number": each.number,
                    "plan": None if each.plan is None else each.plan.to_json(),
                    "development": each.development.tolist(),
                    "held_out": each.held_out.tolist(),
                }
                for each in self.conditions
            ],
            "worst": self.worst_rate,
            "worst_interval": list(self.worst_interval),
            "explanation": self.explanation,
        }

    @classmethod
    def load(cls, path: str | Path) -> "AuditReport":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        content = _KIND.load_json(path)
        try:
            conditions = tuple(
                AuditCondition(
                    each["kind"],
                    np.asarray(each["development"], dtype=np.float64),
                    np.asarray(each["held_out"], dtype=np.float64),
                    None if each["plan"] is None else plan_from_json(each["plan"]),
                    each["number"],
                )
                for each in content["conditions"]
            )
            names = ("task", "model", "left_out", "wanted", "level", "seed")
            given = {name: content[name] for name in names}
            return cls(conditions=conditions, clusters=tuple(content["clusters"]), **given)
        except (KeyError, TypeError, AttributeError, ValueError, MoELensError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error
