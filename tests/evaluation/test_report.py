"""The report: exact p-values, a verdict of three criteria, its words, its tables and its file."""

import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import permutation_test

from moe_lens.errors import DataError
from moe_lens.evaluation.outcomes import ByDirection, Limit, Outcome, gap_p_value
from moe_lens.evaluation.report import SteeringReport
from moe_lens.resampling import cluster_weights, clustered_interval
from moe_lens.shape import MoEShape
from moe_lens.steering.plan import SteeringPlan

SHAPE = MoEShape("m", (0, 1), 6, 2)
CLUSTERS = tuple(f"c{i // 2}" for i in range(20))
LOSS, ACCURACY = "loss", "accuracy"
LIMITS = {LOSS: Limit(0.1, True), ACCURACY: Limit(0.2, False)}


def outcome(rate: float, loss: float = 1.0, accuracy: float = 0.9) -> Outcome:
    """Half of the prompts a bit above the rate, half a bit below."""
    wiggle = 0.01 * np.where(np.arange(20) % 4 < 2, 1.0, -1.0)
    return Outcome(rate + wiggle, {LOSS: loss, ACCURACY: accuracy})


def report(
    plus: float = 0.9,
    minus: float = 0.1,
    matched: tuple[list[float], list[float]] = ([0.5] * 9, [0.5] * 9),
    any_layer: tuple[list[float], list[float]] = ([0.5] * 9, [0.5] * 9),
    **changes: Any,
) -> SteeringReport:
    whole = SteeringReport(
        task="task",
        model="m",
        plans={
            "+": SteeringPlan((), [(0, 1), (1, 2)], 0.01, SHAPE),
            "-": SteeringPlan((), [(0, 0), (1, 1), (1, 5)], 0.01, SHAPE),
        },
        clusters=CLUSTERS,
        unsteered=outcome(0.5),
        steered={"+": outcome(plus), "-": outcome(minus)},
        controls={
            "layer-matched": {s: [outcome(r) for r in m] for s, m in zip("+-", matched, strict=True)},
            "any layer": {s: [outcome(r) for r in m] for s, m in zip("+-", any_layer, strict=True)},
        },
        bottom=outcome(0.55),
        limits=LIMITS,
        alpha=0.05,
        level=0.95,
        seed=3,
    )
    return replace(whole, **changes)


# The p-value

rates = st.lists(st.integers(-4, 4).map(lambda i: i / 8), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(rates, rates)
def test_p_is_the_share_of_pairs_at_least_as_far_apart(plus: list[float], minus: list[float]) -> None:
    as_far = sum(a - b >= plus[0] - minus[0] for a, b in product(plus, minus))
    assert gap_p_value(plus, minus) == pytest.approx(as_far / (len(plus) * len(minus)), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(rates, rates)
def test_p_is_uniform_or_larger_wherever_the_plan_stands_in_both_lists(
    plus: list[float], minus: list[float]
) -> None:
    """Exchangeable: each of the (M + 1)(M' + 1) places is as likely; P(p <= a) <= a for every a."""
    ps = np.array(
        [
            gap_p_value([plus[i], *plus[:i], *plus[i + 1 :]], [minus[j], *minus[:j], *minus[j + 1 :]])
            for i in range(len(plus))
            for j in range(len(minus))
        ]
    )
    for a in {*ps.tolist(), *np.linspace(0, 1, 21).tolist()}:
        assert (ps <= a).mean() <= a + 1e-12
    if len({round(a - b, 9) for a in plus for b in minus}) == len(plus) * len(minus):  # no ties: exactly
        assert np.allclose(np.sort(ps), np.arange(1, len(ps) + 1) / len(ps))


@pytest.mark.parametrize("seed", range(4))
def test_p_is_that_of_scipys_enumeration_of_all_permutations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plus, minus = rng.integers(0, 5, 4) / 4, rng.integers(0, 5, 4) / 4
    plus[0], minus[0] = max(plus[0], 0.5), min(minus[0], 0.5)
    exact = permutation_test(
        (plus, minus),
        lambda x, y: x[0] - y[0],
        permutation_type="pairings",
        alternative="greater",
        n_resamples=24**2 + 1,
        vectorized=False,
    )
    assert len(exact.null_distribution) == 24**2
    assert gap_p_value(plus.tolist(), minus.tolist()) == pytest.approx(exact.pvalue, abs=1e-12)


def test_p_with_rounding_errors_still_counts_the_ties() -> None:
    assert gap_p_value([0.1 + 0.2, 0.3], [0.0, 0.0]) == 1.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=8))
