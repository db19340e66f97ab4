"""Ready-made contrasts: your rows written into templates, as `ContrastivePairs` with exact spans.

    pairs = document_against_question(rows)                          # rows like SQuAD's
    pairs = refusal_against_compliance(rows, chat=True)              # rows like BeaverTails'
    mine = Template("mine", first="{document} | {question}", second="{question}")
    pairs = document_against_question(rows, templates=[*default_templates("document"), mine])

A template's own words are routed, too: an expert that responds to "Document:" looks like one that responds to
documents. So every contrast comes with several templates; compare `pairs.of_template(name)`, and keep what
holds under all of them. Where possible, what is counted (`pairs.span`) is the same text in both conditions,
after the wording that differs, since a causal model cannot see what comes later.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_lens.checks import short
from moe_lens.errors import DataError
from moe_lens.text.pairs import ContrastivePair, ContrastivePairs
from moe_lens.text.prompts import Message, Prompt
from moe_lens.text.rows import Row, cell, label_of, records, text_cell
from moe_lens.text.spans import PARTS
from moe_lens.text.templates import SIDES, Template, default_templates, fill, parsed, texts_of


def document_against_question(
    rows: Any,
    *,
    templates: Iterable[Template] | None = None,
    chat: bool = False,
    document: str = "context",
    question: str = "question",
    cluster: str | None = None,
    span: str = "question",
) -> ContrastivePairs:
    """A question after its document, against the question alone (SteerMoE, arXiv 2509.09660: faithfulness).

    >>> rows = [{"context": "Rain falls.", "question": "What falls?"}]
    >>> pair = document_against_question(rows)[0]
    >>> pair.first.content
    'Document: Rain falls.\\nQuestion: What falls?\\nAnswer:'
    >>> pair.second.content
    'Question: What falls?\\nAnswer:'

    Args:
        rows: dictionaries, a DataFrame or a dataset, with the columns of SQuAD.
        templates: with the fields {document} (usually in the first condition only) and {question}; None: the
            three of `default_templates`.
        chat: write the default templates as chats.
        document: the column of the documents.
        question: the column of the questions.
        cluster: a column that says which rows are not independent ("title", say); None: the question.
        span: what is counted; the question's tokens are the same in both conditions.

    Raises:
        DataError: no rows; a missing or empty cell, by row and column; a template that lacks a field.
    """
    columns = {"document": document, "question": question}
    return _pairs("document", rows, templates, chat, columns, cluster, span)


def refusal_against_compliance(
    rows: Any,
    *,
    templates: Iterable[Template] | None = None,
    chat: bool = False,
    prompt: str = "prompt",
    response: str = "response",
    is_safe: str = "is_safe",
    refusal: str | None = None,
    compliance: str | None = None,
    cluster: str | None = None,
    span: str = "answer",
) -> ContrastivePairs:
    """An unsafe prompt and its refusal, against compliance (SteerMoE, arXiv 2509.09660: safety).

    The rows of one prompt belong together: its n-th unsafe response is paired with its n-th safe one (the
    safe ones start over if there are fewer of them), or with the template's refusal if no response is safe.
    Prompts without an unsafe response give no pair, nor do responses that are rated both safe and unsafe. The
    two answers differ in wording, so much of what is found may be due to the words alone.

    >>> rows = [{"prompt": "p", "response": "Sure.", "is_safe": False}]
    >>> pair = refusal_against_compliance(rows)[0]
    >>> pair.first.content
    "User: p\\nAssistant: I'm sorry, but I can't help with that."
    >>> pair.second.content
    'User: p\\nAssistant: Sure.'

    Args:
        rows: dictionaries, a DataFrame or a dataset, with the columns of BeaverTails.
        templates: with the fields {question} and {answer}; None: the three of `default_templates`.
        chat: write the default templates as chats.
        prompt: the column of the prompts.
        response: the column of the responses, one a row.
        is_safe: the column of their ratings: true or false (or 1, 0).
        refusal: the column of the refusing answer, where a row holds both answers; `response` and `is_safe`
            are then not read.
        compliance: the column of the complying answer. Without `refusal`, the template's own refusal is
            contrasted with it.
        cluster: a column that says which rows are not independent; None: the prompt.
        span: what is counted.

    Raises:
        DataError: a missing or empty cell, by row and column; no pair at all; a template without a refusal
            where one is needed.
    """
    if compliance is not None:
        answered = _explicit_answers(records(rows), prompt, refusal, compliance, cluster)
    elif refusal is not None:
        raise DataError("refusal needs the column of the complying answers, too: give compliance.")
    else:
        answered = _rated_answers(records(rows), prompt, response, is_safe, cluster)
    if not answered:
        raise DataError("No prompt has an unsafe response, so there is nothing to contrast.")
    chosen = _templates("refusal", templates, chat)
    for template in chosen:
        for side in SIDES:
            _fields(template, side, ("question", "answer"))
    pairs = []
    for row in answered:
        for template in chosen:
            answers = (row.safe or _refusal_of(template), row.unsafe)
            sides = [{"question": row.prompt, "answer": answer} for answer in answers]
            pairs.append(_pair(row.where, template, sides, row.cluster))
    return _together(pairs, span)


def calibrated_against_overconfident(
    rows: Any,
    *,
    templates: Iterable[Template] | None = None,
    chat: bool = False,
    question: str = "question",
    answer: str = "answer",
    cluster: str | None = None,
    span: str = "answer",
) -> ContrastivePairs:
    """An answer given with measured doubt, against the same answer given with certainty.

    >>> rows = [{"question": "Capital of France?", "answer": "Paris"}]
    >>> pair = calibrated_against_overconfident(rows)[0]
    >>> pair.first.content
    "Question: Capital of France?\\nAnswer: I'm not certain, but I believe the answer is Paris"
    >>> pair.second.content
    "Question: Capital of France?\\nAnswer: I'm absolutely certain that the answer is Paris"

    Args:
        rows: dictionaries, a DataFrame or a dataset, with a question and an answer.
        templates: with the fields {question} and {answer}; None: the three of `default_templates`.
        chat: write the default templates as chats.
        question: the column of the questions.
        answer: the column of the answers.
        cluster: a column that says which rows are not independent; None: the question.
        span: what is counted; the answer's tokens are the same in both conditions, the wording before it is
            not.

    Raises:
        DataError: no rows; a missing or empty cell, by row and column; a template that lacks a field.
    """
    columns = {"question": question, "answer": answer}
    return _pairs("calibrated", rows, templates, chat, columns, cluster, span)


def cited_against_uncited(
    rows: Any,
    *,
    templates: Iterable[Template] | None = None,
    chat: bool = False,
    question: str = "question",
    answer: str = "answer",
    source: str = "source",
    cluster: str | None = None,
    span: str = "answer",
) -> ContrastivePairs:
    """An answer after a citation of its source, against the same answer without one.

    >>> rows = [{"question": "Capital of France?", "answer": "Paris", "source": "Atlas, p. 3"}]
    >>> cited_against_uncited(rows)[0].first.content
    'Question: Capital of France?\\nAnswer: [Atlas, p. 3] The answer is Paris'

    Args:
        rows: dictionaries, a DataFrame or a dataset, with a question, an answer and a source.
        templates: with the fields {question}, {answer} and {source}; None: the three of `default_templates`.
        chat: write the default templates as chats.
        question: the column of the questions.
        answer: the column of the answers.
        source: the column of the sources.
        cluster: a column that says which rows are not independent; None: the question.
        span: what is counted; the answer's tokens are the same in both conditions, the wording before it is
            not.

    Raises:
        DataError: no rows; a missing or empty cell, by row and column; a template that lacks a field.
    """
    columns = {"question": question, "answer": answer, "source": source}
    return _pairs("cited", rows, templates, chat, columns, cluster, span)


def source_attributed_against_bluffing(
    rows: Any,
    *,
    templates: Iterable[Template] | None = None,
    chat: bool = False,
    question: str = "question",
    answer: str = "answer",
    source: str = "source",
    cluster: str | None = None,
    span: str = "answer",
) -> ContrastivePairs:
    """An answer that names its source, against the same answer with an empty claim to authority.

    >>> rows = [{"question": "Capital of France?", "answer": "Paris", "source": "The atlas"}]
    >>> pair = source_attributed_against_bluffing(rows)[0]
    >>> pair.first.content
    'Question: Capital of France?\\nAnswer: The source The atlas gives this answer: Paris'
    >>> pair.second.content
    'Question: Capital of France?\\nAnswer: As everybody surely knows, the answer is: Paris'

    Args:
        rows: dictionaries, a DataFrame or a dataset, with a question, an answer and a source.
        templates: with the fields {question}, {answer} and {source}; None: the three of `default_templates`.
        chat: write the default templates as chats.
        question: the column of the questions.
        answer: the column of the answers.
        source: the column of the sources.
        cluster: a column that says which rows are not independent; None: the question.
        span: what is counted; the answer's tokens are the same in both conditions, the wording before it is
            not.

    Raises:
        DataError: no rows; a missing or empty cell, by row and column; a template that lacks a field.
    """
    columns = {"question": question, "answer": answer, "source": source}
    return _pairs("attributed", rows, templates, chat, columns, cluster, span)


class _Answered(NamedTuple):
    """A prompt with two answers; `safe` is None where the template's refusal takes its place."""

    where: str
    prompt: str
    safe: str | None
    unsafe: str
    cluster: str


