"""How a row becomes a pair of prompts: texts or chats with {fields}, and the defaults for each contrast.

    template = Template("mine", first="{document} | {question}", second="{question}")
    fill(template.first, {"document": "...", "question": "why?"}).named["question"]  # where it stands

Fields are located while they are written, never by searching.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from moe_lens.checks import short
from moe_lens.encoding import is_chat
from moe_lens.errors import DataError
from moe_lens.text.prompts import Prompt

Side = str | Sequence[Any]
"""A text with {fields}, or messages {"role": ..., "content": text with {fields}}."""


@dataclass(frozen=True)
class Template:
    """How a row becomes a pair: two texts (or chats) with {fields}.

    >>> template = Template("plain", first="{document} {question}", second="{question}")
    >>> fill(template.second, {"question": "why?"}).named
    {'question': ((0, 4),)}

    Attributes:
        name: the label of its pairs.
        first: the first condition, a text or messages; `{{` and `}}` write braces.
        second: the second condition.
        refusal: a sentence that refuses, for `refusal_against_compliance` where the rows have none.

    Raises:
        DataError: no name, a side that is neither text nor messages, a field that is not a plain name.
    """

    name: str
    first: Side
    second: Side
    refusal: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DataError(f"A template must have a name; got {self.name!r}.")
        for side in ("first", "second"):
            try:
                for text in texts_of(getattr(self, side)):
                    parsed(text)
            except DataError as error:
                raise DataError(f"Template {self.name!r}, {side}: {error}") from error


def fill(side: Side, fields: Mapping[str, str]) -> Prompt:
    """One side of a template with its fields written in, each a named part of the prompt.

    The parts' ranges are recorded while writing, never searched for; braces in the fields' texts are kept.

    >>> fill("Q: {question}", {"question": "why {x}?"}).spans
    {'question': ((3, 11),)}

    Raises:
        DataError: a field that is not given, or whose text is empty.
    """
    spans: dict[str, list[tuple[int, ...]]] = {}
    filled = []
    for number, text in enumerate(texts_of(side)):
        written = ""
        for literal, name in parsed(text):
            written += literal
            if name is not None:
                value = fields.get(name)
                if not isinstance(value, str) or not value:
                    raise DataError(f"The field {{{name}}} must be a text; got {value!r} (of {[*fields]}).")
                place = (len(written), len(written) + len(value))
                spans.setdefault(name, []).append(place if isinstance(side, str) else (number, *place))
                written += value
        filled.append(written)
    if isinstance(side, str):
        return Prompt(filled[0], spans)
    turns = zip(Prompt(side).messages or (), filled, strict=True)
    return Prompt([message.with_content(text) for message, text in turns], spans)


def default_templates(contrast: str, *, chat: bool = False) -> tuple[Template, ...]:
    """The three templates of a contrast, as plain text or as chats.

    >>> [template.name for template in default_templates("document")]
    ['labelled', 'quoted', 'instructed']

    Args:
        contrast: "document", "refusal", "calibrated", "cited" or "attributed".
        chat: as chats.

    Raises:
        DataError: any other contrast.
    """
    if contrast not in _DEFAULTS:
        raise DataError(f"There is no contrast {contrast!r}; there are {list(_DEFAULTS)}.")
    return tuple(turns.template(chat) for turns in _DEFAULTS[contrast])


def texts_of(side: Any) -> list[str]:
    """The texts of a template's side: one, or one a message."""
    if isinstance(side, str):
        return [side]
    if not is_chat(side):
        raise DataError(f"must be a text with {{fields}} or a list of messages; got {short(side)}.")
    return [message.content for message in Prompt(side).messages or ()]


