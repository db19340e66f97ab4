"""Which tokens of a prompt count: found through the tokenizer's character offsets.

    mask = span_mask(model, prompts, "question")        # bool [batch pos], like model.to_tokens(prompts)
    _, cache = model.run_with_cache(prompts)
    RoutingStats.from_cache(cache, mask)
    for tokens, mask, counted in counted_batches(model, chats, "answer", batch_size=8):
        ...                                             # each [batch pos], padding on the left

Masks are aligned with the tokens that the model gets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.checks import short
from moe_lens.encoding import without_numpy
from moe_lens.errors import DataError
from moe_lens.text.batching import (
    Limits,
    Prompts,
    TextModel,
    chunks_to_pad,
    padded,
    prompts_with_tokens,
)
from moe_lens.text.prompts import Prompt, Rendered, render

PARTS: Final = (
    *("question", "answer", "document", "source"),
    *("system", "user", "assistant", "tool", "developer"),
)
"""Strings that always mean a part of the prompt: if it has no such part, the word is not searched for."""


@dataclass(frozen=True)
class TextSpan:
    """A text to search for, even if it is the name of a part.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> span_mask(model, "Document : the Document", TextSpan("Document", "first")).long().tolist()
    [[0, 1, 0, 0, 0]]

    Attributes:
        text: what to search for in the prompt (in a chat, in what the chat template makes of it), literally.
        occurrence: "last", "first", or "all" of its occurrences.

    Raises:
        DataError: an empty text, or another occurrence.
    """

    text: str
    occurrence: str = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise DataError(f"TextSpan.text must be a string of at least one character; got {self.text!r}.")
        if self.occurrence not in ("last", "first", "all"):
            raise DataError(f"TextSpan.occurrence must be 'last', 'first' or 'all'; got {self.occurrence!r}.")

    def find(self, text: str) -> tuple[tuple[int, int], ...]:
        """Ranges of characters (start, stop) in `text`; none if it does not occur."""
        starts, start = [], text.find(self.text)
        while start >= 0:
            starts.append(start)
            start = text.find(self.text, start + 1)
        chosen = {"last": starts[-1:], "first": starts[:1], "all": starts}[self.occurrence]
        return tuple((start, start + len(self.text)) for start in chosen)


Span = str | TextSpan | slice | Callable[[Int[Tensor, "pos"]], Bool[Tensor, "pos"]] | Sequence[Any] | None
"""Which tokens of a prompt count:

