"""Routing as if some experts were not there: the next-best ones take their places.

logits, rule = route_without(rule, logits, 3)      # [*batch expert]
indices, weights = rule.route(logits)              # expert 3 is in no token's top-k
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checks import as_index
from moe_lens.errors import HookError
from moe_lens.routers.biased import BiasedSoftmaxTopK, SigmoidTopK
from moe_lens.routers.plain import ByOrderOfLogits
from moe_lens.routers.rule import RoutingRule

_EPSILON: Final = 0.01
"""A steering plan's own: how far below the others' the logit of an expert goes that the rule keeps out."""


def route_without(
    rule: RoutingRule, logits: Float[Tensor, "*batch expert"], expert: int | Sequence[int] | Any
) -> tuple[Float[Tensor, "*batch expert"], RoutingRule]:
    """Logits, and the rule to route them by, that never choose an expert (or any of several).

    >>> from moe_lens import organisms
    >>> rule = organisms.load("specialised").routing_rule(0)
    >>> logits, rule = route_without(rule, torch.arange(8.0), 7)
    >>> rule.route(logits).indices.tolist()
    [6, 5]

    Where the router chooses by the order of its logits, the expert's becomes -inf and that is all, so that
    the weights of softmax routers are those of a model without the expert. Where a bias or expert groups
    decide too, the route is that of `SteeringPlan(deactivate=...)`, and the rule that comes back keeps the
    expert out itself. Either way the other experts keep their order (in groups: a group with too few experts
    left is passed over), and gradients flow to their logits.
    Within a hook on the router logits: `logits, hook.rule = route_without(hook.rule, logits, expert)`.

    Raises:
        HookError: the router's experts come from a table, so that no logit matters; fewer than k experts
            would be left, among them none of another hook's -inf; no such expert.
    """
    experts = _experts(rule, expert)
    if (reason := rule.cannot_steer([], experts)) is not None:
        raise HookError(f"{type(rule).__name__} cannot route around experts {experts}: {reason}.")
    out = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    out[experts] = True
    if isinstance(rule, ByOrderOfLogits):
        without = logits.masked_fill(out, -torch.inf)
        chosen = _chosen(rule, without, out)
        if not bool(chosen.any()):
            return without, rule
        # softmax underflows: every other expert than the best has probability 0, as the excluded one has
        spread, rule = rule.steer(without, [], experts, math.inf)
        without = torch.where(chosen.unsqueeze(-1), spread, without)
    elif isinstance(rule, SigmoidTopK | BiasedSoftmaxTopK):  # their weights do not see experts that are out
        without, rule = rule.steer(logits, [], experts, _EPSILON)
    else:
        without, rule = rule.steer(logits, [], experts, math.inf)
    if bool(_chosen(rule, without, out).any()):
        raise HookError(
            f"Experts {experts} cannot be routed around: on some token fewer than {rule.top_k} others have "
            "finite logits. Another hook has set theirs to -inf; let fewer hooks exclude experts."
        )
    return without, rule


def _experts(rule: RoutingRule, expert: Any) -> list[int]:
    given = list(expert) if isinstance(expert, Sequence | set) else [expert]
    experts = [index for each in given if (index := as_index(each)) is not None]
    if len(experts) < len(given) or not experts:
        raise HookError(
            f"route_without needs an expert's number (0 to {rule.n_experts - 1}) or several; got {expert!r}."
        )
    return experts


def _chosen(rule: RoutingRule, logits: Tensor, out: Tensor) -> Tensor:
    """On which tokens [*batch] one of the experts of `out` [expert] is chosen all the same."""
    return out[rule.select(logits)].any(dim=-1)
