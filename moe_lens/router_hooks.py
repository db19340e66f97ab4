"""HookPoints inside a Hugging Face MoE model's routers.

    for moe in find_moe_layers(hf_model):      # works on a bare HF model and on one inside a bridge
        check_router(moe)                      # HF's forward and our rule must agree, number by number
        points = install(moe, shape)           # points.router_logits, .topk_indices, .topk_weights
        ...
        uninstall(moe)

As long as no point has a hook, HF's own router code runs and nothing else. With a hook, the order is:
HF's logits -> HookPoint -> rule.select -> HookPoint -> rule.weigh -> HookPoint -> HF's experts.
A hook that could not fire raises; it never does nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from moe_lens.errors import HookError, RouterMismatchError, UnsupportedRouterError
from moe_lens.moe_shape import MoEShape
from moe_lens.routing_rules import RULES, RoutingRule, is_known_router, rule_for

CHECK_SCALES = (0.1, 1.0, 10.0)
CHECK_TOKENS = 1024
_NO_NUMBERS = (torch.bool, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class MoELayer:
    """One MoE block of a Hugging Face model and the router inside it."""

    where: str
    block: nn.Module
    router: nn.Module

    @property
    def rule(self) -> RoutingRule:
        """The routing rule, with the parameters that the router has now."""
        return rule_for(self.router)

    @property
    def points(self) -> "RoutingPoints | None":
        """The installed hook points; None where there are none."""
        forward = self.router.__dict__.get("forward")
        return forward.points if isinstance(forward, HookedRouter) else None


class RoutingPoint(HookPoint):
    """A HookPoint that lets a hook see the model's shape before it is added.

    A hook object with a method `check_fits(shape)` is asked at every way of adding it, so that a
    steering plan made for another model is refused before the forward starts.
    """

    def __init__(self, shape: MoEShape):
        super().__init__()
        self.shape = shape

    def add_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens, after `hook.check_fits(shape)` where the hook has one."""
        check_fits = getattr(hook, "check_fits", None)
        if check_fits is not None:
            check_fits(self.shape)
        return super().add_hook(hook, *args, **kwargs)

    @property
    def is_hooked(self) -> bool:
        """Whether any hook, TransformerLens' or torch's own, waits on this point."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)


class RoutingPoints:
    """The hook points of one MoE layer, and the shape of the tokens that the block is working on."""

    def __init__(self, shape: MoEShape):
        self.router_logits = RoutingPoint(shape)
        self.topk_indices = RoutingPoint(shape)
        self.topk_weights = RoutingPoint(shape)
        self.token_shape: tuple[int, ...] | None = None
        self.fired = False

    @property
    def are_hooked(self) -> bool:
        """Whether any of the points has a hook."""
        return self.router_logits.is_hooked or self.topk_indices.is_hooked or self.topk_weights.is_hooked


class HookedRouter:
    """Stands in for a router's `forward`. An object, not a closure: `copy.deepcopy` then gives a copy
    whose points are those of the copied model."""

    def __init__(self, moe: MoELayer, shape: MoEShape, original: Callable[..., Any], was_on_instance: bool):
        self.where = moe.where
        self.router = moe.router
        self.points = RoutingPoints(shape)
        self.original = original
        self.was_on_instance = was_on_instance  # accelerate, for one, puts its own forward there
        self.handles: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        self.points.fired = True
        return self._route(*output) if self.points.are_hooked else output

    def _route(self, logits: Tensor, hf_weights: Tensor, hf_indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rule, points = rule_for(self.router), self.points
        logits = self._fire(points.router_logits, logits.reshape(*self._token_shape(logits), -1))
        indices = self._fire(points.topk_indices, rule.select(logits)).long()
        self._check_indices(indices, rule)
        weights = rule.weigh(logits, indices).to(hf_weights.dtype)
        self._check_weights(
            weights,
            "the router logits hold NaN or +inf, or the chosen experts' probabilities are all 0. Check the "
            "hooks on this layer's router and, in half precision, the model's own activations",
        )
        if points.topk_weights.is_hooked:
            weights = self._fire(points.topk_weights, weights)
            self._check_weights(weights, "a hook on the weights returned NaN. Check that hook")
        return (
            logits.reshape(-1, logits.shape[-1]),
            weights.to(hf_weights.dtype).reshape(hf_weights.shape),
            indices.to(hf_indices.dtype).reshape(hf_indices.shape),
        )

    def _token_shape(self, logits: Tensor) -> tuple[int, ...]:
        shape, n_tokens = self.points.token_shape, logits.shape[:-1].numel()
        if shape is None or torch.Size(shape).numel() != n_tokens:
            raise HookError(
                f"{self.where}: the router saw {n_tokens} tokens, its MoE block tokens of shape {shape}. "
                "Routing hooks work only when the router is called by its own block: run the whole model."
            )
        return shape

    def _fire(self, point: RoutingPoint, value: Tensor) -> Tensor:
        edited = point(value)
        if not isinstance(edited, Tensor) or edited.shape != value.shape:
            got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise HookError(
                f"{point.name}: a hook returned {got} where shape {tuple(value.shape)} is needed. "
                "Return a tensor of the same shape, or None to leave it as it is."
            )
        if edited.is_floating_point() != value.is_floating_point() or edited.dtype in _NO_NUMBERS:
            raise HookError(
                f"{point.name}: a hook returned dtype {edited.dtype} where {value.dtype} is needed. "
                "Convert it before returning it."
            )
        return edited

    def _check_indices(self, indices: Tensor, rule: RoutingRule) -> None:
        if self.points.topk_indices.is_hooked and indices.numel():
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= rule.n_experts:
                raise HookError(
                    f"{self.points.topk_indices.name}: a hook chose expert {low if low < 0 else high}, "
                    f"but this layer has experts 0 to {rule.n_experts - 1}."
                )

    def _check_weights(self, weights: Tensor, because: str) -> None:
        bad = torch.isnan(weights).any(dim=-1)
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise HookError(
                f"{self.where}: the routing weights are NaN on {int(bad.sum())} token(s), first at "
                f"[batch, pos] {first}: {because}."
            )


def find_moe_layers(root: nn.Module, prefix: str = "") -> Iterator[MoELayer]:
    """Every MoE block below `root` with its router, in module order; `prefix` goes before their names.

    Raises:
        UnsupportedRouterError: a block holds experts but no router that `RULES` names.
    """
    for name, block in root.named_modules(prefix=prefix):
        if hasattr(block, "original_component"):  # a bridge's wrapper around the block or router proper
            continue
        where = name.replace("._original_component", "") or type(block).__name__
        children = [_unwrap(child) for child in block.children()]
        routers = [child for child in children if is_known_router(child)]
        if len(routers) == 1:
            yield MoELayer(where, block, routers[0])
        elif len(routers) > 1 or (not routers and hasattr(block, "experts")):
            found = ", ".join(sorted(type(child).__name__ for child in children)) or "nothing"
            raise UnsupportedRouterError(
                f"{where}: {type(block).__name__} holds experts but no router that moe_lens has a rule for "
                f"(its parts: {found}). Known router classes: {', '.join(sorted(RULES))}."
            )


def check_router(moe: MoELayer) -> None:
    """Compare the rule with HF's own forward on 3 × 1024 random hidden states of three scales, bit for bit.

    Tokens on which a half-precision router overflows are left out.

    Raises:
        RouterMismatchError: logits, indices, weights or a dtype differ; the message says which and where.
    """
    rule = moe.rule
    weight = next(moe.router.parameters())
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device  # accelerate moves it
    generator = torch.Generator().manual_seed(0)
    for scale in CHECK_SCALES:
        hidden = scale * torch.randn(CHECK_TOKENS, weight.shape[-1], generator=generator)
        with torch.no_grad():
            output = moe.router(hidden.to(device, weight.dtype))
        difference = _difference(rule, output)
        if difference is not None:
            raise RouterMismatchError(
                f"{moe.where}: {type(moe.router).__name__} does not compute what its rule {rule} says: "
                f"{difference} (hidden states of scale {scale}). moe_lens leaves the model as it was rather "
                "than route wrongly; has transformers changed this router?"
            )


def _difference(rule: RoutingRule, output: Any) -> str | None:
    """What differs between HF's router output and the rule's, in words; None if nothing does."""
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(x, Tensor) for x in output)):
        return "its forward returns no (logits, weights, indices)"
    logits, weights, indices = output
    if logits.is_meta:
        return "its weights are on the meta device, not loaded"
    if logits.shape != (CHECK_TOKENS, rule.n_experts):
        return f"logits have shape {tuple(logits.shape)}, not {(CHECK_TOKENS, rule.n_experts)}"
    if indices.shape != (CHECK_TOKENS, rule.top_k):
        return f"indices have shape {tuple(indices.shape)}, not {(CHECK_TOKENS, rule.top_k)}"
    finite = torch.isfinite(logits).all(dim=-1)
    if not bool(finite.any()):
        return "all its logits are NaN or infinite; are its weights?"
    expected_indices = rule.select(logits)
    if not torch.equal(expected_indices[finite], indices[finite]):
        n_different = int((expected_indices != indices)[finite].any(-1).sum())
        return f"indices differ on {n_different} of {int(finite.sum())} tokens"
    expected = rule.weigh(logits, indices)
    if weights.shape != expected.shape or weights.dtype != expected.dtype:
        got, want = (f"{x.dtype} of shape {tuple(x.shape)}" for x in (weights, expected))
        return f"weights are {got}, not {want}"
    if not torch.equal(expected[finite], weights[finite]):
        return f"weights differ by up to {float((expected - weights)[finite].abs().max()):.3g}"
    return None


def install(moe: MoELayer, shape: MoEShape) -> RoutingPoints:
    """Put hook points into the router of `moe`, a layer of a model of this shape; it must have none yet."""
    instance_forward = moe.router.__dict__.get("forward")
    hooked = HookedRouter(moe, shape, instance_forward or moe.router.forward, instance_forward is not None)
    hooked.handles = [
        moe.block.register_forward_pre_hook(_EnterBlock(hooked), with_kwargs=True),
        moe.block.register_forward_hook(_LeaveBlock(hooked)),
    ]
    moe.router.forward = hooked
    return hooked.points


def uninstall(moe: MoELayer) -> None:
    """Give the router of `moe` its own forward back. Does nothing where no points are installed."""
    hooked = moe.router.__dict__.get("forward")
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
    """Notes the tokens' shape: HF routers see them flattened. Refuses hooks in training mode."""

    hooked: HookedRouter

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        points = self.hooked.points
        hidden = args[0] if args else next(iter(kwargs.values()))
        points.token_shape, points.fired = tuple(hidden.shape[:-1]), False
        if points.are_hooked and block.training:
            raise HookError(
                f"{self.hooked.where}: routing hooks are set and the model is in training mode, where a "
                "router may add noise or be recomputed. Call model.eval() first."
            )


@dataclass
class _LeaveBlock:
    """Notices a block that ran without its router, a fused kernel for one."""

    hooked: HookedRouter

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        points = self.hooked.points
        points.token_shape = None
        if points.are_hooked and not points.fired:
            raise HookError(
                f"{self.hooked.where}: {type(block).__name__} ran without calling its router, so the routing "
                "hooks could not fire. Load the model without fused MoE kernels (use_kernels=False)."
            )


def _unwrap(module: nn.Module) -> nn.Module:
    """The HF module inside a bridge's wrapper, or the module itself."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module
