"""The hook points of one MoE layer, and what they know of the block that runs.

What a layer does is one of four `mode`s, a plain attribute on which torch.compile guards: "off"; "plans",
where nothing but steering plans is set, pure functions of the logits that compile whole; "placed", where
some of them must know which rows and columns run; and "hooks". The last two run outside of compiled code.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint, LensHandle

from moe_lens.errors import HookError
from moe_lens.model.layers import MoELayer
from moe_lens.model.owners import HookTable, WatchedPoint
from moe_lens.model.running import Running
from moe_lens.model.state import ForwardState
from moe_lens.routers.layouts import ExpertsCall, RouterOutput
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape

Mode = Literal["off", "plans", "placed", "hooks"]

_NOT_REAL: Final = (torch.bool, torch.complex64, torch.complex128)


class RoutingPoint(WatchedPoint):
    """A HookPoint that lets a hook see the model's shape, the routing rule and the forward that is running.

    A hook object with a method `check_fits(shape)` or `check_rule(rule)` is asked at every way of adding it,
    so that a steering plan made for another model, or impossible with this router, is refused before the
    forward starts.
    """

    points: "RoutingPoints"

    def __init__(self, points: "RoutingPoints"):
        super().__init__()
        self.__dict__["points"] = points  # no submodule: points hold modules of the model
        self._is_changing = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingPoint":
        copy.deepcopy(self.points, memo)  # all points of the layer, with their hooks
        return memo[id(self)]

    def robbed(self, thread: threading.Thread) -> None:
        """Tell the model."""
        self.points.running.owners.robbed.add(thread)

    @property
    def moe(self) -> MoELayer:
        """The layer."""
        return self.points.moe

    @property
    def shape(self) -> MoEShape:
        """The model's shape, with the k that the layer has at the moment."""
        return replace(self.points.shape, top_k=self.moe.rule.top_k)

    @property
    def state(self) -> ForwardState:
        """The forward that is running (see `model.state`)."""
        return self.points.running.forward

    @property
    def rule(self) -> RoutingRule:
        """The rule that routes; during a forward, a hook on the router logits may replace it."""
        run = self.points.run
        return run.rule if run is not None and run.rule is not None else self.moe.rule

    @rule.setter
    def rule(self, rule: RoutingRule | None) -> None:
        run = self.points.run
        if run is None:
            raise HookError(f"{self.name}: the rule can be replaced only by a hook, while the model runs.")
        hold = getattr(rule, "hold", None)
        if hold is not None and hold.inside.shape != (*run.token_shape, self.moe.rule.n_experts):
            raise HookError(
                f"{self.name}: hook.rule was set to one that steers tokens of shape "
                f"{tuple(hold.inside.shape[:-1])}, and [batch pos] = {list(run.token_shape)} are running. "
                "Steer the whole logits; or name positions=, or one plan a prompt, in steer_hooks."
            )
        run.rule = rule

    @property
    def token_shape(self) -> tuple[int, ...] | None:
        """(batch, pos) of the tokens that the block is working on; None when it does not run."""
        run = self.points.run
        return None if run is None else run.token_shape

    @property
    def value(self) -> Tensor | None:
        """What the point was given; only within its hooks."""
        run = self.points.run
        return None if run is None else run.value

    @property
    def chosen(self) -> Int[Tensor, "batch pos k"]:
        """The experts chosen for the tokens that are running; within hooks on their weights or outputs."""
        run = self.points.run
        if run is None or run.indices is None:
            raise HookError(
                f"{self.name}: the chosen experts are known only to hooks on weights and outputs."
            )
        return run.indices

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
            self.points.top_k = self.moe.rule.top_k
        with self._changing():
            return super().add_hook(hook, dir, is_permanent, level, prepend, alias_names)

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """As in TransformerLens."""
        if self.is_hooked:
            with self._changing():
                super().remove_hooks(dir, including_permanent, level)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """torch's table changes before TransformerLens' own list does: told at the end, once."""
        with self.points.running.lock:
            self._is_changing = True
            try:
                yield
            finally:
                self._is_changing = False
                self.hooks_changed()

    def hooks_changed(self) -> None:
        """Tell the layer."""
        if not self._is_changing:
            self.points.hooks_changed()

    @property
    def is_hooked(self) -> bool:
        """Whether any hook, TransformerLens' or torch's own, waits on this point."""
        return any(map(len, self.tables))

    @property
    def plans(self) -> list[Any] | None:
        """Its hooks, if all of them are steering plans for it, set by `add_hook`; None otherwise.

        A plan says so by a method `is_fixed_plan(name of the point)`. It has `steer(rule, logits, place)`,
        `decide(rule, logits, place)`, and `needs_place`: it must know which tokens the logits are of.
        """
        hooks: list[Any] = [handle.user_hook for handle in self.fwd_hooks]
        if sum(map(len, self.tables)) != len(hooks):
            return None
        fixed = [getattr(hook, "is_fixed_plan", None) for hook in hooks]
        return hooks if all(asked is not None and asked(self.name) for asked in fixed) else None


