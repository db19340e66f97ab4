"""SteeringPlan: what it accepts, what it picks, what it draws, and that a damaged file never loads."""

import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from moe_lens.detection.expert_scores import Evidence, ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.model.hooked_moe import HookedMoE, attach
from moe_lens.shape import MoEShape
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering import plan as steering_plan
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import MOE_LAYERS, hook_census, plain_bridge, tiny_model, tokens

Hooked = Callable[..., HookedMoE]
SHAPE = MoEShape("m", (1, 4), 6, 2)
PLAN = SteeringPlan([(1, 0)], [(4, 5), (4, 2)], 0.5, SHAPE)
REFUSED = (PlanError, TypeCheckError)  # in tests beartype may see a wrong type before the plan does

beartype_samples = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def scores(delta: Any, shape: MoEShape = SHAPE) -> ExpertScores:
    zeros = torch.zeros(len(shape.layers), shape.n_experts, dtype=torch.float64)
    counts = zeros.long()
    counts[:, : shape.top_k] = 1
    stats = RoutingStats(shape, 1, counts, zeros, zeros)
    return ExpertScores(torch.as_tensor(delta, dtype=torch.float64), stats, stats)


@st.composite
def deltas(draw: st.DrawFn) -> list[list[float]]:
    """Two layers of six experts; few different values, so that ties and zeros occur."""
    return draw(
        st.lists(
            st.lists(st.integers(-3, 3).map(lambda i: i / 4), min_size=6, max_size=6), min_size=2, max_size=2
        )
    )


@st.composite
def plans(draw: st.DrawFn) -> SteeringPlan:
    """Plans that fit their shape, up to the most that a layer can take."""
    n_experts = draw(st.integers(2, 7))
    shape = MoEShape(
        "m", draw(st.sampled_from([(0,), (1, 4), (0, 1, 2)])), n_experts, draw(st.integers(1, n_experts))
    )
    activate, deactivate = [], []
    for layer in shape.layers:
        order = draw(st.permutations(range(n_experts)))
        n_deactivate = draw(st.integers(0, shape.max_deactivated))
        n_activate = draw(st.integers(0, shape.top_k))
        deactivate += [(layer, expert) for expert in order[:n_deactivate]]
        activate += [(layer, expert) for expert in order[n_deactivate:][:n_activate]]
    return SteeringPlan(activate, deactivate, 0.01, shape)


# A value


def test_equal_plans_are_equal_and_hash_alike() -> None:
    again = SteeringPlan(([1, 0],), [[4, 5], (4, 2)], 0.5, MoEShape("m", (1, 4), 6, 2))
    assert again == PLAN
    assert hash(again) == hash(PLAN)
    assert len({again, PLAN, SteeringPlan(), SteeringPlan([(1, 0)])}) == 3
    assert all(type(number) is int for expert in again.deactivate for number in expert)


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAN, activate=((1, 1),)),
        replace(PLAN, deactivate=()),
        replace(PLAN, epsilon=0.1),
        replace(PLAN, shape=None),
    ],
    ids=["activate", "deactivate", "epsilon", "shape"],
)
def test_plans_differ_where_a_field_does(other: SteeringPlan) -> None:
    assert other != PLAN


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAN.epsilon = 1.0  # type: ignore[misc]
    assert copy.deepcopy(PLAN) == PLAN


def test_length_and_the_empty_plan() -> None:
    assert len(PLAN) == 3
    assert len(SteeringPlan()) == 0
    assert len(SteeringPlan([(0, 1)], [(0, 1)])) == 1


@pytest.mark.parametrize("field", ["activate", "deactivate"])
@pytest.mark.parametrize(
    "experts",
    [
        [(1, 2), (1, 2)],
        [(-1, 2)],
        [(1, -2)],
        [(1, 2.5)],
        [(1, True)],
        [(False, 1)],
        [(1, "2")],
        [(1, None)],
        [(1, math.nan)],
        [(1, math.inf)],
        [(1,)],
        [(1, 2, 3)],
        [((1, 2), 3)],
        ["12"],
        [()],
    ],
    ids=str,
)
def test_what_names_no_expert_is_refused_by_its_field(field: str, experts: Any) -> None:
    with pytest.raises(REFUSED, match=field):
        SteeringPlan(**{field: experts})


