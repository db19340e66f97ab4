"""Which experts follow a behaviour: scores per expert from the routing under two conditions.

scores = risk_difference(stats_with_document, stats_without_document)
scores.ranked()[:10]                                   # the ten experts with the largest |delta|
-scores                                                # the opposite contrast
"""

from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.moe_shape import MoEShape
from moe_lens.routing_stats import RoutingStats


class ExpertScore(NamedTuple):
    """One expert and its score, in [-1, 1] for a risk difference."""

    layer: int
    expert: int
    delta: float


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """A score for every expert, positive where it goes with the first condition; from `risk_difference`.

    >>> from moe_lens import collect_routing, organisms, risk_difference
    >>> model, pairs = organisms.load("specialised"), organisms.world("specialised").conflicts("detection")
    >>> with_document = collect_routing(model, [pair.open_book for pair in pairs], progress=False)
    >>> without = collect_routing(model, [pair.closed_book for pair in pairs], progress=False)
    >>> scores = risk_difference(with_document, without)
    >>> scores.delta.shape, len(scores.ranked()), scores.to_dataframe().shape
    (torch.Size([4, 8]), 32, (32, 9))

    Attributes:
        delta: [layer expert], float64.
        stats_1, stats_2: the routing under the first and under the second condition.
    """

    delta: Float[Tensor, "layer expert"]
    stats_1: RoutingStats
    stats_2: RoutingStats

    def __post_init__(self) -> None:
        if self.delta.shape != self.stats_1.counts.shape:
            raise DataError(
                f"delta has shape {tuple(self.delta.shape)}, not {tuple(self.stats_1.counts.shape)}."
            )
        if not bool(torch.isfinite(self.delta).all()):
            raise DataError("delta holds NaN or infinite scores; experts cannot be ranked by them.")

    @property
    def shape(self) -> MoEShape:
        """The model that the scores are about; rows of `delta` are `shape.layers`."""
        return self.stats_1.shape

    def ranked(self) -> list[ExpertScore]:
        """All experts by |delta|, largest first; ties in the order of layer and expert."""
        scores = [
            ExpertScore(layer, expert, delta)
            for layer, row in zip(self.shape.layers, self.delta.tolist(), strict=True)
            for expert, delta in enumerate(row)
        ]
        return sorted(scores, key=lambda score: -abs(score.delta))  # sorted() is stable

    def to_dataframe(self) -> pd.DataFrame:
        """One row an expert, ranked: layer, expert, delta, and rate, count, n_tokens of both conditions."""
        frame = pd.DataFrame(self.ranked(), columns=list(ExpertScore._fields))
        rows = [self.shape.layers.index(layer) for layer in frame["layer"]]
        for number, stats in enumerate((self.stats_1, self.stats_2), start=1):
            frame[f"rate_{number}"] = stats.rates[rows, frame["expert"].tolist()].numpy()
            frame[f"count_{number}"] = stats.counts[rows, frame["expert"].tolist()].numpy()
            frame[f"n_tokens_{number}"] = stats.n_tokens
        return frame

    def __neg__(self) -> "ExpertScores":
        """The reversed contrast: conditions swapped, deltas negated."""
        return ExpertScores(-self.delta, self.stats_2, self.stats_1)

    def __repr__(self) -> str:
        top = ", ".join(f"L{s.layer}E{s.expert} {s.delta:+.2f}" for s in self.ranked()[:3])
        return f"ExpertScores({top}, ...; {self.shape})"


def risk_difference(stats_1: RoutingStats, stats_2: RoutingStats) -> ExpertScores:
    """delta = p(1) − p(2): how much more often an expert is among the top-k under the first condition.

    p is the activation rate A / N, with A the number of counted tokens that chose the expert and N that of
    all counted tokens (SteerMoE, arXiv 2509.09660, section 3). Float64, in [-1, 1].

    >>> from moe_lens import collect_routing, organisms, risk_difference
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, "Question : what is", progress=False)
    >>> float(risk_difference(stats, stats).delta.abs().max())
    0.0

    Raises:
        DataError: the statistics are of different models, layers, numbers of experts or k.
    """
    if not isinstance(stats_1, RoutingStats) or not isinstance(stats_2, RoutingStats):
        raise DataError("risk_difference needs two RoutingStats.")
    if differences := stats_1.shape.differences(stats_2.shape):
        raise DataError(f"The two statistics are not comparable: {'; '.join(differences)}.")
    return ExpertScores(stats_1.rates - stats_2.rates, stats_1, stats_2)
