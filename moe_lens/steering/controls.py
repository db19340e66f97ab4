"""What an effect is held against: as many random experts, or those that score least.

sets = random_sets(model, plan, 20, seed=0, layer_matched=True)
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
from moe_lens.steering.choosing import Expert, SteerableModel
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
    if super_experts is not None:
        hit = [off for set_ in sets if (off := super_experts.among(set_.deactivate))]
        off = list(dict.fromkeys(expert for experts in hit for expert in experts))
        warn_of_super_experts(off, super_experts, f"A random set ({len(hit)} of {n})")
    return sets


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