@pytest.mark.parametrize("epsilon", [0.0, -0.01, math.nan, math.inf, -math.inf])
def test_epsilon_must_be_finite_and_positive(epsilon: float) -> None:
    with pytest.raises(PlanError, match="epsilon"):
        SteeringPlan([(0, 0)], epsilon=epsilon)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"activate": [(1, 6)]}, "expert 6 of layer 1"),
        ({"deactivate": [(4, 9)]}, "expert 9 of layer 4"),
        ({"activate": [(2, 0)]}, "layer 2"),
        ({"deactivate": [(0, 0)]}, "layer 0"),
        ({"activate": [(1, 0), (1, 1), (1, 2)]}, "3 experts in layer 1, at most 2"),
        ({"deactivate": [(4, e) for e in range(5)]}, "5 experts in layer 4, at most 4"),
    ],
)
def test_what_the_model_cannot_do_is_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=f"{next(iter(kwargs))}.*{says}"):
        SteeringPlan(**kwargs, shape=SHAPE)
    with pytest.raises(PlanError, match=says):
        SteeringPlan(**kwargs).made_for(SHAPE)


def test_the_most_that_fits_is_accepted() -> None:
    plan = SteeringPlan([(1, 0), (1, 1)], [(1, e) for e in range(2, 6)], shape=SHAPE)
    assert len(plan) == 6


def test_activations_that_deactivation_overrules_take_no_room() -> None:
    SteeringPlan([(1, 0), (1, 1), (1, 2)], [(1, 2)], shape=SHAPE)


# From scores


@settings(max_examples=60, deadline=None)
@given(deltas(), st.integers(0, 6), st.integers(0, 6))
def test_picks_the_most_positive_and_the_most_negative(
    delta: Any, n_activate: int, n_deactivate: int
) -> None:
    assume(n_activate or n_deactivate)
    flat = {(layer, e): delta[row][e] for row, layer in enumerate((1, 4)) for e in range(6)}
    positive = sorted(
        (expert for expert in flat if flat[expert] > 0), key=lambda expert: (-flat[expert], expert)
    )
    negative = sorted(
        (expert for expert in flat if flat[expert] < 0), key=lambda expert: (flat[expert], expert)
    )
    wide = replace(SHAPE, n_experts=6, top_k=3)  # up to 3 of each sign a layer
    fits = (
        n_activate <= len(positive)
        and n_deactivate <= len(negative)
        and all(
            number <= 3
            for chosen in (positive[:n_activate], negative[:n_deactivate])
            for number in Counter(layer for layer, _ in chosen).values()
        )
    )
    if not fits:
        with pytest.raises(PlanError, match="activate"):
            SteeringPlan.from_scores(scores(delta, wide), n_activate, n_deactivate)
        return
    plan = SteeringPlan.from_scores(scores(delta, wide), n_activate, n_deactivate, epsilon=0.2)
    assert plan == SteeringPlan(positive[:n_activate], negative[:n_deactivate], 0.2, wide)


DELTA = [[0.9, 0.8, 0.7, 0.6, -0.1, -0.2], [0.5, -0.9, -0.8, -0.7, -0.6, -0.5]]


@pytest.mark.parametrize(
    ("name", "number"), [("n_activate", 6), ("n_deactivate", 8), ("n_activate", -1), ("n_deactivate", -3)]
)
def test_more_experts_than_have_the_sign_are_refused(name: str, number: int) -> None:
    kwargs: Any = {name: number, "on_excess": "drop"}
    with pytest.raises(PlanError, match=name):
        SteeringPlan.from_scores(scores(DELTA), **kwargs)


@pytest.mark.parametrize(("name", "number"), [("n_activate", 3), ("n_deactivate", 7)])
def test_an_excess_in_one_layer_is_refused(name: str, number: int) -> None:
    kwargs: Any = {name: number}
    with pytest.raises(PlanError, match="at most"):
        SteeringPlan.from_scores(scores(DELTA), **kwargs)
    with pytest.raises(PlanError, match="at most"):
        SteeringPlan.from_scores(scores(DELTA), **kwargs, on_excess="raise")


