"""Reading a pickled DataFrame as data: nothing in the file is called, imported or built.

columns = read_columns(Path("risk_diff.pkl"), ("layer", "expert", "a1"))

A pickle is a program, and `pandas.read_pickle` runs it. Here `pickletools` reads its instructions, a
small stack machine notes what they would call and with what, and the columns are decoded from the bytes.
"""

import csv
import io
import math
import pickletools
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from gzip import GzipFile
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Shaped

from moe_lens.checks import as_index
from moe_lens.errors import DataError

MAX_BYTES: Final = 32 * 1024**2
MAX_OPCODES: Final = 2_000_000
"""Bounds on time and memory. 6,144 experts with 15 columns take 1 MiB and, text included, 50,000 opcodes."""
_DAMAGES: Final = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError, RecursionError),
    *(csv.Error, struct.error),
)


def read_columns(path: Path, wanted: tuple[str, ...]) -> dict[str, Shaped[np.ndarray, "row"]]:
    """Those of the wanted columns that a pickled DataFrame or a .csv file has, as they are in the file.

    Raises:
        DataError: a file that cannot be read, or that holds anything that such a table does not.
    """
    is_csv = path.name.lower().endswith((".csv", ".csv.gz"))
    try:
        data = _bytes_of_file(path)
        return _csv_columns(data, wanted) if is_csv else _frame_columns(_read_pickle(data), wanted)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(error)) from error
    except _DAMAGES as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise DataError(f"it is damaged, or of a layout that is not known ({reason}).") from error


def _bytes_of_file(path: Path) -> bytes:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        data = (GzipFile(fileobj=file) if zipped else file).read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DataError(f"it holds more than {MAX_BYTES} bytes; a table of counts is far smaller.")
    return data


def _csv_columns(data: bytes, wanted: tuple[str, ...]) -> dict[str, Shaped[np.ndarray, "row"]]:
    names, *rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
    if uneven := [number for number, row in enumerate(rows) if len(row) != len(names)]:
        raise DataError(f"row {uneven[0]} has another number of fields than the header.")
    _check_different(names, wanted)
    places = {name: names.index(name) for name in wanted if name in names}
    return {name: np.array([_parsed(row[at]) for row in rows], float) for name, at in places.items()}


def _parsed(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_different(names: list[Any], wanted: tuple[str, ...]) -> None:
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise DataError(f"column {twice[0]!r} stands in the table more than once.")


# The pickle, read as data. A pickle names classes and functions, and says which to call with what. Here a
# name is only a name, and a call only the record of a call.

_PLAIN: Final = {"slice", "bytearray", "bytes", "object"}
_ARRAYS: Final = {"_reconstruct", "scalar"}
_NAMES: Final = {
    "builtins": _PLAIN,
    "__builtin__": _PLAIN,
    "copyreg": {"_reconstructor"},
    "copy_reg": {"_reconstructor"},
    "numpy.core.multiarray": _ARRAYS,
    "numpy._core.multiarray": _ARRAYS,
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},
    "numpy": {"dtype", "ndarray"},
    "pandas": {"DataFrame", "Index", "RangeIndex", "StringDtype"},
    "pandas.arrays": {"ArrowStringArray", "StringArray"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.indexes.base": {"Index", "_new_Index"},
    "pandas.core.indexes.numeric": {"Int64Index", "UInt64Index", "Float64Index"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.internals.managers": {"BlockManager"},
    "pandas.core.arrays.string_": {"StringArray", "StringDtype"},
    "pandas.core.arrays.string_arrow": {"ArrowStringArray"},
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas._libs.arrays": {"__pyx_unpickle_NDArrayBacked"},
    "pyarrow.lib": {"_restore_array", "type_for_alias", "py_buffer"},
}
"""All that pickles of plain DataFrames name, from pandas 1.0 to 3 and numpy 1 and 2."""
_LITERALS: Final = re.compile(
    "INT|BININT[12]?|LONG[14]?|(BIN)?FLOAT|UNICODE|(SHORT_)?BINUNICODE|BINUNICODE8|(SHORT_)?BINBYTES|BINBYTES8|"
    "BYTEARRAY8"
)
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Final = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class _Name:
    """A class or function that the pickle names."""

    module: str
    name: str


@dataclass(eq=False, repr=False, slots=True)
class _Call:
    """What the pickle would call, with what, and the state that the result would get."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


class _Reader:
    """The stack and memo of a pickle's program."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if _LITERALS.fullmatch(opcode):
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())
        elif opcode == "MARK":
            self.marks.append(len(stack))
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode in ("TUPLE", "LIST", "DICT"):
            items = self.marked()
            stack.append({"TUPLE": tuple, "LIST": list, "DICT": _dict_of}[opcode](items))
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.popped(int(opcode[-1]))))
        elif opcode in ("APPEND", "APPENDS"):
            items = self.popped(1) if opcode == "APPEND" else self.marked()
            self.top(list).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self.popped(2) if opcode == "SETITEM" else self.marked()
            self.top(dict).update(_dict_of(items))
        elif opcode in ("GLOBAL", "STACK_GLOBAL"):
            module, name = self.popped(2) if argument is None else argument.split(" ", 1)
            stack.append(_checked_name(module, name))
        elif opcode in ("REDUCE", "NEWOBJ"):
            stack.append(_recorded(*self.popped(2)))
        elif opcode == "BUILD":
            (state,) = self.popped(1)
            call = self.top(_Call)
            if call.state is not None:
                raise DataError("the pickle gives an object its state twice.")
            call.state = state
        elif opcode not in ("PROTO", "FRAME"):
            raise DataError(f"the pickle uses opcode {opcode}, which no DataFrame of counts needs.")

    def popped(self, number: int) -> list[Any]:
        if len(self.stack) < number:
            raise ValueError("stack underflow")
        items = self.stack[-number:]
        del self.stack[-number:]
        return items

    def marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            what = type(self.stack[-1]).__name__.strip("_").lower()
            raise DataError(f"the pickle fills or changes a {what}, which no DataFrame of counts needs.")
        return self.stack[-1]


