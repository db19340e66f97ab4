"""What few clusters rule out is said before the model runs, and in the result."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_lens import organisms
from moe_lens.detection import (
    PairedCounts,
    UnpairedCounts,
    compare_routing,
    detect,
    permutation_p,
    q_values,
    sign_flip_p,
    smallest_p,
)
from moe_lens.detection.floors import experts_together, units_needed
from moe_lens.text import ContrastiveGroups, ContrastivePairs
from tests.detection.test_detecting import synthetic


@pytest.mark.parametrize("n", [2, 3, 6, 11, 12, 13, 20])
def test_pairs_that_all_agree_have_the_smallest_p(n: int) -> None:
    tokens = np.full(n, 50.0)
    counts = PairedCounts.of_pairs(np.full((n, 1), 40.0), tokens, np.full((n, 1), 2.0), tokens)
    assert sign_flip_p("risk_difference", counts)[0] == pytest.approx(smallest_p(n, None, 1000))


@pytest.mark.parametrize(("n_1", "n_2"), [(2, 2), (2, 5), (4, 4), (3, 8), (6, 6)])
def test_groups_that_are_apart_have_the_smallest_p(n_1: int, n_2: int) -> None:
    generator = np.random.default_rng(0)
    one, two = 400 + generator.integers(0, 9, (n_1, 1)), generator.integers(90, 99, (n_2, 1))
    counts = UnpairedCounts.of_prompts(one, np.full(n_1, 500), two, np.full(n_2, 500))
    assert permutation_p("risk_difference", counts)[0] == pytest.approx(smallest_p(n_1, n_2, 1000))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n_experts", [1, 32, 1024, 6144])
def test_so_many_units_are_needed_and_no_fewer(n_experts: int, paired: bool) -> None:
    needed = units_needed(n_experts, 0.05, paired)
    for n, enough in ((needed, True), (needed - 1, False)):
        p = np.ones(n_experts)
        p[0] = smallest_p(n, None if paired else n, 1)
        assert bool(q_values(p)[0] <= 0.05 + 1e-12) is enough or n < 2


@pytest.mark.parametrize("n_experts", [1, 7, 32, 1000])
@pytest.mark.parametrize("n", [4, 5, 6, 8, 11])
def test_as_many_experts_as_it_says_are_significant_together(n: int, n_experts: int) -> None:
    floor = smallest_p(n, None, 1000)
    together = experts_together(floor, n_experts)
    for number, enough in ((together, True), (together - 1, False)):
        if 0 < number <= n_experts:
            p = np.concatenate([np.full(number, floor), np.ones(n_experts - number)])
            assert bool(q_values(p)[0] <= 0.05 + 1e-9) is enough
    if together > n_experts:
        assert floor > 0.05


def pairs(n_clusters: int) -> ContrastivePairs:
    conflicts = organisms.world("null").conflicts("detection")
    chosen = [c for c in conflicts if c.entity in sorted({c.entity for c in conflicts})[:n_clusters]]
    return ContrastivePairs.from_lists(
        [c.open_book for c in chosen],
        [c.closed_book for c in chosen],
        span="last",
        clusters=[c.entity for c in chosen],
    )


def test_few_clusters_are_said_before_the_model_runs() -> None:
    class Ran(Exception):
        pass

    def run(*_: object, **__: object) -> None:
        raise Ran

    hooks = [("blocks.0.mlp.hook_router_logits", run)]
    words = r"6 clusters give no p-value below 0\.031.*at least 20 of 32 experts.*alone needs 11 clusters"
    with pytest.warns(UserWarning, match=words), pytest.raises(Ran):
        detect(organisms.load("null"), pairs(6), hooks=hooks, progress=False)
    groups = ContrastiveGroups.from_lists(
        ["the capital", "Document :", "Question :"], ["what is", "the", "of the"]
    )
    with pytest.warns(UserWarning, match="none of 32 experts.*7 clusters in each"), pytest.raises(Ran):
        detect(organisms.load("null"), groups, hooks=hooks, progress=False)


def test_few_clusters_are_said_in_the_result() -> None:
    rates = np.array([0.5, 0.3, 0.2])
    with pytest.warns(UserWarning, match="none of 3 experts"):
        four = compare_routing(synthetic(rates, 4, 0), synthetic(rates, 4, 1))
    assert four.evidence is not None
    assert four.evidence.smallest_p == 0.125
    assert "too few clusters: p ≥ 0.12" in repr(four)
    with pytest.warns(UserWarning, match="at least 2 of 3 experts"):
        six = compare_routing(synthetic(rates, 6, 0), synthetic(rates, 6, 1))
    assert "too few clusters: p ≥ 0.031, so 2 or more, or none" in repr(six)
    assert six.evidence is not None
    found = replace(six.evidence, q=torch.full_like(six.evidence.q, 0.03))
    assert "3 of 3 experts with q ≤ 0.05;" in repr(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = compare_routing(synthetic(rates, 7, 0), synthetic(rates, 7, 1))
    assert "too few" not in repr(enough)
