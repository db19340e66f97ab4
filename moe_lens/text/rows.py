"""Rows of columns from dictionaries, DataFrames, datasets, JSONL and CSV files; prompts read from files.

    for where, row in jsonl_rows("pairs.jsonl"):           # ("pairs.jsonl, line 1", {column: cell})
        text_cell(where, row, "first")                     # errors name the row and the column
    prompts = read_prompts("prompts.txt")                  # one prompt a line
    prompts = read_prompts("prompts.jsonl")                # strings, chats, tokens, or objects that hold one
    prompts = read_prompts("prompts.csv", column="text")

Errors name the file, the line and the column.
"""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from moe_lens.checks import as_index, check_text, short
from moe_lens.errors import DataError

Row = tuple[str, dict[str, Any]]
"""Where the row stands (for errors), and its cells by column."""

PROMPT_COLUMNS: Final = ("prompt", "messages", "text")
"""Where a row's prompt is looked for if no column is named."""


def records(rows: Any) -> list[Row]:
    """("row 0", {column: cell}) for each row of a list of dictionaries, a DataFrame or a dataset.

    >>> records([{"question": "why?"}])
    [('row 0', {'question': 'why?'})]

    Raises:
        DataError: no rows, or a row that is not a dictionary, with its number.
    """
    pandas = sys.modules.get("pandas")  # whoever has a DataFrame has imported it
    if pandas is not None and isinstance(rows, pandas.DataFrame):
        rows = rows.to_dict("records")
    if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
        raise DataError(
            f"Rows must be dictionaries, a DataFrame or one split of a dataset (dataset['train']); got a "
            f"{type(rows).__name__}."
        )
    table: list[Row] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} must be a dictionary of columns; got {short(row)}.")
        table.append((f"row {number}", dict(row)))
    return at_least_one("The table", table)


def cell(where: str, row: Mapping[str, Any], column: str) -> Any:
    """The content of a cell. Raises DataError if the column is missing or the cell is empty."""
    if column not in row:
        columns = [str(name) for name in row]
        raise DataError(f"{where} has no column {column!r}; its columns are {columns}.")
    content = row[column]
    if _is_empty(content):
        raise DataError(f"{where}, column {column!r} is empty ({content!r}); fill it or take the row out.")
    return content


def text_cell(where: str, row: Mapping[str, Any], column: str) -> str:
    """Like `cell`, for a cell that must hold text."""
    content = cell(where, row, column)
    if not isinstance(content, str):
        raise DataError(f"{where}, column {column!r} must be text; got {short(content)}.")
    return content


def label_of(where: str, content: Any) -> str:
    """A cluster's or a template's label, from text or a whole number. Raises DataError for anything else."""
    number = as_index(content)
    if not isinstance(content, str) and number is None:
        raise DataError(f"{where} must be a label (text or a whole number); got {short(content)}.")
    return content if isinstance(content, str) else str(number)


def parsed_json(where: str, text: str) -> Any:
    """What a JSON text holds. Raises DataError, also for half a character, saying where the text stands."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}.") from error
    if "\\u" in text:  # the only way in for half a character
        check_text(json.dumps(content, ensure_ascii=False), where)
    return content


def jsonl_rows(path: str | Path) -> list[Row]:
    """The objects of a file with one JSON object a line; empty lines are skipped.

    Raises:
        DataError: a file that cannot be read, or a line that is not a JSON object or holds half a character
            (a lone surrogate), with its number.
    """
    rows: list[Row] = []
    for where, content in _json_lines(path):
        if not isinstance(content, dict):
            raise DataError(f"{where} must be a JSON object; got {short(content)}.")
        rows.append((where, content))
    return rows


def csv_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV file with a header, in UTF-8.

    Raises:
        DataError: a file that cannot be read, a malformed line with its number, or two columns of one name.
    """
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # documents are longer than the default of 131,072 characters
    rows: list[Row] = []
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


def ending(path: str | Path, what: str, known: Iterable[str]) -> str:
    """A file's ending, which must be one of these, in capitals or not. Raises DataError for any other."""
    found, endings = Path(path).suffix, list(known)
    if found.lower() not in endings:
        listed = f"{', '.join(endings[:-1])} and {endings[-1]}"
        raise DataError(f"{path}: {what} are read from {listed} files; got the ending {found!r}.")
    return found.lower()


def at_least_one(what: str | Path, rows: list[Row]) -> list[Row]:
    """The rows. Raises DataError if there are none."""
    if not rows:
        raise DataError(f"{what} has no rows; give at least one.")
    return rows


def read_prompts(path: str | Path, *, column: str | None = None) -> list[Any]:
    """The prompts of a .txt, .jsonl or .csv file: strings, lists of messages, or lists of token ids.

    Args:
        path: a .txt file holds one prompt a line; a .jsonl file one prompt, or one object with a prompt in
            it, a line; a .csv file one prompt a row.
        column: the field (.jsonl) or column (.csv) of the prompts; by default the first of prompt, messages,
            text that a row has.

    Raises:
        DataError: a file that cannot be read, has another ending or no prompts; a line without a prompt.
    """
    path = Path(path)
    readers = {".txt": _prompts_of_txt, ".jsonl": _prompts_of_jsonl, ".csv": _prompts_of_csv}
    prompts = readers[ending(path, "prompts", readers)](path, column)
    if not prompts:
        raise DataError(f"{path} holds no prompts.")
    return prompts


def _prompts_of_txt(path: Path, column: str | None) -> list[Any]:
    if column is not None:
        raise DataError(f"{path}: a .txt file has no columns, only one prompt a line.")
    return [line for _, line in _lines(path)]


def _prompts_of_jsonl(path: Path, column: str | None) -> list[Any]:
    prompts = []
    for where, content in _json_lines(path):
        prompt = _prompt_of(content, column, where) if isinstance(content, dict) else content
        if not isinstance(prompt, str | list) or not prompt:
            raise DataError(f"{where}: a prompt is text, a list of messages or of tokens; got {content!r}.")
        prompts.append(prompt)
    return prompts


def _prompts_of_csv(path: Path, column: str | None) -> list[Any]:
    prompts = []
    for where, row in csv_rows(path):
        prompt = _prompt_of(row, column, where)
        if not prompt:
            raise DataError(f"{where}: the prompt is empty.")
        prompts.append(prompt)
    return prompts


def _prompt_of(row: dict[Any, Any], column: str | None, where: str) -> Any:
    names = PROMPT_COLUMNS if column is None else (column,)
    for name in names:
        if name in row:
            return row[name]
    raise DataError(f"{where} has no {' or '.join(names)}, only {', '.join(map(str, row))}; name its column.")


def _json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """("pairs.jsonl, line 1", what the line holds) for each line that is not empty."""
    for where, line in _lines(path):
        yield where, parsed_json(where, line)


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """("prompts.txt, line 1", its text) for each line that is not empty, whatever system wrote the file."""
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits at U+2028
        if line.strip():
            yield f"{path}, line {number}", line


def _text(path: str | Path) -> str:
    """A file's text with its line ends as they are. Raises DataError if it cannot be read as UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            return file.read()
    except (OSError, UnicodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); give another file, in UTF-8.") from error


def _is_empty(content: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, pandas' NA, or a text or list without content."""
    if isinstance(content, str | list | tuple):
        return not content
    if content is None or isinstance(content, bool | int | Mapping):
        return content is None
    import pandas

    return pandas.api.types.is_scalar(content) and bool(pandas.isna(content))
