"""Searching for the plan under which a behaviour holds least: `GreedySearch`, and the seam for others.

    plan = GreedySearch()(model, development, 4)     # at most 4 experts, for a low mean of the task

`audit(search=...)` takes any function of this form; a search sees development prompts only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_lens.checks import whole_number
from moe_lens.errors import PlanError
from moe_lens.evaluation.growing import Experts, growing
from moe_lens.evaluation.tasks import SteeringTask
from moe_lens.model.wrapper import Model
from moe_lens.steering.choosing import Expert, SteerableModel, in_layer
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan

Search = Callable[[Any, SteeringTask, int], SteeringPlan]
"""From the model, a task whose mean is to become small, and the largest number of experts, to a plan."""


@dataclass(frozen=True)
class GreedySearch:
    """Expert by expert: each step deactivates the one that lowers the task's mean most, until none does.

    >>> from moe_lens import answer_task, organisms
    >>> model, facts = organisms.load("null"), organisms.world("null").facts("development")[:8]
    >>> task = answer_task([f.question for f in facts], [f.answer for f in facts])
    >>> len(GreedySearch(n_candidates=2)(model, task, 1)) <= 1
    True

    Experts that help only together are not found: it is a lower bound on what the strongest plan does.

    Attributes:
        n_candidates: experts tried in each step, drawn anew from those that the model's routers let go; with
            as many as the model has, all are. The search costs at most size · n_candidates runs.
        seed: of the draws.
    """

    n_candidates: int = 32
    seed: int = 0

    def __call__(self, model: Model, development: SteeringTask, size: int) -> SteeringPlan:
        """The plan that was found; without experts where none lowers the mean.

        Raises:
            DataError: a size or number of candidates below 1, or a task that gives no number a prompt.
        """

        size = whole_number(size, "size", least=1)
        number = whole_number(self.n_candidates, "n_candidates", least=1)
        generator = np.random.default_rng(whole_number(self.seed, "seed"))

        def mean(experts: Experts) -> float:
            return float(development.values(model, steer_hooks(_plan(experts, model))).mean())

        def drawn(chosen: Experts) -> list[Expert]:
            possible = [expert for expert in _experts(model) if _fits(chosen, expert, model)]
            return [possible[place] for place in sorted(generator.permutation(len(possible))[:number])]

        unsteered = mean(())
        grown = list(growing(lambda experts: unsteered - mean(experts), drawn, size))
        return _plan(grown[-1][1] if grown else (), model)


def checked_search(search: Any, plan: Any, size: int, model: SteerableModel) -> SteeringPlan:
    """What a search gave, as long as it is a plan of at most so many experts that the model obeys.

    Raises:
        PlanError: anything else.
    """
    name = getattr(search, "__name__", type(search).__name__)
    if not isinstance(plan, SteeringPlan):
        raise PlanError(f"The search {name} must give a SteeringPlan; got {type(plan).__name__}.")
    if len(plan) > size:
        raise PlanError(f"The search {name} gave {len(plan)} experts, and at most {size} were asked for.")
    plan.check_fits(model.moe_shape)
    if refused := plan.refused_layers(model):
        raise PlanError(f"The search {name} gave a plan that layer {refused[0]} cannot be steered by.")
    return plan


def _experts(model: SteerableModel) -> list[Expert]:
    shape = model.moe_shape
    return [(layer, expert) for layer in shape.layers for expert in range(shape.n_experts)]


def _fits(chosen: Experts, expert: Expert, model: SteerableModel) -> bool:
    if expert in chosen:
        return False
    _, out = in_layer((), (*chosen, expert), expert[0])
    return model.routing_rule(expert[0]).cannot_steer([], out) is None


def _plan(experts: Experts, model: SteerableModel) -> SteeringPlan:
    return SteeringPlan(deactivate=sorted(experts), shape=model.moe_shape)
