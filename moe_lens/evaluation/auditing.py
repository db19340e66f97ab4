"""Does a behaviour hold only along the usual route? `audit` measures it along others.

report = audit(model, task, plan=plan)                     # any SteeringTask: faithfulness, refusal ...
print(report)

It measures what a model as it is does when its route is disturbed; the plans that it tries are chosen by the
user's own task and prompts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from moe_lens.checks import share, whole_number
from moe_lens.errors import DataError, MoELensError, PlanError
from moe_lens.evaluation.audit_report import (
    AS_TRAINED,
    FEWER,
    MORE,
    NOISY,
    RANDOM,
    REMOVED,
    SEARCHED,
    AuditCondition,
    AuditReport,
)
from moe_lens.evaluation.evaluating import check_model_and_task
from moe_lens.evaluation.tasks import SteeringTask, n_shared_prompts, shared_labels, split_clusters
from moe_lens.evaluation.worst_plans import GreedySearch, Search, checked_search
from moe_lens.hook_names import Hooks
from moe_lens.interventions.noise import noisy_routes
from moe_lens.model.top_k import with_top_k
from moe_lens.model.wrapper import Model
from moe_lens.resampling import spawned_seeds
from moe_lens.steering.controls import random_sets
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan

Values = Float[np.ndarray, "prompt"]
Before = Float[np.ndarray, "before"]


class _Measures(NamedTuple):
    """The behaviour under hooks: on development prompts alone, or on these and the held-out ones."""

    development: Callable[[Hooks], Before]
    both: Callable[[Hooks], tuple[Before, Values]]
    development_clusters: tuple[str, ...]
    clusters: tuple[str, ...]
    """Of the held-out prompts."""


def audit(
    model: Model,
    task: SteeringTask,
    *,
    plan: SteeringPlan | None = None,
    development: SteeringTask | None = None,
    held_out: float = 0.5,
    n_noisy: int = 5,
    temperature: Any = 0.5,
    n_random: int = 20,
    max_size: int | None = None,
    search: Search | None = None,
    wanted: bool = True,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """A behaviour's rate along other routes than the usual one; the worst of them is the headline.

    >>> from moe_lens import SteeringPlan, answer_task, audit, organisms
    >>> model, facts = organisms.load("null"), organisms.world("null").facts("test")[::6]
    >>> task = answer_task(
    ...     [f.question for f in facts], [f.answer for f in facts], clusters=[f.entity for f in facts],
    ...     name="answers from memory",
    ... )
    >>> from moe_lens.evaluation import GreedySearch
    >>> report = audit(
    ...     model, task, plan=SteeringPlan(deactivate=[(1, 3)]), n_noisy=2, n_random=2,
    ...     search=GreedySearch(n_candidates=4), progress=False,
    ... )
    >>> report.worst_rate <= 1, sorted({each.kind for each in report.conditions})[:3]
    (True, ['as trained', 'experts removed', 'k + 1'])

    The conditions: as trained; with the behaviour's experts removed (`plan`); with k − 1 and k + 1 experts a
    token (`with_top_k`); along `n_noisy` noisy routes; under `n_random` random plans of as many experts, as
    many in each layer; and under the strongest plan of at most `max_size` experts that a search finds. All
    choosing, the search's and that of the worst condition, is done on development prompts; rates and
    intervals come from held-out prompts of other clusters.

    Args:
        model: a HookedMoE or RoutedModel.
        task: the behaviour, from `answer_task` or `load_task`, or a `SteeringTask` of your own functions.
        plan: what takes the behaviour's experts away; the random plans are of its size. None: that condition
            is left out, and random plans are of the searched plan's size.
        development: the same behaviour on other prompts, to choose by; `task` is then held out whole. None:
            the task's clusters are split.
        held_out: share of the task's clusters that are held out, where it is split.
        n_noisy: noisy routes, from 0 on. temperature: of their noise, as in `noisy_routes`.
        n_random: random plans, from 0 on.
        max_size: of the searched plan; None: the plan's size, or 4; 0: no search.
        search: a function (model, development, size) -> plan that makes the mean of the task that it is given
            small, one of development prompts (its values negated where `wanted` is False); None:
            `GreedySearch(seed=seed)`, at most 32 runs an expert.
        wanted: True for a behaviour to keep, whose lowest rate is the worst; False for one to avoid.
        level: of the intervals.
        seed: of the split, the noise, the random plans, the search and the bootstrap.
        progress: show a bar, one step a run of the task.

    Raises:
        DataError: a task whose clusters cannot be split, or that gives no number a prompt.
        PlanError: an empty plan or one that the model's routers refuse, or a search that gives no plan of the
            size asked for.
    """
    seed, level = check_model_and_task(model, task, seed, level)
    n_noisy, n_random = whole_number(n_noisy, "n_noisy"), whole_number(n_random, "n_random")
    _check_plan(model, plan)
    size = (len(plan) if plan is not None else 4) if max_size is None else whole_number(max_size, "max_size")
    noise = [noisy_routes(temperature, one) for one in spawned_seeds(seed, n_noisy)]
    with tqdm(unit="run", desc="audit", disable=not progress) as bar:
        measures = _measures(model, task, development, held_out, seed, bar.update)
        found: list[AuditCondition] = []
        left_out: dict[str, str] = {}

        def add(kind: str, hooks: Hooks, of: SteeringPlan | None = None, number: int = 0) -> None:
            found.append(AuditCondition(kind, *measures.both(hooks), of, number))

        add(AS_TRAINED, ())
        if plan is None:
            left_out[REMOVED] = "no plan says which experts the behaviour has"
        else:
            add(REMOVED, steer_hooks(plan), plan)
        for kind, k in ((FEWER, model.top_k - 1), (MORE, model.top_k + 1)):
            try:
                with with_top_k(model, k):
                    add(kind, ())
            except MoELensError as error:
                left_out[kind] = str(error).rstrip(".")
        for number, hooks in enumerate(noise):
            add(NOISY, hooks, None, number)
        searched = _searched(model, measures, search or GreedySearch(seed=seed), size, wanted)
        pattern = plan if plan is not None else searched
        if pattern is None or not len(pattern):
            left_out[RANDOM] = "there is no plan that they could be as large as"
        else:
            matched = random_sets(model, pattern, n_random, seed=seed, layer_matched=True)
            for number, random in enumerate(matched):
                add(RANDOM, steer_hooks(random), random, number)
        if searched is None:
            left_out[SEARCHED] = "max_size is 0"
        elif not len(searched):
            left_out[SEARCHED] = "the search found no plan that does worse on development prompts"
        else:
            add(SEARCHED, steer_hooks(searched), searched)
    name = model.moe_shape.model
    return AuditReport(task.name, name, tuple(found), left_out, measures.clusters, bool(wanted), level, seed)


def _searched(
    model: Model, measures: _Measures, search: Search, size: int, wanted: bool
) -> SteeringPlan | None:
    """The plan that a search finds on development prompts, which are all that it sees."""
    if not size:
        return None

    def values(_model: Any, hooks: Hooks) -> Values:
        return measures.development(hooks) * (1 if wanted else -1)

    task = SteeringTask("the behaviour, on development prompts", values, measures.development_clusters)
    return checked_search(search, search(model, task, size), size, model)


def _measures(
    model: Model,
    task: SteeringTask,
    development: SteeringTask | None,
    held_out: float,
    seed: int,
    tick: Callable[[], Any],
) -> _Measures:
    def values_of(one: SteeringTask) -> Callable[[Hooks], Values]:
        read = one.on(model)

        def values(hooks: Hooks) -> Values:
            tick()
            return read.values(model, hooks)

        return values

    here = values_of(task)
    if development is not None:
        check_model_and_task(model, development, seed, 0.95)
        if shared := shared_labels(development, task):
            raise DataError(
                f"development and task share clusters ({shared[0]!r} for one), so that the worst "
                "case would not be held out. Give prompts of other clusters, under other labels."
            )
        if n_shared := n_shared_prompts(development.on(model), task.on(model)):
            raise DataError(
                f"{n_shared} prompts of the task are development prompts, too, so that the worst case would "
                "not be held out. Give others."
            )
        before = values_of(development)
        return _Measures(
            before, lambda hooks: (before(hooks), here(hooks)), development.clusters, task.clusters
        )
    kept = share(held_out, "held_out")
    chosen_by, reported = split_clusters(task.clusters, (1 - kept, kept), seed=seed)
    clusters = tuple(task.clusters[place] for place in reported)
    if len(set(clusters)) < 2:
        raise DataError(
            f"Of the task's {len(set(task.clusters))} clusters, {len(set(clusters))} would be held out, and "
            "an interval needs at least two. Give more clusters, a larger held_out, or development=."
        )

    def both(hooks: Hooks) -> tuple[Before, Values]:
        values = here(hooks)
        return values[chosen_by], values[reported]

    before_clusters = tuple(task.clusters[place] for place in chosen_by)
    return _Measures(lambda hooks: both(hooks)[0], both, before_clusters, clusters)


def _check_plan(model: Model, plan: SteeringPlan | None) -> None:
    if plan is None:
        return
    if not isinstance(plan, SteeringPlan) or not len(plan):
        raise PlanError("audit: plan must be a SteeringPlan that names the behaviour's experts, or None.")
    plan.check_fits(model.moe_shape)
    for layer in plan.refused_layers(model):
        reason = model.routing_rule(layer).cannot_steer(*plan.in_layer(layer))
        raise PlanError(f"Layer {layer} cannot be steered by this plan: {reason}.")
