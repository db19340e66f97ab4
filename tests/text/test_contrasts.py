"""Builders: exact parts, the same tokens counted in both conditions, and rows paired as promised."""

from typing import Any

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from moe_lens.errors import DataError
from moe_lens.text.contrasts import (
    _together,
    calibrated_against_overconfident,
    cited_against_uncited,
    document_against_question,
    refusal_against_compliance,
    source_attributed_against_bluffing,
)
from moe_lens.text.pairs import ContrastivePair, ContrastivePairs
from moe_lens.text.prompts import Prompt
from moe_lens.text.spans import counted_batches
from moe_lens.text.templates import Template, default_templates, fill
from tests.text.test_prompts import CHATML, LLAMA
from tests.text.test_spans import KINDS, model_with

ASKED = {"role": "user", "content": "{question}"}
SQUAD = [
    {"id": "q1", "title": "mats", "context": "the cat sat on the mat", "question": "what is the mat?"},
    {"id": "q2", "title": "mats", "context": "what is it? a {cat} }{", "question": "what is it? {}"},
]
CLAIMS = [
    {"question": "what is it?", "answer": "42", "source": "the {cat}"},
    {"question": "the question", "answer": "the answer: the", "source": "the mat"},
]
BUILDERS = {
    "document": (document_against_question, SQUAD),
    "calibrated": (calibrated_against_overconfident, CLAIMS),
    "cited": (cited_against_uncited, CLAIMS),
    "attributed": (source_attributed_against_bluffing, CLAIMS),
}


def part(prompt: Prompt, name: str) -> list[str]:
    texts = [str(prompt.content)] if prompt.messages is None else [m.content for m in prompt.messages]
    return [texts[r[0] if len(r) == 3 else 0][r[-2] : r[-1]] for r in prompt.named[name]]


VALUES = st.text(st.sampled_from("ab {}!:"), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    VALUES,
    VALUES,
    st.lists(st.sampled_from(["{x}", "{y}", "{{", "}}", "a", "b ", "!"]), min_size=1, max_size=8),
)
def test_fields_stand_where_the_parts_say(x: str, y: str, parts: list[str]) -> None:
    written, spans = "", {"x": [], "y": []}
    for piece in parts:
        value = {"{x}": x, "{y}": y, "{{": "{", "}}": "}"}.get(piece, piece)
        if piece in ("{x}", "{y}"):
            spans[piece[1]].append((len(written), len(written) + len(value)))
        written += value
    filled = fill("".join(parts), {"x": x, "y": y})
    assert filled.content == written
    assert filled.spans == {name: tuple(ranges) for name, ranges in spans.items() if ranges}
    in_chat = fill(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "".join(parts)}], {"x": x, "y": y}
    )
    assert in_chat.messages == (("system", "s"), ("user", written))
    assert in_chat.spans == {n: tuple((1, *one) for one in ranges) for n, ranges in spans.items() if ranges}


@pytest.mark.parametrize("side", ["{", "}", "{x.y}", "{x[0]}", "{x!r}", "{x:>5}", "{}", "{0}", "{x y}"])
def test_what_is_no_plain_field_is_refused(side: str) -> None:
    with pytest.raises(DataError, match="Template 'bad', second"):
        Template("bad", "fine", side)


@pytest.mark.parametrize("side", [[], ["text"], [{"role": "user"}], ()])
def test_what_is_no_side_is_refused(side: Any) -> None:
    with pytest.raises(DataError, match="Template 'bad', first"):
        Template("bad", side, "fine")
    with pytest.raises(DataError, match="name"):
        Template("", "a", "b")


