"""Pairs of prompts that differ in one condition: from lists, JSONL, CSV, or a Hugging Face dataset.

pairs = ContrastivePairs.from_lists(with_document, without_document, span="question")
pairs = ContrastivePairs.from_csv("pairs.csv", first="safe", second="unsafe", cluster="topic")
fitting, held_out = pairs.split(0.5, seed=0)           # no cluster is in both
collect_routing(model, fitting.first, span=fitting.span)
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from moe_lens.checks import as_index, short
from moe_lens.errors import DataError
from moe_lens.files import atomic_write
from moe_lens.text.prompts import Prompt, as_prompt, from_json, to_json
from moe_lens.text.rows import (
    at_least_one,
    cell,
    csv_rows,
    jsonl_rows,
    label_of,
    parsed_json,
    records,
    text_cell,
)
from moe_lens.text.spans import Span, TextSpan

_KIND: Final = "moe_lens.ContrastivePairs"
_SCHEMA: Final = 1


class ContrastivePair(NamedTuple):
    """One pair, with its cluster (the unit of independence) and its template."""

    first: Prompt
    second: Prompt
    cluster: str
    template: str


@dataclass(frozen=True)
class ContrastivePairs:
    """Pairs of prompts: the same matter under a first and a second condition.

    >>> pairs = ContrastivePairs.from_lists(["Document : a", "Document : b"], ["a", "b"])
    >>> len(pairs), pairs[0].first.content, pairs.swapped()[0].first.content
    (2, 'Document : a', 'a')

    Attributes:
        first, second: the prompts, one of each a pair.
        span: which tokens to count, see `moe_lens.spans.Span`; not a list (give prompts named parts instead).
        clusters: one label a pair. Pairs of one label are not independent (one row under several templates,
            questions on one document) and are resampled together. By default pairs are independent unless
            they are the same.
        templates: one label a pair: the template that wrote it.

    Raises:
        DataError: no pairs, unequal numbers, a pair of twice the same prompt, labels that are no text.
    """

    first: tuple[Prompt, ...]
    second: tuple[Prompt, ...]
    span: Span = "all"
    clusters: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            object.__setattr__(self, name, _prompts(name, getattr(self, name)))
        n = len(self.first)
        if n != len(self.second):
            raise DataError(f"Pairs need as many first as second prompts; got {n} and {len(self.second)}.")
        if n == 0:
            raise DataError("There are no pairs; give at least one.")
        same = [i for i, pair in enumerate(zip(self.first, self.second, strict=True)) if pair[0] == pair[1]]
        if same:
            raise DataError(
                f"{len(same)} of {n} pairs have the same prompt twice, so there is nothing to contrast (pair "
                f"{same[0]}: {short(to_json(self.first[same[0]]))}); take them out, or check the columns."
            )
        if isinstance(self.span, Sequence) and not isinstance(self.span, str):
            raise DataError("The span of pairs is one for all; give prompts named parts for one of each.")
        if not self.clusters:
            own = tuple(_digest(*pair) for pair in zip(self.first, self.second, strict=True))
            object.__setattr__(self, "clusters", own)
        if not self.templates:
            object.__setattr__(self, "templates", ("default",) * n)
        for name, labels in (("clusters", self.clusters), ("templates", self.templates)):
            if len(labels) != n or not all(isinstance(label, str) and label for label in labels):
                raise DataError(f"{name} must hold one text for each of {n} pairs; got {short(labels)}.")

    @classmethod
    def from_lists(
        cls,
        first: Iterable[Any],
        second: Iterable[Any],
        *,
        span: Span = "all",
        clusters: Iterable[Any] | None = None,
        templates: Iterable[Any] | None = None,
    ) -> "ContrastivePairs":
        """Pairs from two lists of prompts: strings, chats (lists of messages) or `Prompt`s.

        Args:
            clusters, templates: one label a pair; see the class.

        Raises:
            DataError: naming the list and the number of a prompt at fault, or as in the class.
        """
        return cls(
            _prompts("first", first),
            _prompts("second", second),
            span,
            _labels("clusters", clusters),
            _labels("templates", templates),
        )

    @classmethod
    def from_records(
        cls,
        rows: Any,
        first: str = "first",
        second: str = "second",
        *,
        span: Span = "all",
        cluster: str | None = None,
        template: str | None = None,
        spans: Mapping[str, str] | None = None,
    ) -> "ContrastivePairs":
        """Pairs from rows: dictionaries, a pandas DataFrame or a `datasets.Dataset`.

        >>> rows = [{"safe": "w1 no", "unsafe": "w1 yes", "id": 7}]
        >>> ContrastivePairs.from_records(rows, "safe", "unsafe", cluster="id").clusters
        ('7',)

        Args:
            first, second: the columns of the prompts; a cell is a text, a list of messages, or a dictionary
                {"content": text or messages, "spans": {name: text or ranges}}.
            cluster, template: columns of the labels.
            spans: name of a part -> column with its text, which is looked for in both prompts (the last
                occurrence counts) and must be in one at least.

        Raises:
            DataError: a row or cell that is missing, empty or of another form, by row and column; no rows.
        """
        return _pairs_of_rows(
            records(rows), first, second, span=span, cluster=cluster, template=template, spans=spans
        )

    @classmethod
    def from_dataset(
        cls, dataset: Any, first: str = "first", second: str = "second", **options: Any
    ) -> "ContrastivePairs":
        """Pairs from one split of a Hugging Face `datasets` dataset, streamed or not.

        Arguments and errors are those of `from_records`.
        """
        return cls.from_records(dataset, first, second, **options)

    @classmethod
    def from_jsonl(
        cls, path: str | Path, first: str = "first", second: str = "second", **options: Any
    ) -> "ContrastivePairs":
        """Pairs from a file with one JSON object a line, or from what `save_jsonl` wrote, with all it kept.

        Arguments and errors are those of `from_records`; the errors name the file and the line.
        """
        rows = jsonl_rows(path)
        if rows and rows[0][1].get("kind") == _KIND:
            (where, about), *rows = rows
            if about.get("schema") != _SCHEMA:
                raise DataError(f"{where}: pairs of schema {about.get('schema')!r}, not {_SCHEMA}.")
            saved = {"span": _span_from_json(where, about.get("span"))}
            options = {**saved, "cluster": "cluster", "template": "template", **options}
        return _pairs_of_rows(at_least_one(path, rows), first, second, **options)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        first: str = "first",
        second: str = "second",
        *,
        chat: bool = False,
        **options: Any,
    ) -> "ContrastivePairs":
        """Pairs from a CSV file with a header, in UTF-8.

        The other arguments and errors are those of `from_records`; the errors name the file and the line.

        Args:
            chat: the cells of prompts are lists of messages, written as JSON.
        """
        rows = at_least_one(path, csv_rows(path))
        for where, row in rows if chat else []:
            for column in (first, second):
                row[column] = parsed_json(f"{where}, column {column!r}", row.get(column) or "")
        return _pairs_of_rows(rows, first, second, **options)

    def save_jsonl(self, path: str | Path) -> None:
        """Write a file that `from_jsonl` reads back to equal pairs, atomically: one JSON object a line.

        Raises:
            DataError: a span that is a function, which no file can hold.
        """
        lines: list[dict[str, Any]] = [{"kind": _KIND, "schema": _SCHEMA, "span": _span_to_json(self.span)}]
        for pair in self:
            cells = pair._asdict()
            lines.append({**cells, "first": to_json(pair.first), "second": to_json(pair.second)})
        with atomic_write(path) as temporary:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> ContrastivePair:
        return ContrastivePair(
            self.first[index], self.second[index], self.clusters[index], self.templates[index]
        )

    def __iter__(self) -> Iterator[ContrastivePair]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Iterable[int]) -> "ContrastivePairs":
        """The pairs of these numbers, in this order. Raises DataError for none, or one out of range."""
        chosen = [as_index(index) for index in indices]
        good = [index for index in chosen if index is not None and index < len(self)]
        if not good or len(good) != len(chosen):
            raise DataError(f"select needs numbers of pairs, from 0 to {len(self) - 1}; got {short(chosen)}.")
        fields = (self.first, self.second, self.clusters, self.templates)
        first, second, clusters, templates = (tuple(field[i] for i in good) for field in fields)
        return replace(self, first=first, second=second, clusters=clusters, templates=templates)

    @property
    def template_names(self) -> tuple[str, ...]:
        """The different templates, in the order in which they first occur."""
        return tuple(dict.fromkeys(self.templates))

    def of_template(self, name: str) -> "ContrastivePairs":
        """The pairs of one template. Raises DataError for an unknown one."""
        if name not in self.templates:
            raise DataError(f"No pair has the template {name!r}; there are {list(self.template_names)}.")
        return self.select(i for i, template in enumerate(self.templates) if template == name)

    def swapped(self) -> "ContrastivePairs":
        """The opposite contrast: second and first change places."""
        return replace(self, first=self.second, second=self.first)

    def __add__(self, other: "ContrastivePairs") -> "ContrastivePairs":
        """These pairs, then the other's; equal cluster labels become one cluster. Raises for other spans."""
        if not isinstance(other, ContrastivePairs):
            return NotImplemented
        if self.span != other.span:
            raise DataError(f"Pairs of the spans {self.span!r} and {other.span!r} cannot be put together.")
        return ContrastivePairs(
            self.first + other.first,
            self.second + other.second,
            self.span,
            self.clusters + other.clusters,
            self.templates + other.templates,
        )

    def split(self, fraction: float, seed: int) -> tuple["ContrastivePairs", "ContrastivePairs"]:
        """Two disjoint sets of pairs; the first gets this share of the clusters, drawn at random.

        >>> pairs = ContrastivePairs.from_lists("a b c d".split(), "A B C D".split())
        >>> [len(part) for part in pairs.split(0.5, seed=0)]
        [2, 2]

        Args:
            fraction: in (0, 1); both parts get one cluster at least.
            seed: the same clusters and the same seed give the same parts, in whatever order they stand.

        Raises:
            DataError: a fraction outside (0, 1), fewer than two clusters.
        """
        labels = sorted(set(self.clusters))
        if not isinstance(fraction, int | float) or not 0 < fraction < 1 or as_index(seed) is None:
            raise DataError(
                f"split needs a fraction in (0, 1) and a seed from 0 on; got {fraction!r}, {seed!r}."
            )
        if len(labels) < 2:
            raise DataError(f"All {len(self)} pairs are of one cluster, {labels[0]!r}, and cannot be split.")
        size = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
        order = np.random.default_rng(seed).permutation(len(labels))
        chosen = {labels[i] for i in order[:size]}
        inside = [cluster in chosen for cluster in self.clusters]
        first, second = ([i for i, here in enumerate(inside) if here is side] for side in (True, False))
        return self.select(first), self.select(second)

    def __repr__(self) -> str:
        return (
            f"ContrastivePairs({len(self)} pairs, {len(set(self.clusters))} clusters, span {self.span!r}, "
            f"templates {list(self.template_names)})"
        )


