"""predict_errors: AUROC by counting pairs, calibration by a grid search, intervals by resampling."""

import math
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_lens import organisms, predict_errors, route_uncertainty
from moe_lens.errors import DataError
from moe_lens.evaluation.error_prediction import _logistic, _weighted_auroc
from moe_lens.resampling import cluster_weights

RNG = np.random.default_rng(0)
WRONG = RNG.random(120) < 0.4
SIGNAL = WRONG + RNG.normal(size=120)
NOISE = RNG.normal(size=120)


def by_pairs(values: Any, wrong: Any) -> float:
    pairs = [
        1.0 if bad > good else 0.5 if bad == good else 0.0
        for bad, w in zip(values, wrong, strict=True)
        if w
        for good, v in zip(values, wrong, strict=True)
        if not v
    ]
    return sum(pairs) / len(pairs)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    values, wrong = [float(v) for v, _ in rows], [w for _, w in rows]
    if len(set(wrong)) < 2:
        return
    report = predict_errors({"x": values}, wrong, baseline="x", n_folds=2) if _both_folds(wrong) else None
    ones = np.ones((1, len(rows)))
    found = _weighted_auroc(np.array(values), np.array(wrong, float), ones)[0]
    assert found == pytest.approx(by_pairs(values, wrong))
    if report is not None:
        assert report.auroc("x") == pytest.approx(by_pairs(values, wrong))
    doubled = _weighted_auroc(np.array(values), np.array(wrong, float), 2 * ones)[0]
    assert doubled == pytest.approx(found)


def _both_folds(wrong: list[bool]) -> bool:
    try:
        predict_errors({"x": list(range(len(wrong)))}, wrong, baseline=None, n_folds=2)
    except DataError:
        return False
    return True


def test_weights_count_prompts_several_times() -> None:
    values, wrong = np.array([1.0, 2.0, 2.0, 0.0]), np.array([0.0, 1.0, 0.0, 1.0])
    weights = np.array([[2.0, 1.0, 0.0, 3.0], [1, 0, 1, 0]])
    found = _weighted_auroc(values, wrong, weights)
    repeated = [(v, w) for v, w, n in zip(values, wrong, weights[0], strict=True) for _ in range(int(n))]
    assert found[0] == pytest.approx(by_pairs(*zip(*repeated, strict=True)))
    assert math.isnan(found[1])


def test_the_logistic_curve_is_the_most_likely_one() -> None:
    """No a and b near those that were found make the answers likelier."""
    at = np.array([0.0, 1.0])
    low, high = _logistic(SIGNAL, WRONG.astype(float), at)
    a, b = low, high - low

    def loss(a: float, b: float) -> float:
        return float(np.logaddexp(0, np.where(WRONG, -1, 1) * (a + b * SIGNAL)).sum())

    best = loss(a, b)
    for da in (-0.02, 0, 0.02):
        for db in (-0.02, 0, 0.02):
            assert loss(a + da, b + db) >= best - 1e-6


def test_a_signal_beats_noise_and_its_interval_says_so() -> None:
    report = predict_errors({"signal": SIGNAL, "softmax entropy": NOISE}, WRONG)
    assert report.auroc("signal") == pytest.approx(by_pairs(SIGNAL, WRONG))
    low, high = report.auroc_interval("signal")
    assert low < report.auroc("signal") < high
    assert report.gain_interval("signal")[0] > 0
    assert report.gain_interval("softmax entropy") == (0.0, 0.0)
    assert report.auroc_interval("softmax entropy")[0] < 0.5
    assert report.brier("signal") < report.brier("softmax entropy")
    table = report.to_dataframe().set_index("predictor")
    assert table.loc["signal", "gain"] == pytest.approx(by_pairs(SIGNAL, WRONG) - by_pairs(NOISE, WRONG))


def test_wrong_answers_of_one_cluster_have_no_interval_and_few_widen_it() -> None:
    wrong = np.arange(40) < 3
    signal = wrong + np.random.default_rng(0).normal(size=40)
    labels = tuple(f"{number:02}" for number in range(40))
    found = predict_errors({"signal": signal}, wrong, clusters=labels, baseline=None, n_folds=40)
    low, high = found.auroc_interval("signal")
    assert 0 <= low < found.auroc("signal") < high <= 1
    weights = cluster_weights(labels, 2000, 0)[:400].astype(int)
    draws = [by_pairs(np.repeat(signal, w), np.repeat(wrong, w)) for w in weights if w[:3].any()]
    reach = stats.t.ppf(0.975, 2) * np.sqrt(3 / 2) * np.std(draws)  # three clusters hold wrong answers
    assert low == pytest.approx(max(found.auroc("signal") - reach, 0), abs=0.1)
    alone = replace(found, clusters=("00",) * 3 + labels[3:])
    assert np.isnan(alone.auroc_interval("signal")).all()


