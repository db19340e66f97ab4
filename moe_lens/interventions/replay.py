"""Replay: hooks that make a run follow a recorded route.

    _, cache = model.run_with_cache(prompt)
    model.run_with_hooks(other_prompt, fwd_hooks=replay_hooks(RouteRecord.from_cache(cache)))

The record may come from a file, from another prompt, or from a run under other hooks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import numbers_of
from moe_lens.errors import DataError, HookError
from moe_lens.hook_names import HookList
from moe_lens.interventions.edits import RoutingEdit, columns_of
from moe_lens.interventions.forcing import ForceEdit
from moe_lens.interventions.positions import Positions, checked_positions
from moe_lens.model.points import RoutingPoint
from moe_lens.shape import MoEShape
from moe_lens.statistics.routes import RouteRecord


@dataclass(frozen=True, eq=False)
class ReplayEdit(ForceEdit):
    """Replaces the router's choice by the recorded experts, in the recorded order."""

    shape: MoEShape | None = None

    def check_fits(self, shape: MoEShape) -> None:
        """Called by the hook point before the hook is added."""
        if self.shape is not None and (misfits := self.shape.misfits(shape)):
            raise HookError(f"The record is of another model: {'; '.join(misfits)}; record this one.")


@dataclass(frozen=True, eq=False)
class WeightsEdit(RoutingEdit):
    """Replaces the derived weights by recorded ones."""

    point: ClassVar[str] = hook_names.TOPK_WEIGHTS

    weights: Float[Tensor, "rows columns k"] = field(repr=False)

    @property
    def n_columns(self) -> int | None:
        return self.weights.shape[1]

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        return columns_of(self.weights, value, hook).to(value.dtype)


def replay_hooks(
    record: RouteRecord,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    weights: bool | None = None,
) -> HookList:
    """Freeze the route: every token goes to the experts of the record, whatever this run's routers say.

    >>> from moe_lens import RouteRecord, organisms, replay_hooks
    >>> model = organisms.load("specialised")
    >>> _, cache = model.run_with_cache("Question : what is")
    >>> hooks = replay_hooks(RouteRecord.from_cache(cache))
    >>> _ = model.run_with_hooks("Document : the capital", fwd_hooks=hooks)

    The route is replayed column by column: the run must have as many prompts as the record (or the record
    has one, which serves all) and as many columns. It may have more where `positions` leaves the rest free
    (`positions="prompt"` replays a prompt's route and then lets the model route by itself while it
    generates), and fewer where `positions` says which follow the record. A generation may start from fewer
    and goes on along the record. A run's own route gives its own logits, bit for bit.

    Args:
        record: the route, from `RouteRecord.from_cache`.
        layers: only these layers; None: all of the record.
        positions: at which tokens; see `moe_lens.interventions.Positions`.
        weights: use the recorded weights, too. None: if there are any. Without them the rule derives the
            weights of the recorded experts from this run's logits.

    Raises:
        DataError: a layer or weights that the record does not have.
        HookError: another model, another number of prompts, a column that the record does not have, or a
            record of longer prompts.
    """
    if not isinstance(record, RouteRecord):
        raise DataError(f"replay_hooks needs a RouteRecord; got {type(record).__name__}.")
    if weights and record.weights is None:
        raise DataError("The record has no weights; record with weights=True.")
    where = checked_positions(positions)
    kept = record.shape.layers if layers is None else numbers_of(layers, "layers")
    if missing := [layer for layer in kept if layer not in record.shape.layers]:
        raise DataError(f"The record has no layer {missing[0]}; it has {record.shape.layers}.")
    hooks: HookList = []
    for layer in sorted(set(kept)):
        row = record.shape.layers.index(layer)
        indices = record.indices[row].long()
        hooks.append(ReplayEdit(layer, where, indices, keep_order=False, shape=record.shape).entry)
        if record.weights is not None and weights is not False:
            hooks.append(WeightsEdit(layer, where, record.weights[row]).entry)
    return hooks
