"""From prompts to padded batches of tokens, one batch at a time.

    for tokens, mask in padded_batches(model, ["a prompt", "another, longer prompt"], batch_size=8):
        model(tokens, **padding(mask))          # [batch pos], [batch pos]; padding is on the left

Prompts are read one at a time, so that a generator of any length will do. Where no order of batches is
promised (`Limits`), prompts of like length share one, within a window of the stream.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.checks import check_text, pads_exactly, short, whole_number
from moe_lens.encoding import (
    encoded_rows,
    is_chat,
    is_encoding,
    padded_rows,
    tensor_of,
    without_numpy,
    without_special,
)
from moe_lens.errors import DataError, warn
from moe_lens.text.prompts import Message, Prompt, as_prompt, render
from moe_lens.text.token_rows import check_padding, only_row, rows_of, without_padding


@runtime_checkable
class TextModel(Protocol):
    """What reading text needs of a model: `HookedMoE` and `RoutedModel` have it, like every bridge."""

    @property
    def tokenizer(self) -> Any:
        """Hugging Face's tokenizer, or None."""

    @property
    def cfg(self) -> Any:
        """Its config: d_vocab, n_ctx, device, by TransformerLens' names."""

    @property
    def to_tokens(self) -> Callable[..., Any]:
        """Strings to int64 tokens [batch pos], with the BOS that `model(prompt)` prepends."""
        ...


Prompts = Any
"""A string, a chat (a list of messages), a `Prompt`, or any number of them; a token tensor or array [pos] or
[batch pos], or token sequences of any lengths; a tokenizer's output (a `BatchEncoding` or dictionary of
"input_ids" and "attention_mask", padded on either side), or one of these a prompt. Not typed more closely,
since prompts come from users' files; anything else raises a DataError with the prompt's number."""

Item = TypeVar("Item")


def token_sequences(model: TextModel, prompts: Prompts) -> Iterator[Int[Tensor, "pos"]]:
    """The tokens of each prompt, without padding, on the CPU; prompts are read one at a time.

    Strings go through `model.to_tokens`, so that they get the same BOS as in `model(prompt)`; chats through
    the tokenizer's chat template, which writes its own special tokens. Tokens that an `attention_mask` masks
    are left out, and without a mask those padding tokens at a prompt's ends that stand for nothing else.
    Words outside the vocabulary give a warning.

    >>> from moe_lens import organisms
    >>> [len(tokens) for tokens in token_sequences(organisms.load("specialised"), ["Question : what", "the"])]
    [4, 2]

    Raises:
        DataError: no prompts, an empty prompt, one longer than the model's context, a token outside the
            vocabulary, text without a tokenizer or with half a character (a lone surrogate), a chat without a
            chat template, or something that is neither text nor tokens. Raised when that prompt's turn comes.
        DataError: rows of one length (a tensor or array [batch pos], or lists) that begin or end with
            different numbers of a padding token which stands for something else, too (it is the EOS, say):
            which of them are padding cannot be known.
    """
    return (tokens for _, tokens in prompts_with_tokens(model, prompts))


def prompts_with_tokens(
    model: TextModel, prompts: Prompts
) -> Iterator[tuple[Prompt | None, Int[Tensor, "pos"]]]:
    """Like `token_sequences`, each after its `Prompt`, which is None if the prompt was given as tokens."""
    prompts = without_numpy(prompts)
    is_masked = is_encoding(prompts)
    if is_masked:
        prompts = rows_of(model.tokenizer, prompts, "The prompts' encoding")
    elif _is_single(prompts):
        prompts = [prompts]
    if (
        not isinstance(prompts, Iterable)
        or isinstance(prompts, Mapping | Message)
        or (isinstance(prompts, Tensor) and prompts.ndim != 2)
    ):
        raise DataError(
            "Prompts must be strings, chats (each a list of messages), token sequences or a tokenizer's "
            f"output; got {short(prompts)}."
        )
    if not is_masked:
        check_padding(model.tokenizer, prompts)
    index, unknown, cfg = -1, _unknown_token(model), model.cfg  # read once: it costs as much as tokenising
    for index, given in enumerate(prompts):
        prompt = _prompt_of(index, given)
        if prompt is None:
            tokens = _given_tokens(model, index, given, is_masked)
        else:
            tokens = _tokens_of_prompt(model, index, prompt)
        _check_tokens(cfg, index, tokens)
        if prompt is not None and unknown is not None and (count := int((tokens == unknown).sum())):
            _warn_of_unknown(model, index, prompt, unknown, count)
            unknown = None  # one warning is enough
        yield prompt, tokens.long()
    if index < 0:
        raise DataError("The list of prompts is empty; give at least one prompt.")


