"""Steering by choosing the route (SteerMoE, arXiv 2509.09660): the transform and the hooks that apply it.

    logits = model.run_with_hooks(prompt, fwd_hooks=steer_hooks(plan))
    with model.hooks(steer_hooks(plan)):
        text = model.generate(prompt)

On every token an activated expert is in the top-k, a deactivated one is not, and the other experts keep
their scores and order. An empty plan gives no hooks and changes nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import HookError, PlanError
from moe_lens.moe_shape import MoEShape
from moe_lens.steering_plan import SteeringPlan

HookList = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
"""Pairs (hook name, hook function), as TransformerLens' `run_with_hooks` and `hooks` take them."""

_LOWEST: Final = -60.0  # nats below which float32 softmax is nearing underflow (at -103); see _keep_apart
_ROOM: Final = 20.0  # nats below _LOWEST in which scores under it are put in their order


@dataclass(frozen=True)
class SteeringHook:
    """The hook function that carries out a plan in one layer."""

    plan: SteeringPlan
    layer: int

    def __call__(self, router_logits: Float[Tensor, "*batch expert"], hook: Any = None) -> Tensor:
        """Steered scores [*batch expert], float32."""
        if hook is not None and hook_names.parse(hook.name) != (self.layer, hook_names.ROUTER_LOGITS):
            raise HookError(
                f"The steering hook for {hook_names.router_logits(self.layer)} was put on {hook.name}; use "
                "the names that steer_hooks gives."
            )
        deactivate = [expert for layer, expert in self.plan.deactivate if layer == self.layer]
        activate = [
            expert for layer, expert in self.plan.activate if layer == self.layer and expert not in deactivate
        ]
        n_experts = router_logits.shape[-1]
        if max(activate + deactivate, default=0) >= n_experts:
            raise HookError(
                f"The steering plan names expert {max(activate + deactivate)} of layer {self.layer}, which "
                f"has experts 0 to {n_experts - 1}: the plan is for another model."
            )
        return steer_logits(router_logits, activate, deactivate, self.plan.epsilon)

    def check_fits(self, shape: MoEShape) -> None:
        """Asked by the hook point before the hook is added; raises PlanError."""
        self.plan.check_fits(shape)


def steer_hooks(plan: SteeringPlan) -> HookList:
    """The hooks that carry out a plan: one for each layer it names, on that layer's router logits.

    >>> from moe_lens import SteeringPlan, steer_hooks
    >>> [name for name, _ in steer_hooks(SteeringPlan(deactivate=[(2, 5), (0, 1)]))]
    ['blocks.0.mlp.hook_router_logits', 'blocks.2.mlp.hook_router_logits']

    Use them with `run_with_hooks(fwd_hooks=...)`, `hooks(...)` or `add_hook`. Hooks on the same point run in
    the order of the list: what comes before the plan is steered, what comes after edits steered scores. The
    guarantees are those of one plan: of two plans on one layer, the later one's hold.
    """
    if not isinstance(plan, SteeringPlan):
        raise PlanError(f"steer_hooks needs a SteeringPlan; got {type(plan).__name__}.")
    layers = sorted({layer for layer, _ in plan.activate + plan.deactivate})
    return [(hook_names.router_logits(layer), SteeringHook(plan, layer)) for layer in layers]


def steer_logits(
    logits: Float[Tensor, "*batch expert"],
    activate: Iterable[int] = (),
    deactivate: Iterable[int] = (),
    epsilon: float = 0.01,
) -> Float[Tensor, "*batch expert"]:
    """The steering transform of one layer, per token, in float32 (in bfloat16 min − 0.01 is min).

    With s = log_softmax(logits): activated s_k = max_j s_j + epsilon, deactivated s_k = min_j s_j − epsilon,
    max and min over the unsteered scores (SteerMoE, arXiv 2509.09660, section 4). The architecture's own
    softmax and top-k follow. Float32 needs two refinements to keep the guarantee: where epsilon is rounded
    away, the next smaller number serves; and on tokens with scores more than 60 nats below the largest, where
    softmax nears underflow, those scores are spread over the next 20 nats in their order (their probabilities
    are below 1e-26 before and after).

    Deactivated experts stay out as long as k others have finite logits: a hook that ran before and set most
    of them to -inf leaves the router no choice.
    """
    activate, deactivate = list(activate), list(deactivate)
    scores = torch.log_softmax(logits.float(), dim=-1)
    highest = scores.amax(dim=-1, keepdim=True)
    lowest = scores.amin(dim=-1, keepdim=True)
    lowered = lowest - epsilon
    just_below = torch.nextafter(lowest.detach(), torch.full_like(lowest, -torch.inf))
    lowered = torch.where(lowered < lowest, lowered, just_below)  # float32 may round epsilon away
    steered = scores.clone()
    steered[..., activate] = highest + epsilon
    steered[..., deactivate] = lowered
    return _keep_apart(steered, deactivate)


def _keep_apart(steered: Float[Tensor, "*batch expert"], deactivate: list[int]) -> Tensor:
    """Keep deactivated experts strictly last where softmax would underflow and make ties."""
    depth = steered.log_softmax(dim=-1)
    low = (depth < _LOWEST) & (depth > -torch.inf)
    if not bool(low.any()):
        return steered
    key = steered.detach().clone()
    key[..., deactivate] = -torch.inf
    rank = key.argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 = lowest
    spread = _LOWEST - _ROOM * (1 - rank / steered.shape[-1])
    return torch.where(low.any(dim=-1, keepdim=True), torch.where(low, spread, depth), steered)
