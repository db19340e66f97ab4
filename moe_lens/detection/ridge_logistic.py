"""Ridge logistic regression for few prompts and many features, and the area under its ROC curve.

weights = fitted(features, labels, ridge=1.0)        # [feature], and the intercept last
auroc(scores, labels)
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Bool, Float

RIDGES: Final = (0.01, 0.1, 1.0, 10.0, 100.0)
_STEPS: Final = 50
_INNER_FOLDS: Final = 5


def held_out_scores(
    features: Float[np.ndarray, "prompt feature"],
    labels: Bool[np.ndarray, "prompt"],
    test: Bool[np.ndarray, "prompt"],
    seed: int,
) -> Float[np.ndarray, "test"]:
    """Log odds of the test prompts, from a regression on the others; its ridge comes from folds among these.

    Features are standardised by the training prompts (constant ones left out) and divided by the root of
    their number, so that a ridge means as much for few features as for many.
    """
    train = ~test
    mean, spread = features[train].mean(0), features[train].std(0)
    varied = spread > 1e-12
    if not varied.any():
        return np.zeros(int(test.sum()))
    scaled = (features[:, varied] - mean[varied]) / spread[varied] / np.sqrt(varied.sum())
    coordinates = _coordinates(scaled[train], scaled)
    ridge = _best_ridge(coordinates[train], labels[train], seed)
    weights = fitted(coordinates[train], labels[train], ridge)
    return coordinates[test] @ weights[:-1] + weights[-1]


def _coordinates(
    train: Float[np.ndarray, "train feature"], rows: Float[np.ndarray, "prompt feature"]
) -> Float[np.ndarray, "prompt coordinate"]:
    """The rows in a basis of what the training rows span, which is all that ridge regression sees."""
    _, sizes, directions = np.linalg.svd(train, full_matrices=False)
    kept = sizes > 1e-9 * sizes.max(initial=1e-300)
    return rows @ directions[kept].T


def fitted(
    features: Float[np.ndarray, "prompt feature"], labels: Bool[np.ndarray, "prompt"], ridge: float
) -> Float[np.ndarray, "weight"]:
    """The minimum of Σ ln(1 + exp(−y f)) + ridge / 2 · ‖w‖², f = x·w + b; b, not penalised, comes last.

    Newton's method; a step that does not go down is halved.
    """
    rows = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    penalty = np.full(rows.shape[1], ridge)
    penalty[-1] = 1e-8  # of one class alone, the intercept would run away
    signs = np.where(labels, 1.0, -1.0)

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -signs * (rows @ w)).sum() + 0.5 * (penalty * w**2).sum())

    weights = np.zeros(rows.shape[1])
    value = loss(weights)
    for _ in range(_STEPS):
        p = 0.5 * (1 + np.tanh(0.5 * (rows @ weights)))
        gradient = rows.T @ (p - labels) + penalty * weights
        hessian = (rows * (p * (1 - p))[:, None]).T @ rows + np.diag(penalty)
        step, length = np.linalg.solve(hessian, gradient), 1.0
        while length > 1e-6 and loss(weights - length * step) > value:
            length /= 2
        weights = weights - length * step
        before, value = value, loss(weights)
        if before - value < 1e-9 * max(1.0, before):
            break
    return weights


def _best_ridge(
    features: Float[np.ndarray, "prompt feature"], labels: Bool[np.ndarray, "prompt"], seed: int
) -> float:
    """The ridge with the least loss on held-out folds; the largest of equal ones."""
    folds = stratified_folds(labels, _INNER_FOLDS, seed)
    losses = dict.fromkeys(reversed(RIDGES), 0.0)
    for fold in range(int(folds.max()) + 1):
        train, signs = folds != fold, np.where(labels, 1.0, -1.0)
        if labels[train].all() or not labels[train].any():
            continue
        for ridge in losses:
            weights = fitted(features[train], labels[train], ridge)
            scores = features[~train] @ weights[:-1] + weights[-1]
            losses[ridge] += float(np.logaddexp(0, -signs[~train] * scores).sum())
    return min(losses, key=lambda ridge: losses[ridge])


def stratified_folds(labels: Bool[np.ndarray, "prompt"], n_folds: int, seed: int) -> np.ndarray:
    """[prompt], the number of its fold; each fold has about as many of either class."""
    folds = np.zeros(len(labels), dtype=np.int64)
    generator, start = np.random.default_rng(seed), 0
    for value in (False, True):
        rows = generator.permutation(np.flatnonzero(labels == value))
        folds[rows] = (start + np.arange(len(rows))) % n_folds
        start += len(rows)
    return folds


def concordance(
    scores: Float[np.ndarray, "prompt"], labels: Bool[np.ndarray, "prompt"]
) -> Float[np.ndarray, "positive negative"]:
    """1 where the positive one of a pair scores higher, ½ where both score alike, else 0."""
    difference = scores[labels][:, None] - scores[~labels][None, :]
    return 0.5 * (1 + np.sign(difference))


def auroc(parts: Sequence[Float[np.ndarray, "_ _"]]) -> float:
    """Share of concordant pairs in all tables together."""
    return float(sum(part.sum() for part in parts) / sum(part.size for part in parts))