def test_drop_keeps_the_higher_ranks_and_says_what_it_dropped() -> None:
    with pytest.warns(UserWarning, match=re.escape("activate: dropped 2")) as caught:
        plan = SteeringPlan.from_scores(scores(DELTA), n_activate=5, n_deactivate=7, on_excess="drop")
    assert plan.activate == ((1, 0), (1, 1), (4, 0))
    assert plan.deactivate == ((4, 1), (4, 2), (4, 3), (4, 4), (1, 5), (1, 4))
    said = " ".join(str(warning.message) for warning in caught)
    assert "[(1, 2), (1, 3)]" in said
    assert "[(4, 5)]" in said


def test_drop_without_excess_is_silent_and_changes_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = SteeringPlan.from_scores(scores(DELTA), 2, 4, on_excess="drop")
    assert plan == SteeringPlan.from_scores(scores(DELTA), 2, 4)


def test_the_opposite_contrast_gives_the_opposite_plan() -> None:
    plan = SteeringPlan.from_scores(scores(DELTA), 2, 2)
    opposite = SteeringPlan.from_scores(-scores(DELTA), 2, 2)
    assert (opposite.activate, opposite.deactivate) == (plan.deactivate, plan.activate)


# By significance


def with_q(delta: Any, q: Any) -> ExpertScores:
    tensor = torch.as_tensor(q, dtype=torch.float64)
    plain = scores(delta)
    evidence = Evidence(plain.delta, plain.delta, tensor, tensor, 0.95, 10, 10, 0, ("a", "b"), ("t", "t"))
    return replace(plain, evidence=evidence)


