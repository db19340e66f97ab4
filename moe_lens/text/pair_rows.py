"""What lists, tables and files say about pairs: checked prompts and labels, and spans as JSON.

    columns = pair_columns(rows, "safe", "unsafe", cluster="topic", template=None, spans=None)
    columns.first, columns.second, columns.clusters

`ContrastivePairs` is made of these columns, in `text/pairs.py`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_lens.checks import share, short, whole_number
from moe_lens.errors import DataError
from moe_lens.text.prompts import Prompt, as_prompt, from_json, to_json
from moe_lens.text.rows import Row, cell, label_of, text_cell
from moe_lens.text.spans import Span, TextSpan


class PairColumns(NamedTuple):
    """The prompts of both conditions, and the labels; None where no column holds any."""

    first: list[Prompt]
    second: list[Prompt]
    clusters: list[str] | None
    templates: list[str] | None


def pair_columns(
    rows: list[Row],
    first: str,
    second: str,
    *,
    cluster: str | None,
    template: str | None,
    spans: Mapping[str, str] | None,
) -> PairColumns:
    """The columns that pairs are made of.

    Args:
        rows: where each stands, and its cells.
        first: the column of the first condition's prompts.
        second: the column of the second condition's.
        cluster: the column of the cluster labels.
        template: the column of the templates' names.
        spans: name of a part -> column with its text, which must occur in at least one of the two prompts.

    Raises:
        DataError: one column for both conditions; a cell that is missing, empty or malformed.
    """
    if first == second:
        raise DataError(f"first and second are the same column, {first!r}; give two.")
    sides: dict[str, list[Prompt]] = {first: [], second: []}
    labels: dict[str, list[str]] = {column: [] for column in (cluster, template) if column is not None}
    for where, row in rows:
        parts = {name: (column, text_cell(where, row, column)) for name, column in (spans or {}).items()}
        prompts = {column: _prompt(where, row, column) for column in sides}
        _check_parts(where, parts, list(prompts.values()))
        for column, prompt in prompts.items():
            present = {name: text for name, (_, text) in parts.items() if _has(prompt, text)}
            sides[column].append(Prompt(prompt.content, {**prompt.spans, **present}, prompt.template))
        for column in labels:
            labels[column].append(label_of(f"{where}, column {column!r}", cell(where, row, column)))
    clusters, templates = (None if column is None else labels[column] for column in (cluster, template))
    return PairColumns(sides[first], sides[second], clusters, templates)


def _check_parts(where: str, parts: Mapping[str, tuple[str, str]], prompts: list[Prompt]) -> None:
    """Raise DataError for a part, (column, text), that is in none of the prompts."""
    for name, (column, text) in parts.items():
        if not any(_has(prompt, text) for prompt in prompts):
            raise DataError(
                f"{where}, column {column!r}: the part {name!r}, {short(text)}, occurs in neither prompt."
            )


def _prompt(where: str, row: Mapping[str, Any], column: str) -> Prompt:
    content = cell(where, row, column)
    try:
        return from_json(content)
    except DataError as error:
        raise DataError(f"{where}, column {column!r}: {error}") from error


def _has(prompt: Prompt, target: str) -> bool:
    texts = [prompt.content] if prompt.messages is None else [m.content for m in prompt.messages]
    return any(target in text for text in texts)


def check_pairs(first: Sequence[Prompt], second: Sequence[Prompt], span: Span) -> None:
    """Raise DataError unless both are as many, at least one, and no pair is one prompt twice; or for a list
    of spans.
    """
    n = len(first)
    if n != len(second):
        raise DataError(f"Pairs need as many first as second prompts; got {n} and {len(second)}.")
    if n == 0:
        raise DataError("There are no pairs; give at least one.")
    same = [i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] == pair[1]]
    if same:
        raise DataError(
            f"{len(same)} of {n} pairs have the same prompt twice, so there is nothing to contrast (pair "
            f"{same[0]}: {short(to_json(first[same[0]]))}); take them out, or check the columns."
        )
    check_one_span(span)


def check_one_span(span: Span) -> None:
    """Raise DataError for a list of spans."""
    if isinstance(span, Sequence) and not isinstance(span, str):
        raise DataError(
            "The span of a contrast is one for all; to count a different text in each prompt, name it in the "
            "prompts."
        )


def check_labels(name: str, labels: Any, n: int, what: str) -> None:
    """Raise DataError unless there is one label, a text, for each of n pairs (or prompts)."""
    if len(labels) != n or not all(isinstance(label, str) and label for label in labels):
        raise DataError(f"{name} must hold one text for each of {n} {what}; got {short(labels)}.")


def checked_prompts(name: str, prompts: Any, each: str = "pair") -> tuple[Prompt, ...]:
    """A list of prompts as `Prompt`s. Raises DataError, with the list's name and the number of the pair."""
    if isinstance(prompts, str | Mapping | Prompt) or not isinstance(prompts, Iterable):
        raise DataError(f"{name} must be a list of prompts; got {short(prompts)}.")
    checked = []
    for index, prompt in enumerate(prompts):
        try:
            checked.append(as_prompt(prompt))
        except DataError as error:
            raise DataError(f"{name}, {each} {index}: {error}") from error
    return tuple(checked)


