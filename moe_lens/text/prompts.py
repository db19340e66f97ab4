"""A prompt whose parts have names: plain text or a chat, and where its question, answer, document stand.

    prompt = Prompt("Document: rain falls. Question: why?", spans={"question": "why?"})
    chat = Prompt([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Gravity."}])
    chat.named["answer"]                                # ((1, 0, 8),): all of message 1
    render(tokenizer, chat).ranges["answer"]            # where it stands in the text that the model reads

Ranges count characters of the text or message as it was given.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from moe_lens.checks import as_index, short
from moe_lens.errors import DataError

RESERVED: Final = ("all", "last")
"""Spans that every prompt has; no part of a prompt may take these names."""

Range = tuple[int, ...]
"""Characters from start up to stop: (start, stop) in plain text, (message, start, stop) in a chat."""


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """Plain text, or a chat, with named parts.

    >>> Prompt("Document: rain falls. Question: why?", spans={"question": "why?"}).named
    {'question': ((32, 36),)}
    >>> chat = Prompt([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Gravity."}])
    >>> sorted(chat.named)
    ['answer', 'assistant', 'question', 'user']

    Attributes:
        content: the text; or messages {"role": ..., "content": ...}, kept as a tuple of `Message`.
        spans: name -> the part's text (its last occurrence in the content counts), or its range of
            characters, or a list of such ranges: (start, stop) in a text, (message, start, stop) in a chat.
            Kept as a tuple of ranges. Python's characters, from 0 on, stop excluded.

    Raises:
        DataError: an empty prompt, malformed messages, a part that is empty or not there, or one named "all"
            or "last".
    """

    content: str | Sequence[Any]
    spans: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        content = self.content if isinstance(self.content, str) else _frozen(self.content)
        if not content:
            raise DataError("A prompt is an empty string or a chat without messages; give it some text.")
        object.__setattr__(self, "content", content)
        if not isinstance(self.spans, Mapping):
            raise DataError(f"Prompt.spans must map names to texts or ranges; got {self.spans!r}.")
        spans = {name: _ranges(content, name, target) for name, target in self.spans.items()}
        object.__setattr__(self, "spans", spans)

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The chat's messages; None for plain text."""
        return None if isinstance(self.content, str) else tuple(self.content)

    @property
    def named(self) -> dict[str, tuple[Range, ...]]:
        """Name -> ranges: the parts in `spans` and, in a chat, those that follow from the roles.

        The latter are each role's name (all its messages), "question" (the last user message) and "answer"
        (the last assistant message). A name in `spans` takes precedence; empty messages are not parts.
        """
        parts: dict[str, tuple[Range, ...]] = {}
        for number, (role, content) in enumerate(self.messages or ()):
            if content and role not in RESERVED:
                parts[role] = (*parts.get(role, ()), (number, 0, len(content)))
        for name, role in (("question", "user"), ("answer", "assistant")):
            if role in parts:
                parts[name] = parts[role][-1:]
        return {**parts, **self.spans}


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model reads it.

    Attributes:
        text: the plain text, or what the chat template makes of the messages.
        ranges: name -> ranges of characters (start, stop) of `text`.
        is_chat: whether a template wrote the text, which then contains its own special tokens.
    """

    text: str
    ranges: dict[str, tuple[tuple[int, int], ...]]
    is_chat: bool


def is_chat(prompt: Any) -> bool:
    """Whether this is one chat: a list or tuple of messages, at least one."""
    return (
        isinstance(prompt, list | tuple)
        and len(prompt) > 0
        and all(isinstance(message, Mapping | Message) for message in prompt)
    )


def as_prompt(prompt: Any) -> Prompt:
    """A Prompt from a string, messages or a Prompt. Raises DataError for anything else.

    >>> as_prompt("Why?")
    Prompt(content='Why?', spans={})
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str) or is_chat(prompt):
        return Prompt(prompt)
    raise DataError(
        f"A prompt must be a non-empty string, a list of messages or a Prompt; got {short(prompt)}."
    )


def to_json(prompt: Prompt) -> Any:
    """What JSON can hold: a string, a list of messages, or {"content": ..., "spans": {name: ranges}}."""
    messages = prompt.messages
    content = prompt.content if messages is None else [message._asdict() for message in messages]
    if not prompt.spans:
        return content
    spans = {name: [list(part) for part in ranges] for name, ranges in prompt.spans.items()}
    return {"content": content, "spans": spans}


def from_json(content: Any) -> Prompt:
    """The Prompt that `to_json` wrote. Raises DataError for anything else.

    >>> from_json(to_json(Prompt("Why?", {"question": "Why"}))) == Prompt("Why?", {"question": "Why"})
    True
    """
    if isinstance(content, Mapping):
        if "content" not in content or not set(content) <= {"content", "spans"}:
            raise DataError(f'A prompt in JSON has "content" and may have "spans"; got {short(content)}.')
        inner = as_prompt(content["content"])
        return Prompt(inner.content, {**inner.spans, **(content.get("spans") or {})})
    return as_prompt(content)


def render(tokenizer: Any, prompt: Prompt, names: Collection[str] | None = None) -> Rendered:
    """The text that the model reads, and where the named parts stand in it.

    A chat goes through `tokenizer.apply_chat_template`, with the opening of an answer unless the last message
    is the assistant's. Each message is located by rendering the chat once more with a marker in its place:
    searching the rendering for its text could find the same words elsewhere.

    >>> render(None, Prompt("Why rain?", {"topic": "rain"}))
    Rendered(text='Why rain?', ranges={'topic': ((4, 8),)}, is_chat=False)

    Args:
        tokenizer: a Hugging Face tokenizer; for a chat it needs a chat template.
        names: the parts to find; None for all.

    Raises:
        DataError: no chat template, or one that rejects the messages, drops a part or changes it.
    """
    parts = {name: r for name, r in prompt.named.items() if names is None or name in names}
    if prompt.messages is None:
        text = str(prompt.content)
        return Rendered(
            text, {name: tuple((r[0], r[1]) for r in ranges) for name, ranges in parts.items()}, False
        )
    text = _apply_template(tokenizer, prompt.messages)
    needed = {number for ranges in parts.values() for number, _, _ in ranges}
    places = {number: _place(tokenizer, prompt.messages, number, text) for number in sorted(needed)}
    ranges = {
        name: tuple(_moved(prompt.messages, part, places[part[0]]) for part in of_name)
        for name, of_name in parts.items()
    }
    return Rendered(text, ranges, True)


def _frozen(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, Sequence | tuple) or isinstance(messages, bytes):
        raise DataError(f"A prompt must be text or a list of messages; got {short(messages)}.")
    return tuple(_message(number, message) for number, message in enumerate(messages))


def _message(number: int, message: Any) -> Message:
    if isinstance(message, Message):
        message = message._asdict()
    fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    if set(fields) != {"role", "content"} or not all(isinstance(v, str) for v in fields.values()):
        raise DataError(
            f'Message {number} must be {{"role": text, "content": text}} and nothing else; '
            f"got {short(message)}."
        )
    if not fields["role"]:
        raise DataError(f"Message {number} has no role; give it one, such as 'user'.")
    return Message(fields["role"], fields["content"])


def _ranges(content: str | tuple[Message, ...], name: Any, target: Any) -> tuple[Range, ...]:
    """The ranges of one entry of `spans`, each checked to be there."""
    if not isinstance(name, str) or not name or name in RESERVED:
        raise DataError(f"A part of a prompt must have a name other than {RESERVED}; got {name!r}.")
    if isinstance(target, str):
        return (_last_occurrence(content, name, target),)
    parts = list(target) if isinstance(target, Sequence) else []
    if parts and all(as_index(number) is not None for number in parts):
        parts = [parts]
    if not parts:
        raise DataError(f"The part {name!r} must be a text or ranges of characters; got {short(target)}.")
    return tuple(_checked_range(content, name, part) for part in parts)


def _last_occurrence(content: str | tuple[Message, ...], name: str, target: str) -> Range:
    texts = [content] if isinstance(content, str) else [message.content for message in content]
    for number in reversed(range(len(texts))):
        start = texts[number].rfind(target) if target else -1
        if start >= 0:
            place = (start, start + len(target))
            return place if isinstance(content, str) else (number, *place)
    raise DataError(f"The part {name!r}, {short(target)}, does not occur in the prompt {short(texts[-1])}.")


def _checked_range(content: str | tuple[Message, ...], name: str, part: Any) -> Range:
    numbers = [as_index(number) for number in part] if isinstance(part, Sequence) else []
    good = [number for number in numbers if number is not None]
    if isinstance(content, str):
        form, text = "(start, stop)", content if len(numbers) == 2 else None
    else:
        form = "(message, start, stop)"
        inside = len(numbers) == 3 and len(good) == 3 and good[0] < len(content)
        text = content[good[0]].content if inside else None
    if text is None or len(good) != len(numbers) or not good[-2] < good[-1] <= len(text):
        raise DataError(
            f"The part {name!r} must lie inside the prompt as {form}, from 0 on, at least one character; "
            f"got {part!r}."
        )
    return tuple(good)


def _apply_template(tokenizer: Any, messages: Sequence[Message]) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "A prompt of messages needs a tokenizer with a chat template, and this one has none; set "
            "`model.tokenizer.chat_template`, or give plain text."
        )
    try:
        text = tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=False,
            add_generation_prompt=messages[-1].role != "assistant",
        )
    except Exception as error:  # a template is a program, and may raise anything
        roles = [message.role for message in messages]
        raise DataError(f"The chat template rejects messages of the roles {roles}: {error}") from error
    if not isinstance(text, str) or not text:
        raise DataError(f"The chat template turns these messages into {text!r}, not into text.")
    return text


