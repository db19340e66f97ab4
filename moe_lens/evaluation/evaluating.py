"""Does a plan do more than random experts, and how many experts should it name?

report = evaluate_steering(model, plan, task, scores=scores)        # on held-out prompts, with its controls
print(report)                                                       # the table, and the verdict in words
size = sweep(model, scores, development_task, sizes=(2, 4, 8, 16)).best_size()
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from math import ceil
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from moe_lens.checks import share, whole_number
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation.outcomes import (
    ANY_LAYER,
    DIRECTIONS,
    LAYER_MATCHED,
    Limit,
    Outcome,
    direction_of,
    saturation_of,
)
from moe_lens.evaluation.plan_sizes import SweepPoint, SweepResult
from moe_lens.evaluation.report import SteeringReport
from moe_lens.evaluation.tasks import SteeringTask
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.resampling import clustered_interval, spawned_seeds
from moe_lens.steering.controls import bottom_set, random_pairs, random_sets, share_experts
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan

Mode = Literal["deactivate", "activate", "both"]


def evaluate_steering(
    model: Model,
    plan: SteeringPlan,
    task: SteeringTask,
    *,
    reverse: SteeringPlan | None = None,
    scores: ExpertScores | None = None,
    n_random: int = 20,
    alpha: float = 0.05,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> SteeringReport:
    """Measure a task under a plan, under its opposite, and under random sets of as many experts.

    The task's prompts must not be those that the plan was chosen on; `split_clusters` and
    `ContrastivePairs.split` make such splits.

    >>> from moe_lens import SteeringPlan, answer_task, evaluate_steering, organisms
    >>> model, conflicts = organisms.load("null"), organisms.world("null").conflicts("test")[:12]
    >>> task = answer_task(
    ...     [c.open_book for c in conflicts], [c.document_answer for c in conflicts],
    ...     clusters=[c.entity for c in conflicts],
    ... )
    >>> plan, reverse = SteeringPlan(deactivate=[(2, 5), (3, 7)]), SteeringPlan(deactivate=[(0, 1), (2, 2)])
    >>> evaluate_steering(model, plan, task, reverse=reverse, n_random=4, progress=False).verdict
    False

    Args:
        model: a HookedMoE or RoutedModel.
        plan: toward the behaviour that the task measures.
        task: from `answer_task` or `load_task`, or a `SteeringTask` of your own functions.
        reverse: the plan for the opposite direction. By default `opposite_plan` of the scores, and without
            scores the plan with activated and deactivated experts swapped, where that is possible.
        scores: those that the plan came from; they give the reverse plan and the least-scoring experts.
        n_random: random sets of each kind (layer-matched, any layer) and for each direction. If plan and
            reverse share experts (the one swapped is the other), the sets of both are drawn together, and no
            p-value falls below 1 / (n_random + 1); else below 1 / (n_random + 1)².
        alpha: error rate of the verdict.
        level: of the intervals.
        seed: of the random sets and the bootstrap.
        progress: show a bar, one step a plan.

    Raises:
        DataError: too few random sets for the error rate, or a task that gives no number a prompt.
        PlanError: an empty plan, or one that the model's routers refuse; no reverse plan known.
    """
    return evaluated_by(
        measured_here(progress),
        model,
        plan,
        task,
        reverse=reverse,
        scores=scores,
        n_random=n_random,
        alpha=alpha,
        level=level,
        seed=seed,
    )


MeasureAll = Callable[[Model, SteeringTask, Sequence[SteeringPlan]], list[Outcome]]
"""From a model and a task on it to what the model does under each of some plans."""


def measured_here(progress: bool) -> MeasureAll:
    """One plan after the other, in this process."""

    def measure_all(model: Model, task: SteeringTask, plans: Sequence[SteeringPlan]) -> list[Outcome]:
        bar = tqdm(plans, unit="run", disable=not progress)
        return [measure_outcome(model, task, plan) for plan in bar]

    return measure_all


def evaluated_by(
    measure_all: MeasureAll,
    model: Model,
    plan: SteeringPlan,
    task: SteeringTask,
    *,
    reverse: SteeringPlan | None,
    scores: ExpertScores | None,
    n_random: int,
    alpha: float,
    level: float,
    seed: int,
) -> SteeringReport:
    """`evaluate_steering`, with all outcomes measured by a function."""
    seed, level = check_model_and_task(model, task, seed, level)
    n_random, alpha = _check(plan, scores, n_random, alpha)
    _check_fits(model, plan)
    plans = {"+": plan, "-": _reverse(model, plan, reverse, scores)}
    _check_resolution(plans, n_random, alpha)
    bottom = None if scores is None else bottom_set(scores, plan, model)
    task = task.on(model)
    random: list[SteeringPlan] = []
    kinds = _controls(model, plans, n_random, seed, None if scores is None else scores.super_experts)
    for _, _, sets in kinds:
        random += sets
    conditions = [SteeringPlan(), *plans.values(), *([] if bottom is None else [bottom]), *random]
    outcomes = iter(measure_all(model, task, conditions))
    return SteeringReport(
        task=task.name,
        model=model.moe_shape.model,
        plans=plans,
        clusters=task.clusters,
        unsteered=next(outcomes),
        steered={direction: next(outcomes) for direction in plans},
        bottom=None if bottom is None else next(outcomes),
        controls=_by_kind(
            (kind, direction, list(islice(outcomes, len(sets)))) for kind, direction, sets in kinds
        ),
        limits=_limits(task),
        alpha=alpha,
        level=level,
        seed=seed,
        joint_controls=share_experts(*plans.values()),
    )


def _limits(task: SteeringTask) -> dict[str, Limit]:
    return {name: Limit(measure.limit, measure.larger_is_worse) for name, measure in task.collateral.items()}


def measure_outcome(model: Model, task: SteeringTask, plan: SteeringPlan) -> Outcome:
    """The task's behaviour and collateral measures under a plan."""
    hooks = steer_hooks(plan)
    values = task.values(model, hooks)
    return Outcome(values, {name: measure.value(model, hooks) for name, measure in task.collateral.items()})


