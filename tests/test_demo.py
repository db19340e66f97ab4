"""The main job on the shipped organisms: what is claimed of them, with the controls."""

import numpy as np
import pytest
import torch

from moe_lens import organisms
from moe_lens.demo import (
    LEGEND,
    DemoResult,
    best_size,
    compare_sizes,
    detect_document_experts,
    run_demo,
    table,
    two_plans,
)
from moe_lens.errors import DataError, MoELensError, PlanError
from moe_lens.steering import steer_hooks
from moe_lens.steering_plan import SteeringPlan


def test_planted_steers_almost_completely_and_beyond_its_controls(planted_demo: DemoResult) -> None:
    assert planted_demo.gap >= 0.85
    assert planted_demo.gap_interval[0] > 0.8
    assert (planted_demo.random_gaps >= planted_demo.gap).mean() <= 0.05
    assert (planted_demo.layer_matched_gaps >= planted_demo.gap).mean() <= 0.05
    assert planted_demo.unsteered.closed_book >= 0.95


def test_specialised_steers_both_ways_beyond_its_controls() -> None:
    result = run_demo("specialised", progress=False)
    assert result.gap_interval[0] > 0.4
    assert (result.random_gaps >= result.gap).mean() <= 0.05
    assert result.steered["+"].document_rate > result.unsteered.document_rate
    assert result.steered["−"].document_rate < result.unsteered.document_rate


def test_null_stays_inside_its_controls() -> None:
    result = run_demo("null", progress=False)
    assert (result.random_gaps >= abs(result.gap)).mean() > 0.05


def test_layer_matched_gaps_are_those_of_every_pair(planted_demo: DemoResult) -> None:
    expected = [
        plus.document_rate - minus.document_rate
        for plus in planted_demo.layer_matched["+"]
        for minus in planted_demo.layer_matched["−"]
    ]
    assert planted_demo.layer_matched_gaps.tolist() == pytest.approx(expected)
    assert len(expected) == 400


def test_outcomes_equal_a_prompt_by_prompt_count(planted_demo: DemoResult) -> None:
    model, world = organisms.load("planted"), organisms.world("planted")
    for plan, outcome in (
        (SteeringPlan(), planted_demo.unsteered),
        (planted_demo.plans["−"], planted_demo.steered["−"]),
    ):
        for index, conflict in list(enumerate(world.conflicts("test")))[::16]:
            logits = model.run_with_hooks(conflict.open_book, fwd_hooks=steer_hooks(plan))
            said = str(model.to_string(logits[0, -1].argmax().reshape(1))).strip()
            assert (said == conflict.document_answer) == bool(outcome.says_document[index])


def test_detection_sees_the_detection_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    world_class = organisms.World
    original = world_class.conflicts
    monkeypatch.setattr(
        world_class, "conflicts", lambda self, split: (asked.append(split), original(self, split))[1]
    )
    detect_document_experts(organisms.load("planted"), organisms.world("planted"))
    assert set(asked) == {"detection"}


def test_detection_counts_from_the_question_on(planted_demo: DemoResult) -> None:
    model, world = organisms.load("planted"), organisms.world("planted")
    counts = torch.zeros_like(planted_demo.scores.stats_1.counts)
    n_tokens = 0
    for pair in world.conflicts("detection"):
        _, cache = model.run_with_cache(pair.open_book)
        start = list(model.to_str_tokens(pair.open_book)).index("Question")
        for row, layer in enumerate(model.moe_layers):
            for expert in cache["topk_indices", layer][0, start:].flatten().tolist():
                counts[row, expert] += 1
        n_tokens += cache["topk_indices", 0].shape[1] - start
    assert torch.equal(counts, planted_demo.scores.stats_1.counts)
    assert n_tokens == planted_demo.scores.stats_1.n_tokens


def test_plans_deactivate_the_experts_of_the_other_condition(planted_demo: DemoResult) -> None:
    plans = two_plans(planted_demo.scores, 3)
    deltas = {(s.layer, s.expert): s.delta for s in planted_demo.scores.ranked()}
    in_order = sorted(deltas, key=lambda expert: deltas[expert])
    assert set(plans["+"].deactivate) == set(in_order[:3])
    assert set(plans["−"].deactivate) == set(in_order[-3:])
    assert not plans["+"].activate


def test_best_size_takes_the_smallest_plan_near_the_largest_gap_that_does_little_harm() -> None:
    assert best_size({2: (0.3, 0.0), 4: (0.6, 0.05), 6: (0.9, 0.5)}) == 4
    assert best_size({2: (0.3, 0.0), 4: (0.81, 0.05), 6: (0.9, 0.05)}) == 4
    assert best_size({2: (0.3, 0.0), 4: (0.79, 0.05), 6: (0.9, 0.05)}) == 6
    assert best_size({2: (0.3, 0.4), 4: (0.6, 0.3)}) == 4
    with pytest.raises(PlanError, match="possible"):
        best_size({})


def test_compare_sizes_leaves_out_what_is_impossible(planted_demo: DemoResult) -> None:
    def measure(plan: SteeringPlan):
        return planted_demo.unsteered

    sizes = compare_sizes(measure, planted_demo.scores)
    assert set(sizes) <= {2, 4, 6, 8, 10, 12}
    assert all(gap == 0 and harm == 0 for gap, harm in sizes.values())


def test_table_shows_the_effect_beside_its_controls(planted_demo: DemoResult) -> None:
    header, rule, row = table([planted_demo]).splitlines()
    cells = dict(
        zip(*([c.strip() for c in line.strip("|").split(" | ")] for line in (header, row)), strict=True)
    )
    assert set(rule) == set("| -")
    assert cells["toward doc"] == f"{planted_demo.steered['+'].document_rate:.2f}"
    assert cells["pairs ≥ gap"].endswith(
        f"of {len(planted_demo.random) * (len(planted_demo.random) - 1) // 2}"
    )
    assert f"{np.mean([o.document_rate for o in planted_demo.random]):.2f}" in cells["random sets"]


def test_the_same_seed_gives_the_same_result(planted_demo: DemoResult) -> None:
    again = run_demo("planted", n_random=2, progress=False)
    assert again.plans == planted_demo.plans
    assert np.array_equal(again.random_rates[0], planted_demo.random_rates[0])


def test_bad_arguments() -> None:
    with pytest.raises(MoELensError, match="no organism 'typo'"):
        run_demo("typo")
    with pytest.raises(DataError, match="n_random"):
        run_demo("planted", n_random=1)


def test_the_legend_gives_the_numbers_of_the_test_split() -> None:
    for name in organisms.names():
        conflicts = organisms.world(name).conflicts("test")
        countries = {conflict.entity for conflict in conflicts}
        assert f"{len(conflicts)} held-out conflicts ({len(countries)} countries)" in LEGEND
