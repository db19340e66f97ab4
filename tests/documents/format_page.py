"""The page on file formats as tables, and what files hold, to be held against each other."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_lens.files import FileKind
from tests.notebooks import ROOT

PAGE = (ROOT / "docs" / "reference" / "file-formats.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None),
    "object": dict,
}  # fmt: skip
NUMBERED = {"layer": 4, "expert": 8, "gap": 3, "k": 2}
"""Sizes of the specialised organism; other dimensions must only agree with each other."""

SOFT = ("strength", "only_unmet")
"""Fields of soft plans only."""

Row = tuple[str, ...]


def rows(section: str, first: str) -> list[Row]:
    """The rows of all tables of a section whose first column has this name."""
    found: list[Row] = []
    for table in re.findall(r"(?:^\|.*\n)+", SECTIONS[section] + "\n", re.MULTILINE):
        header, _, *lines = (
            tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in table.splitlines()
        )
        if header[0] == first:
            found += lines
    return [(row[0].strip("`"), *row[1:]) for row in found]


def saved(thing: Any, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    thing.save(path)
    return read(path)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A safetensors file as a stranger reads it: what is no tensor, and the tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert list(metadata) == ["moe_lens"]
        return json.loads(metadata["moe_lens"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_head(content: dict[str, Any], section: str) -> None:
    """Kind, schema and digest come first, and are what the section says."""
    assert list(content)[:3] == ["kind", "schema", "digest"]
    said = schemas(content["kind"], section).partition(";")[0]
    assert str(content["schema"]) in re.findall(r"\d+", said)


def schemas(kind: str, section: str) -> str:
    """The words on schemas after the name of a kind."""
    [said] = re.findall(rf"[Kk]ind `{kind}`, (schema [^.:]*)[.:]", " ".join(SECTIONS[section].split()))
    return said


def check_type(value: Any, said: str) -> None:
    """A value against words such as "list of strings or null"."""
    for words in re.split(r", | or ", said):
        if words.startswith("list of "):
            inner = words.removeprefix("list of ").rstrip("s")
            if isinstance(value, list) and all(
                isinstance(each, {**TYPES, "list": list}[inner]) for each in value
            ):
                return
        elif isinstance(value, TYPES[words]) and (words == "boolean" or not isinstance(value, bool)):
            return
    raise AssertionError(f"{value!r} is no {said}")


def check_fields(
    content: dict[str, Any], section: str, first: str = "field", missing: tuple[str, ...] = ()
) -> None:
    """The content's fields are those of the section's table, with values of the types that it says."""
    said = {row[0]: row[1] for row in rows(section, first)}
    head = {"kind", "schema", "digest"} if "schema" in content else set()
    assert set(content) - head == {name for name in said if "." not in name} - {*missing}
    for name, words in said.items():
        value: Any = content
        for part in name.split("."):
            value = None if value is None else value.get(part, ...)
        if value is ...:
            assert name in missing
        elif "." not in name or content[name.split(".")[0]] is not None:
            check_type(value, words.replace(", list of messages", "").replace(" or list of messages", ""))


def check_tensors(tensors: dict[str, torch.Tensor], section: str, missing: tuple[str, ...] = ()) -> None:
    """The tensors are those of the section's tables, with the dtypes and shapes that they say."""
    said = {row[0]: row[1:3] for row in rows(section, "tensor") if not row[0].endswith("*")}
    assert set(tensors) == set(said) - {*missing}
    sizes = dict(NUMBERED)
    for name, tensor in tensors.items():
        dtypes, shape = said[name]
        assert str(tensor.dtype).removeprefix("torch.") in re.split(r", | or ", dtypes), name
        assert tensor.ndim == len(shape.split()), name
        for dimension, size in zip(shape.split(), tensor.shape, strict=True):
            place = name.partition(".")[0] + dimension if dimension not in NUMBERED else dimension
            assert sizes.setdefault(place, size) == size, f"{name}: {dimension}"


def kinds() -> list[FileKind]:
    """All kinds of files in the package."""
    found: list[FileKind] = []
    for path in sorted((ROOT / "moe_lens").rglob("*.py")):
        made = path.read_text(encoding="utf-8").count("FileKind(")
        if made and path.name != "files.py":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            here = [one for one in vars(import_module(name)).values() if isinstance(one, FileKind)]
            assert len(here) >= made, f"{name} hides a kind of file from this test"
            found += here
    return found
