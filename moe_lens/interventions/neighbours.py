"""Routes given as dense weights over all experts: a prompt's own mixture, or its solved neighbours' (C3PO).

records = record_dense(model, solved)                                  # DenseRoutes
hooks = neighbour_routes(records, similarity, k=3)                     # one query a row
hooks = follow_dense(records)                                          # each prompt its own record
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import numbers_of
from moe_lens.errors import DataError, HookError
from moe_lens.hook_names import HookList
from moe_lens.interventions.edits import RoutingEdit
from moe_lens.interventions.positions import Positions, checked_positions
from moe_lens.model.points import RoutingPoint
from moe_lens.routers.dense import logits_of_dense, no_dense_weights
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape
from moe_lens.statistics.dense import DenseRoutes


@dataclass(frozen=True, eq=False)
class DenseEdit(RoutingEdit):
    """Routes by given dense weights, one row a prompt; a single row serves all."""

    point: ClassVar[str] = hook_names.ROUTER_LOGITS

    weights: Float[Tensor, "prompt expert"] = field(repr=False)
    shape: MoEShape

    @property
    def n_prompts(self) -> int | None:
        return len(self.weights) if len(self.weights) > 1 else None

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        rows = hook.state.by_prompt(self.weights, len(value))
        if rows is None:
            raise HookError(
                f"{hook.name}: the dense weights are those of {len(self.weights)} prompts, and "
                f"{hook.state.of_how_many(len(value))} are running; give those of as many prompts, or of one."
            )
        logits = logits_of_dense(hook.rule, rows.to(value.device)).to(value.dtype)
        everywhere = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
        hook.rule = hook.rule.released(everywhere)
        return logits[:, None].expand_as(value)

    def check_fits(self, shape: MoEShape) -> None:
        """Called by the hook point before the hook is added; k may be another one."""
        own = MoEShape(self.shape.model, self.shape.layers, self.shape.n_experts, shape.top_k)
        if misfits := own.misfits(shape):
            raise HookError(f"The dense weights are of another model: {'; '.join(misfits)}; record this one.")

    def check_rule(self, rule: RoutingRule) -> None:
        """Called by the hook point before the hook is added."""
        if (reason := no_dense_weights(rule)) is not None:
            raise HookError(f"Layer {self.layer} cannot be routed by dense weights: {reason}.")


def follow_dense(
    records: DenseRoutes,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = "last",
) -> HookList:
    """Route by these dense weights instead of the router's: the architecture's own top-k and weights follow.

    >>> from moe_lens import follow_dense, organisms, record_dense
    >>> model = organisms.load("specialised")
    >>> records = record_dense(model, ["Question : what is"], progress=False)
    >>> _ = model.run_with_hooks("Document : the", fwd_hooks=follow_dense(records, layers=3))

    This is the hook point of dense weights: they take the place of softmax(z) (or of each expert's score) on
    the router logits, so that hooks after it, plans among them, edit what it gave. To let all experts run at
    their dense weights, run under `with_top_k(model, model.n_experts)`. In half precision the weights round
    as the router's own logits do.

    Args:
        records: one prompt's, which serves all, or those of as many prompts as run.
        layers: only these layers; None: all of the record.
        positions: at which tokens; see `moe_lens.interventions.Positions`.

    Raises:
        DataError: not such records, or a layer that they do not have.
        HookError: another model, a router without dense weights (before the forward); another number of
            prompts.
    """
    if not isinstance(records, DenseRoutes):
        raise DataError(f"Dense routes are needed, as of record_dense; got {type(records).__name__}.")
    where, shape = checked_positions(positions), records.shape
    kept = shape.layers if layers is None else sorted(set(numbers_of(layers, "layers")))
    if missing := [layer for layer in kept if layer not in shape.layers]:
        raise DataError(f"The record has no layer {missing[0]}; it has {shape.layers}.")
    return [
        DenseEdit(layer, where, records.weights[shape.layers.index(layer)], shape).entry for layer in kept
    ]


def neighbour_routes(
    records: DenseRoutes,
    similarity: Any,
    k: int = 3,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = "last",
) -> HookList:
    """Route a prompt as its nearest solved neighbours are routed (C3PO's kNN form, arXiv 2504.07964).

    >>> from moe_lens import neighbour_routes, organisms, record_dense
    >>> model = organisms.load("specialised")
    >>> solved = record_dense(model, ["Question : what is", "Question : the", "the"], progress=False)
    >>> nearest = neighbour_routes(solved, [0.9, 0.8, 0.1], k=2)                    # of one query
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=nearest)

    In each layer ŵ = Σ s_i w_i / Σ s_i over the k nearest records, w dense over all experts, takes the place
    of the router's own weights; the architecture's top-k, and its normalisation where it has one, follow, as
    in the authors' released code.

    Args:
        records: of solved prompts, whose answers were right, from `record_dense`.
        similarity: of each of them to the prompt, [record]; or for each prompt that runs [prompt record]: in
            the paper the cosine of question embeddings, which are the user's.
        k: neighbours; the paper takes 3.
        layers: None: the last 5 of the record's MoE layers (all where it has fewer), as in the paper.
        positions: "last", the prompt's last token, as in the paper. The released code does the same to every
            token that is then generated: add a second list with positions="generated".

    Raises:
        DataError: as in `DenseRoutes.neighbours` and `follow_dense`.
        HookError: as in `follow_dense`.
    """
    if not isinstance(records, DenseRoutes):
        raise DataError(f"Dense routes are needed, as of record_dense; got {type(records).__name__}.")
    chosen = records.shape.layers[-5:] if layers is None else layers
    return follow_dense(records.neighbours(similarity, k), layers=chosen, positions=positions)
