"""The sweep: every size and direction measured, a size chosen as defined, a file that comes back."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation.evaluating import sweep
from moe_lens.evaluation.measures import Hooks
from moe_lens.evaluation.outcomes import Limit
from moe_lens.evaluation.plan_sizes import SweepPoint, SweepResult
from moe_lens.evaluation.tasks import CollateralMeasure, SteeringTask
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.plots import sweep_curves
from moe_lens.resampling import clustered_interval
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.hooks import SteeringHook
from moe_lens.steering.plan import SteeringPlan

Hooked = Callable[..., HookedMoE]
CLUSTERS = ("a", "a", "b", "b", "c", "c")
WEIGHTS = np.array([1.0, 0.8, 0.5, 1.2, 0.9, 1.6]) / 6


@pytest.fixture
def model(hooked: Hooked) -> HookedMoE:
    return hooked("olmoe", num_experts=12)


def scores(model: HookedMoE, n_negative: int = 18) -> ExpertScores:
    """`n_negative` experts below 0, spread over the layers, and the others above; all of different sizes."""
    shape = model.moe_shape
    size = (len(shape.layers), shape.n_experts)
    order = np.random.default_rng(0).permutation(36)
    values = (np.arange(36) + 1.0) / 40
    values[order[:n_negative]] *= -1
    counts = torch.zeros(size, dtype=torch.int64)
    counts[:, : shape.top_k] = 1
    zeros = torch.zeros(size, dtype=torch.float64)
    stats = RoutingStats(shape, 1, counts, zeros, zeros)
    return ExpertScores(torch.tensor(values).reshape(size), stats, stats)


def effect(plan: SteeringPlan, own: ExpertScores) -> float:
    """Deactivating what goes with the second condition raises the behaviour; activating it lowers it."""
    score = {(one.layer, one.expert): one.delta for one in own.ranked()}
    return sum(score[e] for e in plan.activate) - sum(score[e] for e in plan.deactivate)


def plan_of(hooks: Hooks) -> SteeringPlan:
    return next((hook.plan for _, hook in hooks or () if isinstance(hook, SteeringHook)), SteeringPlan())


def fake_task(own: ExpertScores, seen: list[SteeringPlan] | None = None) -> SteeringTask:
    def measure(_model: Any, hooks: Hooks) -> np.ndarray:
        if seen is not None:
            seen.append(plan_of(hooks))
        return 0.5 + effect(plan_of(hooks), own) * WEIGHTS

    loss = CollateralMeasure(lambda _, hooks: 1.0 + 0.1 * len(plan_of(hooks)), 0.45)
    return SteeringTask("fake", measure, CLUSTERS, {"loss": loss})


def run(
    model: HookedMoE, task: SteeringTask, own: ExpertScores, sizes: Any = (3, 2), **options: Any
) -> SweepResult:
    return sweep(model, own, task, sizes=sizes, progress=False, **options)


@pytest.mark.parametrize("mode", ["deactivate", "activate", "both"])
def test_points_are_those_of_the_plans(model: HookedMoE, mode: Any) -> None:
    own, seen = scores(model), []
    found = run(model, fake_task(own, seen), own, mode=mode, n_random=3, seed=2)
    assert [(p.size, p.direction) for p in found.points] == [(2, "+"), (2, "-"), (3, "+"), (3, "-")]
    assert (found.sizes, found.mode, found.task, found.model) == ((2, 3), mode, "fake", model.moe_shape.model)
    assert found.unsteered == 0.5
    assert found.unsteered_collateral == {"loss": 1.0}
    assert found.limits == {"loss": Limit(0.45, True)}
    ordered = sorted(own.ranked(), key=lambda one: one.delta)
    lowest, highest = ([(one.layer, one.expert) for one in row] for row in (ordered, ordered[::-1]))
    runs = iter(seen)
    assert next(runs) == SteeringPlan()
    for point in found.points:
        off, on = (lowest, highest) if point.direction == "+" else (highest, lowest)
        plan = next(runs)
        assert plan.deactivate == tuple(off[: point.size] if mode != "activate" else ())
        assert plan.activate == tuple(on[: point.size] if mode != "deactivate" else ())
        values = 0.5 + effect(plan, own) * WEIGHTS
        assert point.mean == pytest.approx(values.mean())
        assert (point.low, point.high) == clustered_interval(values, CLUSTERS, seed=2)
        assert point.collateral == {"loss": pytest.approx(1 + 0.1 * len(plan))}
        controls = [next(runs) for _ in range(3)]
        assert [(len(c.activate), len(c.deactivate)) for c in controls] == [
            (len(plan.activate), len(plan.deactivate))
        ] * 3
        assert point.control_means == pytest.approx(
            [float(np.mean(0.5 + effect(c, own) * WEIGHTS)) for c in controls]
        )
    assert list(runs) == []
    assert len(set(seen)) == len(seen)  # each point has draws of its own


def test_the_same_seed_gives_the_same_sweep(model: HookedMoE) -> None:
    own = scores(model)
    first, again, other = (run(model, fake_task(own), own, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.point(2, "+").control_means != other.point(2, "+").control_means


def test_gap_and_best_size_of_a_real_sweep(model: HookedMoE) -> None:
    own = scores(model)
    found = run(model, fake_task(own), own, sizes=(1, 2, 3, 4, 5, 6))
    gaps = {n: found.point(n, "+").mean - found.point(n, "-").mean for n in found.sizes}
    assert {n: found.gap(n) for n in found.sizes} == gaps
    assert all(gaps[n] < gaps[n + 1] for n in range(1, 6))
    assert [found.excess(n) > 0 for n in found.sizes] == [False] * 4 + [
        True
    ] * 2  # 0.1 an expert, 0.45 allowed
    assert found.best_size(tolerance=0.0) == 4
    assert found.best_size(tolerance=100.0) == 1


# Sizes


def test_impossible_sizes_are_left_out(model: HookedMoE) -> None:
    own = scores(model, n_negative=5)
    assert run(model, fake_task(own), own, sizes=[1, 5, 6, 40, 5], n_random=0).sizes == (1, 5)
    assert run(model, fake_task(own), own, sizes=[5, 6], n_random=0, directions=("-",)).sizes == (5, 6)
    assert run(model, fake_task(own), own, sizes=[1, 36], n_random=0, mode="both").sizes == (1,)


def test_a_size_is_measured_in_both_directions_or_not_at_all(model: HookedMoE) -> None:
    own = scores(model, n_negative=5)
    found = run(model, fake_task(own), own, sizes=[3, 6], n_random=0, directions=("-", "+"))
    assert {(p.size, p.direction) for p in found.points} == {(3, "+"), (3, "-")}


def test_no_possible_size_is_refused_with_the_reason(model: HookedMoE) -> None:
    own = scores(model, n_negative=5)
    with pytest.raises(PlanError, match=r"\(6, 7\).*only 5 experts"):
        run(model, fake_task(own), own, sizes=(6, 7))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sizes": ()}, "sizes"),
        ({"sizes": (0, 2)}, "sizes"),
        ({"sizes": (-1,)}, "sizes"),
        ({"sizes": (2, 2.5)}, "sizes"),
        ({"sizes": (True,)}, "sizes"),
        ({"directions": ()}, "directions"),
        ({"directions": ("+", "~")}, "directions"),
        ({"mode": "promote"}, "mode"),
        ({"n_random": -1}, "n_random"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_runs(model: HookedMoE, options: Any, says: str) -> None:
    own, seen = scores(model), []
    with pytest.raises((DataError, TypeCheckError), match=says):
        run(model, fake_task(own, seen), own, **options)
    assert seen == []


def test_a_point_that_was_not_measured_is_refused(model: HookedMoE) -> None:
    own = scores(model)
    found = run(model, fake_task(own), own, n_random=0, directions=("+",))
    with pytest.raises(DataError, match="size 4"):
        found.point(4, "+")
    with pytest.raises(DataError, match="direction '-'"):
        found.gap(2)


# The best size


def made(points: dict[int, tuple[float, float, float, float]], limit: float = 0.25) -> SweepResult:
    """size -> (mean +, mean -, loss +, accuracy -)."""
    return SweepResult(
        "task",
        "m",
        "deactivate",
        0.5,
        {"loss": 1.0, "accuracy": 1.0},
        {"loss": Limit(limit, True), "accuracy": Limit(limit, False)},
        tuple(
            SweepPoint(size, side, mean, mean - 0.125, mean + 0.125, collateral, [0.25, 0.75])
            for size, (plus, minus, loss, accuracy) in points.items()
            for side, mean, collateral in (
                ("+", plus, {"loss": loss, "accuracy": 1.0}),
                ("-", minus, {"loss": 1.0, "accuracy": accuracy}),
            )
        ),
    )


eighths = st.integers(0, 8).map(lambda i: i / 8)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.integers(1, 9), st.tuples(eighths, eighths, eighths.map(lambda x: 1 + x), eighths), min_size=1
    ),
    st.sampled_from([0.0, 0.0625, 0.125, 0.5]),
)
@pytest.mark.filterwarnings("ignore:.*no size moves")
def test_the_best_size_from_its_definition(points: Any, tolerance: float) -> None:
    gap = {size: plus - minus for size, (plus, minus, _, _) in points.items()}
    worst = {size: max(loss - 1.0, 1.0 - accuracy) for size, (_, _, loss, accuracy) in points.items()}
    allowed = [size for size in points if worst[size] <= 0.25]
    if allowed:
        largest = max(gap[size] for size in allowed)
        expected = min(size for size in allowed if largest - gap[size] <= tolerance)
    else:
        least = min(worst.values())
        expected = min(size for size in points if worst[size] == least)
    assert made(points).best_size(tolerance) == expected
    assert {size: made(points).excess(size) for size in points} == {s: w - 0.25 for s, w in worst.items()}


def test_points_of_one_cluster_have_no_interval_and_the_file_is_json(tmp_path: Path) -> None:
    point = SweepPoint(2, "+", 0.75, math.nan, math.nan, {}, [0.5])
    assert "one cluster, no interval" in point.summary()
    result = SweepResult(
        "t", "m", "both", 0.5, {}, {}, (point, replace(point, direction="-", low=0.5, high=1.0))
    )
    result.save(tmp_path / "one.json")

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "one.json").read_text(encoding="utf-8"), parse_constant=no_constant)
    loaded = SweepResult.load(tmp_path / "one.json")
    assert math.isnan(loaded.points[0].low)
    assert math.isnan(loaded.points[0].high)
    assert loaded.points[1] == result.points[1]
    for line in sweep_curves(loaded).containers[0][2]:
        assert line.get_segments()


def test_without_limits_every_size_is_gentle() -> None:
    result = SweepResult(
        "t", "m", "both", 0.5, {}, {}, made({2: (0.5, 0.5, 1.0, 1.0), 4: (1.0, 0.0, 9.0, 0.0)}).points
    )
    assert result.excess(4) == -math.inf
    assert result.best_size() == 4


def test_an_infinite_limit_is_none(tmp_path: Path) -> None:
    points = {2: (0.5, 0.5, 1.0, 1.0), 4: (1.0, 0.0, 9.0, 0.0)}
    result = replace(made(points), limits={name: Limit(math.inf, True) for name in made(points).limits})
    assert result.limits
    assert result.best_size() == 4
    result.save(tmp_path / "s.json")
    assert "Infinity" not in (tmp_path / "s.json").read_text(encoding="utf-8")
    assert SweepResult.load(tmp_path / "s.json").limits == result.limits


def test_a_harm_just_at_its_limit_is_allowed() -> None:
    result = made({1: (0.5, 0.5, 1.0, 1.0), 2: (1.0, 0.0, 1.3, 1.0)}, limit=0.3)
    assert result.best_size() == 2


@pytest.mark.parametrize(("saturation", "says"), [(None, ""), ("floor", "; the measure is at its floor")])
def test_the_best_of_sizes_without_effect_comes_with_a_warning(saturation: Any, says: str) -> None:
    result = replace(
        made({2: (0.25, 0.5, 1.0, 1.0), 4: (0.5, 0.5, 1.0, 1.0)}, limit=0.3), saturation=saturation
    )
    with pytest.warns(UserWarning, match=rf"no size moves .* way{says}.*gap by size: 2: -0.25, 4: \+0.00"):
        assert result.best_size(tolerance=0.0) == 4


def test_the_best_of_sizes_with_an_effect_warns_only_where_the_measure_is_saturated() -> None:
    result = made({2: (0.5, 0.25, 1.0, 1.0), 4: (0.5, 0.5, 1.0, 1.0)}, limit=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert result.best_size() == 2
    with pytest.warns(UserWarning, match="task: the measure is at its ceiling"):
        assert replace(result, saturation="ceiling").best_size() == 2


# Tables and files


def test_rows_and_bands(model: HookedMoE) -> None:
    own = scores(model)
    found = run(model, fake_task(own), own, n_random=7)
    frame = found.to_dataframe()
    assert list(frame.columns) == [
        "size", "direction", "mean", "low", "high", "random_mean", "random_5%", "random_95%", "loss",
    ]  # fmt: skip
    assert len(frame) == len(found.points) == 4
    for row, point in zip(frame.to_dict("records"), found.points, strict=True):
        ordered = sorted(point.control_means)
        low = ordered[0] + 0.3 * (ordered[1] - ordered[0])  # place 0.05 * 6 among places 0 to 6
        high = ordered[6] - 0.3 * (ordered[6] - ordered[5])
        assert point.band == pytest.approx((low, high))
        assert (row["random_5%"], row["random_95%"]) == point.band
        assert row["random_mean"] == pytest.approx(sum(ordered) / 7)
        assert (row["size"], row["direction"], row["mean"]) == (point.size, point.direction, point.mean)
        assert row["loss"] == point.collateral["loss"]
    printed = str(found)
    assert "fake" in printed
    assert "unsteered 0.500, deactivate" in printed


def test_without_random_sets_there_is_no_band(model: HookedMoE) -> None:
    own = scores(model)
    found = run(model, fake_task(own), own, n_random=0)
    assert all(point.control_means == [] and np.isnan(point.band).all() for point in found.points)
    assert np.isnan(found.to_dataframe()["random_mean"].to_numpy()).all()


@pytest.mark.parametrize("n_random", [0, 2])
def test_a_saved_sweep_loads_as_it_was(model: HookedMoE, tmp_path: Path, n_random: int) -> None:
    own = scores(model)
    found = run(model, fake_task(own), own, n_random=n_random)
    found.save(tmp_path / "sweep.json")
    assert SweepResult.load(tmp_path / "sweep.json") == found
    assert json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["kind"] == "moe_lens.SweepResult"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, ...)
            for name in ("kind", "schema", "task", "model", "mode", "unsteered", "limits", "points")
        ],
        ("unsteered_collateral", ...),
        ("kind", "moe_lens.SteeringReport"),
        ("schema", 3),
        ("extra", 1),
        ("points", 3),
        ("points", [1]),
        ("points", [{"size": 1}]),
        ("limits", []),
        ("limits", {"loss": {"limit": 1.0}}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    made({2: (1.0, 0.0, 1.0, 1.0)}).save(tmp_path / "whole")
    content = json.loads((tmp_path / "whole").read_text(encoding="utf-8"))
    del content["digest"]  # else every change would be damage, whatever the field
    content[field] = value
    content = {name: value for name, value in content.items() if value is not ...}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bad\.json"):
        SweepResult.load(tmp_path / "bad.json")


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000])
def test_what_is_no_sweep_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(DataError, match=r"other\.json"):
        SweepResult.load(tmp_path / "other.json")


def test_a_file_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Schema 1: minus signs as directions, no digest."""
    point = {"size": 2, "low": 0.25, "high": 0.75, "collateral": {"loss": 1.5}, "control_means": [0.5]}
    old = {
        "kind": "moe_lens.SweepResult",
        "schema": 1,
        "task": "task",
        "model": "m",
        "mode": "deactivate",
        "unsteered": 0.5,
        "unsteered_collateral": {"loss": 1.0},
        "limits": {"loss": {"limit": 0.1, "larger_is_worse": True}},
        "points": [{**point, "direction": "+", "mean": 0.75}, {**point, "direction": "−", "mean": 0.25}],
    }
    (tmp_path / "old.json").write_text(json.dumps(old, ensure_ascii=False), encoding="utf-8")
    loaded = SweepResult.load(tmp_path / "old.json")
    assert [point.direction for point in loaded.points] == ["+", "-"]
    assert loaded.gap(2) == 0.5
    assert loaded.point(2, "−") is loaded.point(2, "-")
    loaded.save(tmp_path / "new.json")
    assert SweepResult.load(tmp_path / "new.json") == loaded
    assert "−" not in (tmp_path / "new.json").read_text(encoding="utf-8")


