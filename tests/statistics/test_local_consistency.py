"""Segments and caches against plain loops written from the descriptions."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import RouteRecord, organisms, route_prompt
from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics import cache_hits, segment_consistency

LAYERS, EXPERTS, K = 2, 6, 2


def record(seed: int, n_pos: int, n_rows: int = 1, sticky: float = 0.5) -> RouteRecord:
    rng = np.random.default_rng(seed)
    routes = np.zeros((LAYERS, n_rows, n_pos, K), dtype=np.int64)
    for layer in range(LAYERS):
        for row in range(n_rows):
            for pos in range(n_pos):
                stays = pos and rng.random() < sticky
                drawn = rng.permutation(EXPERTS)[:K]
                routes[layer, row, pos] = routes[layer, row, pos - 1] if stays else drawn
    return RouteRecord(MoEShape("m", (0, 1), EXPERTS, K), torch.from_numpy(routes))


def srp_by_loop(prompts: list[list[list[int]]], m: int) -> tuple[float, float, int]:
    """Best F1, size ratio and threshold of one layer."""
    best = (-1.0, 0.0, 0)
    for t in range(1, m + 1):
        matches = predictions = activations = segments = chosen = 0
        for route in prompts:
            for start in range(len(route) - m + 1):
                segment = route[start : start + m]
                group = {e for e in range(EXPERTS) if sum(e in token for token in segment) >= t}
                matches += sum(len(group & set(token)) for token in segment)
                predictions += len(group) * m
                activations += sum(len(token) for token in segment)
                segments += 1
                chosen += len(group)
        f1 = 2 * matches / (predictions + activations)
        if f1 > best[0] + 1e-12:
            best = (f1, chosen / segments / K, t)
    return best


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 5), n_pos=st.integers(5, 12), rows=st.integers(1, 3))
def test_srp_is_that_of_a_loop(seed: int, m: int, n_pos: int, rows: int) -> None:
    routes = record(seed, n_pos, rows)
    mask = torch.ones(rows, n_pos, dtype=torch.bool)
    found = segment_consistency(routes, m, mask=mask, n_resamples=20)
    for layer in range(LAYERS):
        performance, ratio, threshold = srp_by_loop(routes.indices[layer].tolist(), m)
        assert float(found.performance[layer]) == pytest.approx(performance)
        assert int(found.threshold[layer]) == threshold
        assert float(found.size_ratio[layer]) == pytest.approx(ratio)


def test_srp_is_one_where_routes_never_change_and_with_segments_of_one_token() -> None:
    assert segment_consistency(record(0, 9, sticky=2.0), 4).performance.tolist() == [1, 1]
    assert segment_consistency(record(0, 9), 1).performance.tolist() == [1, 1]
    assert segment_consistency(record(0, 40, sticky=0.0), 8).performance.max() < 0.8


def hits_by_loop(route: list[list[int]], size: int, policy: str) -> int:
    """A list of what is held, oldest use first, and counts of use."""
    order: list[int] = []
    count = dict.fromkeys(range(EXPERTS), 0)
    hits = 0
    for token in route:
        hits += len([e for e in token if e in order])
        for expert in token:
            count[expert] += 1
        for expert in reversed(token):  # the one that ranks first was used last
            if expert in order:
                order.remove(expert)
            order.append(expert)
        while len(order) > size:
            idle = [e for e in order if e not in token]
            least = min(count[e] for e in idle)
            goes = idle[0] if policy == "lru" else next(e for e in idle if count[e] == least)
            order.remove(goes)
    return hits


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(K, EXPERTS), n_pos=st.integers(1, 25))
def test_hits_are_those_of_a_loop(seed: int, size: int, n_pos: int) -> None:
    routes = record(seed, n_pos)
    for policy in ("lru", "lfu"):
        found = cache_hits(routes, size, policy)
        for layer in range(LAYERS):
            hits = hits_by_loop(routes.indices[layer, 0].tolist(), size, policy)
            assert float(found.rate[layer]) == pytest.approx(hits / (n_pos * K))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(K, EXPERTS), m=st.integers(1, 4))
def test_segment_hits_are_those_of_the_best_set(seed: int, size: int, m: int) -> None:
    from itertools import combinations

    routes = record(seed, 7)
    found = cache_hits(routes, size, "segment", m=m)
    for layer in range(LAYERS):
        route = routes.indices[layer, 0].tolist()
        segments = [route[start : start + m] for start in range(len(route) - m + 1)]
        best = [
            max(
                sum(e in held for token in segment for e in token)
                for held in combinations(range(EXPERTS), size)
            )
            for segment in segments
        ]
        assert float(found.rate[layer]) == pytest.approx(sum(best) / (len(segments) * m * K))


def test_a_padded_record_is_its_prompts_one_by_one() -> None:
    model = organisms.load("specialised")
    prompts = ["Question : what is the", "Document : the"]
    one_by_one = [route_prompt(model, prompt) for prompt in prompts]
    _, cache = model.run_with_cache(prompts)
    padded = RouteRecord.from_cache(cache)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    for measure in (
        lambda routes, **kw: segment_consistency(routes, 2, **kw).performance,
        lambda routes, **kw: cache_hits(routes, 3, **kw).rate,
    ):
        assert torch.equal(measure(one_by_one), measure(padded, mask=mask))
        with pytest.warns(UserWarning, match="does not say which columns are padding"):
            measure(padded)
    found = segment_consistency(one_by_one, 2)
    assert found.low is not None
    assert found.n_prompts == 2
    assert segment_consistency(one_by_one, 5).n_prompts == 1
    assert segment_consistency(one_by_one, 5).low is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: segment_consistency(r, 10), "No prompt has 10 tokens"),
        (lambda r: segment_consistency(r, 0), "m must be a whole number from 1"),
        (lambda r: segment_consistency([], 1), "routes of at least one prompt"),
        (lambda r: segment_consistency(r.indices, 1), "needs RouteRecords|parameter"),
        (lambda r: segment_consistency(r, 1, mask=torch.ones(1, 3)), "The mask has shape"),
        (lambda r: segment_consistency(r, 1, mask=[[1, 0, 1, 1, 1, 1]]), "has gaps"),
        (lambda r: segment_consistency(r, 1, mask=[[0] * 6]), "selects no token"),
        (lambda r: segment_consistency([r, r], 1, mask=[[1] * 6]), "one by one"),
        (lambda r: cache_hits(r, 1), "size must be a whole number from 2 to 6"),
        (lambda r: cache_hits(r, 3, cast(Any, "fifo")), "policy must be one of lru, lfu, segment|parameter"),
        (lambda r: cache_hits(r, 3, "segment"), "needs and no other"),
        (lambda r: cache_hits(r, 3, m=2), "needs and no other"),
        (lambda r: cache_hits(r, 3, "segment", m=7), "No prompt has 7 tokens"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises((DataError, TypeError), match=message):
        call(record(0, 6))


def test_a_route_that_names_an_expert_twice_is_refused() -> None:
    routes = RouteRecord(MoEShape("m", (0, 1), EXPERTS, K), torch.zeros(LAYERS, 1, 4, K, dtype=torch.int64))
    with pytest.raises(DataError, match="names an expert twice"):
        cache_hits(routes, 3)
