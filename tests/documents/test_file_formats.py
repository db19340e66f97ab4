"""The page on file formats says what files hold: one of each kind is saved and compared with its tables."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import (
    AuditReport,
    ContrastivePairs,
    DenseRoutes,
    ExpertScores,
    HookedMoE,
    Prompt,
    RouterBias,
    RouteRecord,
    RoutingStats,
    SteeringPlan,
    SteeringReport,
    SteeringTask,
    answer_task,
    audit,
    collect_routing,
    detect,
    evaluate_steering,
    load_task,
    organisms,
    record_dense,
    sweep,
)
from moe_lens.engines import (
    BENCHMARKS,
    Answer,
    JudgedAnswers,
    collect_distributed,
    evaluate_distributed,
    merge_distributed,
)
from moe_lens.engines.vllm.request_counts import Recorded, RequestCounts
from moe_lens.evaluation import SweepResult, tasks
from moe_lens.files import FileKind
from moe_lens.steering import LearningStep
from tests.documents.format_page import (
    PAGE,
    SECTIONS,
    SOFT,
    check_fields,
    check_head,
    check_tensors,
    check_type,
    kinds,
    read,
    rows,
    saved,
    schemas,
)

CONFLICTS = organisms.world("specialised").conflicts("test")[:12]
OPEN, CLOSED = [c.open_book for c in CONFLICTS], [c.closed_book for c in CONFLICTS]


@cache
def model() -> HookedMoE:
    return organisms.load("specialised")


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: f"{kind.name}-{kind.schema}")
def test_a_section_names_every_kind_and_all_schemas_that_are_written_and_read(kind: FileKind) -> None:
    [section] = [name for name, text in SECTIONS.items() if re.search(rf"[Kk]ind\s+`{kind.name}`, ", text)]
    written, _, read = schemas(kind.name, section).partition(";")
    assert str(kind.schema) in re.findall(r"\d+", written)
    words = " and ".join(map(str, kind.reads))
    if len(kind.reads) > 2:
        words = f"{kind.reads[0]} to {kind.reads[-1]}"
    assert read == ("" if len(kind.reads) == 1 else f" {words} are read")
    assert f"](#{section.lower().replace(' ', '-')})" in PAGE.partition("\n## ")[0]


def test_the_page_names_no_kind_that_is_gone() -> None:
    named = set(re.findall(r"[Kk]ind\s+`(moe_lens\.\w+)`", PAGE))
    assert named == {kind.name for kind in kinds()} > {"moe_lens.RoutingStats"}


def test_routing_statistics_hold_what_the_page_says(tmp_path: Path) -> None:
    stats = collect_routing(
        model(), OPEN, per_prompt=True, positions=True, vocabulary=True, outputs=True, progress=False
    )
    about, tensors = saved(stats, tmp_path / "stats.safetensors")
    check_head(about, "Routing statistics")
    check_fields(about, "Routing statistics")
    check_tensors(tensors, "Routing statistics")
    shape = {row[0]: row[1] for row in rows("What all share", "field")}
    assert set(about["shape"]) == set(shape)
    for name, words in shape.items():
        check_type(about["shape"][name], words)
    row, rest = divmod(int(tensors["vocabulary.keys"][-1]), 8 * 2**32)
    expert, token = divmod(rest, 2**32)
    loaded = RoutingStats.load(tmp_path / "stats.safetensors").vocabulary
    assert loaded is not None
    assert loaded.of_expert(row, expert, 8)[token] == tensors["vocabulary.counts"][-1] > 0


@pytest.mark.parametrize("paired", [True, False])
def test_scores_hold_what_the_page_says(paired: bool, tmp_path: Path) -> None:
    if paired:
        contrast = ContrastivePairs.from_lists(OPEN, CLOSED, span="all")  # whose tokens differ
    else:
        outcomes = [number % 2 == 0 for number in range(len(OPEN))]
        contrast = ContrastivePairs.from_outcomes(OPEN, outcomes, span="last")
    scores = detect(model(), contrast, n_resamples=20, n_permutations=20, progress=False)
    about, tensors = saved(scores, tmp_path / "scores.safetensors")
    check_head(about, "Expert scores")
    check_fields(about, "Expert scores")
    check_tensors({name: x for name, x in tensors.items() if "." not in name}, "Expert scores")
    for number in (1, 2):
        part = {
            name.removeprefix(f"stats_{number}."): x
            for name, x in tensors.items()
            if name.startswith(f"stats_{number}.")
        }
        check_tensors(part, "Routing statistics", absent(part))
        assert {"counts", "per_prompt.counts"} <= set(part)
        assert set(about[f"stats_{number}"]) == {"n_tokens", "shape"}
    if paired:
        assert set(about["alignment"]["differences"][0]) == {"pair", "place", "first", "second"}
    bare = replace(scores, evidence=None, alignment=None)
    about, tensors = saved(bare, tmp_path / "bare.safetensors")
    check_fields(about, "Expert scores")
    assert {name for name in tensors if "." not in name} == {"delta"}
    assert ExpertScores.load(tmp_path / "bare.safetensors").evidence is None


def absent(tensors: dict[str, Any]) -> tuple[str, ...]:
    """Optional tables of the statistics that were not asked for."""
    tables = ("by_position", "vocabulary", "outputs")
    names = [row[0] for row in rows("Routing statistics", "tensor")]
    return tuple(name for name in names if name.partition(".")[0] in tables and name not in tensors)


def test_routes_hold_what_the_page_says(tmp_path: Path) -> None:
    record = RouteRecord.from_generation(model(), OPEN[:2], max_new_tokens=2, weights=True)
    about, tensors = saved(record, tmp_path / "routes.safetensors")
    check_head(about, "Routes")
    check_fields(about, "Routes")
    check_tensors(tensors, "Routes")


def test_a_plan_and_a_report_and_a_sweep_hold_what_the_page_says(tmp_path: Path) -> None:
    plan = SteeringPlan([(0, 3)], [(2, 1)], shape=model().moe_shape)
    reverse = SteeringPlan(deactivate=[(2, 5), (1, 1)])
    soft = SteeringPlan([(0, 3)], strength=1.5, only_unmet=True)
    for one in (plan, reverse, soft):
        one.save(tmp_path / "plan.json")
        content = json.loads((tmp_path / "plan.json").read_text())
        check_head(content, "Steering plan")
        check_fields(content, "Steering plan", missing=() if one is soft else SOFT)
        assert content["schema"] == (3 if one is soft else 2)
    pairs = ContrastivePairs.from_lists(OPEN, CLOSED, span="last")
    scores = detect(model(), pairs, n_resamples=20, n_permutations=20, progress=False)
    task = answer_task(
        OPEN,
        [c.document_answer for c in CONFLICTS],
        clusters=[c.entity for c in CONFLICTS],
        neutral_texts=["the capital"],
    )
    evaluated = evaluate_steering(
        model(), plan, task, reverse=reverse, scores=scores, n_random=4, progress=False
    )
    evaluated.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    check_head(content, "Steering report")
    check_fields(content, "Steering report")
    check_head(content["plans"]["-"], "Steering plan")
    check_fields(content["plans"]["-"], "Steering plan", missing=SOFT)
    outcomes = [content["unsteered"], content["bottom"], content["steered"]["+"]]
    for outcome in [*outcomes, *content["controls"]["any layer"]["-"]]:
        assert set(outcome) == {"values", "collateral"}
        assert len(outcome["values"]) == len(CONFLICTS)
    [limit] = content["limits"].values()
    assert set(limit) == {"limit", "larger_is_worse"}
    # what follows from the rest is computed anew
    without = {name: value for name, value in content.items() if name != "digest"}
    (tmp_path / "report.json").write_text(json.dumps({**without, "gap": 9.0}))
    assert SteeringReport.load(tmp_path / "report.json").gap == pytest.approx(evaluated.gap)

    swept = sweep(model(), scores, task, sizes=(2,), n_random=2, progress=False)
    swept.save(tmp_path / "sweep.json")
    content = json.loads((tmp_path / "sweep.json").read_text())
    check_head(content, "Sweep")
    check_fields(content, "Sweep")
    for point in content["points"]:
        check_fields(point, "Sweep", "field of a point")
    assert SweepResult.load(tmp_path / "sweep.json").points == swept.points


def test_a_task_of_the_fields_on_the_page_is_read_and_no_others(tmp_path: Path) -> None:
    examples: dict[str, Any] = {
        "name": "says", "measure": "sum", "neutral_texts": ["the capital"],
        "closed_book": [{"question": "Question : what is", "answer": "the"}],
        "prompts": [
            {"prompt": text, "answer": "the", "alternative": "a", "cluster": cluster}
            for text, cluster in zip(OPEN[:2], "ab", strict=True)
        ],
    }  # fmt: skip
    check_fields(examples, "Steering task")
    check_fields(examples["prompts"][0], "Steering task", "field of a prompt")
    (tmp_path / "task.json").write_text(json.dumps({"kind": "moe_lens.SteeringTask", **examples}))
    task = load_task(tmp_path / "task.json")
    assert (task.name, task.clusters, len(task.collateral)) == ("says", ("a", "b"), 2)
    assert set(examples) == set(tasks._FIELDS)


def test_pairs_hold_what_the_page_says(tmp_path: Path) -> None:
    chats = [Prompt([{"role": "user", "content": text}], template={"mark": "x"}) for text in CLOSED[1:]]
    named = [Prompt(CLOSED[0], {"question": "Question"}), *chats]
    pairs = ContrastivePairs.from_lists(named, OPEN, span=slice(0, 2), clusters=[c.entity for c in CONFLICTS])
    pairs.save_jsonl(tmp_path / "pairs.jsonl")
    head, *lines = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert (head["kind"], head["schema"]) == ("moe_lens.ContrastivePairs", 1)
    check_fields(head, "Pairs")
    assert head["span"] == {"slice": [0, 2, None]}
    for line in lines:
        check_fields(line, "Pairs", "field of a pair")
    assert (set(lines[0]["first"]), set(lines[1]["first"])) == ({"content", "spans"}, {"content", "template"})
    [[start, end]] = lines[0]["first"]["spans"]["question"]
    assert lines[0]["first"]["content"][start:end] == "Question"


def test_the_table_of_scores_has_the_columns_that_the_page_says() -> None:
    pairs = ContrastivePairs.from_lists(OPEN, CLOSED, span="last")
    frame = detect(model(), pairs, n_resamples=20, n_permutations=20, progress=False).to_dataframe()
    said = re.findall(r"`(\w+)`", SECTIONS["Tables"].partition("(`ExpertScores")[0])
    assert [*said[:11]] == list(frame.columns)[:11]
    assert np.isfinite(frame[list(said[:7])].to_numpy()).all()


def test_dense_routes_and_a_bias_hold_what_the_page_says(tmp_path: Path) -> None:
    about, tensors = saved(record_dense(model(), OPEN[:2], progress=False), tmp_path / "dense.safetensors")
    check_head(about, "Dense routes")
    check_fields(about, "Dense routes")
    check_tensors(tensors, "Dense routes")
    assert DenseRoutes.load(tmp_path / "dense.safetensors").n_prompts == 2

    bias = RouterBias.of({(0, 3): 1.5}, model().moe_shape)
    for one in (bias, replace(bias, history=(LearningStep(0, 2.0, 3.0),))):
        one.save(tmp_path / "bias.json")
        content = json.loads((tmp_path / "bias.json").read_text())
        check_head(content, "Router bias")
        check_fields(content, "Router bias")
        assert (content["values"][0][3], np.shape(content["values"])) == (1.5, (4, 8))
        assert content["history"] == [list(step) for step in one.history]


def test_an_audit_holds_what_the_page_says(tmp_path: Path) -> None:
    task = answer_task(OPEN, [c.document_answer for c in CONFLICTS], name="reads")
    plan = SteeringPlan(deactivate=[(2, 1)])
    report = audit(model(), task, plan=plan, n_noisy=1, n_random=1, max_size=0, progress=False)
    for one in (report, replace(report, left_out={"searched plan": "no search was asked for"})):
        one.save(tmp_path / "audit.json")
        content = json.loads((tmp_path / "audit.json").read_text())
        check_head(content, "Audit")
        check_fields(content, "Audit")
    said = {row[0]: row[2] for row in rows("Audit", "field of a condition")}["kind"]
    for each in content["conditions"]:
        check_fields(each, "Audit", "field of a condition")
        assert f'"{each["kind"]}"' in said
        assert len(each["held_out"]) == len(content["clusters"])
        if each["plan"] is not None:
            check_head(each["plan"], "Steering plan")
            check_fields(each["plan"], "Steering plan", missing=SOFT)
    # what follows from the rest is computed anew
    without = {name: value for name, value in content.items() if name != "digest"}
    (tmp_path / "audit.json").write_text(json.dumps({**without, "worst": 9.0}))
    assert AuditReport.load(tmp_path / "audit.json").worst_rate == report.worst_rate


def test_units_of_statistics_and_their_list_hold_what_the_page_says(tmp_path: Path) -> None:
    everything: dict[str, Any] = {
        "per_prompt": True, "positions": True, "vocabulary": True, "outputs": True, "progress": False,
    }  # fmt: skip
    stats = collect_distributed(model(), OPEN, tmp_path, unit=2, batch_size=3, **everything)
    [path] = tmp_path.glob("job-*.json")
    job = json.loads(path.read_text())
    check_head(job, "List of units")
    check_fields(job, "List of units")
    assert set(job["about"]["runs"]) == {"device", "autocast", "precision", "versions"}
    assert set(job["about"]) == {
        row[0][6:] for row in rows("List of units", "field") if row[0].startswith("about.")
    }
    total, tensors = read(path.with_suffix(".safetensors"))
    check_head(total, "Routing statistics")
    check_tensors(tensors, "Routing statistics")
    assert torch.equal(tensors["counts"], stats.counts)
    assert len(job["units"]) == 2
    for unit in job["units"]:
        about, tensors = read(tmp_path / unit)
        check_head(about, "Unit of routing statistics")
        check_fields(about, "Unit of routing statistics")
        assert about["unit"] == unit
        batches = {name[8:]: x for name, x in tensors.items() if name.startswith("batches.")}
        assert {len(x) for x in batches.values()} == {2}
        assert {x.dtype for x in batches.values()} == {torch.float64}
        own = {"rows": tensors.pop("rows")}
        check_tensors(own, "Unit of routing statistics")
        whole = {name: x for name, x in tensors.items() if not name.startswith("batches.")}
        assert torch.float64 not in {x.dtype for x in whole.values()}
        check_tensors({**whole, **{name: x[0] for name, x in batches.items()}}, "Routing statistics")
        counted = stats.per_prompt.of(own["rows"]) if stats.per_prompt else None
        assert counted is not None
        assert torch.equal(whole["per_prompt.counts"], counted.counts)
    assert merge_distributed(tmp_path).n_tokens == stats.n_tokens


def test_units_of_measures_hold_what_the_page_says(tmp_path: Path) -> None:
    task = answer_task(OPEN, [c.document_answer for c in CONFLICTS], neutral_texts=["the capital"])
    own = SteeringTask("own", lambda model, hooks: np.arange(12.0), tuple(map(str, range(12))))
    plan, reverse = SteeringPlan(deactivate=[(2, 1)]), SteeringPlan(deactivate=[(2, 5)])
    seen = set()
    for number, one in enumerate((task, own)):
        folder = tmp_path / str(number)
        evaluate_distributed(
            model(),
            plan,
            one,
            folder,
            about="0 to 11",
            reverse=reverse,
            n_random=1,
            alpha=0.5,
            progress=False,
        )
        for path in folder.glob("measure-*.safetensors"):
            about, tensors = read(path)
            check_head(about, "Unit of a measure")
            check_fields(about, "Unit of a measure")
            assert about["unit"] == path.name
            for name, tensor in tensors.items():
                known, other = ("N", "values") if name.isdigit() else ("values", "N")
                check_tensors({known: tensor}, "Unit of a measure", (other,))
                seen.add((known, tensor.dtype))
    assert seen == {("N", torch.float64), ("N", torch.bool), ("values", torch.float64)}
    assert {path.name.partition("-")[0] for path in tmp_path.glob("*/*")} == {"measure"}


def test_statistics_of_vllm_hold_what_the_page_says(tmp_path: Path) -> None:
    """Of sums as its workers keep them."""
    counts, logits = RequestCounts(model().moe_shape), torch.randn(3, 8)
    layer = Recorded(logits, *logits.topk(2)[::-1])
    counts.add([("a", 0), ("a", 1)], torch.arange(3), torch.tensor([0, 0, 1]), dict.fromkeys(range(4), layer))
    about, tensors = saved(counts.stats("a"), tmp_path / "stats.safetensors")
    check_head(about, "Routing statistics")
    check_fields(about, "Routing statistics")
    said = [row[0] for row in rows("Routing statistics", "tensor")]
    left = {name for name in said if name.startswith("per_prompt.")}
    assert set(tensors) == {*said[:4], *left}
    check_tensors(tensors, "Routing statistics", tuple({*said} - {*tensors}))
    few = collect_routing(model(), OPEN[:2], progress=False).summary()
    assert set(saved(few, tmp_path / "few.safetensors")[1]) == set(said[:3])


def test_answers_to_be_judged_hold_what_the_page_says(tmp_path: Path) -> None:
    path, answers = tmp_path / "answers.jsonl", [Answer("Why?", "Because."), Answer("Who?", "")]
    judge = JudgedAnswers(path)
    with judge.collecting():
        judge(answers)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        check_fields(line, "Judged answers", "field of an answer")
        assert line.pop("score") is None
        check_fields({**line, "score": 0.5}, "Judged answers", "field of an answer")
    path.write_text("".join(json.dumps({**line, "score": 0.5}) + "\n" for line in lines))
    assert judge(answers) == [0.5, 0.5]


def test_benchmarks_read_the_columns_that_the_page_says(tmp_path: Path) -> None:
    said = {row[0]: row[1] for row in rows("Benchmark data", "field of a row")}
    assert set(said) == {"aliases"}.union(*(each.columns for each in BENCHMARKS.values()))
    open_book = {"context": "the sea", "question": "what is it ?"}
    texts = [
        {"answer": "sea"},
        {"answer": ["sea"], "aliases": "lake"},
        {"answer": "sea", "aliases": ["lake"]},
    ]
    options: dict[str, Any] = {"choices": ["sea", "lake"]}
    labelled = {"choices": {"text": ["sea", "lake"], "label": ["1", "2"]}}
    choices = [{**options, "answer": answer} for answer in ("lake", "B", 1)] + [{**labelled, "answer": "2"}]
    for name, several in (("cf_triviaqa", texts), ("mctest", choices)):
        data = [{**open_book, **row} for row in several]
        for row in data:
            check_fields(row, "Benchmark data", "field of a row", tuple(set(said) - set(row)))
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        documents = BENCHMARKS[name].documents(tmp_path / "data.jsonl")
        assert all(
            each["gold"] == 1 if name == "mctest" else each["answers"][0] == "sea" for each in documents
        )
    (tmp_path / "data.csv").write_text('context,question,answer\n"the sea",why,sea\n')
    [document] = BENCHMARKS["mquake"].documents(tmp_path / "data.csv")
    assert document["answers"] == ["sea"]