def checked_labels(name: str, labels: Any, each: str = "pair") -> tuple[str, ...]:
    """One label a pair; empty for None, which stands for the default. Raises DataError for no labels."""
    if labels is None:
        return ()
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise DataError(f"{name} must be a list of labels, one a {each}; got {short(labels)}.")
    texts = tuple(label_of(f"{name}, {each} {index}", label) for index, label in enumerate(labels))
    if not texts:
        raise DataError(f"{name} is empty; give one label a {each}, or None.")
    return texts


def span_to_json(span: Span) -> Any:
    """A span as JSON can hold it. Raises DataError for a function, which no file can hold."""
    if span is None or isinstance(span, str):
        return span
    if isinstance(span, TextSpan):
        return {"text": span.text, "occurrence": span.occurrence}
    if isinstance(span, slice):
        return {"slice": [span.start, span.stop, span.step]}
    raise DataError(
        f"The span {span!r} is a function, which no file can hold; save the pairs with "
        "another span (dataclasses.replace) and give this one when you read them."
    )


def span_from_json(where: str, content: Any) -> Span:
    """The span that `span_to_json` wrote. Raises DataError, saying where, for anything else."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, dict) and set(content) == {"text", "occurrence"}:
        return TextSpan(**content)
    numbers = content.get("slice") if isinstance(content, dict) else None
    if isinstance(numbers, list) and len(numbers) == 3 and all(n is None or type(n) is int for n in numbers):
        return slice(*numbers)
    raise DataError(f"{where}: {short(content)} is no span.")


def digest_of_pair(first: Prompt, second: Prompt) -> str:
    """A label that only the same two prompts share."""
    content = json.dumps([to_json(first), to_json(second)])
    return f"pair-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def digest_of_prompt(prompt: Prompt) -> str:
    """A label that only the same prompt shares."""
    return f"prompt-{hashlib.sha256(json.dumps(to_json(prompt)).encode()).hexdigest()[:16]}"


def chosen_numbers(given: Any, n: int) -> list[int]:
    """Places from 0 to n − 1 that somebody names: by numbers, negative ones from the end, or by a mask.

    >>> chosen_numbers([0, -1], 3), chosen_numbers([True, False, True], 3)
    ([0, 2], [0, 2])

    Raises:
        DataError: none, one out of range, another number of bools than n, or anything else.
    """
    try:
        values = np.asarray(given if hasattr(given, "__array__") else list(given))
    except (TypeError, ValueError, RuntimeError):
        values = np.array("nothing")
    is_mask = values.dtype == bool and values.shape == (n,)
    numbers = np.flatnonzero(values) if is_mask else values
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        numbers = np.array([n])  # which is out of range
    if ((numbers < -n) | (numbers >= n)).any():
        raise DataError(
            f"Pairs are chosen by numbers from {-n} to {n - 1}, at least one, or by {n} bools, one of them "
            f"true; got {short(given)}."
        )
    return (numbers.astype(np.int64) % n).tolist()


def picked(numbers: Iterable[int], *columns: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """Of each column, the entries at these places, in this order.

    >>> picked([2, 0], "abc", (1, 2, 3))
    (('c', 'a'), (3, 1))
    """
    places = list(numbers)
    return tuple(tuple(column[place] for place in places) for column in columns)


def drawn_clusters(labels: Iterable[str], fraction: float, seed: int) -> set[str]:
    """This share of the different labels, at least one and not all, drawn at random.

    Raises:
        DataError: a fraction outside (0, 1), or a single label.
    """
    different = sorted(set(labels))
    fraction, seed = share(fraction, "fraction"), whole_number(seed, "seed")
    if len(different) < 2:
        raise DataError(
            f"All prompts belong to one cluster, {different[0]!r}, and cannot be split; give them labels "
            "that tell independent ones apart."
        )
    size = min(max(round(fraction * len(different)), 1), len(different) - 1)
    order = np.random.default_rng(seed).permutation(len(different))
    return {different[i] for i in order[:size]}
