"""The names of the routing hook points, which only this file spells, and what a cache holds under them.

>>> from moe_lens import hook_names
>>> hook_names.router_logits(3)
'blocks.3.mlp.hook_router_logits'
>>> hook_names.parse("blocks.3.hook_topk_weights")
(3, 'hook_topk_weights')
"""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from moe_lens.checks import short
from moe_lens.errors import DataError, HookError

ROUTER_LOGITS = "hook_router_logits"
TOPK_INDICES = "hook_topk_indices"
TOPK_WEIGHTS = "hook_topk_weights"
EXPERT_OUT = "hook_expert_out"
POINTS = (ROUTER_LOGITS, TOPK_INDICES, TOPK_WEIGHTS)
"""Short names of the routing points of one MoE layer, in the order in which they fire."""

HookList = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
"""Pairs (hook name or filter, hook function), as TransformerLens' `run_with_hooks` and `hooks` take them."""

Hooks = Sequence[tuple[str | Callable[..., Any], Callable[..., Any]]] | None
"""What functions with a parameter `hooks=` take: a `HookList`, any other sequence of such pairs, or None."""

_NAME = re.compile(rf"^blocks\.(\d+)\.(?:mlp\.)?({'|'.join((*POINTS, EXPERT_OUT))})$")


def name(layer: int, point: str) -> str:
    """Name of a point of `layer`, given its short name.

    >>> from moe_lens import hook_names
    >>> hook_names.name(3, hook_names.TOPK_INDICES)
    'blocks.3.mlp.hook_topk_indices'
    """
    return f"blocks.{layer}.mlp.{point}"


def router_logits(layer: int) -> str:
    """Name of the point on the router logits of `layer`, shape [batch pos expert]."""
    return name(layer, ROUTER_LOGITS)


def topk_indices(layer: int) -> str:
    """Name of the point on the chosen experts of `layer`, int64, shape [batch pos k]."""
    return name(layer, TOPK_INDICES)


def topk_weights(layer: int) -> str:
    """Name of the point on the chosen experts' weights of `layer`, shape [batch pos k]."""
    return name(layer, TOPK_WEIGHTS)


def expert_out(layer: int) -> str:
    """Name of the point on the chosen experts' outputs of `layer`, shape [batch pos k d_model].

    It exists after `model.set_use_expert_out(True)`, and fires after the other three.
    """
    return name(layer, EXPERT_OUT)


def hook_list(hooks: Any) -> HookList:
    """What somebody gave as hooks, as a list of pairs; None gives none.

    >>> hook_list(None)
    []

    Raises:
        HookError: no pairs (name or filter, function): a plan, for one, which `steer_hooks` makes into hooks.
    """
    try:
        pairs = [] if hooks is None else [(where, function) for where, function in hooks]
    except (TypeError, ValueError) as error:
        raise _no_hooks(hooks) from error
    if not all((isinstance(where, str) or callable(where)) and callable(f) for where, f in pairs):
        raise _no_hooks(hooks)
    return pairs


def _no_hooks(hooks: Any) -> HookError:
    return HookError(
        f"Hooks must be a list of pairs (name or filter, function), or None; got {short(hooks)}. For a "
        "steering plan, pass steer_hooks(plan)."
    )


def block_aliases(points: tuple[str, ...] = POINTS) -> dict[str, str]:
    """Block-level aliases: what `cache["router_logits", layer]` and TransformerLens' patching resolve."""
    return {point: f"mlp.{point}" for point in points}


def parse(name: str) -> tuple[int, str] | None:
    """Layer and short name of one of these points (full name or block-level alias); None for other names."""
    match = _NAME.match(name)
    return (int(match.group(1)), match.group(2)) if match else None


def layer_of(name: str | None) -> int:
    """Layer of one of these points; within a hook: `hook_names.layer_of(hook.name)`.

    >>> from moe_lens import hook_names
    >>> hook_names.layer_of("blocks.3.mlp.hook_router_logits")
    3

    Raises:
        HookError: the name is not that of a routing point.
    """
    parsed = parse(name or "")
    if parsed is None:
        raise HookError(f"{name!r} is not the name of a routing hook point; moe_lens.hook_names spells them.")
    return parsed[0]


