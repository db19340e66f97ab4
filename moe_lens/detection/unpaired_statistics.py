"""P-values of two groups of different prompts: labels are permuted.

counts = UnpairedCounts.of_prompts(events_1, tokens_1, events_2, tokens_2)       # [prompt expert], [prompt]
p = permutation_p("risk_difference", counts)

How well this holds, and the intervals of paired_statistics.py for such groups, was measured on beta-
binomial counts without a difference: ρ is the correlation of the tokens of a prompt, prompts of 20 tokens,
150 data sets of 30 experts (repeat it with `python -m tests.detection.test_unpaired`). Coverage of 95 %
intervals of risk_difference, and p ≤ 0.05, in %, where rates are 0.1–0.5, 0.02–0.1 and 0.005–0.02:

    prompts       ρ             coverage             p ≤ 0.05
    20 / 20       0.1  / 0.1    95.3  96.5  98.9     4.5   2.7  0.7
    20 / 80       0.1  / 0.1    95.0  98.2  99.9     4.2   0.9  0.1
    200 / 200     0.1  / 0.1    96.1  95.0  96.2     3.9   4.9  3.0
    20 / 80       0.3  / 0.05   92.2  88.9  98.5     8.8  10.7  1.6
    80 / 20       0.3  / 0.05   98.0  98.1  98.9     1.6   0.6  0.7

So it is conservative for rare experts, and where the larger group is the one whose prompts differ more from
each other; and liberal where the smaller group is: 20 prompts that vary six times as much as the 80 others
give p ≤ 0.05 twice as often as they should, and p ≤ 0.01 in up to 4.5 %. Make the group larger that varies
more, or give both as many prompts.
"""

import math
from itertools import combinations

import numpy as np
from jaxtyping import Float

from moe_lens.detection.floors import MOST_EXACT, smallest_p
from moe_lens.detection.paired_statistics import (
    check_counts,
    check_settings,
    chernoff_bound,
    chunks,
    sign_flip_p,
)
from moe_lens.detection.rare_experts import binomial_p
from moe_lens.detection.scores import Score
from moe_lens.detection.unpaired_counts import UnpairedCounts
from moe_lens.errors import DataError


def permutation_p(
    name: str | Score, counts: UnpairedCounts, *, n_permutations: int = 1000, seed: int = 0
) -> Float[np.ndarray, "expert"]:
    """Two-sided p-values of "the expert is as active in both groups": units change their groups at random.

    >>> counts = UnpairedCounts.of_prompts([[4.0], [3.0], [4.0]], [4, 4, 4], [[1.0], [0.0]], [4, 4])
    >>> permutation_p("risk_difference", counts)          # the most extreme of 10 ways to choose 3 of 5 units
    array([0.1])

    Whole units get new groups, as many in each as before, and the statistic is (R1 − R2) / √(V1 + V2), with
    R_g = Σ A_u / Σ N_u the rate of group g and V_g = n_g / (n_g − 1) · Σ (A_u − R_g N_u)² / (Σ N_u)² its
    squared standard error over n_g units. Exact if units are exchangeable; because the statistic is
    studentised it holds in large samples also where the groups differ in all but the rate: in numbers and
    lengths of prompts, and in how much they vary (Janssen 1997; Chung & Romano 2013, arXiv 1304.5939).

    - Up to 2,048 ways to choose the first group's units: all, exact. Otherwise p = (1 + b) / (1 +
      n_permutations).
    - Where b = 0 and it is smaller: the Chernoff bound of `sign_flip_p`, of the parts (A_u − P N_u) / N_g
      that units have in the difference, P the rate of both groups together. So p can be smaller than
      1 / (n_permutations + 1), but not smaller than `smallest_p`.
    - Where fewer than 20 effective events are expected in a group: at least the p-value of the binomial test
      that takes as many tokens for independent as the prompts are worth (rare_experts.py).
    - Where some units have prompts in both groups (answers to one question, right and wrong), no labels can
      be permuted: then the signs of these parts are flipped (a wild bootstrap of the score; Kline & Santos
      2012), which holds in large samples. Where all units have, that is the test of pairs, with the guard for
      rare experts that pairs have: of 12 to 40 such clusters p ≤ 0.05 came in at most 6 % where nothing
      differs. Where only some have, the binomial test above ignores that a unit's two groups go together,
      and is conservative (0 to 1 % of rare experts): pair the prompts where you can.

    Raises:
        DataError: an unknown score, or one that needs pairs; fewer than two units in a group; a bad
            n_permutations or seed.
    """
    formula = check_settings(name, n_permutations=n_permutations, seed=seed)
    check_counts("A p-value", counts, 2)
    if formula.needs_pairs:
        raise DataError(f"{formula!r} needs pairs of prompts; choose risk_difference for two groups.")
    if not counts.is_disjoint:
        return sign_flip_p(formula, counts, n_permutations=n_permutations, seed=seed)
    in_first = counts.tokens_1 > 0
    labels, exact = _labellings(in_first, n_permutations, seed)
    sums, tokens = counts.sums_1 + counts.sums_2, counts.tokens_1 + counts.tokens_2
    p = np.empty(counts.n_experts)
    for columns in chunks(counts, len(labels)):
        rows = np.concatenate([in_first[None], labels]).astype(np.float64)
        sizes = _studentised(rows, sums[:, columns], tokens)
        b = (sizes[1:] >= sizes[0] * (1 - 1e-9)).sum(0)
        p[columns] = b / len(labels) if exact else (1 + b) / (1 + n_permutations)
        if not exact and (sure := b == 0).any():
            parts = formula.null_contributions(counts.experts(columns))[:, sure]
            p[columns][sure] = np.minimum(p[columns][sure], chernoff_bound(parts))
    if formula.counts_events:
        p = np.maximum(p, binomial_p(counts))
    n_1 = int(in_first.sum())
    return np.maximum(p, smallest_p(n_1, counts.n_units - n_1, n_permutations))


