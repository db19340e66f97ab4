"""Evaluations and sweeps shared through a folder are `evaluate_steering` and `sweep`, to the last bit."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_lens import RoutedModel, SteeringPlan, SteeringTask, answer_task, harness_task, organisms
from moe_lens.engines import evaluate_distributed, harness_collateral, sweep_distributed
from moe_lens.errors import DataError
from moe_lens.evaluation.evaluating import evaluate_steering, sweep
from moe_lens.evaluation.reading import Reading
from moe_lens.evaluation.tasks import CollateralMeasure
from moe_lens.organisms import detect_document_experts

pytestmark = pytest.mark.broad  # whole evaluations; the functions' examples run in the first tier

NAME = "specialised"
WORLD = organisms.world(NAME)
CONFLICTS = WORLD.conflicts("test")[:24]
PLAN, REVERSE = SteeringPlan(deactivate=[(2, 5), (3, 7)]), SteeringPlan(deactivate=[(0, 1), (2, 2)])
QUICK: dict[str, Any] = {"reverse": REVERSE, "n_random": 4, "progress": False}


@pytest.fixture(scope="module")
def model() -> RoutedModel:
    return organisms.load(NAME, wrapper=RoutedModel)


def task(measure: Any, n: int = 24) -> SteeringTask:
    conflicts = CONFLICTS[:n]
    alternatives = [c.memory_answer for c in conflicts] if measure in ("sum", "first_difference") else None
    return answer_task(
        [c.open_book for c in conflicts],
        [c.document_answer for c in conflicts],
        alternatives=alternatives,
        measure=measure,
        neutral_texts=WORLD.generic("test", n=5),
        closed_book=[(fact.question, fact.answer) for fact in WORLD.facts("test")[:6]],
        batch_size=5,
    )


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each unit that was measured, how many batches it has."""
    found: list[int] = []
    original = Reading.found

    def noting(self: Reading, hooks: Any, batches: Sequence[list[int]]) -> Any:
        found.append(len(batches))
        return original(self, hooks, batches)

    monkeypatch.setattr(Reading, "found", noting)
    return found


def same_file(one: Any, other: Any, folder: Path) -> bool:
    one.save(folder / "one")
    other.save(folder / "other")
    return (folder / "one").read_bytes() == (folder / "other").read_bytes()


@pytest.mark.parametrize("measure", [None, "sum", "first_difference", "whole_answer"])
def test_an_evaluation_is_evaluate_steering(
    measure: str | None, model: RoutedModel, tmp_path: Path, parts: list[int]
) -> None:
    expected = evaluate_steering(model, PLAN, task(measure), **QUICK)
    assert expected.limits
    found = evaluate_distributed(model, PLAN, task(measure), tmp_path / "runs", unit=2, **QUICK)
    assert same_file(found, expected, tmp_path)
    assert set(parts) == {1, 2}  # cut between batches
    n_parts = len(parts)
    again = evaluate_distributed(model, PLAN, task(measure), tmp_path / "runs", unit=2, **QUICK)
    assert same_file(again, expected, tmp_path)
    assert len(parts) == n_parts


def test_a_sweep_is_sweep_and_a_larger_one_measures_what_is_new(
    model: RoutedModel, tmp_path: Path, parts: list[int]
) -> None:
    scores = detect_document_experts(model, WORLD)
    numbers = {"n_random": 2, "progress": False}
    for sizes in ((2,), (2, 4)):
        expected = sweep(model, scores, task(None), sizes=sizes, **numbers)
        found = sweep_distributed(model, scores, task(None), tmp_path / "runs", sizes=sizes, **numbers)
        assert same_file(found, expected, tmp_path)
        assert found == expected
        assert len(parts) <= 3 * {1: 7, 2: 13}[len(sizes)]  # measures × plans, each in one unit


