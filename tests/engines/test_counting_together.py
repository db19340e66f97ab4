"""Counting shared through a folder: the very result of `collect_routing`, and nothing stale in it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, organisms, steer_hooks, with_top_k
from moe_lens.detection.detecting import detect
from moe_lens.engines import collect_distributed, detect_distributed, merge_distributed
from moe_lens.errors import DataError
from moe_lens.model.state import Pass
from moe_lens.statistics.collection import Counting, collect_routing
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.groups import ContrastiveGroups
from moe_lens.text.pairs import ContrastivePairs
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokenizer

PROMPTS = [" ".join(f"w{(7 * i + j) % 46}" for j in range(2 + i % 5)) for i in range(22)]
EVERYTHING = {"per_prompt": True, "positions": True, "vocabulary": True, "outputs": True}
CONFLICTS = organisms.world("specialised").conflicts("detection")


def content(stats: RoutingStats) -> dict[str, Any]:
    """Every number of it, as bytes."""
    found = {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in stats.tensors().items()}
    return {**found, "about": stats.about()}


def alone(model: Any, prompts: Any = PROMPTS, **options: Any) -> dict[str, Any]:
    return content(collect_routing(model, prompts, **{"batch_size": 3, "progress": False, **options}))


def together(model: Any, folder: Path, prompts: Any = PROMPTS, **options: Any) -> dict[str, Any]:
    given = {"batch_size": 3, "unit": 2, "progress": False, **options}
    return content(collect_distributed(model, prompts, folder, **given))


def unit_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0].isdigit())


@pytest.fixture
def model(hooked: Callable[..., HookedMoE]) -> HookedMoE:
    return hooked("olmoe")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of batches of the units that were counted by a model."""
    found: list[int] = []
    of_each = Counting.of_each

    def noting(self: Counting, batches: Sequence[Any], among: Pass) -> list[RoutingStats]:
        parts = of_each(self, batches, among)
        found.append(len(parts))
        return parts

    monkeypatch.setattr(Counting, "of_each", noting)
    return found


@pytest.mark.parametrize("unit", [1, 3, 100])
def test_it_is_collect_routing(unit: int, model: HookedMoE, tmp_path: Path, ran: list[int]) -> None:
    expected = alone(model, **EVERYTHING)
    assert {"per_prompt.counts", "by_position.counts", "vocabulary.keys", "outputs.max_abs"} <= set(expected)
    assert together(model, tmp_path, unit=unit, **EVERYTHING) == expected
    assert ran == {1: [1] * 8, 3: [3, 3, 2], 100: [8]}[unit]
    assert content(merge_distributed(tmp_path)) == expected


