"""Files of the SteerMoE authors' layout, written here, give the authors' selection; no file runs anything."""

import contextlib
import copyreg
import gzip
import os
import pickle
import re
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lens.errors import DataError, PlanError
from moe_lens.shape import UNKNOWN_MODEL, MoEShape
from moe_lens.steering import pickled_table
from moe_lens.steering.published import PublishedRanking, read_published_ranking

COUNTS = ["layer", "expert", "a1", "a2", "d1", "d2"]


def result_table(
    seed: int = 0, n_layers: int = 3, n_experts: int = 6, k: int = 2, tokens: int = 12
) -> pd.DataFrame:
    """A table as the authors write it: every token of either condition chooses k experts in each layer."""
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(n_layers):
        active = [
            np.bincount(
                np.concatenate([rng.permutation(n_experts)[:k] for _ in range(tokens)]), minlength=n_experts
            )
            for _ in range(2)
        ]
        rows += [(layer, e, active[0][e], active[1][e]) for e in range(n_experts)]
    table = pd.DataFrame(rows, columns=["layer", "expert", "a1", "a2"]).sample(frac=1, random_state=seed)
    table["d1"], table["d2"] = tokens - table["a1"], tokens - table["a2"]
    return with_scores(table)


def with_scores(table: pd.DataFrame) -> pd.DataFrame:
    p1 = table["a1"] / (table["a1"] + table["d1"])
    p2 = table["a2"] / (table["a2"] + table["d2"])
    return table.assign(
        p1=p1, p2=p2, risk_diff=p1 - p2, risk_diff_abs=(p1 - p2).abs(), model="some/model", run="a"
    )


def authors_selection(
    table: pd.DataFrame, n: int, m: int, reverse: bool
) -> tuple[list[Any], list[Any]] | None:
    """The selection written plainly with pandas; None where it would raise."""
    table = table.sort_values("risk_diff_abs", ascending=False, kind="stable")
    risk = -table["risk_diff"] if reverse else table["risk_diff"]
    up, down = table[risk > 0], table[risk < 0]
    if len(up) < n or len(down) < m:
        return None
    first, second = (
        list(zip(part["layer"].tolist(), part["expert"].tolist(), strict=True))
        for part in (up.head(n), down.head(m))
    )
    return first, second


def pickled(table: Any, path: Path, protocol: int = 4) -> Path:
    table.to_pickle(path, protocol=protocol)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ranking.pkl"


# The same plan as the authors'.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    n_layers=st.integers(1, 3),
    k=st.integers(1, 3),
    tokens=st.integers(1, 4),  # few tokens: many ties
    n=st.integers(0, 7),
    m=st.integers(0, 7),
    reverse=st.booleans(),
    protocol=st.integers(0, 5),
)
def test_plans_are_the_authors_selection(file, seed, n_layers, k, tokens, n, m, reverse, protocol) -> None:
    table = result_table(seed, n_layers, 5, k, tokens)
    ranking = read_published_ranking(pickled(table, file, protocol))
    assert ranking.shape == MoEShape(UNKNOWN_MODEL, tuple(range(n_layers)), 5, k)
    assert ranking.delta.tolist() == table["risk_diff"].tolist()  # bit for bit, in the file's order
    expected = authors_selection(table, n, m, reverse)
    if expected is None or n + m == 0:
        with pytest.raises(PlanError, match=r"only .* experts have a|The plan names no expert"):
            ranking.plan(n, m, opposite=reverse)
        return
    activated, deactivated = expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = ranking.plan(n, m, opposite=reverse, on_excess="drop")
    for chosen, all_of_them, room in ((plan.activate, activated, k), (plan.deactivate, deactivated, 5 - k)):
        kept: list[tuple[int, int]] = []
        for pair in all_of_them:
            if sum(layer == pair[0] for layer, _ in kept) < room:
                kept.append(pair)
        assert list(chosen) == kept


