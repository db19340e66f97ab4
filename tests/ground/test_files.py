"""atomic_write: the reader finds the old file or the whole new one, and nothing else in the folder."""

import os
import stat
from pathlib import Path

import pytest

from moe_lens.files import atomic_write


def test_the_file_appears_with_what_was_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("half of the n")
        assert target.read_text() == "old"
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error("the disk is full")

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_in_the_first_write_leaves_an_empty_folder(tmp_path: Path) -> None:
    def write_nothing() -> None:
        with atomic_write(tmp_path / "a.txt"):
            raise ValueError("nothing")

    with pytest.raises(ValueError, match="nothing"):
        write_nothing()
    assert os.listdir(tmp_path) == []


def test_missing_folders_are_made_and_a_string_is_a_path(tmp_path: Path) -> None:
    with atomic_write(str(tmp_path / "deep" / "er" / "a.txt")) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "deep" / "er" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask_which_is_left_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
    finally:
        left = os.umask(before)
    assert left == umask
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask
