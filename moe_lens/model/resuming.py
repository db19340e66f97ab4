"""Runs that repeat nothing of a run that was recorded: they begin at a block, and at a column.

    recorded = record(model, tokens, attention_mask, columns=True)     # one run, and what its blocks read
    with model.hooks(patches):
        logits = recorded.resume(rows, layers, start)                  # [row pos d_vocab]

An edit in block l at column p of a causal model changes nothing below block l and nothing before column p. A
row of a resumed run joins at the block of its edit, with the recorded run's residual stream there; all rows
begin at one column and attend to the recorded run's keys and values before it. The logits before it are the
recorded run's.

Layers that keep another state than keys and values are seen by their config (`_keeps_all_keys`). A model may
pass on more than the residual stream from block to block, so whoever resumes runs compares some with whole
ones.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moe_lens.errors import MoELensError
from moe_lens.model.hf_models import decoder_of, hf_model_of, numbered_layers, original_model, text_config
from moe_lens.model.private_names import foreign_hooks, has_hooks
from moe_lens.model.registration import running_of
from moe_lens.model.stand_in import StandIn
from moe_lens.model.state import Generation
from moe_lens.model.wrapper import Model

_WHOLE_CACHES: Final = (DynamicLayer, DynamicSlidingWindowLayer)
"""How transformers caches a layer that is attention and no more; others keep a state of their own."""


@dataclass(eq=False)
class Recorded:
    """A run, and what it takes to resume it.

    Attributes:
        model: what ran, a HookedMoE or RoutedModel.
        tokens: what it ran on.
        attention_mask: 0 on padding, [batch pos]; None without.
        blocks: the model's blocks.
        inputs: what each block read, [batch pos ...].
        rests: what each block returned after the residual stream; None where that is all it returns.
        keys_values: of each layer of the cache, [batch head pos d_head] both (None: the layer keeps none);
            None where columns are not skipped.
        fixed: sizes of the first dimension of arguments that are the same for all rows.
        logits: of the whole run.
    """

    model: Model
    tokens: Int[Tensor, "batch pos"]
    attention_mask: Tensor | None
    blocks: list[nn.Module]
    inputs: list[Tensor] = field(default_factory=list)
    rests: list[tuple[Any, ...] | None] = field(default_factory=list)
    keys_values: list[tuple[Tensor, Tensor] | None] | None = None
    fixed: set[int] = field(default_factory=set)
    logits: Any = None

    @torch.no_grad()
    def resume(
        self, rows: Int[Tensor, "row"], layers: Sequence[int], start: int = 0
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of a run of these rows.

        Args:
            rows: which prompt of the recorded run each row is.
            layers: the block at which each row joins, ascending. At block l a hook sees the first rows, those
                that have joined.
            start: the column at which all begin; 0 unless columns are skipped. Hooks see what follows.
        """
        n_rows, n_pos = len(rows), self.tokens.shape[1]
        start = start if self.keys_values is not None else 0
        extra = self._extra_rows(n_rows, n_pos - start)
        rows = torch.cat([rows, rows[-1:].expand(extra)])
        layers = [*layers, *[layers[-1]] * extra]
        # how many rows have joined at each block
        joined = [sum(layer <= number for layer in layers) for number in range(len(self.blocks))]
        kwargs: dict[str, Any] = {}
        if self.attention_mask is not None:
            kwargs["attention_mask"] = self.attention_mask[rows]
        if start:
            kwargs["past_key_values"] = self._cache(rows, joined, start)
        generation = Generation(n_prompt=n_pos)  # so that hooks know the columns
        state = running_of(self.model)
        of_prompts = state.of_prompts(rows, len(self.tokens))
        with of_prompts, state.generation(generation), self._joining(rows, joined, start):
            logits = self.model(self.tokens[rows][:, start:], **kwargs)[:n_rows]
        if not start:
            return logits
        return torch.cat([_of_rows(self.logits[:, :start], rows[:n_rows]), logits], dim=1)

    def _extra_rows(self, n_rows: int, n_columns: int) -> int:
        """How many rows to add, so that arguments with one entry a row are known by their size."""
        extra = 0
        while n_rows + extra in self.fixed or n_rows + extra == n_columns:
            extra += 1
        return extra

    def _cache(self, rows: Tensor, joined: list[int], start: int) -> DynamicCache:
        """The recorded keys and values before `start`, for the rows that run in each block."""
        cache = DynamicCache()
        for number, kept in enumerate(self.keys_values or []):
            layer = DynamicLayer()
            cache.layers.append(layer)
            if kept is None:
                continue
            # the number of columns is asked of the first layer, also where no row has joined
            n_rows = max(joined[number], 1)
            layer.lazy_initialization(*kept)
            layer.keys, layer.values = (_of_rows(part[:, :, :start], rows[:n_rows]) for part in kept)
        return cache

    def _joining(self, rows: Tensor, joined: list[int], start: int) -> AbstractContextManager[None]:
        stood = [
            _Joining(block, self, number, rows, (joined[number - 1] if number else 0, joined[number]), start)
            for number, block in enumerate(self.blocks)
        ]
        return _standing(self.blocks, stood)