def test_a_field_must_be_given() -> None:
    for fields in ({}, {"x": ""}, {"y": "z"}):
        with pytest.raises(DataError, match=r"\{x\}"):
            fill("{x}", fields)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_row_stands_under_every_template(name: str, chat: bool) -> None:
    build, rows = BUILDERS[name]
    pairs: ContrastivePairs = build(rows, chat=chat)
    names = [template.name for template in default_templates(name, chat=chat)]
    assert len(set(names)) >= 3
    assert pairs.template_names == tuple(names)
    assert len(pairs) == len(rows) * len(names)
    assert len({pair.first for pair in pairs}) == len(pairs)  # no two templates write the same
    for i, pair in enumerate(pairs):
        row = rows[i // len(names)]
        assert pair.cluster == row["question"]
        counted = row["question" if name == "document" else "answer"]
        assert part(pair.first, str(pairs.span)) == part(pair.second, str(pairs.span)) == [counted]
        assert (pair.first.messages is not None) == chat
        if "document" in pair.first.named:
            assert part(pair.first, "document") == [row["context"]]


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_same_tokens_are_counted_in_both_conditions(
    name: str, chat: bool, kind: str, template: str
) -> None:
    model, (build, rows) = model_with(kind, template), BUILDERS[name]
    pairs: ContrastivePairs = build(rows, chat=chat)
    counted = []
    for prompts in (pairs.first, pairs.second):
        [(batch, _, chosen)] = counted_batches(model, prompts, pairs.span, len(pairs))
        counted.append([row[here].tolist() for row, here in zip(batch, chosen, strict=True)])
    assert counted[0] == counted[1]
    assert all(counted[0])


def test_columns_and_clusters_are_mapped() -> None:
    rows = [{"text": "doc", "q": "why", "n": 7}, {"text": "doc", "q": "how", "n": 7}]
    for given_as in (rows, pd.DataFrame(rows), datasets.Dataset.from_list(rows)):
        pairs = document_against_question(given_as, document="text", question="q", cluster="n")
        assert set(pairs.clusters) == {"7"}
    mine = [Template("mine", "{document} | {question}", "{question}")]
    [pair] = document_against_question(rows[:1], templates=mine, document="text", question="q")
    assert (pair.first.content, pair.second.content, pair.template) == ("doc | why", "why", "mine")


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "no rows"),
        ([SQUAD[0], {**SQUAD[1], "context": None}], {}, "row 1, column 'context' is empty"),
        ([{"question": "q"}], {}, "row 0 has no column 'context'"),
        ([{**SQUAD[0], "context": 3}], {}, "row 0, column 'context' must be text"),
        (SQUAD, {"templates": []}, "at least one"),
        (SQUAD, {"templates": ["{question}"]}, "templates"),
        (SQUAD, {"templates": [Template("a", "{document} {question}", "{question}")] * 2}, "different names"),
        (
            SQUAD,
            {"templates": [Template("a", "{text}", "{question}")]},
            "Template 'a', first: unknown fields",
        ),
        (SQUAD, {"templates": [Template("a", "{document}", "{question}")]}, "first, has no part 'question'"),
        (SQUAD, {"templates": [Template("a", "{question} {document}", "{question}")]}, "causal model"),
        (SQUAD, {"templates": default_templates("document"), "chat": True}, "chat=True"),
        (SQUAD, {"cluster": "none"}, "row 0 has no column 'none'"),
    ],
)
def test_bad_input_is_refused(rows: Any, options: Any, words: str) -> None:
    with pytest.raises((DataError, TypeCheckError), match=words):
        document_against_question(rows, **options)


def test_a_citation_after_the_answer_is_refused() -> None:
    late = [Template("late", "{question} {answer} [{source}]", "{question} {answer}")]
    with pytest.raises(DataError, match=r"Template 'late'.*causal"):
        cited_against_uncited(CLAIMS, templates=late)
    assert len(cited_against_uncited(CLAIMS, templates=late, span="all")) == 2


def rated(prompt: str, response: str, is_safe: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "is_safe": is_safe}


ONE = [Template("one", "{question} > {answer}", "{question} > {answer}", refusal="No.")]


def texts(pairs: ContrastivePairs) -> list[tuple[Any, Any]]:
    return [(pair.first.content, pair.second.content) for pair in pairs]


def test_unsafe_responses_stand_against_safe_ones_of_the_same_prompt() -> None:
    rows = [
        rated("p", "u1", False),
        rated("q", "s", True),  # no unsafe response: no pair
        rated("p", "s1", True),
        rated("p", "u2", False),
        rated("p", "s2", True),
        rated("p", "u3", False),
        rated("p", "u1", False),  # the same again, from another annotator
        rated("r", "u4", False),  # no safe response: the template refuses
    ]
    pairs = refusal_against_compliance(rows, templates=ONE)
    assert texts(pairs) == [
        ("p > s1", "p > u1"),
        ("p > s2", "p > u2"),
        ("p > s1", "p > u3"),
        ("r > No.", "r > u4"),
    ]
    assert pairs.clusters == ("p", "p", "p", "r")
    assert [part(pair.first, "answer") for pair in pairs] == [["s1"], ["s2"], ["s1"], ["No."]]
    for given_as in (pd.DataFrame(rows), datasets.Dataset.from_list(rows)):
        assert refusal_against_compliance(given_as, templates=ONE) == pairs


