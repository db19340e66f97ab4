"""What each expert is worth to a metric, prompt by prompt: a ranking by causal effect.

effects = effects_by_expert(virtual_ablation(model, prompts))
SteeringPlan(deactivate=effects.lowest(4, significant=True))      # without them the metric falls
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.attribution.results import VirtualAblation
from moe_lens.checks import chosen_layers, whole_number
from moe_lens.errors import DataError
from moe_lens.resampling import interval_of
from moe_lens.results import Result, columns
from moe_lens.shape import MoEShape

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class ExpertEffects(Result):
    """How a metric changes where experts are routed around; every tensor is [layer expert], float64.

    Attributes:
        shape: the model and the layers of the rows.
        effect: mean over prompts of the changes at all tokens that chose the expert, added up, in the
            metric's unit; positive: without the expert the metric is higher. 0 for one never chosen.
        low, high: its interval over prompts; None for a single unit.
        n_chosen: int64, how many tokens chose the expert.
        n_units: prompts, or clusters of prompts.
        level: of the intervals.
    """

    shape: MoEShape
    effect: Float[Tensor, "layer expert"]
    low: Float[Tensor, "layer expert"] | None
    high: Float[Tensor, "layer expert"] | None
    n_chosen: Int[Tensor, "layer expert"]
    n_units: int
    level: float

    def highest(self, n: int, *, significant: bool = False, layers: Any = None) -> list[tuple[int, int]]:
        """The n experts, as (layer, expert), without which the metric rises most; fewer if fewer raise it.

        Args:
            significant: only those whose interval lies above 0.
            layers: among these; numbers, or "early", "middle", "late".

        Raises:
            DataError: none, significance of a single unit, or layers that are not there.
        """
        return self._first(n, 1, significant, layers)

    def lowest(self, n: int, *, significant: bool = False, layers: Any = None) -> list[tuple[int, int]]:
        """The n experts without which the metric falls most; fewer if fewer lower it. As `highest`."""
        return self._first(n, -1, significant, layers)

    def _first(self, n: int, sign: int, significant: bool, layers: Any) -> list[tuple[int, int]]:
        number, among = whole_number(n, "n", least=1), chosen_layers(layers, self.shape.layers)
        values = sign * self.effect
        if significant:
            if self.low is None or self.high is None:
                raise DataError(
                    "One prompt (or cluster) has no interval; give more to tell what is significant."
                )
            values = values.where((self.low > 0) if sign > 0 else (self.high < 0), 0.0)
        ranked = sorted(
            (
                (-value, layer, expert)
                for layer, row in zip(self.shape.layers, values.tolist(), strict=True)
                for expert, value in enumerate(row)
                if value > 0 and layer in among
            ),
            key=lambda item: item[0],
        )
        if not ranked:
            words = "significantly " if significant else ""
            raise DataError(f"No expert {words}{'raises' if sign > 0 else 'lowers'} the metric by going.")
        return [(layer, expert) for _, layer, expert in ranked[:number]]

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert: layer, expert, effect, low, high, n_chosen."""
        import pandas

        table = columns(effect=self.effect, low=self.low, high=self.high, n_chosen=self.n_chosen)
        return pandas.DataFrame({**self.shape.grid(), **table})

    def summary(self) -> str:
        """Where the effect is largest, how many are significant, units, and the model."""
        row, expert = divmod(int(self.effect.abs().argmax()), self.shape.n_experts)
        sure = "no intervals"
        if self.low is not None and self.high is not None:
            sure = f"{int(((self.low > 0) | (self.high < 0)).sum())} experts with intervals that leave out 0"
        return (
            f"L{self.shape.layers[row]}E{expert} {float(self.effect[row, expert]):+.3g} a prompt; {sure}; "
            f"{self.n_units} units; {self.shape.words}"
        )


def effects_by_expert(
    found: VirtualAblation,
    *,
    clusters: Iterable[Any] | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ExpertEffects:
    """Each expert's changes of a metric, added up over a prompt's tokens and averaged over prompts.

    >>> from moe_lens import organisms, virtual_ablation
    >>> from moe_lens.attribution import effects_by_expert
    >>> model, prompts = organisms.load("specialised"), ["Question : what is the", "Document : the"]
    >>> effects = effects_by_expert(virtual_ablation(model, prompts, progress=False))
    >>> effects.effect.shape, len(effects.highest(3))
    (torch.Size([4, 8]), 3)

    What routing around the expert at all its tokens would do, if changes added up: each change is that of one
    token alone. Exact changes count where they were run, estimates elsewhere. An expert with a small change
    at many tokens counts as much as one with a large change at few; `VirtualAblation.by_expert` has means
    over tokens. Whether a plan of these experts does what the sum says is for `evaluate_steering` to measure.

    Args:
        found: from `virtual_ablation`.
        clusters: one label a prompt; prompts of one label are resampled together.
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples of the prompts.
        seed: the same seed gives the same intervals.

    Raises:
        DataError: something else than a VirtualAblation, or another number of labels than of prompts.
    """
    if not isinstance(found, VirtualAblation):
        raise DataError(f"effects_by_expert needs a VirtualAblation; got {type(found).__name__}.")
    n_layers, n_prompts, _, _ = found.indices.shape
    labels = [str(label) for label in (range(n_prompts) if clusters is None else clusters)]
    if len(labels) != n_prompts:
        raise DataError(f"{n_prompts} prompts need as many cluster labels; got {len(labels)}.")
    chosen, real = found.indices.flatten(2).clamp(min=0), found.indices.flatten(2) >= 0
    size = (n_layers, n_prompts, found.shape.n_experts)
    changes = found.changes.flatten(2).double().where(real, 0.0)
    sums = torch.zeros(size, dtype=torch.float64).scatter_add(-1, chosen, changes)
    counts = torch.zeros(size, dtype=torch.int64).scatter_add(-1, chosen, real.long())
    _, unit = np.unique(np.array(labels), return_inverse=True)
    n_units = int(unit.max()) + 1
    tables = [np.zeros((n_units, n_layers, found.shape.n_experts)), np.bincount(unit).astype(np.float64)]
    np.add.at(tables[0], unit, sums.transpose(0, 1).numpy())
    low, high = interval_of(
        lambda total, n: total / n[:, None, None], tables, level=level, n_resamples=n_resamples, seed=seed
    )
    bounds = (None, None) if n_units < 2 else (torch.from_numpy(low), torch.from_numpy(high))
    return ExpertEffects(found.shape, sums.mean(1), *bounds, counts.sum(1), n_units, level)
