"""An interrupted count continues where it stopped and gives the very result of an uninterrupted one."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoeForCausalLM

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics import collection as resumable
from moe_lens.statistics import counting
from moe_lens.statistics.collection import collect_routing, collect_to_file
from moe_lens.statistics.routing_stats import RoutingStats
from tests.tiny_models import tokens

PROMPTS = [" ".join(f"w{(7 * i + j) % 46}" for j in range(2 + i % 5)) for i in range(22)]
EVERYTHING = {"per_prompt": True, "positions": True, "vocabulary": True}
N_BATCHES = 6  # of 22 prompts, four a batch


class Forwards:
    """Counts a model's forwards; the one of number `stop_at` raises instead of running."""

    def __init__(self) -> None:
        self.number = 0
        self.stop_at: int | None = None
        self.error: BaseException = KeyboardInterrupt()

    def restart(self, stop_at: int | None = None) -> None:
        self.number, self.stop_at = 0, stop_at


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    found, forward = Forwards(), OlmoeForCausalLM.forward

    def counting(self: OlmoeForCausalLM, *args: Any, **kwargs: Any) -> Any:
        if found.number == found.stop_at:
            raise found.error
        found.number += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(OlmoeForCausalLM, "forward", counting)
    return found


@pytest.fixture
def model(hooked: Callable[..., HookedMoE]) -> HookedMoE:
    return hooked("olmoe")


