"""`RouteAgreement`: how alike two models, checkpoints or prompts route the same tokens, layer by layer.

found = route_agreement(base, tuned, texts)
found.jaccard, found.low, found.high                 # [layer], beside found.chance
found.margin_same, found.margin_differ               # do they differ where the first was undecided?
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from moe_lens.results import Result, columns
from moe_lens.shape import MoEShape

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class RouteAgreement(Result):
    """How alike two runs route the same tokens; every tensor is [layer], float64.

    Attributes:
        shape: the first model; rows are `shape.layers`.
        other: name of the second model.
        jaccard: mean over tokens of |A ∩ B| / |A ∪ B| of the experts that both choose, in [0, 1].
        low, high: its interval over prompts; None for a single prompt.
        chance: the same of a token of the first run and another token of that prompt in the second: what
            agreement there is without the token's own; NaN where prompts count one token only.
        same: share of the tokens at which both choose the same experts.
        margin_same: mean routing margin of the first model at those tokens, in its rule's units; NaN where
            there are none.
        margin_differ: at the other tokens. Where it is small beside `margin_same`, routes differ where the
            first model was undecided anyway.
        n_tokens: tokens compared.
        n_prompts: prompts, the units of the interval.
        level: of the interval.
    """

    shape: MoEShape
    other: str
    jaccard: Float[Tensor, "layer"]
    low: Float[Tensor, "layer"] | None
    high: Float[Tensor, "layer"] | None
    chance: Float[Tensor, "layer"]
    same: Float[Tensor, "layer"]
    margin_same: Float[Tensor, "layer"]
    margin_differ: Float[Tensor, "layer"]
    n_tokens: int
    n_prompts: int
    level: float

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per layer: layer, jaccard, low, high, chance, same, margin_same, margin_differ."""
        import pandas

        names = ("jaccard", "low", "high", "chance", "same", "margin_same", "margin_differ")
        table = columns(**{name: getattr(self, name) for name in names})
        return pandas.DataFrame({"layer": self.shape.layers, **table})

    def summary(self) -> str:
        """Mean Jaccard index over layers, where it is smallest, how much was compared, and the models."""
        least = self.shape.layers[int(self.jaccard.argmin())]
        return (
            f"{self.shape.model} / {self.other}: Jaccard {self.jaccard.mean():.3f}, mean over layers, "
            f"{self.jaccard.min():.3f} in layer {least}; {self.n_tokens} tokens of {self.n_prompts} prompts"
        )