def run_controls(
    model: Model,
    plans: dict[str, SteeringPlan],
    measure: Callable[[SteeringPlan], Outcome],
    n_random: int,
    seed: int,
    super_experts: Any = None,
) -> dict[str, dict[str, list[Outcome]]]:
    """Kind -> direction -> outcomes of random sets; each of the four lists has draws of its own.

    Where the plans share experts, the i-th sets of both directions are one draw (`random_pairs`).
    """
    kinds = _controls(model, plans, n_random, seed, super_experts)
    return _by_kind((kind, direction, [measure(set_) for set_ in sets]) for kind, direction, sets in kinds)


def _controls(
    model: Model, plans: dict[str, SteeringPlan], n_random: int, seed: int, super_experts: Any
) -> list[tuple[str, str, list[SteeringPlan]]]:
    """(kind, direction, random sets)."""
    settings = {"super_experts": super_experts}
    lists = [(kind, direction) for kind in (LAYER_MATCHED, ANY_LAYER) for direction in DIRECTIONS]
    seeds = spawned_seeds(seed, len(lists))
    found: list[tuple[str, str, list[SteeringPlan]]] = []
    if share_experts(*plans.values()):
        for kind, kind_seed in zip((LAYER_MATCHED, ANY_LAYER), seeds[::2], strict=True):
            matched = kind == LAYER_MATCHED
            pairs = random_pairs(
                model, plans["+"], plans["-"], n_random, seed=kind_seed, layer_matched=matched, **settings
            )
            found += [
                (kind, side, [pair[number] for pair in pairs]) for number, side in enumerate(DIRECTIONS)
            ]
        return found
    for (kind, direction), list_seed in zip(lists, seeds, strict=True):
        matched = kind == LAYER_MATCHED
        sets = random_sets(
            model, plans[direction], n_random, seed=list_seed, layer_matched=matched, **settings
        )
        found.append((kind, direction, sets))
    return found


