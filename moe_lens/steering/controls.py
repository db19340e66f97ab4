"""What an effect is held against: as many random experts, or those that score least.

sets = random_sets(model, plan, 20, seed=0, layer_matched=True)
pairs = random_pairs(model, plan, reverse, 20, seed=0)     # where both name the same experts
set_ = bottom_set(scores, plan, model)

Random sets are not inert: a single one can move a behaviour as far as a plan does, so it takes many.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moe_lens.checks import whole_number
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import PlanError
from moe_lens.resampling import spawned_seeds
from moe_lens.steering.candidates import warn_of_super_experts
from moe_lens.steering.choosing import Expert, SteerableModel, draw_jointly
from moe_lens.steering.plan import SteeringPlan


def random_sets(
    model: SteerableModel,
    plan: SteeringPlan,
    n: int,
    *,
    seed: int = 0,
    layer_matched: bool = False,
    super_experts: Any = None,
) -> list[SteeringPlan]:
    """`n` random plans of the size of `plan`, all of which the model's routers accept.

    Args:
        model: a HookedMoE or RoutedModel.
        plan: the plan that the sets are to be compared with.
        n: how many sets; may be 0.
        seed: the same seed gives the same sets, and a larger `n` only adds to them.
        layer_matched: as many experts in each layer as the plan has; otherwise any MoE layer may be drawn.
        super_experts: from `moe_lens.super_experts`, or `scores.super_experts`; a warning tells how many of
            the sets deactivate one. They stay: a control without them would be no random set.

    Raises:
        DataError: n or seed is not a number from 0 on.
        PlanError: the model has no room for such sets.
    """
    seeds = spawned_seeds(whole_number(seed, "seed"), whole_number(n, "n"))
    sets = [plan.random_like(seed=number, layer_matched=layer_matched, model=model) for number in seeds]
    _warn_of_super_experts(sets, super_experts)
    return sets


def share_experts(plan: SteeringPlan, reverse: SteeringPlan) -> bool:
    """Whether both plans name an expert, in whatever role."""
    return bool({*plan.activate, *plan.deactivate} & {*reverse.activate, *reverse.deactivate})


def random_pairs(
    model: SteerableModel,
    plan: SteeringPlan,
    reverse: SteeringPlan,
    n: int,
    *,
    seed: int = 0,
    layer_matched: bool = False,
    super_experts: Any = None,
) -> list[tuple[SteeringPlan, SteeringPlan]]:
    """`n` random pairs of plans that share experts as `plan` and `reverse` do.

    Where a plan's reverse deactivates what it activates, what one does depends on what the other does. Random
    sets that are drawn for each alone do not, and their gaps vary less: a control for such plans is one
    relabelling of all experts for both.

    Args:
        model: a HookedMoE or RoutedModel.
        plan: toward the behaviour.
        reverse: toward its opposite.
        n: how many pairs; may be 0.
        seed: the same seed gives the same pairs, and a larger `n` only adds to them.
        layer_matched: each expert stays in its layer; otherwise any MoE layer may be drawn.
        super_experts: as in `random_sets`.

    Raises:
        DataError: n or seed is not a number from 0 on.
        PlanError: a plan for another model, or no room for such plans.
    """
    for one in (plan, reverse):
        one.check_fits(model.moe_shape)
    several = [(_activated(one), one.deactivate) for one in (plan, reverse)]
    pairs = []
    for number in spawned_seeds(whole_number(seed, "seed"), whole_number(n, "n")):
        drawn = draw_jointly(several, model, seed=number, layer_matched=layer_matched)
        plus, minus = (
            replace(one, activate=on, deactivate=off, shape=model.moe_shape)
            for one, (on, off) in zip((plan, reverse), drawn, strict=True)
        )
        pairs.append((plus, minus))
    _warn_of_super_experts([one for pair in pairs for one in pair], super_experts)
    return pairs


def _activated(plan: SteeringPlan) -> list[Expert]:
    """Those that are not deactivated, too, which wins."""
    return [expert for expert in plan.activate if expert not in plan.deactivate]


def _warn_of_super_experts(sets: Sequence[SteeringPlan], super_experts: Any) -> None:
    if super_experts is not None:
        hit = [off for set_ in sets if (off := super_experts.among(set_.deactivate))]
        off = list(dict.fromkeys(expert for experts in hit for expert in experts))
        warn_of_super_experts(off, super_experts, f"A random set ({len(hit)} of {len(sets)})")


def bottom_set(scores: ExpertScores, plan: SteeringPlan, model: SteerableModel | None = None) -> SteeringPlan:
    """As many experts as the plan names, those with the smallest |score|, as far as they fit their layers.

    Args:
        scores: that the plan came from.
        plan: the plan that the set is to be compared with.
        model: a HookedMoE or RoutedModel; with it, experts that its routers cannot steer are passed over
            (those of expert groups or hash layers).

    Raises:
        PlanError: more experts than the layers have room for.
    """
    shape = scores.shape

    def fits(layer: int, activate: Sequence[int], deactivate: Sequence[int]) -> bool:
        if model is None:
            return len(activate) <= shape.top_k and len(deactivate) <= shape.max_deactivated
        return model.routing_rule(layer).cannot_steer(activate, deactivate) is None

    ranked = [(score.layer, score.expert) for score in reversed(scores.ranked())]
    deactivate = _fitting(ranked, len(plan.deactivate), lambda layer, experts: fits(layer, [], experts))
    deactivated = SteeringPlan((), deactivate)
    activate = _fitting(
        [expert for expert in ranked if expert not in set(deactivate)],
        len(plan) - len(plan.deactivate),
        lambda layer, experts: fits(layer, experts, deactivated.in_layer(layer)[1]),
    )
    return replace(plan, activate=activate, deactivate=deactivate, shape=shape)


def _fitting(experts: Sequence[Expert], number: int, fits: Callable[[int, list[int]], bool]) -> list[Expert]:
    """The first `number` experts that fit their layer beside those already taken there."""
    taken: list[Expert] = []
    in_layer: dict[int, list[int]] = defaultdict(list)
    for layer, expert in experts:
        if len(taken) == number:
            break
        if fits(layer, [*in_layer[layer], expert]):
            in_layer[layer].append(expert)
            taken.append((layer, expert))
    if len(taken) < number:
        raise PlanError(f"A bottom set of {number} experts does not fit; the layers take {len(taken)}.")
    return taken
