"""Processes that are killed at random moments: whoever goes on, in whatever number, gets the very same."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_lens import RoutedModel, RoutingStats, SteeringPlan, organisms
from moe_lens.engines import collect_distributed, merge_distributed
from moe_lens.statistics.collection import collect_routing
from tests.engines.harness_files import write_tasks
from tests.engines.worker import PROMPTS, SETTINGS, count
from tests.families import broad

WORKER = str(Path(__file__).parent / "worker.py")
# Forked from a clean process: one forked from pytest's may wait for ever on a lock that a thread held there.
CLEAN = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
PATIENCE = 300
"""Seconds until a process that does not end fails its test."""


def content(stats: RoutingStats) -> dict[str, Any]:
    return {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in stats.tensors().items()}


def expected() -> dict[str, Any]:
    model = organisms.load("specialised", wrapper=RoutedModel)
    return content(collect_routing(model, PROMPTS, **SETTINGS))


def start(n: int, folder: Path, out: Path, pause: float) -> "subprocess.Popen[bytes]":
    """n processes under torchrun, or one by itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, WORKER, str(folder), str(out), str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def units(folder: Path) -> int:
    return len([*folder.glob("0*.safetensors")])


@broad
@pytest.mark.parametrize("resumed_by", [1, 3])
def test_torchrun_with_one_of_two_killed_goes_on_with_any_number(resumed_by: int, tmp_path: Path) -> None:
    folder, out, later = tmp_path / "counts", tmp_path / "out", tmp_path / "later"
    out.mkdir()
    later.mkdir()
    draw = random.Random(resumed_by)
    n_before = draw.randint(1, 4)
    job = start(2, folder, out, pause=0.3)
    while units(folder) < n_before:
        assert job.poll() is None
        time.sleep(0.02)
    time.sleep(draw.random() * 0.3)
    os.kill(int((out / f"pid-{draw.randint(0, 1)}").read_text()), signal.SIGKILL)
    assert job.wait(PATIENCE) != 0
    assert n_before <= units(folder) < len(PROMPTS) / 4  # killed in the middle
    assert not [*out.glob("stats-*")]
    assert start(resumed_by, folder, later, pause=0.0).wait(PATIENCE) == 0
    found = [content(RoutingStats.load(path)) for path in later.glob("stats-*")]
    assert found == [expected()] * resumed_by  # each process returns the whole result
    assert content(merge_distributed(folder)) == expected()
    assert not [*folder.glob(".*")]  # neither claims nor halves of files


@broad
def test_torchrun_of_the_command_shares_a_benchmark(tmp_path: Path) -> None:
    conflicts = organisms.world("null").conflicts("test")[:6]
    write_tasks(tmp_path, conflicts)
    for name, expert in (("plan", 5), ("reverse", 1)):
        SteeringPlan(deactivate=[(2, expert)]).save(tmp_path / f"{name}.json")
    given = ["evaluate", "null", "plan.json", "conflict_mc", "--reverse", "reverse.json", "--n-random", "1"]
    given += ["--alpha", "0.3", "--wrapper", "routed", "--harness", "--include-path", "."]
    command = [sys.executable, "-c", "import sys; from moe_lens.cli import main; sys.exit(main())", *given]
    settings = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def done(*start: str, more: list[str]) -> str:
        whole = [*start, *command, *more]
        return subprocess.run(
            whole, cwd=tmp_path, env={**os.environ, **settings}, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    said = done(more=["--out", "alone"])
    shared = done(*torchrun, "--no-python", more=["--folder", "runs", "--out", "shared"])
    assert shared == said.replace("alone", "shared")  # the first process alone prints
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()
    assert len([*(tmp_path / "runs").glob("measure-*")]) >= 5


@broad
@pytest.mark.skipif(CLEAN is None, reason="forks")
def test_who_survives_does_the_rest_and_nothing_is_lost_in_many_kills(tmp_path: Path) -> None:
    assert CLEAN is not None
    CLEAN.set_forkserver_preload(["tests.engines.worker", "moe_lens.organisms"])
    model, draw, alone = organisms.load("specialised", wrapper=RoutedModel), random.Random(0), expected()

    def started() -> Any:
        worker = CLEAN.Process(
            target=count, args=(tmp_path, 0.5)
        )  # 6 seconds of pauses, so all kills are early
        worker.start()
        return worker

    n_kills, n_before = 0, 0
    workers = [started() for _ in range(2)]
    while n_kills < 8 and units(tmp_path) < len(PROMPTS) / 4 - 4:
        time.sleep(draw.random() * 0.4)
        victim = draw.choice(workers)
        if victim.is_alive():
            victim.kill()
            victim.join()
            n_kills += 1
            assert units(tmp_path) >= n_before
            n_before = units(tmp_path)
            workers[workers.index(victim)] = started()
    for worker in workers:
        worker.join(PATIENCE)
        assert worker.exitcode == 0
    assert content(collect_distributed(model, PROMPTS, tmp_path, unit=1, **SETTINGS)) == alone
    assert content(merge_distributed(tmp_path)) == alone
    assert not [*tmp_path.glob(".*")]
