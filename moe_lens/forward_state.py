"""What the model is running at the moment: which tokens, on top of how many cached ones, after which prompt.

    state = watch(hf_model)                    # forward hooks see it as `hook.state`
    state.offset, state.n_prompt               # columns before these tokens; columns of the prompt
    unwatch(state)

Hooks inside a block see no more than [batch pos ...]; to tell the prompt from what the model has written, and
column 5 of a prompt from column 0 of a cached step, they ask here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class ForwardState:
    """The forward that is running, or the last that ran.

    Attributes:
        tokens: its input, int64 [batch pos]; None where it was given embeddings.
        attention_mask: as it was given, [batch total]; None without one.
        offset: how many columns are in the KV cache already; 0 in a plain forward.
        n_prompt: how many columns, cached ones included, are the prompt's. In `generate`, those of its first
            forward. Elsewhere all columns of a forward without cache; with one, the cached columns.
        bridge: the TransformerBridge around the model; None for a bare model.
        texts: the strings that the forward or the generation was given; None where it was given tokens.
        generating: how many calls of `generate` are open. prompt_known: whether theirs has run its prompt.
        rows: which prompt each row of the batch is, int64 [batch], where a function runs some of its prompts, or
            some of them several times; None: row by row.
        memory: what hooks found out about this forward and need not find out again in the next layer.
    """

    tokens: Tensor | None = None
    attention_mask: Tensor | None = None
    offset: int = 0
    n_prompt: int = 0
    bridge: Any = field(default=None, repr=False)
    texts: list[str] | None = None
    generating: int = 0
    prompt_known: bool = False
    rows: Tensor | None = None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    handle: Any = field(default=None, repr=False)

    def columns(self, n_pos: int) -> Tensor:
        """The columns [pos] of the tokens that are running, of which there are `n_pos`."""
        return torch.arange(self.offset, self.offset + n_pos)

    def own_tokens(self) -> Tensor | None:
        """Bool [batch pos], False on padding, for the columns that are running; None without a mask."""
        mask = self.attention_mask
        if mask is None or mask.ndim != 2:
            return None
        stop = None if self.tokens is None else self.offset + self.tokens.shape[1]
        return mask[:, self.offset : stop].bool()

    @contextmanager
    def generation(self, given: Any = None) -> Iterator[None]:
        """While it lasts, the columns of the first forward are the prompt; `given`: what `generate` got."""
        before = (self.generating, self.prompt_known, self.texts)
        self.generating, self.prompt_known, self.texts = self.generating + 1, False, _texts(given)
        try:
            yield
        finally:
            self.generating, self.prompt_known, self.texts = before

    @contextmanager
    def of_prompts(self, rows: Any) -> Iterator[None]:
        """While it lasts, the rows of a forward are these prompts, so that hooks by prompt find theirs."""
        before, self.rows = self.rows, torch.as_tensor(rows, dtype=torch.int64).cpu()
        try:
            yield
        finally:
            self.rows = before

    def by_prompt(self, values: Tensor, n_rows: int) -> Tensor | None:
        """Those of `values` [prompt ...] that belong to the rows [batch ...]; None if they do not fit."""
        if len(values) == 1:
            return values.expand(n_rows, *(-1,) * (values.ndim - 1))
        if self.rows is None:
            return values if len(values) == n_rows else None
        fits = len(self.rows) == n_rows and int(self.rows.max()) < len(values)
        return values[self.rows.to(values.device)] if fits else None

    @contextmanager
    def reading(self, given: Any) -> Iterator[None]:
        """A forward of the bridge, which was given a string, strings or tokens."""
        if self.generating:
            yield
            return
        before, self.texts = self.texts, _texts(given)
        try:
            yield
        finally:
            self.texts = before

    def enter(self, kwargs: dict[str, Any]) -> None:
        """Note a forward of the Hugging Face model by its keyword arguments."""
        self.memory = {}
        tokens = kwargs.get("input_ids")
        given = tokens if tokens is not None else kwargs.get("inputs_embeds")
        self.tokens = tokens if isinstance(tokens, Tensor) else None
        self.attention_mask = kwargs.get("attention_mask")
        self.offset = _cached(kwargs)
        n_pos = given.shape[1] if isinstance(given, Tensor) and given.ndim > 1 else 0
        if not self.generating:
            self.n_prompt = self.offset or n_pos
        elif not self.prompt_known:
            self.n_prompt, self.prompt_known = self.offset + n_pos, True


@dataclass
class _NoteForward:
    """A forward pre-hook. An object, so that a deep copy of the model notes its own forwards."""

    state: ForwardState

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state.enter({"input_ids": args[0], **kwargs} if args else kwargs)


def watch(hf_model: nn.Module, bridge: nn.Module | None = None) -> ForwardState:
    """A state that notes every forward of `hf_model`, the model inside `bridge`."""
    state = ForwardState(bridge=bridge)
    state.handle = hf_model.register_forward_pre_hook(_NoteForward(state), with_kwargs=True)
    return state


def unwatch(state: ForwardState) -> None:
    """Note no more forwards."""
    if state.handle is not None:
        state.handle.remove()
        state.handle = None


def _texts(given: Any) -> list[str] | None:
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
