"""Prompts in batches of equal length: no padding, so that no number depends on a prompt's neighbours.

    for rows, tokens in equal_length_batches(model, prompts, batch_size=8):
        ...                                 # rows: the prompts' places in the list; tokens [batch pos]
    side_by_side([(rows, values), ...], dims=(1, 2), fill=torch.nan)

The values of all batches are put back into the order of the prompts.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.text.batching import Prompts, token_sequences

Batches = list[tuple[list[int], Int[Tensor, "batch pos"]]]


def equal_length_batches(model: Model, prompts: Prompts, batch_size: int) -> Batches:
    """Batches of at most `batch_size` prompts of the same length, shortest first, on the model's device.

    Raises:
        DataError: not a model with hook points, batch_size below 1, or as in `token_sequences`.
    """
    check_hooked(model, error=DataError)
    size = whole_number(batch_size, "batch_size", least=1)
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for row, sequence in enumerate(token_sequences(model, prompts)):
        by_length.setdefault(len(sequence), []).append((row, sequence))
    batches: Batches = []
    for length in sorted(by_length):
        same = by_length[length]
        for start in range(0, len(same), size):
            rows, sequences = zip(*same[start : start + size], strict=True)
            batches.append((list(rows), torch.stack(sequences).to(model.cfg.device)))
    return batches


def positions(pos: Any, lengths: Sequence[int]) -> list[int]:
    """`pos`, one number or one a prompt, as places from the start; negative ones count from the end.

    Raises:
        DataError: not as many as prompts, or outside a prompt.
    """
    given = pos.tolist() if hasattr(pos, "tolist") else pos  # a tensor, an array
    places: list[Any] = list(given) if isinstance(given, list | tuple) else [given] * len(lengths)
    if len(places) != len(lengths):
        raise DataError(
            f"pos must be one number, or one a prompt; got {len(places)} for {len(lengths)} prompts."
        )
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        if not isinstance(place, int) or isinstance(place, bool) or not -length <= place < length:
            raise DataError(
                f"pos must be a whole number from {-length} to {length - 1} for prompt {row}, which has "
                f"{length} tokens; got {place!r}."
            )
    return [place % length for place, length in zip(places, lengths, strict=True)]


def side_by_side(
    pieces: Iterable[tuple[Sequence[int], Tensor]], dims: tuple[int, int | None], fill: float | int
) -> Tensor:
    """Results of batches as one tensor on the CPU, in the order of the prompts.

    Args:
        pieces: of each batch the prompts' places in the list, and the tensor.
        dims: which dimensions are batch and position (None: there is no position).
        fill: what shorter prompts have on the left.
    """
    pieces = [(rows, piece.detach().cpu()) for rows, piece in pieces]
    batch, pos = dims
    first = pieces[0][1]
    size = list(first.shape)
    size[batch] = sum(len(rows) for rows, _ in pieces)
    if pos is not None:
        size[pos] = max(piece.shape[pos] for _, piece in pieces)
    whole = torch.full(size, fill, dtype=first.dtype)
    for rows, piece in pieces:
        place: list[Any] = [slice(None)] * len(size)
        if pos is not None:
            place[pos] = slice(size[pos] - piece.shape[pos], None)
        place[batch] = list(rows)
        whole[tuple(place)] = piece
    return whole