def test_curves_are_means_of_bins() -> None:
    report = predict_errors({"signal": SIGNAL}, WRONG, baseline=None, n_bins=4)
    bins = report.curve("signal")
    assert [each.n for each in bins] == [30, 30, 30, 30]
    order = np.argsort(report.probabilities["signal"])
    for each, rows in zip(bins, np.split(order, 4), strict=True):
        assert each.predicted == pytest.approx(report.probabilities["signal"][rows].mean())
        assert each.wrong == pytest.approx(WRONG[rows].mean())
    assert report.calibration_error("signal") == pytest.approx(
        sum(30 * abs(each.predicted - each.wrong) for each in bins) / 120
    )
    ties = predict_errors({"x": np.zeros(120)}, WRONG, baseline=None)
    assert sum(each.n for each in ties.curve("x")) == 120
    assert ties.auroc("x") == 0.5


def test_probabilities_come_from_other_clusters() -> None:
    """A predictor that knows each cluster's answers by its label, and nothing else, predicts nothing."""
    rng = np.random.default_rng(1)
    clusters = [f"c{i // 4}" for i in range(120)]
    wrong = np.repeat(rng.random(30) < 0.5, 4)
    memory = np.repeat(rng.permutation(30), 4).astype(float)
    report = predict_errors({"memory": memory}, wrong, clusters=clusters, baseline=None)
    assert report.brier("memory") > 0.2
    narrow = predict_errors({"memory": memory}, wrong, baseline=None)
    wide_low, wide_high = report.auroc_interval("memory")
    low, high = narrow.auroc_interval("memory")
    assert wide_high - wide_low > high - low


def test_of_route_uncertainty() -> None:
    model, facts = organisms.load("null"), organisms.world("null").facts("test")[:30]
    found = route_uncertainty(model, [f.question for f in facts], 3, batch_size=30, progress=False)
    wrong = np.arange(30) % 3 == 0
    report = predict_errors(found, wrong, clusters=[f.entity for f in facts], n_folds=3)
    assert set(report.predictors) == set(found.predictors)
    assert report.baseline == "softmax entropy"
    assert "AUROC" in repr(report)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (({}, [1, 0]), {}, "mapping"),
        (({"x": [1, 2]}, [0, 0]), {}, "at least one of each"),
        (({"x": [1, 2]}, [0, 2]), {}, "true and false"),
        (({"x": [1, 2, 3]}, [0, 1]), {}, "one a prompt"),
        (({"x": [1, math.nan]}, [0, 1]), {}, "finite"),
        (({"x": [1, 2]}, [0, 1]), {}, "baseline"),
        (({"x": [1, 2]}, [0, 1]), {"baseline": None}, "too few"),
        (({"x": [1, 2, 3, 4]}, [0, 1, 0, 0]), {"baseline": None, "n_folds": 4}, "Outside of one fold"),
        (({"x": [1, 2]}, [0, 1]), {"baseline": None, "clusters": ["a"]}, "as many clusters"),
        (({"x": [1, 2]}, [0, 1]), {"baseline": None, "n_folds": 1}, "n_folds"),
    ],
)
def test_refused(arguments: Any, options: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        predict_errors(*arguments, **options)


def test_many_prompts_need_no_table_of_prompts_by_prompts() -> None:
    """30,000 different values: a table of all pairs would be 7 GB, and the peak stays near the weights'."""
    n = 30_000
    values, wrong = np.random.default_rng(1).permutation(n).astype(float), (np.arange(n) % 2).astype(float)
    weights = np.ones((2, n))
    tracemalloc.start()
    found = _weighted_auroc(values, wrong, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ranks = values[wrong == 1].sum() + wrong.sum()
    expected = (ranks - wrong.sum() * (wrong.sum() + 1) / 2) / (wrong.sum() * (n - wrong.sum()))
    assert found == pytest.approx([expected, expected])
    assert peak < 20 * weights.nbytes
