"""What a request says: read, refused, and the same again when it has travelled."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import DataError, MoELensError, MoEShape, PlanError, SteeringPlan
from moe_lens.engines import plan_args, stats_args
from moe_lens.engines.vllm.wishes import Wish, has_wishes, read_wish

PLAN = SteeringPlan(activate=[(0, 1)], deactivate=[(2, 5), (0, 1)], epsilon=0.5)
SHAPE = MoEShape("m", (0, 2), 8, 2)


def test_a_request_without_arguments_wants_nothing() -> None:
    for extra in (None, {}, {"kv_transfer_params": {}}):
        assert read_wish(extra) == Wish()
        assert not has_wishes(extra)
    assert Wish().salt == ""


@settings(deadline=None)
@given(
    strength=st.none() | st.floats(0, 50),
    positions=st.sampled_from([None, "prompt", "generated"]),
    stats=st.none() | st.text(min_size=1, max_size=5),
    prompt=st.integers(0, 10**6),
    ends=st.sets(st.integers(0, 500), min_size=2, max_size=8),
    plan=st.sampled_from([PLAN, PLAN.made_for(SHAPE), SteeringPlan()]),
)
def test_a_wish_survives_the_way_through_json(
    strength: Any, positions: Any, stats: Any, prompt: int, ends: set[int], plan: SteeringPlan
) -> None:
    in_order = sorted(ends)[: len(ends) // 2 * 2]
    span = list(zip(in_order[::2], in_order[1::2], strict=True))
    extra = plan_args(plan, strength=strength, positions=positions)
    if stats is not None:
        extra |= stats_args(stats, prompt, span)
    wish = read_wish(json.loads(json.dumps(extra)))
    assert wish.plan == plan
    assert (wish.strength, wish.positions, wish.stats) == (strength, positions, stats)
    assert stats is None or (wish.prompt, wish.span) == (prompt, tuple(span))
    again = read_wish(json.loads(json.dumps(wish.arguments())))
    assert again == wish
    assert again.salt == wish.salt


def test_the_salt_tells_apart_what_computes_differently_and_nothing_else() -> None:
    kinds: list[dict[str, Any]] = [
        plan_args(PLAN),
        plan_args(PLAN, strength=1.0),
        plan_args(PLAN, strength=2.0),
        plan_args(PLAN, positions="prompt"),
        plan_args(PLAN, positions="generated"),
        plan_args(SteeringPlan(PLAN.activate, PLAN.deactivate, 0.25)),
        plan_args(SteeringPlan(PLAN.activate)),
    ]
    salts = [read_wish(kind).salt for kind in kinds]
    assert len({*salts, ""}) == len(kinds) + 1
    assert [read_wish({**kind, **stats_args("s", 3)}).salt for kind in kinds] == salts
    assert read_wish(plan_args(SteeringPlan())).salt == read_wish(plan_args(None)).salt == ""


def test_infinite_strength_is_the_papers_transform() -> None:
    assert read_wish(plan_args(PLAN, strength=float("inf"))) == read_wish(plan_args(PLAN))


def test_a_soft_plan_stays_soft_unless_the_request_says_otherwise() -> None:
    soft = replace(PLAN, strength=1.5)
    wish = read_wish(json.loads(json.dumps(plan_args(soft))))
    assert (wish.plan, wish.strength) == (soft, 1.5)
    assert read_wish(wish.arguments()) == wish
    assert read_wish(plan_args(soft, strength=0.5)).strength == 0.5
    firm = read_wish({**plan_args(soft), "moe_strength": math.inf})
    assert firm == read_wish(plan_args(soft, strength=math.inf)) == read_wish(plan_args(PLAN))
    assert read_wish(firm.arguments()) == firm


def test_a_plan_for_unmet_tokens_only_is_refused() -> None:
    unmet = replace(PLAN, strength=1.5, only_unmet=True)
    for strength in (None, 2.0):
        with pytest.raises(PlanError, match="only_unmet"):
            plan_args(unmet, strength=strength)
    assert read_wish(plan_args(unmet, strength=math.inf)) == read_wish(plan_args(PLAN))


def test_plans_are_found_by_name_in_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    PLAN.save(plans / "doc.json")
    PLAN.save(tmp_path / "secret.json")
    assert read_wish({"moe_plan": "doc"}, plans).plan == PLAN
    for name in ("../secret", "secret", "doc.json", "", str(tmp_path / "secret"), "./doc"):
        with pytest.raises(PlanError, match=r"there are \['doc'\]"):
            read_wish({"moe_plan": name}, plans)
    with pytest.raises(PlanError, match="MOE_LENS_PLANS"):
        read_wish({"moe_plan": "doc"})


def test_a_named_plans_own_strength_gives_way_to_an_infinite_one(tmp_path: Path) -> None:
    replace(PLAN, strength=2.0, only_unmet=True).save(tmp_path / "doc.json")
    asked = plan_args("doc", strength=math.inf)
    assert json.loads(json.dumps(asked, allow_nan=False)) == asked  # as it travels
    assert read_wish(asked, tmp_path) == read_wish(plan_args(PLAN))
    with pytest.raises(PlanError, match="only_unmet"):
        read_wish(plan_args("doc"), tmp_path)


def test_the_default_plan_is_that_of_requests_which_say_nothing(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "doc.json")
    other = SteeringPlan(deactivate=[(1, 1)])
    assert read_wish({}, tmp_path, "doc").plan == PLAN
    assert read_wish(stats_args("s"), tmp_path, json.dumps(PLAN.to_json())).plan == PLAN
    assert read_wish(plan_args(other), tmp_path, "doc").plan == other
    assert read_wish(plan_args(None), tmp_path, "doc").plan is None
    assert read_wish({"moe_strength": 2.0}, tmp_path, "doc").strength == 2.0


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"moe_plans": "doc"}, "moe_plans"),
        ({"moe_plan": 3}, "moe_plan"),
        ({"moe_plan": "{"}, "no JSON"),
        ({"moe_plan": "{}"}, "kind"),
        ({"moe_plan": json.dumps({**PLAN.to_json(), "epsilon": 0.25})}, "damaged"),
        ({**plan_args(PLAN), "moe_strength": -1}, "moe_strength"),
        ({**plan_args(PLAN), "moe_strength": "2"}, "moe_strength"),
        ({**plan_args(PLAN), "moe_strength": float("nan")}, "moe_strength"),
        ({**plan_args(PLAN), "moe_positions": "last"}, "moe_positions"),
        ({"moe_strength": 1.0}, "give moe_plan"),
        ({"moe_positions": "prompt"}, "give moe_plan"),
        ({"moe_span": [0, 1]}, "give moe_stats"),
        ({"moe_prompt": 1}, "give moe_stats"),
        ({"moe_stats": ""}, "a name"),
        ({"moe_stats": 3}, "a name"),
        ({"moe_stats": "s", "moe_prompt": -1}, "moe_prompt"),
        ({"moe_stats": "s", "moe_prompt": 1.5}, "moe_prompt"),
        *(
            ({"moe_stats": "s", "moe_span": span}, "moe_span")
            for span in ([], [1], [3, 1], [0, 2, 2, 4], [-1, 2], "ab", [[0, 1]], [0.5, 2])
        ),
    ],
)
def test_what_makes_no_sense_is_refused(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(MoELensError, match=says):
        read_wish(extra)


def test_arguments_are_checked_where_they_are_written() -> None:
    with pytest.raises(PlanError, match="from 0 on"):
        plan_args(PLAN, strength=-1)
    with pytest.raises(DataError, match="moe_positions"):
        plan_args("doc", positions="last")
    with pytest.raises(DataError, match="moe_span"):
        stats_args("s", 0, [(3, 1)])
