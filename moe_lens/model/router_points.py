"""HookPoints inside a Hugging Face MoE model's routers.

    points = install(moe, shape, state)        # points.router_logits, .topk_indices, .topk_weights
    points_of(moe)                             # the same, or None where none are installed
    uninstall(moe)                             # moe: a layer that find_moe_layers gave

As long as no point has a hook, HF's own router code runs and nothing else. With a hook, the order is:
HF's logits -> HookPoint -> rule.select -> HookPoint -> rule.weigh -> HookPoint -> HF's experts.
A hook that could not fire raises; it is never silently skipped. (`expert_points` adds the point on the
experts' outputs.) Under torch.compile, what stands here runs outside of the compiled code: dynamo sets no
guard on a module's hooks, so that code traced without hooks would never notice them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint, LensHandle

from moe_lens.errors import HookError
from moe_lens.model.layers import MoELayer
from moe_lens.model.private_names import has_hooks
from moe_lens.model.state import ForwardState, uncompiled
from moe_lens.routers.layouts import RouterOutput
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape

_NOT_REAL = (torch.bool, torch.complex64, torch.complex128)


class RoutingPoint(HookPoint):
    """A HookPoint that lets a hook see the model's shape and the routing rule.

    If a hook has a method `check_fits(shape)` or `check_rule(rule)`, that is called whenever the hook is
    added, by whatever function: so a steering plan made for another model, or impossible with this router, is
    refused before the forward starts.
    """

    def __init__(self, moe: MoELayer, shape: MoEShape, state: ForwardState):
        super().__init__()
        self.moe = moe
        self.shape = shape
        self.state = state
        self._rule: RoutingRule | None = None
        self.value: Tensor | None = None  # while its hooks run, what the point was given

    @property
    def rule(self) -> RoutingRule:
        """The rule that routes; during a forward, a hook on the router logits may replace it."""
        return self._rule or self.moe.rule

    @rule.setter
    def rule(self, rule: RoutingRule | None) -> None:
        hold, batch = getattr(rule, "hold", None), self.token_shape
        if hold is not None and hold.inside.shape != (*(batch or ()), self.shape.n_experts):
            raise HookError(
                f"{self.name}: hook.rule was set to one that steers tokens of shape "
                f"{tuple(hold.inside.shape[:-1])}, and [batch pos] = {list(batch or ())} are running. Steer "
                "the whole logits; or name positions=, or one plan a prompt, in steer_hooks."
            )
        self._rule = rule

    @property
    def token_shape(self) -> tuple[int, ...] | None:
        """(batch, pos) of the tokens that the block is working on; None when it does not run."""
        points = points_of(self.moe)
        return None if points is None else points.token_shape

    @property
    def chosen(self) -> Int[Tensor, "batch pos k"]:
        """The experts chosen for the tokens that are running; only within hooks on weights or outputs."""
        points = points_of(self.moe)
        if points is None or points.indices is None:
            raise HookError(
                f"{self.name}: the chosen experts are known only to hooks on weights and outputs."
            )
        return points.indices

    def add_hook(
        self,
        hook: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> LensHandle:
        """As in TransformerLens, after the hook's `check_fits` and `check_rule`, if it has them."""
        if (check_fits := getattr(hook, "check_fits", None)) is not None:
            check_fits(self.shape)
        if (check_rule := getattr(hook, "check_rule", None)) is not None:
            check_rule(self.moe.rule)
        return super().add_hook(hook, dir, is_permanent, level, prepend, alias_names)

    @property
    def is_hooked(self) -> bool:
        """Whether any hook, TransformerLens' or torch's own, waits on this point."""
        return has_hooks(self)


