"""Files: written whole or not at all, of a stated kind and schema, the same bytes for the same content.

    KIND = FileKind("moe_lens.RoutingStats", schema=3, reads=(1, 2, 3), words="routing statistics")
    KIND.save_tensors(path, tensors, about)                # safetensors; `about` goes into its header
    about, tensors = KIND.load_tensors(path)               # about["schema"] says which schema was read
    KIND.save_json(path, content); KIND.load_json(path)    # the same for what has no tensors

Every file carries a digest of its content, and loading checks it, so that damage and hand-made changes show.
Nothing is pickled.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lens.errors import DataError, MoELensError

_HEADER: Final = "moe_lens"
"""The one key of a safetensors header: several keys would be written in no fixed order."""


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Attributes:
        name: the value of the file's field "kind".
        schema: the version that is written.
        reads: the versions that can be read.
        words: what such a file holds, in words, for errors.
        error: what is raised for a file that cannot be read.
        former_names: other values of "kind" that older versions wrote.
        default_schema: of files without a field "schema", where users write such by hand; None: refused.
    """

    name: str
    schema: int
    reads: tuple[int, ...]
    words: str
    error: type[MoELensError] = DataError
    former_names: tuple[str, ...] = ()
    default_schema: int | None = None

    def save_tensors(self, path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a safetensors file, atomically: the same bytes for the same tensors and the same `about`."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        if len({tensor.untyped_storage().data_ptr() for tensor in whole.values()}) < len(whole):
            whole = {name: tensor.clone() for name, tensor in whole.items()}  # the format shares no memory
        header = self.sealed(about, whole)
        with atomic_write(path) as temporary:
            save_file(whole, temporary, metadata={_HEADER: _json(header)})

    def load_tensors(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `save_tensors` wrote: `about`, with its "schema", and the tensors.

        Raises:
            `error`: the file cannot be read, is of another kind or schema, or is not what was saved.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = _about(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except _UNREADABLE as error:
            raise self._unreadable(path, error, _read_json) from error
        return self.opened(path, about, tensors), tensors

    def save_json(self, path: str | Path, content: Mapping[str, Any]) -> None:
        """Write a JSON file, atomically; `content` may hold what `json` can write, with strings as keys."""
        text = _json(self.sealed(content), indent=2)
        with atomic_write(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def load_json(self, path: str | Path) -> dict[str, Any]:
        """What `save_json` wrote, with its "schema". A file written by hand needs no digest.

        Raises:
            `error`: as in `load_tensors`.
        """
        try:
            content = _read_json(path)
        except _UNREADABLE as error:
            raise self._unreadable(path, error, _read_about) from error
        return self.opened(path, content)

    def _unreadable(
        self, path: str | Path, error: Exception, other: Callable[[str | Path], Any]
    ) -> MoELensError:
        """What to say of a file that is not of this format: its kind, where `other` can read it."""
        try:
            self._check_kind(path, other(path))
        except self.error as wrong_kind:
            return wrong_kind
        except _UNREADABLE:
            pass
        return self.error(f"{path} cannot be read as {self.words}: {error}.")

    def _check_kind(self, path: str | Path, content: Any) -> None:
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind not in (self.name, *self.former_names):
            raise self.error(f"{path} is no file of {self.words}: its kind is {kind!r}, not {self.name!r}.")

    def sealed(
        self, content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """The content with kind, schema and digest before it."""
        head = {"kind": self.name, "schema": self.schema, "digest": digest_of(content, tensors or {})}
        return {**head, **content}

    def opened(
        self, path: str | Path, content: Any, tensors: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """What `sealed` made a file's content of, with its "schema"; `path` is named in errors."""
        self._check_kind(path, content)
        schema = content.get("schema", self.default_schema)
        if isinstance(schema, bool) or schema not in self.reads:
            known = " or ".join(map(str, self.reads))
            raise self.error(
                f"{path} is no file of {self.words} of schema {known}: its schema is {schema!r}."
            )
        rest = {name: value for name, value in content.items() if name not in ("kind", "schema", "digest")}
        if "digest" in content and content["digest"] != digest_of(rest, tensors or {}):
            raise self.error(
                f"{path} is damaged: its digest is not that of its content. If it was changed by hand on "
                "purpose, take out its field 'digest'."
            )
        return {"schema": schema, **rest}


_UNREADABLE: Final = (OSError, SafetensorError, TypeError, ValueError, RecursionError)


def _read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Notepad writes a mark


def _read_about(path: str | Path) -> Any:
    """What the header of a safetensors file says."""
    with safe_open(path, framework="pt") as file:
        return _about(file.metadata() or {})


def _about(metadata: Mapping[str, str]) -> Any:
    if _HEADER in metadata:
        return json.loads(metadata[_HEADER])
    if "kind" not in metadata:  # a model's weights, say
        return {}
    return {key: json.loads(value) for key, value in metadata.items()}  # before there was one header


def _json(content: Any, indent: int | None = None) -> str:
    """As text that UTF-8 can hold: half a character (a lone surrogate, from somebody's text) is escaped."""
    text = json.dumps(content, ensure_ascii=False, indent=indent, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent, default=_plain)
    return text


def without_nan(content: Any) -> Any:
    """JSON-like content with None for NaN and infinities, which JSON has not, and strict readers refuse.

    >>> without_nan({"low": float("nan"), "limits": (0.5, float("inf"))})
    {'low': None, 'limits': [0.5, None]}
    """
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's, which settings may be, as Python's."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        return value.item()
    raise TypeError(f"{type(value).__name__} is nothing that JSON holds: {value!r}.")


def digest_of(content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256, in hexadecimal, of JSON-like content and tensors, whatever the order of their names."""
    as_read = json.loads(json.dumps(content, default=_plain))  # keys as strings, tuples as lists
    digest = hashlib.sha256(json.dumps(as_read, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_file(path: str | Path) -> str:
    """SHA-256, in hexadecimal, of a file's bytes. Raises DataError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); give another file.") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it replaces `path` when the block ends without error.

    >>> with atomic_write("plan.json") as temporary:
    ...     _ = temporary.write_text("{}")

    Folders on the way that do not exist are made. Where `path` is a symbolic link, the file that it points to
    is replaced and the link stays.

    Raises:
        DataError: the file cannot be written: no place left, a name that the system does not take.
    """
    check_writable(path)
    path = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would keep colleagues out
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be written: {error}. Give another path.") from error


def check_writable(path: str | Path) -> None:
    """Make the folder that the file is to stand in. Raises DataError where no file can be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # raises for a name that no file can have
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be written: {error}. Give another path.") from error
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of a file.")
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path} cannot be written: its folder is read-only. Give another path.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
