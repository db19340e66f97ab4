"""How much of an effect travels by the route (who computes), and how much by what the experts see.

    found = mediation(model, clean_prompts, corrupted_prompts, metric)
    found.share("route")                       # of the total effect, with an interval

Let M(x, r) be the metric when the model reads x with its experts fixed to route r, and r(x) the route that it
takes by itself. For a clean prompt x and a corrupted x':

    total effect            M(x, r(x))  − M(x', r(x'))
    route effect            M(x', r(x)) − M(x', r(x'))     only the route comes from the clean run
    representation effect   M(x, r(x')) − M(x', r(x'))     everything but the route does
    interaction             total − route − representation

Experts are fixed in all MoE layers and columns (with align="end": in the columns of the common end), or in
some layers only; everywhere else the model routes by itself, depending on what it reads. "Everything but the
route" includes the routing weights of the fixed experts, unless weights=True carries them over, too.

With the route as mediator these are the natural indirect and the natural direct effect (Pearl 2001; for
language models Vig et al. 2020, arXiv 2004.12265). A share is the effect divided by the total effect, as
activation patching is normalised: 0 is the corrupted run, 1 the clean run. It can be negative or above 1.

What it does not show. The model would not have taken a fixed route by itself, so its experts meet hidden
states that they were not trained on, and an effect may be mere damage: as a control, carry over the route of
some other prompt. Route and representation influence each other from layer to layer, so the shares of single
layers do not add up, nor do route and representation where they interact. If the total effect is near 0,
shares mean nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.checks import chosen_layers
from moe_lens.errors import DataError
from moe_lens.hook_names import HookList, Hooks, hook_list
from moe_lens.interventions.replay import replay_hooks
from moe_lens.interventions.results import Mediation
from moe_lens.interventions.shared_runs import HooksFor, SharedRuns
from moe_lens.model.metric import Metric, check_metric
from moe_lens.model.registration import routing_layers, running_of
from moe_lens.model.wrapper import Model
from moe_lens.statistics.routes import RouteRecord
from moe_lens.text.batching import Prompts, chunks, token_sequences

CLEAN, CORRUPTED = 0, 1


def mediation(
    model: Model,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    *,
    layers: Any = None,
    weights: bool = False,
    align: str = "same",
    batch_size: int = 8,
    reuse: bool = True,
    hooks: Hooks = (),
    progress: bool = True,
) -> Mediation:
    """Carry the route of a clean run into a corrupted one, and the reverse: all layers, each, cumulative.

    >>> from moe_lens import mediation, organisms
    >>> model = organisms.load("planted")
    >>> def says_w2(logits):                                     # [batch pos d_vocab] -> [batch]
    ...     return logits[:, -1, 30]
    >>> clean, corrupted = ["Document report : the"] * 2, ["Document rumor : the"] * 2
    >>> found = mediation(model, clean, corrupted, says_w2, progress=False)
    >>> found.total_effect.shape
    torch.Size([2])
    >>> late = mediation(model, clean, corrupted, says_w2, layers=[2, 3], progress=False)
    >>> late.clean_route_in.shape                                # [layer pair]
    torch.Size([2, 2])

    Args:
        model: a HookedMoE or RoutedModel.
        clean: prompts: strings, chats or tokens; see `moe_lens.text.Prompts`.
        corrupted: as many prompts, in pairs with the clean ones.
        metric: logits [batch pos d_vocab] of all pairs, in their order -> one number a pair [batch], or one.
            Position -1 is each prompt's last token; shorter prompts have NaN on the left.
        layers: the MoE layers whose route is carried over, taken in ascending order: a number, several, a
            range or a slice of numbers. In all others the model routes by itself. None: all.
        weights: carry the routing weights over, too. False: the experts only, with the weights that the rule
            derives for them from the run's own logits.
        align: "same": the prompts of a pair have the same number of tokens, and the route is carried over
            column by column. "end": they may differ, and the route is carried over at the tokens that both
            end with (a question after a document, and alone).
        batch_size: pairs a forward, all of the same lengths; nothing is padded. The logits of all pairs under
            one route are held on the CPU at once, since the metric sees them together.
        reuse: repeat nothing that a run shares with the plain one or with that on the whole route, where that
            is sound: not under hooks, and not where a run that goes on from those differs from a whole one
            (some are compared). What each block reads in them is kept on the model's device meanwhile.
            False: whole runs.
        hooks: forward hooks to run under, in every run (`steer_hooks(plan)`, for one). What they change
            belongs to the runs whose routes are compared. What they have one a prompt is one a pair.
        progress: show a progress bar.

    Raises:
        DataError: unequal numbers of prompts or of tokens, no common end, layers that are not there or named
            twice, a metric that gives anything other than finite real numbers, one or one a pair.
    """
    among = tuple(sorted(chosen_layers(layers, tuple(routing_layers(model)))))
    check_metric(metric)
    values: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    total = 4 * len(among)  # on both sides: the plain run, each layer, and all up to the second, third...
    bar = tqdm(total=total, desc="mediation", unit="run", disable=not progress)
    with torch.no_grad(), bar, model.hooks(hook_list(hooks)):
        pairs = _pairs(model, clean, corrupted, align)
        batches = [_Batch.of(model, some, len(pairs), weights) for some in _batches(pairs, batch_size)]
        numbers = [batch.numbers for batch in batches]
        for side in (CLEAN, CORRUPTED):
            tokens = [batch.tokens[side] for batch in batches]
            fixed = [batch.on_route(side) for batch in batches]
            runs = SharedRuns(model, tokens, fixed, numbers, reuse=reuse, check=side == CLEAN)
            plain = [((), [batch.plain[side] for batch in batches])]
            for route, each in chain(plain, runs.on_routes(among)):
                logits = {tuple(batch.numbers): part for batch, part in zip(batches, each, strict=True)}
                values[side, route] = _measured(metric, logits)
                bar.update()
            reuse = runs.reuse

    def by_layer(side: int, cumulative: bool) -> Float[Tensor, "layer pair"]:
        rows = [among[: n + 1] if cumulative else (layer,) for n, layer in enumerate(among)]
        return torch.stack([values[side, row] for row in rows])

    return Mediation(
        layers=among,
        clean=values[CLEAN, ()],
        corrupted=values[CORRUPTED, ()],
        with_clean_route=values[CORRUPTED, among],
        with_corrupted_route=values[CLEAN, among],
        clean_route_in=by_layer(CORRUPTED, cumulative=False),
        corrupted_route_in=by_layer(CLEAN, cumulative=False),
        clean_route_up_to=by_layer(CORRUPTED, cumulative=True),
        corrupted_route_up_to=by_layer(CLEAN, cumulative=True),
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
    def of(cls, model: Model, pairs: list["_Pair"], n_pairs: int, weights: bool) -> "_Batch":
        clean, corrupted = (
            torch.stack([pair.tokens[side] for pair in pairs]).to(model.cfg.device)
            for side in (CLEAN, CORRUPTED)
        )
        n_shared = torch.tensor([pair.n_shared for pair in pairs])
        numbers = [pair.number for pair in pairs]
        with running_of(model).of_prompts(numbers, n_pairs):
            (clean_logits, clean_record), (corrupted_logits, corrupted_record) = (
                _recorded(model, tokens, weights) for tokens in (clean, corrupted)
            )
        return cls(
            numbers=numbers,
            tokens=(clean, corrupted),
            n_shared=n_shared,
            records=(clean_record, corrupted_record),
            plain=(clean_logits, corrupted_logits),
        )

    def on_route(self, side: int) -> HooksFor:
        """From layers to hooks that fix one side's experts there to the other side's route."""
        width = self.tokens[side].shape[1]
        shared = torch.arange(width)[None, :] >= (width - self.n_shared)[:, None]
        record = _aligned_at_the_end(self.records[1 - side], width)
        return lambda layers: replay_hooks(record, layers=layers, positions=shared)


@dataclass(frozen=True)
class _Pair:
    number: int
    tokens: tuple[Tensor, Tensor]
    n_shared: int


def _aligned_at_the_end(record: RouteRecord, width: int) -> RouteRecord:
    """The same route with `width` columns, cut on the left, or filled there with columns never selected."""
    spare = width - record.indices.shape[2]

    def aligned(tensor: Tensor) -> Tensor:  # [layer batch pos k]
        return F.pad(tensor[:, :, max(-spare, 0) :], (0, 0, max(spare, 0), 0))

    weights = None if record.weights is None else aligned(record.weights)
    return RouteRecord(record.shape, aligned(record.indices), weights)


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
            raise DataError(
                f"The prompts of pair {number} do not end with the same token; give ones with a common end."
            )
        pairs.append(_Pair(number, (first, second), n_shared))
    return pairs


def _common_end(first: Int[Tensor, "_"], second: Int[Tensor, "_"]) -> int:
    shorter = min(len(first), len(second))
    different = (first.flip(0)[:shorter] != second.flip(0)[:shorter]).nonzero()
    return int(different[0]) if len(different) else shorter


def _measured(metric: Metric, parts: dict[tuple[int, ...], Tensor]) -> Float[Tensor, "pair"]:
    """The metric of all pairs together, in their order; shorter prompts have NaN on the left."""
    width = max(part.shape[1] for part in parts.values())
    order = torch.tensor([number for numbers in parts for number in numbers]).argsort()
    padded = [F.pad(part, (0, 0, width - part.shape[1], 0), value=torch.nan) for part in parts.values()]
    whole = torch.cat(padded)[order]
    value = metric(whole)
    try:
        numbers = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The metric must give one number, or one a pair [batch]; it gave {value!r}."
        ) from error
    if numbers.is_complex():
        raise DataError("The metric gave complex numbers; it must give real ones.")
    numbers = numbers.double()
    if numbers.shape not in ((), (1,), (len(whole),)):
        raise DataError(
            f"The metric gave shape {tuple(numbers.shape)} for {len(whole)} pairs; it must give one number, "
            "or one a pair [batch]."
        )
    if not bool(torch.isfinite(numbers).all()):
        raise DataError(
            "The metric is NaN or infinite. Does it read columns that shorter prompts do not have (prompts "
            "end at the last column), or logits that the model masks?"
        )
    return numbers.reshape(-1)
