"""Which experts matter by what they give: saliencies for pruning, and super experts.

units = collect_by_prompt(model, prompts, outputs=True)
saliency(units, "reap").lowest(8)                    # (layer, expert), 8 of each layer: what to prune
super_experts(units).experts                         # the few that no plan should switch off
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checks import chosen_layers
from moe_lens.errors import DataError
from moe_lens.results import Result, columns
from moe_lens.shape import MoEShape
from moe_lens.statistics.expert_outputs import ExpertOutputs
from moe_lens.statistics.sums import RoutingSums
from moe_lens.statistics.units import Units, as_units, first_experts, with_interval

if TYPE_CHECKING:
    import pandas

_RATIOS: Final = {
    "reap": ("weighted_norm_sums", "counts"),
    "ean": ("norm_sums", "counts"),
    "frequency": ("counts", "n_tokens"),
    "weighted_frequency": ("weight_sums", "n_tokens"),
    "ean_sum": ("norm_sums", "n_tokens"),
    "weighted_ean_sum": ("weighted_norm_sums", "n_tokens"),
}
"""Saliency -> what is summed over tokens, and what the sum is divided by."""
_MAXIMA: Final = {"max": "max_abs", "max_norm": "max_norm"}
SALIENCIES: Final = (*_RATIOS, *_MAXIMA)
"""The names that `saliency` knows."""


@dataclass(frozen=True, eq=False, repr=False)
class Saliency(Result):
    """How much each expert matters by one criterion; every tensor is [layer expert], float64.

    Attributes:
        shape: the model; rows are `shape.layers`.
        kind: the criterion, one of `SALIENCIES`.
        values: ≥ 0; 0 for an expert that was never chosen.
        low, high: interval over prompts; None for maxima and where the statistics are not by prompt, NaN for
            an expert that no prompt, or a single one, chose (where the criterion divides by its tokens).
        n_units: independent units (prompts, or clusters of prompts).
        level: of the intervals.
    """

    shape: MoEShape
    kind: str
    values: Float[Tensor, "layer expert"]
    low: Float[Tensor, "layer expert"] | None
    high: Float[Tensor, "layer expert"] | None
    n_units: int
    level: float

    def lowest(
        self,
        n: int,
        *,
        each_layer: bool = True,
        layers: Any = None,
        spare: "SuperExperts | Iterable[tuple[int, int]]" = (),
    ) -> list[tuple[int, int]]:
        """The n least salient experts of each layer, or of all layers together, as (layer, expert).

        What `pruned` and `SteeringPlan(deactivate=...)` take. Ties are in the order of layer and expert.

        Args:
            each_layer: as many of every layer, which is what checkpoints can hold.
            layers: choose among these; numbers, or "early", "middle", "late".
            spare: experts that are not chosen.

        Raises:
            DataError: fewer experts than that.
        """
        kept = spare.experts if isinstance(spare, SuperExperts) else spare
        return first_experts(
            self.values, self.shape, n, largest=False, each_layer=each_layer, layers=layers, without=kept
        )

    def highest(self, n: int, *, each_layer: bool = False, layers: Any = None) -> list[tuple[int, int]]:
        """The n most salient experts, as (layer, expert); arguments as of `lowest`."""
        return first_experts(self.values, self.shape, n, each_layer=each_layer, layers=layers)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert: layer, expert, value, low, high."""
        import pandas

        table = columns(value=self.values, low=self.low, high=self.high)
        return pandas.DataFrame({**self.shape.grid(), **table})

    def summary(self) -> str:
        """The criterion, the most salient expert, and the model."""
        ((layer, expert),) = self.highest(1)
        value = float(self.values[self.shape.layers.index(layer), expert])
        return f"{self.kind}: highest L{layer}E{expert} {value:.3g}; {self.n_units} units; {self.shape.words}"