def test_every_pair_of_numbers_on_one_file_with_many_ties(file) -> None:
    table = result_table(5, n_layers=4, n_experts=4, k=2, tokens=3)
    ranking = read_published_ranking(pickled(table, file))
    assert table["risk_diff_abs"].duplicated().sum() > 5
    compared = 0
    for reverse in (False, True):
        for n in range(9):
            for m in range(9):
                expected = authors_selection(table, n, m, reverse)
                try:
                    plan = ranking.plan(n, m, opposite=reverse)
                except PlanError as error:
                    assert expected is None or n + m == 0 or "at most" in str(error)  # noqa: PT017
                else:
                    assert expected == (list(plan.activate), list(plan.deactivate))
                    compared += 1
    assert compared > 40


def test_a_plan_of_no_expert_is_refused(tmp_path) -> None:
    result_table(5, n_layers=2, n_experts=4, k=2, tokens=3).to_csv(tmp_path / "t.csv")
    ranking = read_published_ranking(tmp_path / "t.csv")
    for numbers in ((), (0, 0)):
        with pytest.raises(
            PlanError, match="names no expert; ask for some with n_activate= or n_deactivate="
        ):
            ranking.plan(*numbers)


def test_ties_follow_the_file_and_not_the_layer(tmp_path) -> None:
    rows = [(1, 1, 0, 2, 2, 0), (0, 1, 0, 2, 2, 0), (1, 0, 2, 0, 0, 2), (0, 0, 2, 0, 0, 2)]
    pd.DataFrame(rows, columns=COUNTS).to_csv(tmp_path / "ties.csv", index=False)
    plan = read_published_ranking(tmp_path / "ties.csv").plan(2, 1)
    assert plan.activate == ((1, 0), (0, 0))
    assert plan.deactivate == ((1, 1),)


def test_excess_raises_or_is_dropped_with_a_warning(file) -> None:
    table = pd.DataFrame(
        {"layer": 0, "expert": range(4), "a1": [8, 4, 6, 2], "a2": [4, 2, 8, 6]}, index=[7, 7, 3, 1]
    )
    table["d1"], table["d2"] = 10 - table["a1"], 10 - table["a2"]
    ranking = read_published_ranking(pickled(table, file))
    assert ranking.plan(2, 2).activate == ((0, 0), (0, 1))
    table["a1"], table["a2"] = [6, 4, 0, 0], [2, 2, 3, 3]
    table["d1"], table["d2"] = 10 - table["a1"], 10 - table["a2"]
    ranking = read_published_ranking(pickled(table, file))
    assert ranking.shape.top_k == 1
    with pytest.raises(PlanError, match="at most 1"):
        ranking.plan(2)
    with pytest.warns(UserWarning, match="dropped 1 experts beyond 1"):
        assert ranking.plan(2, on_excess="drop").activate == ((0, 0),)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_activate": -1}, "n_activate must be"),
        ({"n_deactivate": -2}, "n_deactivate must be"),
        ({"n_activate": 100}, "only .* experts have a positive score"),
        ({"n_activate": 1, "epsilon": 0.0}, "epsilon must be"),
    ],
)
def test_impossible_arguments_of_a_plan(file, arguments, words) -> None:
    ranking = read_published_ranking(pickled(result_table(), file))
    with pytest.raises(PlanError, match=words):
        ranking.plan(**arguments)


def test_to_dataframe_keeps_the_file_order(file) -> None:
    table = result_table(3)
    shown = read_published_ranking(pickled(table, file)).to_dataframe()
    assert shown[COUNTS].to_numpy().tolist() == table[COUNTS].to_numpy().tolist()
    assert shown["delta"].tolist() == table["risk_diff"].tolist()
    assert list(shown.columns) == [*COUNTS, "p1", "p2", "delta"]


# The layouts that are read.


