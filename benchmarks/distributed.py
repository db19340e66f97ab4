"""Counting with two processes, and what kills cost: `python benchmarks/distributed.py [prompts] [kills]`

Default: 1,024 prompts and 50 kills. First the wall time of `collect_routing`, of `collect_distributed` in one
process, and in two: both are forked from this one, which has the model, so that start-up (some seconds of
imports a process, the same for any number) is not in it. On *specialised*, which has half a million
parameters, so that what is done around its forwards counts most, and on an OLMoE of hidden size 256 (8 layers
of 64 experts). Two processes that know nothing of each other, each with `collect_routing` on half the
prompts, show what two cores of this machine give at all. It needs two idle cores; the load of the machine is
printed beside the result, and so is the CPU time, of two processes its mean.

Then two processes count, one of them is killed (SIGKILL) at a random moment and another is forked in its
place, again and again; at the end no unit may be missing, and the result must be that of `collect_routing`,
bit for bit.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import one_thread
from models import olmoe

from moe_lens import RoutedModel, RoutingStats, collect_routing, organisms
from moe_lens.engines import collect_distributed, merge_distributed

FORK = multiprocessing.get_context("fork")
SETTINGS: dict[str, Any] = {"per_prompt": True, "vocabulary": True, "batch_size": 8, "progress": False}
UNIT, ROUNDS = 8, 3


def same(one: RoutingStats, other: RoutingStats) -> bool:
    """Whether all numbers are equal."""
    pairs = zip(one.tensors().items(), other.tensors().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def in_processes(*works: Callable[[], object]) -> float:
    """Each in a forked process, to the end of all; returns the mean of their CPU times."""
    taken = FORK.SimpleQueue()

    def timed(work: Callable[[], object]) -> None:
        start = time.process_time()
        work()
        taken.put(time.process_time() - start)

    workers = [FORK.Process(target=timed, args=(work,)) for work in works]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return sum(taken.get() for _ in workers) / len(works)


def speed(model: RoutedModel, prompts: list[str]) -> None:
    """Wall and CPU times, alternated."""
    names = ("collect_routing", "its halves, apart", "1 process", "2 processes")
    found: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    halves = [partial(collect_routing, model, half, **SETTINGS) for half in (prompts[::2], prompts[1::2])]
    for _ in range(ROUNDS):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                together = partial(collect_distributed, model, prompts, folder, unit=UNIT, **SETTINGS)
                works: dict[str, list[Callable[[], object]]] = {
                    "collect_routing": [partial(collect_routing, model, prompts, **SETTINGS)],
                    "its halves, apart": [*halves],
                    "1 process": [together],
                    "2 processes": [together, together],
                }
                start = time.perf_counter()
                cpu[name].append(in_processes(*works[name]))
                found[name].append(time.perf_counter() - start)
    print(f"{len(prompts)} prompts, units of {UNIT} batches of 8; load average {os.getloadavg()[0]:.1f}")
    for name, times in found.items():
        print(f"  {name:17} {median(times):6.2f} s ({min(times):.2f}–{max(times):.2f})")
    for what, each in (("wall time", found), ("CPU time", cpu)):
        for one, two in (("collect_routing", "its halves, apart"), ("1 process", "2 processes")):
            ratios = [a / b for a, b in zip(each[one], each[two], strict=True)]
            print(f"  {one} ÷ {two}, {what}: {median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")


def kills(model: RoutedModel, prompts: list[str], n_kills: int) -> None:
    """Kill one of two, again and again; fails if anything is lost or differs."""
    draw, killed, lost, n_jobs = random.Random(0), 0, 0, 0
    expected = collect_routing(model, prompts, **SETTINGS)
    while killed < n_kills:
        n_jobs += 1
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)

            def work(folder: Path = folder) -> None:
                collect_distributed(model, prompts, folder, unit=1, **SETTINGS)

            def fork(work: Callable[[], None] = work) -> Any:
                worker = FORK.Process(target=work)
                worker.start()
                return worker

            workers, before = [fork(), fork()], 0
            while killed < n_kills and all(worker.is_alive() for worker in workers):
                time.sleep(draw.random() * 0.4)
                place = draw.randrange(2)
                if workers[place].is_alive():
                    workers[place].kill()
                    workers[place].join()
                    killed += 1
                    there = len([*folder.glob("0*.safetensors")])
                    lost += there < before
                    before = there
                    workers[place] = fork()
            for worker in workers:
                worker.join()
            assert same(merge_distributed(folder), expected), "the result differs"
            left = [*folder.glob(".*")]
            assert not left, left
    print(f"{killed} kills in {n_jobs} jobs of {len(prompts)} prompts: {lost} units lost, all results equal")


def main(n_prompts: int = 1024, n_kills: int = 50) -> None:
    """Both."""
    one_thread()
    model = organisms.load("specialised", wrapper=RoutedModel)
    conflicts = organisms.world("specialised").conflicts("test")
    prompts = [conflicts[number % len(conflicts)].open_book for number in range(n_prompts)]
    speed(model, prompts)
    larger = RoutedModel(olmoe(256, model.cfg.d_vocab), model.tokenizer)
    speed(larger, prompts)
    if n_kills:
        kills(model, prompts, n_kills)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
