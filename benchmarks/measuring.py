"""What the benchmarks share: ways run in turn, CPU time beside a reference, waits, peak memory, tables.

One thread, and CPU time instead of wall time, so that what else the machine does counts little; all ways in
turn in one process, so that what is left of it meets all of them alike.
"""

import ctypes
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2")
"""Operations that wait for a value of the device; `.item()` and branches are the first of them."""


@dataclass(frozen=True)
class Timed:
    """A way's CPU times, one a round."""

    seconds: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """To the reference, each within its round."""
        return [mine / its for mine, its in zip(self.seconds, self.reference, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"


def alternately(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    reference: str | None = None,
    *,
    warm: bool = False,
) -> dict[str, Timed]:
    """Time each way once a round, in turn; the reference is the first, unless named.

    Unless they are `warm`, the first run of each is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in () if warm else ways.values():
        run()
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(list(ways)):
            start = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - start)
    of_reference = tuple(seconds[reference or next(iter(ways))])
    return {name: Timed(tuple(values), of_reference) for name, values in seconds.items()}


def print_timed(timed: Mapping[str, Timed], what: str = "way") -> None:
    """A table: median CPU time, and the median ratio to the reference with the range of all rounds."""
    rows = [[name, f"{each.median:.3f}", str(each)] for name, each in timed.items()]
    print_table([what, "CPU time, s", "× the first"], rows)


def print_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A markdown table with columns of even width."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines) + "\n", flush=True)


class Waits(TorchDispatchMode):
    """Counts the operations that wait for a value on the device, on whatever device they run.

    Copies to the host are not among them: on the CPU there are none to see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in args[1]
        )
        if name in WAITING or by_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def waits(run: Callable[[], Any]) -> int:
    """How many operations of a run wait for a value."""
    with Waits() as waiting:
        run()
    return waiting.counts.total()


def peak_so_far() -> float:
    """Largest memory of this process so far, in MB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_child(run: Callable[[], Any], small: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, MB that memory grew at most) of a run, in a forked process that ends with it.

    `small` runs first, so that what is loaded or allocated once is not counted. Models are shared with this
    process, and no run finds memory that another one has left.
    """
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # else a child grows into what this process has freed
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def measure() -> None:
        with torch.no_grad():
            small()
            before, start = peak_so_far(), time.process_time()
            run()
        theirs.send((time.process_time() - start, peak_so_far() - before))

    child = context.Process(target=measure)
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit("A measured process ended early; its error is above.") from None
    finally:
        child.join()


def one_thread() -> None:
    """For the whole process; OMP_NUM_THREADS holds where it is given."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
