"""Ready contrasts: the user's rows, written into templates, as `ContrastivePairs` with exact spans.

pairs = document_against_question(rows)                          # rows like SQuAD's
pairs = refusal_against_compliance(rows, chat=True)              # rows like BeaverTails'
mine = Template("mine", first="{document} | {question}", second="{question}")
pairs = document_against_question(rows, templates=[*default_templates("document"), mine])

The words of a template route, too: an expert that answers to "Document:" looks like one that answers to
documents. So every contrast comes with several templates; compare `pairs.of_template(name)`, and keep what
holds under all of them. What is counted (`pairs.span`) is where possible the same text in both conditions,
with the wording before it, since a causal model reads nothing that comes later.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_lens.checks import short
from moe_lens.errors import DataError
from moe_lens.text.pairs import ContrastivePair, ContrastivePairs
from moe_lens.text.prompts import Message, Prompt
from moe_lens.text.rows import cell, label_of, records, text_cell
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
        templates: with the fields {document} (first only, as a rule) and {question}; None: the default ones,
            as chats if `chat`.
        document, question: names of the columns.
        cluster: a column whose rows are not independent ("title", say); None: the question.
        span: what is counted; the question's tokens are the same in both conditions.

    Raises:
        DataError: a missing or empty cell, by row and column; templates that lack a field; no rows.
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

    The rows of one prompt belong together: its n-th unsafe response stands against its n-th safe one (the
    safe ones again from the first, if they are fewer), or against the template's refusal, if no response is
    safe. Prompts without an unsafe response give no pair, nor do responses that the rows call both safe and
    unsafe. The answers differ in wording, so much of what is found may be the words' own.

    >>> rows = [{"prompt": "p", "response": "Sure.", "is_safe": False}]
    >>> pair = refusal_against_compliance(rows)[0]
    >>> pair.first.content
    "User: p\\nAssistant: I'm sorry, but I can't help with that."
    >>> pair.second.content
    'User: p\\nAssistant: Sure.'

    Args:
        rows: dictionaries, a DataFrame or a dataset, with the columns of BeaverTails.
        templates: with the fields {question} and {answer}; None: the default ones, as chats if `chat`.
        prompt, response, is_safe: names of the columns; is_safe holds true or false (or 1, 0).
        refusal, compliance: columns with the two answers, where a row holds both; then response and is_safe
            are not read. compliance alone: the template's refusal stands against it.
        cluster: a column whose rows are not independent; None: the prompt.
        span: what is counted.

    Raises:
        DataError: a missing or empty cell, by row and column; no pair at all; a template without refusal
            where one is needed.
    """
    if compliance is not None:
        found = _explicit_answers(records(rows), prompt, refusal, compliance, cluster)
    elif refusal is not None:
        raise DataError("refusal needs the column of the other answers, too: give compliance.")
    else:
        found = _rated_answers(records(rows), prompt, response, is_safe, cluster)
    if not found:
        raise DataError("No prompt has an unsafe response, so there is nothing to contrast.")
    chosen = _templates("refusal", templates, chat)
    for template in chosen:
        for side in SIDES:
            _fields(template, side, ("question", "answer"))
    made = []
    for asked in found:
        for template in chosen:
            answers = (asked.safe or _refusal_of(template), asked.unsafe)
            sides = [{"question": asked.prompt, "answer": answer} for answer in answers]
            made.append(_pair(asked.where, template, sides, asked.cluster))
    return _together(made, span)


def calibrated_against_overconfident(rows: Any, **options: Any) -> ContrastivePairs:
    """An answer said with measured doubt, against the same answer said with certainty.

    >>> rows = [{"question": "Capital of France?", "answer": "Paris"}]
    >>> pair = calibrated_against_overconfident(rows)[0]
    >>> pair.first.content
    "Question: Capital of France?\\nAnswer: I'm not certain, but I believe the answer is Paris"
    >>> pair.second.content
    "Question: Capital of France?\\nAnswer: I'm absolutely certain that the answer is Paris"

    Args:
        rows: dictionaries, a DataFrame or a dataset, with a question and an answer.
        options: templates (with the fields {question} and {answer}), chat, question, answer, cluster, span as
            in `source_attributed_against_bluffing`.

    Raises:
        DataError: as in `document_against_question`.
    """
    return _answers("calibrated", rows, **options)