- None: every token, special ones (BOS, ...) included;
- "all": every token except special ones;
- "last": the last of those (in a chat that ends with an answer it may be the template's closing newline);
- the name of a part: "question", "answer", a role ("user", ...), or a name in `Prompt.spans`;
- any other string: the last occurrence of that text (a `TextSpan` for the first or for all);
- a slice of the prompt's positions (`slice(-1, None)`), or a function from its tokens [pos] to a bool [pos]:
  exactly what they select, special tokens included;
- a list of such spans, one for each prompt.
"""


def span_mask(
    model: TextModel,
    prompts: Prompts,
    span: Span,
    *,
    padding_side: str | None = None,
    special_tokens: bool = False,
) -> Bool[Tensor, "batch pos"]:
    """True where a token lies in the span; aligned with `model.to_tokens(prompts)`.

    A token lies in a part or a text if one of its characters does, not counting white space at its ends.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> span_mask(model, ["Question : what is", "Document : the"], "all", padding_side="right").long()
    tensor([[0, 1, 1, 1, 1],
            [0, 1, 1, 1, 0]])

    Args:
        model: a bridge with a tokenizer.
        prompts: strings, chats or tokens, see `moe_lens.text.Prompts`. Chats are aligned with what their
            template makes of them.
        span: see `Span`.
        padding_side: "left" or "right"; None: the tokenizer's own.
        special_tokens: let spans that are strings select special tokens, too (BOS, <|im_end|>, ...).

    Raises:
        DataError: a part or a text that a prompt does not have, a span that selects no token, unequal numbers
            of spans and prompts, a tokenizer without offsets, or as in `moe_lens.text.token_sequences`.
    """
    side = padding_side or getattr(model.tokenizer, "padding_side", "right")
    if side not in ("left", "right"):
        raise DataError(f"padding_side must be 'left' or 'right'; got {padding_side!r}.")
    prompts = without_numpy(prompts)
    if not isinstance(prompts, str | Tensor | Prompt | Sequence | Mapping):
        prompts = list(prompts)
    sequences, counted = zip(*_counted(model, prompts, span, special_tokens), strict=True)
    tokens, mask = (part.to(model.cfg.device) for part in padded(model, sequences, side))
    chosen = torch.zeros_like(mask)
    chosen[mask] = torch.cat(counted).to(mask.device)
    if isinstance(prompts, Sequence) and all(isinstance(prompt, str) for prompt in prompts):
        return _as_to_tokens(model, prompts, side, tokens, mask, chosen)
    return chosen


def counted_batches(
    model: TextModel, prompts: Prompts, span: Span, batch_size: int, *, special_tokens: bool = False
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Like `padded_batches`, with a second mask: tokens, which of them are not padding, which of those count.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> for tokens, mask, counted in counted_batches(model, ["Question : what", "the"], "last", 2):
    ...     print(mask.long().tolist(), counted.long().tolist())
    [[1, 1, 1, 1], [0, 0, 1, 1]] [[0, 0, 0, 1], [0, 0, 0, 1]]

    Raises:
        DataError: as in `span_mask`, or a batch_size below 1. Raised when that prompt's turn comes.
    """
    device = model.cfg.device
    items = _counted(model, prompts, span, special_tokens)
    for chunk in chunks_to_pad(model, items, batch_size, lambda item: len(item[0])):
        sequences, chosen = zip(*chunk, strict=True)
        tokens, mask, counted = CountedPrompts([], list(sequences), list(chosen)).padded(model, "left")
        yield tokens.to(device), mask.to(device), counted.to(device)


class CountedPrompts(NamedTuple):
    """Prompts of like length, not padded yet, on the CPU."""

    rows: list[int]
    """Which prompts they are, in the order in which they were given."""
    sequences: list[Int[Tensor, "_"]]
    chosen: list[Bool[Tensor, "_"]]
    """Of each, which of its tokens count."""

    def padded(
        self, model: TextModel, side: str
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens, which of them are not padding, which of those count."""
        tokens, mask = padded(model, self.sequences, side)
        counted = torch.zeros_like(mask)
        counted[mask] = torch.cat(self.chosen)
        return tokens, mask, counted


def batches_by_length(
    model: TextModel, prompts: Prompts, span: Span, limits: Limits, *, special_tokens: bool = False
) -> Iterator[CountedPrompts]:
    """Like `counted_batches`, prompts of like length together: the shortest of each window first.

    >>> from moe_lens import organisms
    >>> from moe_lens.text.batching import Limits
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document", "the"]
    >>> for batch in batches_by_length(model, prompts, "last", Limits.of(2, None)):
    ...     print(batch.rows, batch.padded(model, "right")[2].long().tolist())
    [1, 2] [[0, 1], [0, 1]]
    [0] [[0, 0, 0, 0, 1]]

    Raises:
        DataError: as in `span_mask`. Raised when that prompt's window is read.
    """
    first = 0
    for window in limits.windows(_counted(model, prompts, span, special_tokens), lambda item: len(item[0])):
        for numbers in limits.batches([len(sequence) for sequence, _ in window]):
            sequences, chosen = zip(*(window[number] for number in numbers), strict=True)
            yield CountedPrompts([first + number for number in numbers], list(sequences), list(chosen))
        first += len(window)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that stand for no text: BOS, EOS, padding, chat markers; not the unknown word."""
    if tokenizer is None:
        return frozenset()
    added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    ids = {*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id}
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)  # GPT-2's unknown word is its EOS
    return frozenset({*ids, *(mark for mark in marks if mark is not None)})


def _counted(
    model: TextModel, prompts: Prompts, span: Span, special_tokens: bool
) -> Iterator[tuple[Int[Tensor, "pos"], Bool[Tensor, "pos"]]]:
    """The tokens of each prompt, and which of them count."""
    excluded = frozenset() if special_tokens else special_ids(model.tokenizer)
    spans = list(span) if isinstance(span, Sequence) and not isinstance(span, str) else None
    number = -1
    for number, (prompt, tokens) in enumerate(prompts_with_tokens(model, prompts)):
        if spans is not None and number >= len(spans):
            raise DataError(
                f"There are {len(spans)} spans and more prompts than that; give one span a prompt."
            )
        wanted = span if spans is None else spans[number]
        if isinstance(wanted, str | TextSpan):
            ordinary = torch.tensor([token not in excluded for token in tokens.tolist()])
            chosen = _chosen(model, number, prompt, tokens, wanted, ordinary)
        else:
            chosen = _at_positions(number, tokens, wanted)
        yield tokens, chosen
    if spans is not None and number + 1 < len(spans):
        raise DataError(f"{len(spans)} spans for {number + 1} prompts; give one span a prompt.")


def _at_positions(index: int, tokens: Int[Tensor, "pos"], span: Any) -> Bool[Tensor, "pos"]:
    """None, a slice or a function."""
    try:
        if callable(span):
            chosen = torch.as_tensor(span(tokens), dtype=torch.bool).cpu()
        else:
            chosen = torch.zeros(len(tokens), dtype=torch.bool)
            chosen[slice(None) if span is None else _checked_slice(span)] = True
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"The span {span!r} cannot be applied to prompt {index}: {error}. Give None, a string, a "
            "TextSpan, a slice with a positive step, a function from tokens [pos] to a bool [pos], or a list "
            "of these."
        ) from error
    if chosen.shape != tokens.shape:
        raise DataError(
            f"The span gave shape {tuple(chosen.shape)} for prompt {index} with {len(tokens)} tokens; "
            "it must give one bool a token."
        )
    if not bool(chosen.any()):
        raise DataError(f"The span selects no token of prompt {index} ({len(tokens)} tokens).")
    return chosen