def _pairs_of_rows(
    rows: list[tuple[str, dict[str, Any]]],
    first: str,
    second: str,
    *,
    span: Span = "all",
    cluster: str | None = None,
    template: str | None = None,
    spans: Mapping[str, str] | None = None,
) -> ContrastivePairs:
    sides: dict[str, list[Prompt]] = {first: [], second: []}
    if first == second:
        raise DataError(f"first and second are the same column, {first!r}; give two.")
    labels: dict[str, list[str]] = {column: [] for column in (cluster, template) if column is not None}
    for where, row in rows:
        targets = {name: text_cell(where, row, column) for name, column in (spans or {}).items()}
        prompts = {column: _prompt(where, row, column) for column in sides}
        for name, target in targets.items():
            if not any(_has(prompt, target) for prompt in prompts.values()):
                raise DataError(
                    f"{where}, column {(spans or {})[name]!r}: the part {name!r}, {short(target)}, occurs in "
                    "neither prompt."
                )
        for column, prompt in prompts.items():
            here = {name: target for name, target in targets.items() if _has(prompt, target)}
            sides[column].append(Prompt(prompt.content, {**prompt.spans, **here}))
        for column in labels:
            labels[column].append(label_of(f"{where}, column {column!r}", cell(where, row, column)))
    clusters, templates = (None if column is None else labels[column] for column in (cluster, template))
    return ContrastivePairs.from_lists(
        sides[first], sides[second], span=span, clusters=clusters, templates=templates
    )