def by_rank(delta: Any, sign: int, keep: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    found = [
        (-sign * delta[row][e], layer, e)
        for row, layer in enumerate((1, 4))
        for e in range(6)
        if delta[row][e] * sign > 0 and keep(row, e)
    ]
    return [(layer, e) for _, layer, e in sorted(found)]


@settings(max_examples=100, deadline=None)
@given(
    deltas(),
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=2, max_size=2),
    st.sampled_from([0.01, 0.05, 1.0]),
)
def test_q_takes_every_significant_expert_that_fits_and_names_the_others(
    delta: Any, levels: Any, q: float
) -> None:
    values = [[(0.005, 0.01, 0.03, 0.05, 0.4)[level] for level in row] for row in levels]
    kept, dropped = {}, []
    for name, sign, room in (("activate", 1, 2), ("deactivate", -1, 4)):
        own = by_rank(delta, sign, lambda row, e: values[row][e] <= q)
        kept[name] = [x for i, x in enumerate(own) if sum(y[0] == x[0] for y in own[:i]) < room]
        dropped += [x for x in own if x not in kept[name]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = SteeringPlan.from_scores(with_q(delta, values), q=q)
    assert plan == SteeringPlan(kept["activate"], kept["deactivate"], shape=SHAPE)
    said = " ".join(str(warning.message) for warning in caught if warning.category is UserWarning)
    assert all(str(expert) in said for expert in dropped)
    assert ("dropped" in said) == bool(dropped)


def test_a_number_and_q_take_the_first_significant_ones() -> None:
    q = [[0.2, 0.01, 0.2, 0.02, 0.01, 0.3], [0.01, 0.2, 0.04, 0.01, 0.2, 0.05]]
    plan = SteeringPlan.from_scores(with_q(DELTA, q), 2, 3, q=0.05)
    assert plan == SteeringPlan([(1, 1), (1, 3)], [(4, 2), (4, 3), (4, 5)], shape=SHAPE)
    assert SteeringPlan.from_scores(with_q(DELTA, q), 0, 1, q=0.05).deactivate == ((4, 2),)
    assert SteeringPlan.from_scores(with_q(DELTA, q), 0, 1).deactivate == ((4, 1),)
    some = SteeringPlan.from_scores(with_q(DELTA, q), n_deactivate="all", q=0.05)
    assert some == SteeringPlan((), [(4, 2), (4, 3), (4, 5), (1, 4)], shape=SHAPE)
    one = SteeringPlan.from_scores(with_q(DELTA, q), n_activate=1, q=0.05)  # of the other sign none
    assert one == SteeringPlan([(1, 1)], (), shape=SHAPE)


def test_all_without_q_takes_every_sign_that_fits() -> None:
    with pytest.warns(UserWarning, match=re.escape("activate: dropped 2 experts beyond 2")):
        plan = SteeringPlan.from_scores(scores(DELTA), n_activate="all")
    assert plan == SteeringPlan([(1, 0), (1, 1), (4, 0)], (), shape=SHAPE)


def test_more_than_are_significant_is_refused() -> None:
    q = [[0.2] * 6, [0.01, 0.2, 0.04, 0.01, 0.2, 0.05]]
    with pytest.raises(PlanError, match=r"n_deactivate=4, but only 3 .* q-value up to 0.05"):
        SteeringPlan.from_scores(with_q(DELTA, q), n_deactivate=4, q=0.05)
    with pytest.raises(PlanError, match=r"n_activate=2, but only 1"):
        SteeringPlan.from_scores(with_q(DELTA, q), 2, 0, q=0.05)


def test_an_excess_of_a_number_asked_for_is_still_refused() -> None:
    q = [[0.01] * 6] * 2
    with pytest.raises(PlanError, match="at most 2"):
        SteeringPlan.from_scores(with_q(DELTA, q), 3, 0, q=0.05)


@pytest.mark.parametrize("q", [0.0, -0.1, 1.5, math.nan, math.inf, True, "0.05"])
def test_q_is_a_rate(q: Any) -> None:
    with pytest.raises(REFUSED, match="q"):
        SteeringPlan.from_scores(with_q(DELTA, [[0.01] * 6] * 2), 1, 1, q=q)


def test_scores_without_evidence_have_no_q() -> None:
    with pytest.raises(PlanError, match="no q-values"):
        SteeringPlan.from_scores(scores(DELTA), q=0.05)


# The other way round


@beartype_samples
@settings(max_examples=60, deadline=None)
@given(plans())
def test_reversed_swaps_or_refuses_and_twice_is_the_plan(plan: SteeringPlan) -> None:
    shape = plan.shape
    assert shape is not None
    fits = all(n <= shape.top_k for n in numbers_by_layer(plan.deactivate).values()) and all(
        n <= shape.max_deactivated for n in numbers_by_layer(plan.activate).values()
    )
    if not fits:
        with pytest.raises(PlanError, match="at most"):
            plan.reversed()
        return
    assert plan.reversed() == SteeringPlan(plan.deactivate, plan.activate, plan.epsilon, shape)
    assert plan.reversed().reversed() == plan


def test_reversed_leaves_overruled_activations_out() -> None:
    plan = SteeringPlan([(1, 0), (1, 1)], [(1, 1)], 0.2, SHAPE)
    assert plan.reversed() == SteeringPlan([(1, 1)], [(1, 0)], 0.2, SHAPE)


# Random controls


def numbers_by_layer(experts: Any) -> Counter[int]:
    return Counter(layer for layer, _ in experts)


@beartype_samples
@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 10**6), st.booleans())
def test_random_plans_have_the_same_numbers_and_fit(
    plan: SteeringPlan, seed: int, layer_matched: bool
) -> None:
    control = plan.random_like(seed=seed, layer_matched=layer_matched)
    assert plan.shape is not None
    assert (len(control.activate), len(control.deactivate)) == (len(plan.activate), len(plan.deactivate))
    assert (control.epsilon, control.shape) == (plan.epsilon, plan.shape)
    assert not set(control.activate) & set(control.deactivate)
    assert all(number <= plan.shape.top_k for number in numbers_by_layer(control.activate).values())
    assert all(
        number <= plan.shape.max_deactivated for number in numbers_by_layer(control.deactivate).values()
    )
    assert all(
        layer in plan.shape.layers and 0 <= expert < plan.shape.n_experts
        for layer, expert in control.activate + control.deactivate
    )
    if layer_matched:
        assert numbers_by_layer(control.activate) == numbers_by_layer(plan.activate)
        assert numbers_by_layer(control.deactivate) == numbers_by_layer(plan.deactivate)
    assert control == plan.random_like(seed=seed, layer_matched=layer_matched)


