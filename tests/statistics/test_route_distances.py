"""Divergence over entropy against scipy's Jensen–Shannon distance, and what its evidence says."""

from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from moe_lens import collect_routing, organisms
from moe_lens.errors import DataError
from moe_lens.statistics import route_divergence
from moe_lens.statistics.routing_stats import RoutingStats


def both(name: str = "specialised", n: int | None = None, per_prompt: bool = True) -> list[RoutingStats]:
    model, conflicts = organisms.load(name), organisms.world(name).conflicts("detection")[:n]
    sides = ([c.open_book for c in conflicts], [c.closed_book for c in conflicts])
    return [collect_routing(model, texts, per_prompt=per_prompt, progress=False) for texts in sides]


def by_scipy(a: np.ndarray, b: np.ndarray, normalise: bool) -> np.ndarray:
    distance = np.array([jensenshannon(p, q) ** 2 for p, q in zip(a, b, strict=True)])
    mean = np.array([(entropy(p) + entropy(q)) / 2 for p, q in zip(a, b, strict=True)])
    return distance / mean if normalise else distance


@pytest.mark.parametrize("normalise", ["entropy", None])
def test_it_is_scipys(normalise: Any) -> None:
    one, two = both(n=10)
    found = route_divergence(one, two, normalise=normalise, n_permutations=20, n_resamples=20)
    q = [stats.mean_probability.numpy() for stats in (one, two)]
    assert found.divergence.numpy() == pytest.approx(by_scipy(q[0], q[1], normalise is not None))
    assert torch.allclose(route_divergence(two.without("per_prompt"), one, normalise=normalise).divergence,
                          found.divergence)  # fmt: skip
    paired = route_divergence(one, two, normalise=normalise, paired=True)
    parts = [s.per_prompt for s in (one, two)]
    each = []
    for row in range(10):
        p, r = (
            part.probability_sums[row].double().numpy() / int(part.n_tokens[row]) for part in parts if part
        )
        each.append(by_scipy(p, r, normalise is not None))
    assert paired.divergence.numpy() == pytest.approx(np.mean(each, axis=0), rel=1e-5)
    assert paired.low is not None
    assert paired.high is not None
    assert bool(((paired.low <= paired.divergence) & (paired.divergence <= paired.high)).all())
    assert paired.p is None


def test_its_evidence_is_that_of_the_divergence_it_divides() -> None:
    """The p is the same, and the bias divides about as the number does."""
    one, two = both()
    found, plain = (route_divergence(one, two, normalise=n) for n in ("entropy", None))
    for name in ("corrected", "low", "high", "p"):
        assert getattr(found, name) is not None
    assert found.p is not None
    assert plain.p is not None
    assert torch.equal(found.p, plain.p)
    ratio = found.divergence / plain.divergence
    assert found.corrected is not None
    assert plain.corrected is not None
    assert torch.allclose(found.corrected / plain.corrected, ratio, rtol=0.1)


def test_one_pair_or_cluster_of_pairs_has_no_interval() -> None:
    one, two = both(n=3)
    for found in (
        route_divergence(*both(n=1), paired=True),
        route_divergence(one, two, paired=True, clusters="xxx"),
    ):
        assert found.n_units == (1,)
        assert found.low is not None
        assert found.high is not None
        assert bool((found.low.isnan() & found.high.isnan()).all())
        assert bool(found.to_dataframe()["low"].isna().all())
    few = route_divergence(one, two, paired=True)
    assert few.low is not None
    assert bool((few.low >= 0).all())


def test_halves_of_one_collection_do_not_differ_and_conditions_do() -> None:
    one, two = both()
    differ = route_divergence(one, two).p
    assert differ is not None
    assert bool((differ < 0.01).any())
    model, conflicts = organisms.load("specialised"), organisms.world("specialised").conflicts("detection")
    p_values = []
    for seed in range(5):
        halves = [
            collect_routing(model, [conflicts[i].closed_book for i in half], per_prompt=True, progress=False)
            for half in np.random.default_rng(seed).permutation(len(conflicts)).reshape(2, -1)
        ]
        alike = route_divergence(*halves)
        assert alike.p is not None
        assert alike.low is not None
        assert alike.n_units == (len(conflicts) // 2, len(conflicts) // 2)
        assert ((alike.low > 0) <= (alike.p <= 0.05)).all()
        p_values.append(alike.p)
    assert float((torch.stack(p_values) <= 0.05).double().mean()) <= 0.2  # of 20, of which one is expected


def test_bad_input_is_refused() -> None:
    one, two = both(n=3)
    with pytest.raises(DataError, match="as many prompts in both; got 3 and 2"):
        route_divergence(one, both(n=2)[1], paired=True)
    with pytest.raises(DataError, match="not comparable"):
        route_divergence(one, both("planted", n=3)[1])
    with pytest.raises((DataError, TypeCheckError), match=r"needs RoutingStats|parameter"):
        route_divergence(one.counts, two)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="two lists of cluster labels"):
        route_divergence(one, two, clusters=[1, 2, 3])
    with pytest.raises(DataError, match="3 prompts need as many cluster labels; got 2"):
        route_divergence(one, two, clusters=["aab", "cd"])
    with pytest.raises(DataError, match="Cluster 'b' is in both collections"):
        route_divergence(one, two, clusters=["aab", "bcd"])
    assert route_divergence(one, two, clusters=["aab", "cde"]).n_units == (2, 3)
    with pytest.raises(DataError, match="per_prompt=True"):
        route_divergence(one, two.without("per_prompt"), paired=True)
    nothing = route_divergence(one.without("per_prompt"), two.without("per_prompt"))
    assert (nothing.low, nothing.p) == (None, None)
