"""The names of the routing hook points: the only place in the package that spells them.

>>> from moe_lens import hook_names
>>> hook_names.router_logits(3)
'blocks.3.mlp.hook_router_logits'
>>> hook_names.parse("blocks.3.hook_topk_weights")
(3, 'hook_topk_weights')
"""

import re

from moe_lens.errors import HookError

ROUTER_LOGITS = "hook_router_logits"
TOPK_INDICES = "hook_topk_indices"
TOPK_WEIGHTS = "hook_topk_weights"
EXPERT_OUT = "hook_expert_out"
POINTS = (ROUTER_LOGITS, TOPK_INDICES, TOPK_WEIGHTS)
"""Short names of the routing points of one MoE layer, in the order in which they fire."""

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
