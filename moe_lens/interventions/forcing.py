"""Forcing and nudging routes: exact sets of experts, a bias on the logits, scaled weights.

    model.run_with_hooks(prompt, fwd_hooks=force_experts({3: [1, 5]}, positions="generated"))
    model.run_with_hooks(prompt, fwd_hooks=bias_experts({3: delta}) + scale_experts([(3, 1)], 2.0))

All return hook lists, which can be added to each other and to steering. Hooks on one point run in the order
of the list; the points fire in the order logits, indices, weights, outputs. So forcing a set of experts
overrides steering and biases of that layer, wherever it stands in the list.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, SupportsFloat, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import whole_number
from moe_lens.errors import DataError, HookError
from moe_lens.hook_names import HookList
from moe_lens.interventions.edits import Experts, RoutingEdit, columns_of, experts_by_layer
from moe_lens.interventions.positions import Positions, checked_positions
from moe_lens.model.points import RoutingPoint
from moe_lens.routers.transform import spread
from moe_lens.shape import MoEShape

Scale = Literal["logit", "std"]
"""What a number of a bias counts: nats of logit, or standard deviations of the token's logits."""


@dataclass(frozen=True, eq=False)
class ForceEdit(RoutingEdit):
    """Replaces the router's choice by given experts [batch or 1, pos or 1, k]."""

    point: ClassVar[str] = hook_names.TOPK_INDICES

    experts: Int[Tensor, "rows columns k"] = field(repr=False)  # TransformerLens prints every hook
    keep_order: bool = True
    every_column: bool = False

    @property
    def n_columns(self) -> int | None:
        return None if self.every_column else self.experts.shape[1]

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        forced = columns_of(self.experts, value, hook).to(value)
        if not self.keep_order:
            return forced
        same = (forced.sort(-1).values == value.sort(-1).values).all(-1, keepdim=True)
        return torch.where(same, value, forced)  # for the same set the router's own order, so the same sum

    def highest_expert(self) -> int:
        return int(self.experts.max())

    def check_fits(self, shape: MoEShape) -> None:
        super().check_fits(shape)
        if self.experts.shape[-1] != shape.top_k:
            raise HookError(
                f"Layer {self.layer} of {shape.model} runs {shape.top_k} experts for each token, and "
                f"{self.experts.shape[-1]} were given. Give exactly {shape.top_k}."
            )


@dataclass(frozen=True, eq=False)
class BiasEdit(RoutingEdit):
    """Adds a vector to the router logits, as it is or times the token's std(z)."""

    point: ClassVar[str] = hook_names.ROUTER_LOGITS

    bias: Float[Tensor, "expert"] = field(repr=False)
    in_stds: bool = False
    shape: MoEShape | None = None

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        if not self.in_stds:
            return value + self.bias.to(value)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return (wide + self.bias.to(wide) * spread(value)).to(value.dtype)

    def check_fits(self, shape: MoEShape) -> None:
        if self.shape is not None and (misfits := self.shape.misfits(shape)):
            raise HookError(f"The bias was made for another model (bias / model): {'; '.join(misfits)}.")
        if len(self.bias) != shape.n_experts:
            raise HookError(
                f"The bias for layer {self.layer} has {len(self.bias)} numbers; {shape.model} has "
                f"{shape.n_experts} experts, and needs one for each."
            )


@dataclass(frozen=True, eq=False)
class ScaleEdit(RoutingEdit):
    """Multiplies the weights of some experts, or of all others."""

    point: ClassVar[str] = hook_names.TOPK_WEIGHTS

    experts: tuple[int, ...]
    factor: float | Float[Tensor, ""]
    others: bool = False

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        experts = torch.tensor(self.experts, device=value.device)
        meant = torch.isin(hook.chosen, experts) != self.others
        factor = self.factor.to(value.device) if isinstance(self.factor, Tensor) else self.factor
        return torch.where(meant, (value * factor).to(value.dtype), value)

    def highest_expert(self) -> int:
        return max(self.experts)


def force_experts(
    experts: Experts,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
) -> HookList:
    """Run exactly these experts, whatever the router says, with the weights that its rule gives them.

    >>> from moe_lens import force_experts, organisms
    >>> model = organisms.load("specialised")
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=force_experts({0: [1, 5]}, positions=[2, 3]))

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`: k different
            ones a layer, as many as the model runs, for every token. A mapping may also hold int tensors
            [pos k] or [batch pos k], with the experts of each column. Where the set is the router's own, its
            order is kept.
        layers: the layers of `experts`, where those are bare numbers.
        positions: at which tokens; see `moe_lens.interventions.Positions`. Columns beyond those of a tensor
            must not be selected.

    Raises:
        DataError: none of these forms, or an expert named twice for a token.
        HookError: another number of experts than the model runs, or one that it does not have. (Raised before
            the forward.)
    """
    where = checked_positions(positions)
    if layers is not None or not isinstance(experts, Mapping):
        experts = experts_by_layer(experts, layers)
    hooks: HookList = []
    for layer, given in sorted(_sets(experts).items()):
        sets = given.reshape(*[1] * (3 - given.ndim), *given.shape)
        hooks.append(ForceEdit(layer, where, sets, every_column=given.ndim == 1).entry)
    return hooks


