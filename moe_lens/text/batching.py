"""From prompts to padded batches of tokens, one batch at a time.

for tokens, mask in padded_batches(model, ["a prompt", "another, longer prompt"], batch_size=8):
    model(tokens, attention_mask=mask)          # [batch pos], [batch pos]; padding stands left
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.checks import as_index, looks_padded
from moe_lens.errors import DataError, warn
from moe_lens.text.prompts import Message, Prompt, as_prompt, is_chat, render


@runtime_checkable
class TextModel(Protocol):
    """What is asked of a model where its text is read: a `HookedMoE` has it, as any TransformerBridge."""

    @property
    def tokenizer(self) -> Any:
        """Hugging Face's tokenizer, or None."""

    @property
    def cfg(self) -> Any:
        """TransformerLens' config: d_vocab, n_ctx, device."""

    @property
    def to_tokens(self) -> Callable[..., Any]:
        """Strings to int64 tokens [batch pos], with the BOS that `model(prompt)` prepends."""
        ...


Prompts = Any
"""A string, a chat (a list of messages), a `Prompt`, or any number of them; a token tensor [pos] or [batch
pos], or token sequences of any lengths. Not typed more closely, since prompts come from users' files: what is
none of these is refused with its number."""

Item = TypeVar("Item")


def token_sequences(model: TextModel, prompts: Prompts) -> Iterator[Int[Tensor, "pos"]]:
    """The tokens of each prompt, without padding, on the CPU; one prompt is looked at at a time.

    Strings go through `model.to_tokens`, so that they get the same BOS as in `model(prompt)`; chats through
    the tokenizer's chat template, which writes its own special tokens. Words outside the vocabulary give a
    warning.

    Raises:
        DataError: (when its turn comes) no prompt at all, an empty prompt, one longer than the model's
            context, a token outside the vocabulary, text without a tokenizer, a chat without a chat template,
            or something that is neither text nor tokens.
    """
    return (tokens for _, tokens in prompts_with_tokens(model, prompts))


def prompts_with_tokens(
    model: TextModel, prompts: Prompts
) -> Iterator[tuple[Prompt | None, Int[Tensor, "pos"]]]:
    """Like `token_sequences`, each with its `Prompt`; None where the prompt was given as tokens."""
    if _is_single(prompts):
        prompts = [prompts]
    if (
        not isinstance(prompts, Iterable)
        or isinstance(prompts, Mapping | Message)
        or (isinstance(prompts, Tensor) and prompts.ndim != 2)
    ):
        raise DataError(
            f"Prompts must be strings, chats (each a list of messages) or token sequences; got {prompts!r}."
        )
    if looks_padded(model.tokenizer, prompts):  # a tensor cannot say so; the user should know
        warn(
            "Some rows of this token tensor begin or end with the padding token; all tokens of a tensor are "
            "taken for prompts' own. Give text, or a list of sequences without padding."
        )
    index, unknown = -1, _unknown_token(model)
    for index, given in enumerate(prompts):
        prompt = _prompt_of(index, given)
        tokens = given if prompt is None else _tokens_of_prompt(model, index, prompt)
        tokens = _checked_tokens(model, index, tokens)
        if prompt is not None and unknown is not None and (count := int((tokens == unknown).sum())):
            _warn_of_unknown(model, index, prompt, unknown, count)
            unknown = None  # once is enough
        yield prompt, tokens
    if index < 0:
        raise DataError("The list of prompts is empty; give at least one prompt.")


def _unknown_token(model: TextModel) -> int | None:
    """The token that stands for words outside the vocabulary; None where it stands for other things too."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    others = ("bos_token_id", "eos_token_id", "pad_token_id")
    return None if unknown in {getattr(model.tokenizer, other, None) for other in others} else unknown


def _warn_of_unknown(model: TextModel, index: int, prompt: Prompt, unknown: int, count: int) -> None:
    text = prompt.content if isinstance(prompt.content, str) else " ".join(m.content for m in prompt.content)
    words = [word for word in dict.fromkeys(text.split()) if unknown in _without_special(model, word)]
    named = ", ".join(map(repr, words[:5])) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
    warn(
        f"Prompt {index} has words outside the tokenizer's vocabulary ({named or 'somewhere within words'}): "
        f"{count} of its tokens are {model.tokenizer.unk_token!r}, all alike to the model. What it knows is "
        "in model.tokenizer.get_vocab(). Further prompts may have such words; this warning comes once a call."
    )


def _without_special(model: TextModel, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def how_many(prompts: Prompts) -> int | None:
    """The number of prompts; None for a stream, which does not know it."""
    if _is_single(prompts):
        return 1
    return len(prompts) if hasattr(prompts, "__len__") and getattr(prompts, "ndim", 1) else None


def padded_batches(
    model: TextModel, prompts: Prompts, batch_size: int
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Batches of at most `batch_size` prompts, in order, padded on the left, with masks of the real tokens.

    Raises:
        DataError: batch_size below 1, or as in `token_sequences`.
    """
    for chunk in chunks(token_sequences(model, prompts), batch_size):
        yield pad_sequences(model, chunk)


def chunks(items: Iterator[Item], batch_size: int) -> Iterator[list[Item]]:
    """Lists of at most `batch_size` items, in order. Raises DataError for a batch_size below 1."""
    size = as_index(batch_size)
    if not size:
        raise DataError(f"batch_size must be a number from 1 on; got {batch_size!r}.")
    while chunk := list(islice(items, size)):
        yield chunk


def pad_sequences(
    model: TextModel, sequences: Sequence[Int[Tensor, "_"]], side: str = "left"
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """(tokens, mask of the real ones) as long as the longest sequence, on the model's device."""
    pad = getattr(model.tokenizer, "pad_token_id", None) or 0  # masked out, so any token does
    longest = max(len(sequence) for sequence in sequences)
    tokens = torch.full((len(sequences), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        tokens[row, start : start + len(sequence)] = sequence
        mask[row, start : start + len(sequence)] = True
    return tokens.to(model.cfg.device), mask.to(model.cfg.device)


def _is_single(prompts: Any) -> bool:
    is_sequence = isinstance(prompts, Tensor) and prompts.ndim == 1
    return is_sequence or isinstance(prompts, str | Prompt) or is_chat(prompts)


def _prompt_of(index: int, given: Any) -> Prompt | None:
    """None for tokens, and for what will be refused as tokens."""
    if not isinstance(given, str | Prompt) and not is_chat(given):
        return None
    if isinstance(given, str) and not given:
        raise DataError(f"Prompt {index} is an empty string.")
    try:
        return as_prompt(given)
    except DataError as error:
        raise DataError(f"Prompt {index}: {error}") from error


def _tokens_of_prompt(model: TextModel, index: int, prompt: Prompt) -> Any:
    if model.tokenizer is None:
        raise DataError(f"Prompt {index} is text and the model has no tokenizer; give tokens instead.")
    if isinstance(prompt.content, str):
        return model.to_tokens(prompt.content, move_to_device=False, truncate=False)[0]
    try:
        text = render(model.tokenizer, prompt, names=()).text
    except DataError as error:
        raise DataError(f"Prompt {index}: {error}") from error
    return _without_special(model, text)


def _checked_tokens(model: TextModel, index: int, prompt: Any) -> Int[Tensor, "pos"]:
    try:
        tokens = torch.as_tensor(prompt).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Prompt {index} is neither a string, a chat nor a sequence of tokens: {prompt!r}."
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