def same(table: Any, path: Path) -> None:
    ranking = read_published_ranking(path)
    for name in COUNTS:
        column = getattr(ranking, name)
        assert column.dtype == np.int64
        assert column.tolist() == [int(number) for number in table[name]]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["int32", "uint16", "float64", "float32", ">i8", "object", "numpy scalars"])
def test_kinds_of_numbers(file, protocol, kind) -> None:
    table = result_table(1)
    for name in ("a1", "d2", "layer"):
        values = list(table[name].to_numpy()) if kind == "numpy scalars" else table[name].tolist()
        dtype = "object" if kind == "numpy scalars" else kind
        table[name] = pd.Series(values, index=table.index, dtype=object).astype(dtype)
        if kind == "numpy scalars":
            table[name] = pd.Series(np.array(values, dtype=object), index=table.index)
    same(table, pickled(table, file, protocol))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("strings", ["python", "pyarrow", "object"])
def test_ways_to_keep_text(file, protocol, strings) -> None:
    with pd.option_context("mode.string_storage", "pyarrow" if strings == "pyarrow" else "python"):
        table = result_table(2)
        if strings == "object":
            table = table.astype({"model": object, "run": object})
            table.columns = pd.Index(list(table.columns), dtype=object)
        same(table, pickled(table, file, protocol))
        same(table, pickled(table[[*reversed(table.columns)]], file, protocol))
        same(table, pickled(table[["run", *COUNTS]].iloc[:, 1:], file, protocol))  # a sliced index


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.reset_index(drop=True),
        lambda table: table.set_index("p1"),
        lambda table: table.set_index("model"),
        lambda table: table.set_axis(range(100, 100 + len(table)), axis=0),
        lambda table: table[COUNTS],
        lambda table: table.assign(flag=True, note=None),
        lambda table: pd.concat([table.iloc[:5], table.iloc[5:]]),
        lambda table: pd.DataFrame(np.array(table[COUNTS], order="F"), columns=COUNTS, copy=False),
        lambda table: pd.DataFrame(np.array(table[COUNTS], order="C"), columns=COUNTS, copy=False),
        lambda table: pd.DataFrame(table[COUNTS].to_numpy().astype(object), columns=COUNTS),
        lambda table: pd.DataFrame(
            np.asfortranarray(table[COUNTS].to_numpy().astype(object)), columns=COUNTS
        ),
        lambda table: table.copy().sort_values("risk_diff_abs", ascending=False),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tables_that_pandas_has_worked_on(file, change, protocol) -> None:
    table = change(result_table(4))
    same(table, pickled(table, file, protocol))


def test_blocks_in_either_order_of_memory(file) -> None:
    table = result_table(4)[COUNTS]
    orders = set()
    for order in ("C", "F"):
        frame = pd.DataFrame(np.array(table, order=order), columns=COUNTS, copy=False)
        orders.add(frame.to_numpy().flags.c_contiguous)
        for protocol in range(6):
            same(table, pickled(frame, file, protocol))
    assert orders == {True, False}  # both were tested


def test_gzip_and_csv(tmp_path) -> None:
    table = result_table(6)
    for name in ("r.pkl.gz", "r.csv", "r.csv.gz"):
        write = table.to_csv if "csv" in name else table.to_pickle
        write(tmp_path / name)
        same(table, tmp_path / name)
        assert read_published_ranking(tmp_path / name).delta.tolist() == table["risk_diff"].tolist()


class Old:
    """Stands in for a class of another version of pandas or numpy while a file is written."""

    def __init__(self, module: str, name: str, args: tuple[Any, ...] | None, state: Any = None) -> None:
        self.parts = (module, name, args, state)


def written(value: Any) -> bytes:
    """The opcodes of a value in which `Old`s stand, as pandas 1.x and numpy 1.x would have written them."""
    match value:
        case Old(parts=(module, name, args, state)):
            call = b"" if args is None else written(args) + b"R"
            return f"c{module}\n{name}\n".encode() + call + (b"" if state is None else written(state) + b"b")
        case tuple():
            return b"(" + b"".join(map(written, value)) + b"t"
        case list():
            return b"](" + b"".join(map(written, value)) + b"e"
        case dict():
            return b"}(" + b"".join(written(part) for pair in value.items() for part in pair) + b"u"
        case _:
            return pickle.dumps(value, 3)[2:-1]