def _unknown_token(model: TextModel) -> int | None:
    """The token for words outside the vocabulary; None if the same token also means something else."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    others = ("bos_token_id", "eos_token_id", "pad_token_id")
    return None if unknown in {getattr(model.tokenizer, other, None) for other in others} else unknown


def _warn_of_unknown(model: TextModel, index: int, prompt: Prompt, unknown: int, count: int) -> None:
    text = prompt.content if isinstance(prompt.content, str) else " ".join(m.content for m in prompt.content)
    words = [
        word for word in dict.fromkeys(text.split()) if unknown in without_special(model.tokenizer, word)
    ]
    named = ", ".join(map(repr, words[:5])) + (f" and {len(words) - 5} more" if len(words) > 5 else "")
    warn(
        f"Prompt {index} has words outside the tokenizer's vocabulary ({named or 'somewhere within words'}): "
        f"{count} of its tokens are {model.tokenizer.unk_token!r}, all alike to the model. What it knows is "
        "in model.tokenizer.get_vocab(). Further prompts may have such words; this warning comes once a call."
    )


def how_many(prompts: Prompts) -> int | None:
    """The number of prompts; None for a generator, whose length is not known."""
    prompts = without_numpy(prompts)
    if is_encoding(prompts):
        return len(encoded_rows(prompts))
    if _is_single(prompts):
        return 1
    return len(prompts) if hasattr(prompts, "__len__") and getattr(prompts, "ndim", 1) else None


def padded_batches(
    model: TextModel, prompts: Prompts, batch_size: int
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Batches of at most `batch_size` prompts, in order, padded on the left, with masks of the real tokens.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> [mask.long().tolist() for _, mask in padded_batches(model, ["Question : what", "the"], batch_size=2)]
    [[[1, 1, 1, 1], [0, 0, 1, 1]]]

    Raises:
        DataError: batch_size below 1, or as in `token_sequences`.
    """
    for chunk in chunks_to_pad(model, token_sequences(model, prompts), batch_size, len):
        yield pad_sequences(model, chunk)


def chunks(items: Iterator[Item], batch_size: int) -> Iterator[list[Item]]:
    """Lists of at most `batch_size` items, in order. Raises DataError for a batch_size below 1."""
    size = whole_number(batch_size, "batch_size", least=1)
    while chunk := list(islice(items, size)):
        yield chunk