def points_of(
    cache: Any,
    needed: Sequence[str] = POINTS,
    layers: Sequence[int] | None = None,
    *,
    what: str = "The cache",
) -> dict[int, dict[str, Tensor]]:
    """Layer -> short name of a point -> tensor: all the routing that a cache of `run_with_cache` holds.

    >>> import torch
    >>> from moe_lens import hook_names
    >>> cache = {"blocks.3.mlp.hook_topk_indices": torch.tensor([[1, 0]])}
    >>> hook_names.points_of(cache, ["hook_topk_indices"])
    {3: {'hook_topk_indices': tensor([[1, 0]])}}

    Args:
        cache: an ActivationCache, or a dictionary of its tensors. Layers come out in ascending order.
        needed: short names of the points that each layer must have; others are given back where present.
        layers: the layers that must be there; None for those that the cache has.
        what: the argument's name, for errors.

    Raises:
        DataError: not a cache, no routing in it, or a layer that lacks a point.
    """
    by_layer: dict[int, dict[str, Tensor]] = {}
    for key in cache.keys() if hasattr(cache, "keys") else ():  # an ActivationCache iterates over an axis
        parsed = parse(key) if isinstance(key, str) else None
        if parsed is None or not isinstance(cache[key], Tensor):
            continue
        layer, point = parsed
        tensors = by_layer.setdefault(layer, {})
        if key == name(layer, point) or point not in tensors:  # a full name goes before its alias
            tensors[point] = cache[key]
    if not by_layer:
        raise DataError(
            f"{what} holds no routing. It needs a cache of a HookedMoE: the second of the two things "
            f"that run_with_cache returns; got {type(cache).__name__}. A names_filter must keep the routing "
            "points (names_filter=moe_lens.is_routing_point)."
        )
    for layer in sorted(by_layer) if layers is None else layers:
        if missing := [point for point in needed if point not in by_layer.get(layer, {})]:
            raise DataError(f"{what} lacks {' and '.join(missing)} of layer {layer}; {_remedy(missing)}.")
    return dict(sorted(by_layer.items()))


def check_points(points: dict[int, dict[str, Tensor]], n_experts: int | None = None) -> None:
    """Refuse the routing of a cache, from `points_of`, that no one run of a model can have given.

    Args:
        points: with the top-k indices of every layer.
        n_experts: how many experts a layer has; None: as many as it has router logits.

    Raises:
        DataError: layers of different tokens, experts that are no whole numbers or not there, or other
            numbers of weights than of experts.
    """
    first = next(iter(points))
    batch = points[first][TOPK_INDICES].shape[:-1]
    for layer, tensors in points.items():
        for point in POINTS:
            if point in tensors and tensors[point].shape[:-1] != batch:
                raise DataError(
                    f"Layer {layer}: {point} has shape {tuple(tensors[point].shape)}, layer {first} is of "
                    f"a batch {tuple(batch)}; all layers must come from one run. Cache them in one."
                )
        indices, weights = tensors[TOPK_INDICES], tensors.get(TOPK_WEIGHTS)
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise DataError(
                f"Layer {layer}: {TOPK_INDICES} must be integers; got {indices.dtype}. Are they weights?"
            )
        if weights is not None and weights.shape != indices.shape:
            raise DataError(
                f"Layer {layer}: {TOPK_WEIGHTS} has shape {tuple(weights.shape)}, and {TOPK_INDICES} "
                f"{tuple(indices.shape)}; keep both as the run gave them."
            )
        there = tensors[ROUTER_LOGITS].shape[-1] if n_experts is None else n_experts
        wrong = indices[(indices < 0) | (indices >= there)]
        if wrong.numel():
            raise DataError(
                f"Layer {layer}: {TOPK_INDICES} names expert {int(wrong[0])}, and there are experts 0 to "
                f"{there - 1}; were the indices padded or offset, or are the logits another model's? Keep "
                "both as the run gave them."
            )


def _remedy(missing: Sequence[str]) -> str:
    if EXPERT_OUT in missing:
        return "call model.set_use_expert_out(True) before run_with_cache"
    return "let the names_filter of run_with_cache keep it (names_filter=moe_lens.is_routing_point)"


def unknown(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is none of these: those that are nearest to it.

    >>> unknown("blocks.0.mlp.hook_topk", ["blocks.0.mlp.hook_topk_indices", "hook_embed"])
    "There is no hook point 'blocks.0.mlp.hook_topk'; did you mean blocks.0.mlp.hook_topk_indices?"
    """
    near = get_close_matches(name, list(names), n=3)
    return f"There is no hook point {name!r}{'; did you mean ' + ' or '.join(near) + '?' if near else '.'}"