def _checked_slice(span: Any) -> slice:
    if not isinstance(span, slice):
        raise TypeError(f"{type(span).__name__} is no span")
    return span


def _chosen(
    model: TextModel,
    index: int,
    prompt: Prompt | None,
    tokens: Int[Tensor, "pos"],
    span: str | TextSpan,
    ordinary: Bool[Tensor, "pos"],
) -> Bool[Tensor, "pos"]:
    """A span that is a string: the ordinary (not special) tokens in it."""
    if span == "all":
        chosen = ordinary
    elif span == "last":
        chosen = torch.zeros_like(ordinary)
        chosen[ordinary.nonzero()[-1:, 0]] = True
    else:
        rendered, ranges = _located(model, index, prompt, span)
        chosen = _overlapping(rendered, ranges, _offsets(model, index, rendered, tokens)) & ordinary
    if not bool(chosen.any()):
        beginning = "" if prompt is None else f", {short(_beginning(prompt))}"
        raise DataError(
            f"The span {span!r} selects no token of prompt {index} ({len(tokens)} tokens){beginning}. "
            "Special tokens count with special_tokens=True."
        )
    return chosen


def _located(
    model: TextModel, index: int, prompt: Prompt | None, span: str | TextSpan
) -> tuple[Rendered, tuple[tuple[int, int], ...]]:
    """The rendered prompt, and the ranges of its characters that the span stands for."""
    if prompt is None:
        raise DataError(
            f"The span {span!r} is a text or a part, and prompt {index} was given as tokens; give text, or a "
            "slice or a function of tokens."
        )
    name = span if isinstance(span, str) and span in prompt.named else None
    if name is None and span in PARTS:
        raise DataError(
            f"Prompt {index}, {short(_beginning(prompt))}, has no part {span!r} (it has "
            f"{sorted(prompt.named) or 'none'}), so the span cannot be found. Give messages, or "
            f"Prompt(text, spans={{{span!r}: ...}}); TextSpan({span!r}) searches the word."
        )
    try:
        rendered = render(model.tokenizer, prompt, () if name is None else (name,))
        text = TextSpan(span) if isinstance(span, str) else span
    except DataError as error:
        raise DataError(f"The span {span!r} cannot be located in prompt {index}: {error}") from error
    ranges = rendered.ranges[name] if name is not None else text.find(rendered.text)
    if not ranges:
        raise DataError(
            f"The span's text {text.text!r} does not occur in prompt {index}, {short(rendered.text)}."
        )
    return rendered, ranges


