"""Scores of answers that need no judge: an answer that is known, or phrases that say what was done.

>>> answer_match("It is the Eiffel Tower.", ["Eiffel tower", "la tour Eiffel"])
1.0
>>> phrase_score("refusal_phrase", "I’m sorry, but I can't help with that.")
1.0

A phrase is no proof: a model may refuse in other words, say "I cannot" and go on, or abstain without a word
of these lists. Their scores say that a phrase occurs, and are named so; for what it means, use a judge.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Final

from moe_lens.errors import DataError

_ARTICLES: Final = ("a", "an", "the")
_APOSTROPHES: Final = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})

_NOT: Final = r"(?:not|n't)"
_SAID: Final = r"(?:mentioned|stated|specified|provided|given|known|clear)"

PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "abstention_phrase": (
        r"unanswerable",
        r"unknown",
        r"unclear",
        r"(?:can(?:not|'t| not)|impossible to) (?:be )?(?:answer|determin|conclude|infer|tell)",
        r"(?:no|not enough|insufficient|lacks) (?:\w+ )?(?:information|evidence|answer)",
        rf"(?:does|did|do) ?{_NOT} (?:say|mention|state|specify|provide|contain|give|know)",
        rf"(?:is|are|was|were) ?{_NOT} {_SAID}",
    ),
    "conflict_phrase": (
        r"conflict",
        r"contradict",
        r"inconsisten",
        r"disagree",
        r"discrepan",
        r"(?:two|2|multiple|several|more than one) (?:different |possible )?answers?",
    ),
    "refusal_phrase": (
        r"(?:i'm|i am|we're|we are)(?: so| very| really)? sorry",
        r"i apologi[sz]e",
        r"(?:i|we) (?:can(?:not|'t| not)|won't|will not|must decline)",
        r"(?:i'm|i am|we're|we are) (?:unable|not able|not going|not comfortable|not allowed) to",
        r"as an? (?:ai\b|artificial intelligence|language model)",
        r"against my (?:programming|guidelines|principles|policy)",
        r"(?:is|it's) (?:illegal|unethical|not ethical|not legal)",
    ),
}
"""Name of the score -> regular expressions, of which one must begin where a word begins."""

_PATTERNS: Final = {
    name: re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})", re.IGNORECASE) for name, patterns in PHRASES.items()
}


def phrase_score(name: str, answer: str) -> float:
    """1.0 if the answer has a phrase of the list of this name, else 0.0.

    >>> phrase_score("abstention_phrase", "The document does not mention it.")
    1.0

    Raises:
        DataError: no such list.
    """
    if name not in _PATTERNS:
        raise DataError(f"There is no score {name!r}; there are {', '.join(_PATTERNS)}.")
    return float(_PATTERNS[name].search(answer.translate(_APOSTROPHES)) is not None)


def answer_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 if the answer's first line has one of the accepted ones in it, as whole words.

    Case, accents' encoding, punctuation and articles do not count; an accepted answer that is nothing but an
    article ("A") must be the whole line. Words are what stands between spaces.

    Raises:
        DataError: an accepted answer without letters and digits, which would match anything.
    """
    given = words_of(first_line(answer))
    line = f" {' '.join(given)} "

    def is_there(words: list[str]) -> bool:
        return words == given if set(words) <= set(_ARTICLES) else f" {' '.join(words)} " in line

    return float(any(is_there(_some_words(text)) for text in accepted))


def exact_answer(answer: str, accepted: Sequence[str]) -> float:
    """1.0 if the answer's first line is one of the accepted ones; as `answer_match`."""
    given = words_of(first_line(answer))
    return float(any(_some_words(text) == given for text in accepted))


def first_line(answer: str) -> str:
    """What stands before the first line break, leading ones aside: base models go on with other questions."""
    return answer.strip().partition("\n")[0]


def words_of(text: str) -> list[str]:
    """The words of a text, without articles (but where nothing else is there)."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(letter)[0] in "PSZC" else letter for letter in plain)
    words = kept.split()
    return [word for word in words if word not in _ARTICLES] or words


def _some_words(text: str) -> list[str]:
    words = words_of(text)
    if not words:
        raise DataError(f"The answer {text!r} has no letters or digits to look for.")
    return words