class RoutingPoints:
    """The hook points of one MoE layer, and what is known during a forward of its block."""

    def __init__(self, moe: MoELayer, shape: MoEShape, state: ForwardState):
        self.router_logits = RoutingPoint(moe, shape, state)
        self.topk_indices = RoutingPoint(moe, shape, state)
        self.topk_weights = RoutingPoint(moe, shape, state)
        self.expert_out: RoutingPoint | None = None
        self.shape = shape
        self.state = state
        self.token_shape: tuple[int, ...] | None = None  # [batch pos] that the block is working on
        self.hidden: Tensor | None = None  # what the block was given, while the experts' outputs are hooked
        self.indices: Tensor | None = None  # [batch pos k], within hooks on the weights and later ones
        self.decision: RouterOutput | None = None  # what the router decided, during the block's forward
        self.router_fired = self.experts_fired = False

    @property
    def are_hooked(self) -> bool:
        """Whether any of the points has a hook."""
        points = (self.router_logits, self.topk_indices, self.topk_weights)
        return any(point.is_hooked for point in points) or self.expert_out_is_hooked

    @property
    def expert_out_is_hooked(self) -> bool:
        """Whether the point on the experts' outputs is there and has a hook."""
        return self.expert_out is not None and self.expert_out.is_hooked


def fire(point: RoutingPoint, value: Tensor) -> Tensor:
    """A value after a point's hooks. Raises HookError where they return another shape or kind of numbers."""
    point.value = value
    try:
        edited = point(value)
    finally:
        point.value = None
    if not isinstance(edited, Tensor) or edited.shape != value.shape:
        got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise HookError(
            f"{point.name}: a hook returned {got} where shape {tuple(value.shape)} is needed. "
            "Return a tensor of the same shape, or None to leave it as it is."
        )
    if edited.is_floating_point() != value.is_floating_point() or edited.dtype in _NOT_REAL:
        raise HookError(
            f"{point.name}: a hook returned dtype {edited.dtype} where {value.dtype} is needed. "
            "Convert it before returning it."
        )
    return edited


class HookedRouter:
    """Takes the place of a router's `forward`.

    It is an object, not a closure, so that the points of a deep copy are those of the copied model.
    """

    def __init__(
        self,
        moe: MoELayer,
        points: RoutingPoints,
        original: Callable[..., Any],
        was_on_instance: bool,
    ):
        self.moe = moe
        self.points = points
        self.original = original
        self.was_on_instance = was_on_instance  # accelerate, for one, puts its own forward there
        self.handles: list[Any] = []

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.points.router_fired = True
        if not self.points.are_hooked:
            return self.original(*args, **kwargs)
        output, logits = self.moe.row.layout.call(self.moe.router, self.original, *args, **kwargs)
        rule = self.moe.rule.for_call(*args[1:], *kwargs.values())
        return self._route(rule, output, logits)

    def _route(self, rule: RoutingRule, output: Any, logits: Tensor) -> Any:
        points, layout = self.points, self.moe.row.layout
        points.router_logits.rule = rule
        try:
            logits = fire(points.router_logits, logits.reshape(*self._token_shape(logits), -1))
            rule = points.router_logits.rule
        finally:
            points.router_logits.rule = None
        indices = fire(points.topk_indices, rule.select(logits)).long()
        self._check_indices(indices, rule)
        points.indices = indices
        dtype = layout.weights_dtype(output)
        weights = rule.weigh(logits, indices).to(dtype)
        self._check_weights(
            weights,
            "the router logits hold NaN or +inf, or the chosen experts' probabilities are all 0. Check the "
            "hooks on this layer's router and, in half precision, the model's own activations",
        )
        if points.topk_weights.is_hooked:
            weights = fire(points.topk_weights, weights)
            self._check_weights(weights, "a hook on the weights returned NaN. Check that hook")
        self._check_duplicates(indices, weights)
        flat = RouterOutput(logits.flatten(0, -2), weights.to(dtype).flatten(0, -2), indices.flatten(0, -2))
        points.decision = flat
        return layout.pack(output, flat)

    def _token_shape(self, logits: Tensor) -> tuple[int, ...]:
        shape, n_tokens = self.points.token_shape, logits.shape[:-1].numel()
        if shape is None or torch.Size(shape).numel() != n_tokens:
            raise HookError(
                f"{self.moe.where}: the router saw {n_tokens} tokens, its MoE block tokens of shape {shape}. "
                "Routing hooks work only when the router is called by its own block: run the whole model."
            )
        return shape

    def _check_indices(self, indices: Tensor, rule: RoutingRule) -> None:
        if self.points.topk_indices.is_hooked and indices.numel():
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= rule.n_experts:
                raise HookError(
                    f"{self.points.topk_indices.name}: a hook chose expert {low if low < 0 else high}, "
                    f"but this layer has experts 0 to {rule.n_experts - 1}."
                )

    def _check_duplicates(self, indices: Tensor, weights: Tensor) -> None:
        """Refuse one expert with two weights: TransformerLens' wrapper of the router keeps one for each."""
        if self.points.topk_indices.is_hooked:
            same = indices.unsqueeze(-1) == indices.unsqueeze(-2)
            if bool((same & (weights.unsqueeze(-1) != weights.unsqueeze(-2))).any()):
                raise HookError(
                    f"{self.moe.where}: hooks chose an expert twice for a token, and its two weights differ; "
                    "TransformerLens keeps one weight for each expert. Give both the same weight."
                )

    def _check_weights(self, weights: Tensor, because: str) -> None:
        bad = torch.isnan(weights).any(dim=-1)
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise HookError(
                f"{self.moe.where}: the routing weights are NaN on {int(bad.sum())} token(s), first at "
                f"[batch, pos] {first}: {because}."
            )


