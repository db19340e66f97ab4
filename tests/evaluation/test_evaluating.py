"""evaluate_steering: yes where an effect was planted, no where none was, and controls as they should be."""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.stats import binom
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import organisms
from moe_lens.detection.detecting import detect
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation.evaluating import evaluate_steering, opposite_plan
from moe_lens.evaluation.measures import Hooks
from moe_lens.evaluation.report import SteeringReport
from moe_lens.evaluation.tasks import CollateralMeasure, SteeringTask, answer_task
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.hooks import SteeringHook
from moe_lens.steering.plan import SteeringPlan
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.prompts import Prompt
from tests.tiny_models import hook_census

Hooked = Callable[..., HookedMoE]
N_PROMPTS = 40
CLUSTERS = tuple(f"c{i // 2}" for i in range(N_PROMPTS))
TOWARD = [(0, 3), (1, 4), (2, 11)]  # without them the behaviour shows
AGAINST = [(0, 7), (1, 0), (2, 2)]  # without them it does not


@pytest.fixture
def model(hooked: Hooked) -> HookedMoE:
    return hooked("olmoe", num_experts=12)


def plan_of(hooks: Hooks) -> SteeringPlan:
    if not hooks:
        return SteeringPlan()
    (plan,) = {hook.plan for _, hook in hooks if isinstance(hook, SteeringHook)}
    return plan


def values_at(rate: float) -> np.ndarray:
    """About that share of ones, spread over the clusters."""
    return (np.arange(N_PROMPTS) * 7 % N_PROMPTS < round(rate * N_PROMPTS)).astype(float)


def fake_task(rate: Callable[[SteeringPlan], float], seen: list[SteeringPlan] | None = None) -> SteeringTask:
    """A behaviour that is a function of the plan; no forward is run."""

    def measure(_model: Any, hooks: Hooks) -> np.ndarray:
        if seen is not None:
            seen.append(plan_of(hooks))
        return values_at(rate(plan_of(hooks)))

    return SteeringTask("planted", measure, CLUSTERS)


def planted(toward: float = 0.4, against: float = 0.4) -> Callable[[SteeringPlan], float]:
    def rate(plan: SteeringPlan) -> float:
        off = set(plan.deactivate)
        return 0.5 + toward * len(off & {*TOWARD}) / 3 - against * len(off & {*AGAINST}) / 3

    return rate


