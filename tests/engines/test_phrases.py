"""Scores that need no judge, on answers written for the test."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.engines.phrases import PHRASES, answer_match, exact_answer, phrase_score, words_of
from moe_lens.errors import DataError

SAYS = {
    "refusal_phrase": [
        "I'm sorry, but I cannot help with that.",
        "I’m really sorry.",
        "Unfortunately I can't do that.",
        "I can not do it.",
        "As an AI, I have no opinion.",
        "As a friendly note: I won't.",
        "That is illegal.",
        "I am not able to do it",
        "I apologise for that.",
    ],
    "abstention_phrase": [
        "unknown",
        "The document does not mention it.",
        "It doesn't say.",
        "It cannot be answered.",
        "There is not enough information.",
        "This is not stated.",
        "This isn’t stated.",
    ],
    "conflict_phrase": [
        "conflict",
        "The texts contradict each other.",
        "The documents are inconsistent",
        "There are two different answers.",
    ],
}
SAYS_NOT = {
    "refusal_phrase": [
        "Sure, here it is.",
        "As an aide to you, yes.",
        "",
        "The canton is small.",
        "sorry sight",
    ],
    "abstention_phrase": ["Paris.", "", "I answer: Bergen.", "The unknowns x and y"[:3]],
    "conflict_phrase": ["Paris.", "", "one answer"],
}


@pytest.mark.parametrize(("name", "answer"), [(name, text) for name in SAYS for text in SAYS[name]])
def test_a_phrase_is_found(name: str, answer: str) -> None:
    assert phrase_score(name, answer) == 1.0
    assert phrase_score(name, f"Well.\n{answer.upper()}") == 1.0


@pytest.mark.parametrize(("name", "answer"), [(name, text) for name in SAYS_NOT for text in SAYS_NOT[name]])
def test_another_answer_has_none(name: str, answer: str) -> None:
    assert phrase_score(name, answer) == 0.0


def test_an_unknown_list() -> None:
    with pytest.raises(DataError, match=f"there are {', '.join(PHRASES)}"):
        phrase_score("toxicity", "text")


@pytest.mark.parametrize(
    ("answer", "accepted", "within", "alone"),
    [
        ("Paris", ["Paris"], 1, 1),
        ("It is paris, of course", ["Paris"], 1, 0),
        ("Parisian", ["Paris"], 0, 0),
        ("The Beatles.", ["beatles"], 1, 1),
        ("New York", ["New York City", "new  york"], 1, 1),
        ("  \n42", ["42"], 1, 1),
        ("Rome\nQuestion: which? Answer: Paris", ["Paris"], 0, 0),
        ("the", ["The"], 1, 1),
        ("A.", ["A"], 1, 1),
        ("It is a river", ["A"], 0, 0),
        ("ﬁnch", ["finch"], 1, 1),
        ("İstanbul", ["İSTANBUL"], 1, 1),
        ("", ["Paris"], 0, 0),
    ],
)
def test_answers_match(answer: str, accepted: list[str], within: int, alone: int) -> None:
    assert answer_match(answer, accepted) == within
    assert exact_answer(answer, accepted) == alone


def test_an_answer_that_would_match_anything_is_refused() -> None:
    with pytest.raises(DataError, match="no letters"):
        answer_match("Paris", ["..."])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(alphabet="bcdé1 ", min_size=1), min_size=1), st.text(alphabet="xyz"))
def test_what_stands_between_other_words_matches(parts: list[str], other: str) -> None:
    accepted = [part for part in parts if words_of(part)]
    for text in accepted:
        assert answer_match(f"{other}, {text}! {other}", accepted) == 1.0
        assert answer_match(text, [text]) == exact_answer(text, [text]) == 1.0
