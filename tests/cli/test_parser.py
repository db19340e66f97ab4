"""The command `moe-lens`: its help, its exit status and what it says of bad input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lens
from moe_lens import organisms
from moe_lens.cli import commands
from moe_lens.cli import parser as cli
from moe_lens.detection.expert_scores import risk_difference
from moe_lens.evaluation.evaluating import evaluate_steering, sweep
from moe_lens.evaluation.plan_sizes import SweepPoint, SweepResult
from moe_lens.evaluation.tasks import CLOSED_BOOK, LOSS, CollateralMeasure, SteeringTask
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.organisms import demo
from moe_lens.organisms.demo import DemoResult
from moe_lens.routers.models import markdown_table
from moe_lens.statistics.collection import collect_routing
from moe_lens.steering.plan import SteeringPlan
from tests.families import broad
from tests.notebooks import ROOT


@pytest.fixture(scope="module")
def small_demo() -> DemoResult:
    """A demo of a behaviour that is made up, on prompts that are few."""
    model, conflicts = organisms.load("planted"), organisms.world("planted").conflicts("detection")[::12]
    scores = risk_difference(
        collect_routing(model, [c.open_book for c in conflicts], progress=False),
        collect_routing(model, [c.closed_book for c in conflicts], progress=False),
    )
    collateral = {name: CollateralMeasure(lambda *_: 1.0, 0.1) for name in (LOSS, CLOSED_BOOK)}
    task = SteeringTask("made up", lambda *_: [1.0, 0.0, 1.0], ("a", "b", "c"), collateral)
    plan = SteeringPlan.from_scores(scores, n_deactivate=2)
    settings = {"n_random": 2, "progress": False}
    return DemoResult(
        "planted",
        scores,
        sweep(model, scores, task, sizes=(2,), **settings),
        evaluate_steering(model, plan, task, scores=scores, alpha=0.2, **settings),
    )


@pytest.fixture
def quick_demo(small_demo: DemoResult, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, type, int]]:
    """The demo answers at once; the list notes what it was asked."""
    asked: list[tuple[str, type, int]] = []

    def run_demo(name: str, *, wrapper: type, seed: int) -> DemoResult:
        asked.append((name, wrapper, seed))
        return small_demo

    monkeypatch.setattr(demo, "run_demo", run_demo)
    return asked


def test_demo_prints_the_table_and_writes_table_and_figures(
    quick_demo: list[tuple[str, type, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "folder"
    assert cli.main(["demo", "--model", "planted", "--out", str(out), "--seed", "3"]) == 0
    assert quick_demo == [("planted", HookedMoE, 3)]
    assert sorted(path.name for path in out.iterdir()) == ["experts-planted.png", "rates.png", "table.md"]
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("experts-planted.png", "rates.png"))
    assert (out / "table.md").read_text(encoding="utf-8") in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"moe-lens {moe_lens.__version__}\n"


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
    quick_demo: list[tuple[str, type, int]], tmp_path: Path
) -> None:
    cli.main(["demo", "--out", str(tmp_path)])
    assert [name for name, *_ in quick_demo] == list(organisms.names())


def test_an_unknown_organism_is_refused_before_any_work(
    quick_demo: list[tuple[str, type, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    quick_demo: list[tuple[str, type, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--seed", "-1"])
    assert quick_demo == []


_HELP = {
    "demo": ("--out", "figures", "--seed", "--wrapper"),
    "models": ("--readme", "Markdown"),
    "stats": (
        ".txt",
        ".jsonl",
        ".csv",
        "safetensors",
        "--span",
        "interrupted",
        "--wrapper",
        "BOS",
        "--device-map",
    ),
    "detect": (".jsonl", ".csv", "first", "second", "cluster", "template", "safetensors", "--table"),
    "plan": ("SCORES", "--steermoe", "JSON", "--reverse", "--q"),
    "steer": ("PLAN", "--prompts", "JSON lines", "unsteered"),
    "evaluate": ("PLAN", "TASK", "load_task", "--reverse", "--scores", "--measure", "report"),
    "sweep": ("SCORES", "TASK", "--sizes", "--measure"),
    "plot": ("FILE", ".png", "heatmap", "volcano", "layers", "coactivation", "balance", "sweep", "tokens"),
}


@pytest.mark.parametrize("command", _HELP)
def test_every_command_explains_itself_and_its_files(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: moe-lens {command}")
    assert [words for words in _HELP[command] if words not in text] == []


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in _HELP)
    assert all(kind in _HELP["plot"] for kind in commands.PLOTS)


HEAVY = ("transformers", "transformer_lens", "datasets")
_WITHOUT_A_MODEL = {
    "--help": ("--help",),
    **{f"{command} --help": (command, "--help") for command in _HELP},
    "plan": ("plan", "scores", "--deactivate", "2", "--out", "p.json"),
    "plot heatmap": ("plot", "heatmap", "scores", "--plan", "plan.json", "--out", "f.png"),
    "plot layers": ("plot", "layers", "plan.json", "--out", "f.png"),
    "plot coactivation": ("plot", "coactivation", "stats", "--out", "f.png"),
    "plot balance": ("plot", "balance", "stats", "--out", "f.png"),
    "plot sweep": ("plot", "sweep", "sweep.json", "--out", "f.png"),
}


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(words, id=name, marks=[] if name in ("--help", "plan", "plot heatmap") else [broad])
        for name, words in _WITHOUT_A_MODEL.items()
    ],
)
def test_what_runs_no_model_loads_no_model_library(
    arguments: tuple[str, ...], files: Path, tmp_path: Path
) -> None:
    for name in ("scores", "stats", "plan.json", "sweep.json"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from moe_lens.cli.parser import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        f"print('status', status, 'heavy', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert run.stdout.splitlines()[-1] == "status 0 heavy []", run.stdout + run.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad files."""
    folder = tmp_path_factory.mktemp("files")
    model = organisms.load("null")
    conflicts = organisms.world("null").conflicts("detection")[::4]
    first, second = (
        collect_routing(model, prompts, progress=False)
        for prompts in ([c.open_book for c in conflicts], [c.closed_book for c in conflicts])
    )
    first.save(folder / "stats")
    scores = risk_difference(first, second)
    scores.save(folder / "scores")
    SteeringPlan.from_scores(scores, n_deactivate=2).save(folder / "plan.json")
    SteeringPlan.from_scores(-scores, n_deactivate=2).save(folder / "reverse.json")
    SteeringPlan(deactivate=[(0, 1)]).save(folder / "hand.json")
    SteeringPlan(deactivate=[(77, 1)]).save(folder / "other-layer.json")
    SteeringPlan(deactivate=[(0, 300)]).save(folder / "other-expert.json")
    SteeringPlan().save(folder / "empty-plan.json")
    points = tuple(SweepPoint(2, side, 0.5, 0.4, 0.6, {}, [0.5]) for side in "+-")
    SweepResult("task", "null", "deactivate", 0.5, {}, {}, points).save(folder / "sweep.json")
    rows = [{"prompt": c.open_book, "answer": c.document_answer, "cluster": c.entity} for c in conflicts[:3]]
    task: dict[str, Any] = {"kind": "moe_lens.SteeringTask", "prompts": rows}
    long = [{**row, "answer": "Bergen Kyoto"} for row in rows]
    tasks = {
        "task": task,
        "unknown-field": {**task, "promts": []},
        "no-answer": {**task, "prompts": [*rows, {"prompt": "Question :"}]},
        "number-answer": {**task, "prompts": [{**rows[0], "answer": 3}]},
        "no-prompts": {**task, "prompts": []},
        "half": {**task, "prompts": [{**rows[0], "alternative": "Kyoto"}, rows[1]]},
        "texts": {**task, "neutral_texts": "text"},
        "one-cluster": {**task, "prompts": [rows[0]]},
        "unknown-word": {**task, "prompts": [{**row, "answer": "zebra-crossing"} for row in rows]},
        "long-answer": {**task, "prompts": long},
        "bad-prompt": {**task, "prompts": [rows[0], {**rows[1], "prompt": 7}]},
        "list": [task],
    }
    for name, content in tasks.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    texts: dict[str, str | bytes] = {
        "p.txt": "Question : what\nDocument :\n",
        "none.txt": "\n  \n",
        "latin.txt": b"caf\xe9",
        "p.md": "Question :",
        "broken.jsonl": '"Question :"\n{"prompt": \n',
        "number.jsonl": '"Question :"\n7\n',
        "field.jsonl": '{"prompt": "a"}\n{"other": "b"}\n',
        "null.jsonl": '{"prompt": null}\n',
        "token.jsonl": "[1, 99999]\n",
        "half.jsonl": "[1.5]\n",
        "chat.jsonl": '[{"role": "user", "content": "Question :"}]\n',
        "message.jsonl": '"Question :"\n[{"role": "user"}]\n',
        "columns.csv": "x,y\na,b\n",
        "gap.csv": 'prompt\nQuestion :\n""\n',
        "cells.csv": "prompt\nQuestion , what , is\n",
        "open.csv": 'prompt\n"Question :\n',
        "nothing.csv": "",
        "pairs.jsonl": '{"first": "Document", "second": "Question"}\n{"first": "the", "second": "what"}\n',
        "one-sided.jsonl": '{"first": "Document :", "second": "Question :"}\n{"first": "the"}\n',
        "same.jsonl": '{"first": "the", "second": "the"}\n',
        "label.jsonl": '{"first": "the", "second": "what", "cluster": [1]}\n',
        "pairs.csv": "first,second\nthe,\n",
        "no-pairs.jsonl": "",
        "noise": b"\x00\x01noise",
        "no.json": "{",
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "folder").mkdir()
    return folder