@dataclass(eq=False)
class BlockRun:
    """What is known while a MoE block runs."""

    token_shape: tuple[int, ...]
    """[batch pos] that the block is working on: HF routers see it flattened."""
    depth: int = 0
    """In how many forwards it runs, each within the other."""
    hidden: Tensor | None = None
    """What the block was given, while the experts' outputs are hooked."""
    rule: RoutingRule | None = None
    """The rule that routes, within hooks on the logits."""
    value: Tensor | None = None
    """What the point was given, within its hooks."""
    indices: Tensor | None = None
    """[batch pos k], within hooks on the weights and later ones."""
    decision: RouterOutput | None = None
    """What the router decided."""
    experts_call: ExpertsCall | None = None
    """What runs other experts on the same tokens, within hooks on the experts' outputs."""
    router_fired: bool = False
    experts_fired: bool = False


class RoutingPoints:
    """The hook points of one MoE layer, and what is known of the forwards of its block."""

    def __init__(self, moe: MoELayer, shape: MoEShape, running: Running):
        self.moe = moe
        self.shape = shape
        self.running = running
        self.mode: Mode = "off"
        self.plans: tuple[Any, ...] = ()
        self.plan_fired = False
        self.is_observed = False  # plain, for torch.compile
        self.observer: Any = None  # sees what the router decides, where nothing is hooked (`observing`)
        self.added_up: set[Any] = set()  # how the experts ran when their outputs were seen to add up
        self.allow_training = 0  # how many contexts do
        self.router: Any = None  # what stands in for the router's forward (`router_points.HookedRouter`)
        self.top_k = shape.top_k  # for which the hooks were asked whether they can be obeyed
        self.expert_out: RoutingPoint | None = None
        self._runs: dict[int, list[BlockRun]] = {}  # thread -> the blocks that run in it, outermost first
        self.router_logits = RoutingPoint(self)
        self.topk_indices = RoutingPoint(self)
        self.topk_weights = RoutingPoint(self)
        running.points.append(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RoutingPoints":
        """Points of the copied model, with the same hooks, which see the copy."""
        twin = memo[id(self)] = object.__new__(RoutingPoints)
        twin.mode, twin.plans, twin.plan_fired, twin.expert_out, twin._runs = "off", (), False, None, {}
        twin.shape, twin.allow_training = self.shape, self.allow_training
        twin.router, twin.top_k = None, self.top_k
        twin.is_observed, twin.observer, twin.added_up = False, None, set(self.added_up)
        twin.running = Running()  # until the copy's own is there
        for name in ("router_logits", "topk_indices", "topk_weights", "expert_out"):
            point: RoutingPoint | None = getattr(self, name)
            if point is not None:
                own = memo[id(point)] = type(point)(twin)
                own.name, own.training, own.hook_conversion = (
                    point.name,
                    point.training,
                    point.hook_conversion,
                )
                setattr(twin, name, own)
        twin.moe = copy.deepcopy(self.moe, memo)
        twin.running = copy.deepcopy(self.running, memo)
        for name in ("router_logits", "topk_indices", "topk_weights", "expert_out"):
            if (point := getattr(self, name)) is not None:
                _copy_hooks(point, getattr(twin, name))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": {}, "is_observed": False, "observer": None}

    @property
    def points(self) -> list[RoutingPoint]:
        """Those that there are."""
        routing = [self.router_logits, self.topk_indices, self.topk_weights]
        return routing if self.expert_out is None else [*routing, self.expert_out]

    @property
    def tables(self) -> list[HookTable]:
        """torch's tables of their hooks."""
        return [table for point in self.points for table in point.tables]

    @property
    def needs_state(self) -> bool:
        """Whether a hook is set that may ask what is running."""
        return self.mode in ("placed", "hooks")

    @property
    def run(self) -> BlockRun | None:
        """What is known of the block's forward in this thread; None while it does not run."""
        runs = self._runs.get(threading.get_ident())
        return runs[-1] if runs else None

    @property
    def has_runs(self) -> bool:
        """Whether the block runs under hooks in some thread."""
        return len(self._runs) > 0

    def hooks_changed(self) -> None:
        """Find the mode anew."""
        if "topk_weights" not in vars(self):
            return  # being made
        with self.running.lock:
            self._find_mode()

    def check_rule(self, rule: RoutingRule) -> None:
        """Ask the hooks on the logits whether this rule can obey them (`check_rule`)."""
        for handle in self.router_logits.fwd_hooks:
            if (check := getattr(handle.user_hook, "check_rule", None)) is not None:
                check(rule)
        self.top_k = rule.top_k

    def _find_mode(self) -> None:
        plans = self.router_logits.plans
        others = any(point.is_hooked for point in self.points if point is not self.router_logits)
        self.plans = () if plans is None or others else tuple(plans)
        if self.plans:
            self.mode = "placed" if any(plan.needs_place for plan in self.plans) else "plans"
        else:
            self.mode = "hooks" if others or self.router_logits.is_hooked else "off"
        self.plan_fired = False
        if self.router is not None:
            self.router.mode_changed()
        self.running.hooks_changed()

    @property
    def expert_out_is_hooked(self) -> bool:
        """Whether the point on the experts' outputs is there and has a hook."""
        return self.expert_out is not None and self.expert_out.is_hooked

    def begin(self, hidden: Tensor) -> None:
        """The block begins to work on hidden states [batch pos d_model]."""
        flat = hidden.flatten(0, -2) if self.expert_out_is_hooked else None
        run = BlockRun(tuple(hidden.shape[:-1]), self.running.depth, flat)
        self._runs.setdefault(threading.get_ident(), []).append(run)
        self.running.forward.ran.add(self.moe.where)

    def drop(self, ident: int, depth: int) -> None:
        """Forget a thread's runs of the block that are deeper in forwards: these were broken off."""
        runs = [run for run in self._runs.pop(ident, ()) if run.depth <= depth]
        if runs:
            self._runs[ident] = runs

    def end(self) -> BlockRun | None:
        """It ends, or was broken off."""
        ident = threading.get_ident()
        runs = self._runs.get(ident)
        run = runs.pop() if runs else None
        if not runs:
            self._runs.pop(ident, None)
        return run


def _copy_hooks(point: RoutingPoint, twin: RoutingPoint) -> None:
    of_point: tuple[tuple[Literal["fwd", "bwd"], list[LensHandle]], ...] = (
        ("fwd", point.fwd_hooks),
        ("bwd", point.bwd_hooks),
    )
    for direction, handles in of_point:
        for handle in handles:
            hook: Any = handle.user_hook
            HookPoint.add_hook(twin, hook, direction, handle.is_permanent, handle.context_level)
    twin.hooks_changed()


def fire(point: RoutingPoint, value: Tensor) -> Tensor:
    """What a point's hooks make of a value. Raises HookError where it is of another shape or kind."""
    run = point.points.run
    if run is not None:
        run.value = value
    try:
        edited = point(value)
    finally:
        if run is not None:
            run.value = None
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
