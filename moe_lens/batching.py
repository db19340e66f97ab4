"""From prompts to padded batches of tokens, one batch at a time.

for tokens, mask in padded_batches(model, ["a prompt", "another, longer prompt"], batch_size=8):
    model(tokens, attention_mask=mask)          # [batch pos], [batch pos]; padding stands left
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import DataError
from moe_lens.moe_shape import as_index

Prompts = Any
"""A string, strings, a token tensor [pos] or [batch pos], or token sequences of any lengths. Not typed more
closely, since prompts come from users' files: what is none of these is refused with its number."""


def token_sequences(model: TransformerBridge, prompts: Prompts) -> Iterator[Int[Tensor, "pos"]]:
    """The tokens of each prompt, without padding, on the CPU; one prompt is looked at at a time.

    Strings go through `model.to_tokens`, so that they get the same BOS as in `model(prompt)`.

    Raises:
        DataError: (when its turn comes) no prompt at all, an empty prompt, one longer than the model's
            context, a token outside the vocabulary, strings without a tokenizer, or something that is
            neither text nor tokens.
    """
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.ndim == 1):
        prompts = [prompts]
    if not isinstance(prompts, Iterable) or (isinstance(prompts, Tensor) and prompts.ndim != 2):
        raise DataError(f"Prompts must be strings or token sequences; got {prompts!r}.")
    index = -1
    for index, prompt in enumerate(prompts):
        yield _tokens_of(model, index, prompt)
    if index < 0:
        raise DataError("The list of prompts is empty; give at least one prompt.")


def padded_batches(
    model: TransformerBridge, prompts: Prompts, batch_size: int
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Batches of at most `batch_size` prompts, in order, padded on the left, with masks of the real tokens.

    Raises:
        DataError: batch_size below 1, or as in `token_sequences`.
    """
    size = as_index(batch_size)
    if not size:
        raise DataError(f"batch_size must be a number from 1 on; got {batch_size!r}.")
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0  # masked out, so any token does
    sequences = token_sequences(model, prompts)
    while chunk := list(islice(sequences, size)):
        longest = max(len(sequence) for sequence in chunk)
        tokens = torch.full((len(chunk), longest), pad, dtype=torch.int64)
        mask = torch.zeros(len(chunk), longest, dtype=torch.bool)
        for row, sequence in enumerate(chunk):
            tokens[row, longest - len(sequence) :] = sequence
            mask[row, longest - len(sequence) :] = True
        yield tokens.to(model.cfg.device), mask.to(model.cfg.device)


def _tokens_of(model: TransformerBridge, index: int, prompt: Any) -> Int[Tensor, "pos"]:
    if isinstance(prompt, str):
        prompt = _tokens_of_text(model, index, prompt)
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
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.cfg.d_vocab:
        raise DataError(f"Prompt {index} has tokens outside the vocabulary of 0 to {model.cfg.d_vocab - 1}.")
    if len(tokens) > model.cfg.n_ctx:  # TransformerLens would cut a text without a word
        raise DataError(
            f"Prompt {index} has {len(tokens)} tokens, the model's context is {model.cfg.n_ctx}; shorten it."
        )
    return tokens.long()


def _tokens_of_text(model: TransformerBridge, index: int, text: str) -> Int[Tensor, "pos"]:
    if model.tokenizer is None:
        raise DataError(f"Prompt {index} is a string and the model has no tokenizer; give tokens instead.")
    if not text:
        raise DataError(f"Prompt {index} is an empty string.")
    return model.to_tokens(text, move_to_device=False, truncate=False)[0]
