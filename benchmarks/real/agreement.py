"""Your detection beside a published ranking: do two sets of prompts find the same experts?

agreement(scores, ranking, n_top=50, seed=0)         # {"Spearman's rho of the risk differences": ..., ...}

What agreement one may expect at all is that of two halves of your own prompts; without any, two sets of n
of N experts share n² / N.
"""

from typing import Any

import numpy as np
from scipy.stats import spearmanr

from moe_lens.detection import SCORES, ExpertScores, bootstrap_scores, score
from moe_lens.detection.detecting import evidence_of, unit_counts
from moe_lens.evaluation import split_clusters
from moe_lens.resampling import bounds_of
from moe_lens.steering import PublishedRanking

NAME = "risk_difference"


def agreement(scores: ExpertScores, ranking: PublishedRanking, n_top: int, seed: int) -> dict[str, Any]:
    """Correlation of ranks, and shared experts among the first ones, each beside that of halves and chance.

    The interval is a bootstrap over your clusters; the published counts are taken as they are.
    """
    evidence, _ = evidence_of(scores)
    counts = unit_counts(SCORES[NAME], scores.stats_1, scores.stats_2, evidence.clusters, None)
    own, published = score(NAME, counts), on_grid(ranking)
    draws = bootstrap_scores(NAME, counts, 1000, seed)
    found = rho(own, published)
    bounds = bounds_of(found, np.array([rho(draw, published) for draw in draws]), counts.n_units, 0.95)
    low, high = np.clip(bounds, -1, 1)
    units = split_clusters(list(range(counts.n_units)), (0.5, 0.5), seed=seed)
    halves = [
        score(NAME, unit_counts(SCORES[NAME], scores.stats_1, scores.stats_2, chosen, None, rows))
        for rows, chosen in (rows_of(evidence.clusters, half) for half in units)
    ]
    n_top, n = min(n_top, own.size), own.size
    return {
        "pairs": len(evidence.clusters),
        "independent clusters": counts.n_units,
        "experts": n,
        "Spearman's rho": f"{found:.3f} [{low:.3f}, {high:.3f}]",
        "Spearman's rho between halves of your clusters": f"{rho(*halves):.3f}",
        "experts of the same sign": f"{np.mean(np.sign(own) == np.sign(published)):.3f}",
        f"shared among the {n_top} of largest size": shared(np.abs(own), np.abs(published), n_top),
        "... between halves": shared(np.abs(halves[0]), np.abs(halves[1]), n_top),
        f"shared among the {n_top} most negative (to be deactivated)": shared(-own, -published, n_top),
        "expected by chance": f"{n_top**2 / n:.1f}",
    }


def on_grid(ranking: PublishedRanking) -> np.ndarray:
    """[expert], the published risk differences in the order of the model's layers and experts."""
    return ranking.delta[np.lexsort((ranking.expert, ranking.layer))]


def rows_of(clusters: tuple[str, ...], half: np.ndarray) -> tuple[list[int], list[str]]:
    """The pairs of some clusters, by the clusters' order of appearance, and their labels."""
    wanted = {label for number, label in enumerate(dict.fromkeys(clusters)) if number in set(half.tolist())}
    rows = [row for row, label in enumerate(clusters) if label in wanted]
    return rows, [clusters[row] for row in rows]


def rho(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(one, other).statistic)


def shared(one: np.ndarray, other: np.ndarray, n: int) -> int:
    """How many experts are among the n largest of both; ties by the experts' order."""
    tops = [set(np.argsort(-values, kind="stable")[:n].tolist()) for values in (one, other)]
    return len(tops[0] & tops[1])
