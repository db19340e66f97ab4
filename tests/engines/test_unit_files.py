"""Units of work shared through a folder: each done once, whoever dies, whoever comes late."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.engines import unit_files
from moe_lens.engines.unit_files import Unit, UnitFolder
from moe_lens.errors import DataError
from moe_lens.files import atomic_write


class Writer:
    """Makes units, and knows which of them were written, by whom they were asked for."""

    def __init__(self, pause: float = 0.0) -> None:
        self.written: list[str] = []
        self.pause = pause

    def unit(self, name: str) -> Unit:
        def write(path: Path) -> None:
            time.sleep(self.pause)
            self.written.append(name)
            with atomic_write(path) as temporary:
                temporary.write_text(name)

        return Unit(name, write)

    def units(self, n: int) -> list[Unit]:
        return [self.unit(f"unit-{number}") for number in range(n)]


def claim(folder: Path, name: str, owner: str) -> Path:
    path = folder / f".{name}.claim"
    path.write_text(owner)
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def after(seconds: float, action: Callable[[], object]) -> threading.Thread:
    thread = threading.Timer(seconds, action)
    thread.start()
    return thread


def test_all_units_are_done_once_and_named_in_order(tmp_path: Path) -> None:
    writer, done = Writer(), []
    names = UnitFolder(tmp_path / "new" / "folder").work(writer.units(3), done.append)
    assert names == writer.written == ["unit-0", "unit-1", "unit-2"]
    assert done == [0, 1, 2]
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == set(names)  # no claim is left


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    (tmp_path / "unit-1").write_text("there")
    writer, done = Writer(), []
    UnitFolder(tmp_path).work(writer.units(3), done.append)
    assert writer.written == ["unit-0", "unit-2"]
    assert done == [0, 1, 2]
    assert (tmp_path / "unit-1").read_text() == "there"


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(1, 12))
def test_many_workers_do_each_unit_once_and_all_see_all(
    tmp_path_factory: pytest.TempPathFactory, n_workers: int, n_units: int
) -> None:
    folder, writer, names = tmp_path_factory.mktemp("units"), Writer(0.002), []
    workers = [
        threading.Thread(target=lambda: names.append(UnitFolder(folder).work(writer.units(n_units))))
        for _ in range(n_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert names == [[f"unit-{number}" for number in range(n_units)]] * n_workers
    assert sorted(writer.written) == sorted(names[0])
    assert sorted(path.name for path in folder.iterdir()) == sorted(names[0])


def test_a_unit_that_another_process_works_on_is_waited_for(tmp_path: Path) -> None:
    owner = claim(tmp_path, "unit-0", f"{socket.gethostname()} {os.getppid()}")
    thread = after(0.3, lambda: (tmp_path / "unit-0").write_text("theirs"))
    writer, done = Writer(), []
    assert UnitFolder(tmp_path).work(writer.units(3), done.append) == ["unit-0", "unit-1", "unit-2"]
    thread.join()
    assert writer.written == ["unit-1", "unit-2"]
    assert done == [1, 2, 0]
    assert (tmp_path / "unit-0").read_text() == "theirs"
    assert owner.exists()  # its owner's business


def test_what_a_dead_process_had_begun_is_done_at_once_and_its_remains_go(tmp_path: Path) -> None:
    claim(tmp_path, "unit-1", f"{socket.gethostname()} {dead_process()}")
    (tmp_path / ".unit-1.abc.tmp").write_text("half")
    (tmp_path / ".unit-10.abc.tmp").write_text("somebody else's")
    writer = Writer()
    UnitFolder(tmp_path).work(writer.units(3))
    assert writer.written == ["unit-0", "unit-1", "unit-2"]
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == {".unit-10.abc.tmp"}


def test_the_claim_of_one_who_died_after_his_work_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "unit-1").write_text("there")
    dead = claim(tmp_path, "unit-1", f"{socket.gethostname()} {dead_process()}")
    living = claim(tmp_path, "unit-0", f"{socket.gethostname()} {os.getppid()}")
    (tmp_path / "unit-0").write_text("there")
    UnitFolder(tmp_path).work(Writer().units(2))
    assert not dead.exists()
    assert living.exists()


def test_a_silent_process_elsewhere_is_given_up_and_one_that_renews_its_claim_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_files, "STALE", 0.5)
    monkeypatch.setattr(unit_files, "LONGEST_WAIT", 0.05)
    claim(tmp_path, "unit-0", f"elsewhere {dead_process()}")
    alive = claim(tmp_path, "unit-1", "elsewhere 1")
    ended = threading.Event()
    threading.Thread(target=lambda: beat(alive, ended)).start()
    thread = after(1.5, lambda: (tmp_path / "unit-1").write_text("theirs"))
    writer = Writer()
    try:
        UnitFolder(tmp_path).work(writer.units(2))
    finally:
        ended.set()
    thread.join()
    assert writer.written == ["unit-0"]
    assert (tmp_path / "unit-1").read_text() == "theirs"


def beat(path: Path, ended: threading.Event) -> None:
    moment = time.time()
    while not ended.wait(0.02):
        moment += 1  # a clock of its own, which runs too fast
        os.utime(path, (moment, moment))


def test_a_claim_is_renewed_while_its_unit_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_files, "RENEWED", 0.02)
    seen: list[int] = []

    def write(path: Path) -> None:
        for _ in range(3):
            seen.append((tmp_path / ".unit.claim").stat().st_mtime_ns)
            time.sleep(0.2)
        path.write_text("")

    UnitFolder(tmp_path).work([Unit("unit", write)])
    assert seen[0] < seen[1] < seen[2]


def test_after_an_error_the_unit_is_free_for_others(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        UnitFolder(tmp_path).work([Unit("unit-0", fail)])
    assert [*tmp_path.iterdir()] == []
    writer = Writer()
    UnitFolder(tmp_path).work(writer.units(1))
    assert writer.written == ["unit-0"]


def test_one_file_is_written_by_one_and_a_damaged_one_anew(tmp_path: Path) -> None:
    writer = Writer()

    def read(path: Path) -> str:
        if (text := path.read_text()) != "unit-0":
            raise DataError(f"{path} is damaged.")
        return text

    assert UnitFolder(tmp_path).one(writer.unit("unit-0"), read) == "unit-0"
    assert UnitFolder(tmp_path).one(writer.unit("unit-0"), read) == "unit-0"
    assert len(writer.written) == 1
    (tmp_path / "unit-0").write_text("unit")
    assert UnitFolder(tmp_path).one(writer.unit("unit-0"), read) == "unit-0"
    assert len(writer.written) == 2


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made a folder"):
        UnitFolder(tmp_path / "file")
