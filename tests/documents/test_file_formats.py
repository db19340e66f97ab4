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
from safetensors import safe_open

from moe_lens import (
    ContrastivePairs,
    ExpertScores,
    HookedMoE,
    Prompt,
    RouteRecord,
    RoutingStats,
    SteeringPlan,
    SteeringReport,
    answer_task,
    collect_routing,
    detect,
    evaluate_steering,
    load_task,
    organisms,
    sweep,
)
from moe_lens.detection import expert_scores
from moe_lens.evaluation import SweepResult, plan_sizes, report, tasks
from moe_lens.files import FileKind
from moe_lens.statistics import routes, sums
from moe_lens.steering import plan as plans
from moe_lens.text import pairs as pair_files
from tests.notebooks import ROOT

PAGE = (ROOT / "docs" / "reference" / "file-formats.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CONFLICTS = organisms.world("specialised").conflicts("test")[:12]
OPEN, CLOSED = [c.open_book for c in CONFLICTS], [c.closed_book for c in CONFLICTS]
TYPES: dict[str, Any] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None),
    "object": dict,
}  # fmt: skip
NUMBERED = {"layer": 4, "expert": 8, "gap": 3, "k": 2}
"""Sizes of the specialised organism; other dimensions must only agree with each other."""

Row = tuple[str, ...]


def rows(section: str, first: str) -> list[Row]:
    """The rows of all tables of a section whose first column has this name."""
    found: list[Row] = []
    for table in re.findall(r"(?:^\|.*\n)+", SECTIONS[section] + "\n", re.MULTILINE):
        header, _, *lines = (
            tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in table.splitlines()
        )
        if header[0] == first:
            found += lines
    return [(row[0].strip("`"), *row[1:]) for row in found]


@cache
def model() -> HookedMoE:
    return organisms.load("specialised")


def saved(thing: Any, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    thing.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert list(metadata) == ["moe_lens"]
        return json.loads(metadata["moe_lens"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_head(content: dict[str, Any], section: str) -> None:
    """Kind, schema and digest come first, and are what the section says."""
    assert list(content)[:3] == ["kind", "schema", "digest"]
    assert f"Kind `{content['kind']}`, schema {content['schema']}" in SECTIONS[section]


def check_type(value: Any, said: str) -> None:
    """A value against words such as "list of strings or null"."""
    for words in re.split(r", | or ", said):
        if words.startswith("list of "):
            inner = words.removeprefix("list of ").rstrip("s")
            if isinstance(value, list) and all(
                isinstance(each, {**TYPES, "list": list}[inner]) for each in value
            ):
                return
        elif isinstance(value, TYPES[words]) and (words == "boolean" or not isinstance(value, bool)):
            return
    raise AssertionError(f"{value!r} is no {said}")


def check_fields(
    content: dict[str, Any], section: str, first: str = "field", missing: tuple[str, ...] = ()
) -> None:
    """The content's fields are those of the section's table, with values of the types that it says."""
    said = {row[0]: row[1] for row in rows(section, first)}
    assert set(content) - {"kind", "schema", "digest"} == {name for name in said if "." not in name} - {
        *missing
    }
    for name, words in said.items():
        value: Any = content
        for part in name.split("."):
            value = None if value is None else value.get(part, ...)
        if value is ...:
            assert name in missing
        elif "." not in name or content[name.split(".")[0]] is not None:
            check_type(value, words.replace(", list of messages", "").replace(" or list of messages", ""))


def check_tensors(tensors: dict[str, torch.Tensor], section: str, missing: tuple[str, ...] = ()) -> None:
    """The tensors are those of the section's tables, with the dtypes and shapes that they say."""
    said = {row[0]: row[1:3] for row in rows(section, "tensor") if not row[0].endswith("*")}
    assert set(tensors) == set(said) - {*missing}
    sizes = dict(NUMBERED)
    for name, tensor in tensors.items():
        dtypes, shape = said[name]
        assert str(tensor.dtype).removeprefix("torch.") in re.split(r", | or ", dtypes), name
        assert tensor.ndim == len(shape.split()), name
        for dimension, size in zip(shape.split(), tensor.shape, strict=True):
            place = name.partition(".")[0] + dimension if dimension not in NUMBERED else dimension
            assert sizes.setdefault(place, size) == size, f"{name}: {dimension}"


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        (sums._KIND, "Routing statistics"),
        (expert_scores._KIND, "Expert scores"),
        (routes._KIND, "Routes"),
        (plans._KIND, "Steering plan"),
        (tasks._KIND, "Steering task"),
        (pair_files._KIND, "Pairs"),
        (report._KIND, "Steering report"),
        (plan_sizes._KIND, "Sweep"),
    ],
)
def test_a_section_names_the_kind_and_every_schema_that_is_read(kind: FileKind, section: str) -> None:
    text = " ".join(SECTIONS[section].split())
    assert f"`{kind.name}`, schema {kind.schema}" in text
    if len(kind.reads) > 1:
        words = (
            f"{kind.reads[0]} to {kind.reads[-1]}"
            if len(kind.reads) > 2
            else " and ".join(map(str, kind.reads))
        )
        assert f"; {words} are read." in text


def test_every_kind_of_file_in_the_package_has_a_section() -> None:
    kinds = {
        name
        for path in (ROOT / "moe_lens").rglob("*.py")
        for name in re.findall(r"FileKind\(\s*\"(moe_lens\.\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert kinds == set(re.findall(r"[Kk]ind\s+`(moe_lens\.\w+)`", PAGE)) > {"moe_lens.RoutingStats"}


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
    for one in (plan, reverse):
        one.save(tmp_path / "plan.json")
        content = json.loads((tmp_path / "plan.json").read_text())
        check_head(content, "Steering plan")
        check_fields(content, "Steering plan")
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
    check_fields(content["plans"]["-"], "Steering plan")
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