def old_array(array: np.ndarray) -> Old:
    kind = Old("numpy", "dtype", (array.dtype.str[1:], False, True), (3, "<", None, None, None, -1, -1, 0))
    maker = (Old("numpy", "ndarray", None), (0,), b"b")
    raw = array.tolist() if array.dtype == object else array.tobytes()
    if array.dtype == object:
        kind = Old("numpy", "dtype", ("O8", False, True), (3, "|", None, None, None, -1, -1, 63))
    return Old("numpy.core.multiarray", "_reconstruct", maker, (1, array.shape, kind, False, raw))


def pandas_1(table: Any, attribute: str, names: Any = None, times: int = 1) -> bytes:
    """A pickle of the table as pandas 1.0 to 1.2 wrote it, its one block given `times` times."""
    index = Old("pandas.core.indexes.base", "Index", None)
    content = {"data": names or old_array(np.array(COUNTS, object)), "name": None}
    columns = Old("pandas.core.indexes.base", "_new_Index", (index, content))
    values = old_array(np.ascontiguousarray(table.to_numpy().T))
    blocks = [{"values": values, "mgr_locs": slice(0, 6, 1)}] * times
    state = ([columns, None], [values], [columns], {"0.14.1": {"axes": [columns, None], "blocks": blocks}})
    manager = Old("pandas.core.internals.managers", "BlockManager", (), state)
    frame = Old("pandas.core.frame", "DataFrame", (), {attribute: manager, "_typ": "dataframe"})
    return b"\x80\x04" + written(frame) + b"."


@pytest.mark.parametrize("attribute", ["_data", "_mgr"])
def test_the_layout_of_pandas_1(file, attribute) -> None:
    table = result_table(7)[COUNTS]
    file.write_bytes(pandas_1(table, attribute))
    same(table, file)


def test_more_blocks_than_columns_and_states_given_twice(file) -> None:
    table = result_table(7)[COUNTS]
    file.write_bytes(pandas_1(table, "_mgr", times=2))
    with pytest.raises(DataError, match="more blocks than the table has columns"):
        read_published_ranking(file)
    file.write_bytes(pandas_1(table, "_mgr")[:-1] + b"}b.")
    with pytest.raises(DataError, match="its state twice"):
        read_published_ranking(file)


@pytest.mark.parametrize(("kind", "width"), [("string", np.int32), ("large_string", np.int64)])
def test_names_of_columns_that_begin_within_an_arrow_array(file, kind, width) -> None:
    table = result_table(7)[COUNTS]
    texts = ["not", "these", *COUNTS]
    bounds = np.cumsum([0, *map(len, texts)]).astype(width).tobytes()
    buffers = [None, *(Old("pyarrow.lib", "py_buffer", (raw,)) for raw in (bounds, "".join(texts).encode()))]
    alias = Old("pyarrow.lib", "type_for_alias", (kind,))
    array = Old("pyarrow.lib", "_restore_array", ((alias, len(COUNTS), 0, 2, buffers, [], None),))
    names = Old("pandas.core.arrays.string_arrow", "ArrowStringArray", (), {"_pa_array": array})
    file.write_bytes(pandas_1(table, "_mgr", names))
    same(table, file)


# What is refused: contents.


