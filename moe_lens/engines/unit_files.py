"""Work in units, one file each, done by as many processes as look into the folder.

    folder = UnitFolder(path)
    folder.work(units)                                     # a Unit: a name, and what writes the file
    folder.one(unit, read)                                 # a file that one process writes and all read

A file that stands there is done: it was written whole, under a name that says all that it depends on. Beside
a unit in work lies its claim, `.NAME.claim`. Claims save work and decide nothing: two processes that do one
unit write the same file twice. So nothing waits for a process that died, and there is nothing to time out:
who dies on this machine is seen at once, who dies on another when its claim has not been renewed for a
minute.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from moe_lens.errors import DataError

Content = TypeVar("Content")

RENEWED: Final = 5.0
"""Seconds after which a claim is renewed."""
STALE: Final = 60.0
"""Seconds without that, after which it is nobody's."""
LONGEST_WAIT: Final = 1.0
"""Seconds between two looks into the folder, at most."""


class Unit(NamedTuple):
    """A piece of work: the name of its file, and what writes it, atomically, to the path that it is given."""

    name: str
    write: Callable[[Path], None]


@dataclass(eq=False)
class UnitFolder:
    """A folder of unit files, made if it is not there. Raises DataError where it cannot be."""

    path: Path
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Claim -> when it was last renewed, and since when it has been so: clocks of machines differ."""

    def __post_init__(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.path} cannot be made a folder ({error}); give another one.") from error

    def work(self, units: Iterable[Unit], done: Callable[[int], object] = lambda _: None) -> list[str]:
        """Have all units done, here or by others; their names, in order.

        A unit that another process works on is kept until its file is there, and done here if that process
        dies.

        Args:
            done: is told the number of each unit whose file is there, once.
        """
        names: list[str] = []
        waiting: dict[int, Unit] = {}
        for number, unit in enumerate(units):
            names.append(unit.name)
            waiting[number] = unit
            self._attempt(waiting, done)
        pause = 0.01
        while waiting:
            if not self._attempt(waiting, done):
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_WAIT)
        self._tidy(names)
        return names

    def one(self, unit: Unit, read: Callable[[Path], Content]) -> Content:
        """What a unit's file holds; a damaged one is written anew."""
        path = self.path / unit.name
        for _ in range(2):
            self.work([unit])
            try:
                return read(path)
            except DataError:
                path.unlink(missing_ok=True)
        self.work([unit])
        return read(path)

    def _tidy(self, names: Iterable[str]) -> None:
        """Take away the claims of those who died just after they had written their file."""
        left = {entry.name for entry in os.scandir(self.path) if entry.name.startswith(".")}
        for name in names if left else ():
            if f".{name}.claim" in left:
                self._is_abandoned(self.path / f".{name}.claim", name)

    def _attempt(self, waiting: dict[int, Unit], done: Callable[[int], object]) -> bool:
        """Look at the newest unit first, then at those that others had; whether any of them is done now."""
        before = len(waiting)
        for number in [*reversed(waiting)]:
            if self._is_done(waiting[number]):
                del waiting[number]
                done(number)
        return len(waiting) < before

    def _is_done(self, unit: Unit) -> bool:
        path = self.path / unit.name
        if path.exists():
            return True
        with self._claimed(unit.name) as is_mine:
            if not is_mine:
                return False
            if not path.exists():  # since somebody may have ended it before the claim was ours
                unit.write(path)
        return True

    @contextmanager
    def _claimed(self, name: str) -> Iterator[bool]:
        """Whether the unit is ours for as long as the context lasts."""
        claim = self.path / f".{name}.claim"
        if not _made(claim) and not (self._is_abandoned(claim, name) and _made(claim)):
            yield False
            return
        ended = threading.Event()
        renewing = threading.Thread(target=_renew, args=(claim, ended), daemon=True)
        renewing.start()
        try:
            yield True
        finally:
            ended.set()
            renewing.join()
            claim.unlink(missing_ok=True)

    def _is_abandoned(self, claim: Path, name: str) -> bool:
        """Whether a claim's owner is dead, or silent for too long; then it is taken away."""
        try:
            renewed, owner = claim.stat().st_mtime_ns, claim.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return True  # gone meanwhile
        now = time.monotonic()
        last, since = self._seen.get(name, (None, now))
        self._seen[name] = (renewed, now if last != renewed else since)
        host, _, process = owner.rpartition(" ")
        is_dead = host == socket.gethostname() and process.isdecimal() and not _is_alive(int(process))
        if not is_dead and now - self._seen[name][1] < STALE:
            return False
        claim.unlink(missing_ok=True)
        if is_dead:  # what it was writing
            for left in self.path.glob(f".{name}.*.tmp"):
                left.unlink(missing_ok=True)
        return True


def _made(claim: Path) -> bool:
    """Whether the claim could be made: one process makes it, on shared file systems, too."""
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    except OSError as error:
        raise DataError(f"{claim.parent} cannot be written to ({error}); give another folder.") from error
    try:
        os.write(handle, f"{socket.gethostname()} {os.getpid()}".encode())
    except OSError as error:  # no place left
        claim.unlink(missing_ok=True)
        raise DataError(
            f"{claim} cannot be written ({error}); make room, and run the command again."
        ) from error
    finally:
        os.close(handle)
    return True


def _renew(claim: Path, ended: threading.Event) -> None:
    while not ended.wait(RENEWED):
        with suppress(OSError):  # taken away, by a process that took this one for dead
            os.utime(claim)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True
