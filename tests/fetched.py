"""What pip fetches for tests into `.sdists/`, once a checkout; where it cannot, the test is skipped.

    folder = made_once("package-1.0", make)     # make(scratch) gives a folder within `scratch`
    [wheel] = downloaded("package==1.0", scratch, binary=True)
    installed(["package==1.0", "other==2.0"], scratch / "site")

Nothing of it is in this repository, and nothing is installed into the environment that runs the tests.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
CACHE: Final = ROOT / ".sdists"


def made_once(name: str, make: Callable[[Path], Path]) -> Path:
    """The folder of that name, whole: made in a scratch folder beside it, unless it is there.

    Another process may be quicker, and one that is broken off leaves nothing.
    """
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = make(Path(scratch))
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def downloaded(requirement: str, folder: Path, *, binary: bool) -> Path:
    """A package's wheel, or its source distribution, in that folder; without what it asks for."""
    before = set(folder.iterdir())
    _pip(
        requirement, "download", "--no-deps", "--only-binary" if binary else "--no-binary", ":all:",
        "--dest", str(folder), requirement,
    )  # fmt: skip
    [found] = set(folder.iterdir()) - before
    return found


def installed(requirements: Sequence[str], folder: Path) -> Path:
    """That folder, with these packages in it and nothing that they ask for: an entry for `sys.path`."""
    _pip(requirements[0], "install", "--no-deps", "--quiet", "--target", str(folder), *requirements)
    return folder


def _pip(what: str, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        pytest.skip(f"pip cannot get {what}: {''.join(last)}")