def _rated_answers(
    rows: list[Row], prompt: str, response: str, is_safe: str, cluster: str | None
) -> list[_Answered]:
    ratings: dict[str, dict[str, set[bool]]] = {}  # prompt -> response -> how its rows rate it
    origin: dict[str, tuple[str, str]] = {}  # prompt -> (where, cluster) of its first row
    for where, row in rows:
        question, answer = text_cell(where, row, prompt), text_cell(where, row, response)
        safe = _truth(f"{where}, column {is_safe!r}", cell(where, row, is_safe))
        ratings.setdefault(question, {}).setdefault(answer, set()).add(safe)
        origin.setdefault(question, (where, _cluster(where, row, cluster, question)))
    answered = []
    for question, answers in ratings.items():
        safe, unsafe = ([answer for answer, rated in answers.items() if rated == {x}] for x in (True, False))
        where, label = origin[question]
        for number, answer in enumerate(unsafe):
            partner = safe[number % len(safe)] if safe else None
            answered.append(_Answered(where, question, partner, answer, label))
    return answered


def _explicit_answers(
    rows: list[Row], prompt: str, refusal: str | None, compliance: str, cluster: str | None
) -> list[_Answered]:
    answered = []
    for where, row in rows:
        question, unsafe = text_cell(where, row, prompt), text_cell(where, row, compliance)
        safe = None if refusal is None else text_cell(where, row, refusal)
        answered.append(_Answered(where, question, safe, unsafe, _cluster(where, row, cluster, question)))
    return answered


