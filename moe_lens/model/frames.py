"""Whether a forward that was noted still runs. torch tells of its end after an Exception, not after Ctrl-C.

forward.frame = frame_of_call()            # within a hook on the module
alive = still_running(forwards)            # later, in the same thread
"""

import sys
from collections.abc import Sequence
from types import FrameType

from torch import nn

from moe_lens.model.state import ForwardState

_MODULES = nn.Module.__module__


def frame_of_call() -> FrameType | None:
    """The frame of the innermost call of a module that runs; None where there is none (compiled code)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_globals.get("__name__") == _MODULES:
            return frame
        frame = frame.f_back
    return None


def still_running(forwards: Sequence[ForwardState]) -> int:
    """How many of this thread's forwards, outermost first, still run; the rest was broken off."""
    stack: set[int] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        stack.add(id(frame))
        frame = frame.f_back
    dead = (n for n, each in enumerate(forwards) if each.frame is not None and id(each.frame) not in stack)
    return next(dead, len(forwards))