def test_equal_sweeps_give_equal_bytes_and_a_changed_number_is_damage(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        made({2: (1.0, 0.0, 1.0, 1.0)}).save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    content["points"][0]["mean"] = 0.5
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="digest"):
        SweepResult.load(tmp_path / "a.json")


def test_a_sweep_whose_measure_has_no_room_says_so(model: HookedMoE, tmp_path: Path) -> None:
    own = scores(model)
    for values, where, words in (
        (np.ones(6), "ceiling", "at its ceiling throughout"),
        (np.array([0.2, 0.4] * 3), "constant", "constant throughout"),
    ):
        task = SteeringTask("blind", lambda *_, values=values: values, CLUSTERS)
        found = run(model, task, own, n_random=2)
        assert found.saturation == where
        assert words in repr(found)
        assert words in str(found)
        found.save(tmp_path / "sweep.json")
        assert SweepResult.load(tmp_path / "sweep.json").saturation == where
    room = run(model, fake_task(own), own, n_random=2)
    assert room.saturation is None
    assert "throughout" not in repr(room) + str(room)


def test_a_minus_sign_still_asks_for_that_direction(model: HookedMoE) -> None:
    own = scores(model)
    found = run(model, fake_task(own), own, sizes=[2], n_random=0, directions=("−",))
    assert [point.direction for point in found.points] == ["-"]


def test_a_sweep_shows_its_gaps_in_one_line() -> None:
    result = made({2: (0.75, 0.25, 1.0, 1.0), 4: (1.0, 0.0, 1.0, 1.0)})
    line = "SweepResult(task, m, deactivate, unsteered 0.50; gap by size 2: +0.50, 4: +1.00)"
    assert repr(result) == line
    assert repr(result.points[1]) == "SweepPoint(size 2, -: mean 0.250 [0.125, 0.375])"
    one_sided = SweepResult("task", "m", "both", 0.5, {}, {}, result.points[::2])
    assert repr(one_sided) == "SweepResult(task, m, both, unsteered 0.50; sizes 2, 4)"
