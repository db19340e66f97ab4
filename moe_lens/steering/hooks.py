"""Steering by choosing the route (SteerMoE, arXiv 2509.09660): the hooks that apply a plan.

    logits = model.run_with_hooks(prompt, fwd_hooks=steer_hooks(plan))
    with model.hooks(steer_hooks(plan)):
        text = model.generate(prompt)

On every token an activated expert is in the top-k, a deactivated one is not, and the other experts keep
their scores and order. An empty plan gives no hooks and changes nothing.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import HookError, PlanError
from moe_lens.hook_names import HookList
from moe_lens.model.points import RoutingPoint
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.transform import steer_logits
from moe_lens.shape import MoEShape
from moe_lens.steering.plan import SteeringPlan


@dataclass(frozen=True)
class SteeringHook:
    """The hook function that carries out a plan in one layer."""

    plan: SteeringPlan
    layer: int

    def __call__(self, router_logits: Float[Tensor, "*batch expert"], hook: Any = None) -> Tensor:
        """Steered scores [*batch expert]; on a model's hook point, as the layer's rule reaches the guarantee.

        Called without a hook point (on logits alone), it gives `steer_logits`, SteerMoE's formulas.
        """
        if hook is not None and hook_names.parse(hook.name) != (self.layer, hook_names.ROUTER_LOGITS):
            raise HookError(
                f"The steering hook for {hook_names.router_logits(self.layer)} was put on {hook.name}; use "
                "the names that steer_hooks gives."
            )
        activate, deactivate = self._experts
        n_experts = router_logits.shape[-1]
        if max(activate + deactivate, default=0) >= n_experts:
            raise HookError(
                f"The steering plan names expert {max(activate + deactivate)} of layer {self.layer}, which "
                f"has experts 0 to {n_experts - 1}: the plan is for another model."
            )
        if not isinstance(hook, RoutingPoint):
            return steer_logits(router_logits, activate, deactivate, self.plan.epsilon)
        steered, hook.rule = hook.rule.steer(router_logits, activate, deactivate, self.plan.epsilon)
        return steered

    @property
    def needs_place(self) -> bool:
        """Whether it must know which tokens the logits are of."""
        return False

    def is_fixed_plan(self, point: str | None) -> bool:
        """Whether, on this point, `steer` is all it does: a function of the logits."""
        return hook_names.parse(point or "") == (self.layer, hook_names.ROUTER_LOGITS)

    def steer(
        self, rule: RoutingRule, logits: Float[Tensor, "*batch expert"], place: Any = None
    ) -> tuple[Tensor, RoutingRule]:
        """Steered logits and the rule to route them by, of a layer whose hooks are all plans."""
        return rule.steer(logits, *self._experts, self.plan.epsilon)

    @property
    def digest(self) -> str:
        """Says what the hook does: that of its plan, and the layer."""
        return f"{self.plan.digest} {self.layer}"

    def check_fits(self, shape: MoEShape) -> None:
        """Called by the hook point before the hook is added; raises PlanError where the plan does not fit."""
        self.plan.check_fits(shape)

    def check_rule(self, rule: RoutingRule) -> None:
        """Called by the hook point before the hook is added; raises PlanError where the rule cannot obey."""
        if (reason := rule.cannot_steer(*self._experts)) is not None:
            raise PlanError(f"Layer {self.layer} cannot be steered by this plan: {reason}.")

    @property
    def _experts(self) -> tuple[list[int], list[int]]:
        """Activated and deactivated experts of this layer; deactivation wins."""
        return self.plan.in_layer(self.layer)


def steer_hooks(plan: SteeringPlan) -> HookList:
    """The hooks that carry out a plan: one for each layer it names, on that layer's router logits.

    >>> from moe_lens import SteeringPlan, steer_hooks
    >>> [name for name, _ in steer_hooks(SteeringPlan(deactivate=[(2, 5), (0, 1)]))]
    ['blocks.0.mlp.hook_router_logits', 'blocks.2.mlp.hook_router_logits']

    Use them with `run_with_hooks(fwd_hooks=...)`, `hooks(...)` or `add_hook`. Hooks on the same point run in
    the order of the list: the plan steers what hooks before it return, hooks after it edit what it steered.
    Of two plans on one layer, the guarantees of the later one hold.

    On routers with a correction bias or expert groups, the rule that steers travels on the hook point. There
    the plan holds for an expert on a token until a later hook changes that logit; and steered logits from a
    cache do not by themselves repeat the route in another run: patch the indices and weights.

    Raises:
        PlanError: not a SteeringPlan.
    """
    if not isinstance(plan, SteeringPlan):
        raise PlanError(f"steer_hooks needs a SteeringPlan; got {type(plan).__name__}.")
    layers = sorted({layer for layer, _ in plan.activate + plan.deactivate})
    return [(hook_names.router_logits(layer), SteeringHook(plan, layer)) for layer in layers]
