"""Routers exchanged between two checkpoints of one architecture, for as long as a block of code lasts.

with swap_routers(base, tuned):
    base(prompt)                     # base's experts, chosen by tuned's routers; and the other way round
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Final, cast

import torch
from torch import Tensor

from moe_lens.checks import chosen_layers
from moe_lens.errors import MoELensError
from moe_lens.model.hf_models import hf_model_of, numbered_layers, tensors_of
from moe_lens.model.layers import MoELayer
from moe_lens.routers.rule import RoutingRule

_CORRECTION_BIASES: Final = ("e_score_correction_bias", "expert_bias")
"""What a router chooses by, where it stands beside it in the block."""


@contextmanager
def swap_routers(a: Any, b: Any, *, layers: Any = None) -> Iterator[None]:
    """Let each of two models route by the other's routers; afterwards, and after an exception, as before.

    >>> import torch
    >>> from moe_lens import organisms, swap_routers
    >>> a, b = organisms.load("planted"), organisms.load("null")
    >>> before = a("Question : what")
    >>> with swap_routers(a, b):
    ...     during = a("Question : what")
    >>> torch.equal(during, before), torch.equal(a("Question : what"), before)
    (False, True)

    Parameters and buffers of the routers are exchanged (weights, biases, correction biases, scales), in each
    model's own dtype and on its device; experts, attention and everything else stay. Each model gets copies,
    so nothing that is done to them within the context lasts: afterwards every tensor is the one that it was.
    Routers are a setting of the model, not of a thread.

    Args:
        a: a HookedMoE, a RoutedModel, or a Hugging Face model itself.
        b: another one, whose routers are of the same classes and sizes.
        layers: only these MoE layers; a number, several, or a slice. None: all.

    Raises:
        MoELensError: the same model twice, routers of other layers, classes, sizes or rules, weights that are
            quantised or offloaded. Both models are left as they were.
    """
    if hf_model_of(a) is hf_model_of(b):
        raise MoELensError("swap_routers: a and b are the same model; give two checkpoints.")
    if getattr(a, "compatibility_mode", False) != getattr(b, "compatibility_mode", False):
        raise MoELensError(
            "swap_routers: one of the models is in compatibility mode, which rewrites router weights. Load "
            "both in the same way."
        )
    ours, theirs = numbered_layers(hf_model_of(a)), numbered_layers(hf_model_of(b))
    if tuple(ours) != tuple(theirs):
        raise MoELensError(f"swap_routers: the MoE layers are {tuple(ours)} and {tuple(theirs)}.")
    chosen = chosen_layers(layers, tuple(ours))
    pairs = [pair for layer in chosen for pair in _pairs(layer, ours[layer], theirs[layer])]
    for layer in chosen:
        _check_rules(layer, ours[layer].rule, theirs[layer].rule)
    before = [(tensor, tensor.data) for pair in pairs for tensor in pair]
    try:
        for one, other in pairs:
            one_data, other_data = one.data, other.data
            one.data, other.data = _copy(other_data, one_data), _copy(one_data, other_data)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _pairs(layer: int, one: MoELayer, other: MoELayer) -> list[tuple[Tensor, Tensor]]:
    """Tensors of the same name in two routers."""
    if type(one.router) is not type(other.router):
        names = f"{type(one.router).__name__} and {type(other.router).__name__}"
        raise MoELensError(f"swap_routers: the routers of layer {layer} are {names}, of different classes.")
    first, second = _tensors(one), _tensors(other)
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (first, second)]
    if shapes[0] != shapes[1]:
        raise MoELensError(
            f"swap_routers: the routers of layer {layer} have tensors {shapes[0]} and {shapes[1]}; they must "
            "be of the same names and shapes."
        )
    for tensor in (*first.values(), *second.values()):
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)):
            raise MoELensError(
                f"swap_routers: router weights of layer {layer} are offloaded or quantised. Load both models "
                "whole, in a floating-point dtype."
            )
    return [(tensor, second[name]) for name, tensor in first.items()]


def _tensors(moe: MoELayer) -> dict[str, Tensor]:
    """What a router decides by: its own tensors, and correction biases of its block."""
    beside = {
        name: tensor
        for name, tensor in tensors_of(moe.block).items()
        if name.rpartition(".")[-1] in _CORRECTION_BIASES
    }
    own = tensors_of(moe.router)
    known = {id(tensor) for tensor in own.values()}
    return {**own, **{f"block.{name}": tensor for name, tensor in beside.items() if id(tensor) not in known}}


def _copy(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(device=like.device, dtype=like.dtype, copy=True)


def _check_rules(layer: int, own: RoutingRule, other: RoutingRule) -> None:
    """What a rule reads from configs (k, scaling, ...) is not exchanged, so it must be the same."""
    both = [
        {
            field.name: value
            for field in fields(cast(Any, rule))
            if not isinstance(value := getattr(rule, field.name), Tensor)
        }
        for rule in (own, other)
    ]
    if type(own) is not type(other) or both[0] != both[1]:
        raise MoELensError(
            f"swap_routers: the routers of layer {layer} follow different rules, {own!r} and {other!r}, by "
            "their configs, which are not exchanged. Give models of one architecture and one k."
        )
