"""HookPoints on the residual stream at the borders of a Hugging Face model's blocks.

    points = install_residual(block, 3, running)     # points.pre, .post: blocks.3.hook_resid_pre, ..._post
    points.uninstall()

As long as neither has a hook, the block runs as it is. (Gradient checkpointing computes a block again
without the hooks around it, so that those on the residual stream act once.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from moe_lens.errors import HookError
from moe_lens.model.private_names import has_hooks
from moe_lens.model.running import Running

RESID_PRE: Final = "hook_resid_pre"
RESID_POST: Final = "hook_resid_post"


@dataclass(eq=False)
class ResidualPoints:
    """The two points of one block, [batch pos d_model] each; an edit is what the rest of the model reads."""

    block: nn.Module
    pre: HookPoint
    post: HookPoint
    running: Running
    handles: list[Any] = field(default_factory=list)

    def uninstall(self) -> None:
        """Leave the block as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def install_residual(block: nn.Module, layer: int, running: Running) -> ResidualPoints:
    """Put points before and after a block of a Hugging Face model."""
    points = ResidualPoints(block, HookPoint(), HookPoint(), running)
    points.pre.name, points.post.name = f"blocks.{layer}.{RESID_PRE}", f"blocks.{layer}.{RESID_POST}"
    points.handles = [
        block.register_forward_pre_hook(_Before(points), with_kwargs=True),
        block.register_forward_hook(_After(points)),
    ]
    return points


@contextmanager
def passed_over(blocks: Sequence[nn.Module], residual: Tensor) -> Iterator[None]:
    """Within the context, each of these blocks gives `residual`, whatever it reads, and computes nothing."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *args, **kwargs: residual
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward")
            if forward is not None:
                vars(block)["forward"] = forward


class _Reached(Exception):
    """Breaks a forward off."""


def residual_before(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a block would read: `run` is broken off there."""
    found: list[Tensor] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise HookError("The forward did not reach the block at which it was to stop.")


@dataclass(eq=False)
class _Before:
    """What the block reads. An object, so that a deep copy of the model has points of its own."""

    points: ResidualPoints

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        point = self.points.pre
        if not has_hooks(point):
            return None
        if args:
            return (_edited(point, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _edited(point, kwargs["hidden_states"])}


@dataclass(eq=False)
class _After:
    """What it gives to the next one."""

    points: ResidualPoints

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        point = self.points.post
        if not has_hooks(point):
            return None
        if isinstance(output, tuple):
            return (_edited(point, output[0]), *output[1:])
        return _edited(point, output)


def _edited(point: HookPoint, value: Float[Tensor, "batch pos *d_model"]) -> Tensor:
    edited = point(value)
    if not isinstance(edited, Tensor) or edited.shape != value.shape:
        given = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise HookError(
            f"{point.name}: a hook returned {given} where shape {tuple(value.shape)} is needed. "
            "Return a tensor of the same shape, or None to leave it as it is."
        )
    return edited.to(value.dtype)
