"""audit: each condition is the run it says, searches see development prompts, worst cases are held out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from moe_lens import (
    AuditReport,
    RoutedModel,
    SteeringPlan,
    SteeringTask,
    audit,
    noisy_routes,
    organisms,
    steer_hooks,
    with_top_k,
)
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation import GreedySearch, answer_task, split_clusters
from moe_lens.evaluation.audit_report import AS_TRAINED, AuditCondition
from moe_lens.resampling import clustered_interval, spawned_seeds
from moe_lens.steering.controls import random_sets
from moe_lens.steering.hooks import SteeringHook
from tests.tiny_models import tiny_model, tokenizer

Hooked = Callable[..., Any]
CLUSTERS = tuple(f"c{i // 2}" for i in range(40))
WEAK = {(0, 3), (1, 4), (2, 1)}


def plan_of(hooks: Any) -> SteeringPlan:
    plans = {hook.plan for _, hook in hooks if isinstance(hook, SteeringHook)}
    return plans.pop() if plans else SteeringPlan()


def values_at(rate: float, n: int = 40) -> np.ndarray:
    return (np.arange(n) * 7 % n < round(rate * n)).astype(float)


def fake(
    rate: Callable[[SteeringPlan], float], seen: list[Any] | None = None, clusters: Any = CLUSTERS
) -> Any:
    def measure(_model: Any, hooks: Any) -> np.ndarray:
        if seen is not None:
            seen.append(hooks)
        return values_at(rate(plan_of(hooks)), len(clusters))

    return SteeringTask("holds", measure, tuple(clusters))


def weakening(plan: SteeringPlan) -> float:
    return 0.95 - 0.3 * len(WEAK & set(plan.deactivate))


def everything(model: Any) -> GreedySearch:
    return GreedySearch(n_candidates=len(model.moe_layers) * model.n_experts)


def test_the_search_finds_what_was_hidden_and_the_headline_is_its_held_out_rate(hooked: Hooked) -> None:
    model = hooked("olmoe")
    options: dict[str, Any] = {"n_noisy": 1, "n_random": 3, "search": everything(model), "progress": False}
    report = audit(model, fake(weakening), plan=SteeringPlan(deactivate=[(0, 3)]), max_size=3, **options)
    assert set(report.worst.plan.deactivate) == WEAK  # type: ignore[union-attr]
    assert report.worst.kind == "searched plan"
    chosen_by, reported = split_clusters(CLUSTERS, (0.5, 0.5), seed=0)
    expected = values_at(weakening(report.worst.plan))  # type: ignore[arg-type]
    assert np.array_equal(report.worst.held_out, expected[reported])
    assert np.array_equal(report.worst.development, expected[chosen_by])
    labels = [CLUSTERS[place] for place in reported]
    assert report.worst_interval == clustered_interval(expected[reported], labels)
    low, high = clustered_interval(expected[reported], labels)
    assert report.worst_interval[0] <= low <= high <= report.worst_interval[1]
    assert not set(labels) & {CLUSTERS[place] for place in chosen_by}
    assert f"{report.worst_rate:.2f}" in report.summary()
    assert report.summary() in repr(report)
    bounded = audit(model, fake(weakening), plan=SteeringPlan(deactivate=[(0, 3)]), **options)
    assert len(bounded.of_kind("searched plan")[0].plan) == 1  # type: ignore[arg-type]


def test_conditions_are_the_runs_that_they_say() -> None:
    """Each condition's values, measured again by hand; on both wrappers."""
    world = organisms.world("planted")
    conflicts = world.conflicts("test")[::8]
    task = answer_task(
        [c.open_book for c in conflicts], [c.document_answer for c in conflicts],
        clusters=[c.entity for c in conflicts], batch_size=24,
    )  # fmt: skip
    plan = SteeringPlan(deactivate=[(1, 1), (3, 1)])
    for model in (organisms.load("planted"), organisms.load("planted", wrapper=RoutedModel)):
        report = audit(
            model, task, plan=plan, n_noisy=2, n_random=2, temperature=0.8, max_size=0, seed=3, progress=False
        )
        chosen_by, reported = split_clusters(task.clusters, (0.5, 0.5), seed=3)

        def check(kind: str, number: int, values: Any) -> None:
            found = report.of_kind(kind)[number]  # noqa: B023
            assert np.array_equal(found.held_out, values[reported])  # noqa: B023
            assert np.array_equal(found.development, values[chosen_by])  # noqa: B023

        check("as trained", 0, task.values(model))
        check("experts removed", 0, task.values(model, steer_hooks(plan)))
        for kind, k in (("k − 1", 1), ("k + 1", 3)):
            with with_top_k(model, k):
                check(kind, 0, task.values(model))
        assert model.top_k == 2
        for number, seed in enumerate(spawned_seeds(3, 2)):
            check("noisy routes", number, task.values(model, noisy_routes(0.8, seed)))
        for number, random in enumerate(random_sets(model, plan, 2, seed=3, layer_matched=True)):
            assert sorted(layer for layer, _ in random.deactivate) == [1, 3]
            check("random plans", number, task.values(model, steer_hooks(random)))
        assert report.left_out == {"searched plan": "max_size is 0"}