def test_workers_share_the_units(tmp_path: Path, parts: list[int]) -> None:
    models = [organisms.load(NAME, wrapper=RoutedModel) for _ in range(2)]
    reports: list[Any] = []

    def work(model: RoutedModel) -> None:
        reports.append(evaluate_distributed(model, PLAN, task(None), tmp_path / "runs", unit=1, **QUICK))

    threads = [threading.Thread(target=work, args=[model]) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_file(reports[0], reports[1], tmp_path)
    assert len(parts) == len([*(tmp_path / "runs").glob("measure-*")])


@pytest.mark.parametrize("change", ["prompts", "answers", "batches", "measure", "weights"])
def test_nothing_stale_is_used(change: str, tmp_path: Path, parts: list[int]) -> None:
    model = organisms.load(NAME, wrapper=RoutedModel)
    evaluate_distributed(model, PLAN, task("sum"), tmp_path / "runs", **QUICK)
    n_parts, changed = len(parts), task("sum")
    prompts, answers = [c.open_book for c in CONFLICTS], [c.document_answer for c in CONFLICTS]
    others = [c.memory_answer for c in CONFLICTS]
    if change == "prompts":
        changed = answer_task(prompts[::-1], answers, alternatives=others, batch_size=5)
    elif change == "answers":
        changed = answer_task(prompts, others, alternatives=answers, batch_size=5)
    elif change == "batches":
        changed = answer_task(prompts, answers, alternatives=others, batch_size=4)
    elif change == "measure":
        changed = task("whole_answer")
    else:
        network: Any = model.hf_model
        network.model.layers[0].mlp.gate.weight.data[0] += 0.5
    found = evaluate_distributed(model, PLAN, changed, tmp_path / "runs", **QUICK)
    assert same_file(found, evaluate_steering(model, PLAN, changed, **QUICK), tmp_path)
    assert len(parts) > n_parts


def test_functions_of_the_users_need_about_and_are_one_unit_a_plan(
    model: RoutedModel, tmp_path: Path
) -> None:
    calls: list[int] = []

    def measure(model: Any, hooks: Any) -> list[float]:
        calls.append(len(hooks))
        return [float(len(hooks)), 0.0, 1.0]

    own = SteeringTask(
        "mine", measure, ("a", "b", "c"), {"loss": CollateralMeasure(lambda m, hooks: 0.5, 0.1)}
    )
    with pytest.raises(DataError, match="measures the behaviour by a function of its own"):
        evaluate_distributed(model, PLAN, own, tmp_path / "runs", **QUICK)
    assert not calls
    expected = evaluate_steering(model, PLAN, own, **QUICK)
    n_calls = len(calls)
    found = evaluate_distributed(model, PLAN, own, tmp_path / "runs", about="three numbers", **QUICK)
    assert same_file(found, expected, tmp_path)
    assert len(calls) <= 2 * n_calls  # equal random sets are measured once
    n_calls = len(calls)
    evaluate_distributed(model, PLAN, own, tmp_path / "runs", about="three numbers", **QUICK)
    assert len(calls) == n_calls
    evaluate_distributed(model, PLAN, own, tmp_path / "runs", about="other numbers", **QUICK)
    assert len(calls) > n_calls


def rows(n: int, **changed: str) -> list[dict[str, Any]]:
    return [
        {
            "context": c.open_book.removesuffix(c.closed_book),
            "question": c.closed_book,
            "choices": [c.memory_answer, c.document_answer],
            "answer": c.document_answer,
            **(changed if number == 0 else {}),
        }
        for number, c in enumerate(CONFLICTS[:n])
    ]


def benchmark(given: list[dict[str, Any]], **options: Any) -> SteeringTask:
    beside = {
        "refusals": harness_collateral("moe_lens/harmless", None, 0.1, data=[{"prompt": "the"}], **WRITING)
    }
    name = "moe_lens/faitheval_counterfactual"
    return harness_task(name, data=given, collateral=beside, **options)


WRITING: dict[str, Any] = {"gen_kwargs": {"max_gen_toks": 2}}


def test_a_benchmark_says_itself_what_it_measures(model: RoutedModel, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    expected = evaluate_steering(model, PLAN, benchmark(rows(4)), **QUICK)
    found = evaluate_distributed(model, PLAN, benchmark(rows(4)), runs, **QUICK)
    assert same_file(found, expected, tmp_path)
    first = {path.name for path in runs.iterdir()}
    evaluate_distributed(model, PLAN, benchmark(rows(4)), runs, **QUICK)
    assert {path.name for path in runs.iterdir()} == first
    changes: list[SteeringTask] = [
        benchmark(rows(3)),
        benchmark(rows(4, question="who is it ?")),
        benchmark(rows(4, answer=CONFLICTS[0].memory_answer)),
        benchmark(rows(4), template="{question} {context}"),
        benchmark(rows(4), batch_size=2),
    ]
    digests = {each.on(model).measure.digest for each in [benchmark(rows(4)), *changes]}  # type: ignore[attr-defined]
    assert len(digests) == 1 + len(changes)
    judged = harness_task(
        "moe_lens/harmless", "length", data=[{"prompt": "the"}, {"prompt": "a"}], judge=len_of, **WRITING
    )
    with pytest.raises(DataError, match="a function of its own"):
        evaluate_distributed(model, PLAN, judged, runs, **QUICK)


def len_of(answers: Any) -> list[float]:
    return [float(len(answer.text)) for answer in answers]


def test_numbers_that_are_none_are_refused_as_everywhere(model: RoutedModel, tmp_path: Path) -> None:
    own = SteeringTask("mine", lambda model, hooks: [1.0, float("nan")], ("a", "b"))
    with pytest.raises(DataError, match="one finite number for each"):
        evaluate_distributed(model, PLAN, own, tmp_path / "runs", about="nan", **QUICK)


def test_a_damaged_unit_is_measured_again(model: RoutedModel, tmp_path: Path, parts: list[int]) -> None:
    expected = evaluate_distributed(model, PLAN, task(None), tmp_path / "runs", **QUICK)
    n_parts = len(parts)
    files = sorted((tmp_path / "runs").glob("measure-*"))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    files[1].write_bytes(files[2].read_bytes())
    found = evaluate_distributed(model, PLAN, task(None), tmp_path / "runs", **QUICK)
    assert same_file(found, expected, tmp_path)
    assert len(parts) == n_parts + 2