def _offsets(
    model: TextModel, index: int, rendered: Rendered, tokens: Int[Tensor, "pos"]
) -> list[tuple[int, int]]:
    """Where each token stands in the rendered text; an empty range for what the tokenizer added."""
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"Spans of text need a fast tokenizer, which knows each token's characters; "
            f"{type(tokenizer).__name__} is not. Give a slice or a function of tokens instead."
        )
    wanted = tokens.tolist()
    added = {*special_ids(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id}
    # For a tokenizer that adds no BOS of its own, `to_tokens` writes one into the text.
    for prefix in ("",) if rendered.is_chat else ("", tokenizer.bos_token or ""):
        encoded = tokenizer(
            prefix + rendered.text, add_special_tokens=not rendered.is_chat, return_offsets_mapping=True
        )
        ids, shift = encoded["input_ids"], len(prefix)
        for cut in (0, 1):  # `to_tokens` may have dropped the BOS, and an EOS at the end
            kept = slice(cut, cut + len(wanted))
            if ids[kept] == wanted and {*ids[:cut], *ids[kept.stop :]} <= added:
                places = [(max(a - shift, 0), max(b - shift, 0)) for a, b in encoded["offset_mapping"][kept]]
                return _without_invented(tokenizer, rendered.text, wanted, places)
    raise DataError(
        f"The tokenizer's offsets of prompt {index} do not belong to the tokens that the model gets; give a "
        "slice or a function of tokens instead."
    )


def _without_invented(
    tokenizer: Any, text: str, tokens: list[int], places: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Without the space that sentencepiece invents before the first word, whose character it claims."""
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    return [
        (a, a) if piece == "▁" and text[a:b] not in (" ", "▁") else (a, b)
        for piece, (a, b) in zip(pieces, places, strict=True)
    ]


def _overlapping(
    rendered: Rendered, ranges: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]
) -> Bool[Tensor, "pos"]:
    """Whether a token has a character in one of the ranges.

    Some tokenizers put the space before a word into the word's token. The range "the " must not bring in the
    word after it, so white space around a token counts only if the token or the range is nothing else.
    """
    text = rendered.text
    chosen = torch.zeros(len(offsets), dtype=torch.bool)
    for first, last in ranges:
        blank = not text[first:last].strip()
        for pos, (start, stop) in enumerate(offsets):
            piece = text[start:stop]
            if piece.strip() and not blank:
                start += len(piece) - len(piece.lstrip())
                stop = start + len(piece.strip())
            if max(start, first) < min(stop, last):
                chosen[pos] = True
    return chosen


def _as_to_tokens(
    model: TextModel, prompts: Any, side: str, tokens: Tensor, mask: Tensor, chosen: Tensor
) -> Bool[Tensor, "batch pos"]:
    """`chosen`, as wide as `model.to_tokens(prompts)`, which may keep an EOS that single prompts lose."""
    whole = model.to_tokens(prompts, padding_side=side, truncate=False)
    extra = whole.shape[1] - tokens.shape[1]
    if extra > 0:
        widths = (0, extra) if side == "right" else (extra, 0)
        tokens, mask, chosen = (torch.nn.functional.pad(x, widths) for x in (tokens, mask, chosen))
    if whole.shape != tokens.shape or not bool((whole == tokens)[mask].all()):
        raise DataError(
            "model.to_tokens gives these prompts different tokens together than one by one; use the tokens "
            "and masks of counted_batches."
        )
    return chosen


def _beginning(prompt: Prompt) -> Any:
    return prompt.content if prompt.messages is None else prompt.messages[0]
