"""Does a plan do more than random experts? Measured on held-out prompts, both directions, with its controls.

report = evaluate_steering(model, plan, task, scores=scores)
print(report)                                          # the table, and the verdict in words
"""

from collections.abc import Callable

from tqdm.auto import tqdm

from moe_lens.contrast import ExpertScores
from moe_lens.controls import bottom_set, random_sets
from moe_lens.errors import DataError, PlanError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.moe_shape import as_index
from moe_lens.steering import steer_hooks
from moe_lens.steering_plan import SteeringPlan
from moe_lens.steering_report import ANY_LAYER, DIRECTIONS, LAYER_MATCHED, Limit, Outcome, SteeringReport
from moe_lens.tasks import SteeringTask


def evaluate_steering(
    model: HookedMoE,
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

    The test prompts must be others than those that the plan was chosen on; `split_clusters` and
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
        model: a HookedMoE.
        plan: toward the behaviour that the task measures.
        task: from `answer_task` or `load_task`, or made of functions of your own.
        reverse: the plan for the opposite direction. By default `opposite_plan` of the scores, and without
            scores the plan with activated and deactivated experts swapped, where that is possible.
        scores: that the plan came from; for the reverse plan and the least-scoring experts.
        n_random: random sets of each kind (layer-matched, any layer) and for each direction.
        alpha: error rate of the verdict.
        level: of the intervals.
        seed: of the random sets and the bootstrap.

    Raises:
        DataError: too few random sets for the error rate, or a task that gives no number a prompt.
        PlanError: an empty plan, or one that the model's routers refuse; no reverse plan known.
    """
    check_model_and_task(model, task, seed, level)
    _check(plan, scores, n_random, alpha)
    _check_fits(model, plan)
    plans = {"+": plan, "−": _reverse(model, plan, reverse, scores)}
    bottom = None if scores is None else bottom_set(scores, plan, model)
    with tqdm(total=3 + 4 * n_random + (bottom is not None), unit="run", disable=not progress) as bar:

        def measure(one: SteeringPlan) -> Outcome:
            outcome = measure_outcome(model, task, one)
            bar.update()
            return outcome

        return SteeringReport(
            task=task.name,
            model=model.moe_shape.model,
            plans=plans,
            clusters=task.clusters,
            unsteered=measure(SteeringPlan()),
            steered={direction: measure(one) for direction, one in plans.items()},
            controls=run_controls(model, plans, measure, n_random, seed),
            bottom=None if bottom is None else measure(bottom),
            limits={name: Limit(m.limit, m.larger_is_worse) for name, m in task.collateral.items()},
            alpha=alpha,
            level=level,
            seed=seed,
        )


def measure_outcome(model: HookedMoE, task: SteeringTask, plan: SteeringPlan) -> Outcome:
    """The task's behaviour and collateral measures under a plan."""
    hooks = steer_hooks(plan)
    values = task.values(model, hooks)
    return Outcome(values, {name: one.value(model, hooks) for name, one in task.collateral.items()})


def run_controls(
    model: HookedMoE,
    plans: dict[str, SteeringPlan],
    measure: Callable[[SteeringPlan], Outcome],
    n_random: int,
    seed: int,
) -> dict[str, dict[str, list[Outcome]]]:
    """Kind -> direction -> outcomes of random sets; each of the four lists has draws of its own."""
    return {
        kind: {
            direction: [
                measure(one)
                for one in random_sets(
                    model, plans[direction], n_random, seed=4 * seed + 2 * first + second,
                    layer_matched=kind == LAYER_MATCHED,
                )
            ]
            for second, direction in enumerate(DIRECTIONS)
        }
        for first, kind in enumerate((LAYER_MATCHED, ANY_LAYER))
    }  # fmt: skip


def opposite_plan(scores: ExpertScores, plan: SteeringPlan) -> SteeringPlan:
    """As many experts as in `plan`, chosen for the opposite contrast.

    Raises:
        PlanError: fewer experts than that have the sign, or they do not fit their layers.
    """
    activated = [expert for expert in plan.activate if expert not in plan.deactivate]
    return SteeringPlan.from_scores(-scores, len(activated), len(plan.deactivate), epsilon=plan.epsilon)


def _reverse(
    model: HookedMoE, plan: SteeringPlan, reverse: SteeringPlan | None, scores: ExpertScores | None
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


def _check_fits(model: HookedMoE, plan: SteeringPlan) -> None:
    plan.check_fits(model.moe_shape)
    for layer in plan.refused_layers(model):
        reason = model.routing_rule(layer).cannot_steer(*plan.in_layer(layer))
        raise PlanError(f"Layer {layer} cannot be steered by this plan: {reason}.")


def check_model_and_task(model: HookedMoE, task: SteeringTask, seed: int, level: float) -> None:
    """Raise DataError before anything runs, rather than after."""
    for given, wanted in ((model, HookedMoE), (task, SteeringTask)):
        if not isinstance(given, wanted):
            raise DataError(f"A {wanted.__name__} is needed here; got {type(given).__name__}.")
    if as_index(seed) is None:
        raise DataError(f"seed must be a number from 0 on; got {seed!r}.")
    if not isinstance(level, float) or not 0 < level < 1:
        raise DataError(f"level must be a number between 0 and 1; got {level!r}.")


def _check(plan: SteeringPlan, scores: ExpertScores | None, n_random: int, alpha: float) -> None:
    if not isinstance(plan, SteeringPlan) or not len(plan):
        raise PlanError("evaluate_steering needs a SteeringPlan that names experts.")
    if scores is not None and not isinstance(scores, ExpertScores):
        raise DataError(f"scores must be ExpertScores; got {type(scores).__name__}.")
    if isinstance(alpha, bool) or not isinstance(alpha, float) or not 0 < alpha < 1:
        raise DataError(f"alpha must be a number between 0 and 1; got {alpha!r}.")
    if (number := as_index(n_random)) is None or 1 / (number + 1) ** 2 > alpha:
        raise DataError(
            f"With n_random={n_random!r} no p-value can reach alpha={alpha:g}, since none falls below "
            "1 / (n_random + 1)²; take more random sets, 20 for example."
        )
