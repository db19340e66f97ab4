"""`benchmarks/real/replicate.py`, end to end on small random checkpoints of the layouts that it is for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoConfig

from moe_lens import ContrastivePairs, RoutedModel, SteeringPlan, SteeringReport, detect, evaluate_steering
from moe_lens.detection import ExpertScores
from tests.families import broad
from tests.tiny_models import prompt, save, tiny_model, tokenizer

pytest.importorskip("lm_eval")
pytestmark = broad

FOLDER = Path(__file__).parents[2] / "benchmarks" / "real"
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {"num_experts": 16, "num_hidden_layers": 3}),
    "qwen3": ("qwen3_moe", {"decoder_sparse_step": 1, "num_experts": 12}),
    "gpt-oss": ("gpt_oss", {}),
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import replicate  # pyright: ignore[reportMissingImports]

    return replicate


def checkpoint(folder: Path, layout: str) -> Path:
    recipe, config = LAYOUTS[layout]
    tokens = tokenizer()
    if layout == "olmoe":
        tokens.chat_template = CHAT
    return save(tiny_model(recipe, **config), folder, tokens)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def users_data(folder: Path, model: RoutedModel) -> Path:
    folder.mkdir()

    def reading(number: int) -> dict[str, Any]:
        return {"context": prompt(9 + number % 4, number), "question": prompt(4, 100 + number)}

    write_rows(folder / "detection.jsonl", [{**reading(n), "title": f"t{n // 2}"} for n in range(24)])
    choices = ["w1", "w2 w3", "w4"]
    for start, name in ((200, "faitheval_counterfactual"), (300, "mctest")):
        write_rows(
            folder / f"{name}.jsonl",
            [{**reading(start + n), "choices": choices, "answer": n % 3} for n in range(6)],
        )
    write_rows(folder / "mquake.jsonl", [{**reading(400 + n), "answer": "w5"} for n in range(4)])
    pairs = ContrastivePairs.from_lists(
        [prompt(15, 600 + n) for n in range(8)], [prompt(6, 700 + n) for n in range(8)]
    )
    published_table(detect(model, pairs, progress=False)).to_csv(folder / "ranking.csv", index=False)
    return folder


def published_table(scores: ExpertScores) -> pd.DataFrame:
    """Counts of these scores, in the columns of the authors' files, by falling size."""
    rows = []
    for place, layer in enumerate(scores.shape.layers):
        for expert in range(scores.shape.n_experts):
            row = {"layer": layer, "expert": expert}
            for number, stats in ((1, scores.stats_1), (2, scores.stats_2)):
                row[f"a{number}"] = int(stats.counts[place, expert])
                row[f"d{number}"] = stats.n_tokens - row[f"a{number}"]
            rows.append(row)
    table = pd.DataFrame(rows)
    table["risk_diff"] = table.a1 / (table.a1 + table.d1) - table.a2 / (table.a2 + table.d2)
    return table.sort_values("risk_diff", key=abs, ascending=False, kind="stable")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_data_to_verdicts(
    layout: str, scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "model", layout)
    model = RoutedModel.from_pretrained(source)
    data, out = users_data(tmp_path / "data", model), tmp_path / "out"
    # The others are about loading and layout. Plans that share experts with their opposites take 19 sets.
    limit, activate, n_random = (None, 1, 19) if layout == "olmoe" else (3, 0, 4)
    arguments = [layout, "--model", str(source), "--data", str(data), "--out", str(out), "--device", "cpu",
                 "--activate", str(activate), "--deactivate", "3", "--n-random", str(n_random),
                 "--batch-size", "4"]  # fmt: skip
    arguments += ["--limit", str(limit)] if limit else []

    assert scripts.main([*arguments, "--estimate"]) == 0
    assert "GB" in capsys.readouterr().out
    assert not out.exists()

    assert scripts.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (out / "results.md").read_text(encoding="utf-8") in printed
    check_agreement(out, data)
    check_report(model, scripts, out, data, layout, limit, activate, n_random)
    check_goes_on_where_it_ended(scripts, arguments, out, capsys)