@pytest.mark.parametrize("layer_matched", [True, False])
def test_seeds_reach_every_expert_about_equally_often(layer_matched: bool) -> None:
    plan = SteeringPlan([(0, 1), (3, 2)], [(3, 4)], shape=MoEShape("m", (0, 3), 5, 2))
    drawn = [plan.random_like(seed=seed, layer_matched=layer_matched) for seed in range(500)]
    counts = Counter(expert for control in drawn for expert in control.activate)
    assert set(counts) == {(layer, e) for layer in (0, 3) for e in range(5)}
    assert all(60 < number < 140 for number in counts.values())  # 100 expected, sd 9
    assert {control.deactivate[0][0] for control in drawn} == ({3} if layer_matched else {0, 3})


def test_a_plan_without_shape_needs_one_to_draw_from() -> None:
    plan = SteeringPlan([(1, 0)])
    with pytest.raises(PlanError, match="shape"):
        plan.random_like(seed=0)
    assert plan.random_like(seed=0, shape=SHAPE).shape == SHAPE
    with pytest.raises(PlanError, match="another model"):
        PLAN.random_like(seed=0, shape=replace(SHAPE, model="other"))


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3", "deepseek_v2_grouped", "deepseek_v4_hash"])
@pytest.mark.parametrize("layer_matched", [True, False])
def test_draws_from_a_model_are_obeyed_by_its_routers(
    hooked: Hooked, recipe: str, layer_matched: bool
) -> None:
    model = hooked(recipe)
    plan = SteeringPlan([(1, 0), (1, 1)], [(1, 4), (2, 0), (2, 3)], 0.2)
    if recipe == "olmoe":  # no rule refuses anything: the draw is that of the shape
        by_shape = plan.random_like(seed=3, layer_matched=layer_matched, shape=model.moe_shape)
        assert plan.random_like(seed=3, layer_matched=layer_matched, model=model) == by_shape
    for seed in range(15):
        control = plan.random_like(seed=seed, layer_matched=layer_matched, model=model)
        assert control == plan.random_like(seed=seed, layer_matched=layer_matched, model=model)
        assert (len(control.activate), len(control.deactivate)) == (2, 3)
        assert (control.epsilon, control.shape) == (0.2, model.moe_shape)
        if layer_matched:
            assert numbers_by_layer(control.activate) == {1: 2}
            assert numbers_by_layer(control.deactivate) == {1: 1, 2: 2}
        model.run_with_hooks(tokens(1, 3), fwd_hooks=steer_hooks(control))  # a rule that cannot obey raises


def test_a_layer_that_no_draw_can_steer_is_named(hooked: Hooked) -> None:
    plan = SteeringPlan([(0, 1)])  # routed by a table
    with pytest.raises(PlanError, match="layer 0"):
        plan.random_like(seed=0, layer_matched=True, model=hooked("deepseek_v4_hash"))
    with pytest.raises(PlanError, match="seed"):
        plan.random_like(seed=-1, model=hooked("olmoe"))


# Files


@beartype_samples
@settings(max_examples=20, deadline=None)
@given(plan=plans(), epsilon=st.floats(*steering_plan.EPSILON_RANGE), with_shape=st.booleans())
def test_a_saved_plan_loads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, plan: SteeringPlan, epsilon: float, with_shape: bool
) -> None:
    plan = SteeringPlan(plan.activate, plan.deactivate, epsilon, plan.shape if with_shape else None)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    loaded = SteeringPlan.load(path)
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert os.listdir(path.parent) == ["plan.json"]


def test_the_file_is_json_with_a_version_and_the_model(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "p")
    content = json.loads((tmp_path / "p").read_text())
    assert content["schema"] == 2
    assert content["shape"] == {"model": "m", "layers": [1, 4], "n_experts": 6, "top_k": 2}
    assert (content["activate"], content["deactivate"]) == ([[1, 0]], [[4, 5], [4, 2]])


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "whole")
    raw = (tmp_path / "whole").read_bytes().rstrip()  # the last newline is no part of the JSON
    for length in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(PlanError, match="cut"):
            SteeringPlan.load(tmp_path / "cut")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> str:
        raise OSError("No space left on device")

    PLAN.save(tmp_path / "p")
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(DataError, match="No space"):
        SteeringPlan().save(tmp_path / "p")
    assert os.listdir(tmp_path) == ["p"]
    assert SteeringPlan.load(tmp_path / "p") == PLAN


