"""Searching the experts for a small set that moves a behaviour, and measuring it on prompts it never saw.

found = search_plan(model, development_task, held_out_task, candidates, size=4)
found.plan, found.development, found.held_out        # the second number is the one to report
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from math import comb, isfinite
from typing import Any, Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from moe_lens.checks import short, whole_number
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError, PlanError, warn
from moe_lens.evaluation.evaluating import check_model_and_task, measure_outcome
from moe_lens.evaluation.growing import TIES, Experts, best_of, growing
from moe_lens.evaluation.outcomes import Outcome
from moe_lens.evaluation.plan_search import Change, PlanSearch, Step
from moe_lens.evaluation.tasks import SteeringTask, n_shared_prompts, shared_labels
from moe_lens.model.wrapper import Model
from moe_lens.resampling import clustered_interval
from moe_lens.steering.choosing import Expert
from moe_lens.steering.controls import random_sets
from moe_lens.steering.plan import SteeringPlan

Method = Literal["greedy", "exact"]
Role = Literal["deactivate", "activate"]
Toward = Literal["higher", "lower"]


def search_plan(
    model: Model,
    development: SteeringTask,
    held_out: SteeringTask,
    candidates: ExpertScores | Iterable[Expert] | None = None,
    *,
    size: int = 4,
    goal: float | None = None,
    toward: Toward = "higher",
    method: Method = "greedy",
    role: Role = "deactivate",
    n_random: int = 20,
    max_runs: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> PlanSearch:
    """The smallest set of experts that moves a task's mean on development prompts, measured on held-out ones.

    >>> from moe_lens import organisms, search_plan
    >>> from moe_lens.organisms import document_task
    >>> model, world = organisms.load("planted"), organisms.world("planted")
    >>> development, test = document_task(world, "development"), document_task(world, "test")
    >>> experts = [(2, expert) for expert in range(3)]
    >>> found = search_plan(model, development, test, experts, size=1, n_random=2, progress=False)
    >>> len(found.plan), found.held_out.low <= found.held_out.value <= found.held_out.high
    (1, True)

    - "greedy": adds the expert that moves the mean most, as long as one does; with a goal, until it is
      reached, and then drops every expert without which it is reached as well. One run a candidate and step.
    - "exact": every set of candidates, from single experts on; with a goal, it ends at the first size at
      which a set reaches it (and takes the set that moves it furthest); without one the best set of all
      sizes, the smaller of equals.

    Sets under which a collateral measure of the development task leaves its limit are passed over, and so are
    those that a router refuses. Among equal sets the first in the order of candidates wins.

    The search looks at many sets, so the development number is too good: by how much, the held-out number
    says, with its interval over clusters and beside layer-matched random sets. The held-out task must be of
    other prompts, and of other clusters where prompts share something; it chooses nothing, and stays unbiased
    only as long as nobody searches again because of it.

    Args:
        model: a HookedMoE or RoutedModel.
        development: a task on the prompts to search by.
        held_out: the same behaviour on other prompts.
        candidates: (layer, expert) pairs; scores stand for all their experts in order of |score|; None for
            all experts of the model.
        size: of the largest set.
        goal: by how much the mean is to move at least, in the task's unit, > 0; None: as far as it goes.
        toward: whether the mean is to rise or to fall.
        method: "greedy" or "exact".
        role: whether the experts are deactivated or activated.
        n_random: layer-matched random sets for the held-out measure; may be 0.
        max_runs: runs over the development task, at most; it raises before it would need more.
        level: of the intervals.
        seed: of random sets and bootstrap.
        progress: show a bar, one step a set.

    Raises:
        DataError: one task for both, no candidates, more runs than max_runs, bad settings.
        PlanError: experts that the model does not have, or no admissible set at all.
    """
    seed, level = check_model_and_task(model, development, seed, level)
    check_model_and_task(model, held_out, seed, level)
    _check_settings(development, held_out, goal, method, role, toward)
    n_random = whole_number(n_random, "n_random")
    experts = _candidates(model, candidates)
    largest = whole_number(size, "size", least=1)
    largest = min(largest, len(experts))
    n_runs = _most_runs(len(experts), largest, method, goal)
    if n_runs > whole_number(max_runs, "max_runs", least=1):
        raise DataError(
            f"The {method} search needs up to {n_runs} runs of the development task, more than "
            f"max_runs={max_runs}; give fewer candidates or a smaller size, or allow more."
        )
    searched, on_held_out = development.on(model), held_out.on(model)
    if n_shared := n_shared_prompts(searched, on_held_out):
        warn(
            f"{n_shared} held-out prompts are development prompts, too, so the held-out number is too good. "
            "Hold out others."
        )
    with tqdm(total=n_runs, unit="run", disable=not progress) as bar:
        search = _Search(model, searched, role, 1 if toward == "higher" else -1, bar)
        steps = (
            search.greedy(experts, largest, goal)
            if method == "greedy"
            else search.exact(experts, largest, goal)
        )
    best = steps[-1]
    plan = search.plan_of(best.experts)
    outcomes = [measure_outcome(model, on_held_out, p) for p in (SteeringPlan(), plan)]
    sets = random_sets(model, plan, n_random, seed=seed, layer_matched=True)
    random = [measure_outcome(model, on_held_out, set_).rate - outcomes[0].rate for set_ in sets]
    return PlanSearch(
        task=held_out.name,
        model=model.moe_shape.model,
        method=method,
        toward=toward,
        goal=goal,
        plan=plan,
        steps=tuple(steps),
        n_runs=search.n_runs,
        unsteered=(search.unsteered.rate, outcomes[0].rate),
        development=_change(search.unsteered, search.outcomes[best.experts], development, level, seed),
        held_out=_change(outcomes[0], outcomes[1], held_out, level, seed),
        random=tuple(random),
    )


class _Search:
    """Sets measured so far, and the next ones."""

    def __init__(self, model: Model, task: SteeringTask, role: str, sign: int, bar: Any):
        self.model, self.task, self.role, self.sign, self.bar = model, task, role, sign, bar
        self.unsteered = measure_outcome(model, task, SteeringPlan())
        self.outcomes: dict[tuple[Expert, ...], Outcome] = {(): self.unsteered}
        self.n_runs = 1
        bar.update()

    def plan_of(self, experts: Sequence[Expert]) -> SteeringPlan:
        """The plan that gives these experts their role."""
        shape = self.model.moe_shape
        if self.role == "activate":
            return SteeringPlan(activate=experts, shape=shape)
        return SteeringPlan(deactivate=experts, shape=shape)

    def gain(self, experts: tuple[Expert, ...]) -> float | None:
        """How far the set moves the mean in the wanted direction; None if it is not admissible."""
        if experts not in self.outcomes:
            try:
                plan = self.plan_of(experts)
            except PlanError:  # more than the layer has room for
                return None
            if plan.refused_layers(self.model):
                return None
            self.outcomes[experts] = measure_outcome(self.model, self.task, plan)
            self.n_runs += 1
            self.bar.update()
        outcome = self.outcomes[experts]
        if not self._keeps_limits(outcome):
            return None
        return self.sign * (outcome.rate - self.unsteered.rate)

    def _keeps_limits(self, outcome: Outcome) -> bool:
        for name, measure in self.task.collateral.items():
            worse = outcome.collateral[name] - self.unsteered.collateral[name]
            worse = worse if measure.larger_is_worse else -worse
            if not isfinite(worse) or worse > measure.limit + TIES:
                return False
        return True

    def step(self, experts: tuple[Expert, ...]) -> Step:
        """What is told of a set."""
        return Step(experts, self.outcomes[experts].rate)

    def greedy(self, candidates: list[Expert], size: int, goal: float | None) -> list[Step]:
        """Sets that grow by one, and in the end one without experts that the goal does not need."""

        def others(chosen: Experts) -> Iterable[Expert]:
            return (expert for expert in candidates if expert not in chosen)

        grown = list(growing(self.gain, others, size, goal))
        if not grown:
            raise PlanError(_nothing(self.task, self.sign))
        steps = [self.step(experts) for _, experts in grown]
        gained, chosen = grown[-1]
        if goal is not None and gained >= goal - TIES:
            for expert in chosen[:-1]:  # without the last the goal was not reached
                fewer = tuple(e for e in chosen if e != expert)
                gain = self.gain(fewer) if fewer else None
                if gain is not None and gain >= goal - TIES:
                    chosen = fewer
                    steps.append(self.step(chosen))
        return steps

    def exact(self, candidates: list[Expert], size: int, goal: float | None) -> list[Step]:
        """The best set of each size that is better than all smaller ones."""
        steps: list[Step] = []
        gained = 0.0
        for number in range(1, size + 1):
            found = best_of(combinations(candidates, number), self.gain)
            if found is not None and found[0] > gained + TIES:
                gained = found[0]
                steps.append(self.step(found[1]))
            if goal is not None and gained >= goal - TIES:
                break
        if not steps:
            raise PlanError(_nothing(self.task, self.sign))
        return steps


def _nothing(task: SteeringTask, sign: int) -> str:
    way = "raises" if sign > 0 else "lowers"
    return (
        f"No admissible set of the candidates {way} {task.name!r} on the development prompts; give other "
        "candidates, the other role, or wider limits."
    )


def _change(before: Outcome, after: Outcome, task: SteeringTask, level: float, seed: int) -> Change:
    difference = after.values - before.values
    low, high = clustered_interval(difference, task.clusters, level=level, seed=seed)
    return Change(float(difference.mean()), low, high)


def _candidates(model: Model, given: Any) -> list[Expert]:
    shape = model.moe_shape
    if given is None:
        experts = [(layer, expert) for layer in shape.layers for expert in range(shape.n_experts)]
    elif isinstance(given, ExpertScores):
        if misfits := given.shape.misfits(shape):
            raise DataError(
                f"The scores are of another model than the search's (scores / model): {'; '.join(misfits)}. "
                "If that is meant, give (layer, expert) pairs."
            )
        experts = [(score.layer, score.expert) for score in given.ranked()]
    else:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise DataError(f"candidates must be (layer, expert) pairs or ExpertScores; got {short(given)}.")
        listed = list(given)
        experts = []
        for start in listed:  # a plan of one knows what is wrong with an expert
            experts += SteeringPlan(deactivate=[start], shape=shape).deactivate
    if not experts:
        raise DataError("There are no candidates to search.")
    if len(set(experts)) < len(experts):
        raise DataError("candidates name an expert more than once.")
    return experts


def _most_runs(n: int, size: int, method: str, goal: float | None) -> int:
    """The unsteered run, and one for each set that may be looked at."""
    if method == "exact":
        return 1 + sum(comb(n, number) for number in range(1, size + 1))
    return 1 + sum(n - step for step in range(size)) + (0 if goal is None else max(size - 1, 0))


def _check_settings(
    development: SteeringTask, held_out: SteeringTask, goal: Any, method: Any, role: Any, toward: Any
) -> None:
    if development is held_out:
        raise DataError("development and held_out are one task; the held-out prompts must be others.")
    for name, value, kinds in (
        ("method", method, Method), ("role", role, Role), ("toward", toward, Toward),
    ):  # fmt: skip
        if value not in get_args(kinds):
            raise DataError(f"{name} must be one of {', '.join(get_args(kinds))}; got {value!r}.")
    is_number = isinstance(goal, int | float | np.number) and not isinstance(goal, bool)
    if goal is not None and (not is_number or not goal > 0 or not isfinite(goal)):
        raise DataError(f"goal must be a number above 0, how far the mean is to move; got {goal!r}.")
    if shared := shared_labels(development, held_out):
        warn(
            f"Development and held-out prompts share {len(shared)} clusters ({shared[0]!r} is one), so the "
            "held-out number is not of new ones; split_clusters makes splits that share none."
        )