@some_kinds
def test_on_every_kind_of_router_in_both_wrappers(recipe: str, tmp_path: Path) -> None:
    for wrap in (RoutedModel, HookedMoE.from_hf):
        model = wrap(tiny_model(recipe), tokenizer())
        assert together(model, tmp_path, **EVERYTHING) == alone(model, **EVERYTHING)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_whatever_the_prompts_the_batches_and_the_units(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    model = _specialised()
    words = st.lists(
        st.sampled_from(["Question", ":", "what", "is", "the", "capital"]), min_size=1, max_size=9
    )
    prompts = [" ".join(each) for each in data.draw(st.lists(words, min_size=1, max_size=12))]
    options = {
        "batch_size": data.draw(st.none() | st.integers(1, 4)),
        "batch_tokens": data.draw(st.none() | st.integers(1, 30)),
        "span": data.draw(st.sampled_from([None, "all", "last", slice(-1, None)])),
        "per_prompt": data.draw(st.booleans()),
    }
    folder, unit = tmp_path_factory.mktemp("units"), data.draw(st.integers(1, 4))
    assert together(model, folder, prompts, unit=unit, **options) == alone(model, prompts, **options)


_SPECIALISED: list[RoutedModel] = []


def _specialised() -> RoutedModel:
    if not _SPECIALISED:
        _SPECIALISED.append(organisms.load("specialised", wrapper=RoutedModel))
    return _SPECIALISED[0]


def test_any_number_of_workers_gives_the_very_same(tmp_path: Path, ran: list[int]) -> None:
    """Threads with a model each, as processes have; a worker that comes late as well."""
    prompts = [conflict.open_book for conflict in CONFLICTS[:40]]
    expected = alone(_specialised(), prompts, per_prompt=True)
    for n_workers in (1, 2, 3):
        ran.clear()
        folder, found = tmp_path / str(n_workers), []
        models = [organisms.load("specialised", wrapper=RoutedModel) for _ in range(n_workers)]

        def work_on(model: Any, folder: Path = folder, found: list[Any] = found) -> None:
            found.append(together(model, folder, prompts, per_prompt=True))

        work = [threading.Timer(0.1 * (model is models[-1]), work_on, [model]) for model in models]
        for each in work:
            each.start()
        for each in work:
            each.join()
        assert found == [expected] * n_workers
        assert ran == [2] * 7  # no unit twice


def test_an_interrupted_run_goes_on_with_more_workers(
    model: HookedMoE, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, of_each = alone(model, **EVERYTHING), Counting.of_each

    def dying(self: Counting, batches: Sequence[Any], among: Pass) -> list[RoutingStats]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        return of_each(self, batches, among)

    monkeypatch.setattr(Counting, "of_each", dying)
    with pytest.raises(KeyboardInterrupt):
        together(model, tmp_path, **EVERYTHING)
    assert len(unit_files(tmp_path)) == 2
    with pytest.raises(DataError, match="lists no job of routing statistics, though 2 unit files"):
        merge_distributed(tmp_path)
    monkeypatch.setattr(Counting, "of_each", of_each)
    assert together(model, tmp_path, **EVERYTHING) == expected
    assert ran == [2, 2, 2, 2]
    assert together(model, tmp_path, **EVERYTHING) == expected
    assert ran == [2, 2, 2, 2]  # nothing anew


@pytest.mark.broad
@pytest.mark.parametrize(
    "other",
    [
        {"span": "last"}, {"span": "all"}, {"batch_size": 4}, {"per_prompt": True}, {"outputs": True},
        {"prompts": [*PROMPTS[:-1], "w1 w2"]}, {"prompts": PROMPTS[::-1]}, {"about": "another model"},
        {"hooks": steer_hooks(SteeringPlan(deactivate=[(0, 1)]))},
        {"hooks": steer_hooks(SteeringPlan(deactivate=[(0, 1)]), strength=1.0)},
        {"hooks": steer_hooks(SteeringPlan(deactivate=[(0, 1)]), positions="prompt")},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_stale_is_used_after_a_change(
    other: dict[str, Any], model: HookedMoE, tmp_path: Path
) -> None:
    together(model, tmp_path)
    expected = {key: value for key, value in other.items() if key != "about"}
    assert together(model, tmp_path, **other) == alone(model, **expected)


def test_nothing_stale_is_used_after_a_change_of_the_model(tmp_path: Path, ran: list[int]) -> None:
    hf_model = tiny_model("olmoe")
    model = RoutedModel(hf_model, tokenizer())
    together(model, tmp_path)
    plan = SteeringPlan(deactivate=[(0, 1)])
    with model.hooks(steer_hooks(plan)):
        steered = together(model, tmp_path)
        assert steered == alone(model)
    assert steered == alone(model, hooks=steer_hooks(plan))
    with with_top_k(model, 1):
        assert together(model, tmp_path) == alone(model)
    n_before = len(ran)
    before = hf_model.model.layers[1].mlp.gate.weight.data.clone()
    hf_model.model.layers[1].mlp.gate.weight.data[1, 3] += 1.0
    assert together(model, tmp_path) == alone(model)
    assert len(ran) == n_before + 4
    hf_model.model.layers[1].mlp.gate.weight.data.copy_(before)
    together(model, tmp_path)
    assert len(ran) == n_before + 4  # the files of the weights as they are again


def test_a_plan_for_each_prompt_stays_with_its_prompt(model: HookedMoE, tmp_path: Path) -> None:
    plans = [SteeringPlan(deactivate=[(0, i % 4)]) if i % 3 else None for i in range(len(PROMPTS))]
    found = together(model, tmp_path, hooks=steer_hooks(plans), unit=1, per_prompt=True)
    assert found == alone(model, hooks=steer_hooks(plans), per_prompt=True)
    assert found["counts"] != alone(model)["counts"]


def test_hooks_that_do_not_say_what_they_do_need_about(
    model: HookedMoE, tmp_path: Path, ran: list[int]
) -> None:
    def louder(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value * 3

    hooks = [("blocks.0.mlp.hook_router_logits", louder)]
    with pytest.raises(DataError, match=r"1 of the hooks .* about="):
        together(model, tmp_path, hooks=hooks)
    with model.hooks(hooks), pytest.raises(DataError, match=r"1 of the hooks .* about="):
        together(model, tmp_path)
    network: Any = model.original_model
    handle = network.model.layers[0].register_forward_hook(lambda *seen: None)
    with pytest.raises(DataError, match=r"1 of the hooks .* about="):
        together(model, tmp_path)
    handle.remove()
    assert not ran
    assert together(model, tmp_path, hooks=hooks, about="logits × 3") == alone(model, hooks=hooks)
    together(model, tmp_path, hooks=hooks, about="logits × 4")
    assert len(ran) == 8


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "changed":
        tensors = load_file(path)
        tensors["counts"][0, 0] += 1
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata=metadata)
    else:
        path.write_bytes(unit_files(path.parent)[0].read_bytes())


@pytest.mark.parametrize("how", ["truncated", "empty", "changed", "another unit's"])
def test_a_damaged_file_is_counted_again(how: str, model: HookedMoE, tmp_path: Path, ran: list[int]) -> None:
    expected = together(model, tmp_path)
    for result in tmp_path.glob("job-*.safetensors"):
        result.unlink()
    damage(unit_files(tmp_path)[1], how)
    damage(unit_files(tmp_path)[3], how)
    with pytest.raises(DataError, match=r"000001-.* So are 1 others\. The same command counts"):
        merge_distributed(tmp_path)
    assert together(model, tmp_path) == expected
    assert ran == [2] * 6
    assert content(merge_distributed(tmp_path)) == expected


def test_a_damaged_result_is_added_up_again(model: HookedMoE, tmp_path: Path, ran: list[int]) -> None:
    expected = together(model, tmp_path)
    for result in tmp_path.glob("job-*.safetensors"):
        damage(result, "truncated")
    assert together(model, tmp_path) == expected
    assert ran == [2] * 4


def test_generators_will_do_and_a_damaged_file_needs_them_again(model: HookedMoE, tmp_path: Path) -> None:
    expected = alone(model)
    assert together(model, tmp_path, iter(PROMPTS)) == expected
    for result in tmp_path.glob("job-*.safetensors"):
        result.unlink()
    damage(unit_files(tmp_path)[1], "empty")
    with pytest.raises(DataError, match="The same command counts their prompts again"):
        together(model, tmp_path, iter(PROMPTS))
    assert together(model, tmp_path, iter(PROMPTS)) == expected


def test_prompts_are_read_no_further_ahead_than_a_window(
    model: HookedMoE, tmp_path: Path, ran: list[int]
) -> None:
    read: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            if len(ran) > 3:
                raise DataError("enough")
            read.append(len(ran))
            yield "w1 w2 w3"

    with pytest.raises(DataError, match="enough"):
        together(model, tmp_path, endless(), batch_size=1)
    assert len(read) <= 2 * 32
    assert len(unit_files(tmp_path)) == len(ran)


def test_a_folder_of_two_jobs_says_so_and_a_missing_unit_is_named(model: HookedMoE, tmp_path: Path) -> None:
    first = together(model, tmp_path)
    (job,) = tmp_path.glob("job-*.json")
    together(model, tmp_path, span="last", per_prompt=True)
    with pytest.raises(DataError, match=r"2 jobs; say which is meant(.|\n)*4 of 4 units(.|\n)*per_prompt"):
        merge_distributed(tmp_path)
    digest = job.stem.removeprefix("job-")
    assert content(merge_distributed(tmp_path, job=digest[:6])) == first
    assert content(merge_distributed(tmp_path, job=job.stem)) == first
    with pytest.raises(DataError, match="none of them has that digest"):
        merge_distributed(tmp_path, job="nothing")
    own = [path for path in unit_files(tmp_path) if path.name in job.read_text()]
    own[1].unlink()
    own[2].unlink()
    with pytest.raises(DataError, match=r"lacks 2 of 4 units of job [0-9a-f]+: 1–2\."):
        merge_distributed(tmp_path, job=digest)
    with pytest.raises(DataError, match="holds no units"):
        merge_distributed(tmp_path / "nowhere")


def test_what_cannot_be_right_is_refused(model: HookedMoE, tmp_path: Path) -> None:
    for unit in (0, -1):
        with pytest.raises(DataError, match="unit must be"):
            together(model, tmp_path, unit=unit)
    with pytest.raises(DataError, match="empty"):
        together(model, tmp_path, [])
    with pytest.raises(DataError, match="Prompt 21 is an empty string"):
        together(model, tmp_path, [*PROMPTS[:-1], ""])
    assert not [*tmp_path.glob("job-*")]


def test_each_unit_may_hold_no_more_than_float_sums_of_its_batches(model: HookedMoE, tmp_path: Path) -> None:
    """The counts of a unit are whole; only what is added in order is kept batch by batch."""
    together(model, tmp_path, unit=4)
    tensors = load_file(unit_files(tmp_path)[0])
    assert {name for name in tensors if name.startswith("batches.")} == {
        f"batches.{name}" for name in ("probability_sums", "weight_sums", "entropy_sums", "margin_sums")
    }
    assert tensors["batches.entropy_sums"].shape == (4, len(model.moe_layers))
    assert tensors["counts"].shape == (len(model.moe_layers), model.n_experts)


def pairs() -> ContrastivePairs:
    return ContrastivePairs.from_lists(
        [c.open_book for c in CONFLICTS],
        [c.closed_book for c in CONFLICTS],
        span="last",
        clusters=[c.entity for c in CONFLICTS],
    )


def test_detection_is_detect(tmp_path: Path, ran: list[int]) -> None:
    model = _specialised()
    numbers = {
        "score": "probability_difference",
        "n_resamples": 50,
        "n_permutations": 50,
        "batch_size": 7,
        "progress": False,
    }
    expected = detect(model, pairs(), **numbers)
    found = detect_distributed(model, pairs(), tmp_path, unit=2, **numbers)
    n_ran = len(ran)
    for one, other in (
        (found, expected),
        (detect_distributed(model, pairs(), tmp_path, unit=2, **numbers), found),
    ):
        one.save(tmp_path / "one")
        other.save(tmp_path / "other")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
        assert one.alignment is not None
        assert other.alignment is not None
        assert one.alignment.to_dataframe().equals(other.alignment.to_dataframe())
    assert len(ran) == n_ran > 4


def test_detection_of_groups_is_detect(tmp_path: Path) -> None:
    groups = ContrastiveGroups.from_lists(
        [c.open_book for c in CONFLICTS[:9]], [c.closed_book for c in CONFLICTS[9:20]]
    )
    numbers = {"n_resamples": 20, "n_permutations": 20, "progress": False}
    expected = detect(_specialised(), groups, **numbers)
    found = detect_distributed(_specialised(), groups, tmp_path, unit=1, **numbers)
    assert torch.equal(found.delta, expected.delta)
    assert found.q is not None
    assert expected.q is not None
    assert torch.equal(found.q, expected.q)