def parsed(text: str) -> list[tuple[str, str | None]]:
    """(literal text, name of the field after it or None) from left to right."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{short(text)}: {error}; write {{{{ and }}}} for braces.") from error
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise DataError(
                f"{short(text)}: a field must be a plain {{name}}, {{{{ writes a brace; got {name!r}."
            )
    return [(literal, name) for literal, name, _, _ in parts]


@dataclass(frozen=True)
class _Turns:
    """A default template: what the user says and what the assistant says, under both conditions."""

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str] = ("", "")
    labels: tuple[str, str] = ("Question: ", "\nAnswer:")
    refusal: str = ""

    def template(self, chat: bool) -> Template:
        write = self._chat if chat else self._plain
        return Template(self.name, write(0), write(1), self.refusal)

    def _plain(self, side: int) -> str:
        answer = self.assistant[side]
        return f"{self.labels[0]}{self.user[side]}{self.labels[1]}{' ' if answer else ''}{answer}"

    def _chat(self, side: int) -> list[dict[str, str]]:
        turns = [("user", self.user[side]), ("assistant", self.assistant[side])]
        return [{"role": role, "content": content} for role, content in turns if content]


SIDES: Final = ("first", "second")

_ASK: Final = ("{question}", "{question}")

_SAY: Final = ("{answer}", "{answer}")

# The character before a counted field is the same in both conditions, so that the field's tokens are, too.
_DEFAULTS: Final[dict[str, tuple[_Turns, ...]]] = {
    "document": (
        _Turns(
            "labelled",
            ("Document: {document}\nQuestion: {question}", "Question: {question}"),
            labels=("", "\nAnswer:"),
        ),
        _Turns(
            "quoted",
            ('"{document}"\n\nQ: {question}', "Q: {question}"),
            labels=("", "\nA:"),
        ),
        _Turns(
            "instructed",
            (
                "Use this passage: {document}\nNow answer the following: {question}",
                "Use what you know.\nNow answer the following: {question}",
            ),
            labels=("", "\nThe answer is"),
        ),
    ),
    "refusal": (
        _Turns("direct", _ASK, _SAY, ("User: ", "\nAssistant:"), "I'm sorry, but I can't help with that."),
        _Turns(
            "request",
            ("A request: {question}", "A request: {question}"),
            _SAY,
            ("", "\nThe reply:"),
            "I won't assist with this request.",
        ),
        _Turns(
            "polite",
            ("Please respond to this. {question}", "Please respond to this. {question}"),
            _SAY,
            ("Human: ", "\n\nAI:"),
            "That is something I cannot do, because it could hurt people.",
        ),
    ),
    "calibrated": (
        _Turns(
            "certainty",
            _ASK,
            (
                "I'm not certain, but I believe the answer is {answer}",
                "I'm absolutely certain that the answer is {answer}",
            ),
        ),
        _Turns(
            "likelihood",
            _ASK,
            (
                "Most likely, though I could be wrong: {answer}",
                "Without any possible doubt whatsoever: {answer}",
            ),
            ("Q: ", "\nA:"),
        ),
        _Turns(
            "confidence",
            _ASK,
            (
                "My confidence is moderate. I would say {answer}",
                "My confidence is 100 %. Everyone must say {answer}",
            ),
            ("User: ", "\nAssistant:"),
        ),
    ),
    "cited": (
        _Turns("bracketed", _ASK, ("[{source}] The answer is {answer}", "The answer is {answer}")),
        _Turns(
            "reference",
            _ASK,
            ("Reference: {source}. Answer: {answer}", "Reference: none. Answer: {answer}"),
            ("Q: ", "\nA:"),
        ),
        _Turns(
            "footnote",
            _ASK,
            ("(1) {source}\nAs cited in (1), it is {answer}", "As far as is known, it is {answer}"),
            ("User: ", "\nAssistant:"),
        ),
    ),
    "attributed": (
        _Turns(
            "stated",
            _ASK,
            (
                "The source {source} gives this answer: {answer}",
                "As everybody surely knows, the answer is: {answer}",
            ),
        ),
        _Turns(
            "according",
            _ASK,
            ("According to {source}, it is {answer}", "Trust me, I looked into it, it is {answer}"),
            ("Q: ", "\nA:"),
        ),
        _Turns(
            "read",
            _ASK,
            ("I read in {source} that it is {answer}", "All the experts agree with me that it is {answer}"),
            ("User: ", "\nAssistant:"),
        ),
    ),
}
