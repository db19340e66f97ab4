"""What moe_lens raises. Every message names the object, the condition that failed and the remedy."""

import sys
import warnings


class MoELensError(RuntimeError):
    """Base of all errors raised by moe_lens; catch it to catch them all.

    >>> from moe_lens import MoELensError, SteeringPlan
    >>> try:
    ...     SteeringPlan(activate=[(0, 1), (0, 1)])
    ... except MoELensError as error:
    ...     print(error)
    activate names (0, 1) (layer, expert) more than once.
    """


class UnsupportedRouterError(MoELensError):
    """The model has a router (or none at all) that moe_lens has no routing rule for."""


class RouterMismatchError(MoELensError):
    """A routing rule and the router it stands for give different numbers."""


class HookError(MoELensError):
    """A routing hook could not fire, or returned something the router cannot use."""


class PlanError(MoELensError):
    """A steering plan is malformed, impossible, or made for another model."""


class DataError(MoELensError):
    """Statistics, prompts, masks or files that are empty, damaged or do not belong together."""


_BETWEEN = (
    "moe_lens",
    "transformer_lens",
    "jaxtyping",
    "torch",
    "contextlib",
)  # whose lines are none of the user's


def warn(message: str) -> None:
    """A UserWarning that points at the user's line: the nearest one outside moe_lens."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
