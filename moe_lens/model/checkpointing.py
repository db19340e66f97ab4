"""Gradient checkpointing under hooks: a block that is computed again sees the forward that it belongs to.

    checkpointing = Checkpointing(hf_model, running)
    checkpointing.begin(), checkpointing.end()         # around each forward

While a forward in training mode runs, what transformers calls to checkpoint a block is wrapped, so that the
function which backward() calls again knows the forward and the hooks that it ran under. Between forwards
nothing is left on the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_lens.errors import HookError
from moe_lens.model.private_names import CHECKPOINT
from moe_lens.model.state import ForwardState


class Checkpointing:
    """The checkpointed blocks of a Hugging Face model."""

    def __init__(self, hf_model: nn.Module, running: Any):
        self.hf_model = hf_model
        self.running = running
        self.blocks = [part for part in hf_model.modules() if isinstance(part, GradientCheckpointingLayer)]
        self.wrapped: list[nn.Module] = []

    def begin(self) -> None:
        """A forward begins."""
        if self.wrapped or not self.hf_model.training:
            return
        for block in self.blocks:
            if block.training and block.gradient_checkpointing and CHECKPOINT in vars(block):
                vars(block)[CHECKPOINT] = _Checkpoint(vars(block)[CHECKPOINT], self.running)
                self.wrapped.append(block)

    def end(self) -> None:
        """The last one ends."""
        for block in self.wrapped:
            if isinstance(wrapper := vars(block).get(CHECKPOINT), _Checkpoint):
                vars(block)[CHECKPOINT] = wrapper.original
        self.wrapped = []


@dataclass(eq=False)
class _Checkpoint:
    """Stands in for the function that checkpoints a block."""

    original: Callable[..., Any]
    running: Any

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = self.running
        again = _Computed(function, running, running.forward, running.hooks_set)
        return self.original(again, *args, **kwargs)


@dataclass(eq=False)
class _Computed:
    """A block's computation, which knows the forward that it belongs to."""

    function: Callable[..., Any]
    running: Any
    forward: ForwardState
    hooks_set: tuple[int, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.running.forward is self.forward:  # the first time
            return self.function(*args, **kwargs)
        if self.running.hooks_set != self.hooks_set:
            raise HookError(
                "Gradient checkpointing computes a block again, and the routing hooks are not those of the "
                "forward any more. Call backward() within the same context as the forward."
            )
        with self.running.again(self.forward):
            return self.function(*args, **kwargs)