@pytest.fixture
def always_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A partial file after every batch, however long writing takes."""
    monkeypatch.setattr(resumable, "SAVING_SHARE", float("inf"))


def count(model: HookedMoE, path: Path, prompts: Any = PROMPTS, **options: Any) -> RoutingStats:
    given = {"about": "test", "batch_size": 4, "progress": False, **EVERYTHING, **options}
    return collect_to_file(model, prompts, path, **given)


def interrupted(model: HookedMoE, path: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        count(model, path, **options)


def content(stats: RoutingStats) -> dict[str, Any]:
    """Every number of it, as bytes."""
    found = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in stats.tensors().items()}
    return {**found, "about": stats.about()}


def uninterrupted(model: HookedMoE, prompts: Any = PROMPTS, **options: Any) -> dict[str, Any]:
    given = {"batch_size": 4, "progress": False, **EVERYTHING, **options}
    return content(collect_routing(model, prompts, **given))


def partials(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


def test_without_interruption_it_is_collect_routing_and_a_file(model: HookedMoE, tmp_path: Path) -> None:
    stats = count(model, tmp_path / "s.safetensors")
    assert content(stats) == uninterrupted(model)
    assert content(RoutingStats.load(tmp_path / "s.safetensors")) == content(stats)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    assert {"per_prompt", "by_position", "vocabulary"} <= {name.split(".")[0] for name in content(stats)}


@pytest.mark.parametrize("stop_at", range(N_BATCHES))
def test_an_interrupted_run_counts_only_what_was_left(
    stop_at: int, model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    forwards.restart(stop_at)
    interrupted(model, path)
    assert not path.exists()
    assert len(partials(tmp_path)) == (stop_at > 0)
    forwards.restart()
    stats = count(model, path)
    assert forwards.number == N_BATCHES - stop_at
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert content(RoutingStats.load(path)) == content(stats) == uninterrupted(model)


def test_a_run_may_be_interrupted_again_and_again(
    model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    for _ in range(N_BATCHES - 1):
        forwards.restart(1)
        interrupted(model, path)
        assert len(partials(tmp_path)) == 1
    forwards.restart()
    stats = count(model, path)
    assert forwards.number == 1
    assert content(stats) == uninterrupted(model)


@pytest.mark.parametrize("span", ["all", "last", "w7"])
def test_spans_continue_too(span: str, model: HookedMoE, forwards: Forwards, tmp_path: Path) -> None:
    prompts = [f"{prompt} w7" for prompt in PROMPTS]
    forwards.restart(3)
    interrupted(model, tmp_path / "s", prompts=prompts, span=span)
    forwards.restart()
    stats = count(model, tmp_path / "s", prompts=prompts, span=span)
    assert forwards.number == 3
    assert content(stats) == uninterrupted(model, prompts, span=span)


def test_token_prompts_and_generators_continue(model: HookedMoE, forwards: Forwards, tmp_path: Path) -> None:
    rows = [tokens(1, 2 + i % 4, seed=i)[0] for i in range(10)]
    forwards.restart(2)
    with pytest.raises(KeyboardInterrupt):
        count(model, tmp_path / "s", prompts=iter(rows))
    forwards.restart()
    stats = count(model, tmp_path / "s", prompts=iter(rows))
    assert forwards.number == 1
    assert content(stats) == uninterrupted(model, rows)


def _interrupting(at: int, seen: list[int]) -> Callable[..., Any]:
    """A trace function that raises KeyboardInterrupt at the `at`-th line of counting and adding."""

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            seen.append(frame.f_lineno)
            if len(seen) == at:
                raise KeyboardInterrupt
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        places = {
            ("collect_to_file", resumable.__file__),
            ("run", resumable.__file__),
            ("end", counting.__file__),
        }
        return line if (code.co_name, code.co_filename) in places else None

    return call


@pytest.mark.broad
@pytest.mark.parametrize("prompts", ["a list", pytest.param("a generator", marks=pytest.mark.broad)])
def test_it_may_be_interrupted_at_every_line(prompts: str, model: HookedMoE, tmp_path: Path) -> None:
    """Ctrl-C may arrive anywhere; a batch is never counted twice, nor left out."""
    few = PROMPTS[:3]

    def given() -> Any:
        return few if prompts == "a list" else iter(few)

    expected = uninterrupted(model, few, batch_size=2)
    at = 0
    for at in range(1, 200):
        path, seen = tmp_path / f"{at}.safetensors", []
        before = sys.gettrace()
        sys.settrace(_interrupting(at, seen))
        try:
            count(model, path, prompts=given(), batch_size=2)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        stats = count(model, path, prompts=given(), batch_size=2)
        assert content(stats) == expected, f"interrupted at line {seen[-1]}"
        assert content(RoutingStats.load(path)) == expected
        if len(seen) < at:  # it ran to its end
            break
    assert 20 < at < 199


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 3},
        {"span": "last"},
        {"special_tokens": True},
        {"about": "another model"},
        {"per_prompt": False},
        {"positions": False},
        {"vocabulary": False},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_run_with_other_settings_starts_afresh(
    other: dict[str, Any], model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    forwards.restart(4)
    interrupted(model, path)
    forwards.restart()
    stats = count(model, path, **other)
    assert forwards.number == (8 if "batch_size" in other else N_BATCHES)
    plain = {name: value for name, value in other.items() if name != "about"}
    assert content(stats) == uninterrupted(model, **plain)
    assert partials(tmp_path) == []


class Chosen:
    """A span that is a function; its repr, as that of a lambda, may come again with another object."""

    def __init__(self, places: list[int], digest: str | None = None) -> None:
        self.places = places
        if digest is not None:
            self.digest = digest

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.isin(torch.arange(len(tokens)), torch.tensor(self.places))

    def __repr__(self) -> str:
        return "<function <lambda> at 0x7f0000000000>"


@pytest.mark.parametrize("how", ["one", "a list", "lists"])
def test_a_span_that_is_a_function_never_continues_another_ones_count(
    how: str, model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    def spans(places: list[int]) -> Any:
        mixed: list[Any] = ["last", *[Chosen(places)] * (len(PROMPTS) - 1)]
        return {"one": Chosen(places), "a list": mixed, "lists": tuple(mixed)}[how]

    path = tmp_path / "s.safetensors"
    forwards.restart(3)
    interrupted(model, path, span=spans([0]))
    forwards.restart()
    stats = count(model, path, span=spans([1, 2]))
    assert forwards.number == N_BATCHES
    assert content(stats) == uninterrupted(model, span=spans([1, 2]))
    assert not partials(tmp_path)


@pytest.mark.parametrize(("digest", "left"), [("columns 0 and 1", N_BATCHES - 3), ("others", N_BATCHES)])
def test_a_span_that_says_what_it_does_continues(
    digest: str, left: int, model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    forwards.restart(3)
    interrupted(model, path, span=Chosen([0, 1], "columns 0 and 1"))
    forwards.restart()
    stats = count(model, path, span=Chosen([0, 1], digest))
    assert forwards.number == left
    assert content(stats) == uninterrupted(model, span=Chosen([0, 1]))


def test_runs_into_other_files_do_not_meet(model: HookedMoE, forwards: Forwards, tmp_path: Path) -> None:
    forwards.restart(4)
    interrupted(model, tmp_path / "s.safetensors")
    kept = partials(tmp_path)
    for name in ("t.safetensors", "s", "safetensors", "[s].safetensors", "?.safetensors"):
        forwards.restart()
        count(model, tmp_path / name)
        assert forwards.number == N_BATCHES
        assert partials(tmp_path) == kept
    forwards.restart()
    count(model, tmp_path / "s.safetensors")
    assert forwards.number == 2


@pytest.mark.parametrize("name", ["[s].safetensors", "s*.x", "a b.safetensors", "no-ending"])
def test_odd_file_names_continue(name: str, model: HookedMoE, forwards: Forwards, tmp_path: Path) -> None:
    forwards.restart(4)
    interrupted(model, tmp_path / name)
    forwards.restart()
    count(model, tmp_path / name)
    assert forwards.number == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("damage", [b"", b"nonsense", "half", "one bit"])
def test_a_damaged_partial_file_is_passed_over(
    damage: bytes | str, model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    forwards.restart(2)
    interrupted(model, path)
    (older,) = partials(tmp_path)
    good = older.read_bytes()
    forwards.restart(2)
    interrupted(model, path)
    (newer,) = partials(tmp_path)
    whole = newer.read_bytes()
    parts = {"half": whole[: len(whole) // 2], "one bit": bytes([whole[0] ^ 1]) + whole[1:]}
    newer.write_bytes(damage if isinstance(damage, bytes) else parts[damage])
    older.write_bytes(good)
    forwards.restart()
    stats = count(model, path)
    assert forwards.number == N_BATCHES - 2  # from the older one
    assert content(stats) == uninterrupted(model)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.usefixtures("always_saving")
def test_an_error_in_a_late_prompt_names_it_also_after_a_resume(
    model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    bad = [*PROMPTS[:17], "", *PROMPTS[18:]]
    for forwards_run in (0, 0):  # its window of 32 batches is read before any of it runs
        forwards.restart()
        with pytest.raises(DataError, match=r"[Pp]rompt 17\b"):
            count(model, tmp_path / "s", prompts=bad)
        assert forwards.number == forwards_run
    assert partials(tmp_path) == []


def test_a_span_missing_in_a_late_prompt_names_it_also_after_a_resume(
    model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    prompts = [f"{prompt} w45" for prompt in PROMPTS]
    prompts[18] = "w1 w2"
    for _ in range(2):
        with pytest.raises(DataError, match=r"prompt 18\b"):
            count(model, tmp_path / "s", prompts=prompts, span="w45")


def test_other_errors_leave_the_partial_file_too(
    model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    forwards.restart(3)
    forwards.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        count(model, tmp_path / "s")
    forwards.restart()
    stats = count(model, tmp_path / "s")
    assert forwards.number == 3
    assert content(stats) == uninterrupted(model)


def test_an_older_result_stays_until_the_new_one_is_complete(
    model: HookedMoE, forwards: Forwards, tmp_path: Path
) -> None:
    old = content(count(model, tmp_path / "s", prompts=PROMPTS[:3]))
    forwards.restart(2)
    interrupted(model, tmp_path / "s")
    assert content(RoutingStats.load(tmp_path / "s")) == old


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "at least one"),
        (iter(()), {}, "at least one"),
        (PROMPTS, {"batch_size": 0}, "batch_size"),
        (PROMPTS, {"batch_size": -4}, "batch_size"),
    ],
)
def test_bad_arguments_are_named(
    prompts: Any, options: dict[str, Any], words: str, model: HookedMoE, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        count(model, tmp_path / "s", prompts=prompts, **options)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, signal, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import OlmoeForCausalLM
from moe_lens.statistics import collection as resumable
from moe_lens.model import HookedMoE
from tests.statistics.test_resumable import PROMPTS, EVERYTHING
from tests.tiny_models import tiny_model, tokenizer

resumable.SAVING_SHARE = float("inf")
forward, number = OlmoeForCausalLM.forward, 0
def dying(self, *args, **kwargs):
    global number
    number += 1
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kwargs)
OlmoeForCausalLM.forward = dying
model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
settings = {"about": "test", "batch_size": 4, "progress": False, **EVERYTHING}
resumable.collect_to_file(model, PROMPTS, sys.argv[1], **settings)
"""


@pytest.mark.broad
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_continues(model: HookedMoE, forwards: Forwards, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", _KILLED, str(path)], cwd=root, env=environment, check=False)
    assert run.returncode == -9
    assert not path.exists()
    stats = count(model, path)
    assert forwards.number == N_BATCHES - 4
    assert content(stats) == uninterrupted(model)
    assert partials(tmp_path) == []


@pytest.fixture(autouse=True)
def _untraced() -> Iterator[None]:
    before = sys.gettrace()
    yield
    assert sys.gettrace() is before