def install(moe: MoELayer, shape: MoEShape, state: ForwardState) -> RoutingPoints:
    """Put hook points into the router of `moe`, a layer of a model of this shape; it must have none yet."""
    instance_forward = vars(moe.router).get("forward")
    points = RoutingPoints(moe, shape, state)
    hooked = HookedRouter(moe, points, instance_forward or moe.router.forward, instance_forward is not None)
    hooked.handles = [
        moe.block.register_forward_pre_hook(_EnterBlock(hooked), with_kwargs=True),
        moe.block.register_forward_hook(_LeaveBlock(hooked)),
    ]
    moe.router.forward = hooked
    return hooked.points


def points_of(moe: MoELayer) -> RoutingPoints | None:
    """The hook points that are installed in the router of `moe`; None where there are none."""
    hooked = vars(moe.router).get("forward")
    return hooked.points if isinstance(hooked, HookedRouter) else None


def installed_points(moe: MoELayer) -> RoutingPoints:
    """`points_of`, where there must be some. Raises HookError where there are none."""
    points = points_of(moe)
    if points is None:
        raise HookError(f"{moe.where} has no routing hook points; call moe_lens.attach(bridge) first.")
    return points


def uninstall(moe: MoELayer) -> None:
    """Give the router of `moe` its own forward back. Does nothing where no points are installed."""
    hooked = vars(moe.router).get("forward")
    if not isinstance(hooked, HookedRouter):
        return
    for handle in hooked.handles:
        handle.remove()
    if hooked.was_on_instance:
        moe.router.forward = hooked.original
    else:
        del moe.router.forward


@dataclass
class _EnterBlock:
    """Notes what the block is given, which HF routers see flattened. Refuses hooks in training mode."""

    hooked: HookedRouter

    @uncompiled
    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        points = self.hooked.points
        hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        points.token_shape = tuple(hidden.shape[:-1])
        points.indices = points.decision = None
        points.hidden = hidden.flatten(0, -2) if points.expert_out_is_hooked else None
        points.router_fired = points.experts_fired = False
        if points.are_hooked and (block.training or self.hooked.moe.router.training):
            raise HookError(
                f"{self.hooked.moe.where}: routing hooks are set and the model is in training mode, where a "
                "router may add noise or be recomputed. Call model.eval() first."
            )


@dataclass
class _LeaveBlock:
    """Notices a block that ran without its router, as fused kernels do."""

    hooked: HookedRouter

    @uncompiled
    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        points = self.hooked.points
        points.token_shape = points.hidden = points.indices = points.decision = None
        if points.are_hooked and not points.router_fired:
            self._refuse(block, "router", "routing hooks")
        if points.expert_out_is_hooked and not points.experts_fired:
            self._refuse(block, "experts", "hooks on their outputs")

    def _refuse(self, block: nn.Module, what: str, hooks: str) -> None:
        raise HookError(
            f"{self.hooked.moe.where}: {type(block).__name__} ran without calling its {what}, so the {hooks} "
            "could not fire. Load the model without fused MoE kernels (use_kernels=False)."
        )
