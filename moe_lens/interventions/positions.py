"""`positions=` of the hook builders: at which tokens of prompt and generation an intervention acts.

    None                      every token, including those that the model generates
    "prompt", "generated"     the phases: the prompt's tokens, or those that the model has generated
    3, -1, [0, 5]             positions of each prompt's own tokens; from the end of the prompt if negative
    mask                      bool [pos] or [batch pos] over the prompt's columns, such as `span_mask(...)`
    a span                    as in `span_mask`: "all", "last", a text, a TextSpan, a slice, a function

Padding has no position: 0 is the first token of every prompt of a padded batch, as in a slice. Positions
continue while the model generates: in `generate`, position 12 of a prompt of 10 tokens is the third generated
token, with a KV cache and without. Masks and spans are about the prompt and never reach generated
tokens. A forward on top of a cache outside `generate` counts as generated.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.errors import DataError, HookError
from moe_lens.model.state import ForwardState
from moe_lens.model.unplaced import PACKED
from moe_lens.text.batching import token_sequences
from moe_lens.text.spans import TextSpan, span_mask
from moe_lens.text.token_rows import as_they_stand

Positions = Any
"""At which tokens a hook acts:

- None: every token, including those that the model generates;
- "prompt" or "generated": the prompt's tokens, or the generated ones;
- an int or a list of ints: positions of each prompt's own tokens, padding left out, from the end of the
  prompt if negative; every prompt must have them;
- a bool mask [pos] or [batch pos] over the prompt's columns;
- a span of the prompt, as in `span_mask`: "all", "last", a text, a `TextSpan`, a slice, a function.

`checked_positions` rejects anything else."""

PHASES: Final = ("prompt", "generated")


def checked_positions(positions: Positions) -> Positions:
    """The positions as None, a phase, a tuple of numbers, a bool tensor on the CPU, or a span.

    >>> checked_positions([0, -1])
    (0, -1)

    Raises:
        DataError: anything else; an empty list; a mask of more than two dimensions.
    """
    if positions is None or isinstance(positions, str | TextSpan | slice):
        return positions
    if isinstance(positions, Callable):
        return positions
    try:
        values = torch.as_tensor(positions).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_positions(positions) from error
    if values.dtype == torch.bool and values.ndim in (1, 2) and values.numel():
        return values
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise _no_positions(positions)
    if values.ndim > 1 or not values.numel():
        raise _no_positions(positions)
    return tuple(values.reshape(-1).tolist())


def selected(positions: Positions, state: ForwardState, n_rows: int, n_pos: int) -> Bool[Tensor, "batch pos"]:
    """Which of the tokens in this forward the positions (checked ones) select, on the CPU.

    Raises:
        HookError: a position that a prompt does not have, a mask of another shape, a span that cannot be
            located, or a run whose columns tell no positions (packed prompts, prompt learning, guidance).
    """
    is_mask = isinstance(positions, Tensor)  # over the columns of packed rows it is plain what is meant
    if positions is not None and not (is_mask and state.unplaced is PACKED and not state.generating):
        state.check_placed(positions)
    columns = state.columns(n_pos)
    in_prompt = (columns < state.n_prompt).expand(n_rows, n_pos)
    if positions is None:
        return torch.ones_like(in_prompt)
    if isinstance(positions, str) and positions in PHASES:
        return in_prompt if positions == "prompt" else ~in_prompt
    if isinstance(positions, tuple):
        _note_padding(state, n_rows)
        own = state.places(n_rows, n_pos)
        return (own[..., None] == _numbered(positions, state, n_rows)[:, None]).any(-1)
    if isinstance(positions, Tensor):
        over_prompt = _fitting(positions, state, n_rows)
    elif not bool(in_prompt.any()):
        return torch.zeros_like(in_prompt)
    else:
        over_prompt = _remembered(positions, state, n_rows)
    chosen = torch.zeros(n_rows, n_pos, dtype=torch.bool)
    of_prompt = columns[columns < state.n_prompt]
    chosen[:, : len(of_prompt)] = over_prompt[:, of_prompt]
    return chosen


def _remembered(span: Any, state: ForwardState, n_rows: int) -> Bool[Tensor, "batch pos"]:
    """A span's mask, located once a forward rather than once a layer.

    The span is kept beside its mask: as long as it lives, no other object can have its id.
    """
    key = ("span", id(span), n_rows)
    if key not in state.memory:
        state.memory[key] = (span, _located(span, state, n_rows))
    return state.memory[key][1]


def _numbered(positions: tuple[int, ...], state: ForwardState, n_rows: int) -> Int[Tensor, "batch position"]:
    """The positions from each prompt's start."""
    lengths, given = state.lengths(n_rows)[:, None], torch.tensor(positions)
    goes_on = bool(state.generating or state.offset)
    outside = (given < -lengths) | ((given >= lengths) & (not goes_on))
    if bool(outside.any()):
        row, which = outside.nonzero()[0].tolist()
        raise HookError(
            f"positions names position {positions[which]}; this prompt has {int(lengths[row])} tokens"
            f"{f' (row {row} of the batch)' if n_rows > 1 else ''}. Give positions that every prompt has, "
            "or a mask."
        )
    return torch.where(given < 0, given + lengths, given)


