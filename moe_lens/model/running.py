"""The forwards of a model, as they run: one in another, and thread by thread.

    running = Running(wrapper)
    running.watch(hf_model, decoder)           # hooks see the forward that they are in as `hook.state`
    running.unwatch()

What is known belongs to one forward in one thread: a forward that a hook starts, a generation within it, a
deep copy of the model and another thread each have their own.
"""

import copy
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from moe_lens.errors import HookError
from moe_lens.model.checkpointing import Checkpointing
from moe_lens.model.frames import frame_of_call, still_running
from moe_lens.model.owners import Owners
from moe_lens.model.state import (
    NAN_LOGITS,
    ForwardState,
    Generation,
    Pass,
    as_prompts,
    check_weights,
)
from moe_lens.model.static_caches import refuse_static_cache
from moe_lens.model.threads import Thread, forward_of, generation_in, generation_of, inherit
from moe_lens.model.unplaced import VIRTUAL, is_within_prompt_learning, of_forward
from moe_lens.model.watching import Enter, Generate, Leave


class Running:
    """The forwards of one model, thread by thread.

    Attributes:
        wrapper: what is around the model (HookedMoE, RoutedModel); None for a bare model.
        points: the hook points of its layers (`points.RoutingPoints`).
        residual: those on the residual stream (`residual_points.ResidualPoints`); none on a bridge.
        is_hooked, needs_state: whether any hook is set on routing, and one that may ask what is running;
            plain attributes, which torch.compile guards.
        owners: the threads that set the hooks.
        lock: held while hooks change.
    """

    def __init__(self, wrapper: Any = None) -> None:
        self.wrapper = wrapper
        self.points: list[Any] = []
        self.residual: list[Any] = []
        self.is_hooked = self.needs_state = False
        self.n_planned = 0  # layers with plans alone
        self.owners = Owners()
        self.lock = threading.RLock()
        self._checkpointing: Checkpointing | None = None
        self._threads: dict[int, Thread] = {}
        self._contexts: list[int] = []
        self._handles: list[Any] = []
        self._model: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Running":
        """For a deep copy of the model, which runs nothing yet."""
        twin = memo[id(self)] = Running()
        for name in ("wrapper", "points", "residual", "_handles", "_model", "_checkpointing"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin.hooks_changed()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_threads": {}, "_contexts": [], "owners": Owners(), "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "lock": threading.RLock()})

    @property
    def forward(self) -> ForwardState:
        """The forward that runs in this thread; one that knows nothing where none does."""
        thread = self._threads.get(threading.get_ident())
        return (
            thread.forwards[-1]
            if thread is not None and thread.forwards
            else ForwardState(bridge=self.wrapper)
        )

    @property
    def model(self) -> nn.Module | None:
        """The model that is watched."""
        return self._model

    @property
    def is_watching(self) -> bool:
        """Whether the model still has the points."""
        return self._model is not None

    def holds(self, module: nn.Module) -> bool:
        """Whether the model that it watches still has this module."""
        return self._model is None or any(part is module for part in self._model.modules())

    @property
    def is_running(self) -> bool:
        """Whether a forward runs in this thread."""
        return self.depth > 0

    @property
    def depth(self) -> int:
        """How many forwards, each within the other, run in this thread."""
        thread = self._threads.get(threading.get_ident())
        return 0 if thread is None else len(thread.forwards)

    @property
    def _is_busy(self) -> bool:
        """Whether a forward runs in some thread."""
        return any(thread.forwards for thread in list(self._threads.values()))

    @property
    def generating(self) -> bool:
        """Whether the next forward of this thread is a step of a generation."""
        thread = self._threads.get(threading.get_ident())
        return thread is not None and generation_in(thread) is not None

    @contextmanager
    def hooking(self) -> Iterator[None]:
        """A context in which a thread sets hooks, of which there is one thread at a time.

        (TransformerLens counts how deep contexts stand in each other, for all threads together.)
        """
        ident = threading.get_ident()
        with self.lock:
            if any(other != ident for other in self._contexts):
                raise HookError(_TWO_THREADS)
            self._contexts.append(ident)
        try:
            yield
        finally:
            with self.lock:
                self._contexts.remove(ident)
            with self._in_thread():
                pass  # what was broken off in it is forgotten

    @contextmanager
    def of_prompts(self, rows: Any, among: Pass | int) -> Iterator[None]:
        """Within the context, the rows of a forward are these prompts, so that hooks find what is theirs.

        Within another such context, these of its prompts.

        Args:
            rows: numbers of prompts.
            among: how many prompts the function that calls this runs in all; or its `Pass`.
        """
        with self._in_thread() as thread:
            before, depth = thread.rows, len(thread.forwards)
            rows = torch.as_tensor(rows, dtype=torch.int64).cpu()
            if before is not None and before[0] == depth:
                outer, among = before[1]
                rows = outer[rows]
            thread.rows = (depth, (rows, among if isinstance(among, Pass) else Pass(among)))
            try:
                yield
            finally:
                thread.rows = before

    @contextmanager
    def generation(self, given: Any) -> Iterator[None]:
        """Within the context, forwards are steps of a generation.

        Args:
            given: what `generate` was given; or a `Generation` that continues.
        """
        generation = given if isinstance(given, Generation) else generation_of(given)
        with self._in_thread() as thread:
            inherit(generation, thread)
            thread.generations.append(generation)
            try:
                yield
            finally:
                thread.generations.remove(generation)

    @contextmanager
    def reading(self, given: Any) -> Iterator[None]:
        """A forward or generation of the wrapper, which was given a string, strings or tokens.

        None: what the context around it was given.
        """
        with self._in_thread() as thread:
            before, depth = thread.given, len(thread.forwards)
            if given is not None or before is None or before[0] != depth:
                thread.given = (depth, as_prompts(given))
            try:
                yield
            finally:
                thread.given = before

    @property
    def hooks_set(self) -> tuple[int, ...]:
        """Which hooks are set on routing, by torch's numbers."""
        return tuple(number for points in self.points for table in points.tables for number in table)

    @contextmanager
    def again(self, forward: ForwardState) -> Iterator[None]:
        """Within the context, a block of an earlier forward is computed again, by gradient checkpointing."""
        with self._in_thread() as thread:
            thread.forwards.append(forward)
            try:
                yield
            finally:
                thread.forwards.remove(forward)
                forward.steered.clear()

    def enter(self, kwargs: dict[str, Any], of_decoder: bool = False) -> None:
        """A forward of the Hugging Face model begins, or of its decoder alone, with these arguments."""
        ident = threading.get_ident()
        thread = self._threads.setdefault(ident, Thread())
        self._drop_broken(ident, thread)
        if of_decoder and thread.forwards and not thread.forwards[-1].in_decoder:
            thread.forwards[-1].in_decoder = True  # as part of the model's, which is noted already
            return
        forward = forward_of(kwargs, thread, self.wrapper, self.needs_state)
        forward.of_decoder = forward.in_decoder = of_decoder
        forward.frame = frame_of_call()
        if self.needs_state:
            forward.unplaced = forward.unplaced or of_forward(self._model, kwargs)
            if forward.unplaced is None and is_within_prompt_learning(forward.frame):
                forward.unplaced = VIRTUAL
        with self.lock:
            thread.forwards.append(forward)
            if self._checkpointing is not None:
                self._checkpointing.begin()
            if self.owners:
                self._check_owners(thread)
        refuse_static_cache(self.wrapper, kwargs.get("past_key_values"))

    def leave(self, of_decoder: bool = False, completed: bool = True) -> None:
        """It ends, or was broken off: what ran around it, if anything, goes on."""
        ident = threading.get_ident()
        thread = self._threads.get(ident)
        if thread is not None:
            self._drop_broken(ident, thread)  # within this one
        if thread is None or not thread.forwards:
            return  # broken off before it was noted
        if of_decoder and not thread.forwards[-1].of_decoder:
            thread.forwards[-1].in_decoder = False
            return
        forward = thread.forwards.pop()
        forward.frame = None
        disturbed, thread.disturbed = thread.disturbed, False
        self._forget(ident, thread)
        self._end_checkpointing()
        if disturbed:
            raise HookError(_TWO_THREADS)
        if completed:
            _check_steered(forward)
            for points in self.points:
                if points.mode in ("placed", "hooks") and points.moe.where not in forward.ran:
                    points.router.check_in_place()
            if len(forward.steered) < self.n_planned:
                steered = {where for where, _ in forward.steered}
                for points in self.points:
                    if points.mode == "plans" and points.moe.where not in steered:
                        points.router.was_not_called()
        forward.steered.clear()  # checkpointed blocks keep the forward; these would keep its graph

    def check_steered(self) -> None:
        """Raise HookError where plans alone decided and the weights so far are NaN."""
        _check_steered(self.forward)

    def hooks_changed(self) -> None:
        """Called by points whenever their hooks change."""
        self.is_hooked = any(points.mode != "off" for points in self.points)
        self.needs_state = any(points.needs_state for points in self.points)
        self.n_planned = sum(points.mode == "plans" for points in self.points)
        self.owners.find(
            lambda: (table for points in (*self.points, *self.residual) for table in points.tables)
        )
        ident = threading.get_ident()
        for other, thread in list(self._threads.items()):
            if other != ident and thread.forwards:
                thread.disturbed = True

    def _check_owners(self, own: Thread) -> None:
        """Refuse a thread that would see another one's hooks."""
        known = list(self._threads)  # before it is asked which threads there are
        for ident in set(known) - sys._current_frames().keys():  # ended within a forward, by SystemExit
            self._threads.pop(ident, None)
        busy = [ident for ident, thread in list(self._threads.items()) if thread.forwards]
        if self.owners.refuse(busy):
            for thread in list(self._threads.values()):
                thread.disturbed = thread.disturbed or (thread is not own and len(thread.forwards) > 0)
            raise HookError(_TWO_THREADS)

    @contextmanager
    def _in_thread(self) -> Iterator[Thread]:
        ident = threading.get_ident()
        thread = self._threads.setdefault(ident, Thread())
        self._drop_broken(ident, thread)
        try:
            yield thread
        finally:
            self._drop_broken(ident, thread)
            self._forget(ident, thread)

    def _drop_broken(self, ident: int, thread: Thread) -> None:
        """Forget this thread's forwards that a KeyboardInterrupt broke off, of which torch does not tell."""
        if not thread.forwards or (alive := still_running(thread.forwards)) == len(thread.forwards):
            return
        with self.lock:
            for forward in thread.forwards[alive:]:
                forward.frame = None
                forward.steered.clear()
            del thread.forwards[alive:]
            thread.disturbed = thread.disturbed and alive > 0
            for points in self.points:
                points.drop(ident, alive)
            self._end_checkpointing()

    def _end_checkpointing(self) -> None:
        if self._checkpointing is not None and self._checkpointing.wrapped and not self._is_busy:
            self._checkpointing.end()

    def _forget(self, ident: int, thread: Thread) -> None:
        if thread.is_idle:
            self._threads.pop(ident, None)

    def watch(self, hf_model: nn.Module, decoder: nn.Module | None = None) -> None:
        """Note every forward and every `generate` of a Hugging Face model.

        Args:
            decoder: the module in it that holds the blocks, whose forwards are noted where nothing calls the
                model itself (adapters call `model.forward`).
        """
        self._model = hf_model
        self._checkpointing = Checkpointing(hf_model, self)
        watched = [(hf_model, False)]
        if decoder is not None and decoder is not hf_model:
            watched.append((decoder, True))
        self._handles = []
        for module, of_decoder in watched:
            enter, leave = Enter(self, of_decoder), Leave(self, of_decoder)
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ]
        if callable(getattr(hf_model, "generate", None)):
            cast(Any, hf_model).generate = Generate(self, cast(Any, hf_model).generate)

    def widen(self, hf_model: nn.Module, decoder: nn.Module | None) -> None:
        """Watch a model that generates, where only a part of it that does not is watched: its decoder."""
        watched, generates = self._model, callable(getattr(hf_model, "generate", None))
        if watched is None or not generates or callable(getattr(watched, "generate", None)) or self._is_busy:
            return
        if any(part is watched for part in hf_model.modules()):
            self.unwatch()
            self.watch(hf_model, decoder)

    def unwatch(self) -> None:
        """Note nothing more, and leave no trace on the model."""
        for handle in self._handles:
            handle.remove()
        if self._model is not None and isinstance(vars(self._model).get("generate"), Generate):
            generate = vars(self._model)["generate"]
            if generate.was_on_instance:
                cast(Any, self._model).generate = generate.original
            else:
                del cast(Any, self._model).generate
        if self._checkpointing is not None:
            self._checkpointing.end()
        self._handles, self._model, self._checkpointing = [], None, None


_TWO_THREADS: Final = (
    "Routing hooks of this model were set in one thread while another one runs it, and hooks belong to the "
    "model: each would see the other's. Run one after the other (a lock), or give each thread its own "
    "copy.deepcopy(model). (Threads that start after the hooks were set may run the model under them.)"
)


def _check_steered(forward: ForwardState) -> None:
    if forward.steered and _holds_nan(forward.steered[-1][1]):
        for where, weights in forward.steered:
            check_weights(where, _by_row(weights, forward.tokens), NAN_LOGITS)


def _holds_nan(weights: Tensor) -> bool:
    """NaN in one layer reaches all later ones, and any NaN a sum; it is looked for where the sum has it."""
    return math.isnan(weights.detach().sum(dtype=torch.float32).item())


def _by_row(weights: Tensor, tokens: Tensor | None) -> Tensor:
    fits = tokens is not None and tokens.ndim == 2 and tokens.numel() == len(weights)
    return weights.unflatten(0, tuple(tokens.shape)) if tokens is not None and fits else weights
