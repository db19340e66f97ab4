"""Writing files so that a reader finds the old file or the new one, never half of one."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_lens.errors import DataError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the place of `path` when the block ends without error.

    >>> with atomic_write("plan.json") as temporary:
    ...     _ = temporary.write_text("{}")
    """
    path = Path(path)
    check_writable(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would keep colleagues out
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Make the folder that the file is to stand in. Raises DataError where no file can be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}. Give another path.") from error
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of a file.")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path} cannot be written: its folder is read-only. Give another path.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file's content. Raises DataError if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); give another file.") from error


def read_json(path: str | Path, kind: str, schema: int) -> dict[str, Any]:
    """The JSON object in a file of a kind. Raises DataError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {error}.") from error
    if not isinstance(content, dict) or (content.get("kind"), content.get("schema")) != (kind, schema):
        raise DataError(f"{path} is no file of kind {kind!r} and schema {schema}.")
    return content