def _place(tokenizer: Any, messages: Sequence[Message], number: int, text: str) -> tuple[int, int, int]:
    """(position, lead, length): content[lead : lead + length] of the message stands at text[position:]."""
    content = messages[number].content
    marker = "moelensmarker"
    while marker in text:
        marker += "x"
    replaced = [m if i != number else Message(m.role, marker) for i, m in enumerate(messages)]
    try:
        other = _apply_template(tokenizer, replaced)
    except DataError:  # the template inspects the contents and rejects the marker
        other = None
    if other is not None and marker not in other:
        raise DataError(f"The chat template leaves out message {number}, {short(content)}, or rewrites it.")
    if other is not None and other.count(marker) == 1:
        before, after = other.split(marker)
        kept = text[len(before) : len(text) - len(after)]  # the template may strip the content, or cut it
        if text == before + kept + after and kept and content.count(kept) == 1:
            return len(before), content.index(kept), len(kept)
    once = text.find(content) == text.rfind(content) >= 0
    if once and sum(content in message.content for message in messages) == 1:
        return text.index(content), 0, len(content)
    raise DataError(
        f"Message {number}, {short(content)}, cannot be located in what the chat template makes of the "
        f"chat: {short(text)}. Give plain text with ranges instead."
    )


def _moved(messages: Sequence[Message], part: Range, place: tuple[int, int, int]) -> tuple[int, int]:
    number, start, stop = part
    position, lead, length = place
    first, last = max(start, lead), min(stop, lead + length)
    if first >= last:
        lost = messages[number].content[start:stop]
        raise DataError(f"The chat template leaves out {short(lost)} of message {number}.")
    return position + first - lead, position + last - lead
