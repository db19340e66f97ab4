"""What the model is running at the moment: which tokens, after how many cached ones, for which prompt.

    state = watch(hf_model)                    # forward hooks see it as `hook.state`
    state.offset, state.n_prompt               # columns before these tokens; columns of the prompt
    unwatch(state)

Hooks inside a block see only [batch pos ...]. This state tells them the prompt from what the model has
written, and column 5 of a prompt from column 0 of a cached step. A forward or a generation within a hook, and
each of several streams side by side, has its own prompt. (Threads that share a model share this state.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function, outside of compiled code: `torch.compiler.disable` with the type that it had."""
    return cast(Function, torch.compiler.disable(function))


@dataclass(eq=False)
class Generation:
    """One call of `generate`: its strings, its depth in other forwards, how many columns its prompt has."""

    texts: list[str] | None
    depth: int = 0
    n_prompt: int | None = None


_OF_A_FORWARD: Final = ("tokens", "attention_mask", "offset", "n_prompt", "texts", "generating", "memory")


@dataclass(eq=False)
class ForwardState:
    """The forward that is running.

    Attributes:
        tokens: its input, int64 [batch pos]; None where it was given embeddings.
        attention_mask: as it was given, [batch total]; None without one.
        offset: how many columns the KV cache holds before it; 0 in a plain forward.
        n_prompt: how many columns, cached ones included, are the prompt's. In `generate`, those of its first
            forward. Elsewhere all columns of a forward without cache; with one, the cached columns.
        texts: the strings that the forward or the generation was given; None where it was given tokens.
        generating: whether it is a step of `generate`.
        memory: what hooks computed about this forward and keep for the next layers.
        rows: which prompt each row of the batch is, int64 [batch], where a function runs some of its prompts,
            or some of them several times; None: row by row.
        bridge: the TransformerBridge around the model; None for a bare model.
    """

    tokens: Tensor | None = None
    attention_mask: Tensor | None = None
    offset: int = 0
    n_prompt: int = 0
    texts: list[str] | None = None
    generating: int = 0
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    rows: Tensor | None = None
    bridge: Any = field(default=None, repr=False)
    handles: list[Any] = field(default_factory=list, repr=False)
    _outer: list[tuple[Any, ...]] = field(default_factory=list, repr=False)
    _generations: list[Generation] = field(default_factory=list, repr=False)
    _given: list[str] | None = field(default=None, repr=False)

    def columns(self, n_pos: int) -> Tensor:
        """The columns [pos] of the `n_pos` tokens that are running."""
        return torch.arange(self.offset, self.offset + n_pos)

    def own_tokens(self) -> Tensor | None:
        """Bool [batch pos] for the columns that are running, False on padding; None without a mask."""
        mask = self.attention_mask
        if mask is None or mask.ndim != 2:
            return None
        stop = None if self.tokens is None else self.offset + self.tokens.shape[1]
        return mask[:, self.offset : stop].bool()

    def by_prompt(self, values: Tensor, n_rows: int) -> Tensor | None:
        """Those of `values` [prompt ...] that belong to the rows [batch ...]; None if they do not fit."""
        if len(values) == 1:
            return values.expand(n_rows, *(-1,) * (values.ndim - 1))
        if self.rows is None:
            if self.generating and n_rows % len(values) == 0:  # beams stand next to each other
                return values.repeat_interleave(n_rows // len(values), dim=0)
            return values if len(values) == n_rows else None
        fits = len(self.rows) == n_rows and int(self.rows.max()) < len(values)
        return values[self.rows.to(values.device)] if fits else None

    @contextmanager
    def of_prompts(self, rows: Any) -> Iterator[None]:
        """Within the context, the rows of a forward are these prompts, so that hooks find what is theirs."""
        before, self.rows = self.rows, torch.as_tensor(rows, dtype=torch.int64).cpu()
        try:
            yield
        finally:
            self.rows = before

    @contextmanager
    def generation(self, given: Any) -> Iterator[None]:
        """Within the context, the columns of the first forward are the prompt.

        Args:
            given: what `generate` was given; or a `Generation` that continues.
        """
        generation = given if isinstance(given, Generation) else Generation(as_texts(given))
        generation.depth = len(self._outer)
        self._generations.append(generation)
        try:
            yield
        finally:
            self._generations.remove(generation)

    @contextmanager
    def reading(self, given: Any) -> Iterator[None]:
        """A forward of the bridge, called with a string, strings or tokens."""
        before, self._given = self._given, as_texts(given)
        try:
            yield
        finally:
            self._given = before

    def enter(self, kwargs: dict[str, Any]) -> None:
        """A forward of the Hugging Face model begins, with these keyword arguments."""
        running = [generation for generation in self._generations if generation.depth == len(self._outer)]
        self._outer.append(tuple(getattr(self, name) for name in _OF_A_FORWARD))
        tokens = kwargs.get("input_ids")
        inputs = tokens if tokens is not None else kwargs.get("inputs_embeds")
        n_pos = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim > 1 else 0
        self.tokens = tokens if isinstance(tokens, Tensor) else None
        self.attention_mask, self.offset, self.memory = kwargs.get("attention_mask"), _cached(kwargs), {}
        if not running:
            self.n_prompt, self.texts, self.generating = self.offset or n_pos, self._given, 0
            return
        innermost = running[-1]
        if innermost.n_prompt is None:
            innermost.n_prompt = self.offset + n_pos
        self.n_prompt, self.texts, self.generating = innermost.n_prompt, innermost.texts, 1

    def leave(self) -> None:
        """The forward ends, or was interrupted: the one around it, if any, continues."""
        for name, value in zip(_OF_A_FORWARD, self._outer.pop(), strict=True):
            setattr(self, name, value)


@dataclass
class _Enter:
    """A forward pre-hook; an object, so that a deep copy of the model records its own forwards."""

    state: ForwardState

    @uncompiled
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state.enter({"input_ids": args[0], **kwargs} if args else kwargs)


@dataclass
class _Leave:
    """A forward hook that is called after an exception as well."""

    state: ForwardState

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.state.leave()


def watch(hf_model: nn.Module, bridge: nn.Module | None = None) -> ForwardState:
    """A state that follows every forward of `hf_model`, the model inside `bridge`."""
    state = ForwardState(bridge=bridge)
    state.handles = [
        hf_model.register_forward_pre_hook(_Enter(state), with_kwargs=True),
        hf_model.register_forward_hook(_Leave(state), always_call=True),
    ]
    return state


def unwatch(state: ForwardState) -> None:
    """Stop following forwards."""
    for handle in state.handles:
        handle.remove()
    state.handles = []


def as_texts(given: Any) -> list[str] | None:
    """A string or strings as a list; None for anything else."""
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    return None


def _cached(kwargs: dict[str, Any]) -> int:
    """How many columns the KV cache holds before this forward."""
    position = kwargs.get("cache_position")
    if isinstance(position, Tensor) and position.numel():
        return int(position.flatten()[0])
    past: Any = kwargs.get("past_key_values")
    return 0 if past is None else int(past.get_seq_length())