def _fitting(mask: Bool[Tensor, "..."], state: ForwardState, n_rows: int) -> Bool[Tensor, "batch pos"]:
    rows = mask if mask.ndim == 2 else mask[None]
    fitting = state.by_prompt(rows, n_rows)
    if fitting is None or rows.shape[1] != state.n_prompt:
        raise HookError(
            f"The mask given as positions has shape {tuple(mask.shape)}; this run has "
            f"{state.of_how_many(n_rows)} prompts of {state.n_prompt} columns, padding included. "
            "span_mask(model, prompts, span) gives masks that fit."
        )
    return fitting


def _located(span: Any, state: ForwardState, n_rows: int) -> Bool[Tensor, "batch pos"]:
    """Where a span stands in the prompts of this forward."""
    if state.tokens is None or state.bridge is None or state.offset:
        raise HookError(
            f"positions={span!r} must be located in a prompt's tokens, and this run has none; give a mask."
        )
    tokens, texts = state.tokens[:, : state.n_prompt].cpu(), state.texts
    if texts is not None:
        which = state.by_prompt(torch.arange(len(texts)), n_rows)  # beams and samples are copies of a prompt
        if which is None:
            raise HookError(f"positions={span!r}: {len(texts)} prompts run as {n_rows} rows; give a mask.")
        prompts: Any = [texts[number] for number in which.tolist()]
        real = _own_columns(prompts, state, tokens)
    else:
        mask = state.own_tokens()
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, : state.n_prompt].cpu()
        prompts = as_they_stand(row[kept] for row, kept in zip(tokens, real, strict=True))
    try:
        in_span = span_mask(state.bridge, prompts, span, padding_side="left").cpu()
    except DataError as error:
        raise HookError(
            f"positions={span!r} cannot be located in this run: {error} A mask always works: "
            "positions=span_mask(model, prompts, span). (The phases are 'prompt' and 'generated'.)"
        ) from error
    chosen = torch.zeros_like(real)
    for row, kept in enumerate(real):
        chosen[row, kept] = in_span[row, in_span.shape[1] - int(kept.sum()) :]
    return chosen


def _note_padding(state: ForwardState, n_rows: int) -> None:
    """Find padding by the texts, where a bridge pads them on the right and needs no mask."""
    texts, tokens = state.texts, state.tokens
    if texts is None or tokens is None or state.bridge is None or "mask" in state.memory:
        return
    if state.attention_mask is None and len(texts) == n_rows > 1 and not (state.offset or state.generating):
        state.note_own(_own_columns(texts, state, tokens.cpu()))


def _own_columns(prompts: Any, state: ForwardState, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "..."]:
    return torch.stack([_columns_of(text, state, row) for text, row in zip(prompts, tokens, strict=True)])


def _columns_of(text: Any, state: ForwardState, row: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
    """The columns of a prompt's tokens, which must be those that run, or offsets would point elsewhere."""
    [tokens] = token_sequences(state.bridge, [text])
    n_padding = len(row) - len(tokens)
    for before in (n_padding, 0):  # padding on the left, on the right
        if n_padding >= 0 and torch.equal(row[before : before + len(tokens)], tokens):
            columns = torch.arange(len(row))
            return (columns >= before) & (columns < before + len(tokens))
    raise HookError(
        f"positions: the tokens of {text!r} are not those that run (another prepend_bos?); give a mask."
    )


def _no_positions(positions: Any) -> DataError:
    return DataError(
        "positions must be None, 'prompt', 'generated', numbers (an int or a list of ints, at least one), a "
        f"bool mask [pos] or [batch pos], or a span; got {positions!r}."
    )
