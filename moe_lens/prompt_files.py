"""Reading prompts from a file: text, chats or tokens, one a line or a row.

prompts = read_prompts("prompts.txt")                  # one prompt a line
prompts = read_prompts("prompts.jsonl")                # strings, chats, tokens, or objects that hold one
prompts = read_prompts("prompts.csv", column="text")
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from moe_lens.errors import DataError
from moe_lens.table_rows import csv_rows

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


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file's content. Raises DataError if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); give another file.") from error


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
