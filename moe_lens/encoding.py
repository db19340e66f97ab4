"""From a prompt to token numbers: the one place that says what is prepended.

    text_ids(tokenizer, "a text")                        # as tokenizer("a text") gives them
    text_ids(tokenizer, "a text", prepend_bos=False)     # nothing prepended; True: one BOS
    prompt_ids(tokenizer, [{"role": "user", "content": "Why?"}])     # a chat, through the chat template

A BOS is never doubled: a text that begins with the tokenizer's BOS, such as a chat that was rendered to a
string, keeps its own and gets no second one, with a warning where one would have been prepended.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.checks import check_text
from moe_lens.errors import DataError, warn

_OTHER_INTEGERS: Final = (
    *(torch.uint8, torch.int8, torch.int16),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def adds_bos(tokenizer: Any) -> bool:
    """Whether `tokenizer(text)` begins with a BOS that is not in the text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    whole, alone = list(tokenizer("a")["input_ids"]), without_special(tokenizer, "a")
    return whole[:1] == [bos] and whole[1 : 1 + len(alone)] == alone


def without_special(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone: no BOS before it and no EOS after it. Raises DataError as `check_text`."""
    check_text(text, "The text")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_ids(tokenizer: Any, text: str, prepend_bos: bool | None = None) -> list[int]:
    """The tokens of a text.

    Args:
        prepend_bos: None as the tokenizer does by itself; True one BOS, False none. Neither touches a BOS
            that the text has itself.

    Raises:
        DataError: prepend_bos=True, and the tokenizer has no BOS; a text with half a character.
    """
    check_text(text, "The text")
    ids, bos = list(tokenizer(text)["input_ids"]), getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        if prepend_bos:
            raise DataError("prepend_bos=True, but this tokenizer has no BOS token.")
        return ids
    adds = ids[:1] == [bos] and adds_bos(tokenizer)
    body = ids[1:] if adds else ids
    if not (adds if prepend_bos is None else prepend_bos):
        return body
    if body[:1] == [bos]:
        warn_of_own_bos(tokenizer)
        return body
    return [bos, *body]


def warn_of_own_bos(tokenizer: Any) -> None:
    """Say that a text begins with the BOS. (Python shows a warning once for each line of the user's.)"""
    warn(
        f"A text begins with the tokenizer's BOS ({tokenizer.bos_token!r}), so no second one is prepended. "
        "A chat need not be rendered first: give its list of messages."
    )


def tensor_of(given: Any) -> Tensor:
    """Numbers as a tensor; integers as int32 or int64, since an embedding takes no others.

    Raises TypeError, ValueError or RuntimeError, as `torch.as_tensor`, for anything that makes none.
    """
    is_array = isinstance(given, np.ndarray) and given.dtype.kind in "iu"
    tensor = torch.from_numpy(np.array(given, dtype=np.int64)) if is_array else torch.as_tensor(given)
    return tensor.long() if tensor.dtype in _OTHER_INTEGERS else tensor


def without_numpy(given: Any) -> Any:
    """A NumPy array of integers as the tensor that it is; anything else unchanged."""
    return tensor_of(given) if isinstance(given, np.ndarray) and given.dtype.kind in "iu" else given


def is_chat(prompt: Any) -> bool:
    """Whether this is one chat: a list or tuple of messages, at least one."""
    return (
        isinstance(prompt, list | tuple)
        and len(prompt) > 0
        and all(_is_message(message) for message in prompt)
    )


def is_encoding(given: Any) -> bool:
    """Whether this is what a tokenizer gives: a `BatchEncoding` or dictionary with "input_ids"."""
    return isinstance(given, Mapping) and "input_ids" in given


def has_own_mask(given: Any) -> bool:
    """Whether an input says itself which of its tokens are padding."""
    return prompts_among(given) is not None or (
        is_encoding(given) and given.get("attention_mask") is not None
    )


def prompt_ids(tokenizer: Any, prompt: Any, prepend_bos: bool | None = None) -> list[int]:
    """The tokens of a text, a chat (messages), or a `Prompt` that holds either.

    A chat is what its template writes, special tokens included; nothing is prepended to it.

    Raises:
        DataError: no chat template, or one that rejects the messages; as `text_ids`.
    """
    messages = prompt if is_chat(prompt) else getattr(prompt, "messages", None)
    if messages is None:
        return text_ids(tokenizer, getattr(prompt, "content", prompt), prepend_bos)
    return without_special(tokenizer, chat_text(tokenizer, messages, getattr(prompt, "template", None)))


def chat_text(tokenizer: Any, messages: Sequence[Any], options: Mapping[str, Any] | None = None) -> str:
    """What the chat template makes of messages, with the opening of an answer unless the last one is one.

    Args:
        options: for the template: enable_thinking, tools, chat_template, add_generation_prompt, ...

    Raises:
        DataError: no chat template, or one that rejects the messages.
    """
    options = dict(options or {})
    if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in options:
        raise DataError(
            "A prompt of messages needs a tokenizer with a chat template, and this one has none; set "
            "`model.tokenizer.chat_template`, or give plain text."
        )
    given = [dict(message) if isinstance(message, Mapping) else message.given for message in messages]
    continued = options.get("continue_final_message", False)
    options.setdefault("add_generation_prompt", not continued and given[-1].get("role") != "assistant")
    try:
        text = tokenizer.apply_chat_template(given, tokenize=False, **options)
    except Exception as error:  # a template is a program, and may raise anything
        roles = [message.get("role") for message in given]
        raise DataError(f"The chat template rejects messages of the roles {roles}: {error}") from error
    if not isinstance(text, str) or not text:
        raise DataError(f"The chat template turns these messages into {text!r}, not into text.")
    return text


def encoded_rows(encoding: Mapping[str, Any], what: str = "The encoding") -> list[Int[Tensor, "_"]]:
    """The tokens of each prompt in a tokenizer's output, without those that `attention_mask` masks.

    >>> encoded_rows({"input_ids": [[0, 5, 6], [7, 8, 9]], "attention_mask": [[0, 1, 1], [1, 1, 1]]})
    [tensor([5, 6]), tensor([7, 8, 9])]

    Raises:
        DataError: no numbers, a mask of another shape, a mask with gaps, or one that leaves nothing.
    """
    ids, masks = encoding["input_ids"], encoding.get("attention_mask")
    single = len(_shape_of(ids)) == 1
    rows = [ids] if single else list(ids)
    masks = [None] * len(rows) if masks is None else [masks] if single else list(masks)
    if len(masks) != len(rows):
        raise DataError(f"{what}: {len(masks)} rows of attention_mask for {len(rows)} of input_ids.")
    pairs = zip(rows, masks, strict=True)
    return [_own(row, mask, what if single else f"{what}, row {n}") for n, (row, mask) in enumerate(pairs)]


def encoded_columns(
    encoding: Mapping[str, Any], what: str = "The encoding"
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]] | None:
    """A tokenizer's output as it stands: tokens, and which of them are not padding; None for ragged rows.

    Raises:
        DataError: as `encoded_rows`.
    """
    encoded_rows(encoding, what)  # its checks
    ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    try:
        tokens = tensor_of(ids)
    except ValueError:
        return None
    tokens = tokens if tokens.ndim == 2 else tokens[None]
    own = torch.ones_like(tokens) if mask is None else torch.as_tensor(mask).reshape(tokens.shape)
    return tokens, own.bool()


def prompts_among(given: Any) -> list[Any] | None:
    """The prompts of an input that is a chat or a `Prompt`, or holds some; None for anything else."""
    if is_chat(given) or _is_prompt(given):
        return [given]
    is_list = isinstance(given, list | tuple)
    return list(given) if is_list and any(is_chat(one) or _is_prompt(one) for one in given) else None


def _is_prompt(given: Any) -> bool:
    return hasattr(given, "messages") and hasattr(given, "content")


def _own(row: Any, mask: Any, what: str) -> Int[Tensor, "_"]:
    try:
        tokens = tensor_of(row)
        kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what}: input_ids or attention_mask are no numbers ({error}).") from error
    if kept.shape != tokens.shape or tokens.ndim != 1:
        raise DataError(
            f"{what}: attention_mask of shape {tuple(kept.shape)} for input_ids {tuple(tokens.shape)}."
        )
    places = kept.nonzero()[:, 0]
    if not len(places):
        raise DataError(f"{what}: attention_mask leaves no token; take the row out.")
    if int(places[-1] - places[0]) + 1 != len(places):
        raise DataError(f"{what}: attention_mask has a gap; padding must be at the ends only.")
    return tokens[places[0] : places[-1] + 1].cpu()