def refused(table: pd.DataFrame, path: Path, words: str, **arguments: Any) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_published_ranking(pickled(table, path), **arguments)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1, "'a1', row 4: -1 is not a whole number"),
        (1.5, "'a1', row 4: 1.5 is not a whole"),
        (np.nan, "'a1', row 4: no finite"),
        (np.inf, "'a1', row 4: no finite"),
        ("3", "'a1', row 4: no finite"),
        (True, "'a1', row 4: no finite"),
        (None, "'a1', row 4: no finite"),
        (2**70, "'a1', row 4: no finite"),
        (2.0**60, "'a1', row 4: .* is not a whole number"),
    ],
)
def test_numbers_that_are_no_counts(file, value, words) -> None:
    for dtype in ("object", "float64"):
        if dtype == "float64" and not isinstance(value, float):
            continue
        table = result_table().astype({"a1": dtype})
        table.iloc[4, table.columns.get_loc("a1")] = value
        refused(table, file, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop(columns="d2"), "'d2' is missing"),
        (lambda t: t.iloc[:0], "empty"),
        (lambda t: t.iloc[1:], "experts"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "more than one row"),
        (lambda t: t.assign(a1=t["a1"] > 3), "bool, not numbers"),
        (lambda t: t.assign(d1=t["d1"] + (t["expert"] == 1)), "one number of tokens"),
        (lambda t: t.assign(a1=0, d1=0), "above 0"),
        (lambda t: t.assign(risk_diff=-t["risk_diff"]), "'risk_diff', row"),
        (lambda t: t.assign(risk_diff_abs=t["risk_diff"].abs() + 1e-4), "'risk_diff_abs', row 0"),
        (lambda t: t.assign(risk_diff=np.nan), "'risk_diff', row 0: no finite"),
        (lambda t: t.set_axis(range(t.shape[1]), axis=1), "no names"),
        (lambda t: pd.concat([t, t[["a1"]]], axis=1), "'a1' stands in the table more than once"),
        (lambda t: t["a1"], "asks for|holds a"),
        (lambda t: t.astype({"a1": "Int64"}), "IntegerArray|Int64Dtype"),
        (lambda t: t.astype({"a1": "complex128"}), "column .* has dtype 'c16'"),
    ],
)
def test_tables_that_are_refused(file, change, words) -> None:
    refused(change(result_table()), file, words)


def test_k_comes_from_the_counts_or_from_the_user(file) -> None:
    table = result_table(k=2)
    moved = table["expert"] == 0
    table.loc[moved, "a1"] = (table.loc[moved, "a1"] + 1).clip(upper=12)
    table = with_scores(table.assign(d1=12 - table["a1"]))
    refused(table, file, r"between 2 and 2\.\d+ experts .* pass top_k=")
    assert read_published_ranking(file, top_k=2).shape.top_k == 2
    pickled(result_table(k=2), file)
    with pytest.raises(DataError, match="2 experts are active for every token, not the 3"):
        read_published_ranking(file, top_k=3)
    with pytest.raises(DataError, match="top_k must be"):
        read_published_ranking(file, top_k=0)


def test_rounded_scores_that_order_otherwise_warn(file) -> None:
    table = result_table(8, tokens=10)
    tied = table["risk_diff"].round(9)
    table["risk_diff"] = tied + np.linspace(0, 9e-7, len(table)) * np.sign(tied)
    with pytest.warns(UserWarning, match="orders experts otherwise"):
        read_published_ranking(pickled(table, file))


# Layer numbers.


def test_layers_must_be_known(file) -> None:
    pickled(result_table(n_layers=3), file)
    all_moe = MoEShape("m", (0, 1, 2), 6, 2)
    dense_first = MoEShape("m", (1, 2, 3), 6, 2)
    assert read_published_ranking(file, shape=all_moe).shape == all_moe
    with pytest.raises(DataError, match=r"layers 0, 1, 2 are not the model's MoE layers 1, 2, 3.*layers="):
        read_published_ranking(file, shape=dense_first)
    by_position = read_published_ranking(file, shape=dense_first, layers=dense_first.layers)
    assert by_position.shape == dense_first
    mapped = read_published_ranking(file, layers={0: 1, 1: 2, 2: 3}, model="m")
    assert mapped.shape == dense_first
    plain = read_published_ranking(file)
    assert by_position.plan(1).activate[0][0] == plain.plan(1).activate[0][0] + 1
    with pytest.raises(PlanError, match="another model"):  # not known when read, but never applied wrongly
        plain.plan(1).check_fits(dense_first)
    with pytest.raises(DataError, match="not the model's MoE layers"):  # a part of the model only
        read_published_ranking(file, shape=MoEShape("m", (0, 1, 2, 3), 6, 2))
    part = read_published_ranking(file, shape=MoEShape("m", (0, 1, 2, 3), 6, 2), layers={0: 0, 1: 1, 2: 3})
    assert part.shape.layers == (0, 1, 3)


