"""Files: whole or not at all, nothing else in the folder; of a stated kind, with a digest."""

import json
import os
import stat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_lens.errors import DataError, MoELensError, PlanError
from moe_lens.files import FileKind, atomic_write, digest_of

HEAD = ("kind", "schema", "digest")


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

    with pytest.raises(DataError if error is OSError else error, match="the disk is full"):
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


# Kinds of files

KIND = FileKind(
    "test.Kind", schema=2, reads=(1, 2), words="things", error=PlanError, former_names=("test things",)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.uint8, torch.bool,
]  # fmt: skip
TENSORS = {
    "scalar": torch.tensor(3),
    "none": torch.zeros(0, 4),
    "bfloat16": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
    "strided": torch.arange(12).reshape(3, 4).t(),
    "bool": torch.tensor([True, False]),
    "needs_grad": torch.ones(2, requires_grad=True),
}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def equal(first: Any, second: Any) -> bool:
    """Equality of JSON values under which NaN is NaN, and 1 is neither 1.0 nor True."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


@settings(max_examples=60, deadline=None)
@given(content=st.dictionaries(st.text().filter(lambda name: name not in HEAD), json_values, max_size=4))
def test_json_content_comes_back(content: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        KIND.save_json(f"{folder}/a.json", content)
        assert equal(KIND.load_json(f"{folder}/a.json"), {"schema": 2, **content})


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text("abc.", min_size=1),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
    ),
    seed=st.integers(0, 10**6),
)
def test_tensors_come_back_bit_for_bit(shapes: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.rand(shape, generator=generator) * 9).to(dtype)
        for name, (dtype, shape) in shapes.items()
    }
    with TemporaryDirectory() as folder:
        KIND.save_tensors(f"{folder}/a", tensors, {"seed": seed})
        about, loaded = KIND.load_tensors(f"{folder}/a")
        KIND.save_tensors(f"{folder}/b", dict(reversed(tensors.items())), {"seed": seed})
        assert Path(folder, "a").read_bytes() == Path(folder, "b").read_bytes()
    assert about == {"schema": 2, "seed": seed}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_odd_tensors_and_odd_content_come_back(tmp_path: Path) -> None:
    content = {"keys": {1: "one", 2: "two"}, "tuple": (1, (2,)), "nan": float("nan"), "text": "− é 漢"}
    for path in (tmp_path / "first", tmp_path / "second"):
        KIND.save_tensors(path, TENSORS, content)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    about, loaded = KIND.load_tensors(tmp_path / "first")
    assert equal(about, {"schema": 2, **as_json(content)})
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].nan_to_num(7), tensor.nan_to_num(7))
    KIND.save_json(tmp_path / "c.json", content)
    assert equal(KIND.load_json(tmp_path / "c.json"), {"schema": 2, **as_json(content)})


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    whole = torch.arange(6)
    KIND.save_tensors(tmp_path / "a", {"one": whole, "same": whole, "part": whole[2:4]}, {})
    _, loaded = KIND.load_tensors(tmp_path / "a")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        "one": [0, 1, 2, 3, 4, 5], "same": [0, 1, 2, 3, 4, 5], "part": [2, 3],
    }  # fmt: skip


def test_every_bit_of_the_tensors_is_under_the_digest(tmp_path: Path) -> None:
    KIND.save_tensors(tmp_path / "a", {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor([5])}, {})
    raw = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert len(raw) - start == 16
    for bit in range(8 * start, 8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(flipped)
        with pytest.raises(PlanError, match="its digest is not that of its content"):
            KIND.load_tensors(tmp_path / "a")


def test_swapped_names_shapes_and_dtypes_are_under_the_digest() -> None:
    x, y = torch.zeros(4), torch.ones(4)
    digests = {
        digest_of({}, tensors)
        for tensors in (
            {"a": x, "b": y}, {"a": y, "b": x}, {"a": x, "c": y}, {"a": x.reshape(2, 2), "b": y},
            {"a": x.int(), "b": y}, {"a": x}, {},
        )
    }  # fmt: skip
    assert len(digests) == 7
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 1, "b": 3})
    assert digest_of({"a": (1, 2)}) == digest_of({"a": [1, 2]})


def test_half_a_character_in_somebodys_text_comes_back(tmp_path: Path) -> None:
    """What UTF-8 cannot hold is escaped, and other text is not."""
    content = {"label": "half \ud83d", "other": "ü"}
    KIND.save_json(tmp_path / "a.json", content)
    assert KIND.load_json(tmp_path / "a.json") == {"schema": 2, **content}
    KIND.save_tensors(tmp_path / "a", {"x": torch.ones(2)}, content)
    assert KIND.load_tensors(tmp_path / "a")[0] == {"schema": 2, **content}
    KIND.save_json(tmp_path / "b.json", {"other": "ü"})
    assert "ü" in (tmp_path / "b.json").read_text(encoding="utf-8")


def test_a_byte_order_mark_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{"kind": "test.Kind", "schema": 1, "n": 3}'.encode())
    assert KIND.load_json(path) == {"schema": 1, "n": 3}
    for load in (KIND.load_json, KIND.load_tensors):
        with pytest.raises(PlanError, match="cannot be read"):
            load(tmp_path)


def test_a_file_by_hand_needs_no_digest_and_an_edited_one_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"kind": "test.Kind", "schema": 1, "n": 3}')
    assert KIND.load_json(path) == {"schema": 1, "n": 3}
    KIND.save_json(path, {"n": 3})
    edited = json.loads(path.read_text())
    assert list(edited) == ["kind", "schema", "digest", "n"]
    path.write_text(json.dumps({**edited, "n": 4}))
    with pytest.raises(PlanError, match=r"a\.json is damaged: .* take out its field 'digest'"):
        KIND.load_json(path)
    del edited["digest"]
    path.write_text(json.dumps({**edited, "n": 4}))
    assert KIND.load_json(path) == {"schema": 2, "n": 4}


def test_a_file_written_anew_by_an_editor_keeps_its_digest(tmp_path: Path) -> None:
    """White space and the order of keys say nothing."""
    path = tmp_path / "a.json"
    KIND.save_json(path, {"b": [1.5, None], "a": {"y": 1, "x": 2}})
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, sort_keys=True, indent=8))
    assert KIND.load_json(path) == {"schema": 2, "b": [1.5, None], "a": {"y": 1, "x": 2}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"kind": "test.Other", "schema": 2}, "no file of things: its kind is 'test.Other', not 'test.Kind'"),
        ({"schema": 2}, "its kind is None"),
        ([1, 2], "its kind is None"),
        ({"kind": ["test.Kind"], "schema": 2}, "its kind is"),
        ({"kind": "test.Kind", "schema": 3}, "of schema 1 or 2: its schema is 3"),
        ({"kind": "test.Kind", "schema": True}, "its schema is True"),
        ({"kind": "test.Kind", "schema": [2]}, "its schema is"),
        ({"kind": "test.Kind"}, "its schema is None"),
        ({"kind": "test.Kind", "schema": 2, "digest": None}, "digest"),
    ],
    ids=str,
)
def test_other_kinds_and_schemas_are_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=says):
        KIND.load_json(path)
    save_file({"x": torch.zeros(1)}, tmp_path / "a", {"moe_lens": json.dumps(content)})
    with pytest.raises(PlanError, match=says):
        KIND.load_tensors(tmp_path / "a")


def test_a_file_of_another_format_is_named_by_its_kind(tmp_path: Path) -> None:
    """Tensors where JSON is expected, and the reverse; what has no kind is not given one."""
    other = FileKind("test.Other", 1, (1,), "other things")
    other.save_tensors(tmp_path / "tensors", {"x": torch.ones(2)}, {})
    other.save_json(tmp_path / "json", {})
    for load, name in ((KIND.load_json, "tensors"), (KIND.load_tensors, "json")):
        with pytest.raises(
            PlanError, match=f"{name} is no file of things: its kind is 'test.Other', not 'test.Kind'"
        ):
            load(tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights", {"format": "pt"})
    with pytest.raises(PlanError, match=r"weights is no file of things: its kind is None"):
        KIND.load_json(tmp_path / "weights")
    KIND.save_tensors(tmp_path / "own", {"x": torch.ones(2)}, {})
    with pytest.raises(PlanError, match="own cannot be read as things"):
        KIND.load_json(tmp_path / "own")


def test_former_names_and_old_headers_are_read(tmp_path: Path) -> None:
    old = {"kind": '"test things"', "schema": "1", "shape": '{"layers": [0, 2]}'}
    save_file({"x": torch.ones(2)}, tmp_path / "old", old)
    about, tensors = KIND.load_tensors(tmp_path / "old")
    assert about == {"schema": 1, "shape": {"layers": [0, 2]}}
    assert tensors["x"].tolist() == [1, 1]


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\x80\x04K\x01."], ids=repr)
def test_what_cannot_be_read_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "broken").write_bytes(raw)
    for load in (KIND.load_json, KIND.load_tensors):
        with pytest.raises(PlanError, match="broken cannot be read as things"):
            load(tmp_path / "broken")
        with pytest.raises(PlanError, match="absent cannot be read as things"):
            load(tmp_path / "absent")


def test_a_header_that_is_no_json_is_named(tmp_path: Path) -> None:
    for number, metadata in enumerate(({"format": "pt"}, {"moe_lens": "{"}, None)):
        save_file({"x": torch.zeros(1)}, tmp_path / f"a{number}", metadata)
        with pytest.raises(PlanError, match=f"a{number}"):
            KIND.load_tensors(tmp_path / f"a{number}")


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    target, link = tmp_path / "deep" / "target.json", tmp_path / "link.json"
    KIND.save_json(target, {"n": 1})
    link.symlink_to(target)
    KIND.save_json(link, {"n": 2})
    assert link.is_symlink()
    assert not target.is_symlink()
    assert KIND.load_json(target)["n"] == KIND.load_json(link)["n"] == 2
    assert sorted(os.listdir(tmp_path)) == ["deep", "link.json"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(DataError, match="cannot be written"):
            KIND.save_json(path, {})
        with pytest.raises(MoELensError, match="cannot be read"):
            KIND.load_json(path)
        with pytest.raises(MoELensError, match="cannot be read"):
            KIND.load_tensors(path)
    assert os.listdir(tmp_path) == []


def test_a_name_as_long_as_a_name_may_be_is_written(tmp_path: Path) -> None:
    KIND.save_json(tmp_path / ("x" * 255), {"a": 1})
    assert KIND.load_json(tmp_path / ("x" * 255))["a"] == 1


def test_a_full_disk_is_named_and_leaves_nothing() -> None:
    """/dev/full has no place for anything."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def fill() -> None:
        with atomic_write("full.json"), Path("/dev/full").open("w") as full:
            full.write("x")

    with pytest.raises(DataError, match=r"full\.json cannot be written: .*No space left"):
        fill()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DataError, match="its folder is read-only"):
            KIND.save_json(tmp_path / "a.json", {})
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"a\.json cannot be written"):
        KIND.save_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(DataError, match="is a folder"):
        KIND.save_json(tmp_path, {})
    monkeypatch.setattr("moe_lens.files.os.access", lambda *_: False)  # what a user other than root meets
    with pytest.raises(DataError, match="its folder is read-only"):
        KIND.save_tensors(tmp_path / "a", {}, {})
    assert os.listdir(tmp_path) == ["file"]
