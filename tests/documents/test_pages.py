"""Every Python block of every page runs, every link leads somewhere, and tables hold what they say."""

import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

import moe_lens
from moe_lens import SteeringReport, cli, organisms
from moe_lens.model.layers import MoELayer
from moe_lens.model.self_check import check_router
from moe_lens.organisms.demo import DemoResult
from moe_lens.routers.table import RULES, rule_for
from tests.families import first_of
from tests.notebooks import ROOT, TUTORIALS, same_text

PAGES = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "tutorials" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
SLOW = {"count", "detect", "evaluate", "plan-size", "mediation", "patch", "add-a-score"}
"""Pages of a few seconds and more: in the second tier."""
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page(name), flags=re.DOTALL | re.MULTILINE)


def run(name: str) -> dict[str, Any]:
    """The names that a page's blocks leave, run from top to bottom in the current folder."""
    names: dict[str, Any] = {}
    for block in blocks(name):
        exec(compile(block, name, "exec"), names)
    return names


WITH_CODE = [
    pytest.param(name, marks=[pytest.mark.broad] if Path(name).stem in SLOW else [])
    for name in NAMES
    if blocks(name) and name not in ("README.md", "docs/how-to/add-a-rule.md")  # which run below
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", first_of([n for n in WITH_CODE if n != "docs/harness.md"], WITH_CODE))
def test_code_runs_from_top_to_bottom(name: str) -> None:
    run(name)


def test_no_code_hides_from_these_tests() -> None:
    """A fence is a plain one (shell, output), a doctest, or one that runs."""
    kinds = {kind for name in NAMES for kind in re.findall(r"^\s*```(\S+)$", page(name), re.MULTILINE)}
    assert kinds <= {"python", "pycon", "text"}
    assert len(WITH_CODE) > 20


def test_the_worked_rule_steers() -> None:
    try:
        names = run("docs/how-to/add-a-rule.md")
        router = names["SoftplusRouter"](8, 6, 2)
        check_router(MoELayer("here", torch.nn.Module(), router))
        steered, rule = rule_for(router).steer(torch.randn(50, 6), [3], [1, 2], 0.01)
        indices = rule.select(steered)
        assert bool((indices == 3).any(-1).all())
        assert not bool(((indices == 1) | (indices == 2)).any())
    finally:
        RULES.pop("SoftplusRouter", None)


def test_the_ten_line_example_prints_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("README.md")
    unsteered, steered = capsys.readouterr().out.splitlines()
    said = re.findall(r"# \.\.\. (Answer : \w+)", blocks("README.md")[0])
    assert [unsteered.endswith(said[0]), steered.endswith(said[1])] == [True, True]
    assert len(names["plan"]) == 8


@pytest.mark.parametrize("name", ["docs/how-to/steer.md", "docs/how-to/ablate.md"])
def test_a_page_prints_the_answers_that_its_comments_say(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name)
    printed = capsys.readouterr().out.splitlines()
    code = "\n".join(blocks(name))
    said = re.findall(r"print\(.*\)  # (?:\.\.\. )?(.+?)(?:   \(.*)?$", code, re.MULTILINE)
    assert [line[-len(words) :] for line, words in zip(printed, said, strict=True)] == said
    assert {"Accra", "Riga"} <= {words.split()[-1] for words in said}  # not steered, and steered


def test_the_page_on_audits_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Rates within .05, one prompt: another processor may break a near tie the other way."""

    def rates(table: str) -> dict[str, float]:
        rows = re.findall(r"^ *(\w.*?)  +\d+ +\d+ +(\d\.\d+) ", table, re.MULTILINE)
        return {condition: float(rate) for condition, rate in rows}

    run("docs/audits.md")
    printed = rates(capsys.readouterr().out)
    shown = rates(re.findall(r"^```text\n( +condition.*?)```", page("docs/audits.md"), re.M | re.S)[0])
    assert len(shown) == 7
    assert shown == pytest.approx(printed, abs=0.05)


@pytest.mark.broad
def test_the_commands_on_the_page_run_and_write_their_files(tmp_path: Path) -> None:
    run("docs/how-to/command-line.md")
    text = page("docs/how-to/command-line.md")
    lines = [line.partition("  #")[0] for line in text.splitlines() if line.startswith("moe-lens ")]
    assert len(lines) == 6
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, line
    assert SteeringReport.load(tmp_path / "report.json").verdict  # as the page says
    outputs = [words[words.index("--out") + 1] for words in map(shlex.split, lines) if "--out" in words]
    assert all((tmp_path / name).stat().st_size for name in [*outputs, "scores.csv"])


@pytest.mark.broad
@pytest.mark.parametrize("name", ["docs/how-to/evaluate.md", "docs/harness.md"])
def test_the_flagship_exceeds_its_controls_where_a_page_evaluates_it(name: str) -> None:
    code = blocks(name)[0]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, name, "exec"), names)
    assert names["report"].verdict


def test_the_readme_can_be_read_at_once() -> None:
    text = page("README.md")
    assert len(text.splitlines()) <= 145
    assert [command in text for command in ("\nmake demo ", "\nmake test ")] == [True, True]


def test_the_table_of_alternatives_is_what_is_measured() -> None:
    text = page("docs/explanation/edited-logits.md")
    table = re.findall(r"<!-- alternatives -->\n(.*?)<!-- /alternatives -->", text, flags=re.DOTALL)[0]
    script = runpy.run_path(str(ROOT / "benchmarks" / "alternatives.py"))
    with torch.no_grad():
        measured = script["bridge_rows"]()
    assert len(measured) == 5
    for row, committed in zip(measured, table.splitlines()[2:], strict=False):
        assert same_text(committed, row)


def demo_table() -> dict[str, dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in page("docs/explanation/organisms.md").splitlines()
        if "|" in line
    ]
    header = next(cells for cells in lines if cells[0] == "organism")
    rows = lines[lines.index(header) + 2 :]
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in rows if len(cells) == len(header)}


@pytest.mark.broad
def test_the_table_is_what_the_demo_gives(planted_demo: DemoResult) -> None:
    """Within .05: another processor may break a near tie the other way."""
    row, report = demo_table()["planted"], planted_demo.report
    assert float(row["toward doc"]) == pytest.approx(report.steered["+"].rate, abs=0.05)
    assert float(row["toward memory"]) == pytest.approx(report.steered["-"].rate, abs=0.05)
    assert float(row["doc rate"]) == pytest.approx(report.unsteered.rate, abs=0.05)
    assert row["verdict"] == "exceeds controls"
    assert row["experts off"].startswith(f"{planted_demo.size} of ")


def test_the_readme_gives_the_verdicts_of_that_table() -> None:
    table = demo_table()
    said = {
        name.strip(): verdict
        for names, verdict in re.findall(
            r"^\| ([\w, -]+) \| [^|]+ \| (exceeds controls|not beyond controls) \| [^|]+ \|$",
            page("README.md"),
            re.MULTILINE,
        )
        for name in names.split(",")
    }
    assert said == {name: row["verdict"] for name, row in table.items()}
    assert set(said) == set(organisms.names())


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_names_in_prose_exist(name: str) -> None:
    text = page(name)
    for path in set(re.findall(r"`(moe_lens(?:\.\w+)+)", text)) - {"moe_lens.room"}:
        module, _, last = path.rpartition(".")
        try:
            import_module(path)
        except ModuleNotFoundError:
            kind = f'"{path}"' in "".join(p.read_text() for p in (ROOT / "moe_lens").rglob("*.py"))
            assert kind or hasattr(import_module(module), last), f"{name}: {path}"
    for path in set(re.findall(r"`((?:moe_lens|tests|benchmarks|docs|tutorials)/[\w/-]+\.(?:py|md))`", text)):
        assert (ROOT / path).is_file(), f"{name}: {path}"


def markdown(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(
        r"```.*?```|`[^`\n]*`", lambda match: re.sub(r"[\[\]()#]", "", match[0]), text, flags=re.DOTALL
    )


def anchors(path: Path) -> set[str]:
    """What headings are called, as GitHub and Python-Markdown both call them."""
    headings = re.findall(r"^#+ (.+)$", markdown(path), re.MULTILINE)
    words = [
        re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower() for heading in headings
    ]
    return {re.sub(r"\s+", "-", word) for word in words}


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", markdown(path)):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_the_page_on_methods_names_functions_that_exist() -> None:
    rows = [line.split("|") for line in page("docs/methods.md").splitlines() if line.startswith("|")]
    named = {match for row in rows for cell in row for match in re.findall(r"`(\w+)\(", cell)}
    methods = {"from_scores", "SteeringPlan"}
    assert {"npmi", "search_plan", "route_probe"} <= named
    assert [name for name in named - methods if not hasattr(moe_lens, name)] == []
