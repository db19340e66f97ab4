"""The house: a room imports only what its row in CONTRIBUTING.md's table names; faces, names and walls."""

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import moe_lens
from moe_lens.results import Result

PACKAGE = Path(moe_lens.__file__).parent
CONTRIBUTING = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
GROUND = {"errors", "hook_names", "checks", "encoding", "shape", "files", "resampling", "results"}
TABLE = {
    room or "ground": imports
    for room, imports in re.findall(
        r"^\| (?:`([a-z]+)/`|ground) \| [^|]+ \| ([^|]+) \|$", CONTRIBUTING, re.MULTILINE
    )
}
SENTENCES = dict(re.findall(r"^\| `([a-z]+)/` \| ([^|]+) \|", CONTRIBUTING, re.MULTILINE))
ROOMS = [room for room in TABLE if room != "ground"]
SCRIPTS = {f"moe_lens.organisms.{name}" for name in ("train", "branching", "compare_seeds")}
FILES = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
MOST_LINES = 450
WALLS = [
    ("interventions", "steering"), ("attribution", "interventions"), ("text", "model"), ("model", "text"),
    ("detection", "model"), ("routers", "model"), ("routers", "hook_names"), ("statistics", "steering"),
]  # fmt: skip


def allowed(room: str) -> set[str]:
    if TABLE[room] == "nothing":
        return set()
    return set(ROOMS) | {"ground"} if TABLE[room] == "every room" else set(TABLE[room].split(", "))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def room_of(name: str) -> str:
    """The room of moe_lens.<room>.<file>, or of a file of the ground."""
    part = name.split(".")[1]
    return "ground" if part in GROUND else part


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in it: modules, or names in them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports by a relative path"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    return {name for name in imported(path) if name.startswith("moe_lens.")}


def test_the_table_lists_every_room_and_each_stands_below_what_it_imports() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert len(TABLE) == 14
    assert set(ROOMS) == folders
    assert {path.stem for path in PACKAGE.glob("*.py")} == GROUND | {"__init__"}
    order = list(TABLE)
    for room in ROOMS:
        if TABLE[room] != "every room":
            assert all(order.index(other) < order.index(room) for other in allowed(room)), room


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(module_name(path))
    assert {room_of(name) for name in ours(path)} - {room} <= allowed(room)


@pytest.mark.parametrize(("room", "other"), WALLS)
def test_the_walls_stand(room: str, other: str) -> None:
    across = {
        name for path in (PACKAGE / room).glob("*.py") for name in ours(path) if name.split(".")[1] == other
    }
    assert across == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_model_knows_transformer_lens(path: Path) -> None:
    if room_of(module_name(path)) != "model":
        assert not {name for name in imported(path) if name.split(".")[0] == "transformer_lens"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_a_script(path: Path) -> None:
    assert not {name for name in ours(path) if any(name.startswith(script) for script in SCRIPTS)}


def test_no_circle_between_files() -> None:
    names = {module_name(path) for path in FILES}

    def files_of(path: Path) -> set[str]:
        return {n for name in ours(path) for n in (name, name.rpartition(".")[0]) if n in names}

    left = {module_name(path): files_of(path) - SCRIPTS for path in FILES}
    while free := {name for name, needs in left.items() if not needs & set(left)}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert left == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_its_sentence_and_lists_its_public_names(room: str) -> None:
    module = import_module(f"moe_lens.{room}")
    assert (module.__doc__ or "").strip().split("\n\n")[0].endswith(".")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("room", ROOMS)
def test_the_sentence_of_a_room_is_the_one_in_contributing(room: str) -> None:
    text = " ".join((import_module(f"moe_lens.{room}").__doc__ or "").split())
    first = re.split(r"(?<=\.) ", text)[0]
    assert first.removesuffix(".").lower() == SENTENCES[room].lower()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_can_be_read_at_a_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_function_says_what_it_returns(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__"
    ]
    assert [f"{node.lineno}: {node.name}" for node in functions if node.returns is None] == []


def face(room: str) -> dict[str, Any]:
    """Public name -> what it is, for functions and classes of ours."""
    module = import_module(f"moe_lens.{room}")
    public = {name: getattr(module, name) for name in module.__all__}
    return {
        name: thing
        for name, thing in public.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("moe_lens.")
    }


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_classes_and_methods_have_docstrings(room: str) -> None:
    silent = []
    for name, thing in face(room).items():
        kinds = (FunctionType, classmethod, staticmethod, property)
        fields = getattr(thing, "__dataclass_fields__", {})  # described in the class
        members = [
            key
            for key, value in (vars(thing).items() if inspect.isclass(thing) else ())
            if isinstance(value, kinds) and not key.startswith("_") and key not in fields
        ]
        silent += [f"{name}.{key}" for key in members if not inspect.getdoc(getattr(thing, key))]
        if (inspect.getdoc(thing) or f"{name}(").startswith(f"{name}("):  # what @dataclass writes
            silent.append(name)
    assert silent == []


@pytest.mark.parametrize("room", ROOMS)
def test_results_show_one_line_and_a_table_in_notebooks(room: str) -> None:
    """What they show is looked at in test_docstrings.py, on every result that an example makes."""
    for name, thing in face(room).items():
        if inspect.isclass(thing) and (hasattr(thing, "to_dataframe") or issubclass(thing, Result)):
            assert not vars(thing)["__dataclass_params__"].repr, f"{name}: @dataclass(repr=False)"
            assert hasattr(thing, "_repr_html_"), name


def test_no_file_bears_the_name_of_a_public_function() -> None:
    public = set(moe_lens.__all__).union(*(import_module(f"moe_lens.{room}").__all__ for room in ROOMS))
    modules = {"contrasts", "hook_names", "errors", "organisms"}  # public as modules
    assert {path.stem for path in FILES} & public <= modules
    for name in moe_lens.__all__:
        assert getattr(moe_lens, name) is not None


def test_stubs_are_the_faces() -> None:
    """Type checkers read what Python imports: every line of a stub says `from .file import name as name`."""
    for stub in PACKAGE.rglob("__init__.pyi"):
        lines = [line for line in stub.read_text(encoding="utf-8").splitlines() if line.startswith("from")]
        module = import_module(module_name(stub).removesuffix(".__init__"))
        names = [re.fullmatch(r"from \.[\w.]* import (\w+) as \1", line) for line in lines]
        assert all(names), stub
        assert set(module.__all__) <= {match[1] for match in names if match}
