"""Choosing among trained seeds, on development data only."""

from dataclasses import replace

import pytest

from moe_lens import organisms
from moe_lens.evaluation.outcomes import Limit
from moe_lens.evaluation.plan_sizes import SweepPoint, SweepResult
from moe_lens.evaluation.tasks import CLOSED_BOOK, LOSS
from moe_lens.organisms import compare_seeds
from moe_lens.organisms.compare_seeds import SeedResult, best, development_result, main, table
from moe_lens.organisms.worlds import World


def result(
    seed: int, plus: float, minus: float, closed_book: float = 1.0, name: str = "planted"
) -> SeedResult:
    """A seed that answers with the document on these shares of the prompts."""
    collateral = {CLOSED_BOOK: closed_book, LOSS: 1.0}
    points = tuple(
        SweepPoint(4, side, rate, rate, rate, dict(collateral), [])
        for side, rate in (("+", plus), ("-", minus))
    )
    limits = {CLOSED_BOOK: Limit(0.1, False), LOSS: Limit(0.1, True)}
    unsteered = {CLOSED_BOOK: 1.0, LOSS: 1.0}
    return SeedResult(name, seed, SweepResult("", "", "deactivate", 0.5, unsteered, limits, points))


def test_the_largest_gap_wins() -> None:
    assert best([result(0, 0.6, 0.4), result(1, 0.9, 0.2), result(2, 0.9, 0.5)]).seed == 1


def test_among_equal_gaps_the_gentler_seed_wins() -> None:
    assert best([result(0, 0.9, 0.2, closed_book=0.8), result(1, 0.8, 0.1), result(2, 0.5, 0.1)]).seed == 1


@pytest.mark.parametrize("name", ["null", "null-majority"])
def test_a_null_is_not_chosen_for_its_gap(name: str) -> None:
    seeds = [
        result(0, 0.6, 0.4, name=name),
        result(1, 0.9, 0.2, name=name),
        result(2, 0.5, 0.5, name=name),
    ]
    assert best(seeds).seed == 0


def test_table_has_a_row_a_seed() -> None:
    rows = table([result(3, 0.9, 0.25)]).splitlines()
    assert (
        rows[-1]
        == "| planted | 3 | 4 | 0.50 / 0.90 / 0.25 | +0.65 | 1.00 / 1.00 / 1.00 | 1.00 / 1.00 / 1.00 |"
    )


@pytest.mark.broad
def test_seeds_are_measured_on_development_prompts_and_test_prompts_stay_unseen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, asked = World.conflicts, set()
    monkeypatch.setattr(World, "conflicts", lambda self, split: (asked.add(split), original(self, split))[1])
    found = development_result(organisms.path("planted"))
    assert asked == {"detection", "development"}
    assert found.gap > 0.5  # planted
    assert found.seed == best([found, replace(found, seed=9)]).seed
    monkeypatch.setattr(compare_seeds, "development_result", lambda folder: found)
    main([str(organisms.path("planted"))])
    assert f"ship {found.seed}" in capsys.readouterr().out