def check_agreement(out: Path, data: Path) -> None:
    """Ranks by pandas, and shared experts by sorting names."""
    agreed = json.loads((out / "agreement.json").read_text())
    table = pd.read_csv(data / "ranking.csv").sort_values(["layer", "expert"])
    own = ExpertScores.load(out / "scores.safetensors").delta.flatten().double().numpy()
    published = table.risk_diff.to_numpy()
    expected = pd.Series(own).corr(pd.Series(published), method="spearman")
    assert float(agreed["Spearman's rho"].split(" [")[0]) == pytest.approx(expected, abs=0.002)
    low, high = map(float, agreed["Spearman's rho"].split("[")[1].rstrip("]").split(", "))
    assert -1 <= low < high <= 1
    top = [set(pd.Series(-np.abs(each)).sort_values(kind="stable").index[:3]) for each in (own, published)]
    assert agreed["shared among the 3 of largest size"] == len(top[0] & top[1])
    assert agreed["independent clusters"] == 12


def check_report(
    model: RoutedModel,
    scripts: Any,
    out: Path,
    data: Path,
    layout: str,
    limit: int | None,
    activate: int,
    n_random: int,
) -> None:
    """The report of many small files is that of one call of `evaluate_steering`."""
    found = SteeringReport.load(out / "report-own-faitheval_counterfactual.json")
    study = scripts.Study(
        scripts.CHECKPOINTS[layout],
        str(out.parent / "model"),
        data,
        out,
        "cpu",
        activate,
        3,
        n_random,
        limit,
        4,
        0,
    )
    scores = ExpertScores.load(out / "scores.safetensors")
    plan = SteeringPlan.load(out / "plan-own.json")
    assert (len(plan.activate), len(plan.deactivate)) == (activate, 3)
    again = evaluate_steering(
        model,
        plan,
        study.task("faitheval_counterfactual"),
        reverse=SteeringPlan.load(out / "plan-own-opposite.json"),
        scores=scores,
        n_random=n_random,
        progress=False,
    )
    assert found.gap_interval == again.gap_interval
    assert (found.p_matched, found.p_any) == (again.p_matched, again.p_any)
    assert found.steered["-"].collateral == again.steered["-"].collateral
    assert {"mctest"} == set(found.limits)


def check_goes_on_where_it_ended(
    scripts: Any, arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [sorted((out / "outcomes").glob("mquake-*"))[2], *out.glob("report-*-mquake.json")]
    assert len(lost) == 3  # of the own ranking and of the published one
    contents = [file.read_bytes() for file in lost]
    written = {file: file.stat().st_mtime_ns for file in (out / "outcomes").iterdir()}
    for file in lost:
        file.unlink()
    assert scripts.main(arguments) == 0
    assert [file.read_bytes() for file in lost] == contents
    untouched = {file: time for file, time in written.items() if file not in lost}
    assert {file: file.stat().st_mtime_ns for file in untouched} == untouched

    assert scripts.main([*arguments, "--seed", "1"]) == 1
    assert "other seed" in capsys.readouterr().err


def test_sizes_are_those_of_the_model(scripts: Any, tmp_path: Path) -> None:
    from expected import Size  # pyright: ignore[reportMissingImports]

    source = checkpoint(tmp_path, "olmoe")
    model = tiny_model("olmoe", num_experts=16, num_hidden_layers=3)
    size = Size.of(AutoConfig.from_pretrained(source))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    assert size.parameters == parameters
    assert size.active == parameters - 3 * (16 - model.config.num_experts_per_tok) * 3 * hidden * inner


def test_without_data_says_what_goes_where(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "model", "olmoe")
    empty = tmp_path / "data"
    empty.mkdir()
    arguments = ["olmoe", "--model", str(source), "--data", str(empty), "--out", str(tmp_path / "out")]
    assert scripts.main(arguments) == 1
    assert "detection.jsonl" in capsys.readouterr().err
