"""Files of RoutingStats: what is saved comes back; what is cut, altered or damaged is refused."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_lens.errors import DataError, MoELensError
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
    about = json.loads(header["__metadata__"]["moe_lens"])
    assert (about["kind"], about["schema"]) == ("moe_lens.RoutingStats", 4)
    assert about["shape"] == {"model": "m", "layers": [0, 2], "n_experts": 4, "top_k": 2}
    assert about["n_tokens"] == 5
    assert header["counts"]["dtype"] == "I64"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old = tmp_path / "s", random_stats(0)
    old.save(path)

    def fail(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("moe_lens.files.save_file", fail)
    with pytest.raises(DataError, match="No space"):
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


def _write(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> Path:
    """A file as schemas 1 and 2 were written: one JSON value a metadata key, no digest."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        path,
        {key: json.dumps(value) for key, value in about.items()},
    )
    return path


def _altered(path: Path, tensors: dict[str, Any] | None = None, **metadata: Any) -> Path:
    """A file of random_stats(0) without digest, with some tensors or metadata replaced (None: left out)."""
    stats = random_stats(0)
    about = {"kind": "moe_lens.RoutingStats", "schema": 2, **stats.about(), **metadata}
    return _write(path, {**stats.tensors(), **(tensors or {})}, about)


def test_the_file_that_is_altered_below_can_be_read(tmp_path: Path) -> None:
    assert same(RoutingStats.load(_altered(tmp_path / "altered")), random_stats(0), exact=True)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "moe_lens.SteeringPlan"},
        {"kind": None},
        {"schema": 5},
        {"schema": 0},
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
    assert same(RoutingStats.load(_write(tmp_path / "old", stats.tensors(), about)), stats, exact=True)


def test_files_of_schema_2_are_read_with_every_table(tmp_path: Path) -> None:
    stats = random_tables(1)
    about = {"kind": "moe_lens.RoutingStats", "schema": 2, **stats.about()}
    loaded = RoutingStats.load(_write(tmp_path / "old", stats.tensors(), about))
    assert (loaded.shape, loaded.tensors().keys()) == (stats.shape, stats.tensors().keys())
    for name, tensor in stats.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)


_SAVES = """
import sys
from moe_lens.detection import risk_difference
from moe_lens.statistics import RouteRecord, RoutingStats
from tests.statistics.sums import random_cache, random_tables
folder = sys.argv[1]
stats = random_tables(2)
stats.save(f"{folder}/stats")
risk_difference(stats, random_tables(3)).save(f"{folder}/scores")
RouteRecord.from_cache(random_cache(0, (2, 3)), weights=True).save(f"{folder}/routes")
"""


@pytest.mark.broad
def test_identical_results_are_identical_files_in_every_process(tmp_path: Path) -> None:
    digests = []
    for seed in ("1", "2", "3"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", _SAVES, str(folder)], cwd=root, env=environment, check=True)
        digests.append({path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()})
    assert digests[0] == digests[1] == digests[2]
    assert sorted(digests[0]) == ["routes", "scores", "stats"]


@pytest.mark.parametrize("name", ["probability_sums", "weight_sums", "entropy_sums"])
def test_a_flipped_bit_that_only_the_digest_can_notice_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "flipped"
    random_stats(0).save(path)
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start + json.loads(raw[8:start])[name]["data_offsets"][0]] ^= 1  # the last bit of a mantissa
    path.write_bytes(raw)
    with pytest.raises(DataError, match="flipped is damaged: its digest"):
        RoutingStats.load(path)


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
    about, tensors = {"kind": "moe_lens.RoutingStats", "schema": 2, **stats.about()}, stats.tensors()
    for changed in ({name: DAMAGE[name](tensors[name])}, {f"{name}.more": torch.zeros(1)}):
        with pytest.raises(DataError, match="damaged"):
            RoutingStats.load(_write(tmp_path / "damaged", {**tensors, **changed}, about))