def chunks_to_pad(
    model: TextModel, items: Iterator[Item], batch_size: int, length: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """`chunks` of what will run together; in a model that padding disturbs, each of one length."""
    for chunk in chunks(items, batch_size):
        if pads_exactly(model):
            yield chunk
        else:
            yield from (list(alike) for _, alike in groupby(chunk, length))


DEFAULT_TOKENS: Final = {"cpu": 1024, "cuda": 16384}
"""Tokens a batch: more do not fit a CPU's caches, fewer do not fill a GPU."""


def default_tokens(model: TextModel | None) -> int:
    """`DEFAULT_TOKENS` for the model's device; None: a CPU."""
    kind = "cpu" if model is None else torch.device(model.cfg.device).type
    return DEFAULT_TOKENS.get(kind, DEFAULT_TOKENS["cuda"])


WINDOW: Final = 32
"""How many batches' worth of prompts are read before the first of them runs."""


@dataclass(frozen=True)
class Limits:
    """How large a batch of prompts of like length may be.

    >>> limits = Limits.of(batch_size=2, batch_tokens=None)
    >>> limits.batches([9, 3, 8, 4])                         # the prompts of each batch, shortest first
    [[1, 3], [2, 0]]
    >>> Limits.of(None, batch_tokens=16).batches([9, 3, 8, 4])
    [[1, 3], [2], [0]]

    Attributes:
        prompts: at most so many; None without limit.
        tokens: at most so many, padding included, unless one prompt is longer; None without limit.
        one_length: only prompts of one length, so that nothing is padded (see `pads_exactly`).
    """

    prompts: int | None
    tokens: int | None
    one_length: bool = False

    @classmethod
    def of(cls, batch_size: Any, batch_tokens: Any, model: TextModel | None = None) -> "Limits":
        """Of what a user gives; where that is nothing, `DEFAULT_TOKENS` for the model's device (None: a CPU).

        Raises DataError for anything but whole numbers.
        """
        one_length = model is not None and not pads_exactly(model)
        if batch_size is None and batch_tokens is None:
            return cls(None, default_tokens(model), one_length)
        prompts, tokens = (
            None if number is None else whole_number(number, name, least=1)
            for name, number in (("batch_size", batch_size), ("batch_tokens", batch_tokens))
        )
        return cls(prompts, tokens, one_length)

    def windows(self, items: Iterable[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
        """The items in order, `WINDOW` full batches' worth at a time."""
        window: list[Item] = []
        n_tokens = 0
        for item in items:
            window.append(item)
            n_tokens += length(item)
            if (self.prompts is not None and len(window) >= WINDOW * self.prompts) or (
                self.tokens is not None and n_tokens >= WINDOW * self.tokens
            ):
                yield window
                window, n_tokens = [], 0
        if window:
            yield window

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which of these prompts share a batch: by length, equal ones in the order given."""
        batches: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
            size = len(batches[-1]) + 1 if batches else 1
            too_many = self.prompts is not None and size > self.prompts
            too_long = self.tokens is not None and size * lengths[number] > self.tokens
            other = self.one_length and batches and lengths[batches[-1][0]] != lengths[number]
            if batches and not too_many and not too_long and not other:
                batches[-1].append(number)
            else:
                batches.append([number])
        return batches


def pad_sequences(
    model: TextModel, sequences: Sequence[Int[Tensor, "_"]], side: str = "left"
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """(tokens, mask of the real ones) as long as the longest sequence, on the model's device.

    Warns where that changes what the model computes.
    """
    if not pads_exactly(model) and len({len(sequence) for sequence in sequences}) > 1:
        warn(
            f"{type(model).__name__}: this model's numbers change where prompts are padded, in Hugging "
            "Face's own forward. Give prompts of one length, or one at a time."
        )
    tokens, mask = padded(model, sequences, side)
    return tokens.to(model.cfg.device), mask.to(model.cfg.device)


def padded(
    model: TextModel, sequences: Sequence[Int[Tensor, "_"]], side: str
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """`pad_sequences`, on the CPU."""
    return padded_rows(sequences, getattr(model.tokenizer, "pad_token_id", None), side)


def padding(mask: Bool[Tensor, "batch pos"]) -> dict[str, Any]:
    """What a forward needs to be told of padding: {"attention_mask": ...}, or nothing if there is none.

    Without a mask the run is the very one that `model(tokens)` makes, bit for bit.

    >>> import torch
    >>> padding(torch.tensor([[True, True]])), padding(torch.tensor([[False, True]]))
    ({}, {'attention_mask': tensor([[0, 1]])})

    Args:
        mask: True on prompts' own tokens, False on padding.
    """
    return {} if bool(mask.all()) else {"attention_mask": mask.long()}


def _is_single(prompts: Any) -> bool:
    is_sequence = isinstance(prompts, Tensor) and prompts.ndim == 1
    return is_sequence or isinstance(prompts, str | Prompt) or is_chat(prompts)


def _prompt_of(index: int, given: Any) -> Prompt | None:
    """None for tokens, and for anything that will raise when it is read as tokens."""
    if not isinstance(given, str | Prompt) and not is_chat(given):
        return None
    if isinstance(given, str) and not given:
        raise DataError(f"Prompt {index} is an empty string.")
    try:
        return as_prompt(given)
    except DataError as error:
        raise DataError(f"Prompt {index}: {error}") from error


def _tokens_of_prompt(model: TextModel, index: int, prompt: Prompt) -> Tensor:
    if model.tokenizer is None:
        raise DataError(f"Prompt {index} is text and the model has no tokenizer; give tokens instead.")
    if isinstance(prompt.content, str):
        check_text(prompt.content, f"Prompt {index}")
        return model.to_tokens(prompt.content, move_to_device=False, truncate=False)[0]
    try:
        return torch.tensor(without_special(model.tokenizer, render(model.tokenizer, prompt, names=()).text))
    except DataError as error:
        raise DataError(f"Prompt {index}: {error}") from error


def _given_tokens(model: TextModel, index: int, prompt: Any, is_masked: bool) -> Tensor:
    if is_encoding(prompt):
        return only_row(model.tokenizer, index, prompt)
    try:
        tokens = tensor_of(prompt).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Prompt {index} is neither a string, a chat nor a sequence of tokens: {prompt!r}."
        ) from error
    return tokens if is_masked else without_padding(model.tokenizer, tokens)


def _check_tokens(cfg: Any, index: int, tokens: Tensor) -> None:
    if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise DataError(
            f"Prompt {index} must be a non-empty sequence of token numbers; got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= cfg.d_vocab:
        raise DataError(f"Prompt {index} has tokens outside the vocabulary of 0 to {cfg.d_vocab - 1}.")
    if len(tokens) > cfg.n_ctx:  # TransformerLens would cut the text silently
        raise DataError(
            f"Prompt {index} has {len(tokens)} tokens, the model's context is {cfg.n_ctx}; shorten it."
        )