def bias_experts(bias: Any, *, positions: Positions = None, scale: Scale = "logit") -> HookList:
    """Add a vector to the router logits: selection and weights follow (softmax(z + delta), for many routers).

    >>> import torch
    >>> from moe_lens import bias_experts, organisms
    >>> model = organisms.load("specialised")
    >>> towards_5 = torch.eye(8)[5] * 0.5
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=bias_experts({0: towards_5}))

    Args:
        bias: layer -> a number for each expert (nats). It is added in the logits' own dtype. With -inf a
            router without a correction bias never chooses the expert; to exclude experts on every router, use
            `exclude_experts`. Also what `learn_router_bias` gives, or anything else with such a `mapping`.
        positions: at which tokens; see `moe_lens.interventions.Positions`.
        scale: "std": the numbers count standard deviations of the token's own logits, z + bias·std(z) (of
            finite ones, correction 0), added in float32, as EasySteer's soft plans do. (All numbers finite.)

    Raises:
        DataError: not such a mapping, NaN or +inf; another scale, or -inf with "std".
        HookError: not one number an expert. (Raised before the forward.)
    """
    where = checked_positions(positions)
    if scale not in get_args(Scale):
        raise DataError(f"scale must be one of {get_args(Scale)}; got {scale!r}.")
    shape, bias = getattr(bias, "shape", None), getattr(bias, "mapping", bias)
    shape = shape if isinstance(shape, MoEShape) else None
    if shape is not None and isinstance(bias, Mapping) and not bias:
        return []  # nothing was learned: a bias of zeros
    if not isinstance(bias, Mapping) or not bias:
        raise DataError(f"bias_experts needs a mapping from layers to vectors; got {bias!r}.")
    vectors = {whole_number(layer, "layer"): _vector(layer, vector) for layer, vector in bias.items()}
    in_stds = scale == "std"
    if in_stds and any(bool(vector.isinf().any()) for vector in vectors.values()):
        raise DataError(
            'bias_experts: with scale="std" numbers are finite; exclude_experts keeps experts out.'
        )
    return [BiasEdit(layer, where, each, in_stds, shape).entry for layer, each in sorted(vectors.items())]


def scale_experts(
    experts: Experts,
    factor: SupportsFloat,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
) -> HookList:
    """Multiply these experts' weights where they are chosen; the choice and all other weights stay.

    >>> from moe_lens import organisms, scale_experts
    >>> model = organisms.load("specialised")
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=scale_experts([(0, 5), (1, 2)], 2.0))

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`.
        factor: a finite number, or a tensor of one, which gets gradients. The weights are not renormalised.
            (In Llama 4 a weight multiplies what the expert reads, and so does the factor.)
        layers: the layers of `experts`, where those are bare numbers.
        positions: at which tokens; see `moe_lens.interventions.Positions`.

    Raises:
        DataError: no experts, or a factor that is not a finite number.
        HookError: no such expert. (Raised before the forward.)
    """
    where, checked = checked_positions(positions), _factor(factor)
    return [
        ScaleEdit(layer, where, tuple(numbers), checked).entry
        for layer, numbers in experts_by_layer(experts, layers).items()
    ]


def _factor(given: Any) -> float | Float[Tensor, ""]:
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    is_scalar = isinstance(given, Tensor) and given.numel() == 1 and given.is_floating_point()
    if not (is_number or is_scalar) or not math.isfinite(_number(given)):
        raise DataError(f"factor must be a finite number, or a tensor of one; got {given!r}.")
    return given.reshape(()) if isinstance(given, Tensor) else float(given)


def _number(factor: Any) -> float:
    return float(factor.detach() if isinstance(factor, Tensor) else factor)


def _sets(experts: Mapping[Any, Any]) -> dict[int, Int[Tensor, "*columns k"]]:
    if not experts:
        raise DataError("force_experts needs the experts of at least one layer; got none.")
    sets = {}
    for layer, given in experts.items():
        try:
            values = torch.as_tensor(given).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"force_experts, layer {layer}: {given!r} are not expert numbers.") from error
        if values.is_floating_point() or values.dtype == torch.bool or not 1 <= values.ndim <= 3:
            raise DataError(
                f"force_experts, layer {layer}: give k experts, or an int tensor [pos k] or [batch pos k]; "
                f"got {values.dtype} of shape {tuple(values.shape)}."
            )
        values = values.long()
        ordered = values.sort(-1).values
        if not values.numel() or int(values.min()) < 0 or bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise DataError(f"force_experts, layer {layer}: experts must be different numbers from 0 on.")
        sets[whole_number(layer, "layer")] = values
    return sets


def _vector(layer: Any, given: Any) -> Float[Tensor, "expert"]:
    try:
        vector = torch.as_tensor(given, dtype=torch.float32).cpu()  # in its graph: gradients reach `given`
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"The bias for layer {layer} is not a vector: {given!r}.") from error
    if vector.ndim != 1 or bool(torch.isnan(vector).any()) or bool((vector == torch.inf).any()):
        raise DataError(f"The bias for layer {layer} must be a vector without NaN and +inf; got {given!r}.")
    return vector
