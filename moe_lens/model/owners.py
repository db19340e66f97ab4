"""Which threads set a model's hooks, and which threads may run the model under them.

Hooks belong to the model. A thread may run it under its own hooks, and under those of a thread that set them
before it started (a thread that streams a generation, for one). It may not where it was there when another
thread set them, where two threads have set hooks, or at the same time as the thread that set them.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet, ref

from transformer_lens.hook_points import HookPoint

from moe_lens.model.private_names import HOOK_TABLES


class Owner:
    """A thread that set a hook, and those that were there at the time."""

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        self.thread = ref(threading.current_thread())
        self.others = WeakSet(thread for thread in threading.enumerate() if thread.ident != self.ident)


class HookTable(OrderedDict[int, Any]):
    """torch's table of a module's hooks, which tells when it changes, by whatever way, and who set which."""

    def __init__(self, changed: Callable[[], None], robbed: Callable[[threading.Thread], None]):
        super().__init__()
        self.changed = changed
        self.robbed = robbed
        self.owners: dict[int, Owner] = {}

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        self.owners[key] = Owner()
        self.changed()

    def __delitem__(self, key: int) -> None:
        super().__delitem__(key)
        owner = self.owners.pop(key, None)
        thread = None if owner is None else owner.thread()
        if thread is not None and thread is not threading.current_thread():
            self.robbed(thread)  # contexts of two threads, one in the other: TransformerLens counts levels
        self.changed()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookTable":
        twin = memo[id(self)] = HookTable(copy.deepcopy(self.changed, memo), copy.deepcopy(self.robbed, memo))
        for key, hook in self.items():
            OrderedDict.__setitem__(twin, key, copy.deepcopy(hook, memo))
            twin.owners[key] = Owner()
        return twin

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)


class WatchedPoint(HookPoint):
    """A HookPoint that tells when its hooks change, by whatever way, and when another thread takes some."""

    def __init__(self) -> None:
        super().__init__()
        self._watch_tables()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle; it holds no hooks, which are functions of some place in a program."""
        super().__setstate__(state)
        self._watch_tables()

    def _watch_tables(self) -> None:
        for table in HOOK_TABLES:
            vars(self)[table] = HookTable(self.hooks_changed, self.robbed)

    @property
    def tables(self) -> list[HookTable]:
        """torch's tables of its hooks."""
        return [getattr(self, table) for table in HOOK_TABLES]

    def hooks_changed(self) -> None:
        """Called whenever hooks come or go."""

    def robbed(self, thread: threading.Thread) -> None:
        """Called when a hook of this thread was taken away by another one."""


class Owners:
    """Those of all hooks of a model; false where there are none."""

    def __init__(self) -> None:
        self._owners: dict[int, list[Owner]] = {}
        self._tables: Callable[[], Iterable[HookTable]] | None = None
        self.robbed: WeakSet[threading.Thread] = WeakSet()
        """Threads whose hooks another one has taken away; their next forward is refused."""

    def __reduce__(self) -> Any:
        return Owners, ()  # threads are no part of a pickle

    def find(self, tables: Callable[[], Iterable[HookTable]]) -> None:
        """Note who set the hooks of these tables, when it is asked next."""
        self._tables = tables

    def _find(self) -> None:
        if self._tables is not None:
            self._owners = {}
            for table in self._tables():
                for owner in table.owners.values():
                    self._owners.setdefault(owner.ident, []).append(owner)
        self._tables = None

    def refuse(self, busy: Iterable[int]) -> bool:
        """Whether the current thread must not run the model.

        Args:
            busy: idents of the threads that run it, the current one among them.
        """
        busy, ident = set(busy), threading.get_ident()
        if not self.robbed and busy <= {ident} and self._owners.keys() <= {ident}:
            return False  # one thread does all
        current = threading.current_thread()
        if current in self.robbed:
            self.robbed.discard(current)
            return True
        of_others = [owner for other, owners in self._owners.items() if other != ident for owner in owners]
        if len(self._owners) > 1 or any(current in owner.others for owner in of_others):
            return True
        is_owner = ident in self._owners
        return len(busy) > 1 and (is_owner or any(owner.ident in busy for owner in of_others))

    def __bool__(self) -> bool:
        self._find()
        return len(self._owners) > 0 or len(self.robbed) > 0
