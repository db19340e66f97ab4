"""What interventions show: the effects that travel by the route, and experts' mean outputs.

    found = mediation(model, clean_prompts, corrupted_prompts, metric)       # a Mediation
    found.share("route")                                                     # (share, low, high)
    means = mean_expert_outputs(model, prompts)                              # ExpertMeans

Both hold tensors on the CPU and give a table (`to_dataframe`); neither needs a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.resampling import bounds_of, cluster_weights
from moe_lens.results import Result
from moe_lens.shape import MoEShape

if TYPE_CHECKING:
    import pandas

EFFECTS: Final = ("route", "representation", "interaction")
"""The parts of a total effect; they sum to it."""


@dataclass(frozen=True, eq=False, repr=False)
class Mediation(Result):
    """The metric of each pair of prompts under all four combinations of reading and route, and by layer.

    >>> import torch
    >>> pair, layers = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([[1.0, 1.5, 2.0]])
    >>> by_route, by_reading = torch.tensor([1.0, 1.6, 1.9]), torch.tensor([0.5, 0.7, 1.05])
    >>> found = Mediation((3,), pair, 0 * pair, by_route, by_reading, *4 * [layers], weights=False)
    >>> print(found)                                # M(x, r): x is what the model reads, r the route it takes
    mediation by the route (experts only), 3 pairs
    metric: clean 3.000, corrupted 0.000, total effect 3.000
    route           +1.500   share +0.50 [+0.42, +0.58]
    representation  +0.750   share +0.25 [+0.21, +0.29]
    interaction     +0.750   share +0.25 [+0.21, +0.29]

    Attributes:
        layers: numbers of the MoE layers.
        clean: the metric of the clean runs, M(x, r(x)), float64 [pair].
        corrupted: that of the corrupted runs, M(x', r(x')).
        with_clean_route: M(x', r(x)), the corrupted run on the clean run's route.
        with_corrupted_route: M(x, r(x')), the clean run on the corrupted run's route.
        clean_route_in: `with_clean_route` with the route of one layer only, [layer pair].
        corrupted_route_in: `with_corrupted_route` with the route of one layer only.
        clean_route_up_to: `with_clean_route` with the routes of all layers up to this one.
        corrupted_route_up_to: `with_corrupted_route` with those.
        weights: whether routing weights were carried over with the experts.
    """

    layers: tuple[int, ...]
    clean: Float[Tensor, "pair"]
    corrupted: Float[Tensor, "pair"]
    with_clean_route: Float[Tensor, "pair"]
    with_corrupted_route: Float[Tensor, "pair"]
    clean_route_in: Float[Tensor, "layer pair"]
    corrupted_route_in: Float[Tensor, "layer pair"]
    clean_route_up_to: Float[Tensor, "layer pair"]
    corrupted_route_up_to: Float[Tensor, "layer pair"]
    weights: bool

    @property
    def total_effect(self) -> Float[Tensor, "pair"]:
        """M(x, r(x)) − M(x', r(x')), in the metric's units."""
        return self.clean - self.corrupted

    @property
    def route_effect(self) -> Float[Tensor, "pair"]:
        """M(x', r(x)) − M(x', r(x'))."""
        return self.with_clean_route - self.corrupted

    @property
    def representation_effect(self) -> Float[Tensor, "pair"]:
        """M(x, r(x')) − M(x', r(x'))."""
        return self.with_corrupted_route - self.corrupted

    @property
    def interaction(self) -> Float[Tensor, "pair"]:
        """What the route and the representation effect leave of the total effect."""
        return self.total_effect - self.route_effect - self.representation_effect

    def effect(self, name: str) -> Float[Tensor, "pair"]:
        """The "route", "representation" or "interaction" effect. Raises DataError for other names."""
        if name not in EFFECTS:
            raise DataError(f"{name!r} is not an effect; the effects are {', '.join(EFFECTS)}.")
        return getattr(self, name if name == "interaction" else f"{name}_effect")

    def share(
        self,
        name: str,
        *,
        clusters: Sequence[str] | None = None,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> tuple[float, float, float]:
        """Mean effect / mean total effect, with its bootstrap interval: (share, low, high).

        If a resampled total effect has the opposite sign, the interval is (-inf, inf). With fewer than ten
        pairs (or clusters) it holds at least the t interval (`bounds_of`): in a simulation 2 to 9 pairs then
        held the share in 94 to 99 %.

        Args:
            name: "route", "representation" or "interaction".
            clusters: one label a pair; pairs with the same label are resampled together. None: each by
                itself.
            level: of the interval.
            n_resamples: bootstrap resamples.
            seed: of the bootstrap.

        Raises:
            DataError: another name, a single pair, a total effect of 0, not one label a pair.
        """
        return self._share(self.effect(name), clusters, level, n_resamples, seed)

    def shares_by_layer(
        self,
        *,
        cumulative: bool = False,
        clusters: Sequence[str] | None = None,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> dict[str, Float[np.ndarray, "layer 3"]]:
        """The share of the total effect that each layer's route carries, in both directions.

        Args:
            cumulative: of all MoE layers up to this one, instead of this layer alone.
            clusters: one label a pair; pairs with the same label are resampled together. None: each by
                itself.
            level: of the interval.
            n_resamples: bootstrap resamples.
            seed: of the bootstrap.

        Returns: rows (share, low, high) a layer. "restored": what the clean route of that layer restores in
            the corrupted run; "lost": what the corrupted route of that layer takes from the clean run.

        Raises:
            DataError: as in `share`.
        """
        restored = self.clean_route_up_to if cumulative else self.clean_route_in
        spoiled = self.corrupted_route_up_to if cumulative else self.corrupted_route_in
        effects = {"restored": restored - self.corrupted, "lost": self.clean - spoiled}
        return {
            name: np.array([self._share(row, clusters, level, n_resamples, seed) for row in rows])
            for name, rows in effects.items()
        }

    def _share(
        self, effect: Tensor, clusters: Sequence[str] | None, level: float, n_resamples: int, seed: int
    ) -> tuple[float, float, float]:
        parts, total = effect.numpy(), self.total_effect.numpy()
        labels = [str(pair) for pair in range(len(total))]
        if clusters is not None:
            labels = list(clusters) if isinstance(clusters, Sequence) else []
        n_resamples, seed = whole_number(n_resamples, "n_resamples", least=1), whole_number(seed, "seed")
        if len(labels) != len(total) or len(set(labels)) < 2 or not 0 < level < 1:
            raise DataError(
                f"An interval needs a label for each of the {len(total)} pairs, at least two different ones "
                "(does the metric give one number a pair, [batch]?), and a level in (0, 1); got "
                f"{len(labels)} labels, {len(set(labels))} of them different, and level {level}."
            )
        if not total.mean():
            raise DataError("The total effect is 0, so there is nothing to give shares of.")
        drawn = cluster_weights(labels, n_resamples, seed)
        share, totals = float(parts.mean() / total.mean()), drawn @ total
        if bool((np.sign(totals) != np.sign(total.mean())).any()):
            return share, -np.inf, np.inf  # the total effect may be 0, and the share anything (Fieller)
        low, high = bounds_of(share, (drawn @ parts) / totals, len(set(labels)), level)
        return share, float(low), float(high)

    def __str__(self) -> str:
        lines = [
            f"mediation by the route ({'experts and weights' if self.weights else 'experts only'}), "
            f"{len(self.clean)} pairs",
            f"metric: clean {self.clean.mean():.3f}, corrupted {self.corrupted.mean():.3f}, "
            f"total effect {self.total_effect.mean():.3f}",
        ]
        for name in EFFECTS:
            lines.append(f"{name:<15} {self.effect(name).mean():+.3f}{self._share_in_words(name)}")
        return "\n".join(lines)

    def _share_in_words(self, name: str) -> str:
        share, low, high = self._share_or_nan(name)
        return "" if np.isnan(share) else f"   share {share:+.2f} [{low:+.2f}, {high:+.2f}]"

    def _share_or_nan(self, name: str) -> tuple[float, float, float]:
        """`share`, or NaN where a single pair or a total effect of 0 has none."""
        if len(self.clean) < 2 or not bool(self.total_effect.mean()):
            return np.nan, np.nan, np.nan
        return self.share(name)

    def summary(self) -> str:
        """Number of pairs, what is carried over, and the mean effects, in the metric's unit.

        >>> import torch
        >>> one, two, rows = torch.ones(2), torch.zeros(2), torch.ones(1, 2)
        >>> Mediation((0,), one, two, one, two, *4 * [rows], weights=False).summary().partition(":")[0]
        '2 pairs, experts only'
        """
        kind = "experts and weights" if self.weights else "experts only"
        means = ", ".join(f"{name} {self.effect(name).mean():+.3g}" for name in EFFECTS)
        pairs = f"{len(self.clean)} pair{'s' * (len(self.clean) != 1)}"
        return f"{pairs}, {kind}: total effect {self.total_effect.mean():+.3g} = {means}"

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an effect, with its mean over pairs and its share of the total effect (95 % interval).

        Columns: effect, mean (in the metric's unit), share, low, high; the last three are NaN where there is
        no share (a single pair, a total effect of 0). For other intervals call `share`.
        """
        import pandas

        rows = [("total", float(self.total_effect.mean()), np.nan, np.nan, np.nan)]
        rows += [(name, float(self.effect(name).mean()), *self._share_or_nan(name)) for name in EFFECTS]
        return pandas.DataFrame(rows, columns=["effect", "mean", "share", "low", "high"])


@dataclass(frozen=True, eq=False, repr=False)
class ExpertMeans(Result):
    """What each expert outputs on average, over the tokens that chose it.

    >>> from moe_lens import mean_expert_outputs, organisms
    >>> means = mean_expert_outputs(organisms.load("specialised"), "Question : what is", progress=False)
    >>> means.values.shape, int(means.counts.sum())          # 4 tokens × 2 experts × 4 layers
    (torch.Size([4, 8, 64]), 32)

    Attributes:
        shape: which model.
        values: mean output [layer expert d_model], before weights, float32; NaN for an expert never chosen.
        counts: how many tokens chose it, int64 [layer expert].
    """

    shape: MoEShape
    values: Float[Tensor, "layer expert d_model"]
    counts: Int[Tensor, "layer expert"]

    def summary(self) -> str:
        """The model, and how many experts have a mean and how many were never chosen.

        >>> import torch
        >>> from moe_lens import MoEShape
        >>> counts = torch.tensor([[3, 0]])
        >>> ExpertMeans(MoEShape("m", (0,), 2, 1), torch.ones(1, 2, 4), counts).summary()
        'm: 1 experts, 1 never chosen'
        """
        never = int((self.counts == 0).sum())
        return f"{self.shape.model}: {self.counts.numel() - never} experts, {never} never chosen"

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an expert. Columns: layer, expert, n_tokens (that chose it), norm (of its mean output)."""
        import pandas

        rows = [
            (layer, expert, int(self.counts[row, expert]), float(self.values[row, expert].norm()))
            for row, layer in enumerate(self.shape.layers)
            for expert in range(self.shape.n_experts)
        ]
        return pandas.DataFrame(rows, columns=["layer", "expert", "n_tokens", "norm"])