class _Joining(StandIn):
    """A block that runs on the rows that have joined, in the thread that resumes."""

    def __init__(
        self,
        block: nn.Module,
        recorded: Recorded,
        number: int,
        rows: Tensor,
        joined: tuple[int, int],
        start: int,
    ):
        super().__init__(block)
        self.recorded, self.number, self.rows, self.joined, self.start = recorded, number, rows, joined, start
        self.thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.original(*args, **kwargs)
        before, n_rows = self.joined
        hidden = args[0] if args else kwargs["hidden_states"]
        if not n_rows:
            rest = self.recorded.rests[self.number]
            return hidden if rest is None else (hidden, *rest)
        if n_rows > before:
            read = _of_rows(self.recorded.inputs[self.number][:, self.start :], self.rows[before:n_rows])
            hidden = torch.cat([hidden[:before], read]) if before else read
        n_all = len(self.rows)
        if args:
            return self.original(hidden, *_first(args[1:], n_rows, n_all), **_first(kwargs, n_rows, n_all))
        return self.original(**{**_first(kwargs, n_rows, n_all), "hidden_states": hidden})


class _Recording(StandIn):
    """A block, of which is noted what it reads and returns."""

    def __init__(self, block: nn.Module, recorded: Recorded):
        super().__init__(block)
        self.recorded, self.thread = recorded, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        self.recorded.inputs.append(hidden.clone())
        n_rows = len(hidden)
        self.recorded.fixed |= {len(each) for each in _tensors([args, kwargs]) if len(each) != n_rows}
        output = self.original(*args, **kwargs)
        self.recorded.rests.append(output[1:] if isinstance(output, tuple) else None)
        return output


@torch.no_grad()
def record(
    model: Model, tokens: Int[Tensor, "batch pos"], attention_mask: Tensor | None, *, columns: bool
) -> Recorded | None:
    """A run that can be resumed; None where the model's blocks cannot be found.

    Args:
        columns: keep keys and values too, where the model's layers keep nothing else, so that columns can be
            skipped.
    """
    blocks = _blocks(model)
    if not blocks:
        return None
    recorded = Recorded(model, tokens, attention_mask, blocks)
    kwargs: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
    cache = DynamicCache() if columns and _keeps_all_keys(hf_model_of(model)) else None
    if cache is not None:
        kwargs["past_key_values"] = cache
    with _standing(blocks, [_Recording(block, recorded) for block in blocks]):
        recorded.logits = model(tokens, **kwargs)
    if len(recorded.inputs) != len(blocks):
        return None  # a block ran twice, or not at all
    if cache is not None:
        recorded.keys_values = _whole(cache, tokens)
    return recorded


@contextmanager
def _standing(blocks: Sequence[nn.Module], stand_ins: Sequence[StandIn]) -> Iterator[None]:
    """Within the context these stand in for the blocks' forwards."""
    with ExitStack() as stack:
        for block, stand_in in zip(blocks, stand_ins, strict=True):
            stand_in.put_on(block)
            stack.callback(stand_in.take_off, block)
        yield


def is_bare(model: Model) -> bool:
    """Whether no hook is on any point of the model, nor somebody's own on a module.

    Those would see some rows and columns only, or other columns where padding moves.
    """
    points: dict[str, Any] = vars(model).get("hook_dict") or getattr(model, "hook_dict")  # noqa: B009
    hooked = any(has_hooks(point) for point in points.values())
    return not hooked and not any(map(foreign_hooks, original_model(model).modules()))


def _blocks(model: Model) -> list[nn.Module]:
    try:
        hf_model = hf_model_of(model)
        blocks: list[Any] = decoder_of(hf_model, numbered_layers(hf_model))[1]
    except MoELensError:  # adapters
        return []
    return [getattr(block, "original_component", None) or block for block in blocks]  # in a bridge's own


def _keeps_all_keys(hf_model: nn.Module) -> bool:
    """Whether the config says of every layer that it keeps keys and values, and no state of another kind."""
    try:
        layers = DynamicCache(config=text_config(hf_model)).layers
    except Exception:  # whatever a config of another kind lacks
        return False
    return all(type(layer) in _WHOLE_CACHES for layer in layers)


def _whole(cache: DynamicCache, tokens: Tensor) -> list[tuple[Tensor, Tensor] | None] | None:
    """Keys and values by layer; None if some are not those of all tokens."""
    found: list[tuple[Tensor, Tensor] | None] = []
    for layer in cache.layers:
        if not getattr(layer, "is_initialized", False):
            found.append(None)
            continue
        if type(layer) is not DynamicLayer:
            return None
        keys, values = layer.keys, layer.values
        if keys is None or values is None:
            return None
        if any(
            part.ndim != 4 or (len(part), part.shape[2]) != tuple(tokens.shape) for part in (keys, values)
        ):
            return None
        found.append((keys, values))
    return found if found and found[0] is not None else None


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:
    """[batch ...] -> [row ...]; a view where there is one prompt."""
    if len(values) == 1:
        return values.expand(len(rows), *values.shape[1:])
    return values[rows.to(values.device)]


def _first(values: Any, n_rows: int, n_all: int) -> Any:
    """Arguments with one entry a row, cut to the rows that run."""
    if n_rows == n_all:
        return values
    return _mapped(values, lambda each: each[:n_rows] if each.ndim > 1 and len(each) == n_all else each)


def _mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {key: _mapped(value, change) for key, value in values.items()}
    if type(values) in (tuple, list):
        return type(values)(_mapped(value, change) for value in values)
    return values


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.ndim > 1:
            found.append(tensor)
        return tensor

    _mapped(values, note)
    return found
