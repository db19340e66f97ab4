"""Would the same experts be selected again? `SelectionSurvival`, from counts alone.

    found = ranking.survival(n_deactivate=50, design_effect=4)     # a PublishedRanking's
    found.survivors(0.9)                                           # (layer, expert)
    found.to_dataframe()

A published ranking has counts of tokens and no prompts, so nothing can be resampled but tokens. Tokens of a
prompt are alike, so a selection is less steady than independent tokens would make it; pairs of prompts that
share most of their tokens make it steadier. Counts cannot tell how much: `design_effect` says how many tokens
are worth one (Kish 1965, Survey Sampling, section 8.2), and a run of one's own what it is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_lens.checks import whole_number
from moe_lens.errors import DataError, PlanError
from moe_lens.results import Result
from moe_lens.steering.choosing import Expert

if TYPE_CHECKING:
    import pandas

_CHUNK: Final = 2**20  # elements of a [draw row] block


@runtime_checkable
class CountedExperts(Protocol):
    """A `PublishedRanking`, as far as it is read here."""

    @property
    def layer(self) -> Int[np.ndarray, "row"]: ...
    @property
    def expert(self) -> Int[np.ndarray, "row"]: ...
    @property
    def a1(self) -> Int[np.ndarray, "row"]: ...
    @property
    def a2(self) -> Int[np.ndarray, "row"]: ...
    @property
    def d1(self) -> Int[np.ndarray, "row"]: ...
    @property
    def d2(self) -> Int[np.ndarray, "row"]: ...
    @property
    def delta(self) -> Float[np.ndarray, "row"]: ...


@dataclass(frozen=True, eq=False, repr=False)
class SelectionSurvival(Result):
    """How often each selected expert is selected again from redrawn counts.

    Attributes:
        activate: the experts with the most positive delta, in their order.
        deactivate: those with the most negative.
        share: [selected], float64, in [0, 1], of activate and then of deactivate: in what share of the draws
            the expert is selected again, on the same side.
        delta: [selected], float64, in [-1, 1]: the risk difference as published.
        design_effect: how many tokens were taken to be worth one.
        n_draws: how often counts were drawn.
    """

    activate: tuple[Expert, ...]
    deactivate: tuple[Expert, ...]
    share: Float[np.ndarray, "selected"]
    delta: Float[np.ndarray, "selected"]
    design_effect: float
    n_draws: int

    @property
    def mean(self) -> float:
        """Mean share of the selection that is selected again, in [0, 1]."""
        return float(self.share.mean())

    def survivors(self, share: float = 0.95) -> list[Expert]:
        """The experts that are selected again in at least this share of the draws."""
        both = (*self.activate, *self.deactivate)
        return [expert for expert, found in zip(both, self.share, strict=True) if found >= share]

    def summary(self) -> str:
        """How many survive."""
        n = len(self.share)
        return (
            f"{len(self.survivors())} of {n} selected experts come again in 95 % of {self.n_draws} draws "
            f"(mean {self.mean:.2f}), {self.design_effect:g} token{'s' * (self.design_effect != 1)} worth one"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a selected expert: side, layer, expert, delta, share."""
        import pandas as pd

        both = [(side, *expert) for side in ("activate", "deactivate") for expert in getattr(self, side)]
        table = pd.DataFrame(both, columns=["side", "layer", "expert"])
        return table.assign(delta=self.delta, share=self.share)


def survival(
    ranking: CountedExperts,
    n_activate: int,
    n_deactivate: int,
    *,
    opposite: bool,
    design_effect: float,
    n_draws: int,
    seed: int,
) -> SelectionSurvival:
    """See `PublishedRanking.survival`."""
    numbers = [
        whole_number(number, name, error=PlanError)
        for name, number in (("n_activate", n_activate), ("n_deactivate", n_deactivate))
    ]
    draws = whole_number(n_draws, "n_draws", least=1)
    generator = np.random.default_rng(whole_number(seed, "seed"))
    is_number = isinstance(design_effect, int | float | np.number) and not isinstance(design_effect, bool)
    if not is_number or not 0 < design_effect < np.inf:
        raise DataError(
            f"design_effect must be a number above 0, how many tokens are worth one; got {design_effect!r}."
        )
    sign = -1 if opposite else 1
    chosen = [np.flatnonzero(side) for side in _selected(sign * ranking.delta[None], numbers)[:, 0]]
    for name, wanted, rows in zip(("n_activate", "n_deactivate"), numbers, chosen, strict=True):
        if len(rows) < wanted:
            raise PlanError(f"{name}={wanted}, but only {len(rows)} experts have a delta of that sign.")
    if not sum(numbers):
        raise PlanError("survival: select at least one expert (n_activate, n_deactivate).")
    tokens = [ranking.a1 + ranking.d1, ranking.a2 + ranking.d2]
    rates = [ranking.a1 / tokens[0], ranking.a2 / tokens[1]]
    worth = [np.maximum(1, np.round(each / design_effect)).astype(np.int64) for each in tokens]
    hits, left, block = np.zeros((2, len(ranking.delta))), draws, max(1, _CHUNK // len(ranking.delta))
    while left:
        size = (min(left, block), len(ranking.delta))
        one, two = (generator.binomial(n, rate, size) / n for n, rate in zip(worth, rates, strict=True))
        hits += _selected(sign * (one - two), numbers).sum(1)
        left -= size[0]
    order = [rows[np.argsort(-np.abs(ranking.delta[rows]), kind="stable")] for rows in chosen]
    experts = [
        tuple((int(ranking.layer[row]), int(ranking.expert[row])) for row in rows.tolist()) for rows in order
    ]
    share = np.concatenate([hits[side, rows] / draws for side, rows in enumerate(order)])
    delta = np.concatenate([ranking.delta[rows] for rows in order])
    return SelectionSurvival(experts[0], experts[1], share, delta, float(design_effect), draws)


def _selected(delta: Float[np.ndarray, "draw row"], numbers: list[int]) -> Bool[np.ndarray, "side draw row"]:
    """The first of each sign by |delta|, ties in the file's order, where there are as many."""
    order: Int[np.ndarray, "draw row"] = np.argsort(-np.abs(delta), axis=1, kind="stable")
    chosen = np.zeros((2, *delta.shape), dtype=bool)
    for side, (sign, number) in enumerate(zip((1, -1), numbers, strict=True)):
        has_sign = np.take_along_axis(delta, order, 1) * sign > 0
        np.put_along_axis(chosen[side], order, has_sign & (has_sign.cumsum(1) <= number), 1)
    return chosen
