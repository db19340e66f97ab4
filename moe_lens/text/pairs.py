"""Pairs of prompts that differ in one condition: from lists, JSONL, CSV, or a Hugging Face dataset.

    pairs = ContrastivePairs.from_lists(with_document, without_document, span="question")
    pairs = ContrastivePairs.from_file("pairs.csv", first="safe", second="unsafe", cluster="topic")
    fitting, held_out = pairs.split(0.5, seed=0)           # no cluster is in both

Pairs that depend on each other share a cluster, which splits and intervals keep together.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

from moe_lens.errors import DataError
from moe_lens.files import FileKind, atomic_write
from moe_lens.results import Result
from moe_lens.text.groups import ContrastiveGroups
from moe_lens.text.pair_rows import (
    check_labels,
    check_pairs,
    checked_labels,
    checked_prompts,
    chosen_numbers,
    digest_of_pair,
    drawn_clusters,
    pair_columns,
    picked,
    span_from_json,
    span_to_json,
)
from moe_lens.text.prompts import Prompt, to_json
from moe_lens.text.rows import Row, at_least_one, csv_rows, ending, jsonl_rows, parsed_json, records
from moe_lens.text.spans import Span

if TYPE_CHECKING:
    import pandas

_KIND: Final = FileKind("moe_lens.ContrastivePairs", 1, (1,), "contrastive pairs")
"""Of the first line of a file. It has no digest, since such files are written and edited by hand, too."""


class ContrastivePair(NamedTuple):
    """One pair, with its cluster (the unit of independence) and its template."""

    first: Prompt
    second: Prompt
    cluster: str
    template: str


@dataclass(frozen=True, repr=False)
class ContrastivePairs(Result):
    """Pairs of prompts: the same matter under a first and a second condition.

    >>> pairs = ContrastivePairs.from_lists(["Document : a", "Document : b"], ["a", "b"])
    >>> len(pairs), pairs[0].first.content, pairs.swapped()[0].first.content
    (2, 'Document : a', 'a')
    >>> pairs[:1], len(pairs[[1, -2]])              # a slice, a list of numbers or a mask gives pairs again
    (ContrastivePairs(1 pair, 1 cluster, span 'all', templates ['default']), 2)

    Attributes:
        first: the prompts of the first condition, one a pair.
        second: those of the second condition.
        span: which tokens count, see `moe_lens.text.Span`; not a list (give the prompts named parts instead).
        clusters: one label a pair. Pairs with the same label are not independent (one row under several
            templates, questions on one document) and are resampled together. By default every pair is
            independent, except of its own duplicates.
        templates: one label a pair: the template that wrote it.

    Raises:
        DataError: no pairs, unequal numbers, a pair whose two prompts are the same, labels that are no text.
    """

    first: tuple[Prompt, ...]
    second: tuple[Prompt, ...]
    span: Span = "all"
    clusters: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            object.__setattr__(self, name, checked_prompts(name, getattr(self, name)))
        check_pairs(self.first, self.second, self.span)
        if not self.clusters:
            digests = tuple(digest_of_pair(*pair) for pair in zip(self.first, self.second, strict=True))
            object.__setattr__(self, "clusters", digests)
        if not self.templates:
            object.__setattr__(self, "templates", ("default",) * len(self.first))
        for name in ("clusters", "templates"):
            check_labels(name, getattr(self, name), len(self.first), "pairs")

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
            first: the prompts of the first condition.
            second: as many of the second condition, in the same order.
            span: which tokens count, see `moe_lens.text.Span`.
            clusters: one label a pair, see the class; None: pairs are independent.
            templates: one label a pair; None: all are "default".

        Raises:
            DataError: a prompt that is none, with the name of its list and its number; or as in the class.
        """
        return cls(
            checked_prompts("first", first),
            checked_prompts("second", second),
            span,
            checked_labels("clusters", clusters),
            checked_labels("templates", templates),
        )

    @classmethod
    def from_outcomes(
        cls,
        prompts: Iterable[Any],
        outcomes: Iterable[Any],
        *,
        first: Any = True,
        span: Span = "all",
        clusters: Iterable[Any] | None = None,
    ) -> ContrastiveGroups:
        """Prompts by what came of them (right against wrong answers): two groups, which make no pairs.

        >>> ContrastivePairs.from_outcomes(["2 + 2 = 4", "1 + 1 = 3", "3 + 1 = 4"], [True, False, True])
        ContrastiveGroups(2 and 1 prompts, 3 clusters, span 'all')

        See `ContrastiveGroups.from_outcomes`.
        """
        return ContrastiveGroups.from_outcomes(prompts, outcomes, first=first, span=span, clusters=clusters)

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
            rows: dictionaries (column -> cell), a DataFrame, or one split of a dataset.
            first: the column of the first condition's prompts; a cell is a text, a list of messages, or a
                dictionary {"content": text or messages, "spans": {name: text or ranges}}.
            second: the column of the second condition's.
            span: which tokens count, see `moe_lens.text.Span`.
            cluster: the column of the cluster labels; None: pairs are independent.
            template: the column of the templates' names; None: all are "default".
            spans: name of a part -> column with its text, which is looked for in both prompts (the last
                occurrence counts) and must be in at least one.

        Raises:
            DataError: no rows; a row or cell that is missing, empty or malformed, by row and column.
        """
        return cls._of_rows(records(rows), first, second, span, cluster, template, spans)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        first: str = "first",
        second: str = "second",
        *,
        span: Span = "all",
        cluster: str | None = None,
        template: str | None = None,
        spans: Mapping[str, str] | None = None,
    ) -> "ContrastivePairs":
        """Pairs from one split of a Hugging Face `datasets` dataset, streamed or not.

        Args:
            dataset: one split, `dataset["train"]`.
            first: the column of the first condition's prompts; a cell is a text, a list of messages, or a
                dictionary {"content": text or messages, "spans": {name: text or ranges}}.
            second: the column of the second condition's.
            span: which tokens count, see `moe_lens.text.Span`.
            cluster: the column of the cluster labels; None: pairs are independent.
            template: the column of the templates' names; None: all are "default".
            spans: name of a part -> column with its text, as in `from_records`.

        Raises:
            DataError: no rows; a row or cell that is missing, empty or malformed, by row and column.
        """
        return cls._of_rows(records(dataset), first, second, span, cluster, template, spans)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        first: str = "first",
        second: str = "second",
        *,
        span: Span | EllipsisType = ...,
        cluster: str | None = None,
        template: str | None = None,
        spans: Mapping[str, str] | None = None,
        chat: bool = False,
    ) -> "ContrastivePairs":
        """Pairs from a .jsonl or .csv file, by its ending.

        Args:
            path: a file as for `from_jsonl` or `from_csv`.
            first: the column of the first condition's prompts.
            second: the column of the second condition's.
            span: which tokens count, see `moe_lens.text.Span`; by default what `save_jsonl` wrote, or "all".
            cluster: the column of the cluster labels; None: what `save_jsonl` wrote, or independent pairs.
            template: the column of the templates' names; None: what `save_jsonl` wrote, or "default".
            spans: name of a part -> column with its text, as in `from_records`.
            chat: in a .csv file, the cells of prompts are lists of messages, written as JSON.

        Raises:
            DataError: a file with another ending, or as in `from_jsonl` and `from_csv`.
        """
        if ending(path, "pairs", (".jsonl", ".csv")) == ".jsonl":
            return cls.from_jsonl(
                path, first, second, span=span, cluster=cluster, template=template, spans=spans
            )
        span = "all" if isinstance(span, EllipsisType) else span
        return cls.from_csv(
            path, first, second, span=span, cluster=cluster, template=template, spans=spans, chat=chat
        )

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        first: str = "first",
        second: str = "second",
        *,
        span: Span | EllipsisType = ...,
        cluster: str | None = None,
        template: str | None = None,
        spans: Mapping[str, str] | None = None,
    ) -> "ContrastivePairs":
        """Pairs from a file with one JSON object a line, or from what `save_jsonl` wrote, with all it kept.

        Args:
            path: the file; its objects are rows as in `from_records`.
            first: the field of the first condition's prompts.
            second: the field of the second condition's.
            span: which tokens count, see `moe_lens.text.Span`; by default what `save_jsonl` wrote, or "all".
            cluster: the field of the cluster labels; None: what `save_jsonl` wrote, or independent pairs.
            template: the field of the templates' names; None: what `save_jsonl` wrote, or "default".
            spans: name of a part -> field with its text, as in `from_records`.

        Raises:
            DataError: a file that cannot be read, or as in `from_records`, by file and line.
        """
        rows = jsonl_rows(path)
        if rows and rows[0][1].get("kind") == _KIND.name:
            (where, about), *rows = rows
            about = _KIND.opened(where, about)
            saved = span_from_json(where, about.get("span"))
            span = saved if isinstance(span, EllipsisType) else span
            cluster, template = cluster or "cluster", template or "template"
        span = "all" if isinstance(span, EllipsisType) else span
        return cls._of_rows(at_least_one(path, rows), first, second, span, cluster, template, spans)

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        first: str = "first",
        second: str = "second",
        *,
        span: Span = "all",
        cluster: str | None = None,
        template: str | None = None,
        spans: Mapping[str, str] | None = None,
        chat: bool = False,
    ) -> "ContrastivePairs":
        """Pairs from a CSV file with a header, in UTF-8.

        Args:
            path: the file.
            first: the column of the first condition's prompts.
            second: the column of the second condition's.
            span: which tokens count, see `moe_lens.text.Span`.
            cluster: the column of the cluster labels; None: pairs are independent.
            template: the column of the templates' names; None: all are "default".
            spans: name of a part -> column with its text, as in `from_records`.
            chat: the cells of prompts are lists of messages, written as JSON.

        Raises:
            DataError: a file that cannot be read, or as in `from_records`, by file and line.
        """
        rows = at_least_one(path, csv_rows(path))
        for where, row in rows if chat else []:
            for column in (first, second):
                row[column] = parsed_json(f"{where}, column {column!r}", row.get(column) or "")
        return cls._of_rows(rows, first, second, span, cluster, template, spans)

    @classmethod
    def _of_rows(
        cls,
        rows: list[Row],
        first: str,
        second: str,
        span: Span,
        cluster: str | None,
        template: str | None,
        spans: Mapping[str, str] | None,
    ) -> "ContrastivePairs":
        columns = pair_columns(rows, first, second, cluster=cluster, template=template, spans=spans)
        return cls.from_lists(**columns._asdict(), span=span)

    def save_jsonl(self, path: str | Path) -> None:
        """Write a file that `from_jsonl` reads back to equal pairs, atomically: one JSON object a line.

        Raises:
            DataError: a span that is a function, which no file can hold.
        """
        lines: list[dict[str, Any]] = [
            {"kind": _KIND.name, "schema": _KIND.schema, "span": span_to_json(self.span)}
        ]
        for pair in self:
            cells = pair._asdict()
            lines.append({**cells, "first": to_json(pair.first), "second": to_json(pair.second)})
        with atomic_write(path) as temporary:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a pair, with the columns first, second, cluster, template; `from_records` reads it back.

        A prompt is a text, a list of messages, or, with named parts, a dictionary of content and spans.
        """
        import pandas

        rows = [
            {"first": to_json(first), "second": to_json(second), "cluster": cluster, "template": template}
            for first, second, cluster, template in self
        ]
        return pandas.DataFrame(rows)

    def __len__(self) -> int:
        return len(self.first)

    @overload
    def __getitem__(self, index: int) -> ContrastivePair: ...

    @overload
    def __getitem__(self, index: slice | Iterable[Any]) -> "ContrastivePairs": ...

    def __getitem__(self, index: Any) -> "ContrastivePair | ContrastivePairs":
        """One pair by its number; `ContrastivePairs` for a slice, or for what `select` takes.

        Raises IndexError for one number that is out of range; DataError as in `select`.
        """
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        if not hasattr(index, "__index__") or getattr(index, "ndim", 0):
            return self.select(index)
        fields = (self.first, self.second, self.clusters, self.templates)
        return ContrastivePair(*(field[index] for field in fields))

    def __iter__(self) -> Iterator[ContrastivePair]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Iterable[Any]) -> "ContrastivePairs":
        """The pairs with these numbers, in this order.

        Args:
            indices: numbers of pairs, negative ones from the end, or one bool a pair, true where it is kept.

        Raises:
            DataError: none, one out of range, or another number of bools than of pairs.
        """
        fields = (self.first, self.second, self.clusters, self.templates)
        first, second, clusters, templates = picked(chosen_numbers(indices, len(self)), *fields)
        return replace(self, first=first, second=second, clusters=clusters, templates=templates)

    @property
    def template_names(self) -> tuple[str, ...]:
        """The names of the templates, in the order in which they first occur."""
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
            fraction: in (0, 1); both parts get at least one cluster.
            seed: the same clusters and the same seed give the same parts, in whatever order the pairs stand.

        Raises:
            DataError: a fraction outside (0, 1), fewer than two clusters.
        """
        chosen = drawn_clusters(self.clusters, fraction, seed)
        first = [cluster in chosen for cluster in self.clusters]
        return self.select(first), self.select([not kept for kept in first])

    def summary(self) -> str:
        """Number of pairs and clusters, the span and the templates."""
        n_clusters = len(set(self.clusters))
        return (
            f"{len(self)} pair{'s' * (len(self) > 1)}, {n_clusters} cluster{'s' * (n_clusters > 1)}, "
            f"span {self.span!r}, templates {list(self.template_names)}"
        )