def test_responses_rated_both_ways_are_left_out() -> None:
    rows = [rated("p", "x", True), rated("p", "x", False), rated("p", "u", False)]
    assert texts(refusal_against_compliance(rows, templates=ONE)) == [("p > No.", "p > u")]
    with pytest.raises(DataError, match="No prompt has an unsafe response"):
        refusal_against_compliance(rows[:2])


@pytest.mark.parametrize(("safe", "unsafe"), [(True, False), (1, 0), ("True", "False"), ("true", "0")])
def test_ratings_may_be_written_in_many_ways(safe: Any, unsafe: Any) -> None:
    rows = [rated("p", "s", safe), rated("p", "u", unsafe)]
    assert texts(refusal_against_compliance(rows, templates=ONE)) == [("p > s", "p > u")]


@pytest.mark.parametrize("bad", ["yes", 2, None, 0.5])
def test_other_ratings_are_refused(bad: Any) -> None:
    with pytest.raises(DataError, match="row 1, column 'is_safe'"):
        refusal_against_compliance([rated("p", "s", True), rated("p", "u", bad)])


def test_rows_may_hold_both_answers() -> None:
    rows = [{"prompt": "p", "no": "never", "yes": "sure"}]
    assert texts(refusal_against_compliance(rows, templates=ONE, refusal="no", compliance="yes")) == [
        ("p > never", "p > sure")
    ]
    assert texts(refusal_against_compliance(rows, templates=ONE, compliance="yes")) == [
        ("p > No.", "p > sure")
    ]
    with pytest.raises(DataError, match="compliance"):
        refusal_against_compliance(rows, refusal="no")
    silent = [Template("silent", "{question} {answer}", "{question} {answer}")]
    with pytest.raises(DataError, match="'silent' needs a refusal"):
        refusal_against_compliance(rows, templates=silent, compliance="yes")
    with pytest.raises(DataError, match="unknown fields"):
        refusal_against_compliance(rows, templates=[Template("x", "{source}", "{answer}")], compliance="yes")


@pytest.mark.parametrize("chat", [False, True])
def test_default_refusals_differ(chat: bool) -> None:
    pairs = refusal_against_compliance([rated("p", "u", False)], chat=chat)
    assert len({part(pair.first, "answer")[0] for pair in pairs}) == len(pairs) == 3
    assert [part(pair.second, "answer") for pair in pairs] == [["u"]] * 3
    assert all(part(pair.first, "question") == ["p"] for pair in pairs)


@pytest.mark.parametrize("field", ["reasoning_content", "tool_calls", "name"])
def test_what_else_a_message_says_is_read_too(field: str) -> None:
    """A template may write it before the content, so that the conditions differ where the texts do not."""

    def template(*said: Any) -> Template:
        first, second = ([ASKED, {"role": "assistant", "content": "{answer}", **more}] for more in said)
        return Template("t", first, second)

    rows = [{"question": "q", "answer": "a"}]
    pairs = calibrated_against_overconfident(rows, templates=[template({field: "doubt"}, {})])
    assert len(pairs) == 1
    for same in ({}, {field: "doubt"}):
        with pytest.raises(DataError, match="both conditions read"):
            calibrated_against_overconfident(rows, templates=[template(same, same)])


def test_content_in_parts_is_read_as_its_text() -> None:
    parts = [{"type": "text", "text": "{answer}"}]
    whole, split = ({"role": "assistant", "content": content} for content in ("{answer}", parts))
    later = {"role": "user", "content": "later"}
    with pytest.raises(DataError, match="both conditions read"):
        calibrated_against_overconfident(
            [{"question": "q", "answer": "a"}],
            templates=[Template("t", [ASKED, whole], [ASKED, split, later])],
        )


def test_options_of_the_chat_template_are_read_too() -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    prompts = [Prompt(chat), Prompt(chat, template={"enable_thinking": False})]
    plain, without = (ContrastivePair(prompts[0], other, "c", "t") for other in prompts)
    assert len(_together([without], "answer")) == 1
    with pytest.raises(DataError, match="both conditions read"):
        _together([plain], "answer")


def test_unknown_contrasts_are_refused() -> None:
    with pytest.raises(DataError, match="'document'"):
        default_templates("documents")
