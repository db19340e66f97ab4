"""What an effect is held against: as many random experts, or those that score least.

sets = random_sets(model, plan, 20, seed=0, layer_matched=True)
set_ = bottom_set(scores, plan)

Random sets are not inert: a single one can move a behaviour as far as a plan does, so it takes many.
"""

from collections import Counter
from collections.abc import Iterable

from moe_lens.contrast import ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.hooked_moe import HookedMoE
from moe_lens.moe_shape import as_index
from moe_lens.steering_plan import Expert, SteeringPlan


def random_sets(
    model: HookedMoE, plan: SteeringPlan, n: int, *, seed: int = 0, layer_matched: bool = False
) -> list[SteeringPlan]:
    """`n` random plans of the size of `plan`, all of which the model's routers accept.

    Args:
        seed: the same seed gives the same sets; different seeds share none of their draws.
        layer_matched: as many experts in each layer as the plan has; otherwise any MoE layer may be drawn.

    Raises:
        DataError: n or seed is no number from 0 on. PlanError: the model has no room for such sets.
    """
    if as_index(n) is None or as_index(seed) is None:
        raise DataError(f"n and seed must be numbers from 0 on; got {n!r} and {seed!r}.")
    return [
        plan.random_like(seed=seed * 1_000_003 + number, layer_matched=layer_matched, model=model)
        for number in range(n)
    ]


def bottom_set(scores: ExpertScores, plan: SteeringPlan) -> SteeringPlan:
    """As many experts as the plan names, those with the smallest |score|, as far as they fit a layer.

    Raises:
        PlanError: more experts than the layers have room for.
    """
    shape = scores.shape
    ranked = [(score.layer, score.expert) for score in reversed(scores.ranked())]
    deactivate = _fitting(ranked, len(plan.deactivate), shape.max_deactivated)
    rest = [expert for expert in ranked if expert not in deactivate]
    activated = [expert for expert in plan.activate if expert not in plan.deactivate]
    activate = _fitting(rest, len(activated), shape.top_k)
    return SteeringPlan(activate, deactivate, plan.epsilon, shape)


def _fitting(experts: Iterable[Expert], number: int, room: int) -> list[Expert]:
    used: Counter[int] = Counter()
    taken: list[Expert] = []
    for layer, expert in experts:
        if len(taken) < number and used[layer] < room:
            used[layer] += 1
            taken.append((layer, expert))
    if len(taken) < number:
        raise PlanError(f"A bottom set of {number} experts does not fit: at most {room} in a layer.")
    return taken
