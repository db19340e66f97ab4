"""`PlanSearch`: what a search over sets of experts found, on its own prompts and on held-out ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from moe_lens.resampling import in_words
from moe_lens.results import Result
from moe_lens.steering.choosing import Expert
from moe_lens.steering.plan import SteeringPlan

if TYPE_CHECKING:
    import pandas


class Step(NamedTuple):
    """A set that the search went through, and the mean of the development task under it."""

    experts: tuple[Expert, ...]
    mean: float


class Change(NamedTuple):
    """How far a plan moves a task's mean, and its interval over clusters of prompts; NaN of one cluster."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class PlanSearch(Result):
    """The set that a search chose, and what it does on other prompts.

    Attributes:
        task: name of the held-out behaviour.
        model: name of the model.
        method: "greedy" or "exact".
        toward: "higher" or "lower", which way the mean was to move.
        goal: how far it was to move; None: as far as it goes.
        plan: the set, as a plan.
        steps: the sets on the way there; the last one is the plan's.
        n_runs: runs over the development task.
        unsteered: mean without a plan, on development and on held-out prompts.
        development: how far the plan moves the mean on the prompts it was chosen by: too good a number.
        held_out: how far it moves the mean on the others.
        random: how far layer-matched random sets of the same size move it there.
    """

    task: str
    model: str
    method: str
    toward: str
    goal: float | None
    plan: SteeringPlan
    steps: tuple[Step, ...]
    n_runs: int
    unsteered: tuple[float, float]
    development: Change
    held_out: Change
    random: tuple[float, ...]

    @property
    def reached(self) -> bool | None:
        """Whether the goal was reached on the development prompts; None without one."""
        sign = 1 if self.toward == "higher" else -1
        return None if self.goal is None else sign * self.development.value >= self.goal - 1e-12

    @property
    def p(self) -> float | None:
        """Share of the random sets, the plan counted among them, that move the held-out mean as far.

        One-sided; at least 1 / (n_random + 1). None without random sets.
        """
        if not self.random:
            return None
        sign = 1 if self.toward == "higher" else -1
        as_far = sum(sign * change >= sign * self.held_out.value - 1e-12 for change in self.random)
        return (1 + as_far) / (1 + len(self.random))

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a step: size, experts, mean (of the development task)."""
        import pandas

        rows = [(len(step.experts), list(step.experts), step.mean) for step in self.steps]
        return pandas.DataFrame(rows, columns=["size", "experts", "mean"])

    def summary(self) -> str:
        """Size, both changes, and what random sets do."""
        control = "" if self.p is None else f", p {self.p:.2g} against {len(self.random)} random sets"
        goal = "" if self.reached is None else f", goal {'reached' if self.reached else 'not reached'}"
        return (
            f"{self.method}, {len(self.plan)} experts{goal}: held-out {self.held_out.value:+.3f} "
            f"{in_words(self.held_out.low, self.held_out.high, '+.3f')}{control}; development "
            f"{self.development.value:+.3f}"
        )
