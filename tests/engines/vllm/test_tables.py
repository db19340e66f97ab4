"""Rows of a batch and the requests they belong to: who is steered, and what is counted once."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import DataError, MoEShape, PlanError, SteeringPlan
from moe_lens.engines import plan_args, stats_args
from moe_lens.engines.vllm.tables import check_fits
from tests.engines.vllm.fakes import LAYERS, N_EXPERTS, SHAPE, TOP_K, Layer, hidden, state, step, tables

PUT_IN = SteeringPlan(activate=[(layer, e) for layer in LAYERS for e in (0, 5)])
KEEP_OUT = SteeringPlan(deactivate=[(layer, e) for layer in LAYERS for e in (0, 1, 2, 3)])


def chosen(name: str, positions: range, layer: int) -> list[set[int]]:
    """The experts of tokens that nobody steers, by another formula."""
    logits = hidden(name, positions) @ Layer(layer).gate.T
    return [set(row.argsort(descending=True)[:TOP_K].tolist()) for row in logits]


def test_each_row_runs_under_its_own_requests_plan() -> None:
    made = tables()
    states = {"a": state(3, plan_args(PUT_IN)), "b": state(4), "c": state(2, plan_args(KEEP_OUT))}
    experts = step(made, [("b", 4, 0), ("a", 3, 0), ("c", 2, 0)], states)
    for layer in LAYERS:
        rows = [set(row) for row in experts[layer].tolist()]
        assert rows[:4] == chosen("b", range(4), layer)
        assert rows[4:7] == [{0, 5}] * 3
        assert rows[7:] == [{4, 5}] * 2
    experts = step(made, [("c", 1, 2), ("b", 1, 4)], states, finished=["a"])
    assert {tuple(sorted(experts[layer][0].tolist())) for layer in LAYERS} == {(4, 5)}
    assert [set(experts[layer][1].tolist()) for layer in LAYERS] == [
        chosen("b", range(4, 5), layer)[0] for layer in LAYERS
    ]


@pytest.mark.parametrize("phase", ["prompt", "generated"])
def test_phases_are_told_by_position_however_the_prompt_is_cut(phase: str) -> None:
    made, states = tables(), {"a": state(5, plan_args(PUT_IN, positions=phase))}
    found = []
    for n, start in ((2, 0), (2, 2), (3, 4), (1, 7)):  # a preempted request runs prompt and new tokens again
        found += step(made, [("a", n, start)], states)[LAYERS[0]].tolist()
    steered = [set(row) == {0, 5} for row in found]
    free = [experts == {0, 5} for experts in chosen("a", range(8), LAYERS[0])]
    wanted = [(p < 5) == (phase == "prompt") for p in range(8)]
    assert steered == [w or f for w, f in zip(wanted, free, strict=True)]
    assert not all(steered)


def test_more_plans_than_run_at_once_take_turns_in_the_tables() -> None:
    made = tables(n_plans=2)
    pairs = [(i, j) for i in range(N_EXPERTS) for j in range(i)]
    for number, (i, j) in enumerate(pairs):
        name = chr(ord("a") + number)
        plan = SteeringPlan(activate=[(layer, e) for layer in LAYERS for e in (i, j)])
        states = {"Z": state(2, plan_args(PUT_IN)), name: state(2, plan_args(plan))}
        experts = step(made, [(name, 2, 0), ("Z", 1, number)], states, finished=[chr(ord(name) - 1)])
        for layer in LAYERS:
            assert [set(row) for row in experts[layer].tolist()] == [{i, j}, {i, j}, {0, 5}]
    assert len(made.slots) == 2


def test_a_forward_for_no_request_is_not_steered_and_not_counted() -> None:
    made, states = tables(), {"a": state(3, {**plan_args(PUT_IN), **stats_args("s")})}
    made.place([("a", 3, 0)], states)
    made.clear()
    layer = made.layers[LAYERS[0]]
    rows = [set(row) for row in layer.run(hidden("a", range(3))).tolist()]
    made.count()
    assert rows == chosen("a", range(3), LAYERS[0])
    assert made.counts.names() == []


@settings(deadline=None, max_examples=30)
@given(
    cuts=st.lists(st.integers(1, 11), max_size=4, unique=True),
    again=st.integers(0, 11),
    seed=st.integers(0, 9),
)
def test_every_token_of_a_span_counts_once_however_it_runs(cuts: list[int], again: int, seed: int) -> None:
    made, span = tables(), [(1, 4), (6, 11)]
    states = {"a": state(12, stats_args("s", 0, span)), "b": state(5, stats_args("s", 1)), "c": state(3)}
    edges = [0, *sorted(cuts), 12]
    chunks = list(pairwise(edges))
    chunks = [*chunks[: seed % (len(chunks) + 1)], (0, again + 1), *chunks]  # preempted, from the start
    for number, (first, end) in enumerate(chunks):
        batch = [("a", end - first, first), ("c", 1, number)]
        step(made, batch if number else [("b", 5, 0), *batch], states)
    stats = made.counts.stats("s")
    positions = {"a": [1, 2, 3, 6, 7, 8, 9, 10], "b": list(range(5))}
    if max(end for _, end in chunks) < 12:
        return
    assert stats.per_prompt is not None
    assert stats.per_prompt.n_tokens.tolist() == [8, 5]
    for row, name in enumerate("ab"):
        for at, layer in enumerate(LAYERS):
            counts = [0] * N_EXPERTS
            for position in positions[name]:
                for expert in chosen(name, range(position, position + 1), layer)[0]:
                    counts[expert] += 1
            assert stats.per_prompt.counts[row, at].tolist() == counts


def test_sums_are_those_of_each_token_by_hand() -> None:
    made = tables()
    states = {"a": state(4, {**plan_args(KEEP_OUT), **stats_args("s")}), "b": state(3, stats_args("other"))}
    step(made, [("a", 4, 0), ("b", 3, 0)], states)
    stats = made.counts.stats("s")
    assert (stats.shape, stats.n_tokens) == (SHAPE, 4)
    assert stats.entropy_sums is not None
    for at, layer in enumerate(LAYERS):
        p = made.layers[layer].moe_lens_logits[:4].double().softmax(-1)
        assert set(p.topk(2).indices.flatten().tolist()) == {4, 5}
        torch.testing.assert_close(stats.probability_sums[at], p.sum(0), rtol=1e-5, atol=1e-6)
        kept = torch.where(p >= p.topk(2).values[:, -1:], p, 0.0)
        torch.testing.assert_close(stats.weight_sums[at], kept.sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.entropy_sums[at], -(p * p.log()).sum(), rtol=1e-5, atol=1e-6)
    assert made.counts.names() == ["s", "other"]
    made.counts.forget("s")
    assert made.counts.names() == ["other"]
    with pytest.raises(DataError, match="other"):
        made.counts.stats("s")


def test_a_prompt_that_never_ran_is_missed() -> None:
    made = tables()
    step(made, [("a", 2, 0)], {"a": state(2, stats_args("s", 2))})
    with pytest.raises(DataError, match="prompt 0"):
        made.counts.stats("s")


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (SteeringPlan(deactivate=[(0, 1)]), "layer 0 has no router"),
        (SteeringPlan(deactivate=[(1, 6)]), "expert 6"),
        (SteeringPlan(activate=[(1, 0), (1, 1), (1, 2)]), "at most 2"),
        (SteeringPlan(deactivate=[(1, 0)], shape=MoEShape("fake", LAYERS, 7, 2)), "n_experts 7 / 6"),
        (SteeringPlan(deactivate=[(1, 0)], shape=MoEShape("fake", (1, 3), 6, 2)), "layers"),
    ],
)
def test_a_plan_for_another_model_is_refused(plan: SteeringPlan, says: Any) -> None:
    with pytest.raises(PlanError, match=says):
        check_fits(plan, SHAPE)


def test_the_name_a_model_is_served_under_does_not_matter() -> None:
    check_fits(SteeringPlan(deactivate=[(1, 0)], shape=MoEShape("another", (1, 4), 6, 2)), SHAPE)