def _by_kind(
    outcomes: Iterable[tuple[str, str, list[Outcome]]],
) -> dict[str, dict[str, list[Outcome]]]:
    controls: dict[str, dict[str, list[Outcome]]] = {LAYER_MATCHED: {}, ANY_LAYER: {}}
    for kind, direction, measured in outcomes:
        controls[kind][direction] = measured
    return controls


def opposite_plan(scores: ExpertScores, plan: SteeringPlan) -> SteeringPlan:
    """A plan of as many experts as `plan`, chosen for the opposite contrast.

    Raises:
        PlanError: fewer experts than that have the sign, or they do not fit their layers.
    """
    activated = [expert for expert in plan.activate if expert not in plan.deactivate]
    opposite = SteeringPlan.from_scores(-scores, len(activated), len(plan.deactivate))
    return replace(plan, activate=opposite.activate, deactivate=opposite.deactivate, shape=opposite.shape)


def _reverse(
    model: Model, plan: SteeringPlan, reverse: SteeringPlan | None, scores: ExpertScores | None
) -> SteeringPlan:
    if reverse is not None:
        if not isinstance(reverse, SteeringPlan) or not len(reverse):
            raise PlanError(f"reverse must be a SteeringPlan that names experts; got {reverse!r}.")
        _check_fits(model, reverse)
        return reverse
    if scores is not None:
        opposite = opposite_plan(scores, plan)
        _check_fits(model, opposite)
        return opposite
    try:
        swapped = plan.reversed()
        _check_fits(model, swapped)
        return swapped
    except PlanError as error:
        raise PlanError(
            f"The plan cannot simply be reversed ({error}). Pass reverse=, a plan for the opposite "
            "direction, or scores=, from which one is chosen."
        ) from error


def _check_fits(model: Model, plan: SteeringPlan) -> None:
    plan.check_fits(model.moe_shape)
    for layer in plan.refused_layers(model):
        reason = model.routing_rule(layer).cannot_steer(*plan.in_layer(layer))
        raise PlanError(f"Layer {layer} cannot be steered by this plan: {reason}.")


def check_model_and_task(model: Model, task: SteeringTask, seed: int, level: float) -> tuple[int, float]:
    """Raise DataError before anything runs, rather than after; seed and level as Python's numbers."""
    check_hooked(model, error=DataError)
    if not isinstance(task, SteeringTask):
        raise DataError(f"A SteeringTask is needed here; got {type(task).__name__}.")
    return whole_number(seed, "seed"), share(level, "level")


def _check(plan: SteeringPlan, scores: ExpertScores | None, n_random: int, alpha: float) -> tuple[int, float]:
    if not isinstance(plan, SteeringPlan) or not len(plan):
        raise PlanError("evaluate_steering needs a SteeringPlan that names experts.")
    if scores is not None and not isinstance(scores, ExpertScores):
        raise DataError(f"scores must be ExpertScores; got {type(scores).__name__}.")
    return whole_number(n_random, "n_random"), share(alpha, "alpha")


def _check_resolution(plans: dict[str, SteeringPlan], n_random: int, alpha: float) -> None:
    joint = share_experts(*plans.values())
    if (n_random + 1) ** (1 if joint else 2) < 1 / alpha:
        why = "1 / (n_random + 1) where plan and reverse share experts" if joint else "1 / (n_random + 1)²"
        raise DataError(
            f"With n_random={n_random} no p-value can reach alpha={alpha:g}, since none falls below {why}; "
            f"take more random sets, {max(20, ceil(1 / alpha) - 1)} for example."
        )