def _labellings(in_first: np.ndarray, n_permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """[labelling unit], true for the first group; and whether these are all that there are."""
    n, n_1 = len(in_first), int(in_first.sum())
    if math.comb(n, n_1) <= MOST_EXACT:
        chosen = np.array(list(combinations(range(n), n_1)))
        exact = True
    else:
        generator = np.random.default_rng([seed, 1])  # apart from the bootstrap's draws
        chosen = np.argsort(generator.random((n_permutations, n)), axis=1)[:, :n_1]
        exact = False
    labels = np.zeros((len(chosen), n), dtype=bool)
    np.put_along_axis(labels, chosen, True, axis=1)
    return labels, exact


def _studentised(
    labels: Float[np.ndarray, "labelling unit"],
    sums: Float[np.ndarray, "unit expert"],
    tokens: Float[np.ndarray, "unit"],
) -> Float[np.ndarray, "labelling expert"]:
    """|R1 − R2| / √(V1 + V2) under each labelling; inf where only the numerator is not 0."""
    pooled = sums.sum(0) / tokens.sum()
    residuals = sums - pooled * tokens[:, None]  # of equal rates none is left but rounding
    residuals[np.abs(residuals) <= 1e-12 * (sums + pooled * tokens[:, None])] = 0
    squares, products = residuals**2, residuals * tokens[:, None]
    totals = residuals.sum(0), squares.sum(0), products.sum(0), tokens.sum(), (tokens**2).sum(), len(tokens)
    first = labels @ residuals, labels @ squares, labels @ products
    of_first = (*first, (labels @ tokens)[:, None], (labels @ tokens**2)[:, None], labels.sum(1)[:, None])
    difference, variance = np.zeros_like(first[0]), np.zeros_like(first[0])
    for sign, group in (
        (1, of_first),
        (-1, [whole - part for whole, part in zip(totals, of_first, strict=True)]),
    ):
        r, rr, rn, n, nn, size = group
        rate = r / n
        spread = np.maximum(rr - 2 * rate * rn + rate**2 * nn, 0)
        spread[spread <= 1e-10 * (rr + rate**2 * nn)] = 0
        difference += sign * rate
        variance += size / (size - 1) * spread / n**2
    difference[np.abs(difference) <= 1e-12] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, np.abs(difference) / np.sqrt(variance))
