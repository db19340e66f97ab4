"""`RouteUncertainty`: what a model answers along many noisy routes, and how far these answers part.

found = route_uncertainty(model, prompts, n=8)          # averaging.py
found.disagreement, found.information                   # one number a prompt, beside found.entropy
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from moe_lens.errors import DataError
from moe_lens.results import Result

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class RouteUncertainty(Result):
    """The next token after each prompt, along the model's own route and along n noisy ones.

    >>> from moe_lens import organisms, route_uncertainty
    >>> found = route_uncertainty(organisms.load("null"), ["Question : what is"], n=4, progress=False)
    >>> found.predictions.shape, sorted(found.predictors)
    ((1, 4), ['averaged entropy', 'route disagreement', 'route information', 'softmax entropy'])

    Let p_1 ... p_n be the next-token distributions along the noisy routes and p̄ their mean (RoE's prediction,
    arXiv 2509.17238), p that of the unedited model; H is the entropy in nats.

    Attributes:
        predictions: int64 [prompt route], the most probable token of each p_i.
        averaged: int64 [prompt], that of p̄. plain: int64 [prompt], that of p.
        averaged_entropy: float64 [prompt], H(p̄).
        mean_entropy: float64 [prompt], the mean of H(p_i).
        entropy: float64 [prompt], H(p): the softmax entropy, what route uncertainty is held against.
        temperature: of the noise, as it was given. seed: of the routes.

    Raises:
        DataError: arrays that are not of the same prompts.
    """

    predictions: Int[np.ndarray, "prompt route"]
    averaged: Int[np.ndarray, "prompt"]
    plain: Int[np.ndarray, "prompt"]
    averaged_entropy: Float[np.ndarray, "prompt"]
    mean_entropy: Float[np.ndarray, "prompt"]
    entropy: Float[np.ndarray, "prompt"]
    temperature: float | dict[int, float]
    seed: int

    def __post_init__(self) -> None:
        names = ("averaged", "plain", "averaged_entropy", "mean_entropy", "entropy")
        lengths = {len(getattr(self, name)) for name in names}
        if self.predictions.ndim != 2 or lengths != {len(self.predictions)} or not self.predictions.size:
            raise DataError("RouteUncertainty needs one number a prompt, and predictions [prompt route].")

    @property
    def n_routes(self) -> int:
        """How many noisy routes."""
        return self.predictions.shape[1]

    @property
    def disagreement(self) -> Float[np.ndarray, "prompt"]:
        """Share of the routes, in [0, 1), that do not predict what most of them predict (variation ratio)."""
        most = [np.unique(row, return_counts=True)[1].max() for row in self.predictions]
        return 1 - np.array(most) / self.n_routes

    @property
    def information(self) -> Float[np.ndarray, "prompt"]:
        """H(p̄) − mean of H(p_i), in nats: the Jensen–Shannon divergence of the routes' distributions, ≥ 0."""
        return np.maximum(self.averaged_entropy - self.mean_entropy, 0.0)

    @property
    def predictors(self) -> dict[str, Float[np.ndarray, "prompt"]]:
        """Name -> a number a prompt, larger where the answer is less sure: for `predict_errors`."""
        return {
            "route disagreement": self.disagreement,
            "route information": self.information,
            "averaged entropy": self.averaged_entropy,
            "softmax entropy": self.entropy,
        }

    def summary(self) -> str:
        """Numbers of prompts and routes, and the mean disagreement."""
        prompts = f"{len(self.averaged)} prompt{'s' * (len(self.averaged) != 1)}"
        return (
            f"{prompts}, {self.n_routes} routes at temperature {self.temperature}: mean disagreement "
            f"{self.disagreement.mean():.3f}, information {self.information.mean():.3g} nats"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a prompt: predicted tokens (plain, averaged) and the predictors."""
        import pandas as pd

        return pd.DataFrame({"plain": self.plain, "averaged": self.averaged, **self.predictors})