def _refusal_of(template: Template) -> str:
    if not template.refusal:
        raise DataError(f"Template {template.name!r} needs a refusal: a prompt has no safe response.")
    return template.refusal


def _truth(where: str, content: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    if str(content).lower() not in known:
        raise DataError(f"{where} must be true or false (or 1, 0); got {short(content)}.")
    return known[str(content).lower()]


def _pairs(
    contrast: str,
    rows: Any,
    templates: Iterable[Template] | None,
    chat: bool,
    columns: Mapping[str, str],
    cluster: str | None,
    span: str,
) -> ContrastivePairs:
    """Every row under every template; `columns`: field -> column."""
    chosen = _templates(contrast, templates, chat)
    used = {template.name: [_fields(template, side, columns) for side in SIDES] for template in chosen}
    pairs = []
    for where, row in records(rows):
        label = _cluster(where, row, cluster, text_cell(where, row, columns["question"]))
        for template in chosen:
            sides = [{f: text_cell(where, row, columns[f]) for f in fields} for fields in used[template.name]]
            pairs.append(_pair(where, template, sides, label))
    return _together(pairs, span)


def _templates(contrast: str, templates: Iterable[Template] | None, chat: bool) -> tuple[Template, ...]:
    if templates is None:
        return default_templates(contrast, chat=chat)
    if chat:
        raise DataError("chat=True chooses among the default templates; write your own with messages.")
    chosen = tuple(templates)
    if not chosen or not all(isinstance(template, Template) for template in chosen):
        raise DataError(f"templates must be Templates, at least one; got {short(chosen)}.")
    names = [template.name for template in chosen]
    if len(set(names)) != len(names):
        raise DataError(f"Templates must have different names; got {names}.")
    return chosen


def _fields(template: Template, side: str, known: Iterable[str]) -> list[str]:
    names = [
        name for text in texts_of(getattr(template, side)) for _, name in parsed(text) if name is not None
    ]
    if unknown := sorted(set(names) - set(known)):
        raise DataError(f"Template {template.name!r}, {side}: unknown fields {unknown}; use {sorted(known)}.")
    return list(dict.fromkeys(names))


def _pair(where: str, template: Template, sides: list[dict[str, str]], label: str) -> ContrastivePair:
    try:
        first, second = fill(template.first, sides[0]), fill(template.second, sides[1])
    except DataError as error:
        raise DataError(f"{where}, template {template.name!r}: {error}") from error
    return ContrastivePair(first, second, label, template.name)


def _together(pairs: list[ContrastivePair], span: str) -> ContrastivePairs:
    """The pairs as one, if their span is there in both conditions and something differs before its end."""
    for pair in pairs:
        for side, prompt in zip(SIDES, (pair.first, pair.second), strict=True):
            if span in PARTS and span not in prompt.named:
                raise DataError(
                    f"Template {pair.template!r}, {side}, has no part {span!r} to count; write the field "
                    f"{{{span}}} into it, or give another span."
                )
        read = [_read_until(prompt, span) for prompt in (pair.first, pair.second)]
        if read[0] is not None and read[0] == read[1]:
            raise DataError(
                f"Template {pair.template!r}: up to the end of the {span} both conditions read "
                f"{short(read[0])}. A causal model routes them alike; put what differs before it, or count "
                "another span."
            )
    return ContrastivePairs(
        tuple(pair.first for pair in pairs),
        tuple(pair.second for pair in pairs),
        span,
        tuple(pair.cluster for pair in pairs),
        tuple(pair.template for pair in pairs),
    )


def _read_until(prompt: Prompt, span: str) -> Any:
    """All of a prompt up to the end of a part, as far as it can differ; None if it has no such part.

    That is more than the texts: options of the chat template, and what else messages say (reasoning, tool
    calls), of which a template may write any before the part.
    """
    if span not in prompt.named:
        return None
    end = max(prompt.named[span])
    if prompt.messages is None:
        return prompt.content[: end[1]]
    message = prompt.messages[end[0]]
    rest = {name: more for name, more in message.given.items() if name not in ("role", "content")}
    until = Message(message.role, message.content[: end[2]], json.dumps(rest, sort_keys=True) if rest else "")
    options = [dict(prompt.template)] if prompt.template else []
    return [*options, *prompt.messages[: end[0]], until]


def _cluster(where: str, row: Mapping[str, Any], column: str | None, default: str) -> str:
    return default if column is None else label_of(f"{where}, column {column!r}", cell(where, row, column))