def test_layers_that_do_not_start_at_0_need_a_word(file) -> None:
    table = result_table(n_layers=3)
    table["layer"] += 1
    refused(table, file, r"do not go 0, 1, 2")
    assert read_published_ranking(file, shape=MoEShape("m", (1, 2, 3), 6, 2)).shape.layers == (1, 2, 3)
    assert read_published_ranking(file, layers=[1, 2, 3]).shape.layers == (1, 2, 3)


@pytest.mark.parametrize(
    "layers", [[0, 1], [0, 1, 1], {0: 0, 1: 1}, {0: 0, 1: 1, 2: -1}, {0: 0, 1: 1, 2: 2, 3: 3}]
)
def test_layers_that_map_nothing_sensible(file, layers) -> None:
    pickled(result_table(n_layers=3), file)
    with pytest.raises(DataError, match="layers= must give"):
        read_published_ranking(file, layers=layers)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (MoEShape("m", (0, 1, 2), 7, 2), "n_experts 6 / 7"),
        (MoEShape("m", (0, 1, 2), 6, 3), "2 experts are active for every token, not the 3"),
    ],
)
def test_another_model(file, shape, words) -> None:
    refused(result_table(n_layers=3), file, words, shape=shape)


# What is refused: files.


def marker_of(tmp_path: Path) -> Path:
    return tmp_path / "marker"


