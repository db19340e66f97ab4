"""Every result of statistics and detection says itself in one line, and shows a table in a notebook."""

import dataclasses
import inspect
from importlib import import_module
from typing import Any

import pandas as pd
import pytest

from moe_lens.detection import PairedCounts, compare_routing, risk_difference, selection_stability
from moe_lens.results import Result
from moe_lens.statistics import RouteRecord, domain_specialisation, vocabulary_specialisation
from tests.statistics.sums import random_cache, random_tables


class Sized(Result):
    def __init__(self, words: str, rows: int | None = None) -> None:
        self.words, self.rows = words, rows

    def summary(self) -> str:
        return self.words


class Tabled(Sized):
    def to_dataframe(self) -> pd.DataFrame:
        return pd.DataFrame({"row": range(self.rows or 0), "value": [1 / 3] * (self.rows or 0)})


def test_the_line_is_class_and_summary_on_one_line() -> None:
    assert repr(Sized("two  words,\n more")) == "Sized(two words, more)"


@pytest.mark.parametrize("length", [0, 150, 153, 154, 155, 1000])
def test_a_long_line_is_cut(length: int) -> None:
    line = repr(Sized("x" * length))
    assert len(line) == min(length + len("Sized()"), 160)
    assert line.endswith("...)" if length > 153 else ")")


def test_a_long_line_is_cut_between_words_and_without_a_comma() -> None:
    words = " ".join(f"word{n}," for n in range(100))
    line = repr(Sized(words))
    assert line.endswith(" ...)")
    assert len(line) <= 160
    kept = line.removeprefix("Sized(").removesuffix(" ...)")
    assert words.startswith(f"{kept}, word")
    assert len(line) + len(" word20,") > 160


def test_a_notebook_gets_the_line_and_the_table() -> None:
    assert Sized("a < b & c")._repr_html_() == "<p><code>Sized(a &lt; b &amp; c)</code></p>"
    html = Tabled("t", 3)._repr_html_()
    assert html.startswith("<p><code>Tabled(t)</code></p><table")
    assert html.count("<tr") == 4
    assert "0.3333<" in html
    assert Tabled("t", 500)._repr_html_().count("<tr") < 30


def test_a_result_must_say_something() -> None:
    with pytest.raises(NotImplementedError):
        repr(Result())


def results() -> list[Any]:
    one, two = random_tables(0), random_tables(1)
    scores = compare_routing(one, two, n_resamples=20, n_permutations=20)
    return [
        one, one.load_balance(), one.co_routing, one.per_prompt, one.by_position, one.vocabulary,
        one.coactivation, one.adjacent_overlap, one.transitions, domain_specialisation({"a": one, "b": two}),
        vocabulary_specialisation(one, n_draws=5), RouteRecord.from_cache(random_cache(0, (2, 3))),
        risk_difference(one, two), scores, scores.evidence, selection_stability(scores, n=2, n_resamples=20),
        PairedCounts.of_pairs([[1.0, 2.0]], [3], [[0.0, 1.0]], [2]),
    ]  # fmt: skip


@pytest.mark.parametrize("result", results(), ids=lambda result: type(result).__name__)
def test_no_result_prints_its_arrays(result: Any) -> None:
    line = repr(result)
    assert line.startswith(f"{type(result).__name__}(")
    assert "\n" not in line
    assert "tensor(" not in line
    assert "array(" not in line
    assert len(line) <= 160
    html = result._repr_html_()
    assert html.startswith("<p><code>")
    assert ("<table" in html) == hasattr(result, "to_dataframe")


@pytest.mark.parametrize("room", ["statistics", "detection"])
def test_every_dataclass_of_the_room_is_a_result(room: str) -> None:
    face = import_module(f"moe_lens.{room}")
    classes = [thing for name in face.__all__ if inspect.isclass(thing := getattr(face, name))]
    found = {thing.__name__ for thing in classes if dataclasses.is_dataclass(thing)}
    assert found == {thing.__name__ for thing in classes if issubclass(thing, Result)}
    assert len(found) >= 4