def _read_pickle(data: bytes) -> Any:
    """What the pickle would build, as plain values, `_Name`s and `_Call`s. Runs nothing, imports nothing."""
    reader = _Reader()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == MAX_OPCODES:
            raise DataError(
                f"the pickle has more than {MAX_OPCODES} opcodes; a table of counts has far fewer."
            )
        if opcode.name != "STOP":
            reader.step(opcode.name, argument)
    return reader.popped(1)[0]


def _checked_name(module: Any, name: Any) -> _Name:
    if not (isinstance(module, str) and isinstance(name, str) and name in _NAMES.get(module, ())):
        shown = ".".join(part if isinstance(part, str) else type(part).__name__ for part in (module, name))
        raise DataError(
            f"the pickle asks for {shown[:100]!r}, which no DataFrame of counts needs; nothing was run. If "
            "you trust its source, convert it to .csv as the docstring of read_published_ranking says."
        )
    return _Name(module, name)


def _recorded(function: Any, args: Any) -> _Call:
    if not isinstance(function, _Name) or not isinstance(args, tuple):
        raise DataError("the pickle calls something other than a named function.")
    if function.name == "_reconstructor":  # protocols 0 and 1 make an object of class args[0] so
        return _recorded(args[0], ())
    return _Call(function.name, args)


def _dict_of(items: list[Any]) -> dict[str, Any]:
    if any(type(key) is not str for key in items[::2]):
        raise DataError("the pickle has a dict whose keys are not text, which no DataFrame of counts needs.")
    return dict(zip(items[::2], items[1::2], strict=True))


# From what the pickle would build to columns.


def _call(value: Any, *names: str) -> _Call:
    if not isinstance(value, _Call) or value.name not in names:
        kind = value.name if isinstance(value, _Call) else type(value).__name__
        raise DataError(f"the pickle holds a {kind} where a {names[0]} belongs.")
    return value


def _frame_columns(root: Any, wanted: tuple[str, ...]) -> dict[str, Shaped[np.ndarray, "row"]]:
    state = _call(root, "DataFrame").state
    manager = _call(state["_mgr"] if "_mgr" in state else state["_data"], "BlockManager")
    names, blocks = _axes_and_blocks(manager)
    _check_different(names, wanted)
    columns: dict[str, Any] = {}
    room = len(names)
    for values, places in blocks:
        if (room := room - len(places)) < 0:
            raise DataError("the pickle has more blocks than the table has columns.")
        chosen = [(row, names[place]) for row, place in enumerate(places) if names[place] in wanted]
        if chosen:
            array = _array(values, f"column {chosen[0][1]!r}")
            if array.shape[0] != len(places) or array.ndim != 2:
                raise DataError(f"column {chosen[0][1]!r} has a block of another shape than the table.")
            columns |= {name: array[row] for row, name in chosen}
    return columns


def _axes_and_blocks(manager: _Call) -> tuple[list[Any], Iterator[tuple[Any, Sequence[int]]]]:
    """The names of the columns; for each block of columns its values and which columns they are."""
    if manager.state is None:  # pandas 1.3 and later
        blocks, axes = manager.args
        pairs = [_call(block, "_unpickle_block").args[:2] for block in blocks]
    else:
        details = manager.state[3]["0.14.1"]
        axes, pairs = details["axes"], [(block["values"], block["mgr_locs"]) for block in details["blocks"]]
    names = _index_entries(axes[0])
    return names, ((values, _places(places, len(names))) for values, places in pairs)


