"""The tests of other packages, from their source distributions, run in processes of their own.

    folder = source_of("transformers")         # the installed version's sdist, unpacked
    outcomes = run_tests(folder, "tests/x.py", attached="yes")     # test id -> "passed", "failed", "skipped"

Nothing of them is in this repository (`tests/fetched.py`).
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

from tests.fetched import ROOT, downloaded, made_once

PLUGIN = "tests_of_others_attached"


def source_of(package: str) -> Path:
    """The folder of the installed version's source distribution; skips the test where pip cannot get it."""
    wanted = f"{package.replace('-', '_')}-{version(package)}"

    def unpacked(scratch: Path) -> Path:
        archive = downloaded(f"{package}=={version(package)}", scratch, binary=False)
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        return scratch / wanted

    return made_once(wanted, unpacked)


def run_tests(
    folder: Path, *tests: str, attached: str, arguments: tuple[str, ...] = (), timeout: int = 900, **env: str
) -> dict[str, str]:
    """The outcome of each test; `attached`: what the plugin in `others/` does with models ("no": nothing)."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "--no-header",
                    "--tb=short",
                    "-p",
                    "no:cacheprovider",
                ),
                *("-p", PLUGIN, "--rootdir", str(folder), f"--junitxml={report.name}"),
                *arguments,
                *tests,
            ],
            cwd=folder,
            env={
                **os.environ,
                **env,
                "MOE_LENS_ATTACHED": attached,
                "PYTHONPATH": os.pathsep.join(
                    [str(folder), str(ROOT), str(Path(__file__).parent / "others")]
                ),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        text = Path(report.name).read_text()
    if done.returncode not in (0, 1) or not text:
        raise AssertionError(f"pytest did not run: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return _outcomes(text)


def _outcomes(report: str) -> dict[str, str]:
    outcomes = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = bool(kinds & {"failure", "error"})
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes[name] = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
    return outcomes


def failed_only_with_us(plain: dict[str, str], attached: dict[str, str]) -> list[str]:
    """Tests that pass without us, and with us do not: failed, skipped or gone."""
    return sorted(test for test, outcome in plain.items() if outcome == "passed" != attached.get(test))