class Reduces:
    """Pickles as a call of `function` with `args`, and perhaps a state."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


def raw_global(module: str, name: str) -> bytes:
    """STACK_GLOBAL of any text."""
    parts = b"".join(b"\x8c" + bytes([len(text.encode())]) + text.encode() for text in (module, name))
    return parts + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def programs(marker: Path) -> dict[str, bytes]:
    """Malicious pickles by name; each would write the marker, or change a class, with pandas.read_pickle."""
    code = f"open({str(marker)!r}, 'w').write('x')"
    command = f"echo x > {marker}"
    inner = pickle.dumps(Reduces(os.system, command))
    frame = result_table()[COUNTS]

    def hidden(value: Any) -> bytes:
        return pickle.dumps(
            frame.assign(extra=pd.Series([value] * len(frame), dtype=object, index=frame.index))
        )

    proto = b"\x80\x04"
    call = b"\x85R."
    return {
        "os.system": pickle.dumps(Reduces(os.system, command)),
        "eval": pickle.dumps(Reduces(eval, code)),
        "exec": pickle.dumps(Reduces(exec, code)),
        "getattr": pickle.dumps(Reduces(getattr, pd.DataFrame, "eval")),
        "protocol 0": pickle.dumps(Reduces(os.system, command), 0),
        "dotted": proto + raw_global("pandas", "io.common.os.system") + text(command) + call,
        "dotted class": proto + raw_global("pandas", "DataFrame.eval") + text(code) + call,
        "dunder": proto + raw_global("pandas", "DataFrame.__init__.__globals__") + b".",
        "spaced": b"cos system\nx\n" + text(command) + call,
        "module alias": proto + raw_global("posix", "system") + text(command) + call,
        "read_pickle": proto + raw_global("pandas", "read_pickle") + text(str(marker)) + call,
        "pandas eval": proto + raw_global("pandas", "eval") + text(code) + call,
        "query": proto + raw_global("pandas.core.frame", "DataFrame.query") + text(code) + call,
        "numpy load": proto + raw_global("numpy", "load") + text(str(marker)) + call,
        "numpy runstring": proto + raw_global("numpy.testing._private.utils", "runstring") + b".",
        "numpy memmap": proto + raw_global("numpy", "memmap") + text(str(marker)) + call,
        "import": proto + raw_global("importlib", "import_module") + text("antigravity") + call,
        "instance": b"(" + text(command) + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text(command) + b"o.",
        "persistent": b"Pname\n.",
        "extension": b"\x80\x02\x82\xf0" + text(command) + call,
        "newobj_ex": proto + raw_global("pandas", "DataFrame") + b")}\x92.",
        "build on class": proto
        + raw_global("pandas", "DataFrame")
        + b"N}"
        + text("stolen")
        + text("x")
        + b"s\x86b.",
        "build on function": proto + raw_global("numpy._core.multiarray", "_reconstruct") + b"}b.",
        "call of a call": proto + raw_global("numpy", "dtype") + text("i8") + b"\x85R" + text("x") + call,
        "in an object column": hidden(Reduces(os.system, command)),
        "eval in a column": hidden([{"a": (Reduces(eval, code),)}]),
        "setstate in a column": hidden(Reduces(eval, code, state={"x": 1})),
        "nested pickle": hidden(Reduces(pickle.loads, inner)),
        "two pickles, first bad": inner + pickle.dumps(frame),
    }


NAMES = sorted(programs(Path("marker")))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_file_runs(name, tmp_path, monkeypatch) -> None:
    marker, path = marker_of(tmp_path), tmp_path / "bad.pkl"
    program = programs(marker)[name]
    path.write_bytes(program)
    if name == "extension":
        copyreg.add_extension("os", "system", 240)
    classes = (pd.DataFrame, pd.Index, np.ndarray, np.dtype)
    before, modules = [set(vars(cls)) for cls in classes], set(sys.modules)
    try:
        with pytest.raises(DataError, match=r"the pickle") as caught:
            read_published_ranking(path)
    finally:
        if name == "extension":
            copyreg.remove_extension("os", "system", 240)
    assert "bad.pkl" in str(caught.value)
    assert not marker.exists()
    assert [set(vars(cls)) for cls in classes] == before
    assert set(sys.modules) == modules


def test_the_bad_files_are_bad(tmp_path) -> None:
    """The control: Python's own reader does run them, so the tests above could fail."""
    marker = marker_of(tmp_path)
    for name in ("os.system", "eval", "dotted", "in an object column", "nested pickle", "protocol 0"):
        pickle.loads(programs(marker)[name])
        assert marker.exists(), name
        marker.unlink()


@pytest.mark.parametrize("name", ["os.system", "eval", "nested pickle"])
def test_gzip_hides_nothing(name, tmp_path) -> None:
    path = tmp_path / "bad.pkl.gz"
    path.write_bytes(gzip.compress(programs(marker_of(tmp_path))[name]))
    with pytest.raises(DataError, match="asks for"):
        read_published_ranking(path)
    assert not marker_of(tmp_path).exists()


def test_the_error_names_what_was_asked_for(tmp_path) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(programs(marker_of(tmp_path))["dotted"])
    with pytest.raises(DataError, match=r"pandas\.io\.common\.os\.system.*nothing was run.*\.csv"):
        read_published_ranking(path)


def test_pandas_and_pickle_are_never_asked_to_load(file, monkeypatch) -> None:
    table = result_table()
    pickled(table, file)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pd, "read_pickle")):
        monkeypatch.setattr(module, name, fail)
    same(table, file)


