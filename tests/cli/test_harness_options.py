"""`moe-lens evaluate` and `sweep` with --harness, against the same work done with the library."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import config as datasets_config

from moe_lens import RoutedModel, SteeringPlan, SteeringReport, evaluate_steering, harness_task, organisms
from moe_lens.cli import parser as cli
from tests.engines.harness_files import write_tasks

CONFLICTS = organisms.world("specialised").conflicts("test")[:48:8]
FEW = ("--n-random", 1, "--alpha", 0.3, "--wrapper", "routed")


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_tasks(tmp_path, CONFLICTS)
    SteeringPlan(deactivate=[(2, 5)]).save(tmp_path / "plan.json")
    SteeringPlan(deactivate=[(0, 1)]).save(tmp_path / "reverse.json")
    return tmp_path


def test_a_benchmark_gives_the_librarys_report(files: Path) -> None:
    given = ("--harness", "--include-path", files, "--metric", "acc", "--clusters", "entity", "--limit", 4)
    plans = (files / "plan.json", "conflict_long", "--reverse", files / "reverse.json")
    assert run("evaluate", "specialised", *plans, *given, *FEW, "--out", files / "report.json") == 0
    expected = evaluate_steering(
        organisms.load("specialised", wrapper=RoutedModel),
        SteeringPlan.load(files / "plan.json"),
        harness_task("conflict_long", "acc", include_path=files, clusters="entity", limit=4),
        reverse=SteeringPlan.load(files / "reverse.json"),
        n_random=1,
        alpha=0.3,
        progress=False,
    )
    assert SteeringReport.load(files / "report.json").to_json() == expected.to_json()


def test_a_benchmark_shared_through_a_folder(files: Path) -> None:
    given = ("--harness", "--include-path", files, "--metric", "acc", "--limit", 4)
    plans = (files / "plan.json", "conflict_mc", "--reverse", files / "reverse.json")
    for name, options in (("alone", ()), ("shared", ("--folder", files / "runs"))):
        assert run("evaluate", "specialised", *plans, *given, *FEW, *options, "--out", files / name) == 0
    assert (files / "shared").read_bytes() == (files / "alone").read_bytes()
    units = {path.name for path in (files / "runs").iterdir()}
    assert run("evaluate", "specialised", *plans, *given, *FEW, "--folder", files / "runs") == 0
    assert {path.name for path in (files / "runs").iterdir()} == units  # what is there is used
    assert run("evaluate", "specialised", *plans, *given[:-1], 5, *FEW, "--folder", files / "runs") == 0
    assert {path.name for path in (files / "runs").iterdir()} > units  # and for nothing else


def test_a_benchmark_of_moe_lens_with_a_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the", "a")))
    plans = (files / "plan.json", "moe_lens/harmless", "--reverse", files / "reverse.json")
    assert run("evaluate", "null", *plans, "--harness", "--data", files / "rows.jsonl", *FEW) == 1
    assert "leaves no room for the prompt in the model's 128" in capsys.readouterr().err
    options = ("--data", files / "rows.jsonl", "--max-gen-toks", 2)
    assert run("evaluate", "null", *plans, "--harness", *options, *FEW) == 0
    assert "moe_lens/harmless" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conflict_mc", "--metric", "acc"), "--metric is for benchmarks"),
        (("conflict_mc", "--chat"), "--chat is for benchmarks"),
        (("conflict_mc", "--harness", "--measure", "sum"), "--measure is for a TASK in JSON"),
        (("moe_lens/advbench", "--harness"), "ships without data"),
        (("moe_lens/advbench", "--harness", "--data", "missing.jsonl"), "missing.jsonl"),
        (("conflict_mc", "--harness", "--include-path", "missing"), "folder of tasks"),
    ],
)
def test_what_makes_no_sense_ends_with_a_sentence(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    assert run("evaluate", "null", files / "plan.json", *arguments, *FEW) == 1
    assert message in capsys.readouterr().err