def _places(value: Any, n_columns: int) -> Sequence[int]:
    if _call(value, "slice", "_reconstruct", "_frombuffer").name == "slice":
        return range(n_columns)[slice(*value.args)]
    return [int(place) for place in _array(value, "the order of columns").ravel()]


def _index_entries(index: Any) -> list[Any]:
    """The entries of a pandas Index; anything but text becomes None, since no wanted column is named so."""
    content = _call(index, "_new_Index").args[1]
    data = content.get("data")
    if data is None:  # a RangeIndex
        raise DataError("its columns have no names.")
    if _call(data, "ndarray", *_MAKERS).name == "ArrowStringArray":
        return _arrow_texts(_call(data.state["_pa_array"], "_restore_array"))
    array = data.state[1] if data.name == "__pyx_unpickle_NDArrayBacked" else data
    return [entry if type(entry) is str else None for entry in _array(array, "the names of columns")]


_MAKERS: Final = ("_reconstruct", "_frombuffer", "ArrowStringArray", "__pyx_unpickle_NDArrayBacked")


def _arrow_texts(array: _Call) -> list[str]:
    """The texts of an Arrow array of strings: one buffer holds where each begins, the other all letters."""
    kind, length, _, offset, (_, offsets, letters), *_ = array.args[0]
    width = {"string": np.dtype("<i4"), "large_string": np.dtype("<i8")}[
        _call(kind, "type_for_alias").args[0]
    ]
    text = _raw(letters) if letters is not None else b""
    if length == 0:
        return []
    bounds = np.frombuffer(_raw(offsets), width)[offset : offset + length + 1].tolist()
    if len(bounds) != length + 1 or bounds != sorted(bounds) or not 0 <= bounds[0] <= bounds[-1] <= len(text):
        raise ValueError("texts that go beyond their buffer")
    return [text[start:stop].decode() for start, stop in pairwise(bounds)]


def _array(value: Any, what: str) -> Shaped[np.ndarray, "*any"]:
    """The numpy array that a call would make, of numbers, truth values or Python objects."""
    call = _call(value, "_reconstruct", "_frombuffer")
    if call.name == "_frombuffer":
        raw, kind, shape, order = call.args[:4]
    else:
        _, shape, kind, fortran, raw = call.state
        order = "F" if fortran else "C"
    dtype = _dtype(kind, what)
    if dtype.kind == "O":
        entries = [_object(entry) for entry in raw]
        return np.fromiter(entries, object, len(entries)).reshape(_sizes(shape, len(entries)))
    flat = np.frombuffer(_raw(raw), dtype)
    if order not in ("C", "F"):
        raise ValueError("an array in an order that tables do not have")
    return flat.reshape(_sizes(shape, flat.size), order=order)


def _sizes(shape: Any, size: int) -> tuple[int, ...]:
    """The shape, if it is one of `size` entries: it could not ask for more memory than the file has."""
    sizes = tuple(as_index(number) for number in shape)
    if None in sizes or not 1 <= len(sizes) <= 2 or math.prod(n for n in sizes if n is not None) != size:
        raise ValueError("an array whose shape and content differ")
    return tuple(n for n in sizes if n is not None)


def _dtype(value: Any, what: str) -> np.dtype:
    call = _call(value, "dtype")
    code, order = call.args[0], call.state[1]
    if type(code) is not str or not re.fullmatch("[iu][1248]|f[248]|b1|O8|O", code) or order not in "<>|=":
        raise DataError(f"{what} has dtype {str(code)[:20] if type(code) is str else type(code).__name__!r}.")
    return np.dtype(code).newbyteorder(order)


def _object(entry: Any) -> Any:
    """A numpy scalar in a column of objects as Python's number; anything else as it is."""
    if not isinstance(entry, _Call) or entry.name != "scalar":
        return entry
    kind, raw = entry.args
    dtype = _dtype(kind, "a number")
    return np.frombuffer(_raw(raw, dtype.itemsize), dtype)[0].item() if dtype.kind != "O" else None


def _raw(value: Any, most: int = MAX_BYTES) -> bytes | bytearray:
    """Bytes, in any of the ways in which protocols write them."""
    for _ in range(4):
        if not isinstance(value, bytes | bytearray | str):
            call = _call(value, "bytes", "bytearray", "encode", "py_buffer")
            value = call.args[0] if call.args else b""
        elif len(value) > most:
            raise ValueError("more bytes than belong here")
        else:  # protocols below 3 write bytes as text in latin-1
            return value.encode("latin-1") if isinstance(value, str) else value
    raise DataError("the pickle holds no bytes where an array belongs.")
