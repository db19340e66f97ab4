"""`positions=` of the hook builders: at which tokens an intervention acts, in the prompt and while writing.

    None                      every token, also those that the model writes
    "prompt", "generated"     the phases: the prompt's tokens, or those that the model has written
    3, -1, [0, 5]             columns of the padded batch [batch pos]; from the end of the prompt if negative
    mask                      bool [pos] or [batch pos] over the prompt's columns, `span_mask(...)` for one
    a span                    as in `span_mask`: "all", "last", a text, a TextSpan, a slice, a function

Columns go on while the model writes: in `generate`, column 12 of a prompt of 10 tokens is the third token
written, with a KV cache and without. Masks and spans are about the prompt and never reach what is written. A
forward on top of a cache that is no `generate`'s counts as written.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.errors import DataError, HookError
from moe_lens.model.state import ForwardState
from moe_lens.text.spans import TextSpan, span_mask

Positions = Any
"""See this module's first lines; `checked_positions` refuses what is none of these."""

PHASES: Final = ("prompt", "generated")


def checked_positions(positions: Positions) -> Positions:
    """The positions as None, a phase, a tuple of columns, a bool tensor on the CPU, or a span.

    >>> checked_positions([0, -1])
    (0, -1)

    Raises:
        DataError: what is none of these; an empty list; a mask of more than two dimensions.
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
    """Which of the tokens that are running the positions mean (checked ones), on the CPU.

    Raises:
        HookError: a column outside the prompt, a mask of another shape, a span that cannot be found here.
    """
    columns = state.columns(n_pos)
    in_prompt = (columns < state.n_prompt).expand(n_rows, n_pos)
    if positions is None:
        return torch.ones_like(in_prompt)
    if isinstance(positions, str) and positions in PHASES:
        return in_prompt if positions == "prompt" else ~in_prompt
    if isinstance(positions, tuple):
        return torch.isin(columns, _columns(positions, state)).expand(n_rows, n_pos)
    if isinstance(positions, Tensor):
        over_prompt = _fitting(positions, state, n_rows)
    elif not bool(in_prompt.any()):
        return torch.zeros_like(in_prompt)
    else:
        key = ("span", id(positions))
        if key not in state.memory:
            state.memory[key] = _found(positions, state, n_rows)
        over_prompt = state.memory[key]
    chosen = torch.zeros(n_rows, n_pos, dtype=torch.bool)
    here = columns[columns < state.n_prompt]
    chosen[:, : len(here)] = over_prompt[:, here]
    return chosen


def _columns(positions: tuple[int, ...], state: ForwardState) -> Tensor:
    n_prompt = state.n_prompt
    last = None if state.generating or state.offset else n_prompt - 1
    for position in positions:
        if position < -n_prompt or (last is not None and position > last):
            raise HookError(f"positions names column {position}; this prompt has {n_prompt} columns.")
    return torch.tensor([position % n_prompt if position < 0 else position for position in positions])


def _fitting(mask: Bool[Tensor, "..."], state: ForwardState, n_rows: int) -> Bool[Tensor, "batch pos"]:
    rows = mask if mask.ndim == 2 else mask[None]
    fitting = state.by_prompt(rows, n_rows)
    if fitting is None or rows.shape[1] != state.n_prompt:
        raise HookError(
            f"The mask given as positions has shape {tuple(mask.shape)}; this run has {n_rows} prompts of "
            f"{state.n_prompt} columns, padding included. span_mask(model, prompts, span) gives masks that "
            "fit."
        )
    return fitting


def _found(span: Any, state: ForwardState, n_rows: int) -> Bool[Tensor, "batch pos"]:
    """A span in the prompts that are running."""
    if state.tokens is None or state.bridge is None or state.offset:
        raise HookError(
            f"positions={span!r} has to be found in a prompt's tokens, and this run was given none; give a "
            "mask."
        )
    if state.texts is not None and len(state.texts) != n_rows:
        raise HookError(f"positions={span!r}: {len(state.texts)} prompts run as {n_rows} rows; give a mask.")
    tokens = state.tokens[:, : state.n_prompt].cpu()
    if state.texts is not None:
        prompts: Any = state.texts
        own = torch.stack([_own_columns(state, *each) for each in zip(prompts, tokens, strict=True)])
    else:
        mask = state.own_tokens()
        own = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, : state.n_prompt].cpu()
        prompts = [row[kept] for row, kept in zip(tokens, own, strict=True)]
    try:
        found = span_mask(state.bridge, prompts, span, padding_side="left").cpu()
    except DataError as error:
        raise HookError(
            f"positions={span!r} cannot be found in this run: {error} A mask always works: "
            "positions=span_mask(model, prompts, span). (The phases are 'prompt' and 'generated'.)"
        ) from error
    chosen = torch.zeros_like(own)
    for row, kept in enumerate(own):
        chosen[row, kept] = found[row, found.shape[1] - int(kept.sum()) :]
    return chosen


def _own_columns(state: ForwardState, text: str, row: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
    """The columns of a text's own tokens, which must be those that run, or offsets would point elsewhere."""
    own = state.bridge.to_tokens(text, move_to_device=False, truncate=False)[0]
    free = len(row) - len(own)
    for before in (free, 0):  # padding on the left, on the right
        if free >= 0 and torch.equal(row[before : before + len(own)], own):
            columns = torch.arange(len(row))
            return (columns >= before) & (columns < before + len(own))
    raise HookError(
        f"positions: the tokens of {text!r} are not those that run (another prepend_bos?); give a mask."
    )


def _no_positions(positions: Any) -> DataError:
    return DataError(
        "positions must be None, 'prompt', 'generated', columns (an int or a list of ints, at least one), a "
        f"bool mask [pos] or [batch pos], or a span; got {positions!r}."
    )
