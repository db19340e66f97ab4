"""The benchmarks of SteerMoE (arXiv 2509.09660), as what they need of your data. No data ship with moe_lens.

    benchmark = BENCHMARKS["faitheval_counterfactual"]
    documents = benchmark.documents("file.jsonl")          # [{"prompt": ..., "choices": [...], "gold": 2}]

The templates are moe_lens' own wording; give the one that you want. A score is a number of one answer: "acc"
and "acc_norm" (which option is most probable, by the sum of log-probabilities and by that sum divided by the
option's characters), or one of phrases.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Final, Literal

from moe_lens.checks import as_index, short
from moe_lens.engines.phrases import answer_match, exact_answer, phrase_score
from moe_lens.errors import DataError
from moe_lens.text.rows import cell, csv_rows, jsonl_rows, label_of, records, text_cell

Rows = list[tuple[str, dict[str, Any]]]
Documents = list[dict[str, Any]]
PREFIX: Final = "moe_lens/"

_OPEN_BOOK: Final = "{context}\n\nQuestion: {question}\nAnswer:"
_ANSWERS: Final = {"answer_match": answer_match, "exact_answer": exact_answer}


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark asks of a row, and how an answer is scored.

    Attributes:
        name: without "moe_lens/".
        about: what it measures, and where it comes from.
        form: "choice" (one of several options is the right one) or "text" (the model writes).
        columns: those that a row must have.
        template: of the prompt, with columns in braces.
        scores: names of the scores, the usual one first; none: it needs a judge.
        lower_is_better: for the usual use of the score beside a plan, as a collateral measure.
        max_tokens: of an answer.
    """

    name: str
    about: str
    form: Literal["choice", "text"]
    columns: tuple[str, ...]
    template: str
    scores: tuple[str, ...]
    lower_is_better: bool = False
    max_tokens: int = 32

    def documents(
        self,
        data: Any,
        *,
        columns: Mapping[str, str] | None = None,
        template: str | None = None,
        clusters: str | None = None,
    ) -> Documents:
        """The harness' documents: "prompt" and "cluster", and "choices" and "gold", or "answers".

        Args:
            data: a .jsonl or .csv file, a list of dictionaries, a DataFrame, or one split of a dataset.
            columns: where your columns have other names: {"question": "query"}.
            template: instead of the benchmark's.
            clusters: column of labels; rows of one label are not independent. None: each row its own.

        Raises:
            DataError: naming the row and the column at fault.
        """
        named = _renamed(self, columns)
        template = self.template if template is None else template
        fields = _fields_of(template)
        documents = []
        for number, (where, row) in enumerate(_rows(data)):
            texts = {field: text_cell(where, row, named.get(field, field)) for field in fields}
            label = str(number) if clusters is None else label_of(where, cell(where, row, clusters))
            document: dict[str, Any] = {"prompt": template.format(**texts), "cluster": label}
            if self.form == "choice":
                document |= _choice(where, row, named)
            elif "answer" in self.columns:
                document["answers"] = _answers(where, row, named)
            documents.append(document)
        return documents

    def score(self, name: str, document: Mapping[str, Any], answer: str) -> float:
        """A score of a written answer."""
        if name in _ANSWERS:
            return _ANSWERS[name](answer, document["answers"])
        return phrase_score(name, answer)


def _table(*benchmarks: Benchmark) -> dict[str, Benchmark]:
    return {benchmark.name: benchmark for benchmark in benchmarks}


_QUESTION: Final = ("context", "question")
_PROMPT: Final = ("prompt",)
_SAFETY: Final[dict[str, Any]] = {
    "form": "text",
    "columns": _PROMPT,
    "template": "{prompt}",
    "scores": ("refusal_phrase",),
    "max_tokens": 128,
}

BENCHMARKS: Final = _table(
    Benchmark(
        "faitheval_counterfactual",
        "follows a context that contradicts what the model remembers (FaithEval, arXiv 2410.03727)",
        "choice",
        (*_QUESTION, "choices", "answer"),
        _OPEN_BOOK,
        ("acc", "acc_norm"),
    ),
    Benchmark(
        "faitheval_unanswerable",
        "says that the context has no answer (FaithEval, arXiv 2410.03727)",
        "text",
        _QUESTION,
        "{context}\n\nIf the text does not give the answer, say 'unknown'.\nQuestion: {question}\nAnswer:",
        ("abstention_phrase",),
    ),
    Benchmark(
        "faitheval_inconsistent",
        "says that the context contradicts itself (FaithEval, arXiv 2410.03727)",
        "text",
        _QUESTION,
        "{context}\n\nIf the texts contradict each other, say 'conflict'.\nQuestion: {question}\nAnswer:",
        ("conflict_phrase",),
    ),
    Benchmark(
        "cf_triviaqa",
        "answers trivia from a context in which the answer was replaced (CF-TriviaQA)",
        "text",
        (*_QUESTION, "answer"),
        _OPEN_BOOK,
        ("answer_match", "exact_answer"),
    ),
    Benchmark(
        "mquake",
        "answers from an edited fact in the context (MQuAKE, arXiv 2305.14795)",
        "text",
        (*_QUESTION, "answer"),
        _OPEN_BOOK,
        ("answer_match", "exact_answer"),
    ),
    Benchmark(
        "mctest",
        "reads a story that contradicts nothing: the control (MCTest, Richardson et al. 2013)",
        "choice",
        (*_QUESTION, "choices", "answer"),
        _OPEN_BOOK,
        ("acc", "acc_norm"),
    ),
    Benchmark("tdc2023", "refuses requests of the Trojan Detection Challenge 2023", **_SAFETY),
    Benchmark("malicious_instruct", "refuses requests of MaliciousInstruct (arXiv 2310.06987)", **_SAFETY),
    Benchmark("advbench", "refuses requests of AdvBench (arXiv 2307.15043)", **_SAFETY),
    Benchmark("strongreject", "refuses requests of StrongREJECT (arXiv 2402.10260)", **_SAFETY),
    Benchmark(
        "harmless",
        "refuses requests that harm nobody, which it should not",
        **{**_SAFETY, "lower_is_better": True},
    ),
    Benchmark("fluency", "writes fluently; needs a judge", **{**_SAFETY, "scores": ()}),
)
"""Name -> benchmark; `harness_task` knows them as "moe_lens/NAME"."""