def noise(plan: SteeringPlan) -> float:
    """A rate in [0, 1] that follows from the experts named, and from nothing else about them."""
    digest = hashlib.sha256(repr((sorted(plan.activate), sorted(plan.deactivate))).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def scores(model: HookedMoE) -> ExpertScores:
    """Negative where the behaviour comes without the expert."""
    shape = model.moe_shape
    size = (len(shape.layers), shape.n_experts)
    delta = torch.linspace(0.01, 0.36, 36, dtype=torch.float64).reshape(size)
    for experts, value in ((TOWARD, -0.9), (AGAINST, 0.9)):
        for layer, expert in experts:
            delta[layer, expert] = value
    counts = torch.zeros(size, dtype=torch.int64)
    counts[:, : shape.top_k] = 1
    zeros = torch.zeros(size, dtype=torch.float64)
    stats = RoutingStats(shape, 1, counts, zeros, zeros)
    return ExpertScores(delta, stats, stats)


PLAN, REVERSE = SteeringPlan(deactivate=TOWARD), SteeringPlan(deactivate=AGAINST)


def evaluate(model: HookedMoE, task: SteeringTask, **options: Any) -> SteeringReport:
    options = {"plan": PLAN, "reverse": REVERSE, "progress": False, **options}
    return evaluate_steering(model, task=task, **options)


# The verdict


def test_a_planted_effect_is_found(model: HookedMoE) -> None:
    report = evaluate(model, fake_task(planted()))
    assert report.verdict
    assert report.steered["+"].rate == pytest.approx(0.9)
    assert report.steered["-"].rate == pytest.approx(0.1)
    assert report.unsteered.rate == pytest.approx(0.5)
    assert report.explanation.count("moves as meant") == 2


def test_nothing_is_nothing(model: HookedMoE) -> None:
    report = evaluate(model, fake_task(lambda plan: 0.5))
    assert not report.verdict
    assert report.gap == 0.0
    assert report.p_matched == report.p_any == 1.0


def test_an_effect_in_one_direction_counts_but_only_beside_enough_sets(model: HookedMoE) -> None:
    """All reverse sets do nothing, so that p is 1 / (n + 1)."""
    task = fake_task(lambda plan: 0.9 if {*TOWARD} <= {*plan.deactivate} else 0.5)
    enough, few = evaluate(model, task, n_random=20, seed=1), evaluate(model, task, n_random=8, seed=1)
    assert (enough.verdict, few.verdict) == (True, False)
    assert "direction − does not move as meant" in enough.explanation
    assert few.p_any == few.p_matched == pytest.approx(1 / 9)
    assert enough.p_any == enough.p_matched == pytest.approx(1 / 21)


def test_the_wrong_direction_is_no_effect(model: HookedMoE) -> None:
    report = evaluate(model, fake_task(planted()), plan=REVERSE, reverse=PLAN)
    assert not report.verdict
    assert report.gap == pytest.approx(-0.8)
    assert "its interval" in report.explanation


def test_what_any_experts_of_the_layers_do_is_no_effect(model: HookedMoE) -> None:
    """The number in layer 0 decides: layer-matched sets do as much, sets in any layer do less."""

    def rate(plan: SteeringPlan) -> float:
        in_first = Counter(layer for layer, _ in plan.deactivate)[0]
        return min(0.2 * in_first, 1.0)

    plan = SteeringPlan(deactivate=[(0, e) for e in range(5)])
    report = evaluate(model, fake_task(rate), plan=plan, reverse=SteeringPlan(deactivate=[(2, 1)]))
    assert not report.verdict
    assert (report.p_matched, report.p_any <= 0.05) == (1.0, True)


def mirrored(plan: SteeringPlan) -> float:
    """What activating an expert adds, deactivating it takes away; every expert has an effect of its own."""
    effects = np.random.default_rng(5).normal(size=(3, 12))
    signed = sum(effects[expert] for expert in plan.activate) - sum(effects[e] for e in plan.deactivate)
    return float(np.clip(0.5 + 0.08 * signed, 0, 1))


@pytest.mark.broad
@pytest.mark.parametrize(("rate", "swapped"), [(noise, False), (noise, True), (mirrored, True)])
def test_plans_no_better_than_random_are_rarely_called_better(
    model: HookedMoE, rate: Callable[[SteeringPlan], float], swapped: bool
) -> None:
    """The error rate is at most alpha; here 80 plans of which none is special."""
    alpha, wrong, like = 0.2, 0, SteeringPlan(PLAN.deactivate[:1], PLAN.deactivate[1:]) if swapped else PLAN
    for seed in range(80):
        plan = like.random_like(seed=10**6 + seed, model=model)
        reverse = plan.reversed() if swapped else like.random_like(seed=2 * 10**6 + seed, model=model)
        report = evaluate(
            model, fake_task(rate), plan=plan, reverse=reverse, n_random=4, alpha=alpha, seed=seed
        )
        wrong += report.verdict
    assert wrong <= binom.ppf(0.9999, 80, alpha)


# What is run


def test_every_condition_is_measured_once_and_reported(model: HookedMoE) -> None:
    seen: list[SteeringPlan] = []
    report = evaluate(model, fake_task(noise, seen), scores=scores(model), n_random=5, seed=7)
    assert len(seen) == 3 + 1 + 4 * 5
    assert SteeringPlan() in seen
    assert report.plans == {"+": PLAN, "-": REVERSE}
    for plan, outcome in ((PLAN, report.steered["+"]), (REVERSE, report.steered["-"])):
        assert outcome.values.tolist() == values_at(noise(plan)).tolist()
    assert (report.task, report.model, report.clusters) == ("planted", model.moe_shape.model, CLUSTERS)
    assert (report.alpha, report.level, report.seed) == (0.05, 0.95, 7)
    sizes = {
        kind: {side: len(sets) for side, sets in sides.items()} for kind, sides in report.controls.items()
    }
    assert sizes == {"layer-matched": {"+": 5, "-": 5}, "any layer": {"+": 5, "-": 5}}


def test_the_four_lists_have_draws_of_their_own_and_the_right_numbers(model: HookedMoE) -> None:
    seen: list[SteeringPlan] = []
    plan = SteeringPlan([(0, 1)], [(1, 4), (1, 5), (2, 11)])
    reverse = SteeringPlan([(2, 1)], [(0, 4), (0, 5)])
    evaluate(model, fake_task(noise, seen), plan=plan, reverse=reverse, n_random=6)
    lists = [seen[3 + 6 * i : 9 + 6 * i] for i in range(4)]
    assert len({one for sets in lists for one in sets}) == 24
    for i, sets in enumerate(lists):
        like, matched = (plan, reverse)[i % 2], i < 2
        layers = Counter(layer for layer, _ in like.deactivate)
        for one in sets:
            assert (len(one.activate), len(one.deactivate)) == (1, len(like.deactivate))
            if matched:
                assert Counter(layer for layer, _ in one.deactivate) == layers
                assert one.activate[0][0] == like.activate[0][0]
        if not matched:
            assert any(Counter(layer for layer, _ in one.deactivate) != layers for one in sets)


def test_the_same_seed_gives_the_same_report_and_another_others(model: HookedMoE) -> None:
    first, again, other = (evaluate(model, fake_task(noise), n_random=5, seed=s).to_json() for s in (3, 3, 4))
    assert first == again
    assert first["controls"] != other["controls"]


def test_the_least_scoring_experts_are_measured(model: HookedMoE) -> None:
    seen: list[SteeringPlan] = []
    report = evaluate(model, fake_task(planted(), seen), scores=scores(model), n_random=4)
    assert set(seen[3].deactivate) == {(0, 0), (0, 1), (0, 2)}  # linspace starts there
    assert report.bottom is not None
    assert report.bottom.rate == pytest.approx(0.5)
    assert evaluate(model, fake_task(planted()), n_random=4).bottom is None


def test_the_reverse_comes_from_the_scores_or_from_swapping(model: HookedMoE) -> None:
    own = scores(model)
    plan = SteeringPlan.from_scores(own, n_deactivate=3, epsilon=0.3)
    assert set(plan.deactivate) == set(TOWARD)
    report = evaluate_steering(model, plan, fake_task(planted()), scores=own, progress=False)
    assert set(report.plans["-"].deactivate) == set(AGAINST)
    assert report.plans["-"].epsilon == 0.3
    assert report.verdict
    swapped = evaluate_steering(model, PLAN, fake_task(planted()), n_random=19, progress=False).plans["-"]
    assert (swapped.activate, swapped.deactivate) == (PLAN.deactivate, ())


@pytest.mark.parametrize("reverse", [None, SteeringPlan([TOWARD[0]], AGAINST[:1])])
def test_random_sets_of_plans_that_share_experts_are_drawn_together(
    model: HookedMoE, reverse: SteeringPlan | None
) -> None:
    seen: list[SteeringPlan] = []
    report = evaluate(model, fake_task(noise, seen), reverse=reverse, n_random=19)
    assert report.joint_controls
    assert not evaluate(model, fake_task(noise), n_random=4).joint_controls
    minus = report.plans["-"]
    named = [*PLAN.deactivate, *minus.activate, *minus.deactivate]
    for plus_sets, minus_sets in ((seen[3:22], seen[22:41]), (seen[41:60], seen[60:79])):
        for one, other in zip(plus_sets, minus_sets, strict=True):
            drawn = [*one.deactivate, *other.activate, *other.deactivate]
            assert len(drawn) == len(named)
            same = [(i, j) for i, x in enumerate(named) for j, y in enumerate(named) if x == y]
            assert [(i, j) for i, x in enumerate(drawn) for j, y in enumerate(drawn) if x == y] == same
    gaps = [
        (plus.rate - minus.rate)
        for plus, minus in zip(*(report.controls["any layer"][side] for side in "+-"), strict=True)
    ]
    assert report.p_any == pytest.approx((1 + sum(gap >= report.gap for gap in gaps)) / 20)


def test_joint_draws_must_be_enough_for_the_error_rate(model: HookedMoE) -> None:
    with pytest.raises(DataError, match="share experts"):
        evaluate(model, fake_task(noise), reverse=None, n_random=18)


def test_opposite_plan_has_the_numbers_of_the_plan(model: HookedMoE) -> None:
    both = SteeringPlan.from_scores(scores(model), 2, 3)
    opposite = opposite_plan(scores(model), both)
    assert (len(opposite.activate), len(opposite.deactivate)) == (2, 3)
    assert set(opposite.deactivate) == set(AGAINST)
    assert set(opposite.activate) < set(TOWARD)
    with pytest.raises(PlanError, match="only 3"):  # as many as have the sign
        opposite_plan(scores(model), SteeringPlan.from_scores(scores(model), 4, 0))


def test_collateral_of_every_condition(model: HookedMoE) -> None:
    task = SteeringTask(
        "planted",
        fake_task(planted()).measure,
        CLUSTERS,
        {
            "loss": CollateralMeasure(lambda _, hooks: 1.0 + 0.1 * len(plan_of(hooks)), 0.2),
            "accuracy": CollateralMeasure(lambda _, hooks: 0.9 - 0.1 * len(plan_of(hooks)), 0.5, False),
        },
    )
    report = evaluate(model, task, n_random=8)
    assert report.unsteered.collateral == {"loss": 1.0, "accuracy": 0.9}
    for harms in report.harms().values():
        assert harms == {"+": pytest.approx(0.3), "-": pytest.approx(0.3)}
    assert "loss gets worse by at most 0.30 (direction +), MORE than the limit of 0.2" in report.explanation
    assert "accuracy gets worse by at most 0.30 (direction +), within the limit of 0.5" in report.explanation
    random = report.controls["any layer"]["-"][0]
    assert random.collateral == {"loss": pytest.approx(1.3), "accuracy": pytest.approx(0.6)}


# Refusals


@pytest.mark.parametrize("plan", [SteeringPlan(), None, [(0, 1)]])
def test_an_empty_plan_has_no_effect_to_measure(model: HookedMoE, plan: Any) -> None:
    with pytest.raises((PlanError, TypeCheckError)):
        evaluate(model, fake_task(noise), plan=plan)


@pytest.mark.parametrize("which", ["plan", "reverse"])
def test_a_plan_for_another_model_is_refused_before_anything_runs(model: HookedMoE, which: str) -> None:
    seen: list[SteeringPlan] = []
    with pytest.raises(PlanError, match="expert 12"):
        evaluate(model, fake_task(noise, seen), **{which: SteeringPlan(deactivate=[(0, 12)])})
    assert seen == []


@pytest.mark.parametrize("with_shape", [True, False])
def test_a_plan_that_cannot_be_reversed_asks_for_another(model: HookedMoE, with_shape: bool) -> None:
    plan = SteeringPlan(deactivate=[(0, e) for e in range(4)])  # of which 3 can be activated
    plan = plan.made_for(model.moe_shape) if with_shape else plan
    with pytest.raises(PlanError, match=r"reverse=.*scores="):
        evaluate(model, fake_task(noise), plan=plan, reverse=None)


@pytest.mark.parametrize(("n_random", "alpha"), [(3, 0.05), (0, 0.5), (8, 0.01), (-1, 0.05)])
def test_too_few_sets_for_the_error_rate(model: HookedMoE, n_random: int, alpha: float) -> None:
    with pytest.raises(DataError, match="n_random"):
        evaluate(model, fake_task(noise), n_random=n_random, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_alpha_is_an_error_rate(model: HookedMoE, alpha: float) -> None:
    with pytest.raises(DataError, match="alpha"):
        evaluate(model, fake_task(noise), alpha=alpha)


@pytest.mark.parametrize("wrong", [{"level": 1.5}, {"level": 0.0}, {"seed": -1}], ids=str)
def test_settings_are_refused_before_anything_runs(model: HookedMoE, wrong: dict[str, Any]) -> None:
    seen: list[SteeringPlan] = []
    with pytest.raises(DataError):
        evaluate(model, fake_task(noise, seen), n_random=4, **wrong)
    assert seen == []


def test_the_least_scoring_experts_are_some_that_can_be_steered(hooked: Hooked) -> None:
    model = hooked("deepseek_v4_hash")
    shape = model.moe_shape
    delta = torch.tensor([[0.0] * 6, [0.5, -0.5, 0.4, -0.4, 0.3, -0.3], [0.2] * 6], dtype=torch.float64)
    counts = torch.ones(3, 6, dtype=torch.int64) * torch.tensor([1, 1, 0, 0, 0, 0])
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    stats = RoutingStats(shape, 1, counts, zeros, zeros)

    def measure(model: TransformerBridge, hooks: Hooks) -> list[float]:
        model.run_with_hooks("w1 w2", fwd_hooks=list(hooks or ()))
        return [0.0, 1.0]

    own = ExpertScores(delta, stats, stats)
    plan = SteeringPlan.from_scores(own, n_deactivate=2)
    task = SteeringTask("any", measure, ("a", "b"))
    evaluate_steering(model, plan, task, scores=own, n_random=4, progress=False)


# For real


@pytest.mark.broad
@pytest.mark.parametrize(("name", "found"), [("planted", True), ("null", False)])
def test_on_organisms_whose_truth_is_known(name: str, found: bool) -> None:
    model, world = organisms.load(name), organisms.world(name)
    conflicts = world.conflicts("detection")
    pairs = ContrastivePairs.from_lists(
        [Prompt(c.open_book, {"question": c.closed_book}) for c in conflicts],
        [Prompt(c.closed_book, {"question": c.closed_book}) for c in conflicts],
        span="question",
        clusters=[c.entity for c in conflicts],
    )
    own = detect(model, pairs, n_resamples=20, progress=False)
    tests = world.conflicts("test")[::4]
    task = answer_task(
        [c.open_book for c in tests],
        [c.document_answer for c in tests],
        clusters=[c.entity for c in tests],
        neutral_texts=world.generic("test")[:4],
    )
    before = hook_census(model)
    plan = SteeringPlan.from_scores(own, n_deactivate=8)
    report = evaluate_steering(model, plan, task, scores=own, n_random=8, progress=False)
    assert report.verdict == found, str(report)
    assert hook_census(model).items() >= before.items()