REMOVED = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, REMOVED) for field in ("kind", "schema", "activate", "deactivate", "epsilon", "shape")],
        ("kind", "moe_lens.RoutingStats"),
        ("schema", 3),
        ("schema", "1"),
        ("extra", 1),
        ("activate", None),
        ("activate", "all"),
        ("activate", {"1": 0}),
        ("activate", [[1, 0], [1, 0]]),
        ("activate", [[1, 6]]),
        ("activate", [[2, 0]]),
        ("activate", [[1, 0.5]]),
        ("activate", [[1, math.inf]]),
        ("activate", [[1, 0], [1, 1], [1, 2]]),
        ("deactivate", [[4]]),
        ("deactivate", [[4, "5"]]),
        ("deactivate", [4, 5]),
        ("deactivate", [[4, True]]),
        ("deactivate", [[4, e] for e in range(5)]),
        ("deactivate", [[4, [5]]]),
        ("epsilon", 0),
        ("epsilon", -1.0),
        ("epsilon", math.nan),
        ("epsilon", math.inf),
        pytest.param("epsilon", 10**400, id="epsilon-10**400"),
        ("shape", "m"),
        ("shape", []),
        ("shape.model", 3),
        ("shape.model", REMOVED),
        ("shape.layers", []),
        ("shape.layers", [4, 1]),
        ("shape.layers", [1, 1, 4]),
        ("shape.layers", [1, "4"]),
        ("shape.layers", [1, -4]),
        ("shape.layers", [1, math.inf]),
        ("shape.layers", 2),
        ("shape.n_experts", 5),
        ("shape.n_experts", 0),
        ("shape.n_experts", 6.0),
        ("shape.n_experts", True),
        ("shape.top_k", 0),
        ("shape.top_k", 7),
        ("shape.top_k", None),
        ("shape.top_k", REMOVED),
    ],
)
def test_an_altered_field_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    PLAN.save(tmp_path / "altered.json")
    content = json.loads((tmp_path / "altered.json").read_text())
    holder = content["shape"] if "." in field else content
    name = field.split(".")[-1]
    del content["digest"]  # else every change would be damage, whatever the field
    if value is REMOVED:
        del holder[name]
    else:
        holder[name] = value
    (tmp_path / "altered.json").write_text(json.dumps(content))
    with pytest.raises(REFUSED) as caught:
        SteeringPlan.load(tmp_path / "altered.json")
    said = str(caught.value)
    assert "altered.json" in said or isinstance(caught.value, TypeCheckError)
    # fewer experts than the plan names is the plan's fault as much as the shape's: either may be named
    assert name in said or (field == "shape.n_experts" and "expert" in said)


OLD = {
    "kind": "moe_lens.SteeringPlan",
    "schema": 1,
    "activate": [[1, 0]],
    "deactivate": [[4, 5], [4, 2]],
    "epsilon": 0.5,
    "shape": {"model": "m", "layers": [1, 4], "n_experts": 6, "top_k": 2},
}


@pytest.mark.parametrize("schema", [1, 2])
def test_files_of_older_versions_and_files_written_by_hand_are_read(tmp_path: Path, schema: int) -> None:
    (tmp_path / "p").write_text(json.dumps({**OLD, "schema": schema}, indent=2))
    assert SteeringPlan.load(tmp_path / "p") == PLAN
    (tmp_path / "p").write_text(json.dumps({**OLD, "schema": schema, "shape": None, "epsilon": 1}))
    assert SteeringPlan.load(tmp_path / "p") == replace(PLAN, shape=None, epsilon=1.0)


def test_equal_plans_give_equal_bytes_and_the_file_states_the_plans_digest(tmp_path: Path) -> None:
    again = SteeringPlan(np.array([[1, 0]]), ([4, 5], [4, 2]), np.float64(0.5), SHAPE)
    PLAN.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    content = {name: value for name, value in OLD.items() if name not in ("kind", "schema")}
    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert PLAN.digest == again.digest == json.loads((tmp_path / "a").read_text())["digest"] == expected
    others = [replace(PLAN, epsilon=0.4), replace(PLAN, shape=None), PLAN.reversed(), SteeringPlan()]
    assert len({PLAN.digest, *(other.digest for other in others)}) == 5