def test_p_of_joint_draws_is_the_share_of_their_gaps(both: list[tuple[int, int]]) -> None:
    (first, *_), gaps = both, [plus - minus for plus, minus in both]
    as_far = sum(gap >= first[0] - first[1] for gap in gaps)
    plus, minus = ([float(pair[side]) for pair in both] for side in (0, 1))
    assert gap_p_value(plus, minus, joint=True) == pytest.approx(as_far / len(gaps), abs=1e-12)


def test_swapped_plans_that_do_nothing_need_joint_draws() -> None:
    """The reverse does the opposite of the plan, whatever that is: gaps vary more than those of two draws."""
    rng = np.random.default_rng(0)
    found: dict[str, int] = {"joint": 0, "alone": 0}
    for _ in range(1500):
        plus, other = rng.normal(size=(2, 21)).tolist()
        found["joint"] += gap_p_value(plus, [-one for one in plus], joint=True) <= 0.05
        found["alone"] += gap_p_value(plus, [-plus[0], *other[1:]]) <= 0.05
    assert found["joint"] / 1500 <= 0.06  # 1 / 21 expected, sd .0055
    assert found["alone"] / 1500 > 0.09


@pytest.mark.parametrize("arguments", [([], []), ([1.0], []), ([1.0, float("nan")], [0.0, 0.0])])
def test_p_of_nothing_is_refused(arguments: tuple[list[float], list[float]]) -> None:
    with pytest.raises(DataError, match="finite"):
        gap_p_value(*arguments)
    with pytest.raises(DataError, match="pairs"):
        gap_p_value([1.0, 2.0], [1.0], joint=True)


# The verdict

HIGH = [0.95] * 9
WORSE, WORST = ([0.3] * 9, [0.5] * 9), ([0.0] * 9, [1.0] * 9)


def test_joint_controls_are_compared_draw_by_draw() -> None:
    """Sets drawn together: the i-th of both directions; and the excess beyond them, on whole clusters."""
    matched = ([0.5, 0.9, 0.2, 0.6] * 5, [0.4, 0.3, 0.1, 0.9] * 5)
    apart, joint = report(0.8, 0.2, matched, matched), report(0.8, 0.2, matched, matched, joint_controls=True)
    gaps = np.array(matched[0]) - np.array(matched[1])
    assert joint.p_matched == pytest.approx((1 + (gaps >= 0.6).sum()) / 21)
    assert joint.p_matched != apart.p_matched
    assert joint.excess_matched.value == pytest.approx(0.6 - np.quantile(gaps, 0.95))
    assert apart.excess_matched.value != pytest.approx(joint.excess_matched.value)


def test_a_report_of_one_cluster_and_without_limits_is_strict_json(tmp_path: Path) -> None:
    one = report(clusters=("c",) * 20, limits={LOSS: Limit(float("inf"), True)})
    one.save(tmp_path / "r.json")

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=no_constant)
    assert content["gap_interval"] == [None, None]
    assert SteeringReport.load(tmp_path / "r.json").to_json() == one.to_json()
    assert not one.verdict


def test_joint_controls_come_in_pairs() -> None:
    with pytest.raises(DataError, match="pairs"):
        report(matched=([0.5] * 9, [0.5] * 8), joint_controls=True)


