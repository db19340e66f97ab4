"""Detection: counted as by hand, with the prompt as the unit, stable under resampling and templates."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr, ttest_rel

from moe_lens import organisms
from moe_lens.detection.detecting import compare_routing, detect, selection_stability, template_agreement
from moe_lens.detection.expert_scores import ExpertScores, risk_difference
from moe_lens.detection.scores import SCORES
from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.shape import MoEShape
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.counts import PromptCounts
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.plan import SteeringPlan
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.prompts import Prompt
from tests.tiny_models import prompt


def document_pairs(split: str = "detection") -> ContrastivePairs:
    conflicts = organisms.world("planted").conflicts(split)
    return ContrastivePairs.from_lists(
        [Prompt(c.open_book, {"question": c.closed_book}) for c in conflicts],
        [Prompt(c.closed_book, {"question": c.closed_book}) for c in conflicts],
        span="question",
        clusters=[c.entity for c in conflicts],
    )


@pytest.fixture(scope="module")
def planted() -> HookedMoE:
    return organisms.load("planted")


@pytest.fixture(scope="module")
def scores(planted: HookedMoE) -> ExpertScores:
    return detect(planted, document_pairs(), progress=False)


def synthetic(
    rates: np.ndarray, n_prompts: int, seed: int, *, n_tokens: int = 12, shape: MoEShape | None = None
) -> RoutingStats:
    """Per-prompt counts where expert e of the one layer is chosen with probability `rates[e]`, k = 1."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_tokens, rates, size=n_prompts)[:, None, :]
    shape = shape or MoEShape("synthetic", (0,), len(rates), 1)
    total = torch.from_numpy(counts.sum(0))
    per_prompt = PromptCounts(
        torch.full((n_prompts,), n_tokens),
        torch.from_numpy(counts.astype(np.uint8)),
        torch.from_numpy((counts * 0.5).astype(np.float32)),
    )
    sums = total.double()
    return RoutingStats(shape, n_prompts * n_tokens, total, 0.5 * sums, 0.7 * sums, per_prompt=per_prompt)


def test_delta_is_the_risk_difference_of_the_counted_tokens(planted: HookedMoE, scores: ExpertScores) -> None:
    pairs = document_pairs()
    questions = [str(p.content) for p in pairs.second]
    n_question = [len(planted.to_tokens(question, prepend_bos=False)[0]) for question in questions]
    stats = []
    for prompts in (pairs.first, pairs.second):
        total = None
        for one, n in zip(prompts, n_question, strict=True):
            own = collect_routing(planted, str(one.content), span=slice(-n, None), progress=False)
            total = own if total is None else total + own
        assert total is not None
        stats.append(total)
    by_hand = risk_difference(*stats)
    assert scores.stats_1.n_tokens == stats[0].n_tokens == sum(n_question)
    assert torch.equal(scores.stats_1.counts, stats[0].counts)
    assert torch.equal(scores.delta, by_hand.delta)


def test_the_planted_experts_are_significant_and_their_intervals_hold_the_score(scores: ExpertScores) -> None:
    assert scores.q is not None
    assert scores.p is not None
    assert scores.low is not None
    assert scores.high is not None
    assert bool((scores.low <= scores.delta).all() and (scores.delta <= scores.high).all())
    assert bool((scores.q >= scores.p).all())
    assert int((scores.q <= 0.05).sum()) >= 8
    top = scores.ranked()[0]
    assert float(scores.q[top.layer, top.expert]) <= 0.01


@pytest.mark.parametrize("score", SCORES)
def test_every_score_ranks_the_planted_experts_alike(score: str, scores: ExpertScores) -> None:
    other = compare_routing(
        scores.stats_1, scores.stats_2, score=score, clusters=document_pairs().clusters, n_resamples=50
    )
    assert float(np.asarray(spearmanr(other.delta.flatten(), scores.delta.flatten()))[0]) > 0.6
    assert other.score == score


