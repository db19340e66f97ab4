"""HookPoints inside a Hugging Face MoE model's routers.

    points = install(moe, shape, running)      # points.router_logits, .topk_indices, .topk_weights
    points_of(moe)                             # the same, or None where none are installed
    uninstall(moe)                             # moe: a layer that find_moe_layers gave

As long as no point has a hook, HF's own router code runs and nothing else. With a hook, the order is:
HF's logits -> HookPoint -> rule.select -> HookPoint -> rule.weigh -> HookPoint -> HF's experts.
A hook that could not fire raises; it is never silently skipped. (`expert_points` adds the point on the
experts' outputs.)
"""

import inspect
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_lens.errors import HookError
from moe_lens.model.direct_logits import DirectLogits, direct_logits, in_order
from moe_lens.model.layers import MoELayer, unwrap
from moe_lens.model.points import BlockRun, Mode, RoutingPoints, fire
from moe_lens.model.private_names import inside_compiled, stands_on
from moe_lens.model.running import Running
from moe_lens.model.stand_in import StandIn
from moe_lens.model.state import NAN_LOGITS, check_weights, uncompiled
from moe_lens.routers.layouts import InOrder, RouterOutput
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.table import rule_for
from moe_lens.shape import MoEShape


class HookedRouter(StandIn):
    """Stands in for a router's `forward`."""

    def __init__(self, moe: MoELayer, points: RoutingPoints):
        super().__init__(moe.router)
        self.moe = moe
        self.points = points
        self.layout = moe.row.layout
        self.direct: DirectLogits | None = None
        self.tried = False
        self.block_had_forward = False  # on the instance, when its router was last seen to be called
        self.handles: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.points.router = self

    def mode_changed(self) -> None:
        """Watch the block while there are hooks. (To a deep copy that is being made, they come along.)"""
        if "handles" not in vars(self):
            return
        self.watch_block(*_WATCHED[self.points.mode])
        if self.points.plans and not self.tried and not self.was_on_instance:
            self.direct, self.tried = direct_logits(self.moe, self.original), True
        device = next((each.device for each in self.moe.router.parameters() if not each.is_meta), None)
        for plan in self.points.plans:
            if device is not None and (prepare := getattr(plan, "prepare", None)) is not None:
                prepare(self.points.shape.n_experts, device)  # not in compiled code

    def watch_block(self, *wanted: str) -> None:
        """Let these of torch's hooks stand on the block. (Fused kernels may stand on its forward.)"""
        block = self.moe.block
        with self.points.running.lock:
            for name in set(self.handles) - set(wanted):
                self.handles.pop(name).remove()
            if "enter" in wanted and "enter" not in self.handles:
                enter = block.register_forward_pre_hook(_EnterBlock(self), with_kwargs=True)
                self.handles["enter"] = enter
            if "leave" in wanted and "leave" not in self.handles:
                self.handles["leave"] = block.register_forward_hook(_LeaveBlock(self), always_call=True)

    def was_not_called(self) -> None:
        """Under plans alone, in the forward that ends: refuse a block or router that was replaced since.

        Others may be compiled, or their block did not run: it is watched in the next forward.
        """
        block = self.moe.block
        self.check_in_place()
        if "leave" in self.handles or not self.points.plan_fired:
            return
        replaced = ("forward" in vars(block)) != self.block_had_forward or not self.is_in_use
        if replaced or stands_on(self.moe.router, HookedRouter) is not self:
            _refuse(self, block, "router", "steering plan")
        self.points.plan_fired = False
        self.watch_block("leave")

    def check_in_place(self) -> None:
        """Refuse a block that did not run since another one has its place in the model."""
        if not self.points.running.holds(self.moe.block):
            raise HookError(
                f"{self.moe.where}: this block was replaced since hooks were set, so they could not fire. "
                "Replace blocks before the hook points are put in (detach, attach)."
            )

    @property
    def is_in_use(self) -> bool:
        """Whether it is the router that the block calls as it stands: of several copies (PEFT) one is."""
        children = self.moe.block.children()
        return any(unwrap(inside_compiled(child)) is self.moe.router for child in children)

    def check_training(self) -> None:
        """Refuse hooks in training mode where they are not allowed there."""
        training = self.moe.block.training or self.moe.router.training
        if training and not self.points.allow_training:
            raise HookError(
                f"{self.moe.where}: routing hooks are set and the model is in training mode, where a "
                "router may add noise or be recomputed. Call model.eval() first (a model made from a config, "
                "not loaded, begins in training mode); to train under hooks, set them by "
                "RoutedModel.hooks(..., training=True) or steered(..., training=True)."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.points.mode == "off":
            if self.points.is_observed:
                return _observed(self, args, kwargs)
            return self.original(*args, **kwargs)
        if self.points.mode == "plans" and not (_TYPES_CHECKED and torch.compiler.is_compiling()):
            return self.steer(args, kwargs)
        return _hooked(self, args, kwargs)

    def steer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Plans alone: no look at any value, so nothing waits for a GPU and torch.compile takes it whole."""
        points, layout, router, output, logits = self.points, self.layout, self.moe.router, None, None
        if router.training or self.moe.block.training:
            self.check_training()
        points.plan_fired = True
        direct = self.direct
        if direct is not None and len(args) == 1:
            logits = direct(router, args[0])
        if direct is None or logits is None:
            output, logits = layout.call(router, self.original, *args, **kwargs)
            dtype = layout.weights_dtype(output)
        else:
            dtype = direct.weights_dtype or logits.dtype
        rule, place = self._rule(args, kwargs), None
        if points.mode == "placed":
            shape = self._token_shape(self._run(), logits)
            place, logits = points.running.forward, logits.reshape(*shape, -1)
        *earlier, last = points.plans
        for plan in earlier:
            logits, rule = plan.steer(rule, logits, place)
        logits, indices, weights = last.decide(rule, logits, place)
        flat = RouterOutput(logits, weights if weights.dtype == dtype else weights.to(dtype), indices.long())
        if points.mode == "placed":
            flat = RouterOutput(*(part.flatten(0, -2) for part in flat))
        if not torch.compiler.is_compiling():
            points.running.forward.steered.append((self.moe.where, flat.weights))
        return in_order(layout, flat) if output is None else layout.pack(output, flat)

    def _rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RoutingRule:
        """The layer's rule for this call. Where k has changed under plans, they are asked again."""
        rule = rule_for(self.moe.router, self.moe.block)
        if rule.top_k != self.points.top_k:
            self.points.check_rule(rule)
        return rule.for_call(*args[1:], *kwargs.values()) if len(args) > 1 or kwargs else rule

    def route(self, rule: RoutingRule, output: Any, logits: Tensor) -> Any:
        """HF's output, with what the hooks make of the decision."""
        points, layout, run = self.points, self.moe.row.layout, self._run()
        run.rule = rule
        try:
            logits = fire(points.router_logits, logits.reshape(*self._token_shape(run, logits), -1))
            rule = run.rule
        finally:
            run.rule = None
        indices = fire(points.topk_indices, rule.select(logits)).long()
        self._check_indices(indices, rule)
        run.indices = indices
        dtype = layout.weights_dtype(output)
        weights = rule.weigh(logits, indices).to(dtype)
        check_weights(
            self.moe.where,
            weights,
            NAN_LOGITS,
        )
        if points.topk_weights.is_hooked:
            weights = fire(points.topk_weights, weights)
            check_weights(self.moe.where, weights, "a hook on the weights returned them. Check that hook")
        self._check_duplicates(indices, weights)
        flat = RouterOutput(logits.flatten(0, -2), weights.to(dtype).flatten(0, -2), indices.flatten(0, -2))
        run.decision = flat
        return layout.pack(output, flat)

    def _run(self) -> BlockRun:
        run = self.points.run
        if run is None:
            raise HookError(
                f"{self.moe.where}: the router was called outside of its MoE block. Routing hooks work only "
                "when the router is called by its own block: run the whole model."
            )
        return run

    def _token_shape(self, run: BlockRun, logits: Tensor) -> tuple[int, ...]:
        shape, n_tokens = run.token_shape, logits.shape[:-1].numel()
        if torch.Size(shape).numel() != n_tokens:
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


_WATCHED: Final[dict[Mode, tuple[str, ...]]] = {
    "off": (),
    "plans": ("leave",),
    "placed": ("enter", "leave"),
    "hooks": ("enter", "leave"),
}
"""Which of torch's hooks a mode needs on the block."""

_TYPES_CHECKED = inspect.unwrap(HookedRouter.steer) is not HookedRouter.steer
"""Whether arguments are held against their annotations, as in tests, which torch.compile cannot trace."""


@uncompiled
def _hooked(router: HookedRouter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hooks of any kind: Python functions of their own, which compiled code would not notice."""
    run = router.points.run
    if run is not None:
        run.router_fired = True
    if router.points.mode in ("plans", "placed"):
        return router.steer(args, kwargs)
    output, logits = router.moe.row.layout.call(router.moe.router, router.original, *args, **kwargs)
    return router.route(router._rule(args, kwargs), output, logits)


@uncompiled
def _observed(router: HookedRouter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The router's own forward, whose decision an observer sees."""
    observer, layout = router.points.observer, router.layout
    if observer is None or not observer.is_on:
        return router.original(*args, **kwargs)
    output, logits = layout.call(router.moe.router, router.original, *args, **kwargs)
    if isinstance(layout, InOrder):
        decision = layout.unpack(output, logits)
        decision = decision._replace(indices=decision.indices.long())
    else:  # the other layouts would have to look at values
        rule = router._rule(args, kwargs)
        indices = rule.select(logits).long()
        decision = RouterOutput(logits, rule.weigh(logits, indices).to(layout.weights_dtype(output)), indices)
    observer(decision)
    return output


def install(moe: MoELayer, shape: MoEShape, running: Running) -> RoutingPoints:
    """Put hook points into the router of `moe`, a layer of a model of this shape; it must have none yet."""
    points = RoutingPoints(moe, shape, running)
    hooked = HookedRouter(moe, points)
    points.router = hooked
    hooked.put_on(moe.router)
    return points


def points_of(moe: MoELayer) -> RoutingPoints | None:
    """The hook points that are installed in the router of `moe`; None where there are none."""
    hooked = stands_on(moe.router, HookedRouter)
    return None if hooked is None else hooked.points


def installed_points(moe: MoELayer) -> RoutingPoints:
    """`points_of`, where there must be some. Raises HookError where there are none."""
    points = points_of(moe)
    if points is None:
        raise HookError(f"{moe.where} has no routing hook points; call moe_lens.attach(model) first.")
    return points


def uninstall(moe: MoELayer) -> None:
    """Give the router of `moe` its own forward back. Does nothing where no points are installed."""
    hooked = stands_on(moe.router, HookedRouter)
    if hooked is None:
        return
    hooked.points.running.points.remove(hooked.points)
    hooked.watch_block()
    hooked.take_off(moe.router)


@dataclass
class _EnterBlock:
    """Notes what the block is given: HF routers see it flattened. Refuses hooks in training mode, too."""

    hooked: HookedRouter

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.hooked.points.needs_state:
            self.hooked.check_training()
            _begin(self.hooked, args, kwargs)


@dataclass
class _LeaveBlock:
    """Notices a block that ran without its router, a fused kernel for one; called after an exception, too.

    Under plans alone it goes once the router is seen to be called: a hook of torch's is not cheap. From then
    on the forward that ends tells who was not (`was_not_called`).
    """

    hooked: HookedRouter

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        points = self.hooked.points
        if points.mode == "plans" and not points.plan_fired and output is not None:
            _refuse(self.hooked, block, "router", "steering plan")
        if points.needs_state or points.has_runs:
            _end(self.hooked, output)
        elif points.mode == "plans" and points.plan_fired and not torch.compiler.is_compiling():
            self.hooked.block_had_forward = "forward" in vars(block)
            self.hooked.watch_block()


@uncompiled
def _begin(hooked: HookedRouter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    points = hooked.points
    if hooked.moe.block.training and not points.running.is_running:
        raise HookError(
            f"{hooked.moe.where}: the block runs in training mode outside of a forward of the model, so that "
            "routing hooks do not know its tokens. Is it computed again for backward()? Then use "
            "model.gradient_checkpointing_enable(), whose blocks know."
        )
    points.begin(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()))))


@uncompiled
def _end(hooked: HookedRouter, output: Any) -> None:
    run = hooked.points.end()
    if run is None or output is None or not hooked.points.needs_state:
        return  # hooks came or went in between, or an exception is on its way
    if not run.router_fired:
        _refuse(hooked, hooked.moe.block, "router", "routing hooks")
    if hooked.points.expert_out_is_hooked and not run.experts_fired:
        _refuse(hooked, hooked.moe.block, "experts", "hooks on their outputs")


def _refuse(hooked: HookedRouter, block: nn.Module, what: str, hooks: str) -> None:
    if what == "router" and not hooked.is_in_use:
        raise HookError(
            f"{hooked.moe.where}: {type(block).__name__} called another router than the one with the hook "
            f"points, so the {hooks} could not fire. Was it replaced or copied since (modules_to_save, "
            "set_adapter), or are its adapters off (disable_adapter)? Attach, or steer, when the router that "
            "is to run is in its place."
        )
    raise HookError(
        f"{hooked.moe.where}: {type(block).__name__} ran without calling its {what}, so the {hooks} "
        "could not fire. Load the model without fused MoE kernels (use_kernels=False), and add adapters that "
        "copy routers (modules_to_save) before the hook points."
    )