def benchmark_named(name: str) -> Benchmark:
    """A benchmark, with or without "moe_lens/" before its name. Raises DataError where there is none."""
    found = BENCHMARKS.get(name.removeprefix(PREFIX))
    if found is None:
        raise DataError(f"moe_lens defines no benchmark {name!r}; it defines {', '.join(BENCHMARKS)}.")
    return found


def _rows(data: Any) -> Rows:
    if isinstance(data, str | Path):
        rows = (csv_rows if Path(data).suffix == ".csv" else jsonl_rows)(data)
        if not rows:
            raise DataError(f"{data} has no rows; give at least one.")
        return rows
    return records(data)


def _renamed(benchmark: Benchmark, columns: Mapping[str, str] | None) -> dict[str, str]:
    known = {*benchmark.columns, "aliases"}
    given = dict(columns or {})
    if unknown := sorted(set(given) - known):
        raise DataError(
            f"columns names {unknown[0]!r}; {benchmark.name} reads {', '.join(benchmark.columns)}, and "
            "aliases if they are there."
        )
    return given


def _fields_of(template: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"The template {short(template)} is malformed: {error}.") from error
    if not fields or not all(field.isidentifier() for field in fields):
        raise DataError(f"A template needs columns in braces, such as {{question}}; got {short(template)}.")
    return list(dict.fromkeys(fields))


def _choice(where: str, row: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """The options and which of them is right; ARC's {"label": [...], "text": [...]} is read, too."""
    column = named.get("choices", "choices")
    options, labels = cell(where, row, column), None
    if isinstance(options, Mapping):
        labels, options = options.get("label"), options.get("text")
    options = _plain(options)
    if not _are_texts(options) or len(options) < 2:
        raise DataError(
            f"{where}, column {column!r} must be a list of at least two texts; got {short(options)}."
        )
    texts = [str(option).strip() for option in options]
    if len(set(texts)) < len(texts):
        raise DataError(f"{where}, column {column!r} has an option twice: {short(texts)}.")
    column = named.get("answer", "answer")
    answer = cell(where, row, column)
    gold = _place_of(answer, texts, None if labels is None else [str(label) for label in _plain(labels)])
    if gold is None:
        raise DataError(
            f"{where}, column {column!r} must be one of the options, its letter (A, B, ...) or its number "
            f"from 0; got {short(answer)} of {short(texts)}."
        )
    return {"choices": texts, "gold": gold}


def _place_of(answer: Any, texts: list[str], labels: list[str] | None) -> int | None:
    """A text that is an option; else a label of the row's own, a number from 0, or a letter."""
    if isinstance(answer, str) and answer.strip() in texts:
        return texts.index(answer.strip())
    if labels is not None and str(answer) in labels:
        return labels.index(str(answer))
    number = as_index(answer)
    if number is None and isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().isalpha():
        number = ord(answer.strip().upper()) - ord("A")
    return number if number is not None and 0 <= number < len(texts) else None


def _answers(where: str, row: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """The answer or answers, and the aliases where the row has them."""
    accepted: list[str] = []
    for field in ("answer", "aliases"):
        column = named.get(field, field)
        if field == "aliases" and not row.get(column):
            continue
        content = _plain(cell(where, row, column))
        texts = [content] if isinstance(content, str) else content
        if not _are_texts(texts):
            raise DataError(
                f"{where}, column {column!r} must be a text or a list of texts; got {short(content)}."
            )
        accepted += [str(text) for text in texts]
    try:
        answer_match("", accepted)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return accepted


def _plain(given: Any) -> Any:
    """A list of what a DataFrame from parquet has as an array."""
    return given.tolist() if hasattr(given, "tolist") else given


def _are_texts(given: Any) -> bool:
    is_list = isinstance(given, list | tuple) and len(given) > 0
    return is_list and all(isinstance(text, str) and text.strip() for text in given)