def test_plans_that_share_experts_want_joint_controls(tmp_path: Path) -> None:
    plan = SteeringPlan([(0, 1)], [(1, 2)], 0.01, SHAPE)
    plans = {"+": plan, "-": plan.reversed()}
    with pytest.warns(UserWarning, match="share experts"):
        report(plans=plans)
    joint = report(plans=plans, joint_controls=True)
    joint.save(tmp_path / "r.json")
    assert SteeringReport.load(tmp_path / "r.json").p_any == joint.p_any == pytest.approx(1 / 10)
    content = json.loads((tmp_path / "r.json").read_text())
    del content["joint_controls"], content["digest"]  # as older versions wrote it
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="share experts"):
        old = SteeringReport.load(tmp_path / "old.json")
    assert old.p_any == pytest.approx(1 / 100)


def test_all_three_criteria_make_the_verdict() -> None:
    good = report()
    assert good.verdict
    assert good.gap == pytest.approx(0.8)
    assert good.p_matched == good.p_any == pytest.approx(1 / 100)
    assert "exceeds its controls" in good.explanation
    assert "No effect" not in good.explanation


@pytest.mark.parametrize(
    ("changes", "says", "says_not"),
    [
        ({"matched": (HIGH, [0.5] * 9)}, "layer-matched random sets do as much", "any layers do as much"),
        ({"any_layer": (HIGH, [0.5] * 9)}, "any layers do as much", "layer-matched random sets do as much"),
        ({"matched": ([0.5] * 9, [0.05] * 9)}, "layer-matched random sets do as much", "reaches 0"),
        (
            {"plus": 0.4, "minus": 0.4, "matched": WORSE, "any_layer": WORSE},
            "its interval reaches 0 or lies below",
            "do as much",
        ),
        (
            {"plus": 0.1, "minus": 0.9, "matched": WORST, "any_layer": WORST},
            "its interval reaches 0 or lies below",
            "do as much",
        ),
    ],
    ids=["matched", "any", "matched in the other direction", "no gap", "the wrong way"],
)  # fmt: skip
def test_each_failing_criterion_denies_the_verdict_and_is_named(
    changes: dict[str, Any], says: str, says_not: str
) -> None:
    failing = report(**changes)
    assert not failing.verdict
    assert failing.explanation.startswith("No effect beyond the controls")
    assert says in failing.explanation
    assert says_not not in failing.explanation


def test_one_cluster_gives_no_interval_and_no_verdict() -> None:
    alone = report(clusters=("all",) * len(CLUSTERS))
    assert np.isnan(alone.gap_interval).all()
    assert not alone.verdict
    assert "one cluster of prompts tells nothing of others" in alone.explanation
    assert "[one cluster, no interval]" in alone.summary()
    assert "nan" not in alone.explanation + alone.summary()
    assert "moves as meant" not in alone.explanation


def test_several_failing_criteria_are_all_named() -> None:
    failing = report(0.4, 0.6)
    assert not failing.verdict
    for words in ("its interval", "layer-matched random sets do as much", "any layers do as much"):
        assert words in failing.explanation