def test_a_change_that_the_digest_does_not_know_of_is_damage(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "p")
    content = json.loads((tmp_path / "p").read_text())
    content["deactivate"] = [[4, 5], [4, 3]]
    (tmp_path / "p").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="digest"):
        SteeringPlan.load(tmp_path / "p")
    del content["digest"]
    (tmp_path / "p").write_text(json.dumps(content))
    assert SteeringPlan.load(tmp_path / "p").deactivate == ((4, 5), (4, 3))


def test_a_plan_shows_itself_in_one_line_and_in_a_table() -> None:
    plan = SteeringPlan([(1, 0)], [(4, 5), (4, 2)], 0.5, SHAPE)
    assert repr(plan) == (
        "SteeringPlan(activates 1, deactivates 2 experts in layers [1, 4] of m, epsilon 0.5)"
    )
    assert plan.to_dataframe().to_numpy().tolist() == [
        [1, 0, "activate"],
        [4, 5, "deactivate"],
        [4, 2, "deactivate"],
    ]
    assert "<table" in plan._repr_html_()


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"plan"', "{}", "not json", "[" * 100_000, "\x00", "9" * 5000]
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(PlanError, match=r"other\.json"):
        SteeringPlan.load(tmp_path / "other.json")


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    for name in ("missing", "folder", "bytes"):
        with pytest.raises(PlanError, match=name):
            SteeringPlan.load(tmp_path / name)


# On a model it was not made for


def ways_of_applying(model: Any, plan: SteeringPlan) -> list[Callable[[], Any]]:
    hooks = steer_hooks(plan)

    def in_context() -> None:
        with model.hooks(hooks):
            model(tokens())

    def added() -> None:
        for name, hook in hooks:
            model.add_hook(name, hook)
        model(tokens())

    return [lambda: model.run_with_hooks(tokens(), fwd_hooks=hooks), in_context, added]


@pytest.mark.parametrize("how", range(3), ids=["run_with_hooks", "hooks", "add_hook"])
@pytest.mark.parametrize("plain", [False, True], ids=["HookedMoE", "attached"])
@pytest.mark.parametrize("fault", ["model", "layers", "n_experts", "top_k", "layer", "expert", "too many"])
def test_a_plan_for_another_model_never_starts_the_forward(
    hooked: Hooked, how: int, plain: bool, fault: str
) -> None:
    model = attach(plain_bridge(tiny_model("qwen2_moe"))) if plain else hooked("qwen2_moe")
    shape = hooked("qwen2_moe").moe_shape if not plain else _shape_of(model)
    plan = {
        "model": SteeringPlan([(0, 1)], shape=replace(shape, model="other")),
        "layers": SteeringPlan([(0, 1)], shape=replace(shape, layers=(0, 1, 2, 3))),
        "n_experts": SteeringPlan([(0, 1)], shape=replace(shape, n_experts=64)),
        "top_k": SteeringPlan([(0, 1)], shape=replace(shape, top_k=4)),
        "layer": SteeringPlan(deactivate=[(0, 1), (1, 1)]),  # layer 1 is dense
        "expert": SteeringPlan(deactivate=[(0, 7)]),
        "too many": SteeringPlan(deactivate=[(0, e) for e in range(6)]),
    }[fault]
    forwards: list[int] = []
    handle = model.original_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    before = hook_census(model)
    try:
        with pytest.raises(Exception, match=r"model|layer|expert") as caught:
            ways_of_applying(model, plan)[how]()
    finally:
        handle.remove()
    assert type(caught.value).__module__ == "moe_lens.errors"
    assert forwards == []
    model.reset_hooks()
    assert before.items() >= hook_census(model).items()


def _shape_of(bridge: Any) -> MoEShape:
    from moe_lens.model.registration import moe_shape

    return moe_shape(bridge)


def test_a_refused_plan_leaves_no_hook(hooked: Hooked) -> None:
    model = hooked("olmoe")
    before = hook_census(model)
    hooks = [*steer_hooks(SteeringPlan([(0, 1)])), *steer_hooks(SteeringPlan([(1, 99)]))]
    with pytest.raises(PlanError, match="99"):
        model.run_with_hooks(tokens(), fwd_hooks=hooks)
    assert hook_census(model) == before