def cited_against_uncited(rows: Any, **options: Any) -> ContrastivePairs:
    """An answer after a citation of its source, against the same answer without one.

    >>> rows = [{"question": "Capital of France?", "answer": "Paris", "source": "Atlas, p. 3"}]
    >>> cited_against_uncited(rows)[0].first.content
    'Question: Capital of France?\\nAnswer: [Atlas, p. 3] The answer is Paris'

    Args:
        rows: dictionaries, a DataFrame or a dataset, with a question, an answer and a source.
        options: templates (with the fields {question}, {answer} and {source}), chat, question, answer,
            source, cluster, span as in `source_attributed_against_bluffing`.

    Raises:
        DataError: as in `document_against_question`.
    """
    return _answers("cited", rows, **options)


def source_attributed_against_bluffing(rows: Any, **options: Any) -> ContrastivePairs:
    """An answer that says where it comes from, against the same answer with an empty claim to authority.

    >>> rows = [{"question": "Capital of France?", "answer": "Paris", "source": "The atlas"}]
    >>> pair = source_attributed_against_bluffing(rows)[0]
    >>> pair.first.content
    'Question: Capital of France?\\nAnswer: The source The atlas gives this answer: Paris'
    >>> pair.second.content
    'Question: Capital of France?\\nAnswer: As everybody surely knows, the answer is: Paris'

    Args:
        rows: dictionaries, a DataFrame or a dataset, with a question, an answer and a source.
        options: templates: with the fields {question}, {answer} and {source}; by default three, as chats with
            chat=True. question, answer, source: names of the columns, these by default. cluster: a column
            whose rows are not independent; by default the question. span: what is counted, "answer" by
            default: its tokens are the same in both conditions, the wording before it is not.

    Raises:
        DataError: as in `document_against_question`.
    """
    return _answers("attributed", rows, **options)


def _answers(
    contrast: str,
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
    columns = {"question": question, "answer": answer, "source": source}
    return _pairs(contrast, rows, templates, chat, columns, cluster, span)


class _Asked(NamedTuple):
    """A prompt with two answers; no safe one where the template's refusal is to stand."""

    where: str
    prompt: str
    safe: str | None
    unsafe: str
    cluster: str


def _rated_answers(
    rows: list[tuple[str, dict[str, Any]]], prompt: str, response: str, is_safe: str, cluster: str | None
) -> list[_Asked]:
    ratings: dict[str, dict[str, set[bool]]] = {}  # prompt -> response -> what its rows say
    origin: dict[str, tuple[str, str]] = {}  # prompt -> (where, cluster) of its first row
    for where, row in rows:
        asked, answer = text_cell(where, row, prompt), text_cell(where, row, response)
        safe = _truth(f"{where}, column {is_safe!r}", cell(where, row, is_safe))
        ratings.setdefault(asked, {}).setdefault(answer, set()).add(safe)
        origin.setdefault(asked, (where, _cluster(where, row, cluster, asked)))
    found = []
    for asked, answers in ratings.items():
        safe, unsafe = ([answer for answer, said in answers.items() if said == {x}] for x in (True, False))
        where, label = origin[asked]
        for number, answer in enumerate(unsafe):
            against = safe[number % len(safe)] if safe else None
            found.append(_Asked(where, asked, against, answer, label))
    return found


def _explicit_answers(
    rows: list[tuple[str, dict[str, Any]]],
    prompt: str,
    refusal: str | None,
    compliance: str,
    cluster: str | None,
) -> list[_Asked]:
    found = []
    for where, row in rows:
        asked, unsafe = text_cell(where, row, prompt), text_cell(where, row, compliance)
        safe = None if refusal is None else text_cell(where, row, refusal)
        found.append(_Asked(where, asked, safe, unsafe, _cluster(where, row, cluster, asked)))
    return found


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
    made = []
    for where, row in records(rows):
        label = _cluster(where, row, cluster, text_cell(where, row, columns["question"]))
        for template in chosen:
            sides = [{f: text_cell(where, row, columns[f]) for f in fields} for fields in used[template.name]]
            made.append(_pair(where, template, sides, label))
    return _together(made, span)


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


def _together(made: list[ContrastivePair], span: str) -> ContrastivePairs:
    for pair in made:
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
        tuple(pair.first for pair in made),
        tuple(pair.second for pair in made),
        span,
        tuple(pair.cluster for pair in made),
        tuple(pair.template for pair in made),
    )


def _read_until(prompt: Prompt, span: str) -> Any:
    """All of a prompt up to the end of a part; None if it has no such part."""
    if span not in prompt.named:
        return None
    end = max(prompt.named[span])
    if prompt.messages is None:
        return prompt.content[: end[1]]
    message = prompt.messages[end[0]]
    return [*prompt.messages[: end[0]], Message(message.role, message.content[: end[2]])]


def _cluster(where: str, row: Mapping[str, Any], column: str | None, default: str) -> str:
    return default if column is None else label_of(f"{where}, column {column!r}", cell(where, row, column))
