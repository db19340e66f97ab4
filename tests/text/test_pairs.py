"""Pairs: nothing lost on the way from lists and files, every fault named by file, row and column."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import DataError
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.prompts import Prompt
from moe_lens.text.rows import records
from moe_lens.text.spans import TextSpan
from tests.text.test_prompts import chat

ROWS = [
    {"id": 1, "safe": 'no, "never"\nat all', "unsafe": "yes", "topic": "a", "made_by": "x"},
    {"id": 2, "safe": "nein\u2028doch", "unsafe": "ja 🙂", "topic": "a", "made_by": "y"},
    {"id": 3, "safe": "non", "unsafe": "oui", "topic": "b", "made_by": "x"},
]
COLUMNS: Any = {"first": "safe", "second": "unsafe", "cluster": "topic", "template": "made_by"}


def contents(pairs: ContrastivePairs) -> list[tuple[Any, Any, str, str]]:
    return [(pair.first.content, pair.second.content, pair.cluster, pair.template) for pair in pairs]


EXPECTED = [(row["safe"], row["unsafe"], row["topic"], row["made_by"]) for row in ROWS]


def test_every_source_gives_the_same_pairs(tmp_path: Path) -> None:
    jsonl, table = tmp_path / "pairs.jsonl", tmp_path / "pairs.csv"
    jsonl.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", "utf-8")
    with open(table, "w", encoding="utf-8-sig", newline="") as file:  # as Excel does it
        writer = csv.DictWriter(file, ["safe", "unsafe", "topic", "made_by", "id"])
        writer.writeheader()
        writer.writerows(ROWS)
    columns = list(zip(*EXPECTED, strict=True))
    made = [
        ContrastivePairs.from_records(ROWS, **COLUMNS),
        ContrastivePairs.from_records(iter(ROWS), **COLUMNS),
        ContrastivePairs.from_records(pd.DataFrame(ROWS), **COLUMNS),
        ContrastivePairs.from_dataset(datasets.Dataset.from_list(ROWS), **COLUMNS),
        ContrastivePairs.from_dataset(datasets.Dataset.from_list(ROWS).to_iterable_dataset(), **COLUMNS),
        ContrastivePairs.from_jsonl(jsonl, **COLUMNS),
        ContrastivePairs.from_csv(table, **COLUMNS),
        ContrastivePairs.from_lists(*columns[:2], clusters=columns[2], templates=columns[3]),
    ]
    for pairs in made:
        assert contents(pairs) == EXPECTED
        assert pairs == made[0]
        assert pairs.span == "all"


def test_chats_come_from_every_source(tmp_path: Path) -> None:
    row = {"first": chat("user: q", "assistant: no"), "second": chat("user: q", "assistant: yes")}
    jsonl, table = tmp_path / "pairs.jsonl", tmp_path / "pairs.csv"
    jsonl.write_text(json.dumps(row))
    pd.DataFrame([{key: json.dumps(value) for key, value in row.items()}]).to_csv(table, index=False)
    for pairs in (
        ContrastivePairs.from_lists([row["first"]], [row["second"]], span="answer"),
        ContrastivePairs.from_dataset(datasets.Dataset.from_list([row]), span="answer"),
        ContrastivePairs.from_jsonl(jsonl, span="answer"),
        ContrastivePairs.from_csv(table, chat=True, span="answer"),
    ):
        assert pairs.first == (Prompt(row["first"]),)
        assert pairs.second == (Prompt(row["second"]),)
        assert pairs.span == "answer"


def test_a_file_keeps_all_of_the_pairs(tmp_path: Path) -> None:
    prompts = [
        Prompt("ab\u2028é 🙂", {"x": (0, 1)}),
        Prompt(chat("user: q", "assistant: a"), {"x": "q"}),
        Prompt("c"),
    ]
    for span in ("x", None, TextSpan("a", "first"), slice(-2, None), slice(None, None, 2)):
        pairs = ContrastivePairs(
            tuple(prompts), (*prompts[1:], Prompt("d")), span, ("k", "k", "l"), ("s", "t", "t")
        )
        pairs.save_jsonl(tmp_path / "pairs.jsonl")
        assert ContrastivePairs.from_jsonl(tmp_path / "pairs.jsonl") == pairs
    assert ContrastivePairs.from_jsonl(tmp_path / "pairs.jsonl", span="last").span == "last"
    pairs = ContrastivePairs.from_lists(["a"], ["b"], span=lambda tokens: tokens > 0)
    with pytest.raises(DataError, match="function"):
        pairs.save_jsonl(tmp_path / "pairs.jsonl")


def test_columns_of_parts_are_looked_for_in_both_prompts() -> None:
    rows = [{"first": "D: rain. Q: why?", "second": "Q: why?", "q": "why?", "d": "rain"}]
    pairs = ContrastivePairs.from_records(rows, spans={"question": "q", "document": "d"}, span="question")
    assert pairs.first[0].named == {"question": ((12, 16),), "document": ((3, 7),)}
    assert pairs.second[0].named == {"question": ((3, 7),)}
    with pytest.raises(DataError, match=r"row 0, column 'q'.*'when', occurs in neither"):
        ContrastivePairs.from_records([{**rows[0], "q": "when"}], spans={"question": "q"})


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NA, "", []], ids=str)
@pytest.mark.parametrize("column", ["safe", "topic"])
def test_a_missing_cell_is_named(missing: Any, column: str) -> None:
    rows = [ROWS[0], {**ROWS[1], column: missing}]
    with pytest.raises(DataError, match=rf"row 1, column '{column}'"):
        ContrastivePairs.from_records(rows, **COLUMNS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ("rows", "dictionaries"),
        (3, "dictionaries"),
        ({"train": ROWS}, "one split"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "one split"),
        ([ROWS[0], "text"], "row 1 must"),
        ([{"safe": "a"}], "row 0 has no column 'unsafe'; its columns are \\['safe'\\]"),
        ([{**ROWS[0], "safe": 3}], "row 0, column 'safe'"),
        ([{**ROWS[0], "safe": ["a", "b"]}], "row 0, column 'safe'"),
        ([{**ROWS[0], "topic": 2.5}], "row 0, column 'topic' must be a label"),
        ([{**ROWS[0], "safe": "yes"}], "same prompt twice.*pair 0"),
    ],
)
def test_bad_rows_are_refused(rows: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ContrastivePairs.from_records(rows, **COLUMNS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"first": "a", "second": "b"}\n{"first": "a"', "line 2 is no JSON"),
        (b'\n["a", "b"]', "line 2 must be a JSON object"),
        (b'{"first": "a", "second": "b"}\n\n{"first": "a"}', "line 3 has no column 'second'"),
        (b'{"first": "a", "second": NaN}', "line 1, column 'second' is empty"),
        (b'{"first": "a", "second": [{"role": "user"}]}', "line 1, column 'second': Message 0"),
        (b"", "no rows"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"kind": "moe_lens.ContrastivePairs", "schema": 9}', "its schema is 9"),
        (b'{"kind": "moe_lens.ContrastivePairs", "schema": 1, "span": "all"}', "no rows"),
        (b'{"kind": "moe_lens.ContrastivePairs", "schema": 1, "span": 3}', "no span"),
        (b"[" * 100_000, "no JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"pairs\.jsonl.*{words}"):
        ContrastivePairs.from_jsonl(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("first,second\na,b\nc", "line 3, column 'second' is empty"),
        ("first,second\na,b\nc,", "line 3, column 'second' is empty"),
        ("first,second\na,b\nc,d,e", "line 3 has more cells"),
        ("first,other\na,b", "line 2 has no column 'second'"),
        ('first,second\na,"b', "no CSV"),
        ("first,second\n", "no rows"),
        ("", "no rows"),
        ("first,first,second\na,b,c", "two columns of the same name"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(DataError, match=rf"pairs\.csv.*{words}"):
        ContrastivePairs.from_csv(tmp_path / "pairs.csv")


@pytest.mark.parametrize("name", ["pairs.CSV", "pairs.JSONL", "pairs.Jsonl"])
def test_an_ending_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("first,second\na,b\n" if "CSV" in name else '{"first": "a", "second": "b"}\n')
    assert [prompt.content for prompt in ContrastivePairs.from_file(path).first] == ["a"]
    with pytest.raises(DataError, match=r"pairs are read from .jsonl and .csv files; got the ending '.txt'"):
        ContrastivePairs.from_file(tmp_path / "pairs.txt")


def test_long_cells_and_bad_chats_in_tables(tmp_path: Path) -> None:
    path, limit = tmp_path / "pairs.csv", csv.field_size_limit()
    path.write_text(f"first,second\n{'a ' * 100_000},b\n")
    assert len(str(ContrastivePairs.from_csv(path).first[0].content)) == 200_000
    assert csv.field_size_limit() == limit
    with pytest.raises(DataError, match=r"line 2, column 'first' is no JSON"):
        ContrastivePairs.from_csv(path, chat=True)
    with pytest.raises(DataError, match="cannot be read"):
        ContrastivePairs.from_csv(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((["a"], []), {}, "1 and 0"),
        (([], []), {}, "no pairs"),
        (("a", ["b"]), {}, "first must be a list"),
        ((["a", 3], ["b", "c"]), {}, "first, pair 1"),
        ((["a", ""], ["b", "c"]), {}, "first, pair 1"),
        ((["a"], ["a"]), {}, "same prompt twice"),
        ((["a"], ["b"]), {"clusters": []}, "clusters is empty"),
        ((["a"], ["b"]), {"clusters": ["x", "y"]}, "clusters must hold"),
        ((["a"], ["b"]), {"templates": [None]}, "templates, pair 0"),
        ((["a"], ["b"]), {"clusters": "x"}, "clusters must be a list"),
        ((["a"], ["b"]), {"span": ["all"]}, "one for all"),
    ],
)
def test_bad_lists_are_refused(arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ContrastivePairs.from_lists(*arguments, **options)


def test_pairs_are_independent_unless_they_are_the_same() -> None:
    pairs = ContrastivePairs.from_lists(["a", "b", "a", "a"], ["x", "x", "x", "y"])
    labels = pairs.clusters
    assert labels[0] == labels[2]
    assert len(set(labels)) == 3
    later = ContrastivePairs.from_lists(["c"], ["z"])
    assert not set(labels) & set(later.clusters)  # so that sums do not merge what is independent
    assert len(pairs + later) == 5


def test_taking_apart_and_putting_together() -> None:
    pairs = ContrastivePairs.from_records(ROWS, **COLUMNS)
    assert pairs.template_names == ("x", "y")
    assert contents(pairs.of_template("x")) == [EXPECTED[0], EXPECTED[2]]
    assert contents(pairs.of_template("x") + pairs.of_template("y")) == [EXPECTED[i] for i in (0, 2, 1)]
    assert [(b, a, *rest) for a, b, *rest in contents(pairs.swapped())] == EXPECTED
    assert pairs.swapped().swapped() == pairs
    assert pairs[2].second.content == "oui"
    assert contents(pairs.select([2, 0])) == [EXPECTED[2], EXPECTED[0]]
    for wrong in (lambda: pairs.of_template("z"), lambda: pairs.select([]), lambda: pairs.select([3])):
        with pytest.raises(DataError):
            wrong()
    with pytest.raises(DataError, match="spans"):
        _ = pairs + ContrastivePairs.from_lists(["a"], ["b"], span="last")


@pytest.mark.parametrize(
    ("index", "places"),
    [
        (slice(None, 2), [0, 1]), (slice(None, None, -1), [3, 2, 1, 0]), (slice(-2, None), [2, 3]),
        ([1, -1, 1], [1, 3, 1]), (range(2), [0, 1]), (np.array([2, -4]), [2, 0]),
        (torch.tensor([3, 0]), [3, 0]),
        ([True, False, False, True], [0, 3]), (np.array([0, 1, 1, 0], dtype=bool), [1, 2]),
        (torch.tensor([False, True, False, False]), [1]), ((np.int64(2),), [2]), (iter([2]), [2]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_several_pairs_are_chosen_like_elements_of_a_list(index: Any, places: list[int]) -> None:
    pairs = ContrastivePairs.from_lists(
        list("abcd"), list("wxyz"), clusters=list("kkll"), templates=list("tutu"), span="last"
    )
    chosen = pairs[index]
    assert isinstance(chosen, ContrastivePairs)
    assert list(chosen) == [list(pairs)[place] for place in places]
    assert chosen.span == "last"


@pytest.mark.parametrize("index", [0, -1, 2, np.int64(-2), torch.tensor(3)], ids=str)
def test_one_number_gives_one_pair(index: Any) -> None:
    pairs = ContrastivePairs.from_lists(
        list("abcd"), list("wxyz"), clusters=list("kkll"), templates=list("tutu")
    )
    assert pairs[index] == list(pairs)[index]
    with pytest.raises(IndexError):
        _ = pairs[4]


@pytest.mark.parametrize(
    "index",
    [[], [4], [0, -5], [True, False], [False] * 4, "ab", [0.0], [[0]], [None], slice(9, None)],
    ids=str,
)
def test_no_pairs_are_chosen_by_anything_else(index: Any) -> None:
    pairs = ContrastivePairs.from_lists(list("abcd"), list("wxyz"))
    with pytest.raises(DataError, match=r"numbers from -4 to 3.*4 bools"):
        _ = pairs[index]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=20).filter(lambda x: len(set(x)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 50),
)
def test_a_split_shares_no_cluster_and_loses_no_pair(labels: list[str], fraction: float, seed: int) -> None:
    pairs = ContrastivePairs.from_lists(
        [f"first {i}" for i in range(len(labels))],
        [f"second {i}" for i in range(len(labels))],
        clusters=labels,
    )
    one, two = pairs.split(fraction, seed)
    assert not set(one.clusters) & set(two.clusters)
    assert sorted(contents(one) + contents(two)) == sorted(contents(pairs))
    n = len(set(labels))
    assert abs(len(set(one.clusters)) - fraction * n) <= 1
    order = np.random.default_rng(1).permutation(len(labels)).tolist()
    again = pairs.select(order).split(fraction, seed)[0]
    assert set(again.clusters) == set(one.clusters)


def test_seeds_give_different_splits() -> None:
    pairs = ContrastivePairs.from_lists([f"a{i}" for i in range(20)], [f"b{i}" for i in range(20)])
    assert len({pairs.split(0.5, seed)[0].clusters for seed in range(5)}) == 5
    for fraction, seed in ((0.0, 0), (1.0, 0), (float("nan"), 0), (0.5, -1)):
        with pytest.raises(DataError, match=r"(fraction|seed) must be a"):
            pairs.split(fraction, seed)
    with pytest.raises(DataError, match="one cluster"):
        pairs.select([0]).split(0.5, 0)


def test_records_keep_rows_in_order() -> None:
    assert records(ROWS) == [(f"row {i}", row) for i, row in enumerate(ROWS)]


def test_the_ending_of_a_file_says_how_it_is_read(tmp_path: Path) -> None:
    jsonl, table = tmp_path / "pairs.jsonl", tmp_path / "pairs.csv"
    jsonl.write_text("\n".join(json.dumps(row) for row in ROWS), "utf-8")
    pd.DataFrame(ROWS).to_csv(table, index=False)
    expected = ContrastivePairs.from_records(ROWS, **COLUMNS)
    for path in (jsonl, table, str(table)):
        assert ContrastivePairs.from_file(path, **COLUMNS) == expected
        assert ContrastivePairs.from_file(path, **COLUMNS, span="last").span == "last"
    saved = replace(expected, span=None)
    saved.save_jsonl(tmp_path / "saved.jsonl")
    assert ContrastivePairs.from_file(tmp_path / "saved.jsonl") == saved
    assert ContrastivePairs.from_file(tmp_path / "saved.jsonl", span="all").span == "all"
    row = {"first": chat("user: q", "assistant: no"), "second": chat("user: q", "assistant: yes")}
    pd.DataFrame([{key: json.dumps(value) for key, value in row.items()}]).to_csv(table, index=False)
    assert ContrastivePairs.from_file(table, chat=True).first == (Prompt(row["first"]),)
    (tmp_path / "pairs.json").write_text("[]")
    with pytest.raises(DataError, match=r"pairs\.json: pairs are read from \.jsonl and \.csv"):
        ContrastivePairs.from_file(tmp_path / "pairs.json")


@pytest.mark.parametrize("cut", [slice(2), slice(1, None), slice(None, None, -2), slice(-1, None)], ids=str)
def test_a_slice_of_pairs_is_pairs(cut: slice) -> None:
    pairs = replace(ContrastivePairs.from_records(ROWS, **COLUMNS), span="last")
    part = pairs[cut]
    assert isinstance(part, ContrastivePairs)
    assert contents(part) == EXPECTED[cut]
    assert part.span == "last"
    with pytest.raises(DataError, match="at least one"):
        _ = pairs[3:]
    with pytest.raises(IndexError):
        _ = pairs[3]


def test_pairs_show_themselves_in_a_line_and_a_table() -> None:
    pairs = ContrastivePairs.from_records(ROWS, **COLUMNS)
    assert repr(pairs) == "ContrastivePairs(3 pairs, 2 clusters, span 'all', templates ['x', 'y'])"
    table = pairs.to_dataframe()
    assert table["second"].tolist() == [row["unsafe"] for row in ROWS]
    assert ContrastivePairs.from_records(table, cluster="cluster", template="template") == pairs
    assert "<td>oui</td>" in pairs._repr_html_()
    chats = ContrastivePairs.from_lists([Prompt(chat("user: a"), {"x": "a"})], [chat("user: b")])
    again = ContrastivePairs.from_records(chats.to_dataframe(), cluster="cluster", template="template")
    assert again == chats