def test_made_for_allows_the_transfer(hooked: Hooked) -> None:
    model = hooked("olmoe")
    foreign = SteeringPlan([(0, 1)], [(2, 3)], 0.3, MoEShape("other", (0, 2), 8, 2))
    with pytest.raises(PlanError, match="made_for"):
        model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(foreign))
    moved = foreign.made_for(model.moe_shape)
    assert (moved.activate, moved.deactivate, moved.epsilon) == (((0, 1),), ((2, 3),), 0.3)
    assert moved.shape == model.moe_shape
    model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(moved))
    with pytest.raises(PlanError, match="expert 7"):
        SteeringPlan([(0, 7)], shape=foreign.shape).made_for(model.moe_shape)


def test_hooks_name_the_layers_of_the_plan_once_in_order() -> None:
    plan = SteeringPlan([(7, 1), (2, 0)], [(2, 1), (0, 4)])
    assert [name for name, _ in steer_hooks(plan)] == [
        f"blocks.{n}.mlp.hook_router_logits" for n in (0, 2, 7)
    ]
    assert steer_hooks(SteeringPlan()) == []
    assert MOE_LAYERS["qwen2_moe"] == (0, 2, 3)


@pytest.mark.parametrize("number", [2.0, True, "1"])
def test_only_whole_numbers_count_experts(number: Any) -> None:
    with pytest.raises((PlanError, TypeCheckError), match=r"n_deactivate|from_scores"):
        SteeringPlan.from_scores(scores(torch.zeros(len(SHAPE.layers), SHAPE.n_experts)), n_deactivate=number)


def test_none_means_none_without_q() -> None:
    assert SteeringPlan.from_scores(scores(DELTA), None, 2) == SteeringPlan.from_scores(scores(DELTA), 0, 2)


@pytest.mark.parametrize("numbers", [(), (0, 0), (None, 0), (0, None)])
def test_a_plan_that_would_steer_nothing_is_refused(numbers: Any) -> None:
    with pytest.raises(PlanError, match=r"names no expert; ask for some with n_activate="):
        SteeringPlan.from_scores(scores(DELTA), *numbers)
    with pytest.raises(PlanError, match=r"names no expert"):
        SteeringPlan.from_scores(scores(DELTA), 0, 0, stable=0.5)


def test_all_of_none_is_an_empty_plan_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="names no expert"):
        assert len(SteeringPlan.from_scores(scores(torch.zeros(2, 6)), "all")) == 0


def test_experts_may_be_given_layer_by_layer() -> None:
    plan = SteeringPlan(activate={4: [5, 0]}, deactivate={0: [1], 2: range(2)})
    assert plan == SteeringPlan(activate=[(4, 5), (4, 0)], deactivate=[(0, 1), (2, 0), (2, 1)])
    assert len(SteeringPlan({}, {3: []})) == 0


def test_mappings_of_other_things_are_refused() -> None:
    """In a process of its own: the tests' type checks would refuse them first."""
    wrong = {
        "{0: 1}": "mapping from layers",
        "{'0': [1]}": "whole numbers",
        "{0: [1, 1]}": "more than once",
        "{0: ['a']}": "whole",
    }
    code = "from moe_lens import SteeringPlan\n" + "\n".join(
        f"try: SteeringPlan(deactivate={mapping})\nexcept Exception as e: print(type(e).__name__, e)"
        for mapping in wrong
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, words in zip(done.stdout.splitlines(), wrong.values(), strict=True):
        assert line.startswith("PlanError")
        assert words in line


def test_numpy_and_torch_integers_are_numbers() -> None:
    plan = SteeringPlan(np.array([[0, 1]]), torch.tensor([[2, 3], [2, 4]]), np.float32(0.5))
    assert plan == SteeringPlan([(0, 1)], [(2, 3), (2, 4)], 0.5)
    assert all(type(number) is int for expert in plan.activate + plan.deactivate for number in expert)


def test_a_plan_from_some_of_the_layers_fits_the_whole_model() -> None:
    model = MoEShape("m", (0, 1, 2), 8, 2)
    SteeringPlan(deactivate=[(1, 0)], shape=replace(model, layers=(1,))).check_fits(model)
    SteeringPlan(deactivate=[(1, 0)], shape=replace(model, model="unknown")).check_fits(model)
    with pytest.raises(PlanError, match="layers"):
        SteeringPlan(deactivate=[(5, 0)], shape=replace(model, layers=(1, 5))).check_fits(model)
