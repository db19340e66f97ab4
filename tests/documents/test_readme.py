"""The README's code runs, and its table is what the demo gives."""

import re
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lens
from moe_lens.model.layers import MoELayer
from moe_lens.model.self_check import check_router
from moe_lens.organisms.demo import DemoResult
from moe_lens.routers.table import RULES, rule_for
from tests.notebooks import ROOT, same_text

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["plan"]) == 3  # type: ignore[arg-type]
    assert (tmp_path / "stats.safetensors").exists()


def test_the_page_on_wrappers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "wrappers.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "wrappers.md", "exec"), names)
    assert (tmp_path / "smaller" / "config.json").exists()


def test_the_page_on_prompts_runs() -> None:
    page = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "prompts.md", "exec"), {})


def test_the_page_on_the_explorer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "explorer.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "explorer.md", "exec"), names)
    assert (tmp_path / "page.html").stat().st_size > 50_000


def test_the_page_on_many_processes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "many-processes.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(block, "many-processes.md", "exec"), {})
    assert (tmp_path / "stats.safetensors").exists()


@pytest.mark.parametrize("page", ["audits.md", "methods-interventions.md"])
def test_the_pages_on_published_methods_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_page_on_methods_runs_and_names_functions_that_exist() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "methods.md", "exec"), {})
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    named = {match for row in rows for cell in row for match in re.findall(r"`(\w+)\(", cell)}
    methods = {"from_scores", "SteeringPlan"}
    assert {"npmi", "search_plan", "route_probe"} <= named
    assert [name for name in named - methods if not hasattr(moe_lens, name)] == []


def test_the_worked_example_in_contributing_runs() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    try:
        router = names["SoftplusRouter"](8, 6, 2)
        check_router(MoELayer("here", torch.nn.Module(), router))
        steered, rule = rule_for(router).steer(torch.randn(50, 6), [3], [1, 2], 0.01)
        indices = rule.select(steered)
        assert bool((indices == 3).any(-1).all())
        assert not bool(((indices == 1) | (indices == 2)).any())
    finally:
        del RULES["SoftplusRouter"]


def test_the_ten_line_example_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    first_block = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    exec(compile(first_block, "README.md", "exec"), {})
    unsteered, steered = capsys.readouterr().out.splitlines()
    said = re.findall(r"# \.\.\. (Answer : \w+)", first_block)
    assert [unsteered.endswith(said[0]), steered.endswith(said[1])] == [True, True]


def test_the_table_of_alternatives_is_what_is_measured() -> None:
    table = re.findall(r"<!-- alternatives -->\n(.*?)<!-- /alternatives -->", README, flags=re.DOTALL)[0]
    script = runpy.run_path(str(ROOT / "benchmarks" / "alternatives.py"))
    with torch.no_grad():
        measured = script["bridge_rows"]()
    assert len(measured) == 5
    for row, committed in zip(measured, table.splitlines()[2:], strict=False):
        assert same_text(committed, row)


def test_the_table_is_what_the_demo_gives(planted_demo: DemoResult) -> None:
    """Within .05: another processor may break a near tie the other way."""
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in README.splitlines()
        if "|" in line
    ]
    header = next(cells for cells in lines if cells[0] == "organism")
    row = dict(zip(header, next(cells for cells in lines if cells[0] == "planted"), strict=True))
    report = planted_demo.report
    assert float(row["toward doc"]) == pytest.approx(report.steered["+"].rate, abs=0.05)
    assert float(row["toward memory"]) == pytest.approx(report.steered["-"].rate, abs=0.05)
    assert float(row["doc rate"]) == pytest.approx(report.unsteered.rate, abs=0.05)
    assert row["verdict"] == "exceeds controls"
    assert row["experts off"].startswith(f"{planted_demo.size} of ")


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "tutorials/README.md",
        "docs/wrappers.md",
        "docs/prompts.md",
        "docs/explorer.md",
        "docs/many-processes.md",
        "docs/vllm.md",
        "docs/audits.md",
        "docs/methods-interventions.md",
        "docs/methods.md",
    ],
    ids=str,
)
def test_modules_and_names_in_prose_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for path in set(re.findall(r"`(moe_lens(?:\.\w+)+)", text)):
        module, _, name = path.rpartition(".")
        try:
            import_module(path)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), name), f"{document}: {path}"
    for path in set(re.findall(r"`((?:moe_lens|tests|benchmarks|docs|tutorials)/[\w/]+\.(?:py|md))`", text)):
        assert (ROOT / path).is_file(), f"{document}: {path}"
