"""Excluding experts token by token: `exclude_experts`, which `route_around` is for whole sets of positions.

hooks = exclude_experts({3: mask})          # mask: bool [batch pos expert], [pos expert] or [expert]
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import numbers_of
from moe_lens.errors import DataError, HookError
from moe_lens.hook_names import HookList
from moe_lens.interventions.edits import RoutingEdit, columns_of
from moe_lens.interventions.positions import Positions, checked_positions
from moe_lens.model.points import RoutingPoint
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape


@dataclass(frozen=True, eq=False)
class ExcludeEdit(RoutingEdit):
    """Routes as if some experts were not there, other ones on every token."""

    point: ClassVar[str] = hook_names.ROUTER_LOGITS

    mask: Bool[Tensor, "rows columns expert"] = field(repr=False)  # TransformerLens prints every hook
    every_column: bool = False

    @property
    def n_columns(self) -> int | None:
        return None if self.every_column else self.mask.shape[1]

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        return self.edit_at(value, torch.ones(value.shape[:2], dtype=torch.bool, device=value.device), hook)

    def edit_at(self, value: Tensor, chosen: Bool[Tensor, "batch pos"], hook: RoutingPoint) -> Tensor:
        mask = columns_of(self.mask, value, hook).to(value.device) & chosen.unsqueeze(-1)
        try:
            logits, hook.rule = hook.rule.excluding(value, mask)
        except HookError as error:
            raise HookError(f"{hook.name}, tokens as [batch, pos]: {error}") from error
        return logits

    def check_fits(self, shape: MoEShape) -> None:
        if self.mask.shape[-1] != shape.n_experts:
            raise HookError(
                f"The mask for layer {self.layer} is about {self.mask.shape[-1]} experts; {shape.model} has "
                f"{shape.n_experts}."
            )

    def check_rule(self, rule: RoutingRule) -> None:
        """Called by the hook point before the hook is added."""
        if not rule.chooses_by_logits:
            raise HookError(
                f"Layer {self.layer} cannot exclude experts: {rule.cannot_steer([], [0])}. Leave it out."
            )


def exclude_experts(
    masks: Any,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
) -> HookList:
    """Never choose these experts, token by token: the next-best ones run, with the weights of the rule.

    >>> import torch
    >>> from moe_lens import exclude_experts, organisms
    >>> model = organisms.load("specialised")
    >>> prompt = "Question : what is"
    >>> mask = torch.zeros(model.to_tokens(prompt).shape[1], 8, dtype=torch.bool)     # [pos expert]
    >>> mask[2, 5] = mask[3, [0, 1]] = True
    >>> _ = model.run_with_hooks(prompt, fwd_hooks=exclude_experts({0: mask, 2: mask}))

    On every router, also where a correction bias or expert groups decide with the logits: there a logit of
    -inf alone excludes nobody. Tokens of which the mask excludes nobody keep their route bit for bit.

    Args:
        masks: a mapping {layer: mask}, or one mask with `layers`: bool, true for experts that must not run;
            [expert], [pos expert] or [batch pos expert], by columns of the padded batch (as in a cache).
        layers: the layers of a single mask.
        positions: at which tokens; see `moe_lens.interventions.Positions`. Columns beyond those of a mask
            must not be selected: in a generation, use "prompt".

    Raises:
        DataError: none of these forms.
        HookError: another number of experts than the model has, or a layer that chooses by token ids (before
            the forward); a token of which fewer than k experts are left, or none that its expert groups
            allow (during the run, naming the token).
    """
    where = checked_positions(positions)
    if layers is not None:
        masks = dict.fromkeys(numbers_of(layers, "layers"), masks)
    if not isinstance(masks, Mapping) or not masks:
        raise DataError(
            "exclude_experts needs a mapping {layer: mask}, or a mask with layers=...; got "
            f"{type(masks).__name__}."
        )
    edits: list[ExcludeEdit] = []
    for key, given in masks.items():
        mask = _mask(key, given)
        shaped = mask.reshape(*[1] * (3 - mask.ndim), *mask.shape)
        for layer in numbers_of(key, "layers"):
            edits.append(ExcludeEdit(layer, where, shaped, every_column=mask.ndim == 1))
    return [edit.entry for edit in sorted(edits, key=lambda edit: edit.layer)]


def _mask(layer: Any, given: Any) -> Bool[Tensor, "..."]:
    try:
        mask = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"exclude_experts, layer {layer}: {given!r} is not a mask.") from error
    if mask.dtype != torch.bool or not 1 <= mask.ndim <= 3 or not mask.numel():
        raise DataError(
            f"exclude_experts, layer {layer}: a mask is bool [expert], [pos expert] or [batch pos expert]; "
            f"got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    return mask
