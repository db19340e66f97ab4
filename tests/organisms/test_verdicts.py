"""The organisms' verdicts with all their controls: slow, since every control is a plan that is evaluated."""

import pytest

from moe_lens.organisms.demo import run_demo
from moe_lens.organisms.recipes import NULLS
from tests.families import broad

pytestmark = broad


@pytest.mark.parametrize("name", ["specialised", "planted", "planted-mixtral", "natural", "candid"])
def test_steers_both_ways_beyond_its_controls(name: str) -> None:
    report = run_demo(name, n_random=19, progress=False).report
    assert report.gap_interval[0] > 0.4
    assert report.verdict
    for outcome in report.steered.values():
        assert outcome.values.shape == report.unsteered.values.shape
    toward, away = (report.effect_interval(direction) for direction in report.steered)
    assert toward[0] > 0
    assert away[1] < 0


@pytest.mark.parametrize("name", NULLS)
def test_a_null_stays_inside_its_controls(name: str) -> None:
    report = run_demo(name, n_random=19, progress=False).report
    assert not report.verdict
    assert report.explanation.startswith("No effect beyond the controls")
