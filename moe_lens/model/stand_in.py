"""`StandIn`: an object in the place of a module's `forward`.

    class Loud(StandIn):
        def __call__(self, *args, **kwargs):
            print("runs")
            return self.original(*args, **kwargs)
    Loud(module).put_on(module)
    ...
    stands_on(module, Loud).take_off(module)

It costs less than torch's hooks, torch.compile guards on what it asks, and the module's own hooks, children
and keys are those that it had. An object, not a closure: a deep copy of the module then gets one of its own.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from moe_lens.model.private_names import take_off
from moe_lens.model.state import Bound


class StandIn:
    """What subclasses share: the forward that was there before, and the way back."""

    def __init__(self, module: nn.Module):
        on_instance = vars(module).get("forward")
        self.original: Callable[..., Any] = on_instance or module.forward
        self.was_on_instance = on_instance is not None  # accelerate, for one, puts its own forward there

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "original": Bound.of(self.original)}

    def mode_changed(self) -> None:
        """Called when hooks come or go."""

    def put_on(self, module: Any) -> None:
        """Take the place of the module's forward."""
        module.forward = self

    def take_off(self, module: nn.Module) -> None:
        """Give the module its forward back, also under accelerate's own."""
        take_off(module, self, self.original, self.was_on_instance)
