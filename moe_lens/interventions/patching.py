"""Patching sweeps: a clean run's routes or expert outputs, put into a corrupted run one piece at a time.

    _, clean_cache = model.run_with_cache(clean)
    by_position = patch_router(model, clean_cache, corrupted, metric)               # [layer pos]
    by_expert = patch_expert_outputs(model, clean_cache, corrupted, metric)         # [layer expert]

Each entry is the metric of one patched run, as in TransformerLens' `patching.generic_activation_patch`; here
many runs share a forward. Compare it with the metric of the corrupted run, where nothing is restored, and
with that of the clean run, where everything is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import chosen_layers, chosen_positions
from moe_lens.errors import DataError
from moe_lens.hook_names import HookList, Hooks
from moe_lens.interventions.stacked_runs import Cell, Places, StackedRuns, by_layer, checked_runs
from moe_lens.model.points import RoutingPoint
from moe_lens.model.registration import with_expert_out
from moe_lens.model.wrapper import Model
from moe_lens.shape import MoEShape

ROUTER_POINTS: Final = {
    "router_logits": (hook_names.ROUTER_LOGITS,),
    "topk_indices": (hook_names.TOPK_INDICES,),
    "topk_weights": (hook_names.TOPK_WEIGHTS,),
    "route": (hook_names.TOPK_INDICES, hook_names.TOPK_WEIGHTS),
}
"""What `patch_router` can patch, and the hook points that it goes into."""

Clean = dict[int, dict[str, Tensor]]
"""Layer -> short name of a point -> its value in the clean run, [batch pos ...] with batch or one row."""


def patch_router(
    model: Model,
    clean_cache: Any,
    corrupted_tokens: Any,
    metric: Any,
    *,
    point: str = "router_logits",
    layers: Any = None,
    positions: Any = None,
    attention_mask: Any = None,
    batch_size: int | None = None,
    reuse: bool = True,
    hooks: Hooks = (),
    progress: bool = True,
) -> Float[Tensor, "layer pos"]:
    """The metric of the corrupted run with the clean run's routing at one layer and position.

    >>> from moe_lens import organisms
    >>> from moe_lens.interventions import patch_router
    >>> model = organisms.load("specialised")
    >>> answer = model.to_single_token("Kyoto")
    >>> def metric(logits):                                  # [batch pos d_vocab] -> a number
    ...     return logits[:, -1].log_softmax(-1)[:, answer].mean()
    >>> _, clean_cache = model.run_with_cache("Question : what is the capital of Eldria ? Answer :")
    >>> corrupted = "Question : what is the capital of Norland ? Answer :"
    >>> patch_router(model, clean_cache, corrupted, metric, progress=False).shape      # [layer pos]
    torch.Size([4, 12])
    >>> patch_router(model, clean_cache, corrupted, metric, layers=[1, 3], positions=[8, -1],
    ...              progress=False).shape                   # layers 1 and 3, the country and the last token
    torch.Size([2, 2])

    The entries are those of TransformerLens' `generic_activation_patch(model, corrupted_tokens, clean_cache,
    metric, layer_pos_patch_setter, point, ["layer", "pos"])`, bit for bit with batch_size=1 and reuse=False.
    In a larger stack they may differ by rounding; in half precision that can flip a close choice of experts.
    Padding (attention_mask) is patched, too. Where clean logits are put in, a plan among the hooks does not
    hold.

    A patch changes nothing below its layer and nothing before its position. With `reuse`, a patched run goes
    on from the corrupted run's residual stream there, with its keys and values; the metric sees all logits.
    That changes sums by rounding (about 1e-6 of the logits in float32). In half precision, where rounding may
    flip a close choice of experts, columns are computed again and only layers are skipped, which keeps every
    bit with batch_size=1. The first forward is compared with whole runs; where they differ (a state that
    blocks share, say), and under any hooks, which would miss what is skipped, runs are whole.

    Args:
        model: a `HookedMoE` or `RoutedModel` in eval mode.
        clean_cache: from `run_with_cache` on prompts that correspond to the corrupted ones position by
            position; one prompt, or as many as the corrupted. (Logits of a steered run do not always repeat
            its route, see `steer_hooks`: use point="route".)
        corrupted_tokens: int tokens [batch pos] or [pos], a string, or strings of equally many tokens.
        metric: function of one patched run's logits [batch pos d_vocab] that gives a number.
        point: "router_logits", from which the model's rule makes indices and weights; "topk_indices", whose
            weights follow from the corrupted run's logits; "topk_weights", slot by slot, for the experts that
            the corrupted run chose; "route", indices and weights together.
        layers: numbers of the MoE layers to patch, in the order of the rows: a number, several, a range or a
            slice of numbers. None: all.
        positions: the positions to patch, in the order of the columns; negative ones count from the end.
            Padding has none. None: all columns.
        attention_mask: [batch pos], 0 on padding.
        batch_size: patches a forward; None for as many as memory allows (fewer after an out-of-memory error).
        reuse: repeat nothing below a patch's layer and before its position, where that is sound. False: whole
            runs.
        hooks: forward hooks to run under; like hooks that are on the model already, they act in every patched
            run, before the patch. They see the rows of several runs, each a copy of the corrupted batch.
        progress: show a progress bar, which counts patches and tells the time left.

    Returns:
        float32, on the CPU; rows and columns as `layers` and `positions` name them (all: in ascending order).

    Raises:
        DataError: an unknown point, layers or positions that are not there or named twice, positions where
            rows are padded differently, a cache that lacks the point, has another shape or belongs to another
            model, corrupted prompts of unequal lengths, a metric that gives NaN or anything but one number.
        MoELensError: not a model with hook points.
        HookError: the model is in training mode, or its router logits are NaN.
    """
    if not isinstance(point, str) or point not in ROUTER_POINTS:
        raise DataError(f"point must be one of {', '.join(map(repr, ROUTER_POINTS))}; got {point!r}.")
    runs = checked_runs(
        model, corrupted_tokens, attention_mask, metric, "position", batch_size, hooks, progress, reuse
    )
    points, batch = ROUTER_POINTS[point], len(runs.tokens)
    clean = _clean(runs, clean_cache, points)

    def hooks_for(cells: Sequence[Cell], start: int) -> HookList:
        return [
            (hook_names.name(layer, name), PutClean(clean[layer][name], places, batch, start))
            for layer, places in by_layer(cells).items()
            for name in points
        ]

    rows = chosen_layers(layers, runs.model.moe_layers)
    columns = _columns(runs, positions)
    cells = [Cell(layer, pos, pos) for layer in rows for pos in columns]
    return torch.tensor(runs.sweep(cells, hooks_for), dtype=torch.float32).reshape(len(rows), -1)


def patch_expert_outputs(
    model: Model,
    clean_cache: Any,
    corrupted_tokens: Any,
    metric: Any,
    *,
    by: str = "expert",
    layers: Any = None,
    positions: Any = None,
    attention_mask: Any = None,
    batch_size: int | None = None,
    reuse: bool = True,
    hooks: Hooks = (),
    progress: bool = True,
) -> Float[Tensor, "layer entry"]:
    """The metric of the corrupted run with clean outputs of one expert, or of the experts at one position.

    >>> from moe_lens import organisms
    >>> from moe_lens.interventions import patch_expert_outputs
    >>> model = organisms.load("specialised")
    >>> answer = model.to_single_token("Kyoto")
    >>> def metric(logits):                                  # [batch pos d_vocab] -> a number
    ...     return logits[:, -1].log_softmax(-1)[:, answer].mean()
    >>> model.set_use_expert_out(True)                       # before the clean run is cached
    >>> _, clean_cache = model.run_with_cache("Question : what is the capital of Eldria ? Answer :")
    >>> corrupted = "Question : what is the capital of Norland ? Answer :"
    >>> patch_expert_outputs(model, clean_cache, corrupted, metric, progress=False).shape  # [layer expert]
    torch.Size([4, 8])
    >>> patch_expert_outputs(model, clean_cache, corrupted, metric, by="pos", progress=False).shape
    torch.Size([4, 12])

    The output of an expert (`hook_expert_out`, before its weight) is replaced by its output in the clean run
    wherever it runs in both; route and weights stay the corrupted run's. Where it runs in only one of them,
    nothing is replaced: the entry of an expert that never runs in both is the corrupted run's own metric. So
    this is about what experts see, and `patch_router` about who computes. (In Llama 4 an output depends on
    its weight, and the clean output comes with the clean weight.)

    Where both runs chose the same experts in the same order, by="pos" gives the entries of TransformerLens'
    `generic_activation_patch` on "expert_out"; elsewhere that function puts one expert's output in another's
    place.

    Args:
        model: a `HookedMoE` or `RoutedModel` in eval mode. Its expert outputs are switched on
            for the sweep if they are off.
        clean_cache: from `run_with_cache`, after `model.set_use_expert_out(True)`, on prompts that correspond
            to the corrupted ones position by position; one prompt, or as many as the corrupted.
        corrupted_tokens: int tokens [batch pos] or [pos], a string, or strings of equally many tokens.
        metric: function of one patched run's logits [batch pos d_vocab] that gives a number.
        by: "expert", one expert at all positions; or "pos", all experts at one position.
        layers: numbers of the MoE layers to patch, in the order of the rows: a number, several, a range or a
            slice of numbers. None: all.
        positions: by="pos": those to patch, in the order of the columns; by="expert": those where outputs may
            be replaced. Negative ones count from the end. Padding has none. None: all columns.
        attention_mask: [batch pos], 0 on padding.
        batch_size: patches a forward; None for as many as memory allows.
        reuse: as in `patch_router`.
        hooks: forward hooks to run under, as in `patch_router`.
        progress: show a progress bar.

    Returns:
        float32 [layer expert] or [layer pos], on the CPU; rows and positions as `layers` and `positions` name
            them.

    Raises:
        DataError: another `by`, a cache without expert outputs, or as in `patch_router`.
        MoELensError: not a model with hook points.
        HookError: the model is in training mode, or its router logits are NaN.
    """
    if not isinstance(by, str) or by not in ("expert", "pos"):
        raise DataError(f"by must be 'expert' or 'pos'; got {by!r}.")
    axis = "expert" if by == "expert" else "position"
    runs = checked_runs(
        model, corrupted_tokens, attention_mask, metric, axis, batch_size, hooks, progress, reuse
    )
    clean = _clean(runs, clean_cache, (hook_names.TOPK_INDICES, hook_names.EXPERT_OUT))
    rows = chosen_layers(layers, runs.model.moe_layers)
    batch, n_pos = runs.tokens.shape
    columns = _columns(runs, positions)
    entries = columns if by == "pos" else list(range(runs.model.n_experts))
    allowed = torch.zeros(n_pos, dtype=torch.bool)
    allowed[columns] = True

    def hooks_for(cells: Sequence[Cell], start: int) -> HookList:
        hooks: HookList = []
        for layer, places in by_layer(cells).items():
            indices, outputs = (
                clean[layer][name] for name in (hook_names.TOPK_INDICES, hook_names.EXPERT_OUT)
            )
            edit = PutCleanOutputs(outputs, places, batch, start, indices, allowed, by == "expert")
            hooks.append((hook_names.expert_out(layer), edit))
        return hooks

    chosen, unpatched = _corrupted_run(runs)
    cells = [
        Cell(layer, entry, start)
        for layer in rows
        for entry, start in _in_common(
            chosen[layer], clean[layer][hook_names.TOPK_INDICES], allowed, by
        ).items()
    ]
    # Most experts of a large model do not run in both; their entries need no run.
    patched = torch.full((len(rows), len(entries)), unpatched, dtype=torch.float32)
    with with_expert_out(runs.model):
        values = runs.sweep(cells, hooks_for)
    for cell, value in zip(cells, values, strict=True):
        patched[rows.index(cell.layer), entries.index(cell.entry)] = value
    return patched


@dataclass(frozen=True, eq=False, repr=False)  # TransformerLens asks every hook for its repr
class PutClean:
    """The hook that puts the clean run's value into some runs of a forward, each at its position."""

    clean: Tensor  # [batch or 1, pos, ...]
    places: Places
    batch: int  # rows of one run
    start: int  # the column at which the forward begins

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        stacked = value.clone().unflatten(0, (-1, self.batch))  # [run batch pos ...]
        clean = self.clean[:, self.places.entries.to(self.clean.device)].to(value)  # [batch cell ...]
        runs, positions = (numbers.to(value.device) for numbers in self.places)
        positions = positions - self.start
        stacked[runs, :, positions] = clean.transpose(0, 1)  # both [cell batch ...]
        point = hook_names.parse(str(hook.name))
        if (
            point is not None and point[1] == hook_names.ROUTER_LOGITS
        ):  # a plan does not hold for clean logits
            patched = torch.zeros(stacked.shape[:3], dtype=torch.bool, device=value.device)
            patched[runs, :, positions] = True
            hook.rule = hook.rule.released(patched.flatten(0, 1))
        return stacked.flatten(0, 1)


@dataclass(frozen=True, eq=False, repr=False)  # TransformerLens asks every hook for its repr
class PutCleanOutputs:
    """The hook that puts clean outputs of experts into some runs, where the same expert runs in both."""

    clean: Float[Tensor, "rows pos k d_model"]
    places: Places
    batch: int  # rows of one run
    start: int  # the column at which the forward begins
    clean_indices: Int[Tensor, "rows pos k"]
    columns: Bool[Tensor, "pos"]  # where outputs may be replaced
    by_expert: bool

    def __call__(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        clean, clean_indices = self.clean[:, self.start :], self.clean_indices[:, self.start :]
        if value.shape[1:] != clean.shape[1:]:
            raise DataError(
                f"{hook.name}: the clean cache's expert outputs have shape {tuple(self.clean.shape)}, this "
                f"model's {tuple(value.shape)}; give a cache of this model."
            )
        stacked = value.clone().unflatten(0, (-1, self.batch))  # [run batch pos k d_model]
        runs, wanted = (numbers.to(value.device) for numbers in self.places)
        chosen = hook.chosen.unflatten(0, (-1, self.batch))[runs]  # [cell batch pos k]
        in_clean = clean_indices.to(chosen).unsqueeze(-2)  # [rows pos 1 k]
        same = chosen.unsqueeze(-1) == in_clean  # [cell batch pos k, k of the clean run]
        slot = same.int().argmax(-1)  # where the clean run has this expert, if it does
        clean = clean.to(value).expand(*slot.shape, -1)
        clean = clean.gather(-2, slot.unsqueeze(-1).expand_as(clean))
        positions = torch.arange(self.start, self.start + value.shape[1], device=value.device)
        along = chosen if self.by_expert else positions[:, None]
        replace = same.any(-1) & (along == wanted[:, None, None, None])
        replace &= self.columns.to(value.device)[self.start :, None]
        stacked[runs] = torch.where(replace.unsqueeze(-1), clean, stacked[runs])
        return stacked.flatten(0, 1)


def _columns(runs: StackedRuns, positions: Any) -> list[int]:
    """The columns to patch, which have the same position in every row."""
    if positions is None or runs.attention_mask is None:
        return chosen_positions(positions, runs.tokens.shape[1])
    own = runs.attention_mask.bool().cpu()
    if bool((own != own[0]).any()):
        raise DataError(
            "positions name tokens of prompts, and these rows are padded differently, so that a position is "
            "not one column. Leave positions out (all columns), or give prompts of equal lengths."
        )
    columns = own[0].nonzero()[:, 0].tolist()
    return [columns[place] for place in chosen_positions(positions, len(columns))]


def _corrupted_run(runs: StackedRuns) -> tuple[dict[int, Int[Tensor, "batch pos k"]], float]:
    """The experts that each layer runs without a patch, and the metric."""
    chosen: dict[int, Tensor] = {}

    def note(indices: Tensor, hook: Any, layer: int) -> None:
        chosen[layer] = indices

    hooks: HookList = [
        (hook_names.topk_indices(layer), partial(note, layer=layer)) for layer in runs.model.moe_layers
    ]
    return chosen, runs.unpatched(hooks)


def _in_common(
    chosen: Int[Tensor, "batch pos k"],
    clean: Int[Tensor, "rows pos k"],
    allowed: Bool[Tensor, "pos"],
    by: str,
) -> dict[int, int]:
    """The experts that run at the same place in both runs, or the positions of such experts, ascending.

    Of each the first position.
    """
    same = (chosen.unsqueeze(-1) == clean.to(chosen).unsqueeze(-2)).any(-1)
    same &= allowed.to(same.device)[:, None]
    positions = same.nonzero()[:, 1].tolist()
    entries = chosen[same].tolist() if by == "expert" else positions
    first: dict[int, int] = {}
    for entry, pos in zip(entries, positions, strict=True):
        first[entry] = min(pos, first[entry]) if entry in first else pos
    return dict(sorted(first.items()))


def _clean(runs: StackedRuns, cache: Any, points: tuple[str, ...]) -> Clean:
    """What the clean run had at these points of all MoE layers, checked against model and tokens."""
    layers = runs.model.moe_layers
    clean: Clean = hook_names.points_of(cache, points, layers, what="The clean cache")
    if foreign := sorted(set(clean) - set(layers)):
        raise DataError(
            f"The clean cache has routing of layers {foreign}, and this model's MoE layers are {layers}: it "
            "is another model's. Give a cache of this one."
        )
    shape, tokens_shape = runs.model.moe_shape, tuple(runs.tokens.shape)
    return {
        layer: {name: _checked(shape, tokens_shape, layer, name, value) for name, value in values.items()}
        for layer, values in clean.items()
    }


def _checked(model: MoEShape, corrupted: tuple[int, ...], layer: int, point: str, tensor: Tensor) -> Tensor:
    """A cached tensor as [batch or 1, pos, ...]."""
    batch, n_pos = corrupted
    n_dims = 4 if point == hook_names.EXPERT_OUT else 3
    width = model.n_experts if point == hook_names.ROUTER_LOGITS else model.top_k
    shaped = tensor[None] if tensor.ndim == n_dims - 1 else tensor  # cached with remove_batch_dim=True
    where = f"The clean cache's {hook_names.name(layer, point)} has shape {tuple(tensor.shape)}"
    if shaped.ndim != n_dims or shaped.shape[2] != width:
        raise DataError(
            f"{where}, and this model runs {model.top_k} of {model.n_experts} experts: the cache is another "
            "model's. Give a cache of this one."
        )
    if shaped.shape[0] not in (1, batch) or shaped.shape[1] != n_pos:
        raise DataError(
            f"{where}, and the corrupted tokens are [batch pos] = {[batch, n_pos]}. Clean and corrupted "
            "prompts must correspond token by token; one clean prompt may serve all corrupted ones."
        )
    return shaped
