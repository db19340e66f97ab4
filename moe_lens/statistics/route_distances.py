"""How far apart two collections of prompts are routed, layer by layer, in units of the routers' entropy.

found = route_divergence(german, english)            # RoutingStats with per_prompt=True
found.divergence, found.low, found.high              # [layer]
route_divergence(german, english, paired=True)       # translations of each other, sentence by sentence
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checks import share, whole_number
from moe_lens.errors import DataError
from moe_lens.resampling import clustered_interval
from moe_lens.results import Result, columns
from moe_lens.shape import MoEShape
from moe_lens.statistics.counts import PromptCounts
from moe_lens.statistics.domain_evidence import (
    clustered,
    divergence_of,
    domain_evidence,
    normalised_divergence,
)
from moe_lens.statistics.sums import RoutingSums

if TYPE_CHECKING:
    import pandas

_HALVES = np.array([0.5, 0.5])


@dataclass(frozen=True, eq=False, repr=False)
class RouteDivergence(Result):
    """How differently two collections of prompts are routed; every tensor is [layer], float64.

    Attributes:
        shape: the model; rows are `shape.layers`.
        divergence: ≥ 0; divided by the mean entropy or in nats, as `normalise` says.
        corrected: the divergence less its bias; None where it is not known, and of pairs.
        low, high: its interval over prompts (or pairs); None without per_prompt counts, NaN of a single pair
            or cluster of pairs.
        p: of "both are routed alike", in (0, 1]; None without per_prompt counts, and of pairs.
        normalise: "entropy", or None.
        paired: whether it is the mean over pairs of prompts.
        n_units: independent units of either collection.
        level: of the intervals.
    """

    shape: MoEShape
    divergence: Float[Tensor, "layer"]
    corrected: Float[Tensor, "layer"] | None
    low: Float[Tensor, "layer"] | None
    high: Float[Tensor, "layer"] | None
    p: Float[Tensor, "layer"] | None
    normalise: str | None
    paired: bool
    n_units: tuple[int, ...]
    level: float

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per layer: layer, divergence, corrected, low, high, p."""
        import pandas

        names = ("divergence", "corrected", "low", "high", "p")
        table = columns(**{name: getattr(self, name) for name in names})
        return pandas.DataFrame({"layer": self.shape.layers, **table})

    def summary(self) -> str:
        """Mean over layers, the layers with the smallest and largest divergence, and the model."""
        unit = "nats" if self.normalise is None else "of the mean entropy"
        least, most = (
            self.shape.layers[int(i)] for i in (self.divergence.argmin(), self.divergence.argmax())
        )
        return (
            f"mean over layers {self.divergence.mean():.3g} {unit}, least in layer {least}, most in {most}; "
            f"{self.shape.words}"
        )


