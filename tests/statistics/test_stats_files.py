"""Files of RoutingStats: what is saved comes back; what is cut, altered or damaged is refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lens.errors import DataError, MoELensError
from moe_lens.statistics import routing_stats
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.plan import SteeringPlan
from tests.statistics.sums import Hooked, random_stats, random_tables, same
from tests.tiny_models import (
    tokens,
)


def test_a_saved_file_gives_back_the_same_statistics(tmp_path: Path, hooked: Hooked) -> None:
    stats = RoutingStats.from_cache(hooked("qwen3_moe").run_with_cache(tokens())[1])
    stats.save(tmp_path / "stats.safetensors")
    assert same(RoutingStats.load(tmp_path / "stats.safetensors"), stats, exact=True)
    assert os.listdir(tmp_path) == ["stats.safetensors"]


def test_the_metadata_say_which_model_it_was(tmp_path: Path) -> None:
    stats = random_stats(0)
    stats.save(tmp_path / "s")
    raw = (tmp_path / "s").read_bytes()  # safetensors: u64 length of the header, JSON header, data
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    about = {key: json.loads(value) for key, value in header["__metadata__"].items()}
    assert about["shape"] == {"model": "m", "layers": [0, 2], "n_experts": 4, "top_k": 2}
    assert about["n_tokens"] == 5
    assert header["counts"]["dtype"] == "I64"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old = tmp_path / "s", random_stats(0)
    old.save(path)

    def fail(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(routing_stats, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        random_stats(1).save(path)
    assert same(RoutingStats.load(path), old, exact=True)
    assert os.listdir(tmp_path) == ["s"]


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    random_stats(0).save(tmp_path / "whole")
    raw = (tmp_path / "whole").read_bytes()
    for length in [*range(0, 40), *range(40, len(raw), 23), len(raw) - 1]:
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(DataError, match="cut"):
            RoutingStats.load(tmp_path / "cut")


def _altered(path: Path, tensors: dict[str, Any] | None = None, **metadata: Any) -> Path:
    """A file like that of random_stats(0), with some tensors or metadata replaced (None: left out)."""
    random_stats(0).save(path)
    raw = path.read_bytes()
    about = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    for key, value in metadata.items():
        about[key] = json.dumps(value)
    content = {**load_file(path), **(tensors or {})}
    save_file({k: v for k, v in content.items() if v is not None}, path, about)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "moe_lens.SteeringPlan"},
        {"kind": None},
        {"schema": 3},
        {"schema": True},
        {"n_tokens": 4},
        {"n_tokens": 0},
        {"n_tokens": "5"},
        {"n_tokens": None},
        {"shape": None},
        {"shape": {"model": "m"}},
        {"shape": {"model": "m", "layers": [0], "n_experts": 4, "top_k": 2}},
        {"shape": {"model": "m", "layers": [2, 0], "n_experts": 4, "top_k": 2}},
        {"shape": {"model": "m", "layers": [0, 2], "n_experts": 5, "top_k": 2}},
        {"shape": {"model": "m", "layers": [0, 2], "n_experts": 4, "top_k": 3}},
        {"shape": {"model": "m", "layers": [0, 2], "n_experts": 4, "top_k": 2, "more": 1}},
        {"tensors": {"counts": None}},
        {"tensors": {"more": torch.zeros(1)}},
        {"tensors": {"counts": torch.zeros(2, 4, dtype=torch.int64)}},
        {"tensors": {"counts": torch.full((2, 4), 2.5)}},
        {"tensors": {"counts": torch.tensor([[-5, 5, 5, 5], [5, 5, 0, 0]])}},
        {"tensors": {"weight_sums": torch.zeros(2, 3, dtype=torch.float64)}},
        {"tensors": {"weight_sums": torch.full((2, 4), torch.nan, dtype=torch.float64)}},
        {"tensors": {"probability_sums": torch.full((2, 4), torch.inf, dtype=torch.float64)}},
    ],
    ids=str,
)
def test_an_altered_file_is_refused_by_its_name(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="altered"):
        RoutingStats.load(_altered(tmp_path / "altered", **change))


def test_other_files_are_refused_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("[1, 2, 3]" * 20)
    save_file({"counts": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "folder").mkdir()
    for name in ("text", "weights", "folder", "missing"):
        with pytest.raises(DataError, match=name):
            RoutingStats.load(tmp_path / name)


class _Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_and_does_not_run(tmp_path: Path, write: Any) -> None:
    with (tmp_path / "evil").open("wb") as file:
        write(_Payload(tmp_path / "ran"), file)
    with pytest.raises(DataError, match="evil"):
        RoutingStats.load(tmp_path / "evil")
    with pytest.raises(MoELensError, match="evil"):
        SteeringPlan.load(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(_Payload(tmp_path / "ran")))  # the payload itself works
    assert (tmp_path / "ran").exists()


def test_a_saved_file_gives_back_every_table(tmp_path: Path) -> None:
    stats = random_tables(3)
    stats.save(tmp_path / "s")
    loaded = RoutingStats.load(tmp_path / "s")
    assert loaded.tensors().keys() == stats.tensors().keys()
    for name, tensor in stats.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
        assert loaded.tensors()[name].dtype == tensor.dtype


def test_files_of_schema_1_are_read(tmp_path: Path) -> None:
    stats = random_stats(0).summary()
    about = {"kind": "moe_lens.RoutingStats", "schema": 1, **stats.about()}
    save_file(stats.tensors(), tmp_path / "old", {key: json.dumps(value) for key, value in about.items()})
    assert same(RoutingStats.load(tmp_path / "old"), stats, exact=True)


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "co_routing.coactivation": lambda t: t.flip(1),
    "co_routing.transitions": lambda t: t + 1,
    "co_routing.overlaps": lambda t: t + 10**6,
    "co_routing.n_adjacent": lambda t: t + 10**6,
    "per_prompt.counts": lambda t: t[:-1],
    "per_prompt.n_tokens": lambda t: t + 1,
    "per_prompt.probability_sums": lambda t: t * torch.nan,
    "by_position.counts": lambda t: t.double(),
    "by_position.n_tokens": lambda t: t.flip(0) + torch.arange(len(t)),
    "vocabulary.keys": lambda t: t.flip(0),
    "vocabulary.counts": lambda t: t + 1,
    "vocabulary.totals": lambda t: t + 1,
    "entropy_sums": lambda t: t * torch.nan,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    stats = random_tables(0)
    stats.save(tmp_path / "damaged")
    raw = (tmp_path / "damaged").read_bytes()
    about = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    tensors = stats.tensors()
    for changed in ({name: DAMAGE[name](tensors[name]).contiguous()}, {f"{name}.more": torch.zeros(1)}):
        save_file({**tensors, **changed}, tmp_path / "damaged", about)
        with pytest.raises(DataError, match="damaged"):
            RoutingStats.load(tmp_path / "damaged")