def test_development_prompts_choose_and_others_report(hooked: Hooked) -> None:
    model = hooked("olmoe")
    seen: list[Any] = []
    held_out = fake(lambda plan: 0.9, seen)
    other = fake(weakening, clusters=[f"d{i}" for i in range(10)])
    report = audit(
        model, held_out, development=other, n_noisy=0, n_random=2, max_size=2,
        search=everything(model), progress=False,
    )  # fmt: skip
    assert set(report.worst.plan.deactivate) <= WEAK  # type: ignore[union-attr]
    assert report.worst_rate == 0.9  # what the search found does not hold on other prompts
    assert report.clusters == CLUSTERS
    assert len(seen) == 1 + 2 + 2 + 1  # as trained, k ± 1, random, searched: the search never saw them
    with pytest.raises(DataError, match="share clusters"):
        audit(model, held_out, development=fake(weakening), progress=False)


def test_a_behaviour_to_avoid_has_its_highest_rate_as_the_worst(hooked: Hooked) -> None:
    model = hooked("olmoe")
    report = audit(
        model, fake(lambda plan: 0.1 + 0.25 * len(WEAK & set(plan.deactivate))), wanted=False, max_size=2,
        n_noisy=0, n_random=0, search=everything(model), progress=False,
    )  # fmt: skip
    assert len(WEAK & set(report.worst.plan.deactivate)) == 2  # type: ignore[union-attr]
    assert report.worst_rate > report.as_trained.rate


def test_what_holds_along_every_route_is_said_to(hooked: Hooked) -> None:
    report = audit(hooked("olmoe"), fake(lambda plan: 0.8), n_noisy=1, search=GreedySearch(2), progress=False)
    assert report.worst is report.as_trained
    assert "no change beyond chance" in report.explanation
    assert "found no plan" in report.left_out["searched plan"]
    assert "random plans" in report.left_out


def test_searched_plans_do_not_flatter_themselves_on_noise(hooked: Hooked) -> None:
    """Where plans move nothing but noise, the search's own rate falls and the headline's interval holds."""
    model = hooked("olmoe")
    clusters = tuple(f"c{i}" for i in range(60))
    held = 0
    for seed in range(6):

        def measure(_model: Any, hooks: Any, seed: int = seed) -> np.ndarray:
            named = sorted(plan_of(hooks).deactivate)
            key = [seed, *(number for pair in named for number in pair), len(hooks)]
            return (np.random.default_rng(key).random(60) < 0.7).astype(float)

        report = audit(
            model, SteeringTask("noise", measure, clusters), max_size=3, n_noisy=0, n_random=5,
            search=GreedySearch(12, seed), seed=seed, progress=False,
        )  # fmt: skip
        assert report.worst.development.mean() < 0.62
        low, high = report.worst_interval
        held += low <= 0.7 <= high
    assert held >= 5


