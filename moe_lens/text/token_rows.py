"""Prompts that are given as tokens: which of them are padding.

rows_of(tokenizer, tokenizer(texts, padding=True))      # as attention_mask says
without_padding(tokenizer, [[0, 0, 5], [6, 7, 8]])      # [[5], [6, 7, 8]] if 0 does nothing but pad
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.checks import may_be_padded, padding_at_ends, pads_only
from moe_lens.encoding import encoded_rows
from moe_lens.errors import DataError

_INTEGERS: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def rows_of(tokenizer: Any, encoding: Mapping[str, Any]) -> list[Int[Tensor, "_"]]:
    """The tokens of each prompt in a tokenizer's output; where it has no mask, as `without_padding`.

    Raises DataError as that, or as `encoded_rows`.
    """
    rows = encoded_rows(encoding, "The prompts' encoding")
    if encoding.get("attention_mask") is not None:
        return rows
    return [torch.as_tensor(row) for row in without_padding(tokenizer, [row.tolist() for row in rows])]


def without_padding(tokenizer: Any, prompts: Any) -> Any:
    """Rows of one length without the padding at their ends; other prompts as they are.

    Raises DataError where the padding token stands for something else, too, and rows differ in how many of it
    they begin or end with.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    rows = _rectangle(prompts)
    if pad is None or rows is None or not bool((rows[:, [0, -1]] == pad).any()):
        return prompts
    before, after = padding_at_ends(pad, rows)
    if not pads_only(tokenizer):
        if may_be_padded(tokenizer, rows):
            raise DataError(
                f"Some rows of these tokens begin or end with {tokenizer.pad_token!r}, which pads and "
                "stands for something else, too, so what is padding cannot be known. Give the tokenizer's "
                'whole output ("input_ids" and "attention_mask"), text, or sequences without padding.'
            )
        return prompts
    ends = rows.shape[1] - after
    return [row[int(start) : int(stop)] for row, start, stop in zip(rows, before, ends, strict=True)]


def _rectangle(prompts: Any) -> Int[Tensor, "batch pos"] | None:
    """A token tensor [batch pos], or lists that would make one; None for anything else.

    A list of tensors is none: whoever has cut rows apart knows where they end.
    """
    if isinstance(prompts, Tensor):
        return prompts.cpu() if prompts.dtype in _INTEGERS and prompts.numel() else None
    if not isinstance(prompts, list | tuple) or len(prompts) < 2:
        return None
    if not all(isinstance(row, list | tuple) and len(row) for row in prompts):
        return None
    if len({len(row) for row in prompts}) > 1:
        return None
    try:
        found = [torch.as_tensor(row).cpu() for row in prompts]
    except (TypeError, ValueError, RuntimeError):
        return None
    are_tokens = all(row.ndim == 1 and row.dtype in _INTEGERS for row in found)
    return torch.stack(found) if are_tokens else None


def only_row(index: int, encoding: Mapping[str, Any]) -> Int[Tensor, "pos"]:
    """The tokens of an encoding of one prompt, which stands among others. Raises DataError for any other."""
    rows = encoded_rows(encoding, f"Prompt {index}")
    if len(rows) != 1:
        raise DataError(
            f"Prompt {index} is the encoding of {len(rows)} prompts; give that alone, or one for each prompt."
        )
    return rows[0]
