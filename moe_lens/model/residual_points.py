"""HookPoints on the residual stream at the borders of a Hugging Face model's blocks.

    points = install_residual(block, 3, running)     # points.pre, .post: blocks.3.hook_resid_pre, ..._post
    points.take_off(block)

As long as neither has a hook, the block runs as it is. (Gradient checkpointing computes a block again
without the hooks around it, so that those on the residual stream act once.)
"""

from collections.abc import Callable
from typing import Any, Final

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from moe_lens.errors import HookError
from moe_lens.model.owners import HookTable, WatchedPoint
from moe_lens.model.private_names import has_hooks
from moe_lens.model.stand_in import StandIn
from moe_lens.model.state import uncompiled

RESID_PRE: Final = "hook_resid_pre"
RESID_POST: Final = "hook_resid_post"


class _ResidualPoint(WatchedPoint):
    """A HookPoint that says in a plain attribute of its block whether hooks wait on either."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[Any] = []

    def robbed(self, thread: Any) -> None:
        """Tell the model."""
        for points in self.changed:
            points.running.owners.robbed.add(thread)

    def hooks_changed(self) -> None:
        """Tell the block."""
        for points in self.changed:
            points.find_out()


class ResidualPoints(StandIn):
    """The two points of one block, [batch pos d_model] each; an edit is what the rest of the model reads.

    It stands in for the block's forward.
    """

    def __init__(self, block: nn.Module, layer: int, running: Any):
        super().__init__(block)
        self.block = block
        self.running = running
        self.pre, self.post = _ResidualPoint(), _ResidualPoint()
        self.pre.name, self.post.name = f"blocks.{layer}.{RESID_PRE}", f"blocks.{layer}.{RESID_POST}"
        self.is_hooked = False
        for point in (self.pre, self.post):
            point.changed.append(self)

    def find_out(self) -> None:
        """Whether a hook waits, a plain attribute on which torch.compile guards."""
        with self.running.lock:
            self.is_hooked = has_hooks(self.pre) or has_hooks(self.post)
            self.running.hooks_changed()

    @property
    def tables(self) -> list[HookTable]:
        """torch's tables of their hooks."""
        return [*self.pre.tables, *self.post.tables]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_hooked:
            return self.original(*args, **kwargs)
        return _hooked(self, args, kwargs)


@uncompiled
def _hooked(points: ResidualPoints, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        args = (_edited(points.pre, args[0]), *args[1:])
    else:
        kwargs = {**kwargs, "hidden_states": _edited(points.pre, kwargs["hidden_states"])}
    output = points.original(*args, **kwargs)
    if isinstance(output, tuple):
        return (_edited(points.post, output[0]), *output[1:])
    return _edited(points.post, output)


def install_residual(block: nn.Module, layer: int, running: Any) -> ResidualPoints:
    """Put points before and after a block of a Hugging Face model."""
    points = ResidualPoints(block, layer, running)
    points.put_on(block)
    return points


def check_in_place(hf_model: nn.Module, residual: list[ResidualPoints]) -> None:
    """Raise HookError where a block that has points is no part of the model any more."""
    there = {id(module) for module in hf_model.modules()}
    for number, points in enumerate(residual):
        if id(points.block) not in there:
            raise HookError(
                f"Block {number} of {type(hf_model).__name__} was replaced since the hook points were put "
                "in, so hooks could not fire there. Call detach() on this RoutedModel, detach(hf_model) if "
                "the new block has points, too, and then attach(hf_model)."
            )


class Reached(Exception):
    """Breaks a forward off."""


def residual_before(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a block would read: `run` is broken off there."""
    found: list[Tensor] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except Reached:
        return found[0]
    finally:
        handle.remove()
    raise HookError("The forward did not reach the block at which it was to stop.")


def _edited(point: HookPoint, value: Float[Tensor, "batch pos *d_model"]) -> Tensor:
    if not has_hooks(point):
        return value
    edited = point(value)
    if not isinstance(edited, Tensor) or edited.shape != value.shape:
        given = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
        raise HookError(
            f"{point.name}: a hook returned {given} where shape {tuple(value.shape)} is needed. "
            "Return a tensor of the same shape, or None to leave it as it is."
        )
    return edited.to(value.dtype)
