"""The processes of `test_many_processes.py`: `count`, or `python worker.py FOLDER OUT PAUSE`.

The command counts into FOLDER, waits PAUSE seconds in each unit, and saves what it got as OUT/stats-RANK.
Under torchrun it is in a process group of gloo, as a user's script may be; nothing is said in it.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed

from moe_lens import RoutedModel, RoutingStats, organisms
from moe_lens.engines import collect_distributed
from moe_lens.model.state import Pass
from moe_lens.statistics.collection import Counting

PROMPTS = [c.open_book for c in organisms.world("specialised").conflicts("detection")]
SETTINGS: dict[str, Any] = {"per_prompt": True, "vocabulary": True, "batch_size": 4, "progress": False}


def count(folder: Path, pause: float) -> RoutingStats:
    """Count into FOLDER with whoever else does, and wait `pause` seconds in each unit."""
    of_each = Counting.of_each

    def slowly(self: Counting, batches: Sequence[Any], among: Pass) -> list[RoutingStats]:
        time.sleep(pause)
        return of_each(self, batches, among)

    Counting.of_each = slowly  # type: ignore[method-assign]
    model = organisms.load("specialised", wrapper=RoutedModel)
    return collect_distributed(model, PROMPTS, folder, unit=1, **SETTINGS)


def main(folder: Path, out: Path, pause: float) -> None:
    """Count with the others."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    rank = os.environ.get("RANK", str(os.getpid()))
    (out / f"pid-{rank}").write_text(str(os.getpid()), encoding="utf-8")
    count(folder, pause).save(out / f"stats-{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
