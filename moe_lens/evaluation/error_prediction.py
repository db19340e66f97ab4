"""Does an uncertainty tell wrong answers from right ones? AUROC and calibration of each, beside each other.

    found = route_uncertainty(model, prompts, n=8)
    report = predict_errors(found, wrong, clusters=entities)        # an ErrorPrediction
    print(report)

The probability of being wrong that a predictor is turned into is fitted on other clusters than those that it
is judged on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit
from scipy.stats import rankdata

from moe_lens.checks import share, whole_number
from moe_lens.errors import DataError
from moe_lens.interventions.uncertainty import RouteUncertainty
from moe_lens.resampling import bounds_of, cluster_weights
from moe_lens.results import Result

if TYPE_CHECKING:
    import pandas

BASELINE: Final = "softmax entropy"
_N_RESAMPLES: Final = 2000
_RIDGE: Final = 1e-3
"""Holds the slope finite where a predictor separates a fold's answers; in units of one prompt."""

Array = Float[np.ndarray, "prompt"]


class CalibrationBin(NamedTuple):
    """Prompts of like predicted probability of being wrong."""

    n: int
    predicted: float
    """Mean predicted probability."""
    wrong: float
    """Share that is wrong."""


@dataclass(frozen=True, eq=False, repr=False)
class ErrorPrediction(Result):
    """How well each predictor tells wrong answers from right ones.

    Attributes:
        predictors: name -> a number a prompt, larger where an error is likelier.
        wrong: [prompt], 1.0 where the answer is wrong.
        probabilities: name -> [prompt], the probability of being wrong by a logistic curve in the predictor,
            fitted on the other folds of clusters.
        clusters: of each prompt; resampled whole for intervals.
        baseline: the predictor that the others are held against; None: there is none.
        n_bins: of a calibration curve. level: of the intervals. seed: of folds and bootstrap.
    """

    predictors: dict[str, Array]
    wrong: Array
    probabilities: dict[str, Array]
    clusters: tuple[str, ...]
    baseline: str | None
    n_bins: int
    level: float
    seed: int

    def auroc(self, name: str) -> float:
        """The probability that a wrong answer's number exceeds a right one's, equal ones counting half.

        In [0, 1]; 0.5 says nothing. Raises DataError for another name.
        """
        return _auroc(self._of(name), self.wrong)

    def auroc_interval(self, name: str) -> tuple[float, float]:
        """Bootstrap interval of the AUROC, the clusters resampled; widened where few hold either kind.

        NaN where all wrong answers, or all right ones, are in one cluster.
        """
        return self._interval(self.auroc(name), self._resampled(name), 0.0)

    def gain_interval(self, name: str) -> tuple[float, float]:
        """Bootstrap interval of the AUROC minus the baseline's, both of the same resampled clusters.

        NaN as in `auroc_interval`.

        Raises DataError where there is no baseline.
        """
        if self.baseline is None:
            raise DataError("These predictors have no baseline; name one of them (baseline=).")
        gain = self.auroc(name) - self.auroc(self.baseline)
        return self._interval(gain, self._resampled(name) - self._resampled(self.baseline), -1.0)

    def curve(self, name: str) -> list[CalibrationBin]:
        """Calibration curve: bins of (nearly) equally many prompts, by predicted probability, ascending.

        Prompts of equal probability share a bin, so that there may be fewer bins than asked for.
        """
        self._of(name)
        predicted = self.probabilities[name]
        place = np.floor((rankdata(predicted) - 0.5) / len(predicted) * self.n_bins)
        return [
            CalibrationBin(int(here.sum()), float(predicted[here].mean()), float(self.wrong[here].mean()))
            for here in (place == number for number in np.unique(place))
        ]

    def calibration_error(self, name: str) -> float:
        """Expected calibration error: mean over prompts of |predicted − observed| of their bin, in [0, 1]."""
        bins = self.curve(name)
        return sum(each.n * abs(each.predicted - each.wrong) for each in bins) / len(self.wrong)

    def brier(self, name: str) -> float:
        """Mean of (probability − wrong)², in [0, 1]; always predicting the share gives share·(1−share)."""
        self._of(name)
        return float(((self.probabilities[name] - self.wrong) ** 2).mean())

    def summary(self) -> str:
        """Share of wrong answers, and each predictor's AUROC."""
        scores = ", ".join(f"{name} {self.auroc(name):.2f}" for name in self.predictors)
        return f"{len(self.wrong)} prompts, {self.wrong.mean():.2f} wrong; AUROC {scores}"

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a predictor: auroc, low, high, its gain on the baseline, calibration_error and brier."""
        import pandas as pd

        rows = []
        for name in self.predictors:
            low, high = self.auroc_interval(name)
            row = {"predictor": name, "auroc": self.auroc(name), "low": low, "high": high}
            if self.baseline is not None:
                less, more = self.gain_interval(name)
                gain = self.auroc(name) - self.auroc(self.baseline)
                row |= {"gain": gain, "gain_low": less, "gain_high": more}
            row |= {"calibration_error": self.calibration_error(name), "brier": self.brier(name)}
            rows.append(row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        return f"{self.summary()}\n{self.to_dataframe().round(3).to_string(index=False)}"

    def _of(self, name: str) -> Array:
        if name not in self.predictors:
            raise DataError(f"There is no predictor {name!r}; there are {', '.join(self.predictors)}.")
        return self.predictors[name]

    def _resampled(self, name: str) -> Float[np.ndarray, "resample"]:
        weights = cluster_weights(self.clusters, _N_RESAMPLES, self.seed)
        return _weighted_auroc(self._of(name), self.wrong, weights)

    @cached_property
    def _n_units(self) -> int:
        """Clusters that hold wrong answers, or right ones, whichever are fewer."""
        return min(
            len({c for c, w in zip(self.clusters, self.wrong, strict=True) if w == kind}) for kind in (0, 1)
        )

    def _interval(
        self, value: float, resampled: Float[np.ndarray, "resample"], least: float
    ) -> tuple[float, float]:
        bounds = bounds_of(value, resampled, self._n_units, self.level)
        low, high = (float(np.clip(bound, least, 1)) for bound in bounds)
        return low, high


def predict_errors(
    predictors: RouteUncertainty | Mapping[str, Any],
    wrong: Any,
    *,
    clusters: Iterable[Any] | None = None,
    baseline: str | None = BASELINE,
    n_folds: int = 5,
    n_bins: int = 10,
    level: float = 0.95,
    seed: int = 0,
) -> ErrorPrediction:
    """Whether uncertainties tell wrong answers from right ones: AUROC and calibration, beside the baseline's.

    >>> import numpy as np
    >>> from moe_lens import predict_errors
    >>> wrong = np.arange(40) % 3 == 0
    >>> both = {"softmax entropy": np.arange(40) % 7, "route disagreement": wrong + 0.1 * np.arange(40) % 0.5}
    >>> report = predict_errors(both, wrong)
    >>> report.auroc("route disagreement"), report.gain_interval("route disagreement")[0] > 0
    (1.0, True)

    Args:
        predictors: a `RouteUncertainty`, or name -> a number a prompt, larger where the answer is less sure.
        wrong: for each prompt whether the answer is wrong. Compare with `found.plain`, the model's own
            answers, or `found.averaged`: whose errors they are is the user's to say.
        clusters: one label a prompt; by default the prompts are independent.
        baseline: the predictor that others must beat; None for no comparison.
        n_folds: of clusters, from 2 on; each fold's probabilities are fitted on the others.
        n_bins: of the calibration curve, from 2 on.
        level: of the intervals.
        seed: of folds and bootstrap.

    Raises:
        DataError: numbers that are not one a prompt or not finite, answers that are all right or all wrong,
            fewer clusters than folds, or folds without either in the rest; an unknown baseline.
    """
    named = predictors.predictors if isinstance(predictors, RouteUncertainty) else predictors
    if not isinstance(named, Mapping) or not named:
        raise DataError("predict_errors needs a RouteUncertainty, or a mapping from names to numbers.")
    is_wrong = _numbers(wrong, "wrong")
    if not np.isin(is_wrong, (0, 1)).all() or len(np.unique(is_wrong)) < 2:
        raise DataError("wrong must hold true and false, at least one of each, one a prompt.")
    given = {str(name): _numbers(values, str(name), len(is_wrong)) for name, values in named.items()}
    if baseline is not None and baseline not in given:
        raise DataError(
            f"There is no predictor {baseline!r} to compare with; name another baseline, or None."
        )
    labels = tuple(str(label) for label in (range(len(is_wrong)) if clusters is None else clusters))
    if len(labels) != len(is_wrong):
        raise DataError(f"{len(is_wrong)} prompts need as many clusters; got {len(labels)}.")
    folds = _folds(labels, whole_number(n_folds, "n_folds", least=2), whole_number(seed, "seed"))
    probabilities = {name: _cross_fitted(values, is_wrong, folds) for name, values in given.items()}
    n_bins = whole_number(n_bins, "n_bins", least=2)
    return ErrorPrediction(
        given, is_wrong, probabilities, labels, baseline, n_bins, share(level, "level"), seed
    )


def _numbers(given: Any, name: str, n: int | None = None) -> Array:
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be numbers, one a prompt; got {type(given).__name__}.") from error
    if (
        values.ndim != 1
        or not len(values)
        or not np.isfinite(values).all()
        or len(values) != (n or len(values))
    ):
        raise DataError(f"{name} must be finite numbers, one a prompt; got shape {values.shape}.")
    return values


def _auroc(values: Array, wrong: Array) -> float:
    """By ranks (Mann–Whitney); equal values share theirs."""
    n_wrong = wrong.sum()
    ranks = rankdata(values)[wrong == 1].sum()
    return float((ranks - n_wrong * (n_wrong + 1) / 2) / (n_wrong * (len(wrong) - n_wrong)))


def _weighted_auroc(
    values: Array, wrong: Array, weights: Float[np.ndarray, "resample prompt"]
) -> Float[np.ndarray, "resample"]:
    """The AUROC with each prompt counted `weights` times; NaN where all that are drawn are alike."""
    order = np.argsort(values, kind="stable")
    first = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)  # of each run of equal values
    bad, good = (  # [resample level]
        np.add.reduceat((weights * kind)[:, order], first, axis=1) for kind in (wrong, 1 - wrong)
    )
    below = good.cumsum(axis=1) - good / 2
    pairs = bad.sum(axis=1) * good.sum(axis=1)
    return np.divide((bad * below).sum(axis=1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _folds(labels: tuple[str, ...], n_folds: int, seed: int) -> np.ndarray:
    """The fold of each prompt; a cluster is in one fold only."""
    names, member_of = np.unique(labels, return_inverse=True)
    if len(names) < n_folds:
        raise DataError(f"{len(names)} clusters are too few for {n_folds} folds; take fewer folds.")
    order = np.random.default_rng(seed).permutation(len(names))
    return (order % n_folds)[member_of]


def _cross_fitted(values: Array, wrong: Array, folds: np.ndarray) -> Array:
    found = np.empty(len(values))
    for fold in np.unique(folds):
        here = folds == fold
        if len(np.unique(wrong[~here])) < 2:
            raise DataError(
                "Outside of one fold all answers are right, or all wrong, so no probability can be fitted. "
                "Give more prompts, or fewer folds."
            )
        found[here] = expit(_logistic(values[~here], wrong[~here], values[here]))
    return found


def _logistic(values: Array, wrong: Array, at: Float[np.ndarray, "other"]) -> Float[np.ndarray, "other"]:
    """Log-odds a + b · value at other values, by Newton's method; b is held back a little."""
    centre, scale = values.mean(), values.std() or 1.0
    x = np.stack([np.ones(len(values)), (values - centre) / scale], axis=1)
    ridge, beta = np.diag([0.0, _RIDGE]), np.zeros(2)
    beta[0] = np.log(wrong.mean() / (1 - wrong.mean()))
    for _ in range(100):
        p = expit(x @ beta)
        slope = x.T @ (p - wrong) + ridge @ beta
        curvature = (x * (p * (1 - p))[:, None]).T @ x + ridge + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        beta -= step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))  # separable folds go far
        if np.abs(step).max() < 1e-10:
            break
    return beta[0] + beta[1] * (at - centre) / scale
