"""The command `moe-lens`."""

from pathlib import Path

import pytest

from moe_lens import cli, demo
from moe_lens.demo import DemoResult
from moe_lens.model_table import markdown_table


@pytest.fixture
def quick_demo(planted_demo: DemoResult, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The demo answers at once; the list notes what it was asked."""
    asked: list[tuple[str, int]] = []

    def run_demo(name: str, *, seed: int) -> DemoResult:
        asked.append((name, seed))
        return planted_demo

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return asked


def test_demo_prints_the_table_and_writes_table_and_figures(
    quick_demo: list[tuple[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "folder"
    assert cli.main(["demo", "--model", "planted", "--out", str(out), "--seed", "3"]) == 0
    assert quick_demo == [("planted", 3)]
    assert sorted(path.name for path in out.iterdir()) == ["experts-planted.png", "rates.png", "table.md"]
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("experts-planted.png", "rates.png"))
    assert (out / "table.md").read_text(encoding="utf-8") in capsys.readouterr().out


def test_models_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out == markdown_table()


def test_models_writes_the_table_between_the_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- supported models -->\nold\n<!-- /supported models -->\nafter\n")
    assert cli.main(["models", "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- supported models -->\n| architecture |")
    assert text.endswith("|\n<!-- /supported models -->\nafter\n")
    assert "\nold\n" not in text


@pytest.mark.parametrize(("content", "words"), [(None, "cannot be read"), ("no marks", "each once")])
def test_models_says_what_is_wrong_with_a_readme(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "README.md").write_text(content)
    assert cli.main(["models", "--readme", str(tmp_path / "README.md")]) == 1
    assert words in capsys.readouterr().err


def test_demo_runs_the_whole_ladder_unless_told_otherwise(
    quick_demo: list[tuple[str, int]], tmp_path: Path
) -> None:
    from moe_lens import organisms

    cli.main(["demo", "--out", str(tmp_path)])
    assert [name for name, _ in quick_demo] == list(organisms.names())
    assert len(quick_demo) == 5


def test_an_unknown_organism_is_refused_before_any_work(
    quick_demo: list[tuple[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--model", "planted", "--model", "typo", "--out", str(tmp_path / "out")]) == 1
    assert "typo" in capsys.readouterr().err
    assert quick_demo == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help_explains(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_no_command_is_an_error_that_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "usage: moe-lens" in capsys.readouterr().err


def test_bad_options_are_refused_before_any_work(
    quick_demo: list[tuple[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--seed", "-1"])
    assert quick_demo == []
