"""The probe against scipy, known areas, a null, and behaviours that only words or only routes show."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu

from moe_lens import collect_by_prompt, collect_routing, organisms, route_probe
from moe_lens.detection.ridge_logistic import auroc, concordance, fitted, held_out_scores, stratified_folds
from moe_lens.errors import DataError
from moe_lens.statistics.counts import TokenCounts
from moe_lens.statistics.routing_stats import RoutingStats
from tests.statistics.test_vocabulary import stats_of


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_the_fit_is_the_minimum_that_scipy_finds(ridge: float) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 6)), rng.random(30) < 0.4

    def loss(w: np.ndarray) -> float:
        margins = np.where(labels, 1, -1) * (features @ w[:-1] + w[-1])
        return float(np.log1p(np.exp(-margins)).sum() + ridge / 2 * (w[:-1] ** 2).sum())

    expected = minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(fitted(features, labels, ridge), expected, atol=1e-4)


def test_the_area_is_mann_whitneys() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.5
    expected = mannwhitneyu(scores[labels], scores[~labels]).statistic / labels.sum() / (~labels).sum()
    assert auroc([concordance(scores, labels)]) == pytest.approx(expected)


def test_held_out_prompts_are_not_learnt_from() -> None:
    """Other labels of the held-out prompts change nothing; they are separated where training prompts are."""
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(40, 100)), np.arange(40) % 2 == 0
    features[:, :30] += 2 * labels[:, None]
    test = np.arange(40) < 10
    scores = held_out_scores(features, labels, test, 0)
    np.testing.assert_array_equal(scores, held_out_scores(features, labels ^ test, test, 0))
    assert auroc([concordance(scores, labels[test])]) == 1
    np.testing.assert_array_equal(held_out_scores(np.ones((40, 3)), labels, test, 0), 0)


def unit(seed: int, routes_tell: bool, words_tell: bool, positive: bool) -> RoutingStats:
    """30 tokens over 6 experts and 20 words, of which the first is commoner where it tells."""
    rng = np.random.default_rng([seed, positive])
    share = np.full(6, 1.0)
    share[0] += 4.0 * (routes_tell and positive)
    words = np.full(20, 1.0)
    words[0] += 9.0 * (words_tell and positive)
    layer = torch.tensor(
        np.array([rng.choice(6, 2, replace=False, p=share / share.sum()) for _ in range(30)])
    )
    return stats_of([layer], torch.tensor(rng.choice(20, 30, p=words / words.sum())), 6)


def data(
    routes_tell: bool, words_tell: bool, n: int = 80, n_groups: int = 4
) -> tuple[list[RoutingStats], list[bool], list[int]]:
    labels = [bool(i % 2) for i in range(n)]
    return (
        [unit(i, routes_tell, words_tell, y) for i, y in enumerate(labels)],
        labels,
        [i // 2 % n_groups for i in range(n)],
    )


def test_it_tells_what_the_route_shows_from_what_the_words_show() -> None:
    """Of ten groups: those of fewer have the wide intervals that so few allow."""
    (units, labels, groups), *others = (data(*tell, n_groups=10) for tell in ((True, False), (False, True)))
    routes = route_probe(units, labels, groups=groups)
    assert routes.auroc.value > 0.9
    assert routes.bag_auroc.low < 0.5 < routes.bag_auroc.high
    assert routes.difference.low > 0.2
    ((units, labels, groups),) = others
    words = route_probe(units, labels, groups=groups)
    assert words.bag_auroc.value > 0.9
    assert words.difference.high < -0.2
    neither = route_probe(*data(False, False)[:2], groups=data(False, False)[2])
    assert neither.auroc.low < 0.5 < neither.auroc.high
    assert len(neither.by_group) == 4


@pytest.mark.broad
def test_areas_are_of_pairs_within_groups() -> None:
    units, labels, groups = data(True, False, 24)
    probe = route_probe(units, labels, groups=groups)
    right = total = 0.0
    for i, a in enumerate(labels):
        for j, b in enumerate(labels):
            if a and not b and groups[i] == groups[j]:
                right += 1.0 * (probe.scores[i] > probe.scores[j]) + 0.5 * (
                    probe.scores[i] == probe.scores[j]
                )
                total += 1
    assert probe.auroc.value == pytest.approx(right / total)
    couples = route_probe(units, labels, groups=[i // 2 for i in range(24)])  # one of each label in a group
    assert couples.difference.low < couples.difference.value < couples.difference.high
    with pytest.raises(DataError, match="No group holds both labels"):
        route_probe(units, labels, groups=list(range(24)))
    assert len(route_probe(units, labels).groups) == 10


def test_statistics_of_one_run_give_the_same_probe() -> None:
    model, conflicts = (
        organisms.load("specialised"),
        organisms.world("specialised").conflicts("detection")[:10],
    )
    prompts = [text for c in conflicts for text in (c.open_book, c.closed_book)]
    labels, groups = [1, 0] * 10, [c.entity for c in conflicts for _ in range(2)]
    units = collect_by_prompt(model, prompts, vocabulary=True, progress=False)
    whole = collect_routing(model, prompts, per_prompt=True, progress=False)
    tokens = [model.to_tokens(prompt)[0] for prompt in prompts]
    one = route_probe(units, labels, groups=groups)
    two = route_probe(whole, np.array(labels), groups=groups, tokens=tokens)
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-6)
    np.testing.assert_allclose(one.bag_scores, two.bag_scores, atol=1e-6)
    assert (one.positive, one.negative) == ("1", "0")
    late = route_probe(units, labels, groups=groups, layers="late")
    assert not np.allclose(one.scores, late.scores)
    with pytest.raises(DataError, match="The baseline needs each prompt's tokens"):
        route_probe(whole, labels, groups=groups)
    with pytest.raises(DataError, match="their numbers differ"):
        route_probe(whole, labels, groups=groups, tokens=[row[1:] for row in tokens])
    with pytest.raises(DataError, match="units know their own"):
        route_probe(units, labels, groups=groups, tokens=tokens)


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([0, 1], None, "8 prompts need as many labels; got 2"),
        ([0] * 8, None, "of two kinds"),
        ([0, 1, 2, 0, 1, 2, 0, 1], None, "of two kinds"),
        ([0] * 7 + [1], None, "two prompts at least"),
        ([0, 1] * 4, [0], "as many groups; got 1"),
        ([0, 1] * 4, [0] * 8, "needs two at least"),
        (
            [0, 0, 0, 0, 1, 1, 1, 1],
            [0, 0, 0, 0, 1, 1, 1, 1],
            "Without group '0' all prompts are labelled alike",
        ),
    ],
)
def test_bad_input_is_refused(labels: Any, groups: Any, message: str) -> None:
    units = data(True, True, 8)[0]
    with pytest.raises(DataError, match=message):
        route_probe(units, labels, groups=groups)


def test_folds_hold_both_labels() -> None:
    labels = np.arange(33) % 3 == 0
    folds = stratified_folds(labels, 5, 0)
    assert {(f, y) for f, y in zip(folds.tolist(), labels.tolist(), strict=True)} == {
        (f, y) for f in range(5) for y in (True, False)
    }
    units = data(True, True, 8)[0]
    with pytest.raises(DataError, match="vocabulary=True"):
        route_probe([replace(u, vocabulary=None) for u in units], [0, 1] * 4)
    assert isinstance(units[0].vocabulary, TokenCounts)