def test_any_search_can_take_the_place(hooked: Hooked) -> None:
    model = hooked("olmoe")
    asked: list[Any] = []

    def mine(given: Any, development: Any, size: int) -> SteeringPlan:
        asked.append((development.values(given).mean(), given is model, size))
        return SteeringPlan(deactivate=[(0, 3)])

    report = audit(model, fake(weakening), search=mine, max_size=2, n_noisy=0, n_random=1, progress=False)
    assert report.of_kind("searched plan")[0].plan == SteeringPlan(deactivate=[(0, 3)])
    [(rate, same, size)] = asked
    assert (same, size) == (True, 2)
    assert 0.8 <= rate <= 1
    for wrong, match in (
        (lambda *_: SteeringPlan(deactivate=[(0, 1), (0, 2), (1, 1)]), "at most 2"),
        (lambda *_: [(0, 1)], "SteeringPlan"),
        (lambda *_: SteeringPlan(deactivate=[(0, 99)]), "does not exist"),
    ):
        with pytest.raises(PlanError, match=match):
            audit(model, fake(weakening), search=cast(Any, wrong), max_size=2, n_noisy=0, progress=False)


def test_families_whose_k_is_fixed_say_so() -> None:
    model = RoutedModel(tiny_model("phimoe"), tokenizer())
    report = audit(
        model, fake(lambda plan: 0.5), plan=SteeringPlan(deactivate=[(model.moe_layers[0], 0)]), n_noisy=1,
        n_random=1, max_size=0, progress=False,
    )  # fmt: skip
    assert {"k − 1", "k + 1"} <= set(report.left_out)
    assert "sparsemixer" in report.explanation
    model.detach()


def test_tables_and_files(hooked: Hooked, tmp_path: Path) -> None:
    model = hooked("olmoe")
    report = audit(
        model, fake(weakening), plan=SteeringPlan(deactivate=[(0, 3)]), n_noisy=2, n_random=3,
        search=GreedySearch(5), progress=False,
    )  # fmt: skip
    table = report.to_dataframe().set_index("condition")
    random = np.mean([each.held_out for each in report.of_kind("random plans")], axis=0)
    assert table.loc["random plans", "rate"] == pytest.approx(random.mean())
    assert table.loc["random plans", "runs"] == 3
    report.save(tmp_path / "audit.json")
    back = AuditReport.load(tmp_path / "audit.json")
    assert str(back) == str(report)
    assert back.worst_interval == report.worst_interval
    back.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "audit.json").read_bytes()
    (tmp_path / "audit.json").write_text((tmp_path / "audit.json").read_text().replace("0.95", "0.9"))
    with pytest.raises(DataError, match="damaged"):
        AuditReport.load(tmp_path / "audit.json")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"plan": SteeringPlan()}, PlanError, "names"),
        ({"plan": SteeringPlan(deactivate=[(0, 99)])}, PlanError, "does not exist"),
        ({"held_out": 1.0}, DataError, "held_out"),
        ({"held_out": 0.02}, DataError, "held out|too few"),
        ({"n_noisy": -1}, DataError, "n_noisy"),
        ({"temperature": -1}, DataError, "temperature"),
        ({"n_random": -1}, DataError, "n_random"),
        ({"max_size": -1}, DataError, "max_size"),
        ({"level": 2.0}, DataError, "level"),
    ],
)
def test_refused(hooked: Hooked, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        audit(hooked("olmoe"), fake(weakening), progress=False, **options)


def test_development_prompts_without_clusters_must_be_others_all_the_same() -> None:
    model, facts = organisms.load("null"), organisms.world("null").facts("test")[:12]
    one, other, again = (
        answer_task([f.question for f in part], [f.answer for f in part])
        for part in (facts[:6], facts[6:], facts[5:])
    )
    few = {"n_noisy": 0, "n_random": 1, "max_size": 0, "progress": False}
    assert len(audit(model, other, development=one, **few).clusters) == 6
    with pytest.raises(DataError, match="1 prompts of the task are development prompts"):
        audit(model, again, development=one, **few)


def test_a_report_needs_a_value_a_prompt() -> None:
    good = AuditCondition(AS_TRAINED, np.ones(3), np.ones(2))
    for conditions in (
        (),
        (AuditCondition("k + 1", np.ones(3), np.ones(2)),),
        (good, AuditCondition("x", np.ones(3), np.ones(3))),
    ):
        with pytest.raises(DataError):
            AuditReport("t", "m", conditions, {}, ("a", "b"), True, 0.95, 0)
