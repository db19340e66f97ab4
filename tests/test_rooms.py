"""Imports go one way: a module imports only from modules above it in CONTRIBUTING.md's table."""

import ast
import re
from pathlib import Path

import pytest

import moe_lens

PACKAGE = Path(moe_lens.__file__).parent
TABLE = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
ORDER = [
    room.rstrip("/").removesuffix(".py") for room in re.findall(r"^\| `([a-z_]+(?:\.py|/))` \|", TABLE, re.M)
]
SCRIPTS = {"moe_lens.organisms.train", "moe_lens.organisms.compare_seeds"}
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Full names of what a file imports from the package: modules, or names in them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("moe_lens.")}


def test_the_table_lists_every_module() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert sorted(ORDER) == sorted(rooms)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_from_rooms_above_it(path: Path) -> None:
    if module_name(path) in SCRIPTS:
        return
    room = ORDER.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    below = {name for name in imported(path) if ORDER.index(name.split(".")[1]) > room}
    assert below == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_a_script(path: Path) -> None:
    assert not {name for name in imported(path) if any(name.startswith(script) for script in SCRIPTS)}