def test_paired_t_is_scipys() -> None:
    one, two = synthetic(np.array([0.5, 0.3, 0.2]), 30, 0), synthetic(np.array([0.3, 0.3, 0.4]), 30, 1)
    found = compare_routing(one, two, score="paired_t").delta[0].numpy()
    rates = [s.per_prompt.counts[:, 0].numpy() / 12 for s in (one, two) if s.per_prompt is not None]
    assert np.allclose(found, np.asarray(ttest_rel(rates[0], rates[1]))[0])


def test_pairs_of_one_cluster_are_one_unit() -> None:
    """Every pair written down five times gives no more evidence than once."""
    rates = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.3, 0.3])
    once = compare_routing(synthetic(rates[0], 25, 0), synthetic(rates[1], 25, 1))
    repeated = []
    for rate, seed in zip(rates, (0, 1), strict=True):
        stats = synthetic(rate, 25, seed)
        repeated.append(stats + stats + stats + stats + stats)
    labels = [str(pair) for pair in range(25)] * 5
    clustered = compare_routing(*repeated, clusters=labels)
    naive = compare_routing(*repeated)
    assert once.low is not None
    assert clustered.low is not None
    assert naive.low is not None
    assert once.p is not None
    assert clustered.p is not None
    assert naive.p is not None
    assert torch.allclose(clustered.delta, once.delta)
    assert torch.allclose(clustered.low, once.low)
    assert torch.allclose(clustered.p, once.p)
    assert bool((naive.low > once.low).all())


def test_the_opposite_contrast_mirrors_the_evidence(scores: ExpertScores) -> None:
    opposite = -scores
    assert scores.low is not None
    assert scores.p is not None
    assert opposite.high is not None
    assert opposite.p is not None
    assert torch.equal(opposite.high, -scores.low)
    assert torch.equal(opposite.p, scores.p)
    swapped = compare_routing(scores.stats_2, scores.stats_1, clusters=document_pairs().clusters)
    assert torch.allclose(swapped.delta, opposite.delta)


def test_saved_scores_come_back_whole(scores: ExpertScores, tmp_path: object) -> None:
    path = f"{tmp_path}/scores.safetensors"
    scores.save(path)
    back = ExpertScores.load(path)
    assert torch.equal(back.delta, scores.delta)
    assert back.evidence is not None
    assert scores.evidence is not None
    assert back.evidence.settings() == scores.evidence.settings()
    for name, tensor in scores.evidence.tensors().items():
        assert torch.equal(back.evidence.tensors()[name], tensor)
    assert torch.equal(back.stats_2.counts, scores.stats_2.counts)
    assert repr(back) == repr(scores)
    again = selection_stability(back, n=5), selection_stability(scores, n=5)
    assert np.array_equal(again[0].jaccard, again[1].jaccard)


def test_a_plan_can_be_chosen_by_significance(scores: ExpertScores) -> None:
    assert scores.q is not None
    plan = SteeringPlan.from_scores(scores, n_activate=0, n_deactivate=6, q=0.05)
    assert plan == SteeringPlan.from_scores(scores, n_deactivate=6)
    assert all(float(scores.q[layer, expert]) <= 0.05 for layer, expert in plan.deactivate)