@settings(max_examples=60, deadline=None)
@given(
    plus=st.floats(0, 1),
    minus=st.floats(0, 1),
    alpha=st.sampled_from([0.01, 0.05, 0.3]),
    seed=st.integers(0, 99),
)
def test_the_verdict_from_its_definition(plus: float, minus: float, alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matched, anywhere = (([*rng.random(7)], [*rng.random(5)]) for _ in range(2))
    made = report(plus, minus, matched, anywhere, alpha=alpha)
    expected = made.gap_interval[0] > 0
    for one in (matched, anywhere):
        first, second = ([own, *others] for own, others in zip((plus, minus), one, strict=True))
        as_far = sum(a - b >= plus - minus - 1e-12 for a, b in product(first, second))
        expected &= as_far / 48 <= alpha
    expected &= made.excess_matched.low > 0 and made.excess_any.low > 0
    assert made.verdict == expected


def test_a_one_directional_effect_is_said_to_be_one() -> None:
    words = report(0.9, 0.5).explanation
    assert "Direction + moves as meant (+0.40" in words
    assert "direction − does not move as meant (+0.00" in words
    words = report(0.5, 0.1).explanation
    assert "Direction + does not move as meant" in words
    assert "direction − moves as meant (-0.40" in words


def test_a_minus_sign_is_the_hyphen_and_nothing_else_is_a_direction() -> None:
    whole = report()
    assert whole.steered["−"] is whole.steered["-"]
    assert whole.plans["−"] is whole.plans["-"]
    assert whole.controls["any layer"]["−"] is whole.controls["any layer"]["-"]
    assert whole.effect_interval("−") == whole.effect_interval("-")
    assert list(whole.steered) == list(whole.plans) == list(whole.controls["any layer"]) == ["+", "-"]
    assert [*report(steered={"+": outcome(0.9), "−": outcome(0.1)}).steered] == ["+", "-"]  # as before
    for name in ("minus", ""):
        with pytest.raises(DataError, match="direction"):
            whole.effect_interval(name)


def test_a_direction_that_activates_says_so() -> None:
    plans = {"+": SteeringPlan((), [(0, 1)], 0.01, SHAPE), "-": SteeringPlan([(0, 1)], (), 0.01, SHAPE)}
    words = report(plans=plans).explanation
    assert "Direction + moves as meant" in words
    assert "direction −, by activating 1 expert, moves as meant" in words


@pytest.mark.parametrize(
    ("activate", "deactivate", "says"),
    [
        ([(0, 1)], [(1, 0)], "by activating 1 and deactivating 1 expert,"),
        ([(0, 1), (1, 1)], [(1, 0)], "by activating 2 and deactivating 1 expert,"),
        ([(0, 1)], [(1, 0), (0, 0)], "by activating 1 and deactivating 2 experts,"),
        ([(0, 1), (1, 0)], [(1, 0)], "by activating 1 and deactivating 1 expert,"),  # deactivation wins
        ([(0, 1), (1, 0)], [], "by activating 2 experts,"),
        ([(0, 1)], [(0, 1)], ""),
    ],
)
def test_what_a_direction_does_is_said_whole(activate: Any, deactivate: Any, says: str) -> None:
    plans = {
        "+": SteeringPlan(activate, deactivate, 0.01, SHAPE),
        "-": SteeringPlan((), [(0, 1)], 0.01, SHAPE),
    }
    words = report(plans=plans).explanation
    assert f"Direction +{', ' if says else ''}{says} moves as meant" in words
    assert "direction − moves as meant" in words


def test_intervals_are_those_of_the_differences_over_clusters() -> None:
    rng = np.random.default_rng(0)
    first, second, before = (Outcome(rng.random(20), {LOSS: 1.0, ACCURACY: 0.9}) for _ in range(3))
    made = report(steered={"+": first, "-": second}, unsteered=before, level=0.8)
    gap = clustered_interval(first.values - second.values, CLUSTERS, level=0.8, seed=3)
    assert made.gap_interval == gap
    effect = clustered_interval(second.values - before.values, CLUSTERS, level=0.8, seed=3)
    assert made.effect_interval("-") == effect
    assert gap[0] < made.gap < gap[1]


@pytest.mark.parametrize("kind", ["layer-matched", "any layer"])
def test_excess_from_its_definition(kind: str) -> None:
    rng = np.random.default_rng(1)

    def some(n: int, rate: float) -> list[Outcome]:
        return [
            Outcome(rng.binomial(1, rate, 20).astype(float), {LOSS: 1.0, ACCURACY: 0.9}) for _ in range(n)
        ]

    own = {"+": some(1, 0.9)[0], "-": some(1, 0.2)[0]}
    controls = {name: {"+": some(4, 0.5), "-": some(3, 0.5)} for name in ("layer-matched", "any layer")}
    made = report(steered=own, controls=controls, alpha=0.2, level=0.9)

    def excess(weight: np.ndarray) -> float:
        def rate(one: Outcome) -> float:
            return sum(w * v for w, v in zip(weight, one.values, strict=True)) / sum(weight)

        plus, minus = ([rate(one) for one in controls[kind][side]] for side in "+-")
        gaps = [a - b for a, b in product(plus, minus)]
        return rate(own["+"]) - rate(own["-"]) - float(np.quantile(gaps, 0.8))

    resampled = [excess(weight) for weight in cluster_weights(CLUSTERS, 1000, 3)]
    n = len(set(CLUSTERS))  # few: the interval is that of a t distribution, not of a normal one
    tail = stats.norm.cdf(-stats.t.ppf(0.95, n - 1) * (n / (n - 1)) ** 0.5)
    expected = (excess(np.ones(20)), *np.quantile(resampled, [tail, 1 - tail]))
    got = made.excess_matched if kind == "layer-matched" else made.excess_any
    assert got == pytest.approx(expected)
    assert f"{expected[0]:+.2f} [{expected[1]:+.2f}, {expected[2]:+.2f}] ({kind})" in made.explanation
    assert "Beyond 80 % of the random sets' gaps" in made.explanation


@pytest.mark.parametrize("kind", ["layer-matched", "any layer"])
def test_what_other_prompts_may_undo_is_no_effect(kind: str) -> None:
    """The plan beats every random set, by one cluster alone; without that cluster it beats none."""
    first, collateral = np.arange(20) < 2, {LOSS: 1.0, ACCURACY: 0.9}
    none = Outcome(np.full(20, 0.1), collateral)
    steered = {"+": Outcome(np.where(first, 1.1, 0.6), collateral), "-": none}
    close = Outcome(np.where(first, 0.1, 0.62), collateral)
    whole = {**report().controls, kind: {"+": [close] * 9, "-": [none] * 9}}
    made = report(steered=steered, controls=whole)
    p = made.p_matched if kind == "layer-matched" else made.p_any
    excess = made.excess_matched if kind == "layer-matched" else made.excess_any
    assert p == pytest.approx(1 / 10)
    assert excess.value > 0 > excess.low
    made = replace(made, alpha=0.2)
    assert not made.verdict
    words = "layer-matched random sets" if kind == "layer-matched" else "random sets in any layers"
    assert f"on other prompts {words} may do as much" in made.explanation
    assert made.explanation.count("do as much") == 1


# Saturation


def ones(n: int) -> Outcome:
    """`n` ones and zeros for the rest of 40 prompts."""
    return Outcome((np.arange(40) < n).astype(float), {})


def of_ones(unsteered: int, plus: int, minus: int, random: list[int]) -> SteeringReport:
    """A report of 40 prompts from numbers of ones; the random sets serve both kinds and directions."""
    controls = {side: [ones(n) for n in random] for side in "+-"}
    return SteeringReport(
        task="task", model="m", plans=report().plans, clusters=tuple(f"c{i // 2}" for i in range(40)),
        unsteered=ones(unsteered), steered={"+": ones(plus), "-": ones(minus)},
        controls={"layer-matched": controls, "any layer": controls}, bottom=None, limits={},
        alpha=0.05, level=0.95, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("conditions", "where"),
    [
        ((40, 40, 40, [40] * 5), "ceiling"),
        ((0, 0, 0, [0] * 5), "floor"),
        ((39, 40, 38, [40, 39, 38, 40, 40]), "ceiling"),  # 38 of 40 are 95 %
        ((1, 0, 2, [1, 0, 2, 0, 0]), "floor"),
        ((39, 40, 37, [40] * 5), None),
        ((0, 3, 0, [0] * 5), None),
        ((40, 40, 40, [40, 40, 40, 40, 20]), None),  # random sets move it, so that it can be moved
        ((20, 20, 20, [20] * 5), "constant"),
        ((20, 20, 20, [20, 20, 20, 20, 21]), None),
        ((20, 30, 10, [20] * 5), None),
    ],
)
def test_a_measure_without_room_is_said_to_have_none(conditions: Any, where: str | None) -> None:
    made = of_ones(*conditions)
    assert made.saturation == where
    no_evidence = "is no evidence that the plan does nothing" in made.explanation
    assert no_evidence == (where is not None) == ("shows nothing" in repr(made))
    assert ("No effect beyond the controls" in made.explanation) == (where is None and not made.verdict)
    value = {"ceiling": "its ceiling (1)", "floor": "its floor (0)", "constant": "value of any prompt"}
    assert all((words in made.explanation) == (name == where) for name, words in value.items())
    assert made.explanation in str(made)


def test_an_effect_near_the_floor_is_an_effect_that_is_cut() -> None:
    zero = Outcome(np.zeros(20), {LOSS: 1.0, ACCURACY: 1.0})
    some = Outcome((np.arange(20) == 0).astype(float), zero.collateral)
    controls = {side: [zero] * 20 for side in "+-"}
    made = report(
        steered={"+": some, "-": zero},
        unsteered=zero,
        bottom=zero,
        controls={"layer-matched": controls, "any layer": controls},
    )
    assert made.saturation == "floor"
    made.__dict__["gap_interval"] = (0.01, 0.1)  # as with many more prompts
    made.__dict__["excesses"] = {kind: made.excess_any._replace(low=0.01) for kind in made.excesses}
    assert made.verdict
    assert "exceeds its controls" in made.explanation
    assert "But at least 95% of the prompts sit at its floor (0)" in made.explanation
    assert "exceeds its controls" in repr(made)


def test_the_file_tells_of_saturation(tmp_path: Path) -> None:
    for n in (20, 40):
        of_ones(n, 40, n, [n] * 4).save(tmp_path / "report.json")
        content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        loaded = SteeringReport.load(tmp_path / "report.json")
        assert content["saturation"] == loaded.saturation == {20: None, 40: "ceiling"}[n]


# Collateral


@pytest.mark.parametrize(
    ("loss", "accuracy", "beyond"),
    [
        (1.05, 0.85, set()),
        (1.1, 0.7, set()),
        (1.11, 0.9, {LOSS}),
        (1.0, 0.65, {ACCURACY}),
        (2.0, 0.1, {LOSS, ACCURACY}),
        (0.5, 1.0, set()),
    ],
)
def test_collateral_beyond_its_limit_is_said(loss: float, accuracy: float, beyond: set[str]) -> None:
    made = report(steered={"+": outcome(0.9), "-": outcome(0.1, loss, accuracy)})
    harms = made.harms()
    assert harms[LOSS]["-"] == pytest.approx(loss - 1.0)
    assert harms[ACCURACY]["-"] == pytest.approx(0.9 - accuracy)
    assert harms[LOSS]["+"] == harms[ACCURACY]["+"] == 0.0
    for name in (LOSS, ACCURACY):
        sentence = made.explanation.split(f"Collateral: {name} ")[1]
        sentence = sentence.split("Collateral")[0]
        assert ("MORE than the limit" in sentence) == (name in beyond)
        assert ("within the limit" in sentence) == (name not in beyond)
        worst = max(0.0, loss - 1.0 if name == LOSS else 0.9 - accuracy)
        assert f"worse by at most {worst:.2f}" in sentence
    assert made.verdict  # the verdict is about the effect


def test_no_harm_has_no_sign() -> None:
    assert "-0.00 (direction" not in report().explanation


def test_without_collateral_nothing_is_said_of_it() -> None:
    assert "Collateral" not in report(limits={}).explanation


# Tables


def test_rows_of_the_table() -> None:
    made = report(matched=([0.4, 0.6, 0.8], [0.1, 0.2]))
    frame = made.to_dataframe().set_index("condition")
    assert list(frame.index) == [
        "unsteered",
        "steered +",
        "steered −",
        "least-scoring experts",
        "3 random sets, layer-matched, as +",
        "2 random sets, layer-matched, as −",
        "9 random sets, any layer, as +",
        "9 random sets, any layer, as −",
    ]
    assert list(frame.columns) == ["experts", "mean", "low", "high", "sd", LOSS, ACCURACY]
    assert frame["experts"].tolist() == [0, 2, 3, 2, 2, 3, 2, 3]
    assert frame["mean"].tolist() == pytest.approx([0.5, 0.9, 0.1, 0.55, 0.6, 0.15, 0.5, 0.5])
    assert frame["sd"].tolist()[4:6] == pytest.approx([0.2, np.sqrt(0.005)])
    assert frame["sd"].iloc[:4].isna().all()
    assert frame["low"].notna().tolist() == [True] * 3 + [False] * 5
    for name, one in (("unsteered", made.unsteered), ("steered −", made.steered["-"])):
        low, high = clustered_interval(one.values, CLUSTERS, level=0.95, seed=3)
        assert (frame["low"][name], frame["high"][name]) == (low, high)
    assert frame[LOSS].tolist() == [1.0] * 8


def test_without_scores_there_is_no_bottom_row() -> None:
    assert "least-scoring experts" not in report(bottom=None).to_dataframe()["condition"].tolist()


def test_markdown_is_the_table_and_the_verdict() -> None:
    made = report()
    table, words = made.to_markdown().split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    frame = made.to_dataframe()
    assert rows[0] == list(frame.columns)
    assert set(rows[1]) == {"---"}
    assert [row[0] for row in rows[2:]] == frame["condition"].tolist()
    assert {len(row) for row in rows} == {len(frame.columns)}
    assert rows[3][2] == "0.900"
    assert "nan" not in table
    assert words.strip() == made.explanation


def test_printed_it_has_names_table_and_verdict() -> None:
    printed = str(report())
    assert printed.startswith("task (m)\n")
    assert "layer-matched, as −" in printed
    assert printed.endswith(report().explanation)


# Files


@pytest.mark.parametrize("bottom", [None, outcome(0.3)])
def test_a_saved_report_loads_as_it_was(tmp_path: Path, bottom: Outcome | None) -> None:
    made = report(matched=([0.1, 1 / 3], [0.7]), bottom=bottom)
    made.save(tmp_path / "report.json")
    loaded = SteeringReport.load(tmp_path / "report.json")
    assert loaded.to_json() == made.to_json()
    assert loaded.plans == made.plans
    assert loaded.limits == made.limits
    assert loaded.clusters == made.clusters
    assert str(loaded) == str(made)
    assert loaded.steered["+"].values.tolist() == made.steered["+"].values.tolist()
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_file_tells_the_verdict(tmp_path: Path) -> None:
    for name, made in (("yes", report()), ("no", report(0.5, 0.5))):
        made.save(tmp_path / name)
        content = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        assert (content["verdict"], content["explanation"]) == (name == "yes", made.explanation)
        assert content["gap_interval"] == list(made.gap_interval)
        assert (content["p_matched"], content["p_any"]) == (made.p_matched, made.p_any)


def test_a_file_of_version_0_1_is_read(tmp_path: Path) -> None:
    """Schema 1: minus signs as keys, no digests."""
    plan = {"kind": "moe_lens.SteeringPlan", "schema": 1, "activate": [], "epsilon": 0.01, "shape": None}
    loss, up, down = {"loss": 1.0}, [1.0, 1.0, 0.5], [0.0, 0.5, 0.0]
    sides = {
        "+": [{"values": down, "collateral": loss}, {"values": up, "collateral": loss}],
        "−": [{"values": up, "collateral": loss}],
    }
    old = {
        "kind": "moe_lens.SteeringReport",
        "schema": 1,
        "task": "task",
        "model": "m",
        "alpha": 0.3,
        "level": 0.9,
        "seed": 2,
        "clusters": ["a", "b", "b"],
        "plans": {"+": {**plan, "deactivate": [[0, 1]]}, "−": {**plan, "deactivate": [[1, 2], [1, 3]]}},
        "limits": {"loss": {"limit": 0.1, "larger_is_worse": True}},
        "unsteered": {"values": [0.0, 1.0, 0.0], "collateral": loss},
        "steered": {"+": {"values": up, "collateral": loss}, "−": {"values": down, "collateral": loss}},
        "controls": {"layer-matched": sides, "any layer": sides},
        "bottom": None,
        "gap": 0.6666666666666666,
        "gap_interval": [0.5, 1.0],
        "p_matched": 1.0,
        "p_any": 1.0,
        "verdict": False,
        "explanation": "words",
    }
    (tmp_path / "old.json").write_text(json.dumps(old, ensure_ascii=False), encoding="utf-8")
    loaded = SteeringReport.load(tmp_path / "old.json")
    assert loaded.steered["-"].values.tolist() == down
    assert loaded.plans == {
        "+": SteeringPlan(deactivate=[(0, 1)]),
        "-": SteeringPlan(deactivate=[(1, 2), (1, 3)]),
    }
    assert [len(loaded.controls["any layer"][side]) for side in "+-"] == [2, 1]
    assert loaded.gap == pytest.approx(2 / 3)
    loaded.save(tmp_path / "new.json")
    text = (tmp_path / "new.json").read_text(encoding="utf-8")
    assert [*json.loads(text)["steered"]] == [*json.loads(text)["controls"]["any layer"]] == ["+", "-"]
    assert SteeringReport.load(tmp_path / "new.json").to_json() == loaded.to_json()


def test_equal_reports_give_equal_bytes_and_a_changed_number_is_damage(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        report().save(tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    content["steered"]["+"]["values"][0] += 0.5
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="digest"):
        SteeringReport.load(tmp_path / "a.json")


def test_a_report_shows_verdict_gap_and_p_in_one_line() -> None:
    line = repr(report())
    assert line.startswith("SteeringReport(exceeds its controls: gap +0.80 [")
    assert line.endswith("p = 0.010 layer-matched, 0.010 any layer)")
    assert repr(report(0.5, 0.5)).startswith("SteeringReport(not beyond its controls: gap +0.00 [")
    page = report()._repr_html_()
    assert "exceeds its controls" in page
    assert page.count("<tr>") >= 8
    assert repr(outcome(0.5)) == "Outcome(mean 0.5 over 20 prompts, loss 1, accuracy 0.9)"


FIELDS = (
    "task", "model", "plans", "clusters", "unsteered", "steered", "controls", "bottom", "limits",
    "alpha", "level", "seed", "kind", "schema",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_refused(tmp_path: Path, field: str) -> None:
    content = report().to_json()
    del content["digest"], content[field]
    (tmp_path / "cut.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"cut\.json"):
        SteeringReport.load(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plans", []),
        ("plans", {"+": {}}),
        ("clusters", 3),
        ("unsteered", {"values": "many", "collateral": {}}),
        ("unsteered", {"values": [1.0]}),
        ("steered", {"+": 3}),
        ("controls", {"any layer": [1]}),
        ("limits", {"loss": {"limit": 1}}),
        ("limits", {"loss": {"limit": 1, "larger_is_worse": True, "extra": 0}}),
    ],
)
def test_an_altered_field_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    content = {**report().to_json(), field: value}
    del content["digest"]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bad\.json"):
        SteeringReport.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("controls", {}),
        ("unsteered", {"values": [None] * 20, "collateral": {LOSS: 1.0, ACCURACY: 0.9}}),
        ("unsteered", {"values": [1.0], "collateral": {LOSS: 1.0, ACCURACY: 0.9}}),
        ("unsteered", {"values": [1.0] * 20, "collateral": {}}),
        ("clusters", ["a", "b"]),
        ("level", 7.0),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    content = {**report().to_json(), field: value}
    del content["digest"]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"bad\.json"):
        SteeringReport.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"kind": "moe_lens.SteeringPlan", "schema": 1}', "[" * 100_000]
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(DataError, match=r"other\.json"):
        SteeringReport.load(tmp_path / "other.json")
    with pytest.raises(DataError, match="missing"):
        SteeringReport.load(tmp_path / "missing")


def test_directions_are_asked_for_as_in_any_dictionary() -> None:
    both = ByDirection({"+": 1, "−": 2})
    assert "-" in both
    assert "−" in both
    assert "minus" not in both
    assert (both.get("−"), both.get("-"), both.get("minus"), both.get("minus", 3)) == (2, 2, None, 3)
    assert list(both) == ["+", "-"]
    with pytest.raises(DataError, match="direction"):
        both["minus"]