def padded_rows(
    rows: Sequence[Int[Tensor, "_"]], pad: int | None, side: str
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """(tokens, mask of the real ones) as long as the longest row; what pads is masked, any token will do."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad or 0, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        tokens[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = True
    return tokens, mask


def table_of_texts(tokenizer: Any, rows: Sequence[Int[Tensor, "_"]], side: str) -> Int[Tensor, "batch pos"]:
    """The tokens of texts, padded; without a mask, so that what pads must be the tokenizer's padding token.

    Raises:
        DataError: rows of several lengths, and no padding token.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None and len({len(row) for row in rows}) > 1:
        raise DataError(
            "Texts of several lengths need a pad token, and this tokenizer has none; set one "
            "(tokenizer.pad_token = tokenizer.eos_token), or run them one by one."
        )
    return padded_rows(rows, pad, side)[0]


def _shape_of(numbers: Any) -> Sequence[int]:
    if isinstance(numbers, Tensor) or hasattr(numbers, "shape"):
        return tuple(numbers.shape)
    first = numbers[0] if isinstance(numbers, Sequence) and len(numbers) else None
    is_row = isinstance(first, Sequence | Tensor) or hasattr(first, "shape")
    return (len(numbers), -1) if is_row else (len(numbers),)


def _is_message(message: Any) -> bool:
    if isinstance(message, Mapping):
        return "input_ids" not in message
    return hasattr(message, "role") and hasattr(message, "given")
