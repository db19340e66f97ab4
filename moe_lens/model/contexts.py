"""`hooks` contexts of a model that may end in any order.

    class RoutedModel(..., HooksOfTheirOwn): ...

TransformerLens removes the hooks of a context by its level, which counts the contexts that are open: the
first of two to end would take the other's hooks, and of two wrappers around one model each the other's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from transformer_lens.HookedRootModule import HookedRootModule

_LEVELS = count(1)


class HooksOfTheirOwn(HookedRootModule):
    """A module whose `hooks` remove their own hooks: no level is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self._levels: list[int] = []  # of the contexts that are open

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As in TransformerLens."""
        level = next(_LEVELS)
        self._levels.append(level)
        self.context_level = level - 1  # to which it adds one
        try:
            with super().hooks(*args, **kwargs):
                try:
                    yield self
                finally:
                    self.context_level = level
        finally:
            self._levels.remove(level)
            self.context_level = self._levels[-1] if self._levels else 0