_OUT = ("--out", "result")
_QUICK = ("--resamples", "20", "--permutations", "20", *_OUT)
_EVALUATE = ("--n-random", "4", "--reverse", "reverse.json")
_BAD = [
    # stats
    (("stats", "null", "missing.txt", *_OUT), "missing.txt"),
    (("stats", "null", "folder", *_OUT), "folder"),
    (("stats", "null", "none.txt", *_OUT), "none.txt holds no prompts"),
    (("stats", "null", "latin.txt", *_OUT), "latin.txt"),
    (("stats", "null", "p.md", *_OUT), "p.md: prompts are read from .txt, .jsonl and .csv"),
    (("stats", "null", "broken.jsonl", *_OUT), "broken.jsonl, line 2"),
    (("stats", "null", "number.jsonl", *_OUT), "number.jsonl, line 2"),
    (("stats", "null", "field.jsonl", *_OUT), "field.jsonl, line 2"),
    (("stats", "null", "null.jsonl", *_OUT), "null.jsonl, line 1"),
    (("stats", "null", "token.jsonl", *_OUT), "Prompt 0"),
    (("stats", "null", "half.jsonl", *_OUT), "Prompt 0"),
    (("stats", "null", "chat.jsonl", *_OUT), "chat template"),
    (("stats", "null", "message.jsonl", *_OUT), "Prompt 1"),
    (("stats", "null", "columns.csv", *_OUT), "columns.csv, line 2"),
    (("stats", "null", "columns.csv", "--column", "z", *_OUT), "no z"),
    (("stats", "null", "gap.csv", *_OUT), "gap.csv, line 3"),
    (("stats", "null", "cells.csv", *_OUT), "cells.csv"),
    (("stats", "null", "open.csv", *_OUT), "open.csv"),
    (("stats", "null", "nothing.csv", *_OUT), "nothing.csv"),
    (("stats", "null", "p.txt", "--column", "x", *_OUT), "column"),
    (("stats", "null", "p.txt", "--span", "zebra", *_OUT), "zebra"),
    (("stats", "null", "p.txt", "--span", "answer", *_OUT), "answer"),
    (("stats", "null", "p.txt", "--batch-size", "0", *_OUT), "batch_size"),
    (("stats", "null", "p.txt", "--out", "folder"), "folder"),
    (("stats", "null", "p.txt", "--out", "noise/result"), "noise"),
    (("stats", "null", "p.txt", "--device", "toaster", *_OUT), "toaster"),
    (("stats", "no-such-model", "p.txt", *_OUT), "The model no-such-model cannot be loaded"),
    (("stats", "nul", "p.txt", *_OUT), "(Shipped are specialised, planted, "),
    (("stats", "folder", "p.txt", *_OUT), "folder"),
    # detect
    (("detect", "null", "missing.jsonl", *_QUICK), "missing.jsonl"),
    (("detect", "null", "missing.csv", *_QUICK), "missing.csv"),
    (("detect", "null", "no-pairs.jsonl", *_QUICK), "no-pairs.jsonl"),
    (("detect", "null", "one-sided.jsonl", *_QUICK), "one-sided.jsonl, line 2"),
    (("detect", "null", "broken.jsonl", *_QUICK), "broken.jsonl"),
    (("detect", "null", "same.jsonl", *_QUICK), "same prompt"),
    (("detect", "null", "label.jsonl", "--cluster", "cluster", *_QUICK), "label.jsonl, line 1"),
    (("detect", "null", "pairs.csv", *_QUICK), "pairs.csv"),
    (("detect", "null", "pairs.jsonl", "--first", "before", *_QUICK), "before"),
    (("detect", "null", "pairs.jsonl", "--cluster", "topic", *_QUICK), "topic"),
    (("detect", "null", "pairs.jsonl", "--level", "2", *_QUICK), "level"),
    (("detect", "null", "pairs.jsonl", "--resamples", "0", *_OUT), "n_resamples"),
    (("detect", "null", "pairs.jsonl", "--permutations", "0", *_OUT), "n_permutations"),
    (("detect", "null", "pairs.jsonl", "--span", "zebra", *_QUICK), "zebra"),
    (("detect", "null", "pairs.jsonl", "--top", "0", *_QUICK), "--top"),
    # plan
    (("plan", "missing", "--deactivate", "1", *_OUT), "missing"),
    (("plan", "noise", "--deactivate", "1", *_OUT), "noise"),
    (("plan", "stats", "--deactivate", "1", *_OUT), "stats"),
    (("plan", "scores", *_OUT), "--deactivate"),
    (("plan", "scores", "--deactivate", "0", *_OUT), "--deactivate"),
    (("plan", "scores", "--deactivate", "999", *_OUT), "999"),
    (("plan", "scores", "--q", "0.05", *_OUT), "q-values"),
    (("plan", "scores", "--deactivate", "1", "--epsilon", "-1", *_OUT), "epsilon"),
    (("plan", "missing", "--steermoe", "--deactivate", "1", *_OUT), "missing"),
    (("plan", "noise", "--steermoe", "--deactivate", "1", *_OUT), "noise"),
    (("plan", "noise", "--steermoe", "--q", "0.1", *_OUT), "--q"),
    # steer
    (("steer", "null", "plan.json"), "--prompt"),
    (("steer", "null", "plan.json", "--prompt", "the", "--prompts", "p.txt"), "--prompt"),
    (("steer", "null", "missing", "--prompt", "the"), "missing"),
    (("steer", "null", "no.json", "--prompt", "the"), "no.json"),
    (("steer", "null", "task.json", "--prompt", "the"), "task.json"),
    (("steer", "null", "other-layer.json", "--prompt", "the"), "77"),
    (("steer", "null", "other-expert.json", "--prompt", "the"), "300"),
    (("steer", "null", "plan.json", "--prompt", ""), "empty"),
    (("steer", "null", "plan.json", "--prompts", "broken.jsonl"), "broken.jsonl, line 2"),
    (("steer", "null", "plan.json", "--prompt", "the", "--max-new-tokens", "0"), "new"),
    # evaluate, sweep
    (("evaluate", "null", "plan.json", "missing", *_EVALUATE), "missing"),
    (("evaluate", "null", "plan.json", "no.json", *_EVALUATE), "no.json"),
    (("evaluate", "null", "plan.json", "plan.json", *_EVALUATE), "plan.json is no file of a steering task"),
    (("evaluate", "null", "plan.json", "list.json", *_EVALUATE), "list.json is no file of a steering task"),
    (("evaluate", "null", "plan.json", "unknown-field.json", *_EVALUATE), "'promts'"),
    (("evaluate", "null", "plan.json", "no-answer.json", *_EVALUATE), "prompts[3]"),
    (("evaluate", "null", "plan.json", "number-answer.json", *_EVALUATE), "prompts[0]"),
    (("evaluate", "null", "plan.json", "no-prompts.json", *_EVALUATE), "prompts is empty"),
    (("evaluate", "null", "plan.json", "half.json", *_EVALUATE), "alternative"),
    (("evaluate", "null", "plan.json", "texts.json", *_EVALUATE), "neutral_texts"),
    (("evaluate", "null", "plan.json", "one-cluster.json", *_EVALUATE), "cluster"),
    (("evaluate", "null", "plan.json", "unknown-word.json", *_EVALUATE), "zebra-crossing"),
    (("evaluate", "null", "plan.json", "long-answer.json", *_EVALUATE), "Bergen Kyoto"),
    (("evaluate", "null", "plan.json", "bad-prompt.json", *_EVALUATE), "rompt"),
    (("evaluate", "null", "empty-plan.json", "task.json", *_EVALUATE), "names experts"),
    (("evaluate", "null", "other-layer.json", "task.json", *_EVALUATE), "77"),
    (("evaluate", "null", "plan.json", "task.json", "--n-random", "1"), "n_random"),
    (("evaluate", "null", "plan.json", "task.json", *_EVALUATE, "--alpha", "2"), "alpha"),
    (("evaluate", "null", "plan.json", "task.json", "--scores", "stats"), "stats"),
    (("sweep", "null", "plan.json", "task.json"), "plan.json"),
    (("sweep", "null", "scores", "missing"), "missing"),
    (("sweep", "null", "scores", "task.json", "--sizes", "0"), "sizes"),
    (("sweep", "null", "scores", "task.json", "--sizes", "900"), "900"),
    # plot
    *((("plot", kind, "--out", "f.png"), "FILE") for kind in commands.PLOTS if kind != "tokens"),
    *((("plot", kind, "noise", "--out", "f.png"), "noise") for kind in commands.PLOTS if kind != "tokens"),
    *((("plot", kind, "gone", "--out", "f.png"), "gone") for kind in commands.PLOTS if kind != "tokens"),
    (("plot", "tokens", "--out", "f.png"), "--prompt"),
    (("plot", "tokens", "--model", "null", "--prompt", "", "--out", "f.png"), "empty"),
    (("plot", "volcano", "scores", "--out", "f.png"), "q-values"),
    (("plot", "layers", "hand.json", "--out", "f.png"), "shape"),
    (("plot", "coactivation", "stats", "--layer", "99", "--out", "f.png"), "99"),
    (("plot", "heatmap", "scores", "--plan", "other-layer.json", "--out", "f.png"), "77"),
    (("plot", "heatmap", "scores", "--plan", "other-expert.json", "--out", "f.png"), "300"),
    (("plot", "heatmap", "scores", "--out", "f.xyz"), "xyz"),
    (("plot", "heatmap", "scores", "--out", "noise/f.png"), "noise"),
]


