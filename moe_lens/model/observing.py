"""Seeing each layer's routing while the model runs, without keeping it, and no further than is needed.

    with observing(model, see, hooks) as run:          # see(layer, decision, is_own), layer after layer
        for tokens, mask in batches:
            run(tokens, mask)                          # ends at the last router

Where nothing is hooked, Hugging Face's own routers run and are only looked at. Under hooks, what is seen is
what comes out of them all, as in a cache.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import HookError
from moe_lens.hook_names import HookList, Hooks, hook_list
from moe_lens.model.hf_models import original_model
from moe_lens.model.layers import MoELayer
from moe_lens.model.private_names import foreign_hooks, has_hooks
from moe_lens.model.registration import routing_layers, running_of
from moe_lens.model.residual_points import Reached
from moe_lens.model.router_points import installed_points
from moe_lens.model.running import Running
from moe_lens.model.wrapper import Model
from moe_lens.routers.layouts import RouterOutput

See = Callable[[int, RouterOutput, bool], None]
"""Is given a layer, its decision over [batch pos] tokens flattened, and whether it is the rule's own choice
for these logits (it is not, where hooks or steering changed it)."""

SeeOutputs = Callable[[int, Tensor], None]
"""Is given a layer, after its decision, and what the chosen experts gave, [token k d_model], unweighted."""

Run = Callable[[Tensor, Tensor | None], None]
"""Runs tokens [batch pos] with an attention mask, or without one."""


@contextmanager
def observing(
    model: Model, see: See, hooks: Hooks = (), see_outputs: SeeOutputs | None = None
) -> Iterator[Run]:
    """Within the context, the function that it gives runs the model and shows `see` every layer's routing.

    The forward is broken off when the last layer has been seen, unless a hook waits behind it. With
    `see_outputs`, which needs the points on experts' outputs, it goes on until the last experts have run.

    Raises:
        HookError: from hooks; training mode; a block that ran without its router; a router that ran twice in
            a forward; another thread that sets hooks.
    """
    layers, hooks = routing_layers(model), hook_list(hooks)
    seeing = _Seeing(see, see_outputs, running_of(model), last=max(layers))
    recorders = seeing.recorders(list(layers)) if hooks or seeing.running.is_hooked else []
    hooking = model.hooks(fwd_hooks=[*hooks, *recorders]) if recorders else seeing.running.hooking()
    with torch.no_grad(), hooking:
        seeing.may_stop = not _hooks_behind(model, layers, see_outputs is not None)
        for layer, moe in layers.items() if not recorders else ():
            points = installed_points(moe)
            points.router.check_training()
            points.observer, points.is_observed = _Observer(layer, seeing), True
        try:
            yield lambda tokens, mask: seeing.run(model, list(layers), tokens, mask)
        finally:
            for moe in layers.values():
                points = installed_points(moe)
                points.observer, points.is_observed = None, False


@dataclass(eq=False)
class _Seeing:
    see: See
    see_outputs: SeeOutputs | None
    running: Running
    last: int
    may_stop: bool = False
    seen: set[int] = field(default_factory=set)
    outputs_seen: set[int] = field(default_factory=set)
    ident: int = field(default_factory=threading.get_ident)
    depth: int = 0
    logits: Tensor | None = None
    decision: RouterOutput | None = None

    def run(self, model: Model, layers: list[int], tokens: Tensor, mask: Tensor | None) -> None:
        """One forward, which must show every layer. (With a mask the wrapper's, which finds positions.)"""
        self.seen.clear()
        self.outputs_seen.clear()
        self.depth = self.running.depth + 1
        try:
            if mask is None:
                original_model(model)(input_ids=tokens, use_cache=False)
            else:
                model(tokens, return_type=None, attention_mask=mask)
        except Reached:
            pass
        finally:
            self.depth, self.logits, self.decision = 0, None, None
        if missing := [layer for layer in layers if layer not in self.seen]:
            raise HookError(
                f"Layer {missing[0]}'s block ran without calling its router, so its routing was not seen. "
                "Load the model without fused MoE kernels (use_kernels=False)."
            )
        if self.see_outputs is not None and (missing := self.seen - self.outputs_seen):
            raise HookError(
                f"Layer {min(missing)}'s block ran without calling its experts, so their outputs were not "
                "seen. Load the model without fused MoE kernels (use_kernels=False)."
            )

    @property
    def is_on(self) -> bool:
        """Whether the forward that runs is the one to be seen: not another thread's, nor one inside it."""
        return (
            self.depth > 0
            and self.ident == threading.get_ident()
            and self.running.depth in (self.depth, self.depth - 1)  # compiled code does not note its forwards
        )

    def show(self, layer: int, decision: RouterOutput, is_own: bool) -> None:
        """Show a layer, once; end the forward with the last one."""
        if layer in self.seen:
            raise HookError(f"The router of layer {layer} ran twice in one forward; it is seen only once.")
        self.seen.add(layer)
        self.see(layer, decision, is_own)
        if self.see_outputs is None:
            self.stop_after(layer)

    def show_outputs(self, layer: int, outputs: Tensor) -> None:
        """Show what a layer's experts gave; end the forward with the last one."""
        assert self.see_outputs is not None
        self.outputs_seen.add(layer)
        self.see_outputs(layer, outputs)
        self.stop_after(layer)

    def stop_after(self, layer: int) -> None:
        """End the forward here, if it is the last layer and nothing waits behind it."""
        if self.may_stop and layer == self.last:
            self.running.check_steered()
            raise Reached

    def recorders(self, layers: list[int]) -> HookList:
        """Hooks that see what all hooks before them made of the routing."""
        recorders: HookList = []
        for layer in layers:
            recorders.append((hook_names.router_logits(layer), self._note_logits))
            recorders.append((hook_names.topk_weights(layer), _Recorder(layer, self)))
            if self.see_outputs is not None:
                recorders.append((hook_names.expert_out(layer), _OutputRecorder(layer, self)))
        return recorders

    def sees(self, hook: Any) -> bool:
        """Whether a point's hooks are asked in that forward: copies of the model have the hooks, too."""
        return self.is_on and hook.points.running is self.running

    def _note_logits(self, value: Tensor, hook: Any) -> None:
        if self.sees(hook):
            self.logits = value


@dataclass(eq=False, repr=False)
class _Observer:
    """What a router that nobody hooks is asked to show."""

    layer: int
    seeing: _Seeing
    decision: RouterOutput | None = None

    @property
    def is_on(self) -> bool:
        return self.seeing.is_on

    def __call__(self, decision: RouterOutput) -> None:
        self.decision = None if self.seeing.see_outputs is None else decision
        self.seeing.show(self.layer, decision, is_own=True)

    def take_decision(self) -> RouterOutput | None:
        """What the router decided, once, for the experts whose outputs are to be seen."""
        if not self.is_on:
            return None
        decision, self.decision = self.decision, None
        return decision

    def see_outputs(self, outputs: Tensor) -> None:
        self.seeing.show_outputs(self.layer, outputs)


@dataclass(eq=False, repr=False)
class _Recorder:
    """The last hook on the weights of a layer."""

    layer: int
    seeing: _Seeing

    def __call__(self, value: Tensor, hook: Any) -> None:
        if not self.seeing.sees(hook) or self.seeing.logits is None:
            return
        parts = (part.flatten(0, -2) for part in (self.seeing.logits, value, hook.chosen))
        self.seeing.decision = RouterOutput(*parts)
        self.seeing.show(self.layer, self.seeing.decision, is_own=False)


@dataclass(eq=False, repr=False)
class _OutputRecorder:
    """The last hook on what the experts of a layer give."""

    layer: int
    seeing: _Seeing

    def __call__(self, value: Tensor, hook: Any) -> None:
        seeing = self.seeing
        if not seeing.sees(hook) or seeing.decision is None or seeing.see_outputs is None:
            return
        seeing.show_outputs(self.layer, value.flatten(0, -3))


def _hooks_behind(model: Model, layers: dict[int, MoELayer], with_outputs: bool) -> bool:
    """Whether anybody's hook waits behind the last router (or the last experts), or may do so."""
    last = max(layers)
    points = installed_points(layers[last])
    in_time = [point for point in points.points if with_outputs or point is not points.expert_out]
    for name, point in cast(Any, model).hook_dict.items():
        if has_hooks(point) and not _stands_before(name, last) and not any(point is p for p in in_time):
            return True
    blocks = [residual.block for residual in running_of(model).residual[:last]]
    passed = {id(module) for block in blocks for module in block.modules()}
    return any(
        id(module) not in passed and foreign_hooks(module) for module in original_model(model).modules()
    )


def _stands_before(name: str, last: int) -> bool:
    parts = name.split(".")
    return parts[0] == "blocks" and parts[1].isdigit() and int(parts[1]) < last
