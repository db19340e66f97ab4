"""Searches over sets of experts against brute force, on known effects of each set, and on a planted model."""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import ExpertScores, SteeringPlan, answer_task, collect_routing, organisms, search_plan
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation import (
    CollateralMeasure,
    Outcome,
    PlanSearch,
    SteeringTask,
    measure_outcome,
    searching,
)
from moe_lens.organisms import document_task

EXPERTS = [(0, 1), (0, 2), (1, 5), (3, 7), (2, 2)]
EFFECTS = {(0, 1): 0.1, (0, 2): 0.25, (1, 5): -0.3, (3, 7): 0.2, (2, 2): 0.0}
Experts = Iterable[tuple[int, int]]


def additive(experts: Experts) -> float:
    """Single effects, and 0.6 more where (0, 1) and (2, 2) go together."""
    chosen = set(experts)
    return sum(EFFECTS[e] for e in chosen) + 0.6 * ({(0, 1), (2, 2)} <= chosen)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[SteeringTask, SteeringTask]]:
    """Two tasks whose values follow from the experts that a plan switches off."""

    def build(
        value: Callable[[Experts], float] = additive,
        loss: Callable[[Experts], float] | None = None,
        second: str = "ddeeff",
    ) -> Any:
        def measured(model: Any, task: SteeringTask, plan: SteeringPlan) -> Outcome:
            experts = (*plan.deactivate, *plan.activate)
            part = 1.0 if task.name == "development" else 0.5
            try:
                moved = value(experts)
            except KeyError:  # a random set
                moved = 0.0
            values = part * moved + np.arange(len(task.clusters)) / 10
            return Outcome(values, {"loss": loss(experts)} if loss else {})

        monkeypatch.setattr(searching, "measure_outcome", measured)
        collateral = {"loss": CollateralMeasure(lambda model, hooks: 0.0, 0.1)} if loss else {}
        tasks = [
            SteeringTask(name, lambda model, hooks: [0.0], tuple(labels), dict(collateral))
            for name, labels in (("development", "aabbcc"), ("test", second))
        ]
        return tasks

    return build


def search(tasks: Any, **settings: Any) -> PlanSearch:
    development, held_out = tasks
    return search_plan(
        organisms.load("null"),
        development,
        held_out,
        settings.pop("candidates", EXPERTS),
        progress=False,
        n_random=9,
        **settings,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("toward", ["higher", "lower"])
def test_exact_is_the_best_of_all_sets(known: Any, size: int, toward: str) -> None:
    found = search(known(), method="exact", size=size, toward=toward)
    sign = 1 if toward == "higher" else -1
    sets = [s for n in range(1, size + 1) for s in combinations(EXPERTS, n)]
    best = max(sign * additive(s) for s in sets)
    smallest = min(len(s) for s in sets if sign * additive(s) >= best - 1e-9)
    assert sign * additive(found.plan.deactivate) == pytest.approx(best)
    assert len(found.plan) == smallest
    assert found.development.value == pytest.approx(sign * best)
    assert found.held_out.value == pytest.approx(sign * best / 2)
    assert found.n_runs == 1 + len(sets)


@pytest.mark.parametrize("goal", [0.05, 0.3, 0.65, 0.9])
def test_exact_finds_the_smallest_set_that_reaches_a_goal(known: Any, goal: float) -> None:
    found = search(known(), method="exact", size=5, goal=goal)
    reaching = [s for n in range(1, 6) for s in combinations(EXPERTS, n) if additive(s) >= goal - 1e-9]
    assert found.reached
    assert len(found.plan) == min(map(len, reaching))
    assert additive(found.plan.deactivate) == max(additive(s) for s in reaching if len(s) == len(found.plan))


def test_greedy_follows_single_steps_and_stops_where_none_helps(known: Any) -> None:
    found = search(known(), size=5)
    chosen: list[tuple[int, int]] = []
    for step in found.steps:
        left = [e for e in EXPERTS if e not in chosen]
        chosen.append(max(left, key=lambda e: additive([*chosen, e])))
        assert step.experts == tuple(chosen)
        assert step.mean == pytest.approx(additive(chosen) + 0.25)
    assert found.plan.deactivate == ((0, 2), (3, 7), (0, 1), (2, 2))
    assert found.p == 0.1  # random sets move nothing
    assert search(known(), size=2).plan.deactivate == ((0, 2), (3, 7))


def test_greedy_drops_what_the_goal_does_not_need(known: Any) -> None:
    """The third expert reaches the goal with the second alone."""

    def value(experts: Experts) -> float:
        chosen = set(experts)
        return 0.3 * ((0, 1) in chosen) + 0.2 * ((0, 2) in chosen) + 0.9 * ({(0, 2), (1, 5)} <= chosen)

    found = search(known(value), size=3, goal=1.0)
    assert found.plan.deactivate == ((0, 2), (1, 5))
    assert found.reached
    assert search(known(value), size=2, goal=1.0).reached is False


def test_sets_beyond_a_limit_are_passed_over(known: Any) -> None:
    harmful = (0, 2)
    found = search(known(loss=lambda experts: 0.5 * (harmful in set(experts))), size=2)
    assert harmful not in found.plan.deactivate
    broken = search(known(loss=lambda experts: float("nan") if harmful in set(experts) else 0.0), size=2)
    assert broken.plan == found.plan
    with pytest.raises(PlanError, match="No admissible set of the candidates raises 'development'"):
        search(known(loss=lambda experts: 1.0 * bool(set(experts))), size=2)


def test_sets_that_do_not_fit_are_passed_over(known: Any) -> None:
    """Six of eight experts can be deactivated with k = 2; two activated."""
    ones = [(0, e) for e in range(8)]
    tasks = known(lambda experts: float(len(set(experts))))
    assert len(search(tasks, candidates=ones, size=8).plan) == 6
    active = search(tasks, candidates=ones, size=8, role="activate").plan
    assert (len(active.activate), active.deactivate) == (2, ())


def test_a_planted_model_gives_up_its_experts_on_held_out_prompts_too() -> None:
    model, world = organisms.load("planted"), organisms.world("planted")
    development, held_out = (document_task(world, split) for split in ("development", "test"))
    candidates = [(2, e) for e in range(3)]
    found = search_plan(model, development, held_out, candidates, size=2, n_random=3, progress=False)
    before, after = (measure_outcome(model, held_out, p) for p in (SteeringPlan(), found.plan))
    assert found.held_out.value == pytest.approx(after.rate - before.rate)
    assert found.held_out.low <= found.held_out.value <= found.held_out.high
    assert found.unsteered[1] == before.rate
    assert len(found.random) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": []}, "no candidates"),
        ({"candidates": [(0, 1), (0, 1)]}, "more than once"),
        ({"candidates": [(9, 1)]}, "layer 9 has no router"),
        ({"candidates": "all"}, "must be .layer, expert. pairs|parameter"),
        ({"size": 0}, "size must be a whole number from 1"),
        ({"goal": 0.0}, "goal must be a number above 0"),
        ({"max_runs": 3}, "needs up to 15 runs of the development task, more than max_runs=3"),
        ({"method": "exact", "max_runs": 20}, "needs up to 31 runs"),
    ],
)
def test_bad_input_is_refused(known: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, PlanError, TypeError), match=message):
        search(known(), **settings)