@pytest.mark.parametrize(("arguments", "words"), _BAD, ids=[" ".join(words) for words, _ in _BAD])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_bad_input_gets_one_line_that_names_it(
    arguments: tuple[str, ...],
    words: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.rglob("*"))
    assert cli.main(arguments) == 1
    streams = capsys.readouterr()
    lines = streams.err.rstrip("\n").splitlines()
    assert lines[-1].startswith("moe-lens: ")
    assert words in lines[-1]
    assert sum(line.startswith("moe-lens: ") for line in lines) == 1
    assert "Traceback" not in streams.err
    assert sorted(path.name for path in files.rglob("*")) == before  # nothing half-written stays


@pytest.mark.parametrize(
    "arguments",
    [
        ("stats", "null", "p.txt"),
        ("stats", "null", "p.txt", "--out", "r", "--batch-size", "many"),
        ("stats", "null", "p.txt", "--out", "r", "--dtype", "int8"),
        ("detect", "null", "pairs.jsonl", "--out", "r", "--score", "best"),
        ("detect", "null", "pairs.jsonl", "--out", "r", "--level", "high"),
        ("plan", "scores", "--deactivate", "-2", "--out", "r"),
        ("plan", "scores", "--deactivate", "1.5", "--out", "r"),
        ("plan", "scores", "--on-excess", "shrug", "--out", "r"),
        ("sweep", "null", "scores", "task.json", "--sizes", "2,,4"),
        ("plot", "pie", "scores", "--out", "r"),
        ("bake", "null"),
    ],
)
def test_unknown_words_and_numbers_are_refused_with_the_usage(
    arguments: tuple[str, ...],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: moe-lens" in capsys.readouterr().err


def test_an_interrupted_command_says_so(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> torch.nn.Module:
        raise KeyboardInterrupt

    monkeypatch.setattr(organisms, "load", load)
    assert cli.main(["stats", "null", str(files / "p.txt"), "--out", "r"]) == 130
    assert capsys.readouterr().err == "moe-lens: interrupted\n"