def route_divergence(
    a: RoutingSums,
    b: RoutingSums,
    *,
    normalise: Literal["entropy"] | None = "entropy",
    paired: bool = False,
    clusters: Sequence[Any] | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> RouteDivergence:
    """Jensen–Shannon divergence of two collections' mean router probabilities, divided by their mean entropy.

    >>> from moe_lens import collect_routing, organisms, route_divergence
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").conflicts("detection")
    >>> a, b = (
    ...     collect_routing(model, texts, per_prompt=True, progress=False)
    ...     for texts in ([c.open_book for c in facts], [c.closed_book for c in facts])
    ... )
    >>> found = route_divergence(a, b)
    >>> found.divergence.shape, bool((found.divergence > 0).all()), bool((found.p < 0.05).any())
    (torch.Size([4]), True, True)

    With q the mean over tokens of the router's softmax probabilities (multilingual routing,
    arXiv 2510.04694): D = [H((q_a + q_b) / 2) − (H(q_a) + H(q_b)) / 2] / [(H(q_a) + H(q_b)) / 2], with the
    entropies H. Layers whose routers spread over more experts would otherwise look closer. 0 where both
    collections have the same mean; with few prompts the number is too large even then. q is the softmax over
    all experts, also where the router itself scores otherwise (see `RoutingStats.mean_probability`).

    Not paired, all tokens of a collection make one q; `corrected`, interval and p are those of
    `domain_specialisation`, prompts being the units. For translations this interval is too long rather than
    too short. Paired, the paper's way for parallel texts: q_i of each prompt, and the mean of D_i over pairs,
    which also holds what two single prompts differ by chance; the interval resamples the pairs.

    Args:
        a: RoutingStats of one collection; with per_prompt counts for intervals.
        b: of the other, or of the reference; the divergence is symmetric.
        normalise: "entropy"; None: nats, in [0, ln 2].
        paired: prompt i of one belongs to prompt i of the other.
        clusters: one label a pair; pairs of one label are resampled together. Not paired: two lists, one
            label a prompt of each collection, none in both.
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples.
        n_permutations: for p.
        seed: of both.

    Raises:
        DataError: different models, an unknown normalisation, routers of zero entropy; pairs without
            per_prompt counts of as many prompts, or with a prompt of which no token counts.
    """
    for stats in (a, b):
        if not isinstance(stats, RoutingSums):
            raise DataError(f"route_divergence needs RoutingStats; got {type(stats).__name__}.")
    if differences := a.shape.differences(b.shape):
        raise DataError(f"The two statistics are not comparable: {'; '.join(differences)}.")
    if normalise not in ("entropy", None):
        raise DataError(f"normalise must be 'entropy' or None; got {normalise!r}.")
    share(level, "level")
    whole_number(seed, "seed")
    measure = divergence_of if normalise is None else normalised_divergence
    if paired:
        values, units = _of_pairs(a, b, measure), clusters
        labels = [str(label) for label in (range(len(values)) if units is None else units)]
        settings: dict[str, Any] = {"level": level, "n_resamples": n_resamples, "seed": seed}
        bounds = [clustered_interval(column, labels, **settings) for column in values.T]
        low, high = (
            torch.tensor(side, dtype=torch.float64).clamp(min=0) for side in zip(*bounds, strict=True)
        )
        mean, n_units = torch.from_numpy(values.mean(0)), (len(set(labels)),)
        return RouteDivergence(a.shape, mean, None, low, high, None, normalise, True, n_units, level)
    shares = np.stack([(s.probability_sums / s.n_tokens).numpy() for s in (a, b)])
    observed = torch.from_numpy(_finite(measure(shares, _HALVES)))
    given = (None, None) if clusters is None else _two_lists(clusters)
    groups = [_group(stats, labels) for stats, labels in zip((a, b), given, strict=True)]
    if any(group is None or len(group[1]) < 2 for group in groups):
        return RouteDivergence(a.shape, observed, None, None, None, None, normalise, False, (), level)
    found = domain_evidence(
        [group for group in groups if group is not None],
        _HALVES,
        a.shape,
        level=level,
        n_resamples=n_resamples,
        n_permutations=n_permutations,
        seed=seed,
        normalise=normalise is not None,
    )
    return RouteDivergence(
        a.shape,
        observed,
        found.corrected,
        found.low,
        found.high,
        found.p,
        normalise,
        False,
        found.n_units,
        level,
    )


def _two_lists(clusters: Sequence[Any]) -> tuple[list[str], list[str]]:
    if len(clusters) != 2:
        raise DataError("Collections that are not paired need two lists of cluster labels, one for each.")
    one, two = ([str(label) for label in labels] for labels in clusters)
    if shared := set(one) & set(two):
        raise DataError(
            f"Cluster {min(shared)!r} is in both collections, which are resampled apart; use paired=True."
        )
    return one, two


def _group(stats: RoutingSums, clusters: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Summed probabilities and tokens of each prompt, or cluster of prompts."""
    prompts = stats.per_prompt
    if prompts is None:
        if clusters is not None:
            raise DataError("Clusters need counts by prompt; collect both with per_prompt=True.")
        return None
    labels = [str(label) for label in (range(len(prompts.n_tokens)) if clusters is None else clusters)]
    if len(labels) != len(prompts.n_tokens):
        raise DataError(f"{len(prompts.n_tokens)} prompts need as many cluster labels; got {len(labels)}.")
    return clustered(prompts.probability_sums.double().numpy(), prompts.n_tokens.numpy(), labels)


def _of_pairs(a: RoutingSums, b: RoutingSums, measure: Any) -> Float[np.ndarray, "pair layer"]:
    """The measure of each pair of prompts."""
    parts: list[PromptCounts] = []
    for stats in (a, b):
        if stats.per_prompt is None:
            raise DataError("Pairs need counts by prompt; collect both with per_prompt=True.")
        parts.append(stats.per_prompt)
    sizes = [len(part.n_tokens) for part in parts]
    if sizes[0] != sizes[1]:
        raise DataError(f"Pairs need as many prompts in both; got {sizes[0]} and {sizes[1]}.")
    if not all(bool((part.n_tokens > 0).all()) for part in parts):
        raise DataError("A prompt has no counted token, so its pair has no divergence; leave both out.")
    shares = np.stack(
        [(p.probability_sums.double() / p.n_tokens[:, None, None].double()).numpy() for p in parts]
    )
    n_groups, n_pairs, n_layers, n_experts = shares.shape
    flat = measure(shares.reshape(n_groups, n_pairs * n_layers, n_experts), _HALVES)
    return _finite(flat).reshape(n_pairs, n_layers)


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise DataError(
            "A layer's router gives every token to the same expert with certainty, so there is no entropy "
            "to divide by; use normalise=None."
        )
    return values