def _prompts(name: str, prompts: Any) -> tuple[Prompt, ...]:
    if isinstance(prompts, str | Mapping | Prompt) or not isinstance(prompts, Iterable):
        raise DataError(f"{name} must be a list of prompts; got {short(prompts)}.")
    made = []
    for index, prompt in enumerate(prompts):
        try:
            made.append(as_prompt(prompt))
        except DataError as error:
            raise DataError(f"{name}, pair {index}: {error}") from error
    return tuple(made)


def _labels(name: str, labels: Any) -> tuple[str, ...]:
    """Empty for None, which stands for the default."""
    if labels is None:
        return ()
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise DataError(f"{name} must be a list of labels, one a pair; got {short(labels)}.")
    made = tuple(label_of(f"{name}, pair {index}", label) for index, label in enumerate(labels))
    if not made:
        raise DataError(f"{name} is empty; give one label a pair, or None.")
    return made


def _prompt(where: str, row: Mapping[str, Any], column: str) -> Prompt:
    content = cell(where, row, column)
    try:
        return from_json(content)
    except DataError as error:
        raise DataError(f"{where}, column {column!r}: {error}") from error


def _has(prompt: Prompt, target: str) -> bool:
    texts = [prompt.content] if prompt.messages is None else [m.content for m in prompt.messages]
    return any(target in text for text in texts)


def _digest(first: Prompt, second: Prompt) -> str:
    content = json.dumps([to_json(first), to_json(second)])
    return f"pair-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _span_to_json(span: Span) -> Any:
    if span is None or isinstance(span, str):
        return span
    if isinstance(span, TextSpan):
        return {"text": span.text, "occurrence": span.occurrence}
    if isinstance(span, slice):
        return {"slice": [span.start, span.stop, span.step]}
    raise DataError(f"The span {span!r} is a function, which no file can hold; give the span when reading.")


def _span_from_json(where: str, content: Any) -> Span:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, dict) and set(content) == {"text", "occurrence"}:
        return TextSpan(**content)
    numbers = content.get("slice") if isinstance(content, dict) else None
    if isinstance(numbers, list) and len(numbers) == 3 and all(n is None or type(n) is int for n in numbers):
        return slice(*numbers)
    raise DataError(f"{where}: {short(content)} is no span.")