def saliency(
    stats: Units, kind: str = "reap", *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> Saliency:
    """How much each expert matters, by a criterion for pruning: REAP and what it was compared with.

    >>> from moe_lens import collect_by_prompt, organisms, saliency
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the", "Question : what"]
    >>> units = collect_by_prompt(model, prompts, outputs=True, progress=False)
    >>> found = saliency(units, "reap")
    >>> found.values.shape, len(found.lowest(2)), found.low is not None
    (torch.Size([4, 8]), 8, True)

    With X_e the tokens that chose expert e, N all counted tokens, g_e the routing weight, f_e(x) what the
    expert gave before it was weighted (arXiv 2510.13999; the names of its code in brackets):

    - "reap": mean over X_e of g_e(x) · ‖f_e(x)‖₂ (reap).
    - "ean": mean over X_e of ‖f_e(x)‖₂ (ean_mean).
    - "ean_sum", "weighted_ean_sum": Σ over X_e of ‖f_e(x)‖₂, and of g_e(x) · ‖f_e(x)‖₂, here divided by N,
      which ranks experts alike and does not grow with the text.
    - "frequency": |X_e| / N (expert_frequency). "weighted_frequency": Σ over X_e of g_e(x), divided by N
      (weighted_expert_frequency_sum).
    - "max": the largest |f_e(x)_i| (the code's max_activations takes the largest f_e(x)_i, without |·|);
      "max_norm": the largest ‖f_e(x)‖₂.

    g_e is the weight that the model's own rule gives, divided by the sum of the chosen ones or not as the
    model does (in Llama 4, whose experts read what is weighted already, it is 1, and REAP is "ean"). An
    expert that was never chosen has 0 everywhere, as in the code, and is pruned first.

    Args:
        stats: from `collect_routing(..., outputs=True)` (frequencies need no outputs); or a list, one a
            prompt, from `collect_by_prompt`, for intervals that take prompts for the units.
        kind: one of `SALIENCIES`.
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples of the units.
        seed: the same seed gives the same intervals.

    Intervals are percentiles of the bootstrap, widened for few units; those that chose the expert count where
    the criterion divides by its tokens. With 40 prompts, those of 95 % held 91 to 93 % in a simulation
    (docs/methods.md). Maxima have none: a resample cannot hold a larger one than was
    seen.

    Raises:
        DataError: an unknown kind, statistics without outputs, or units of different models.
    """
    units = as_units("saliency", stats)
    if kind not in SALIENCIES:
        raise DataError(f"kind must be one of {', '.join(SALIENCIES)}; got {kind!r}.")
    if kind in _MAXIMA:
        values, low, high = (
            torch.stack([getattr(_outputs(u), _MAXIMA[kind]) for u in units]).amax(0),
            None,
            None,
        )
    else:
        above, below = ([_table(unit, name) for unit in units] for name in _RATIOS[kind])
        tables = [np.stack(above), np.stack(below)]
        values, low, high = with_interval(
            lambda a, b: a / b,
            tables,
            informs=tables[1] > 0,
            limits=(0.0, np.inf),
            level=level,
            n_resamples=n_resamples,
            seed=seed,
        )
    return Saliency(units[0].shape, kind, values.nan_to_num(0.0), low, high, len(units), level)


def _outputs(unit: RoutingSums) -> ExpertOutputs:
    if unit.outputs is None:
        raise DataError("These RoutingStats hold no outputs; collect them with outputs=True.")
    return unit.outputs


def _table(unit: RoutingSums, name: str) -> Float[np.ndarray, "layer expert"]:
    """One unit's sums, or number of tokens, in the shape of the experts."""
    if name == "n_tokens":
        return np.full(tuple(unit.counts.shape), float(unit.n_tokens))
    holder: Any = unit if name in ("counts", "weight_sums") else _outputs(unit)
    return getattr(holder, name).double().numpy()


@dataclass(frozen=True, eq=False, repr=False)
class SuperExperts(Result):
    """The experts with outputs far larger than all others', and what was asked of them.

    Attributes:
        shape: the model.
        experts: (layer, expert), largest output first.
        max_abs: [layer expert], float64, the largest |f_e(x)_i| of each expert; 0 if never chosen.
        threshold: the output that a super expert exceeds.
    """

    shape: MoEShape
    experts: tuple[tuple[int, int], ...]
    max_abs: Float[Tensor, "layer expert"]
    threshold: float

    def among(self, experts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the experts given that are super, in the order given."""
        return [(layer, expert) for layer, expert in experts if (layer, expert) in self.experts]

    def __len__(self) -> int:
        return len(self.experts)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per super expert: layer, expert, max_abs."""
        import pandas

        rows = {layer: row for row, layer in enumerate(self.shape.layers)}
        sizes = [(layer, expert, float(self.max_abs[rows[layer], expert])) for layer, expert in self.experts]
        return pandas.DataFrame(sizes, columns=["layer", "expert", "max_abs"])

    def summary(self) -> str:
        """How many, the first of them, the threshold, and the model."""
        first = ", ".join(f"L{layer}E{expert}" for layer, expert in self.experts[:3]) or "none"
        return f"{len(self)} super experts: {first}; outputs above {self.threshold:.3g}; {self.shape.words}"


def super_experts(
    stats: Units,
    *,
    percentile: float = 99.5,
    share_of_max: float = 0.1,
    layers: Any = None,
) -> SuperExperts:
    """The experts whose largest output component stands out from those of all experts of the model.

    >>> from moe_lens import collect_routing, organisms, super_experts
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question : what is", "the"], outputs=True, progress=False)
    >>> len(super_experts(stats)), len(super_experts(stats, percentile=50.0, share_of_max=0.5)) > 1
    (1, True)

    With m_e = max over tokens and components of |f_e(x)_i|, what the expert's down projection gives: e is
    super if m_e > the 99.5th percentile of all m and m_e > max m / 10 (arXiv 2507.23279).
    The percentile interpolates linearly (numpy's). Of n experts, about n / 200 exceed it, and always at least
    the largest if it is alone: so with few hundred experts one is found in any model, and whether it deserves
    the name shows in `max_abs` and in what the model does without it. The released code divides by 10 with
    `//`, which rounds down, to 0 where outputs are below 10; here nothing is rounded.

    Args:
        stats: from `collect_routing(..., outputs=True)`, or a list of such; prompts should begin as the
            model's prompts do (super experts feed attention sinks, mostly at the first token).
        percentile: in [0, 100).
        share_of_max: in [0, 1).
        layers: look for them in these only ("early", "middle", "late" or numbers); thresholds are still of
            all layers. The paper's criterion names layers in which massive activations form; its code, none.

    Raises:
        DataError: statistics without outputs, units of different models, or numbers out of range.
    """
    units = as_units("super_experts", stats)
    for name, value, end in (("percentile", percentile, 100), ("share_of_max", share_of_max, 1)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < end:
            raise DataError(f"{name} must be a number from 0 to below {end}; got {value!r}.")
    shape = units[0].shape
    sizes = torch.stack([_outputs(unit).max_abs for unit in units]).amax(0)
    threshold = max(float(np.percentile(sizes.numpy(), percentile)), float(sizes.max()) * share_of_max)
    among = chosen_layers(layers, shape.layers)
    found: Sequence[tuple[float, int, int]] = [
        (size, layer, expert)
        for layer, row in zip(shape.layers, sizes.tolist(), strict=True)
        for expert, size in enumerate(row)
        if layer in among and size > threshold
    ]
    ranked = sorted(found, key=lambda item: -item[0])
    return SuperExperts(shape, tuple((layer, expert) for _, layer, expert in ranked), sizes, threshold)