def test_the_held_out_task_must_be_another(known: Any) -> None:
    one, _ = known()
    with pytest.raises(DataError, match="are one task"):
        search((one, one))
    with pytest.warns(UserWarning, match="share 3 clusters"):
        search(known(second="aabbcc"), size=1)


def test_clusters_that_are_numbers_are_compared_unless_they_only_number_the_prompts(known: Any) -> None:
    one, other = known()
    documents = ("7", "7", "12", "12", "31", "31")
    with pytest.warns(UserWarning, match="share 3 clusters"):
        search((replace(one, clusters=documents), replace(other, clusters=documents)), size=1)
    numbers = tuple(map(str, range(6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search((replace(one, clusters=numbers), replace(other, clusters=numbers)), size=1)


def test_held_out_prompts_that_are_development_prompts_are_said() -> None:
    """Whatever their clusters; without any, prompts are all that tells."""
    conflicts = organisms.world("specialised").conflicts("test")[:24]
    one, other, again = (
        answer_task([c.open_book for c in part], [c.document_answer for c in part])
        for part in (conflicts[:12], conflicts[12:], conflicts[10:])
    )
    model, settings = organisms.load("specialised"), {"size": 1, "n_random": 0, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_plan(model, one, other, [(0, 0)], **settings)
    with pytest.warns(UserWarning, match="2 held-out prompts are development prompts"):
        search_plan(model, one, again, [(0, 0)], **settings)


def test_scores_of_another_model_are_refused(known: Any) -> None:
    other = organisms.load("specialised")
    stats = collect_routing(other, ["Question : what is"], progress=False)
    scores = ExpertScores(torch.randn(4, 8, dtype=torch.float64), stats, stats)
    with pytest.raises(DataError, match="scores are of another model"):
        search(known(), candidates=scores)


@pytest.mark.parametrize(
    "settings", [{"method": "exact"}, {"size": 4}, {"size": 5, "goal": 0.9}, {"size": 5, "goal": 0.3}]
)
def test_no_search_runs_more_often_than_it_is_allowed_to(known: Any, settings: dict[str, Any]) -> None:
    """The unsteered run counts: the number that the error asks for is enough, and one less is refused."""
    with pytest.raises(DataError, match=r"needs up to \d+ runs") as refused:
        search(known(), max_runs=1, **settings)
    needed = int(re.findall(r"up to (\d+) runs", str(refused.value))[0])
    assert search(known(), max_runs=needed, **settings).n_runs <= needed
    with pytest.raises(DataError, match="more than"):
        search(known(), max_runs=needed - 1, **settings)
    assert search(known(), method="exact", max_runs=1 + 5 + 10 + 10 + 5).n_runs == 31  # nothing to spare