def sweep(
    model: Model,
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
    >>> from moe_lens.organisms import detect_document_experts, document_task
    >>> model, world = organisms.load("planted"), organisms.world("planted")
    >>> scores = detect_document_experts(model, world)
    >>> task = document_task(world, "development")
    >>> result = sweep(model, scores, task, sizes=(2, 4), n_random=0, progress=False)
    >>> result.sizes, result.gap(4) > result.gap(2)
    ((2, 4), True)

    Args:
        model: a HookedMoE or RoutedModel.
        scores: the plans take the experts with the most negative and most positive ones.
        task: what to measure, on development prompts.
        sizes: numbers of experts; those that the model has no room for are left out.
        directions: "+" (toward the scores' first condition), "-" (toward the second), or both.
        mode: "deactivate", "activate", or "both" (as many of each).
        n_random: random sets of each size, in any layers; may be 0.
        level: of the intervals.
        seed: of the random sets and the bootstrap.
        progress: show a bar, one step a plan.

    Raises:
        DataError: no sizes, an unknown direction or mode.
        PlanError: no size is possible.
    """
    return swept_by(
        measured_here(progress),
        model,
        scores,
        task,
        sizes=sizes,
        directions=directions,
        mode=mode,
        n_random=n_random,
        level=level,
        seed=seed,
    )


def swept_by(
    measure_all: MeasureAll,
    model: Model,
    scores: ExpertScores,
    task: SteeringTask,
    *,
    sizes: Sequence[int],
    directions: Sequence[str],
    mode: Mode,
    n_random: int,
    level: float,
    seed: int,
) -> SweepResult:
    """`sweep`, with all outcomes measured by a function."""
    seed, level = check_model_and_task(model, task, seed, level)
    sizes, directions, n_random = _checked_sweep(sizes, directions, mode, n_random)
    plans = _plans(model, scores, sizes, directions, mode)
    task = task.on(model)
    conditions = [SteeringPlan()]
    for plan, plan_seed in zip(plans.values(), spawned_seeds(seed, len(plans)), strict=True):
        conditions += [plan, *random_sets(model, plan, n_random, seed=plan_seed)]
    outcomes = measure_all(model, task, conditions)
    unsteered, points = outcomes[0], []
    for (size, direction), first in zip(plans, range(1, len(outcomes), 1 + n_random), strict=True):
        outcome, random = outcomes[first], outcomes[first + 1 : first + 1 + n_random]
        low, high = clustered_interval(outcome.values, task.clusters, level=level, seed=seed)
        rates = [each.rate for each in random]
        points.append(SweepPoint(size, direction, outcome.rate, low, high, dict(outcome.collateral), rates))
    return SweepResult(
        task.name,
        model.moe_shape.model,
        mode,
        unsteered.rate,
        dict(unsteered.collateral),
        _limits(task),
        tuple(points),
        saturation_of(outcomes),
    )


def _plans(
    model: Model, scores: ExpertScores, sizes: Sequence[int], directions: Sequence[str], mode: str
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


def _checked_sweep(
    sizes: Sequence[int], directions: Sequence[str], mode: str, n_random: int
) -> tuple[list[int], tuple[str, ...], int]:
    """Sizes, directions and number of random sets, looked at; raises DataError before anything runs."""
    if not isinstance(sizes, Iterable) or not len(sizes):
        raise DataError(f"sizes must be numbers of experts, at least one; got {sizes!r}.")
    numbers = [whole_number(size, "each of sizes", least=1) for size in sizes]
    try:
        named = tuple(direction_of(direction) for direction in directions)
    except DataError:
        named = ()
    if not named:
        raise DataError(f"directions must be of {DIRECTIONS}, at least one; got {directions!r}.")
    if mode not in get_args(Mode):
        raise DataError(f"mode must be one of {get_args(Mode)}; got {mode!r}.")
    return numbers, named, whole_number(n_random, "n_random")
