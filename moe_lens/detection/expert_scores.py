"""Which experts follow a behaviour: scores per expert from the routing under two conditions.

scores = risk_difference(with_document, without_document)     # the score alone
scores = detect(model, pairs)                                 # with its uncertainty (see detecting.py)
scores.ranked()[:10]                                          # the ten experts with the largest |delta|
-scores                                                       # the opposite contrast
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.detection.floors import experts_together, floor_of
from moe_lens.detection.scores import SCORES, Score
from moe_lens.detection.token_alignment import TokenAlignment
from moe_lens.errors import DataError
from moe_lens.files import FileKind
from moe_lens.results import Result
from moe_lens.shape import MoEShape
from moe_lens.statistics.output_scores import SuperExperts, super_experts
from moe_lens.statistics.routing_stats import RoutingStats

if TYPE_CHECKING:
    import pandas

_KIND: Final = FileKind("moe_lens.ExpertScores", schema=2, reads=(1, 2), words="expert scores")


class ExpertScore(NamedTuple):
    """One expert and its score, in [-1, 1] for a risk difference."""

    layer: int
    expert: int
    delta: float


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Result):
    """How sure the scores are; all of it takes clusters of prompts, not tokens, for the independent units.

    Attributes:
        low, high: [layer expert], float64, bounds of the confidence interval of each score.
        p: [layer expert], float64, two-sided p-values.
        q: [layer expert], float64, Benjamini–Hochberg q-values over all experts of all layers.
        level: confidence level of the intervals.
        n_resamples, n_permutations, seed: what a repetition needs.
        clusters: the cluster of each pair of prompts; pairs of one cluster are one unit. Of two groups of
            different prompts, the cluster of each prompt of the first.
        templates: the template of each pair; none for two groups.
        clusters_2: the cluster of each prompt of the second group; None for pairs.
    """

    low: Float[Tensor, "layer expert"]
    high: Float[Tensor, "layer expert"]
    p: Float[Tensor, "layer expert"]
    q: Float[Tensor, "layer expert"]
    level: float
    n_resamples: int
    n_permutations: int
    seed: int
    clusters: tuple[str, ...]
    templates: tuple[str, ...]
    clusters_2: tuple[str, ...] | None = None

    @property
    def is_paired(self) -> bool:
        """Whether prompts were compared pair by pair; otherwise two groups of different prompts were."""
        return self.clusters_2 is None

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that so many clusters and permutations can give, however large the effect."""
        return floor_of(self.clusters, self.clusters_2, self.n_permutations)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of everything that is one number per expert."""
        return {name: getattr(self, name) for name in ("low", "high", "p", "q")}

    def settings(self) -> dict[str, Any]:
        """Name -> value, of all the rest."""
        return {name: value for name, value in vars(self).items() if name not in self.tensors()}

    def summary(self) -> str:
        """How many experts are significant, on how many pairs (or unpaired prompts), and the settings."""
        if self.clusters_2 is None:
            prompts, labels = f"{len(self.clusters)} pairs", set(self.clusters)
        else:
            prompts = f"unpaired, {len(self.clusters)} and {len(self.clusters_2)} prompts"
            labels, shared = {*self.clusters, *self.clusters_2}, set(self.clusters) & set(self.clusters_2)
            if shared and shared != labels:
                prompts += f" ({len(shared)} clusters in both: conservative; pair prompts where you can)"
        n_found = int((self.q <= 0.05).sum())
        found = f"{n_found} of {self.q.numel()} experts with q ≤ 0.05{self._floor(n_found)}"
        return (
            f"{found}; {prompts} in {len(labels)} clusters, {100 * self.level:g}% intervals, "
            f"{self.n_resamples} resamples, {self.n_permutations} permutations, seed {self.seed}"
        )

    def _floor(self, n_found: int) -> str:
        """What few clusters rule out, where fewer experts were found than they allow."""
        together = experts_together(self.smallest_p, self.q.numel())
        if together <= max(1, n_found):
            return ""
        few = f"too few clusters: p ≥ {self.smallest_p:.2g}"
        return f" ({few})" if together > self.q.numel() else f" ({few}, so {together} or more, or none)"


@dataclass(frozen=True, eq=False, repr=False)
class ExpertScores(Result):
    """A score for every expert, positive where it goes with the first condition.

    From `risk_difference` (the score alone) or `detect` (with intervals, p- and q-values).

    >>> from moe_lens import collect_routing, organisms, risk_difference
    >>> model, pairs = organisms.load("specialised"), organisms.world("specialised").conflicts("detection")
    >>> with_document = collect_routing(model, [pair.open_book for pair in pairs], progress=False)
    >>> without = collect_routing(model, [pair.closed_book for pair in pairs], progress=False)
    >>> scores = risk_difference(with_document, without)
    >>> scores.delta.shape, len(scores.ranked()), scores.to_dataframe().shape
    (torch.Size([4, 8]), 32, (32, 9))

    Attributes:
        delta: [layer expert], float64, the score: a risk difference, or what `score` names.
        stats_1, stats_2: the routing under the first and under the second condition.
        score: the name of the score that `delta` is.
        evidence: intervals, p- and q-values; None where only the score is known.
        formula: the `Score` of that name, which resampling needs. None for a number of another kind, and for
            a user's own score read from a file, which keeps the name only.
        alignment: which pairs count different tokens under both conditions, from `detect`; None where the
            tokens are not known, or there are no pairs.
    """

    delta: Float[Tensor, "layer expert"]
    stats_1: RoutingStats
    stats_2: RoutingStats
    score: str = "risk_difference"
    evidence: Evidence | None = None
    formula: Score | None = None
    alignment: TokenAlignment | None = None

    def __post_init__(self) -> None:
        if self.formula is None:
            object.__setattr__(self, "formula", SCORES.get(self.score))
        elif self.formula.name != self.score:
            raise DataError(f"The scores are {self.score!r}, their formula is {self.formula!r}.")
        tensors = {"delta": self.delta, **(self.evidence.tensors() if self.evidence else {})}
        for name, tensor in tensors.items():
            if tensor.shape != self.stats_1.counts.shape:
                raise DataError(
                    f"{name} has shape {tuple(tensor.shape)}, not {tuple(self.stats_1.counts.shape)}."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"{name} holds NaN or infinite values; experts cannot be ranked by them.")

    @property
    def shape(self) -> MoEShape:
        """The model that the scores are about; rows of `delta` are `shape.layers`."""
        return self.stats_1.shape

    @property
    def label(self) -> str:
        """What an axis of a figure says of `delta`; the name of the score where its formula is not known."""
        return self.formula.label if self.formula else self.score

    @property
    def low(self) -> Float[Tensor, "layer expert"] | None:
        """Lower bounds of the confidence intervals; None without evidence."""
        return self.evidence.low if self.evidence else None

    @property
    def high(self) -> Float[Tensor, "layer expert"] | None:
        """Upper bounds of the confidence intervals; None without evidence."""
        return self.evidence.high if self.evidence else None

    @property
    def p(self) -> Float[Tensor, "layer expert"] | None:
        """Two-sided p-values; None without evidence."""
        return self.evidence.p if self.evidence else None

    @property
    def q(self) -> Float[Tensor, "layer expert"] | None:
        """Benjamini–Hochberg q-values over all experts; None without evidence."""
        return self.evidence.q if self.evidence else None

    @property
    def super_experts(self) -> SuperExperts | None:
        """Of the routing under both conditions; None where it was not collected with outputs=True."""
        if self.stats_1.outputs is None or self.stats_2.outputs is None:
            return None
        return super_experts([self.stats_1, self.stats_2])

    def ranked(self) -> list[ExpertScore]:
        """All experts by |delta|, largest first; ties in the order of layer and expert."""
        scores = [
            ExpertScore(layer, expert, delta)
            for layer, row in zip(self.shape.layers, self.delta.tolist(), strict=True)
            for expert, delta in enumerate(row)
        ]
        return sorted(scores, key=lambda score: -abs(score.delta))  # sorted() is stable

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert, ranked: layer, expert, delta, and rate, count, n_tokens of both conditions.

        With evidence also low, high, p and q.
        """
        import pandas

        frame = pandas.DataFrame(self.ranked(), columns=list(ExpertScore._fields))
        rows, experts = [self.shape.layers.index(layer) for layer in frame["layer"]], frame["expert"].tolist()
        for name, tensor in (self.evidence.tensors() if self.evidence else {}).items():
            frame[name] = tensor[rows, experts].numpy()
        for number, stats in enumerate((self.stats_1, self.stats_2), start=1):
            frame[f"rate_{number}"] = stats.rates[rows, experts].numpy()
            frame[f"count_{number}"] = stats.counts[rows, experts].numpy()
            frame[f"n_tokens_{number}"] = stats.n_tokens
        return frame

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (never pickle), atomically, with the routing of both conditions."""
        tensors = {"delta": self.delta, **(self.evidence.tensors() if self.evidence else {})}
        about: dict[str, Any] = {
            "score": self.score,
            "evidence": self.evidence.settings() if self.evidence else None,
            "alignment": self.alignment.to_json() if self.alignment else None,
        }
        for number, stats in enumerate((self.stats_1, self.stats_2), start=1):
            tensors |= {f"stats_{number}.{name}": tensor for name, tensor in stats.tensors().items()}
            about[f"stats_{number}"] = stats.about()
        _KIND.save_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> "ExpertScores":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        about, tensors = _KIND.load_tensors(path)
        try:
            stats = [_stats_part(number, about, tensors) for number in (1, 2)]
            evidence = None
            if (settings := about["evidence"]) is not None:
                lists = {name: tuple(settings.pop(name)) for name in ("clusters", "templates")}
                if (second := settings.pop("clusters_2", None)) is not None:
                    lists["clusters_2"] = tuple(second)
                numbers = {name: tensors[name] for name in ("low", "high", "p", "q")}
                evidence = Evidence(**numbers, **lists, **settings)
            kept = about.get("alignment")
            alignment = None if kept is None else TokenAlignment.from_json(kept)
            return cls(tensors["delta"], stats[0], stats[1], about["score"], evidence, alignment=alignment)
        except (KeyError, TypeError, AttributeError, OverflowError, DataError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error

    def __neg__(self) -> "ExpertScores":
        """The reversed contrast: conditions swapped, deltas and intervals negated."""
        evidence, alignment = self.evidence, self.alignment
        if evidence is not None:
            evidence = replace(evidence, low=-evidence.high, high=-evidence.low)
            if evidence.clusters_2 is not None:
                evidence = replace(evidence, clusters=evidence.clusters_2, clusters_2=evidence.clusters)
        return replace(
            self,
            delta=-self.delta,
            stats_1=self.stats_2,
            stats_2=self.stats_1,
            evidence=evidence,
            alignment=alignment and alignment.swapped(),
        )

    def summary(self) -> str:
        """The score, its three largest experts, how many are significant, and the model.

        Also that two groups are not paired, that the clusters are too few, that pairs count other tokens.
        """
        top = ", ".join(f"L{s.layer}E{s.expert} {s.delta:+.2f}" for s in self.ranked()[:3])
        notes = ""
        if self.evidence is not None:
            notes = "; " + self.evidence.summary().partition(";")[0]
            notes += "" if self.evidence.is_paired else ", unpaired"
        if self.alignment is not None and self.alignment.differences and not self.alignment.expected:
            notes += f"; tokens differ in {len(self.alignment.differing)} of {self.alignment.n_pairs} pairs"
        return f"{self.score}: {top}, ...{notes}; {self.shape.words}"


def risk_difference(stats_1: RoutingStats, stats_2: RoutingStats) -> ExpertScores:
    """delta = p(1) − p(2): how much more often an expert is among the top-k under the first condition.

    p is the activation rate A / N, with A the number of counted tokens that chose the expert and N that of
    all counted tokens (SteerMoE, arXiv 2509.09660, section 3). Float64, in [-1, 1]. The score alone: `detect`
    adds intervals, p-values and q-values.

    >>> from moe_lens import collect_routing, organisms, risk_difference
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, "Question : what is", progress=False)
    >>> float(risk_difference(stats, stats).delta.abs().max())
    0.0

    Raises:
        DataError: the statistics are of different models, layers, numbers of experts or k.
    """
    check_comparable(stats_1, stats_2)
    # over the common denominator, so that equal differences are equal in float64 and tie
    numerator = stats_1.counts * stats_2.n_tokens - stats_2.counts * stats_1.n_tokens
    return ExpertScores(numerator.double() / (stats_1.n_tokens * stats_2.n_tokens), stats_1, stats_2)


def check_comparable(stats_1: Any, stats_2: Any) -> None:
    """Raise DataError unless both are RoutingStats of one model."""
    if not isinstance(stats_1, RoutingStats) or not isinstance(stats_2, RoutingStats):
        raise DataError("A contrast needs two RoutingStats, one for each condition.")
    if differences := stats_1.shape.differences(stats_2.shape):
        raise DataError(f"The two statistics are not comparable: {'; '.join(differences)}.")


def _stats_part(number: int, about: dict[str, Any], tensors: dict[str, Tensor]) -> RoutingStats:
    prefix = f"stats_{number}."
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return RoutingStats.from_tensors(about[f"stats_{number}"], part)
