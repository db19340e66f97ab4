"""Would published experts be selected again? Against the exact probabilities of small counts."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from moe_lens.errors import DataError, PlanError
from moe_lens.shape import MoEShape
from moe_lens.steering import PublishedRanking
from tests.steering.test_published import authors_selection, result_table

TOKENS = 4


def ranking_of(a1: list[int], a2: list[int], tokens: int = TOKENS) -> PublishedRanking:
    n = len(a1)
    one, two = np.array(a1), np.array(a2)
    shape = MoEShape("made up", (0,), n, 1)
    return PublishedRanking(shape, np.zeros(n, int), np.arange(n), one, two, tokens - one, tokens - two)


def exact(a1: list[int], a2: list[int], tokens: int, sign: int) -> np.ndarray:
    """Probability that each of three experts is the one of that sign that is selected, by enumeration."""
    found = np.zeros(len(a1))
    counts = range(tokens + 1)
    chances = [[binom.pmf(c, tokens, each / TOKENS) for c in counts] for each in (*a1, *a2)]
    for drawn in product(counts, repeat=2 * len(a1)):
        p = np.prod([chances[place][count] for place, count in enumerate(drawn)])
        pairs = zip(drawn[: len(a1)], drawn[len(a1) :], strict=True)
        deltas = [sign * (one / tokens - two / tokens) for one, two in pairs]  # floats decide what is a tie
        best = max(deltas)
        if best > 0:
            found[deltas.index(best)] += p
    return found


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize(("design_effect", "tokens"), [(1.0, 4), (2.0, 2), (100.0, 1), (0.8, 5)])
def test_shares_are_the_probabilities(opposite: bool, design_effect: float, tokens: int) -> None:
    a1, a2 = [3, 2, 1], [1, 1, 3]
    ranking = ranking_of(a1, a2)
    found = ranking.survival(1, 1, opposite=opposite, design_effect=design_effect, n_draws=20_000, seed=3)
    up, down = ((2, 0), (0, 2))[not opposite]
    assert found.activate == ((0, up),)
    assert found.deactivate == ((0, down),)
    expected = (
        exact(a1, a2, tokens, -1 if opposite else 1)[up],
        exact(a1, a2, tokens, 1 if opposite else -1)[down],
    )
    np.testing.assert_allclose(found.share, expected, atol=4 * 0.5 / 20_000**0.5)
    plan = ranking.plan(1, 1, opposite=opposite, on_excess="drop")
    assert (plan.activate, plan.deactivate) == (found.activate, found.deactivate)


def test_the_selection_is_the_authors() -> None:
    table = result_table(seed=4, tokens=40)
    columns = {name: table[name].to_numpy() for name in ("layer", "expert", "a1", "a2", "d1", "d2")}
    found = PublishedRanking(MoEShape("m", (0, 1, 2), 6, 2), **columns).survival(3, 2, n_draws=50)
    expected = authors_selection(table, 3, 2, reverse=False)
    assert expected is not None
    assert [list(found.activate), list(found.deactivate)] == [*expected]
    frame = found.to_dataframe()
    assert frame["delta"].tolist() == pytest.approx(found.delta.tolist())
    assert frame["side"].tolist() == ["activate"] * 3 + ["deactivate"] * 2


def test_large_differences_of_many_tokens_survive_and_ties_do_not() -> None:
    sure = ranking_of([9000, 5000, 5000, 1000], [1000, 5000, 5001, 9000], tokens=10_000)
    found = sure.survival(1, 2)
    assert found.survivors() == [(0, 0), (0, 3)]
    assert 0.3 < found.share[2] < 0.8
    assert "2 of 3" in repr(found)
    assert sure.survival(1, 2, design_effect=1000.0).mean < found.mean


def test_draws_of_several_blocks_repeat_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = ranking_of([3, 2, 1], [1, 1, 3])
    whole = ranking.survival(1, 1, n_draws=4000)
    monkeypatch.setattr("moe_lens.steering.survival._CHUNK", 300)
    blocks = ranking.survival(1, 1, n_draws=4000)
    np.testing.assert_allclose(whole.share, blocks.share, atol=0.04)
    assert (blocks.share <= 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, PlanError, "at least one"),
        ({"n_activate": 3}, PlanError, "only 2"),
        ({"n_deactivate": -1}, PlanError, "n_deactivate"),
        ({"n_activate": 1, "design_effect": 0.0}, DataError, "design_effect"),
        ({"n_activate": 1, "design_effect": float("nan")}, DataError, "design_effect"),
        ({"n_activate": 1, "n_draws": 0}, DataError, "n_draws"),
        ({"n_activate": 1, "seed": -1}, DataError, "seed"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ranking_of([3, 2, 1], [1, 1, 3]).survival(**arguments)  # pyright: ignore[reportArgumentType]
