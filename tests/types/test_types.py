"""A user's code, checked by pyright against the package as it is shipped: faces, `py.typed`, annotations.

Oracle: the comments of usage.py, and what `import moe_lens` gives at run time.
"""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import moe_lens

USAGE = Path(__file__).parent / "usage.py"
PACKAGE = Path(moe_lens.__file__).parent
FACES = ["moe_lens", *sorted(f"moe_lens.{path.parent.name}" for path in PACKAGE.glob("*/__init__.pyi"))]
Line = tuple[int, str]


def findings(file: Path) -> list[dict[str, Any]]:
    """What pyright says of a file that stands alone beside the package."""
    environment = Path(sys.prefix)
    config = {
        "include": [file.name],
        "venvPath": str(environment.parent),
        "venv": environment.name,
        "extraPaths": [str(PACKAGE.parent)],
        "pythonVersion": "3.11",
    }
    (file.parent / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--project", str(file.parent)],
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)["generalDiagnostics"]


def told(findings: list[dict[str, Any]]) -> set[Line]:
    """(line, type that is shown or rule that is broken), lines from 1 on."""
    lines = set()
    for finding in findings:
        shown = re.match(r'Type of ".*" is "(.*)"$', finding["message"], re.DOTALL)
        text = shown[1] if shown and finding["severity"] == "information" else finding["rule"]
        lines.add((finding["range"]["start"]["line"] + 1, text))
    return lines


def announced(source: str) -> set[Line]:
    return {
        (number, match[1])
        for number, line in enumerate(source.splitlines(), 1)
        if (match := re.search(r"# (?:shows|wrong): (.*)$", line))
    }


def test_a_users_code_is_understood_and_its_mistakes_are_found(tmp_path: Path) -> None:
    source = USAGE.read_text(encoding="utf-8")
    (tmp_path / "usage.py").write_text(source, encoding="utf-8")
    expected = announced(source)
    assert len(expected) > 25
    assert told(findings(tmp_path / "usage.py")) == expected


@pytest.mark.broad
def test_every_public_name_has_a_type(tmp_path: Path) -> None:
    """Every name of `__all__` of every face resolves, and to more than Unknown."""
    lines = ["from typing import reveal_type"]
    expected = {}
    for face in FACES:
        lines.append(f"import {face}")
        for name in import_module(face).__all__:
            lines.append(f"reveal_type({face}.{name})")
            expected[len(lines)] = f"{face}.{name}"
    (tmp_path / "names.py").write_text("\n".join(lines))
    types = dict(told(findings(tmp_path / "names.py")))
    assert len(expected) > 150
    assert types.keys() == expected.keys()
    assert {expected[line] for line, shown in types.items() if re.search(r"Unknown|^report", shown)} == set()


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("face", FACES)
def test_a_face_has_a_stub_for_type_checkers(face: str) -> None:
    assert (PACKAGE.parent / face.replace(".", "/") / "__init__.pyi").is_file()
