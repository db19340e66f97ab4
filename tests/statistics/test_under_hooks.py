"""hooks=: what is counted is the routing under the hooks, which are gone between batches and afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens import scale_experts
from moe_lens.errors import DataError
from moe_lens.statistics import RoutingStats, collect_routing, collect_to_file, iterate_routing
from moe_lens.statistics import collection as collection_file
from moe_lens.steering import SteeringPlan, steer_hooks
from tests.statistics.sums import EVERYTHING, Hooked
from tests.tiny_models import hook_census, prompt

PROMPTS = [prompt(length, seed) for seed, length in enumerate((4, 7, 2, 6, 5))]
PLAN = SteeringPlan(deactivate=[(1, 2)], activate=[(0, 3)])


def same(one: RoutingStats, other: RoutingStats) -> bool:
    first, second = one.tensors(), other.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("recipe", ["olmoe", "mixtral"])
def test_counts_are_those_of_the_hooked_model(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    census = hook_census(model)
    stats = collect_routing(model, PROMPTS, batch_size=2, hooks=steer_hooks(PLAN), **EVERYTHING)
    assert hook_census(model) == census
    with model.hooks(steer_hooks(PLAN)):
        assert same(stats, collect_routing(model, PROMPTS, batch_size=2, **EVERYTHING))
    assert not same(stats, collect_routing(model, PROMPTS, batch_size=2, **EVERYTHING))
    assert int(stats.counts[1, 2]) == 0


def test_a_generator_hands_the_model_back_without_hooks(hooked: Hooked) -> None:
    model = hooked("olmoe")
    census = hook_census(model)
    parts = iterate_routing(model, PROMPTS, batch_size=2, hooks=steer_hooks(PLAN), progress=False)
    for stats in parts:
        assert hook_census(model) == census
        assert int(stats.counts[1, 2]) == 0


def test_an_error_in_a_hook_leaves_none_behind(hooked: Hooked) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    model = hooked("olmoe")
    census = hook_census(model)
    with pytest.raises(ZeroDivisionError):
        collect_routing(model, PROMPTS, hooks=[("blocks.0.mlp.hook_router_logits", fail)], progress=False)
    assert hook_census(model) == census


def test_a_file_is_counted_under_hooks_and_its_partial_file_belongs_to_them(
    hooked: Hooked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = hooked("olmoe"), tmp_path / "stats"
    expected = collect_routing(model, PROMPTS, batch_size=2, hooks=steer_hooks(PLAN), progress=False)
    options: dict[str, Any] = {"about": "test", "batch_size": 2, "progress": False}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    original = collection_file.Counting.count
    runs: list[int] = []

    def counting(*args: Any) -> Any:
        runs.append(1)
        return original(*args) if len(runs) < 3 else stop()

    monkeypatch.setattr(collection_file.Counting, "count", counting)
    with pytest.raises(KeyboardInterrupt):
        collect_to_file(model, PROMPTS, path, hooks=steer_hooks(PLAN), **options)
    runs.clear()
    monkeypatch.setattr(collection_file.Counting, "count", lambda *args: runs.append(1) or original(*args))
    (partial,) = tmp_path.iterdir()
    unhooked = collect_to_file(model, PROMPTS, tmp_path / "other", **options)
    assert len(runs) == 3
    assert same(unhooked, collect_routing(model, PROMPTS, batch_size=2, progress=False))
    runs.clear()
    without_hooks = tmp_path / partial.name  # the partial file of a run under hooks is no run's without them
    content = without_hooks.read_bytes()
    collect_to_file(model, PROMPTS, path, **options)
    assert len(runs) == 3
    without_hooks.write_bytes(content)
    runs.clear()
    assert same(collect_to_file(model, PROMPTS, path, hooks=steer_hooks(PLAN), **options), expected)
    assert len(runs) == 1


def test_negative_weights_are_refused_by_their_cause(hooked: Hooked) -> None:
    model = hooked("olmoe")
    hooks = scale_experts([(0, expert) for expert in range(model.n_experts)], -1.0)
    with pytest.raises(DataError, match="negative values; did a hook multiply"):
        collect_routing(model, PROMPTS, hooks=hooks, progress=False)