def bombs() -> dict[str, bytes]:
    proto = b"\x80\x04"
    deep = proto + b")" + b"\x85" * 100_000 + b"."
    cycle = proto + b"]\x94h\x00a."
    doubling = proto + b")" + b"\x94h\x00\x86" * 40 + b"."
    shared = (
        proto + b")\x940" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(60))
    )
    return {
        "empty": b"",
        "text": b"hello, world",
        "zip": b"PK\x03\x04" + bytes(50),
        "deep": deep,
        "cycle": cycle,
        "doubling": doubling,
        "shared": shared + b"}" + b"h\x3b" + b"Ns.",
        "many": proto + b"]" * 150_000 + b".",
        "long bytes": proto + b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "long number": proto + b"\x8b" + struct.pack("<I", 2**31 - 1) + b"x.",
        "memo": proto + b"Nr" + struct.pack("<I", 2**32 - 1) + b"j\x01\x00\x00\x00.",
        "underflow": proto + b"\x87.",
        "no mark": proto + b"t.",
        "no stop": proto + b"N",
        "only a number": pickle.dumps(7),
        "a dict": pickle.dumps({"layer": [0], "expert": [0]}),
        "an array": pickle.dumps(np.zeros(3)),
        "gzip": gzip.compress(bytes(40 * 1024**2)),
        "half a gzip": gzip.compress(pickle.dumps(7) * 100)[:-12],
        "broken gzip": b"\x1f\x8b" + b"\xff" * 30,
    }


@pytest.mark.parametrize("name", sorted(bombs()))
def test_damaged_files_and_bombs(name, file, monkeypatch) -> None:
    monkeypatch.setattr(pickled_table, "MAX_OPCODES", 120_000)  # two million take a while under type checks
    file.write_bytes(bombs()[name])
    with pytest.raises(DataError, match=r"ranking\.pkl cannot be read"):
        read_published_ranking(file)


def test_an_array_cannot_claim_more_than_the_file_holds(file) -> None:
    table = result_table()[COUNTS]
    content = pickle.dumps(table, 4)
    shape = re.compile(rb"K.K" + bytes([len(table)]) + rb"\x86", re.DOTALL)
    assert shape.search(content)
    fewer = b"K" + bytes([len(table) - 1])
    for claimed in (b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"K\x01" + fewer + b"\x86", b"K\x06N\x86"):
        file.write_bytes(shape.sub(lambda _, claimed=claimed: claimed, content))
        with pytest.raises(DataError, match="differ"):
            read_published_ranking(file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(protocol=st.integers(0, 5), data=st.data())
def test_any_damage_is_an_error_of_ours_or_harmless(file, protocol, data) -> None:
    content = bytearray(pickle.dumps(result_table()[COUNTS], protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2 * len(content)))
    file.write_bytes(bytes(content[:cut]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(DataError):
            assert isinstance(read_published_ranking(file), PublishedRanking)


@pytest.mark.parametrize("size", [10, 100, 500])
def test_truncated_files(file, size) -> None:
    content = pickle.dumps(result_table())
    assert len(content) > size
    file.write_bytes(content[:size])
    with pytest.raises(DataError, match="damaged"):
        read_published_ranking(file)


def test_files_that_are_not_there(tmp_path) -> None:
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_published_ranking(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "damaged"),
        ("layer,expert\n0,0\n", "'a1' is missing"),
        ("layer,expert,a1,a2,d1,d2\n", "empty"),
        ("layer,expert,a1,a2,d1,d2\n0,0,1,1,0\n", "row 0 has another number of fields"),
        ("layer,expert,a1,a2,d1,d2\n0,0,True,1,0,0\n", "'a1', row 0: no finite"),
        ("layer,expert,a1,a2,d1,d2\n0,0,,1,0,0\n", "'a1', row 0: no finite"),
        ("layer,expert,a1,a1,a2,d1,d2\n0,0,1,1,1,0,0\n", "more than once"),
    ],
)
def test_csv_files_that_are_refused(tmp_path, content, words) -> None:
    path = tmp_path / "ranking.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_published_ranking(path)
