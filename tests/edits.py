"""Hooks that tests put on routing points."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens import hook_names

SPELLERS = (hook_names.router_logits, hook_names.topk_indices, hook_names.topk_weights)


def same(value: Tensor, hook: HookPoint) -> Tensor:
    return value


def on_logits(edit: Callable[[Tensor], Tensor], *layers: int) -> list[Any]:
    return [(hook_names.router_logits(layer), lambda z, hook: edit(z)) for layer in layers]


def roll(logits: Tensor) -> Tensor:
    return logits.roll(1, dims=-1)
