"""From prompts to padded batches of tokens.

for tokens, mask in padded_batches(model, ["a prompt", "another, longer prompt"], batch_size=8):
    model(tokens, attention_mask=mask)          # [batch pos], [batch pos]; padding stands left
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import DataError

Prompts = Any
"""A string, a list of strings, a token tensor [pos] or [batch pos], or a list of token sequences."""


def token_sequences(model: TransformerBridge, prompts: Prompts) -> list[Int[Tensor, "pos"]]:
    """The tokens of each prompt, without padding, on the CPU.

    Strings go through `model.to_tokens`, so that they get the same BOS as in `model(prompt)`.

    Raises:
        DataError: no prompt at all, an empty prompt, a text longer than the model's context, strings
            without a tokenizer, or something that is neither text nor tokens.
    """
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1):
        prompts = [prompts]
    if not isinstance(prompts, Iterable) or (isinstance(prompts, Tensor) and prompts.ndim != 2):
        raise DataError(f"Prompts must be strings or token sequences; got {prompts!r}.")
    sequences = [_tokens_of(model, index, prompt) for index, prompt in enumerate(prompts)]
    if not sequences:
        raise DataError("The list of prompts is empty; give at least one prompt.")
    return sequences


def padded_batches(
    model: TransformerBridge, sequences: Sequence[Int[Tensor, "_"]], batch_size: int
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Batches of at most `batch_size` sequences, in order, padded on the left, with masks of the real tokens.

    Raises:
        DataError: batch_size below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1; got {batch_size}.")
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0  # masked out, so any token does
    for start in range(0, len(sequences), batch_size):
        chunk = sequences[start : start + batch_size]
        longest = max(len(sequence) for sequence in chunk)
        tokens = torch.full((len(chunk), longest), pad, dtype=torch.int64)
        mask = torch.zeros(len(chunk), longest, dtype=torch.bool)
        for row, sequence in enumerate(chunk):
            tokens[row, longest - len(sequence) :] = sequence
            mask[row, longest - len(sequence) :] = True
        yield tokens.to(model.cfg.device), mask.to(model.cfg.device)


def _tokens_of(model: TransformerBridge, index: int, prompt: Any) -> Int[Tensor, "pos"]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise DataError(
                f"Prompt {index} is a string and the model has no tokenizer; give tokens instead."
            )
        prompt = model.to_tokens(prompt, move_to_device=False, truncate=False)[0]
        if len(prompt) > model.cfg.n_ctx:  # TransformerLens would cut it without a word
            raise DataError(
                f"Prompt {index} has {len(prompt)} tokens, the model's context {model.cfg.n_ctx}; shorten it."
            )
    try:
        tokens = torch.as_tensor(prompt).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Prompt {index} is neither a string nor a sequence of tokens: {prompt!r}."
        ) from error
    if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise DataError(
            f"Prompt {index} must be a non-empty sequence of token numbers; got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}."
        )
    return tokens.long()
