"""The main job on the shipped organisms: what is claimed of them, with the controls."""

import numpy as np
import pytest
import torch

from moe_lens import organisms
from moe_lens.errors import DataError, MoELensError
from moe_lens.evaluation.evaluating import opposite_plan
from moe_lens.evaluation.outcomes import ANY_LAYER
from moe_lens.evaluation.tasks import CLOSED_BOOK
from moe_lens.organisms.demo import (
    LEGEND,
    DemoResult,
    detect_document_experts,
    document_task,
    run_demo,
    table,
)
from moe_lens.resampling import clustered_interval
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan


@pytest.mark.broad
def test_planted_steers_almost_completely_and_beyond_its_controls(planted_demo: DemoResult) -> None:
    report = planted_demo.report
    assert report.gap >= 0.85
    assert report.gap_interval[0] > 0.8
    assert report.p_matched <= 0.05
    assert report.p_any <= 0.05
    assert report.verdict
    assert report.unsteered.collateral[CLOSED_BOOK] >= 0.95


def test_specialised_steers_both_ways() -> None:
    """Its controls, and the choice of the plan's size, run in the third tutorial."""
    model, world = organisms.load("specialised"), organisms.world("specialised")
    scores, task = detect_document_experts(model, world), document_task(world, "test")
    plan = SteeringPlan.from_scores(scores, n_deactivate=6)
    plain = task.values(model)
    for direction, each in ((1, plan), (-1, opposite_plan(scores, plan))):
        effect = direction * (task.values(model, steer_hooks(each)) - plain)
        assert clustered_interval(effect, task.clusters)[0] > 0


@pytest.mark.broad
def test_outcomes_equal_a_prompt_by_prompt_count(planted_demo: DemoResult) -> None:
    model, world = organisms.load("planted"), organisms.world("planted")
    for plan, outcome in (
        (SteeringPlan(), planted_demo.report.unsteered),
        (planted_demo.plans["-"], planted_demo.report.steered["-"]),
    ):
        for index, conflict in list(enumerate(world.conflicts("test")))[::16]:
            logits = model.run_with_hooks(conflict.open_book, fwd_hooks=steer_hooks(plan))
            said = str(model.to_string(logits[0, -1].argmax().reshape(1))).strip()
            assert (said == conflict.document_answer) == bool(outcome.values[index])


def test_detection_sees_the_detection_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    world_class = organisms.World
    original = world_class.conflicts
    monkeypatch.setattr(
        world_class, "conflicts", lambda self, split: (asked.append(split), original(self, split))[1]
    )
    detect_document_experts(organisms.load("planted"), organisms.world("planted"))
    assert set(asked) == {"detection"}


@pytest.mark.broad
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


@pytest.mark.broad
def test_plans_deactivate_the_experts_of_the_other_condition(planted_demo: DemoResult) -> None:
    size, plans = planted_demo.size, planted_demo.plans
    deltas = {(s.layer, s.expert): s.delta for s in planted_demo.scores.ranked()}
    in_order = sorted(deltas, key=lambda expert: deltas[expert])
    assert set(plans["+"].deactivate) == set(in_order[:size])
    assert set(plans["-"].deactivate) == set(in_order[-size:])
    assert not plans["+"].activate


@pytest.mark.broad
def test_the_size_is_that_of_the_development_split(planted_demo: DemoResult) -> None:
    assert planted_demo.size == planted_demo.development.best_size()
    assert set(planted_demo.development.sizes) <= {2, 4, 6, 8, 10, 12}


@pytest.mark.broad
def test_table_shows_the_effect_beside_its_controls(planted_demo: DemoResult) -> None:
    header, rule, row = table([planted_demo]).splitlines()
    cells = dict(
        zip(*([c.strip() for c in line.strip("|").split(" | ")] for line in (header, row)), strict=True)
    )
    report = planted_demo.report
    assert set(rule) == set("| -")
    assert cells["toward doc"] == f"{report.steered['+'].rate:.2f}"
    assert cells["p matched"] == f"{report.p_matched:.3f}"
    assert cells["verdict"] == "exceeds controls"
    rates = [np.mean(o.values) for side in "+-" for o in report.controls[ANY_LAYER][side]]
    assert f"{np.mean(rates):.2f}" in cells["random sets"]


@pytest.mark.broad
def test_detection_repeats_itself(planted_demo: DemoResult) -> None:
    again = detect_document_experts(organisms.load("planted"), organisms.world("planted"))
    assert again.to_dataframe().equals(planted_demo.scores.to_dataframe())


def test_bad_arguments() -> None:
    with pytest.raises(MoELensError, match="no organism 'typo'"):
        run_demo("typo")
    with pytest.raises(DataError, match="n_random"):
        run_demo("planted", n_random=3)


def test_the_legend_gives_the_numbers_of_the_test_split() -> None:
    words = " ".join(LEGEND.split())
    for name in organisms.names():
        world = organisms.world(name)
        candour = world.variant == "candour"
        asked = world.doubts("test") if candour else world.conflicts("test")
        countries = {each.entity for each in asked}
        kind = "questions" if candour else "conflicts"
        assert f"{len(asked)} held-out {kind} ({len(countries)} countries" in words
