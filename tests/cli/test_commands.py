"""The commands of `moe-lens`, files in and files out, against the same work done with the library."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import OlmoeForCausalLM

from moe_lens import explore, organisms
from moe_lens.cli import commands
from moe_lens.cli import parser as cli
from moe_lens.detection.detecting import detect
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.evaluation.evaluating import evaluate_steering, sweep
from moe_lens.evaluation.plan_sizes import SweepResult
from moe_lens.evaluation.report import SteeringReport
from moe_lens.evaluation.tasks import load_task
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from moe_lens.steering.published import read_published_ranking
from moe_lens.text.batching import padded_batches
from moe_lens.text.pairs import ContrastivePairs
from tests import tiny_models

NAME = "specialised"
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
QUICK = ("--resamples", "200", "--permutations", "200")
FEW = ("--n-random", 1, "--alpha", 0.3)
CONFLICTS = organisms.world(NAME).conflicts("detection")
HELD_OUT = organisms.world(NAME).conflicts("test")[::32]


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def json_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def content(found: Any) -> dict[str, Any]:
    """The numbers of RoutingStats, as bytes."""
    return {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in found.tensors().items()}


def pair_rows() -> list[dict[str, str]]:
    return [
        {"first": c.open_book, "second": c.closed_book, "cluster": c.entity, "template": f"t{i % 2}"}
        for i, c in enumerate(CONFLICTS)
    ]


def library_scores(**options: Any) -> ExpertScores:
    rows = pair_rows()
    pairs = ContrastivePairs.from_lists(
        *([row[side] for row in rows] for side in ("first", "second")),
        clusters=[row["cluster"] for row in rows], templates=[row["template"] for row in rows],
    )  # fmt: skip
    given = {"n_resamples": 200, "n_permutations": 200, "progress": False, **options}
    return detect(organisms.load(NAME), pairs, **given)


def assert_same_scores(found: ExpertScores, expected: ExpertScores) -> None:
    assert torch.equal(found.delta, expected.delta)
    assert found.evidence is not None
    assert expected.evidence is not None
    assert found.evidence.settings() == expected.evidence.settings()
    for name, tensor in expected.evidence.tensors().items():
        assert torch.equal(getattr(found.evidence, name), tensor), name


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where every file of the workflow lies, each written by its command."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "prompts.txt").write_text("\n\n".join(c.open_book for c in CONFLICTS[:13]), encoding="utf-8")
    json_lines(folder / "pairs.jsonl", pair_rows())
    task = {
        "kind": "moe_lens.SteeringTask",
        "name": "follows the document",
        "prompts": [
            {"prompt": c.open_book, "answer": c.document_answer, "cluster": c.entity} for c in HELD_OUT
        ],
        "neutral_texts": list(organisms.world(NAME).generic("test", n=4)),
        "closed_book": [
            {"question": f.question, "answer": f.answer} for f in organisms.world(NAME).facts("test")[:4]
        ],
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    scores, plan = folder / "scores", folder / "plan.json"
    assert run("stats", NAME, folder / "prompts.txt", "--out", folder / "stats") == 0
    labels = ("--cluster", "cluster", "--template", "template")
    assert run("detect", NAME, folder / "pairs.jsonl", *labels, *QUICK, "--out", scores) == 0
    assert run("plan", scores, "--deactivate", 4, "--out", plan) == 0
    assert run("plan", scores, "--deactivate", 4, "--reverse", "--out", folder / "reverse.json") == 0
    sizes = ("--sizes", "2,4", "--n-random", 1, "--out", folder / "sweep.json")
    assert run("sweep", NAME, scores, folder / "task.json", *sizes) == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a tiny model with a chat template."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = CHAT
    return tiny_models.save(tiny_models.tiny_model("qwen2_moe"), tmp_path_factory.mktemp("tiny"), tokenizer)


def test_stats_of_a_text_file(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", NAME, work / "prompts.txt", "--out", tmp_path / "s") == 0
    prompts = [c.open_book for c in CONFLICTS[:13]]  # the empty lines between are none
    expected = collect_routing(organisms.load(NAME), prompts, span="all", progress=False)
    found = RoutingStats.load(tmp_path / "s")
    assert content(found) == content(expected)
    printed = capsys.readouterr().out
    assert f"{expected.n_tokens} tokens" in printed
    assert "gini" in printed
    assert f"wrote {tmp_path / 's'}" in printed
    assert (found.per_prompt, found.by_position, found.vocabulary) == (None, None, None)


@pytest.mark.broad
@pytest.mark.parametrize("command", ["detect", "evaluate", "sweep"])
def test_work_shared_through_a_folder_gives_the_same_file(
    work: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = {
        "detect": (NAME, work / "pairs.jsonl", *QUICK),
        "evaluate": (NAME, work / "plan.json", work / "task.json", "--reverse", work / "reverse.json", *FEW),
        "sweep": (NAME, work / "scores", work / "task.json", "--sizes", "2", "--n-random", 1),
    }[command]
    folder, alone, shared = tmp_path / "runs", tmp_path / "alone", tmp_path / "shared"
    assert run(command, *arguments, "--out", alone) == 0
    said = capsys.readouterr().out
    assert run(command, *arguments, "--folder", folder, "--unit", 1, "--out", shared) == 0
    assert capsys.readouterr().out == said.replace(str(alone), str(shared))
    assert shared.read_bytes() == alone.read_bytes()
    files = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!j]*")}  # the job's list aside
    assert len(files) >= 3
    monkeypatch.setenv("RANK", "1")  # the second process of a launcher, which came late
    assert run(command, *arguments, "--folder", folder, "--unit", 1, "--out", tmp_path / "late") == 0
    assert (tmp_path / "late").read_bytes() == alone.read_bytes()
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("[!j]*")} == files
    assert capsys.readouterr().out == ""
    assert run(command, *arguments, "--unit", 1, "--out", alone) == 1
    assert "--unit is about the files in --folder" in capsys.readouterr().err


def test_stats_of_chats_text_and_tokens_on_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4"}]
    rows = [chat, {"messages": chat[:1]}, "w5 w6", {"prompt": "w7 w8 w9"}, [5, 6, 7], {"prompt": [8, 9]}]
    file = json_lines(tmp_path / "p.jsonl", rows)
    options = ("--batch-size", 2, "--per-prompt", "--positions", "--vocabulary")
    assert run("stats", tiny, file, *options, "--out", tmp_path / "s") == 0
    prompts = [chat, chat[:1], "w5 w6", "w7 w8 w9", [5, 6, 7], [8, 9]]
    expected = collect_routing(
        HookedMoE.from_pretrained(str(tiny)), prompts, batch_size=2, span="all", per_prompt=True,
        positions=True, vocabulary=True, progress=False,
    )  # fmt: skip
    found = RoutingStats.load(tmp_path / "s")
    assert content(found) == content(expected)
    assert found.per_prompt is not None
    assert found.by_position is not None
    assert found.vocabulary is not None
    assert found.shape.layers == (0, 2, 3)


@pytest.mark.parametrize(
    ("span", "special"), [("last", False), ("question", False), ("w2", False), ("all", True)]
)
def test_stats_of_a_span(span: str, special: bool, tiny: Path, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"w1 w2 w{i}"}, {"role": "assistant", "content": "w9"}] for i in range(5)
    ]
    file = json_lines(tmp_path / "p.jsonl", chats)
    flags = ("--special-tokens",) if special else ()
    assert run("stats", tiny, file, "--span", span, *flags, "--out", tmp_path / "s") == 0
    model = HookedMoE.from_pretrained(str(tiny))
    expected = collect_routing(model, chats, span=span, special_tokens=special, progress=False)
    assert content(RoutingStats.load(tmp_path / "s")) == content(expected)
    every = collect_routing(model, chats, progress=False)
    assert (expected.n_tokens < every.n_tokens) or span == "all"


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_stats_of_a_named_column(ending: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"prompt": ["the", "the"], "asked": ["Question : what is", "Document , the"]})
    file = tmp_path / f"p.{ending}"
    frame.to_csv(file, index=False) if ending == "csv" else frame.to_json(file, orient="records", lines=True)
    for column in ("prompt", "asked"):
        options = () if column == "prompt" else ("--column", column)
        assert run("stats", NAME, file, *options, "--out", tmp_path / "s") == 0
        expected = collect_routing(organisms.load(NAME), list(frame[column]), span="all", progress=False)
        assert content(RoutingStats.load(tmp_path / "s")) == content(expected)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_stats_of_files_from_elsewhere(ending: str, tmp_path: Path) -> None:
    """A byte order mark (Excel writes one), Windows line ends, and the line separator inside a prompt."""
    prompts = ["Question :\u2028what is", "Document , the"]
    lines = [json.dumps(prompt, ensure_ascii=False) if ending != "txt" else prompt for prompt in prompts]
    text = "\r\n".join(["prompt", *lines] if ending == "csv" else lines) + "\r\n"
    (tmp_path / f"p.{ending}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run("stats", NAME, tmp_path / f"p.{ending}", "--out", tmp_path / "s") == 0
    expected = collect_routing(organisms.load(NAME), prompts, span="all", progress=False)
    assert content(RoutingStats.load(tmp_path / "s")) == content(expected)


def test_stats_in_another_precision(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("w1 w2 w3\nw4 w5\n")
    assert run("stats", tiny, tmp_path / "p.txt", "--dtype", "bfloat16", "--out", tmp_path / "s") == 0
    model = HookedMoE.from_pretrained(str(tiny), dtype=torch.bfloat16)
    expected = collect_routing(model, ["w1 w2 w3", "w4 w5"], span="all", progress=False)
    assert content(RoutingStats.load(tmp_path / "s")) == content(expected)


def _stopping(monkeypatch: pytest.MonkeyPatch, stop_at: int | None, stop: Callable[[], None]) -> list[int]:
    """Every forward is noted in the list; that of number `stop_at` stops the command instead."""
    ran: list[int] = []
    forward = OlmoeForCausalLM.forward

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(ran) == stop_at:
            stop()
        ran.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(OlmoeForCausalLM, "forward", noting)
    return ran


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_stats_continues_where_it_was_interrupted(
    how: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "stats",
        NAME,
        work / "prompts.txt",
        "--batch-size",
        2,
        "--per-prompt",
        "--out",
        tmp_path / "s",
    )

    def stop() -> None:
        if how == "Ctrl-C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        _stopping(patch, 4, stop)
        assert run(*command) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    with pytest.MonkeyPatch.context() as patch:
        ran = _stopping(patch, None, stop)
        assert run(*command) == 0
    assert len(ran) == 7 - 4
    prompts = [c.open_book for c in CONFLICTS[:13]]
    model = organisms.load(NAME)
    expected = collect_routing(model, prompts, batch_size=2, per_prompt=True, span="all", progress=False)
    assert content(RoutingStats.load(tmp_path / "s")) == content(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("change", ["prompts", "model", "column", "span", "batch size", "dtype", "bos"])
def test_stats_never_continues_another_run(change: str, tmp_path: Path) -> None:
    rows = [{"prompt": c.open_book, "text": c.closed_book} for c in CONFLICTS[:6]]
    file = json_lines(tmp_path / "p.jsonl", rows)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        _stopping(patch, 2, stop)
        assert run("stats", NAME, file, "--batch-size", 2, "--out", tmp_path / "s") == 130
    options = {"column": ("--column", "text"), "span": ("--span", "last"), "dtype": ("--dtype", "bfloat16")}
    options["bos"] = ("--prepend-bos", "no")
    if change == "prompts":
        json_lines(file, [*rows[:5], {"prompt": "Question :"}])
    model, size = ("null" if change == "model" else NAME), (3 if change == "batch size" else 2)
    with pytest.MonkeyPatch.context() as patch:
        ran = _stopping(patch, None, stop)
        given = options.get(change, ())
        assert run("stats", model, file, "--batch-size", size, *given, "--out", tmp_path / "s") == 0
    assert len(ran) == -(-6 // size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "s"]


def test_stats_never_continues_a_run_of_other_weights(tmp_path: Path) -> None:
    """A checkpoint that was trained on, saved into the same folder."""
    (tmp_path / "p.txt").write_text("w1 w2 w3\nw4 w5\nw6\n")
    command = ("stats", tmp_path / "m", tmp_path / "p.txt", "--batch-size", 1, "--out", tmp_path / "s")

    def stop() -> None:
        raise KeyboardInterrupt

    tiny_models.save(tiny_models.tiny_model(seed=0), tmp_path / "m", tiny_models.tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        _stopping(patch, 2, stop)
        assert run(*command) == 130
    tiny_models.save(tiny_models.tiny_model(seed=1), tmp_path / "m", tiny_models.tokenizer())
    assert run(*command) == 0
    model = HookedMoE.from_pretrained(str(tmp_path / "m"))
    expected = collect_routing(model, ["w1 w2 w3", "w4 w5", "w6"], batch_size=1, span="all", progress=False)
    assert content(RoutingStats.load(tmp_path / "s")) == content(expected)


def test_detect_with_clusters_and_templates(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "d", "--table", tmp_path / "d.csv")
    labels = ("--cluster", "cluster", "--template", "template")
    assert run("detect", NAME, work / "pairs.jsonl", *labels, *QUICK, "--top", 3, *out) == 0
    expected = library_scores()
    found = ExpertScores.load(tmp_path / "d")
    assert_same_scores(found, expected)
    assert len(set(expected.evidence.clusters)) == 12  # type: ignore[union-attr]
    table = pd.read_csv(tmp_path / "d.csv")
    pd.testing.assert_frame_equal(table, expected.to_dataframe(), check_dtype=False)
    printed = capsys.readouterr().out
    for words in ("t0", "t1", "templates", "top 3", str(tmp_path / "d.csv")):
        assert words in printed
    top = expected.ranked()[:3]
    lines = [line.split()[:2] for line in printed.splitlines()]
    assert all([str(one.layer), str(one.expert)] in lines for one in top)


def test_detect_takes_the_fields_that_its_help_names(work: Path, tmp_path: Path) -> None:
    """Pairs of one cluster that were taken as independent would look surer than they are."""
    assert run("detect", NAME, work / "pairs.jsonl", *QUICK, "--out", tmp_path / "d") == 0
    assert_same_scores(ExpertScores.load(tmp_path / "d"), library_scores())


def test_detect_from_csv_with_columns_of_other_names(tmp_path: Path) -> None:
    names = {"first": "safe", "second": "unsafe", "cluster": "topic", "template": "style"}
    pd.DataFrame(pair_rows()).rename(columns=names).to_csv(tmp_path / "p.csv", index=False)
    columns = [word for name, column in names.items() for word in (f"--{name}", column)]
    options = ("--score", "paired_t", "--level", 0.8, "--seed", 3, "--span", "last", "--out", tmp_path / "d")
    assert run("detect", NAME, tmp_path / "p.csv", *columns, *QUICK, *options) == 0
    expected = library_scores(score="paired_t", level=0.8, seed=3, span="last")
    found = ExpertScores.load(tmp_path / "d")
    assert found.score == "paired_t"
    assert_same_scores(found, expected)


def test_detect_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"first": row["first"], "second": row["second"]} for row in pair_rows()[:6]]
    file = json_lines(tmp_path / "p.jsonl", rows)
    assert run("detect", NAME, file, *QUICK, "--out", tmp_path / "d") == 0
    evidence = ExpertScores.load(tmp_path / "d").evidence
    assert evidence is not None
    assert len(set(evidence.clusters)) == 6
    assert "templates" not in capsys.readouterr().out


def test_detect_finds_nothing_where_nothing_is(tmp_path: Path) -> None:
    file = json_lines(
        tmp_path / "p.jsonl", [{"first": f"w{i} w1", "second": f"w{i} w1 w1"} for i in range(8)]
    )
    tiny_models.save(tiny_models.tiny_model(), tmp_path / "m", tiny_models.tokenizer())
    options = ("--span", "w1", "--resamples", 50, "--permutations", 50, "--out", tmp_path / "d")
    assert run("detect", tmp_path / "m", file, *options) == 0
    assert ExpertScores.load(tmp_path / "d").shape.layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--deactivate", 3), {"n_deactivate": 3}),
        (("--activate", 2), {"n_activate": 2}),
        (("--activate", 1, "--deactivate", 2, "--epsilon", 0.5), {"n_activate": 1, "n_deactivate": 2}),
        (("--deactivate", 2, "--q", 0.05), {"n_deactivate": 2, "q": 0.05}),
        (("--q", 0.01, "--on-excess", "drop"), {"q": 0.01, "on_excess": "drop"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("reverse", [False, True])
def test_plan(
    reverse: bool, options: tuple[Any, ...], numbers: dict[str, Any], work: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = ("--reverse",) if reverse else ()
    assert run("plan", work / "scores", *options, *flags, "--out", tmp_path / "p.json") == 0
    scores = ExpertScores.load(work / "scores")
    epsilon = 0.5 if 0.5 in options else 0.01
    expected = SteeringPlan.from_scores(-scores if reverse else scores, **numbers, epsilon=epsilon)
    assert SteeringPlan.load(tmp_path / "p.json") == expected
    words = f"{len(expected.activate)} experts activated, {len(expected.deactivate)} deactivated"
    assert words in capsys.readouterr().out


def ranking_frame(n_layers: int = 2, n_experts: int = 10, k: int = 2, n_tokens: int = 30) -> pd.DataFrame:
    """A result table of the SteerMoE authors' columns."""
    rng, rows = np.random.default_rng(0), []
    for layer in range(n_layers):
        sides = [
            (rng.random((n_tokens, n_experts)).argsort(axis=1) < k).sum(axis=0)  # k experts a token
            for _ in range(2)
        ]
        rows += [(layer, e, int(sides[0][e]), int(sides[1][e])) for e in range(n_experts)]
    frame = pd.DataFrame(rows, columns=["layer", "expert", "a1", "a2"])
    frame["d1"], frame["d2"] = n_tokens - frame["a1"], n_tokens - frame["a2"]
    frame["risk_diff"] = frame["a1"] / n_tokens - frame["a2"] / n_tokens
    frame["risk_diff_abs"] = frame["risk_diff"].abs()
    return frame.sort_values("risk_diff_abs", ascending=False, kind="stable").reset_index(drop=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_plan_from_a_published_ranking(reverse: bool, tmp_path: Path) -> None:
    frame = ranking_frame()
    frame.to_pickle(tmp_path / "r.pkl")
    tiny_models.save(tiny_models.tiny_model("olmoe_norm_gqa"), tmp_path / "m", tiny_models.tokenizer())
    flags = ("--reverse",) if reverse else ()
    options = ("--steermoe", "--deactivate", 3, "--activate", 1, *flags)
    for model in ((), ("--model", tmp_path / "m")):
        assert run("plan", tmp_path / "r.pkl", *options, *model, "--out", tmp_path / "p.json") == 0
        plan = SteeringPlan.load(tmp_path / "p.json")
        sign = -1 if reverse else 1
        for experts, side in ((plan.activate, sign), (plan.deactivate, -sign)):
            own = frame[frame["risk_diff"] * side > 0]
            assert list(experts) == list(zip(own["layer"], own["expert"], strict=True))[: len(experts)]
        assert (len(plan.activate), len(plan.deactivate)) == (1, 3)
    assert plan.shape == HookedMoE.from_pretrained(str(tmp_path / "m")).moe_shape
    assert read_published_ranking(tmp_path / "r.pkl").plan(n_deactivate=3).shape != plan.shape


def _generated(model: Any, prompt: Any, plan: SteeringPlan | None, n: int) -> str:
    assert model.tokenizer is not None
    tokens = next(iter(padded_batches(model, [prompt], 1)))[0]
    start = tokens.shape[1]
    for _ in range(n):  # greedy, one full forward a token
        with model.hooks(fwd_hooks=[] if plan is None else steer_hooks(plan)), torch.no_grad():
            best = model(tokens)[0, -1].argmax()
        tokens = torch.cat([tokens, best[None, None]], dim=1)
        if best == model.tokenizer.eos_token_id:
            break
    return model.tokenizer.decode(tokens[0, start:], skip_special_tokens=True)


def test_steer_writes_both_texts(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, model = [c.open_book for c in HELD_OUT[:4]], organisms.load(NAME)
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    file = work / "reverse.json"
    common = ("steer", NAME, file, "--max-new-tokens", 1)
    assert run(*common, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    plan = SteeringPlan.load(file)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    for row, prompt in zip(rows, prompts, strict=True):
        assert prompt in row["prompt"]
        assert row["unsteered"] == _generated(model, prompt, None, 1)
        assert row["steered"] == _generated(model, prompt, plan, 1)
    assert any(row["steered"] != row["unsteered"] for row in rows)
    assert capsys.readouterr().out.startswith("wrote")
    assert run(*common, "--prompt", prompts[0], "--prompt", prompts[1]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == rows[:2]


def test_steer_generates_several_tokens_from_a_column(work: Path, tmp_path: Path) -> None:
    prompt, model = HELD_OUT[0].open_book, organisms.load(NAME)
    pd.DataFrame({"asked": [prompt]}).to_csv(tmp_path / "p.csv", index=False)
    options = ("--prompts", tmp_path / "p.csv", "--column", "asked", "--max-new-tokens", 4)
    assert run("steer", NAME, work / "plan.json", *options, "--out", tmp_path / "o") == 0
    row = json.loads((tmp_path / "o").read_text(encoding="utf-8"))
    plan = SteeringPlan.load(work / "plan.json")
    assert row["unsteered"] == _generated(model, prompt, None, 4)
    assert row["steered"] == _generated(model, prompt, plan, 4)


def test_evaluate_prints_and_writes_the_report(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--reverse", work / "reverse.json", "--n-random", 1, "--seed", 2, "--alpha", 0.3)
    files = (work / "plan.json", work / "task.json")
    assert run("evaluate", NAME, *files, *options, "--out", tmp_path / "r.json") == 0
    expected = evaluate_steering(
        organisms.load(NAME), SteeringPlan.load(files[0]), load_task(files[1]), n_random=1, seed=2, alpha=0.3,
        reverse=SteeringPlan.load(work / "reverse.json"), progress=False,
    )  # fmt: skip
    assert SteeringReport.load(tmp_path / "r.json").to_json() == expected.to_json()
    printed = capsys.readouterr().out
    assert expected.explanation in printed
    assert "follows the document" in printed


@pytest.mark.broad
@pytest.mark.filterwarnings("ignore:In 6 of 6 prompts:UserWarning")
@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_a_measure_may_be_given_instead_of_the_tasks(command: str, work: Path, tmp_path: Path) -> None:
    """On tasks whose alternatives make another behaviour of it."""
    task = json.loads((work / "task.json").read_text(encoding="utf-8"))
    for row, conflict in zip(task["prompts"], HELD_OUT, strict=True):
        # likely but for its last token: by the sum the alternative is preferred, by the mean often not
        row["answer"] = f"{conflict.memory_answer} . Question"
        row["alternative"] = conflict.document_answer
    (tmp_path / "task.json").write_text(json.dumps(task), encoding="utf-8")
    found = {}
    for measure in (None, "sum", "mean", "first_difference"):
        out = tmp_path / f"{measure}.json"
        given = () if measure is None else ("--measure", measure)
        if command == "evaluate":
            options = (work / "plan.json", tmp_path / "task.json", "--reverse", work / "reverse.json")
            assert run(command, NAME, *options, "--n-random", 1, "--alpha", 0.3, *given, "--out", out) == 0
            found[measure] = SteeringReport.load(out).unsteered.values.tolist()
        else:
            options = (work / "scores", tmp_path / "task.json", "--sizes", 2, "--n-random", 0)
            assert run(command, NAME, *options, *given, "--out", out) == 0
            found[measure] = SweepResult.load(out).unsteered
    assert found[None] == found["sum"] != found["mean"]
    wrong = (work / "scores", tmp_path / "task.json", "--measure", "product")
    assert run("sweep", NAME, *wrong) == 1


def test_evaluate_with_scores_needs_no_reverse_plan(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (work / "plan.json", work / "task.json")
    options = ("--scores", work / "scores", "--n-random", 1, "--alpha", 0.3)
    assert run("evaluate", NAME, *files, *options, "--out", tmp_path / "r") == 0
    report = SteeringReport.load(tmp_path / "r")
    assert report.bottom is not None
    assert report.plans["-"].deactivate == SteeringPlan.load(work / "reverse.json").deactivate
    assert "least-scoring experts" in capsys.readouterr().out


def test_sweep_writes_what_the_library_finds(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (work / "scores", work / "task.json")
    options = ("--sizes", "4, 2", "--n-random", 1, "--seed", 5)
    assert run("sweep", NAME, *files, *options, "--out", tmp_path / "s.json") == 0
    expected = sweep(
        organisms.load(NAME), ExpertScores.load(files[0]), load_task(files[1]), sizes=(2, 4), n_random=1,
        seed=5, progress=False,
    )  # fmt: skip
    assert SweepResult.load(tmp_path / "s.json") == expected
    assert str(expected) in capsys.readouterr().out


_PLOTS = {
    "heatmap": ("scores", "--plan", "plan.json", "--plan", "reverse.json"),
    "volcano": ("scores",),
    "layers": ("plan.json",),
    "coactivation": ("stats", "--layer", "2"),
    "balance": ("stats",),
    "tokens": ("--model", NAME, "--prompt", "Question : what is", "--plan", "plan.json"),
    "sweep": ("sweep.json",),
}


def test_every_kind_of_plot_is_tested() -> None:
    assert set(_PLOTS) == set(commands.PLOTS)


@pytest.mark.parametrize("kind", commands.PLOTS)
def test_plot_writes_an_image(kind: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    assert run("plot", kind, *_PLOTS[kind], "--out", tmp_path / "f.png") == 0
    image = (tmp_path / "f.png").read_bytes()
    assert image[:4] == b"\x89PNG"
    assert len(image) > 5000


def test_plot_writes_other_formats_into_new_folders(work: Path, tmp_path: Path) -> None:
    assert run("plot", "volcano", work / "scores", "--out", tmp_path / "new" / "f.svg") == 0
    assert b"<svg" in (tmp_path / "new" / "f.svg").read_bytes()


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16 whose tokenizer adds no BOS; TransformerLens' table does."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    model = tiny_models.tiny_model("olmoe", torch.bfloat16)
    return tiny_models.save(model, tmp_path_factory.mktemp("no_bos"), tokenizer)


@pytest.mark.parametrize("place", [(), ("--device", "cpu"), ("--device-map", "cpu")], ids=str)
def test_stats_of_a_routed_model(place: tuple[str, ...], no_bos: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("w1 w2 w3\nw4 w5\n")
    command = ("stats", no_bos, tmp_path / "p.txt", "--special-tokens", *place)
    assert run(*command, "--wrapper", "routed", "--out", tmp_path / "routed") == 0
    assert run(*command, "--out", tmp_path / "bridge") == 0
    assert run(*command, "--prepend-bos", "yes", "--out", tmp_path / "with_bos") == 0
    model = RoutedModel.from_pretrained(no_bos)
    expected = collect_routing(model, ["w1 w2 w3", "w4 w5"], span="all", special_tokens=True, progress=False)
    assert content(RoutingStats.load(tmp_path / "routed")) == content(expected)
    found = [RoutingStats.load(tmp_path / name).n_tokens for name in ("routed", "bridge", "with_bos")]
    assert found == [5, 5, 7]
    assert model.cfg.dtype == torch.bfloat16  # the checkpoint's


def test_stats_never_continues_a_run_of_the_other_wrapper(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(c.closed_book for c in CONFLICTS[:4]) + "\n")

    def stop() -> None:
        raise KeyboardInterrupt

    command = ("stats", NAME, tmp_path / "p.txt", "--batch-size", 1, "--out", tmp_path / "s")
    with pytest.MonkeyPatch.context() as patch:
        _stopping(patch, 2, stop)
        assert run(*command) == 130
    with pytest.MonkeyPatch.context() as patch:
        ran = _stopping(patch, None, stop)
        assert run(*command, "--wrapper", "routed") == 0
    assert len(ran) == 4


def test_every_command_takes_a_routed_model(work: Path, tmp_path: Path) -> None:
    """On an organism, whose tokenizer adds the BOS that TransformerLens does, they find the same."""
    routed = ("--wrapper", "routed")
    model, plan = organisms.load(NAME, wrapper=RoutedModel), SteeringPlan.load(work / "plan.json")
    labels = ("--cluster", "cluster", "--template", "template")
    assert run("detect", NAME, work / "pairs.jsonl", *labels, *QUICK, "--out", tmp_path / "s", *routed) == 0
    assert_same_scores(ExpertScores.load(tmp_path / "s"), ExpertScores.load(work / "scores"))

    prompt = HELD_OUT[0].open_book
    options = ("--prompt", prompt, "--max-new-tokens", 4, "--out", tmp_path / "t")
    assert run("steer", NAME, work / "plan.json", *options, *routed) == 0
    row = json.loads((tmp_path / "t").read_text(encoding="utf-8"))
    assert row["unsteered"] == _generated(model, prompt, None, 4)
    assert row["steered"] == _generated(model, prompt, plan, 4)

    files, few = (work / "plan.json", work / "task.json"), ("--n-random", 1, "--alpha", 0.3)
    reverse = ("--reverse", work / "reverse.json", "--out", tmp_path / "r")
    assert run("evaluate", NAME, *files, *few, *reverse, *routed) == 0
    expected = evaluate_steering(
        model, plan, load_task(files[1]), n_random=1, alpha=0.3,
        reverse=SteeringPlan.load(work / "reverse.json"), progress=False,
    )  # fmt: skip
    assert SteeringReport.load(tmp_path / "r").to_json() == expected.to_json()

    sizes = ("--sizes", "2", "--n-random", 1, "--out", tmp_path / "w")
    assert run("sweep", NAME, work / "scores", work / "task.json", *sizes, *routed) == 0
    assert SweepResult.load(tmp_path / "w").sizes == (2,)
    figure = ("--model", NAME, "--prompt", prompt, "--out", tmp_path / "f.png")
    assert run("plot", "tokens", *figure, *routed) == 0
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_one_place_is_enough(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Question :\n")
    with pytest.raises(SystemExit):
        run("stats", NAME, tmp_path / "p.txt", "--device", "cpu", "--device-map", "auto", "--out", "s")


def test_explore_writes_the_page_of_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = organisms.load(NAME)
    plan, stats = (
        SteeringPlan(deactivate=[(2, 1)]),
        collect_routing(model, CONFLICTS[0].open_book, progress=False),
    )
    plan.save(tmp_path / "plan.json")
    stats.save(tmp_path / "stats.safetensors")
    given = ("--plan", tmp_path / "plan.json", "--stats", tmp_path / "stats.safetensors")
    page = tmp_path / "new" / "page.html"
    assert run("explore", NAME, "--prompt", CONFLICTS[1].open_book, *given, "--out", page) == 0
    expected = explore(model, CONFLICTS[1].open_book, plan=plan, stats=stats)
    assert page.read_text("ascii") == expected.html()
    assert repr(expected) in capsys.readouterr().out
    other = SteeringPlan(deactivate=[(9, 1)])
    other.save(tmp_path / "plan.json")
    assert run("explore", NAME, "--prompt", "Question :", *given[:2], "--out", page) == 1
    assert "layer 9" in capsys.readouterr().err
    assert page.read_text("ascii") == expected.html()


@pytest.mark.parametrize("wrapper", ["bridge", "routed"])
def test_a_checkpoint_in_a_folder_of_an_organisms_name_is_the_model(
    wrapper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one of a name that TransformerLens takes for a model on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("w1 w2\n")
    hf_model = tiny_models.tiny_model("olmoe")
    for name in ("null", "olmoe"):
        tiny_models.save(hf_model, tmp_path / name, tiny_models.tokenizer())
        assert run("stats", name, "p.txt", "--wrapper", wrapper, "--out", f"{name}.stats") == 0
        shape = RoutingStats.load(tmp_path / f"{name}.stats").shape
        assert (shape.model, shape.n_experts) == (name, hf_model.config.num_experts)
        assert len(shape.layers) == hf_model.config.num_hidden_layers
