"""A prompt whose parts have names: plain text or a chat, and where its question, answer, document stand.

    prompt = Prompt("Document: rain falls. Question: why?", spans={"question": "why?"})
    chat = Prompt([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Gravity."}])
    chat.named["answer"]                                # ((1, 0, 8),): all of message 1
    render(tokenizer, chat).ranges["answer"]            # where it stands in the text that the model reads

Ranges count characters of the text or message as it was given.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from moe_lens.checks import as_index, short
from moe_lens.encoding import chat_text, is_chat
from moe_lens.errors import DataError

RESERVED: Final = ("all", "last")
"""Spans that every prompt has; no part of a prompt may take these names."""

_RESERVED_OPTIONS: Final = {
    *("conversation", "tokenize", "return_tensors", "return_dict", "padding", "truncation", "max_length"),
}

Range = tuple[int, ...]
"""Characters from start up to stop: (start, stop) in plain text, (message, start, stop) in a chat."""


class _Turn(NamedTuple):
    role: str
    content: str


class Message(_Turn):
    """One turn of a chat: (role, content), and what else it says.

    >>> turn = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    >>> message = Prompt([turn]).messages[0]
    >>> message.role, message.content, message.more
    ('assistant', '', '{"content": null, "tool_calls": [{"name": "look"}]}')
    >>> message.given
    {'role': 'assistant', 'tool_calls': [{'name': 'look'}]}

    Attributes:
        role: "user", "assistant", ...
        content: its text; of content in parts, their texts together; "" for none.
        more: its other fields (tool_calls, reasoning_content, name, ...) as JSON, and under "content" the
            parts, or null for none; "" where there is nothing more.
    """

    more: str

    def __new__(cls, role: str, content: str, more: str = "") -> "Message":
        message = super().__new__(cls, role, content)
        message.more = more
        return message

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True and self.more == getattr(other, "more", "")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((*self, self.more)) if self.more else tuple.__hash__(self)

    def __repr__(self) -> str:
        more = f", more={self.more!r}" if self.more else ""
        return f"Message(role={self.role!r}, content={self.content!r}{more})"

    @property
    def given(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        more = json.loads(self.more) if self.more else {}
        whole = {"role": self.role, "content": self.content, **more}
        return {name: value for name, value in whole.items() if value is not None}

    def with_content(self, content: str) -> "Message":
        """The same message with another text, in parts if it was in parts."""
        more = json.loads(self.more) if self.more else {}
        if isinstance(more.get("content"), list):
            more["content"] = [{"type": "text", "text": content}]
        else:
            more.pop("content", None)
        return Message(self.role, content, _as_json(more))


@dataclass(frozen=True)
class Prompt:
    """Plain text, or a chat, with named parts.

    >>> Prompt("Document: rain falls. Question: why?", spans={"question": "why?"}).named
    {'question': ((32, 36),)}
    >>> chat = Prompt([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Gravity."}])
    >>> sorted(chat.named)
    ['answer', 'assistant', 'question', 'user']

    Attributes:
        content: the text; or messages {"role": ..., "content": ...}, kept as a tuple of `Message`. Content
            may be in parts, [{"type": "text", "text": ...}], and a message may have more fields (tool_calls,
            reasoning_content, ...); what comes of them is the chat template's business.
        spans: name -> the part's text (its last occurrence in the content counts), or its range of
            characters, or a list of such ranges: (start, stop) in a text, (message, start, stop) in a chat.
            Kept as a tuple of ranges. Python's characters, from 0 on, stop excluded.
        template: options of a chat's template: {"enable_thinking": False, "tools": [...]}, or
            "add_generation_prompt" and "continue_final_message" of `apply_chat_template`. By default the
            opening of an answer follows, unless the last message is the assistant's.

    Raises:
        DataError: an empty prompt, malformed messages, a part that is empty or not there, or one named "all"
            or "last"; options for a text.
    """

    content: str | Sequence[Any]
    spans: Mapping[str, Any] = field(default_factory=dict, hash=False)
    template: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        content = self.content if isinstance(self.content, str) else _frozen(self.content)
        if not content:
            raise DataError("A prompt is an empty string or a chat without messages; give it some text.")
        object.__setattr__(self, "content", content)
        if not isinstance(self.spans, Mapping):
            raise DataError(f"Prompt.spans must map names to texts or ranges; got {self.spans!r}.")
        spans = {name: _ranges(content, name, target) for name, target in self.spans.items()}
        object.__setattr__(self, "spans", spans)
        object.__setattr__(self, "template", _options(content, self.template))

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
    """What JSON can hold: a string, messages, or {"content": ..., "spans": ..., "template": ...}."""
    messages = prompt.messages
    content = prompt.content if messages is None else [message.given for message in messages]
    spans = {name: [list(part) for part in ranges] for name, ranges in prompt.spans.items()}
    more = {"spans": spans, "template": dict(prompt.template)}
    if not any(more.values()):
        return content
    return {"content": content, **{name: value for name, value in more.items() if value}}


def from_json(content: Any) -> Prompt:
    """The Prompt that `to_json` wrote. Raises DataError for anything else.

    >>> from_json(to_json(Prompt("Why?", {"question": "Why"}))) == Prompt("Why?", {"question": "Why"})
    True
    """
    if isinstance(content, Mapping):
        if "content" not in content or not set(content) <= {"content", "spans", "template"}:
            raise DataError(
                f'A prompt in JSON has "content" and may have "spans" and "template"; got {short(content)}.'
            )
        inner = as_prompt(content["content"])
        spans = {**inner.spans, **(content.get("spans") or {})}
        return Prompt(inner.content, spans, {**inner.template, **(content.get("template") or {})})
    return as_prompt(content)


def render(tokenizer: Any, prompt: Prompt, names: Collection[str] | None = None) -> Rendered:
    """The text that the model reads, and where the named parts stand in it.

    A chat goes through `tokenizer.apply_chat_template` with `prompt.template`. Each message is located by
    rendering the chat once more with a marker in its place: searching the rendering for its text could find
    the same words elsewhere.

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
    text = chat_text(tokenizer, prompt.messages, prompt.template)
    needed = {number for ranges in parts.values() for number, _, _ in ranges}
    places = {number: _place(tokenizer, prompt, number, text) for number in sorted(needed)}
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
        message = message.given
    fields = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    role, content = fields.pop("role", None), fields.pop("content", None)
    text = content if isinstance(content, str) else _text_of_parts(number, content)
    if not isinstance(role, str) or text is None or (content is None and not fields):
        raise DataError(
            f'Message {number} must be {{"role": text, "content": text}}, or have content in parts '
            f'({{"type": "text", "text": ...}}) or fields such as tool_calls; got {short(message)}.'
        )
    if not role:
        raise DataError(f"Message {number} has no role; give it one, such as 'user'.")
    if not isinstance(content, str):
        fields["content"] = content
    try:
        return Message(role, text, _as_json(fields))
    except (TypeError, ValueError) as error:
        raise DataError(f"Message {number} has a field that JSON cannot hold ({error}).") from error


def _text_of_parts(number: int, content: Any) -> str | None:
    """The text of content in parts; None for what is no such thing."""
    if content is None:
        return ""
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        return None
    other = [part.get("type") for part in content if not isinstance(part.get("text"), str)]
    if other:
        raise DataError(
            f"Message {number} has a part of type {other[0]!r}, without text; language models read text only."
        )
    return "".join(part["text"] for part in content)


def _as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False) if fields else ""


def _options(content: Any, options: Any) -> dict[str, Any]:
    """A chat template's options, checked."""
    if not isinstance(options, Mapping) or (options and isinstance(content, str)):
        raise DataError(f"Prompt.template must map options of a chat's template; got {short(options)}.")
    reserved = sorted(_RESERVED_OPTIONS & set(options))
    if reserved:
        raise DataError(f"Prompt.template: {reserved[0]!r} says what the tokenizer returns; leave it out.")
    return dict(options)


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


def _place(tokenizer: Any, prompt: Prompt, number: int, text: str) -> tuple[int, int, int]:
    """(position, lead, length): content[lead : lead + length] of the message stands at text[position:]."""
    messages = prompt.messages or ()
    content = messages[number].content
    marker = "moelensmarker"
    while marker in text:
        marker += "x"
    replaced = [m if i != number else m.with_content(marker) for i, m in enumerate(messages)]
    try:
        other = chat_text(tokenizer, replaced, prompt.template)
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
