"""Prompts that are given as tokens: which of them are padding.

rows_of(tokenizer, tokenizer(texts, padding=True))      # as attention_mask says
check_padding(tokenizer, [[0, 0, 5], [6, 7, 8]])        # refuses rows in which 0 may pad or mean something
without_padding(tokenizer, torch.tensor([0, 0, 5]))     # tensor([5]) if 0 does nothing but pad
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from moe_lens.checks import may_be_padded, padding_at_ends, pads_only
from moe_lens.encoding import encoded_rows, tensor_of
from moe_lens.errors import DataError


def rows_of(tokenizer: Any, encoding: Mapping[str, Any], what: str) -> list[Int[Tensor, "_"]]:
    """The tokens of each prompt in a tokenizer's output; where it has no mask, without padding.

    Raises DataError as `check_padding`, or as `encoded_rows`.
    """
    rows = encoded_rows(encoding, what)
    if encoding.get("attention_mask") is not None:
        return rows
    check_padding(tokenizer, [row.tolist() for row in rows])
    return [without_padding(tokenizer, row) for row in rows]


def without_padding(tokenizer: Any, tokens: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The tokens [pos] of a prompt without padding at their ends, where the padding token only pads.

    None are left of a row of nothing else. What is no row of tokens stays as it is.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    is_row = tokens.ndim == 1 and len(tokens) > 0 and not tokens.is_floating_point()
    if not is_row or not pads_only(tokenizer) or pad not in (int(tokens[0]), int(tokens[-1])):
        return tokens
    before, after = (int(number) for number in padding_at_ends(pad, tokens[None]))
    return tokens[before : len(tokens) - after]


def as_they_stand(rows: Iterable[Int[Tensor, "_"]]) -> list[dict[str, Tensor]]:
    """Rows of tokens as prompts of which nothing is taken for padding."""
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def check_padding(tokenizer: Any, prompts: Any) -> None:
    """Refuse rows of one length of which it cannot be known how much of them is padding.

    Raises DataError where the padding token stands for something else, too, and rows differ in how many of it
    they begin or end with.
    """
    if pads_only(tokenizer):
        return
    rows = _rectangle(prompts)
    if rows is not None and may_be_padded(tokenizer, rows):
        raise DataError(
            f"Some rows of these tokens begin or end with {tokenizer.pad_token!r}, which pads and "
            "stands for something else, too, so what is padding cannot be known. Give the tokenizer's "
            'whole output ("input_ids" and "attention_mask"), text, or sequences without padding.'
        )


def _rectangle(prompts: Any) -> Int[Tensor, "batch pos"] | None:
    """A token tensor [batch pos], or lists that would make one; None for anything else.

    A list of tensors is none: whoever has cut rows apart knows where they end.
    """
    if isinstance(prompts, Tensor):
        return _tokens(prompts) if prompts.numel() else None
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or len(prompts) < 2:
        return None
    if not all(isinstance(row, list | tuple) and len(row) for row in prompts):
        return None
    if len({len(row) for row in prompts}) > 1:
        return None
    try:
        found = [_tokens(row) for row in prompts]
    except (TypeError, ValueError, RuntimeError):
        return None
    rows = [row for row in found if row is not None and row.ndim == 1]
    return torch.stack(rows) if len(rows) == len(found) else None


def _tokens(numbers: Any) -> Int[Tensor, "..."] | None:
    """On the CPU; None where these are no integers."""
    tokens = tensor_of(numbers)
    return tokens.cpu() if tokens.dtype in (torch.int32, torch.int64) else None


def only_row(tokenizer: Any, index: int, encoding: Mapping[str, Any]) -> Int[Tensor, "pos"]:
    """The tokens of an encoding of one prompt, which stands among others. Raises DataError for any other."""
    rows = rows_of(tokenizer, encoding, f"Prompt {index}")
    if len(rows) != 1:
        raise DataError(
            f"Prompt {index} is the encoding of {len(rows)} prompts; give that alone, or one for each prompt."
        )
    return rows[0]
