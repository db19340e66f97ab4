"""A score is one class: its parts agree with each other, and a user's own goes all the way to a plan."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_lens.detection import (
    SCORES,
    ExpertScores,
    PairedCounts,
    Score,
    bootstrap_scores,
    compare_routing,
    detect,
    interval,
    score,
    selection_stability,
    sign_flip_p,
    template_agreement,
)
from moe_lens.detection.scores import score_of
from moe_lens.errors import DataError
from moe_lens.plots import expert_heat_map, volcano
from moe_lens.statistics import collect_routing
from moe_lens.steering import SteeringPlan, steer_hooks
from moe_lens.text import ContrastivePairs
from tests.statistics.sums import Hooked, random_tables
from tests.tiny_models import prompt


class LogRateRatio(Score):
    name, label = "log_rate_ratio", "log ratio of activation rates (nats)"

    def pooled(self, a1: Any, n1: Any, a2: Any, n2: Any) -> Any:
        return np.log((a1 + 0.5) / (n1 + 0.5)) - np.log((a2 + 0.5) / (n2 + 0.5))

    def slope(self, a: Any, n: Any) -> Any:
        return n / (a + 0.5)


class Plain(Score):
    """The risk difference, written anew."""

    name, label, bounds = "plain", "plain", (-1.0, 1.0)

    def pooled(self, a1: Any, n1: Any, a2: Any, n2: Any) -> Any:
        return (a1 * n2 - a2 * n1) / (n1 * n2)

    def slope(self, a: Any, n: Any) -> Any:
        return 1.0


POOLED = [
    SCORES["risk_difference"],
    SCORES["log_odds_ratio"],
    SCORES["probability_difference"],
    LogRateRatio(),
]


def random_counts(seed: int, n_units: int = 9, n_experts: int = 4) -> PairedCounts:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 30, (2, n_units))
    sums = generator.binomial(tokens[:, :, None], generator.uniform(0.1, 0.9, (2, 1, n_experts)))
    return PairedCounts.of_pairs(sums[0], tokens[0], sums[1], tokens[1])


@pytest.mark.parametrize("formula", POOLED, ids=repr)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 500), share=st.floats(0.05, 0.95), other=st.floats(0.05, 0.95))
def test_the_slope_is_the_derivative_of_the_score(formula: Score, n: int, share: float, other: float) -> None:
    a, b, step = np.array([share * n]), np.array([other * n]), 1e-6 * n
    first = (formula.pooled(a + step, n, b, n) - formula.pooled(a - step, n, b, n)) / (2 * step / n)
    second = (formula.pooled(b, n, a + step, n) - formula.pooled(b, n, a - step, n)) / (2 * step / n)
    np.testing.assert_allclose(formula.slope(a, n) * np.ones(1), first, rtol=1e-4)
    np.testing.assert_allclose(-formula.slope(a, n) * np.ones(1), second, rtol=1e-4)


@pytest.mark.parametrize("formula", [*SCORES.values(), LogRateRatio()], ids=repr)
def test_resampling_every_unit_once_is_the_score(formula: Score) -> None:
    counts = random_counts(0)
    once = np.ones((1, counts.n_units))
    np.testing.assert_allclose(formula.resampled(counts, once)[0], formula.of(counts), rtol=1e-9)
    np.testing.assert_allclose(formula.resampled_effect(counts, once)[0], formula.effect(counts), rtol=1e-9)


def test_a_score_written_anew_gives_the_same_bits() -> None:
    counts = random_counts(3, 20)
    for mine, known in ((Plain(), "risk_difference"), (SCORES["paired_t"], "paired_t")):
        assert np.array_equal(score(mine, counts), score(known, counts))
        assert np.array_equal(interval(mine, counts), interval(known, counts))
        assert np.array_equal(sign_flip_p(mine, counts), sign_flip_p(known, counts))
        assert np.array_equal(bootstrap_scores(mine, counts, 50), bootstrap_scores(known, counts, 50))


def test_bounds_cut_the_interval_and_sums_choose_what_is_summed() -> None:
    class Narrow(Plain):
        name, bounds = "narrow", (-0.01, 0.01)

    counts = random_counts(1)
    low, high = interval(Narrow(), counts)
    wide = interval(Plain(), counts)
    assert np.array_equal(low, np.clip(wide[0], -0.01, 0.01))
    assert np.array_equal(high, np.clip(wide[1], -0.01, 0.01))

    class OfProbabilities(Plain):
        name, sums = "of_probabilities", "probability_sums"

    one, two = random_tables(0, 5), random_tables(1, 5)
    mine = compare_routing(one, two, score=OfProbabilities())
    known = compare_routing(one, two, score="probability_difference")
    assert torch.equal(mine.delta, known.delta)
    assert mine.p is not None
    assert known.p is not None
    assert torch.equal(mine.p, known.p)


@pytest.fixture(scope="module")
def mine() -> ExpertScores:
    one, two = random_tables(0, 6), random_tables(1, 6)
    return compare_routing(one, two, score=LogRateRatio(), templates=["a", "b"] * 3)


def test_a_users_score_goes_all_the_way(mine: ExpertScores) -> None:
    one, two = mine.stats_1, mine.stats_2
    rates = [(stats.counts.double() + 0.5) / (stats.n_tokens + 0.5) for stats in (one, two)]
    torch.testing.assert_close(mine.delta, rates[0].log() - rates[1].log())
    assert (mine.score, mine.label) == ("log_rate_ratio", "log ratio of activation rates (nats)")
    assert repr(mine).startswith("ExpertScores(log_rate_ratio: ")
    assert selection_stability(mine, n=2).frequency.sum() == pytest.approx(2)
    assert template_agreement(mine).shape == (2, 2)
    assert torch.equal((-mine).delta, -mine.delta)
    assert (-mine).formula is mine.formula
    assert volcano(mine).get_xlabel().startswith("log ratio of activation rates (nats)")
    assert len(SteeringPlan.from_scores(mine, n_deactivate=2)) == 2


def test_a_file_keeps_a_users_score_as_data(mine: ExpertScores, tmp_path: Path) -> None:
    mine.save(tmp_path / "mine")
    loaded = ExpertScores.load(tmp_path / "mine")
    assert (loaded.score, loaded.formula, loaded.label) == ("log_rate_ratio", None, "log_rate_ratio")
    assert torch.equal(loaded.delta, mine.delta)
    expert_heat_map(loaded)
    for needs in (lambda scores: selection_stability(scores, n=2), template_agreement):
        with pytest.raises(DataError, match=r"log_rate_ratio.*dataclasses\.replace"):
            needs(loaded)
    again = dataclasses.replace(loaded, formula=LogRateRatio())
    assert np.array_equal(selection_stability(again, n=2).jaccard, selection_stability(mine, n=2).jaccard)
    with pytest.raises(DataError, match="formula"):
        dataclasses.replace(loaded, formula=Plain())


def test_files_of_schema_1_are_read(tmp_path: Path) -> None:
    """Before the file layer: one JSON value a metadata key, no digest."""
    scores = compare_routing(random_tables(0, 4), random_tables(1, 4), n_resamples=30)
    assert scores.evidence is not None
    tensors = {"delta": scores.delta, **scores.evidence.tensors()}
    about: dict[str, Any] = {"kind": "moe_lens.ExpertScores", "schema": 1, "score": scores.score}
    about["evidence"] = scores.evidence.settings()
    for number, stats in enumerate((scores.stats_1, scores.stats_2), start=1):
        tensors |= {f"stats_{number}.{name}": tensor for name, tensor in stats.tensors().items()}
        about[f"stats_{number}"] = stats.about()
    metadata = {key: json.dumps(value) for key, value in about.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "old", metadata)
    loaded = ExpertScores.load(tmp_path / "old")
    assert repr(loaded) == repr(scores)
    assert torch.equal(loaded.delta, scores.delta)
    assert loaded.evidence is not None
    assert loaded.evidence.settings() == scores.evidence.settings()
    assert torch.equal(loaded.evidence.q, scores.evidence.q)
    assert torch.equal(loaded.stats_2.counts, scores.stats_2.counts)
    assert loaded.formula is SCORES["risk_difference"]


def test_a_condition_against_itself_can_be_saved(tmp_path: Path) -> None:
    """Both conditions then share their tensors, which safetensors would refuse."""
    stats = random_tables(0, 4)
    compare_routing(stats, stats).save(tmp_path / "same")
    assert not ExpertScores.load(tmp_path / "same").delta.any()


@pytest.mark.parametrize("attribute", ["name", "label", "sums"])
def test_a_score_that_is_not_complete_is_refused(attribute: str) -> None:
    wrong = type("Wrong", (Plain,), {attribute: ""})()
    with pytest.raises(DataError, match=attribute):
        score_of(wrong)
    counts = random_counts(0)
    unfinished = type("Unfinished", (Score,), {"name": "u", "label": "u"})()
    with pytest.raises(NotImplementedError, match="Unfinished must define pooled"):
        score(unfinished, counts)


def test_what_is_no_score_is_refused() -> None:
    for wrong in (LogRateRatio, None, 3, "delta", ["risk_difference"]):
        with pytest.raises(DataError, match=r"There is no score .*risk_difference.*instance of a Score"):
            score_of(wrong)
    taken = type("Taken", (Plain,), {"name": "risk_difference"})()
    with pytest.raises(DataError, match="name of a score that exists"):
        score_of(taken)


@pytest.mark.parametrize("score_", ["risk_difference", LogRateRatio()], ids=str)
def test_detection_under_hooks_counts_the_steered_routes(hooked: Hooked, score_: str | Score) -> None:
    model = hooked("olmoe")
    first, second = [prompt(5, seed) for seed in range(4)], [prompt(5, seed + 9) for seed in range(4)]
    pairs = ContrastivePairs.from_lists(first, second, span=None)
    hooks = steer_hooks(SteeringPlan(deactivate=[(1, 2)], activate=[(0, 3)]))
    scores = detect(model, pairs, score=score_, hooks=hooks, progress=False, n_resamples=20)
    for stats, prompts in ((scores.stats_1, first), (scores.stats_2, second)):
        with model.hooks(hooks):
            expected = collect_routing(model, prompts, progress=False)
        assert torch.equal(stats.counts, expected.counts)
        assert int(stats.counts[1, 2]) == 0
        assert int(stats.counts[0, 3]) == stats.n_tokens
    assert not torch.equal(
        scores.delta, detect(model, pairs, score=score_, progress=False, n_resamples=20).delta
    )
