"""The tutorials run from clean, and show what is committed; what is said of them holds."""

import base64
import copy
import io
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pytest

from tests.families import broad
from tests.notebooks import ROOT, TUTORIALS, differences, executed, main, not_built, same_text, shown

every_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])


@broad
@every_tutorial
def test_runs_from_clean_and_shows_what_is_committed(path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    if reason := not_built(committed):
        pytest.skip(reason)
    assert differences(committed, executed(committed)) == []


@every_tutorial
def test_is_committed_as_it_ran_from_top_to_bottom(path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {kind for cell in code for kind, _ in shown(cell)} <= {"stdout", "text/plain", "image/png"}
    assert any(kind == "image/png" for cell in code for kind, _ in shown(cell))
    assert not re.search(r"/home/|/root/|/tmp/|/Users/|0x[0-9a-f]{8}", "".join(map(_words, code)))
    assert set(committed.metadata) == {"kernelspec", "language_info"}


@every_tutorial
def test_shows_the_line_for_a_real_model(path: Path) -> None:
    text = path.read_text()
    assert 'HookedMoE.from_pretrained(\\"allenai/OLMoE-1B-7B-0125-Instruct\\"' in text
    assert "mistralai/Mixtral-8x7B-Instruct-v0.1" in text


def test_the_index_lists_every_tutorial_in_order() -> None:
    index = (ROOT / "tutorials" / "README.md").read_text()
    listed = re.findall(r"\(([^)]+\.ipynb)\)", index)
    assert list(dict.fromkeys(listed)) == [path.name for path in TUTORIALS]
    assert len(TUTORIALS) == 7


def _words(cell: Any) -> str:
    return cell.source + "".join(text for kind, text in shown(cell) if kind != "image/png")


def _figure(height: float) -> str:
    figure, axes = plt.subplots(figsize=(4, 3))
    axes.bar([1, 2], [1, height])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _notebook() -> Any:
    new = nbformat.v4
    figure = {"image/png": _figure(1.0), "text/plain": "<Figure>"}
    outputs = [
        new.new_output("stream", name="stdout", text="gap 0.82 of 192\n"),
        new.new_output("display_data", data=figure),
    ]
    return new.new_notebook(cells=[new.new_code_cell("run()", id="a", outputs=outputs)])


def _edited(**changes: Any) -> Any:
    notebook = _notebook()
    first, second = notebook.cells[0].outputs
    if "text" in changes:
        first.text = changes["text"]
    if "height" in changes:
        second.data["image/png"] = _figure(changes["height"])
    if "source" in changes:
        notebook.cells[0].source = changes["source"]
    return notebook


def test_a_run_that_shows_the_same_has_no_differences() -> None:
    assert differences(_notebook(), _notebook()) == []
    assert differences(_notebook(), _edited(text="gap  0.83 of 192\n")) == []  # rounding
    apart = _notebook()  # prints that come in two parts
    first = apart.cells[0].outputs[0]
    second = copy.deepcopy(first)
    first.text, second.text = "gap 0.82 ", "of 192\n"
    apart.cells[0].outputs.insert(1, second)
    assert differences(_notebook(), apart) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "gap 0.85 of 192\n"},
        {"text": "gap 0.82 of 193\n"},
        {"text": "gap -0.82 of 192\n"},
        {"text": "gain 0.82 of 192\n"},
        {"text": "gap 0.82 of 192, 0.5\n"},
        {"height": 0.9},
        {"source": "run_otherwise()"},
    ],
    ids=str,
)
def test_a_stale_output_is_found(changes: dict[str, Any]) -> None:
    assert len(differences(_edited(**changes), _notebook())) == 1


def test_missing_and_unexpected_outputs_are_found() -> None:
    for change in (lambda cells: cells[0].outputs.clear(), lambda cells: cells.clear()):
        other = _notebook()
        change(other.cells)
        assert differences(other, _notebook())
        assert differences(_notebook(), other)


def test_a_tutorial_on_a_built_model_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path))
    needing = [path for path in TUTORIALS if not_built(nbformat.read(path, as_version=4))]
    assert [path.stem for path in needing] == ["7-real-words"]
    before = needing[0].read_bytes()
    main([str(needing[0])])  # runs nothing and writes nothing
    assert "`moe-lens organism build smollm2-split`" in capsys.readouterr().out
    assert needing[0].read_bytes() == before
    (tmp_path / "smollm2-split").mkdir()
    (tmp_path / "smollm2-split" / "config.json").write_text("{}")
    assert not_built(nbformat.read(needing[0], as_version=4)) is None


def test_a_failing_cell_fails(tmp_path: Path) -> None:
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)\n1 / 0")])
    with pytest.raises(Exception, match="ZeroDivisionError"):
        executed(failing, tmp_path)


def test_numbers_may_round_and_tables_may_widen() -> None:
    assert same_text("| +0.10 |\n|-------|", "|  -0.00  |\n|---------|") is False
    assert same_text("| 0.00 |\n|------|", "| -0.00 |\n|-------|")
    assert same_text("1.5e-07 and 120.4", "1.52e-07 and 121.0")
    assert not same_text("1.5e-07", "2.5e-07")
