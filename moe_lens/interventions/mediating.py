"""How much of an effect travels by the route (who computes), and how much by what the experts see.

    found = mediation(model, clean_prompts, corrupted_prompts, metric)
    found.share("route")                       # of the total effect, with an interval

Let M(x, r) be the metric when the model reads x with experts fixed to route r, and r(x) the route that it
takes by itself. For a clean prompt x and a corrupted x':

    total effect            M(x, r(x))  − M(x', r(x'))
    route effect            M(x', r(x)) − M(x', r(x'))     only the route is carried over from the clean run
    representation effect   M(x, r(x')) − M(x', r(x'))     all but the route is
    interaction             total − route − representation

Experts are fixed in all MoE layers and columns (with align="end": in the columns of the common end), or in
some layers only; everywhere else the model routes by itself, as a consequence of what it reads. "All but the
route" includes the routing weights of the fixed experts, unless weights=True carries them over, too.

With the route as mediator these are the natural indirect and natural direct effect (Pearl 2001; for language
models Vig et al. 2020, arXiv 2004.12265). A share is the effect divided by the total effect, as activation
patching is normalised: 0 the corrupted run, 1 the clean run. It can be negative or above 1.

What it does not say. A fixed route is one that the model would not have taken, so that experts meet hidden
states that they were not trained on: an effect may be damage (carry over the route of some other prompt, as a
control). Route and representation influence each other
from layer to layer; the shares of single layers do not add up, and neither do route and representation where
they interact. Where the total effect is near 0, shares mean nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.checks import as_index
from moe_lens.errors import DataError
from moe_lens.interventions.replay import replay_hooks
from moe_lens.model.registration import Model, routing_layers
from moe_lens.model.router_points import HookList
from moe_lens.resampling import cluster_weights
from moe_lens.statistics.routes import RouteRecord
from moe_lens.text.batching import Prompts, chunks, token_sequences

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

        Where some resampled total effect has the other sign, the interval is (-inf, inf).

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
                f"An interval needs a label for each of the {len(total)} pairs, at least two different ones "
                "(does the metric give one number a pair, [batch]?), "
                f"a level in (0, 1), n_resamples from 1 and a seed from 0 on; got {len(set(labels))} labels, "
                f"level {level}, n_resamples {n_resamples}, seed {seed}."
            )
        if not total.mean():
            raise DataError("The total effect is 0, so that no share of it can be given.")
        drawn = cluster_weights(labels, n_resamples, seed)
        share, totals = float(effect.mean() / total.mean()), drawn @ total
        if bool((np.sign(totals) != np.sign(total.mean())).any()):
            return (
                share,
                -np.inf,
                np.inf,
            )  # the total effect may as well be 0, and the share anything (Fieller)
        low, high = np.quantile((drawn @ effect) / totals, [(1 - level) / 2, (1 + level) / 2])
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
        if len(self.clean) < 2 or not bool(self.total_effect.mean()):
            return ""
        share, low, high = self.share(name)
        return f"   share {share:+.2f} [{low:+.2f}, {high:+.2f}]"


def mediation(
    model: Model,
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
            Position -1 is each prompt's last token; shorter prompts have NaN on the left.
        weights: carry the routing weights over, too. False: the experts only; their weights are then what the
            rule derives from the run's own logits.
        align: "same": the prompts of a pair have the same number of tokens, and the route is carried over
            column by column. "end": they may differ; the route is carried over at the tokens with which both
            end, as far as these are the same (a question after a document, and alone).
        batch_size: pairs a forward, of the same lengths; nothing is padded. (Hooks on the model see them as
            their rows.) The logits of all pairs under one route are held at once, on the CPU, since the
            metric sees them together.

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
            for pairs in _batches(_pairs(model, clean, corrupted, align), batch_size)
        ]
        values: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for plan in plans:
            for side in (CLEAN, CORRUPTED):
                logits = {tuple(each.numbers): each.logits(model, side, plan) for each in batches}
                values[side, plan] = _measured(metric, logits)
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
    """Pairs of the same two lengths, so that nothing is padded; everything twice, clean and corrupted."""

    numbers: list[int]  # which pairs these are
    tokens: tuple[Int[Tensor, "pair clean_pos"], Int[Tensor, "pair corrupted_pos"]]
    n_shared: Int[Tensor, "pair"]  # at how many last tokens the route is carried over
    records: tuple[RouteRecord, RouteRecord]
    plain: tuple[Tensor, Tensor]  # the logits of the plain runs

    @classmethod
    def of(cls, model: Model, pairs: list["_Pair"], weights: bool) -> "_Batch":
        clean, corrupted = (
            torch.stack([pair.tokens[side] for pair in pairs]).to(model.cfg.device)
            for side in (CLEAN, CORRUPTED)
        )
        n_shared = torch.tensor([pair.n_shared for pair in pairs])
        found = [_recorded(model, tokens, weights) for tokens in (clean, corrupted)]
        plain, records = (found[0][0], found[1][0]), (found[0][1], found[1][1])
        return cls([pair.number for pair in pairs], (clean, corrupted), n_shared, records, plain)

    def logits(self, model: Model, side: int, layers: tuple[int, ...]) -> Tensor:
        """One side's logits with the other side's route in these layers."""
        if not layers:
            return self.plain[side]
        width = self.tokens[side].shape[1]
        shared = torch.arange(width)[None, :] >= (width - self.n_shared)[:, None]
        record = _aligned_at_the_end(self.records[1 - side], width)
        return _run(model, self.tokens[side], replay_hooks(record, layers=layers, positions=shared))


@dataclass(frozen=True)
class _Pair:
    number: int
    tokens: tuple[Tensor, Tensor]
    n_shared: int


def _aligned_at_the_end(record: RouteRecord, width: int) -> RouteRecord:
    """The same route with `width` columns, cut or filled (with what nobody selects) on the left."""
    spare = width - record.indices.shape[2]
    columns = [
        None if each is None else F.pad(each[:, :, max(-spare, 0) :], (0, 0, max(spare, 0), 0))
        for each in (record.indices, record.weights)
    ]
    assert columns[0] is not None
    return RouteRecord(record.shape, columns[0], columns[1])


def _recorded(model: Model, tokens: Tensor, weights: bool) -> tuple[Tensor, RouteRecord]:
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value.detach()

    hooks: HookList = [
        (hook_names.name(layer, point), keep)
        for layer in routing_layers(model)
        for point in hook_names.POINTS
    ]
    logits = _run(model, tokens, hooks)
    return logits, RouteRecord.from_cache(kept, weights=weights)


def _run(model: Model, tokens: Tensor, hooks: HookList) -> Tensor:
    return model.run_with_hooks(tokens, fwd_hooks=hooks).cpu()


def _batches(pairs: list[_Pair], batch_size: int) -> Iterator[list[_Pair]]:
    """At most `batch_size` pairs at a time, all of the same two lengths."""
    by_lengths: dict[tuple[int, int], list[_Pair]] = {}
    for pair in pairs:
        by_lengths.setdefault((len(pair.tokens[0]), len(pair.tokens[1])), []).append(pair)
    for same in by_lengths.values():
        yield from chunks(iter(same), batch_size)


def _pairs(model: Model, clean: Prompts, corrupted: Prompts, align: str) -> list[_Pair]:
    if align not in ("same", "end"):
        raise DataError(f"align must be 'same' or 'end'; got {align!r}.")
    firsts, seconds = list(token_sequences(model, clean)), list(token_sequences(model, corrupted))
    if len(firsts) != len(seconds):
        raise DataError(f"{len(firsts)} clean prompts need as many corrupted ones; got {len(seconds)}.")
    pairs = []
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        if align == "same" and len(first) != len(second):
            raise DataError(
                f"Pair {number} has {len(first)} clean and {len(second)} corrupted tokens. Routes are "
                "carried over column by column: give prompts of one length, or align='end' for a common end."
            )
        n_shared = len(first) if align == "same" else _common_end(first, second)
        if not n_shared:
            raise DataError(f"The prompts of pair {number} do not end with the same token.")
        pairs.append(_Pair(number, (first, second), n_shared))
    return pairs


def _common_end(first: Int[Tensor, "_"], second: Int[Tensor, "_"]) -> int:
    shorter = min(len(first), len(second))
    different = (first.flip(0)[:shorter] != second.flip(0)[:shorter]).nonzero()
    return int(different[0]) if len(different) else shorter


def _measured(metric: Metric, parts: dict[tuple[int, ...], Tensor]) -> Float[Tensor, "pair"]:
    """The metric of all pairs together, in their order; columns that only longer prompts have are NaN."""
    width = max(part.shape[1] for part in parts.values())
    order = torch.tensor([number for numbers in parts for number in numbers]).argsort()
    padded = [F.pad(part, (0, 0, width - part.shape[1], 0), value=torch.nan) for part in parts.values()]
    whole = torch.cat(padded)[order]
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
            "The metric is NaN or infinite; does it read columns that shorter prompts do not have (they "
            "stand at the right), or logits that the model masks?"
        )
    return found.reshape(-1)
