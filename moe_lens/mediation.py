"""How much of an effect travels by the route (who computes), and how much by what the experts see.

    found = mediation(model, clean_prompts, corrupted_prompts, metric)
    found.share("route")                       # of the total effect, with an interval

Let M(x, r) be the metric when the model reads x with every token's experts fixed to route r, and r(x) the
route that it takes by itself. For a clean prompt x and a corrupted x':

    total effect            M(x, r(x))  − M(x', r(x'))
    route effect            M(x', r(x)) − M(x', r(x'))     only the route is carried over from the clean run
    representation effect   M(x, r(x')) − M(x', r(x'))     all but the route is
    interaction             total − route − representation

With the route as mediator these are the natural indirect and natural direct effect (Pearl 2001; for language
models Vig et al. 2020, arXiv 2004.12265). A share is the effect divided by the total effect, as activation
patching is normalised: 0 the corrupted run, 1 the clean run. It can be negative or above 1.

What it does not say. A fixed route is one that the model would not have taken, so that experts meet hidden
states that they were not trained on: an effect may be damage. Route and representation influence each other
from layer to layer; the shares of single layers do not add up, and neither do route and representation where
they interact. Where the total effect is near 0, shares mean nothing; look at their intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.batching import Prompts, chunks, pad_sequences, token_sequences
from moe_lens.bridge_layers import routing_layers
from moe_lens.errors import DataError
from moe_lens.evaluation import cluster_weights
from moe_lens.moe_shape import as_index
from moe_lens.route_record import RouteRecord, replay_hooks
from moe_lens.steering import HookList

CLEAN, CORRUPTED = 0, 1
EFFECTS: Final = ("route", "representation", "interaction")
Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]


@dataclass(frozen=True, eq=False)
class Mediation:
    """The metric of each pair of prompts under the four combinations, and layer by layer.

    Attributes:
        layers: the MoE layers.
        clean, corrupted: the metric of the plain runs, float64 [pair].
        with_clean_route: M(x', r(x)), the corrupted run on the clean run's route, [pair].
        with_corrupted_route: M(x, r(x')), the clean run on the corrupted run's route, [pair].
        clean_route_in, corrupted_route_in: the same with the route of one layer alone, [layer pair].
        clean_route_up_to, corrupted_route_up_to: with the routes of all layers up to this one, [layer pair].
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
        """What the two effects leave of the total effect."""
        return self.total_effect - self.route_effect - self.representation_effect

    def effect(self, name: str) -> Float[Tensor, "pair"]:
        """ "route", "representation" or "interaction", by name. Raises DataError for other names."""
        if name not in EFFECTS:
            raise DataError(f"{name!r} is no effect; those are {', '.join(EFFECTS)}.")
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
        """Mean effect / mean total effect, with its percentile bootstrap interval: (share, low, high).

        Args:
            name: "route", "representation" or "interaction".
            clusters: one label a pair; pairs of the same label are resampled together. None: each by itself.
            level: of the interval.

        Raises:
            DataError: another name, one pair alone, a total effect of 0, not one label a pair.
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
        """The share of the total effect that each layer's route carries, both ways: rows (share, low, high).

        "restored": what the clean route of one layer restores in the corrupted run; "lost": what the
        corrupted route of one layer takes from the clean run.

        Args:
            cumulative: of all MoE layers up to each, instead of each alone.

        Other arguments and errors as in `share`.
        """
        restored = self.clean_route_up_to if cumulative else self.clean_route_in
        spoiled = self.corrupted_route_up_to if cumulative else self.corrupted_route_in
        effects = {"restored": restored - self.corrupted, "lost": self.clean - spoiled}
        return {
            name: np.array([self._share(row, clusters, level, n_resamples, seed) for row in rows])
            for name, rows in effects.items()
        }

    def _share(
        self, of: Tensor, clusters: Sequence[str] | None, level: float, n_resamples: int, seed: int
    ) -> tuple[float, float, float]:
        effect, total = of.numpy(), self.total_effect.numpy()
        labels = [str(pair) for pair in range(len(total))]
        if clusters is not None:
            labels = list(clusters) if isinstance(clusters, Sequence) else []
        fits = len(labels) == len(total) and len(set(labels)) > 1
        if not fits or not 0 < level < 1 or not as_index(n_resamples) or as_index(seed) is None:
            raise DataError(
                f"An interval needs a label for each of the {len(total)} pairs, at least two different ones, "
                f"a level in (0, 1), n_resamples from 1 and a seed from 0 on; got {len(set(labels))} labels, "
                f"level {level}, n_resamples {n_resamples}, seed {seed}."
            )
        if not total.mean():
            raise DataError("The total effect is 0, so that no share of it can be given.")
        drawn = cluster_weights(labels, n_resamples, seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = (drawn @ effect) / (drawn @ total)
        low, high = np.nanquantile(shares, [(1 - level) / 2, (1 + level) / 2])
        return float(effect.mean() / total.mean()), float(low), float(high)

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
        if len(self.clean) < 2 or not bool(self.total_effect.mean()):
            return ""
        share, low, high = self.share(name)
        return f"   share {share:+.2f} [{low:+.2f}, {high:+.2f}]"


def mediation(
    model: TransformerBridge,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    *,
    weights: bool = False,
    align: str = "same",
    batch_size: int = 32,
    progress: bool = False,
) -> Mediation:
    """Carry the route of a clean run into a corrupted one, and the reverse: all layers, each, cumulative.

    >>> from moe_lens import mediation, organisms
    >>> model = organisms.load("planted")
    >>> def says_w2(logits):                                     # [batch pos d_vocab] -> [batch]
    ...     return logits[:, -1, 30]
    >>> found = mediation(model, ["Document report : the"] * 2, ["Document rumor : the"] * 2, says_w2)
    >>> found.total_effect.shape
    torch.Size([2])

    Args:
        clean, corrupted: as many prompts each, in pairs.
        metric: logits [batch pos d_vocab] of the pairs in their order -> a number for each [batch], or one.
            Prompts are padded on the left, so position -1 is each prompt's last token.
        weights: carry the routing weights over, too. False: the experts only; their weights are then what the
            rule derives from the run's own logits.
        align: "same": the prompts of a pair have the same number of tokens, and the route is carried over
            column by column. "end": they may differ; the route is carried over at the tokens with which both
            end, as far as these are the same (a question after a document, and alone).
        batch_size: pairs a forward (hooks on the model see these pairs as their rows). The logits of all pairs
            under one route are held at once, on the CPU, since the metric sees them together.

    Raises:
        DataError: unequal numbers of prompts or of tokens, no common end, a metric that gives something
            else, a metric that is not finite.
    """
    layers = tuple(routing_layers(model))
    if not callable(metric):
        raise DataError(f"metric must be a function of the logits [batch pos d_vocab]; got {metric!r}.")
    carried = [(), *((layer,) for layer in layers), *(layers[: n + 1] for n in range(len(layers)))]
    plans = list(dict.fromkeys(carried))
    with torch.no_grad(), tqdm(total=2 * len(plans), unit="run", disable=not progress) as bar:
        batches = [
            _Batch.of(model, pairs, weights)
            for pairs in chunks(iter(_pairs(model, clean, corrupted, align)), batch_size)
        ]
        values: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for plan in plans:
            for side in (CLEAN, CORRUPTED):
                values[side, plan] = _measured(metric, [each.logits(model, side, plan) for each in batches])
                bar.update()

    def by_layer(side: int, up_to: bool) -> Float[Tensor, "layer pair"]:
        rows = [layers[: n + 1] if up_to else (layer,) for n, layer in enumerate(layers)]
        return torch.stack([values[side, row] for row in rows])

    return Mediation(
        layers=layers,
        clean=values[CLEAN, ()],
        corrupted=values[CORRUPTED, ()],
        with_clean_route=values[CORRUPTED, layers],
        with_corrupted_route=values[CLEAN, layers],
        clean_route_in=by_layer(CORRUPTED, up_to=False),
        corrupted_route_in=by_layer(CLEAN, up_to=False),
        clean_route_up_to=by_layer(CORRUPTED, up_to=True),
        corrupted_route_up_to=by_layer(CLEAN, up_to=True),
        weights=weights,
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some pairs, padded on the left to one width; everything twice, of the clean and the corrupted side."""

    tokens: tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]]
    masks: tuple[Bool[Tensor, "pair pos"], Bool[Tensor, "pair pos"]]
    shared: Bool[Tensor, "pair pos"]  # the columns at which routes are carried over
    records: tuple[RouteRecord, RouteRecord]
    plain: tuple[Tensor, Tensor]  # the logits of the plain runs

    @classmethod
    def of(cls, model: TransformerBridge, pairs: list[Any], weights: bool) -> "_Batch":
        n_pairs = len(pairs)
        sequences = [pair[CLEAN] for pair in pairs] + [pair[CORRUPTED] for pair in pairs]
        tokens, mask = pad_sequences(model, sequences)
        n_shared = torch.tensor([pair[2] for pair in pairs])
        width = tokens.shape[1]
        shared = torch.arange(width)[None, :] >= (width - n_shared)[:, None]
        sides = [(tokens[:n_pairs], mask[:n_pairs]), (tokens[n_pairs:], mask[n_pairs:])]
        found = [_recorded(model, *side, weights) for side in sides]
        return cls(
            (sides[0][0], sides[1][0]), (sides[0][1], sides[1][1]), shared,
            (found[0][1], found[1][1]), (found[0][0], found[1][0]),
        )  # fmt: skip

    def logits(self, model: TransformerBridge, side: int, layers: tuple[int, ...]) -> Tensor:
        """One side's logits with the other side's route in these layers."""
        if not layers:
            return self.plain[side]
        hooks = replay_hooks(self.records[1 - side], layers=layers, positions=self.shared)
        return _run(model, self.tokens[side], self.masks[side], hooks)


def _recorded(
    model: TransformerBridge, tokens: Tensor, mask: Tensor, weights: bool
) -> tuple[Tensor, RouteRecord]:
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value.detach()

    points = (hook_names.router_logits, hook_names.topk_indices, hook_names.topk_weights)
    hooks: HookList = [(spell(layer), keep) for layer in routing_layers(model) for spell in points]
    logits = _run(model, tokens, mask, hooks)
    return logits, RouteRecord.from_cache(kept, weights=weights)


def _run(model: TransformerBridge, tokens: Tensor, mask: Tensor, hooks: HookList) -> Tensor:
    padding: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    return model.run_with_hooks(tokens, fwd_hooks=hooks, **padding).cpu()


def _pairs(
    model: TransformerBridge, clean: Prompts, corrupted: Prompts, align: str
) -> list[tuple[Tensor, Tensor, int]]:
    """(clean tokens, corrupted tokens, at how many last tokens the route is carried over)."""
    if align not in ("same", "end"):
        raise DataError(f"align must be 'same' or 'end'; got {align!r}.")
    firsts, seconds = list(token_sequences(model, clean)), list(token_sequences(model, corrupted))
    if len(firsts) != len(seconds):
        raise DataError(f"{len(firsts)} clean prompts need as many corrupted ones; got {len(seconds)}.")
    pairs = []
    for index, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        if align == "same" and len(first) != len(second):
            raise DataError(
                f"Pair {index} has {len(first)} clean and {len(second)} corrupted tokens. Routes are carried "
                "over column by column: give prompts of one length, or align='end' for a common end."
            )
        n_shared = len(first) if align == "same" else _common_end(first, second)
        if not n_shared:
            raise DataError(f"The prompts of pair {index} do not end with the same token.")
        pairs.append((first, second, n_shared))
    return pairs


def _common_end(first: Int[Tensor, "_"], second: Int[Tensor, "_"]) -> int:
    shorter = min(len(first), len(second))
    different = (first.flip(0)[:shorter] != second.flip(0)[:shorter]).nonzero()
    return int(different[0]) if len(different) else shorter


def _measured(metric: Metric, parts: list[Tensor]) -> Float[Tensor, "pair"]:
    """The metric of all batches together; columns that only wider batches have are NaN."""
    width = max(part.shape[1] for part in parts)
    whole = torch.cat([F.pad(part, (0, 0, width - part.shape[1], 0), value=torch.nan) for part in parts])
    value = metric(whole)
    try:
        found = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The metric must give one number, or one a pair [batch]; it gave {value!r}."
        ) from error
    if found.is_complex():
        raise DataError("The metric gave complex numbers; it must give real ones.")
    found = found.double()
    if found.shape not in ((), (1,), (len(whole),)):
        raise DataError(
            f"The metric gave shape {tuple(found.shape)} for {len(whole)} pairs; it must give one number, or "
            "one a pair [batch]."
        )
    if not bool(torch.isfinite(found).all()):
        raise DataError(
            "The metric is NaN or infinite; does it read padding (prompts are padded on the left), or logits "
            "that the model masks?"
        )
    return found.reshape(-1)
