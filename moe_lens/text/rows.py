"""Rows of columns from dictionaries, DataFrames, datasets, JSONL and CSV files; prompts read from files.

for where, row in jsonl_rows("pairs.jsonl"):           # ("pairs.jsonl, line 1", {column: cell})
    text_cell(where, row, "first")                     # errors name row and column
prompts = read_prompts("prompts.txt")                  # one prompt a line
prompts = read_prompts("prompts.jsonl")                # strings, chats, tokens, or objects that hold one
prompts = read_prompts("prompts.csv", column="text")
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pandas as pd

from moe_lens.checks import as_index, short
from moe_lens.errors import DataError

Row = tuple[str, dict[str, Any]]
"""Where the row stands, for errors, and its cells by column."""


def records(rows: Any) -> list[Row]:
    """("row 0", {column: cell}) of each row of dictionaries, a DataFrame or a dataset.

    Raises:
        DataError: no rows, or something that is none, by its number.
    """
    if isinstance(rows, pd.DataFrame):
        rows = rows.to_dict("records")
    if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
        raise DataError(
            f"Rows must be dictionaries, a DataFrame or one split of a dataset (dataset['train']); got a "
            f"{type(rows).__name__}."
        )
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} must be a dictionary of columns; got {short(row)}.")
        found.append((f"row {number}", dict(row)))
    return at_least_one("The table", found)


def cell(where: str, row: Mapping[str, Any], column: str) -> Any:
    """The content of a cell. Raises DataError where the column is missing or the cell is empty."""
    if column not in row:
        columns = [str(name) for name in row]
        raise DataError(f"{where} has no column {column!r}; its columns are {columns}.")
    content = row[column]
    missing = pd.api.types.is_scalar(content) and bool(pd.isna(content))
    if missing or (isinstance(content, str | list | tuple) and not content):
        raise DataError(f"{where}, column {column!r} is empty ({content!r}); fill it or take the row out.")
    return content


def text_cell(where: str, row: Mapping[str, Any], column: str) -> str:
    """Like `cell`, for a cell that must hold text."""
    content = cell(where, row, column)
    if not isinstance(content, str):
        raise DataError(f"{where}, column {column!r} must be text; got {short(content)}.")
    return content


def label_of(where: str, content: Any) -> str:
    """A label for clusters and templates, from a text or a number. Raises DataError for anything else."""
    number = as_index(content)
    if not isinstance(content, str) and number is None:
        raise DataError(f"{where} must be a label (a text or a whole number); got {short(content)}.")
    return content if isinstance(content, str) else str(number)


def parsed_json(where: str, text: str) -> Any:
    """What a JSON text holds. Raises DataError, naming where it stands."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}.") from error


def jsonl_rows(path: str | Path) -> list[Row]:
    """The objects of a file with one JSON object a line; empty lines are passed over."""
    rows = []
    for number, line in enumerate(_read(path).split("\n"), start=1):  # splitlines() also splits at U+2028
        where = f"{path}, line {number}"
        if line.strip():
            row = parsed_json(where, line)
            if not isinstance(row, dict):
                raise DataError(f"{where} must be a JSON object; got {short(row)}.")
            rows.append((where, row))
    return rows


def csv_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV file with a header, in UTF-8."""
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072 characters
    rows = []
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{where} has more cells than the header has columns; quote commas in texts.")
            rows.append((where, dict(row)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is no CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    names = list(reader.fieldnames or [])
    if len(set(names)) != len(names):
        raise DataError(f"{path} has two columns of the same name: {names}.")
    return rows


def at_least_one(what: str | Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise DataError(f"{what} has no rows; give at least one.")
    return rows


def _read(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            return file.read()
    except (OSError, UnicodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a file of pairs: {error}.") from error


FIELDS: Final = ("prompt", "messages", "text")
"""Where an object's prompt is looked for if no column is named."""


def read_prompts(path: str | Path, *, column: str | None = None) -> list[Any]:
    """The prompts of a .txt, .jsonl or .csv file: strings, lists of messages, or lists of token numbers.

    Args:
        column: the field (.jsonl) or column (.csv) of the prompts; by default the first of prompt, messages,
            text that is there.

    Raises:
        DataError: a file that cannot be read, of another kind or without prompts; a line that holds none.
    """
    path = Path(path)
    readers = {".txt": _lines, ".jsonl": _records, ".csv": _rows}
    if path.suffix not in readers:
        raise DataError(f"{path}: prompts are read from .txt, .jsonl and .csv files.")
    try:
        prompts = readers[path.suffix](path, column)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give another file.") from error
    if not prompts:
        raise DataError(f"{path} holds no prompts.")
    return prompts


def _lines(path: Path, column: str | None) -> list[Any]:
    if column is not None:
        raise DataError(f"{path}: a .txt file has no columns, only one prompt a line.")
    return [line for line in _text(path).split("\n") if line.strip()]


def _records(path: Path, column: str | None) -> list[Any]:
    prompts = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}.") from error
        prompts.append(_prompt_of(record, column, where) if isinstance(record, dict) else record)
        if not isinstance(prompts[-1], str | list) or not prompts[-1]:
            raise DataError(f"{where}: a prompt is text, a list of messages or of tokens; got {record!r}.")
    return prompts


def _rows(path: Path, column: str | None) -> list[Any]:
    prompts = []
    for where, row in csv_rows(path):
        prompts.append(_prompt_of(row, column, where))
        if not prompts[-1]:
            raise DataError(f"{where}: the prompt is empty.")
    return prompts


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    return text.replace("\r\n", "\n").replace("\r", "\n")  # not splitlines, which splits at U+2028 too


def _prompt_of(record: dict[Any, Any], column: str | None, where: str) -> Any:
    names = FIELDS if column is None else (column,)
    for name in names:
        if name in record:
            return record[name]
    raise DataError(
        f"{where} has no {' or '.join(names)}, only {', '.join(map(str, record))}; name its column."
    )