def test_stability_counts_the_shared_experts_of_each_resample() -> None:
    sure = compare_routing(
        synthetic(np.array([0.7, 0.1, 0.1, 0.1]), 60, 0), synthetic(np.array([0.1, 0.7, 0.1, 0.1]), 60, 1)
    )
    found = selection_stability(sure, n=2)
    assert found.mean == 1.0
    assert found.frequency[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    rates = np.array([0.25, 0.25, 0.25, 0.25])
    chance = selection_stability(compare_routing(synthetic(rates, 60, 0), synthetic(rates, 60, 1)), n=1)
    assert set(chance.jaccard) == {0.0, 1.0}
    assert chance.mean < 0.95
    assert float(chance.frequency.sum()) == pytest.approx(1.0)


def test_templates_that_agree_and_templates_that_do_not() -> None:
    same, other = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    flat = np.full(4, 0.25)
    stats_1 = synthetic(same, 40, 0) + synthetic(same, 40, 1) + synthetic(other, 40, 2)
    stats_2 = synthetic(flat, 40, 3) + synthetic(flat, 40, 4) + synthetic(flat, 40, 5)
    templates = ["a"] * 40 + ["b"] * 40 + ["c"] * 40
    scores = compare_routing(stats_1, stats_2, clusters=list(range(40)) * 3, templates=templates)
    agreement = template_agreement(scores)
    assert agreement.loc["a", "b"] > 0.7
    assert agreement.loc["a", "c"] < -0.7
    for one, rows in (("a", slice(0, 40)), ("c", slice(80, 120))):
        deltas = [
            s.per_prompt.counts[rows, 0].double().sum(0) / 480
            for s in (stats_1, stats_2)
            if s.per_prompt is not None
        ]
        expected = float(np.asarray(spearmanr(deltas[0] - deltas[1], [0.0, 1.0, 2.0, 3.0]))[0])
        assert expected == pytest.approx(-1 if one == "a" else 1, abs=0.4)


@pytest.mark.parametrize("recipe", ["qwen2_moe", "deepseek_v3"])
def test_mixed_stacks_keep_their_layers(hooked: Callable[..., HookedMoE], recipe: str) -> None:
    model = hooked(recipe)
    pairs = ContrastivePairs.from_lists(
        [prompt(6, seed) for seed in range(5)], [prompt(4, seed + 9) for seed in range(5)]
    )
    scores = detect(model, pairs, progress=False, n_resamples=50, batch_size=2)
    assert scores.shape.layers == model.moe_layers
    assert scores.stats_1.n_tokens == 30  # no BOS, no padding
    frame = scores.to_dataframe()
    assert {"low", "high", "p", "q"} <= set(frame.columns)
    row = frame.iloc[3]
    place = (scores.shape.layers.index(int(row["layer"])), int(row["expert"]))
    assert scores.q is not None
    assert float(row["q"]) == float(scores.q[place])


def test_what_cannot_be_detected_is_refused(planted: HookedMoE, scores: ExpertScores) -> None:
    rates = np.array([0.5, 0.3, 0.2])
    one, two = synthetic(rates, 5, 0), synthetic(rates, 6, 1)
    with pytest.raises(DataError, match="got 5 and 6"):
        compare_routing(one, two, paired=True)
    with pytest.raises(DataError, match="per_prompt=True"):
        compare_routing(
            one, RoutingStats(one.shape, one.n_tokens, one.counts, one.probability_sums, one.weight_sums)
        )
    with pytest.raises(DataError, match="at least"):
        compare_routing(one, synthetic(rates, 5, 1), clusters=["a"] * 5)
    with pytest.raises(DataError, match="5 pairs, 2 labels"):
        compare_routing(one, synthetic(rates, 5, 1), clusters=["a", "b"])
    with pytest.raises(DataError, match="risk_difference"):
        detect(planted, document_pairs(), score="delta", progress=False)
    with pytest.raises(DataError, match="n must be a whole number from 1 to 32"):
        selection_stability(scores, n=33)
    with pytest.raises(DataError, match="at least two templates"):
        template_agreement(scores)
    bare = risk_difference(scores.stats_1, scores.stats_2)
    assert bare.q is None
    with pytest.raises(DataError, match="no evidence"):
        selection_stability(bare, n=3)


def test_a_level_is_printed_as_it_was_given() -> None:
    one, two = (synthetic(np.array([0.4, 0.3, 0.3]), 12, seed) for seed in (0, 1))
    evidence = compare_routing(one, two, level=0.995, n_resamples=20).evidence
    assert evidence is not None
    assert " 99.5% intervals" in evidence.summary()
    assert " 90% intervals" in replace(evidence, level=0.9).summary()
