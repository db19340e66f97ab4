"""The benchmarks of the published methods, in their quick forms: what they write is what a measure says."""

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lens import RoutedModel, SteeringPlan, answer_task, evaluate_steering, organisms
from tests.families import broad
from tests.notebooks import ROOT

BENCHMARKS = ROOT / "benchmarks"


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / f"{name}.py"))


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the script is run: its folder comes first."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("published_methods", "methods_table", "methods_calibration"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_command_writes_and_names_every_method() -> None:
    """Sentences about results are made from rows: none of the page's text is anybody's own."""
    table, methods = script("methods_table"), script("published_methods")["METHODS"]
    text = (ROOT / "docs" / "methods-table.md").read_text(encoding="utf-8")
    template = table["PAGE_TEXT"]
    for fixed in template.split("{")[0].splitlines():
        assert fixed in text
    for method in methods:
        rows = [line for line in text.splitlines() if line.startswith(f"| {method} |")]
        left_out = re.findall(
            rf"^- Not run for this page, on .*: .*{re.escape(method)}[;.]", text, re.MULTILINE
        )
        assert len(rows) + len(left_out) == len(table["ORGANISMS"]) + (method != "noisy routes"), method


@broad
def test_rows_are_what_evaluate_steering_measures_and_are_kept(tmp_path: Path) -> None:
    table = script("methods_table")
    table["main"](["--quick", "--out", str(tmp_path)])
    row = json.loads((tmp_path / "planted-risk-difference.json").read_text(encoding="utf-8"))
    model, world = organisms.load("planted", wrapper=RoutedModel), organisms.world("planted")
    conflicts = table["one_each"](world.conflicts("test"))
    task = answer_task(
        [c.open_book for c in conflicts],
        [c.document_answer for c in conflicts],
        clusters=[c.entity for c in conflicts],
    )
    plus, minus = (SteeringPlan(deactivate=row["off"][side]) for side in "+-")
    report = evaluate_steering(model, plus, task, reverse=minus, n_random=4, progress=False)
    assert row["values"][1] == report.steered["+"].values.tolist()
    assert row["values"][2] == report.steered["-"].values.tolist()
    assert row["p"] == pytest.approx([report.p_matched, report.p_any])
    assert row["verdict"] == report.verdict
    text = (tmp_path / "methods-table.md").read_text(encoding="utf-8")
    gap = np.mean(np.subtract(row["values"][1], row["values"][2]))
    assert f"| {gap:+.2f} [" in text
    mark = tmp_path / "planted-soft-plan.json"
    changed = json.loads(mark.read_text(encoding="utf-8")) | {"seconds": 1234.5}
    mark.write_text(json.dumps(changed), encoding="utf-8")
    table["main"](["--quick", "--out", str(tmp_path)])  # nothing runs again
    assert "| 1234.5 |" in (tmp_path / "methods-table.md").read_text(encoding="utf-8")


@broad
def test_intervals_of_methods_hold_the_truth_about_as_often_as_they_say() -> None:
    calibration = script("methods_calibration")
    for name, draw in calibration["CASES"].items():
        found = calibration["coverage"](draw, 60, 40, seed=1)
        assert found.held >= 0.8, name  # of 40 at 95 %: below it once in 10,000, of independent ones
