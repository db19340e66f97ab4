"""RouteRecord and replay: a run's own route gives its own logits; another run follows it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from moe_lens import (
    RoutedModel,
    RouteRecord,
    SteeringPlan,
    bias_experts,
    hook_names,
    is_routing_point,
    replay_hooks,
    steer_hooks,
)
from moe_lens.errors import DataError, HookError
from moe_lens.shape import MoEShape
from tests.families import some_kinds
from tests.tiny_models import FAMILIES, prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]
with_and_without_weights = pytest.mark.parametrize("weights", [False, True])
WRITE: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}


def run(model: Any, hooks: Any = (), given: Any = None) -> tuple[Tensor, Any]:
    with torch.no_grad(), model.hooks(list(hooks)):
        return model.run_with_cache(tokens(2, 6) if given is None else given)


@with_and_without_weights
@some_kinds
def test_replaying_a_runs_own_route_gives_its_own_logits(hooked: Hooked, recipe: str, weights: bool) -> None:
    model = hooked(recipe)
    logits, cache = run(model)
    record = RouteRecord.from_cache(cache, weights=weights)
    again, _ = run(model, replay_hooks(record))
    assert torch.equal(again, logits)


@some_kinds
def test_another_run_follows_the_record(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    _, cache = run(model)
    record = RouteRecord.from_cache(cache, weights=True)
    other = tokens(2, 6, seed=5)
    _, free = run(model, given=other)
    _, frozen = run(model, replay_hooks(record), other)
    differs = False
    for layer in model.moe_layers:
        for point in ("topk_indices", "topk_weights"):
            assert torch.equal(frozen[point, layer], cache[point, layer])
        differs |= not torch.equal(free["topk_indices", layer], cache["topk_indices", layer])
    assert differs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*FAMILIES, "deepseek_v3", "deepseek_v2_grouped", "ernie4_5_moe"])
def test_a_steered_run_replays_from_its_indices_and_weights(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    layer = model.moe_layers[0]
    plan = SteeringPlan(activate=[(layer, model.n_experts - 1)], deactivate=[(layer, 0)])
    steered, cache = run(model, steer_hooks(plan))
    again, _ = run(model, replay_hooks(RouteRecord.from_cache(cache, weights=True)))
    assert torch.equal(again, steered)


@some_kinds
def test_a_generation_is_recorded_and_replayed(hooked: Hooked, recipe: str) -> None:
    """One forward over the whole text, and writing again, both with the route of the first writing."""
    model = hooked(recipe)
    record = RouteRecord.from_generation(model, tokens(1, 4), 4, weights=True)
    assert record.tokens is not None
    n_columns = record.tokens.shape[1]  # 7, or fewer where the model ends
    assert 4 <= n_columns <= 7
    assert record.indices.shape == (len(model.moe_layers), 1, n_columns, model.top_k)
    with torch.no_grad():
        written = model.generate(tokens(1, 4), max_new_tokens=n_columns - 3, **WRITE)
        assert torch.equal(record.tokens, written[:, :n_columns])
        with model.hooks(replay_hooks(record)):
            again = model.generate(tokens(1, 4), max_new_tokens=n_columns - 3, **WRITE)
        assert torch.equal(again, written)
    _, cache = run(model, replay_hooks(record), record.tokens)
    for row, layer in enumerate(model.moe_layers):
        assert torch.equal(cache["topk_indices", layer], record.indices[row].long())


def test_steered_writing_replays_without_the_steering(hooked: Hooked) -> None:
    model = hooked("olmoe")
    hooks = steer_hooks(SteeringPlan(activate=[(0, 5), (1, 3)], deactivate=[(2, 0), (2, 1)]))
    with torch.no_grad(), model.hooks(hooks):
        steered = model.generate(tokens(1, 5), max_new_tokens=6, **WRITE)
    record = RouteRecord.from_generation(model, tokens(1, 5), 6, weights=True, hooks=hooks)
    with torch.no_grad(), model.hooks(replay_hooks(record)):
        again = model.generate(tokens(1, 5), max_new_tokens=6, **WRITE)
    assert torch.equal(again, steered)


def test_prompts_of_different_lengths_are_recorded_in_one_batch(hooked: Hooked) -> None:
    model = hooked("mixtral")
    texts = [prompt(2), prompt(5, 1)]
    record = RouteRecord.from_generation(model, texts, 3)
    assert record.indices.shape[1:3] == (2, 8)
    with torch.no_grad(), model.hooks(replay_hooks(record)):
        again = model.generate(texts, max_new_tokens=3, **WRITE)
    assert record.tokens is not None
    assert torch.equal(again[:, :8], record.tokens)


def test_layers_positions_and_phases(hooked: Hooked) -> None:
    model = hooked("olmoe")
    _, cache = run(model)
    record = RouteRecord.from_cache(cache)
    other = tokens(2, 6, seed=9)
    _, free = run(model, given=other)
    _, some = run(model, replay_hooks(record, layers=0, positions=[1, 4]), other)
    meant = torch.tensor([False, True, False, False, True, False])
    assert torch.equal(some["topk_indices", 0][:, meant], cache["topk_indices", 0][:, meant])
    assert torch.equal(some["topk_indices", 0][:, ~meant], free["topk_indices", 0][:, ~meant])
    with torch.no_grad(), model.hooks(replay_hooks(record, positions="prompt")):
        model.generate(other, max_new_tokens=3, **WRITE)  # the rest is free
    with (
        torch.no_grad(),
        model.hooks(replay_hooks(record)),
        pytest.raises(HookError, match="has 6 columns, and column 6"),
    ):
        model.generate(other, max_new_tokens=3, **WRITE)


@with_and_without_weights
def test_a_record_of_one_column_is_no_record_of_many(hooked: Hooked, weights: bool) -> None:
    model = hooked("olmoe")
    _, cache = run(model, given=tokens(1, 1))
    record = RouteRecord.from_cache(cache, weights=weights)
    with pytest.raises(HookError, match="has 1 columns"):
        run(model, replay_hooks(record))
    run(model, replay_hooks(record), tokens(1, 1))


@with_and_without_weights
@pytest.mark.parametrize("wrapper", ["bridge", "routed"])
def test_a_record_of_longer_prompts_is_refused(hooked: Hooked, weights: bool, wrapper: str) -> None:
    model: Any = hooked("olmoe") if wrapper == "bridge" else RoutedModel(tiny_model("olmoe"), tokenizer())
    _, cache = run(model, given=tokens(2, 9))
    record = RouteRecord.from_cache(cache, weights=weights)
    for hooks in ([each] for each in replay_hooks(record)):  # each of them says so
        with pytest.raises(HookError, match=r"has 9 columns, and this run has 5.*positions="):
            run(model, hooks, tokens(2, 5))
    for positions in ("prompt", [0, 1, 2, 3, 4], "all"):
        _, some = run(model, replay_hooks(record, positions=positions), tokens(2, 5, seed=3))
        for layer in model.moe_layers:
            assert torch.equal(some["topk_indices", layer], cache["topk_indices", layer][:, :5])


@pytest.mark.parametrize("wrapper", ["bridge", "routed"])
def test_a_generation_goes_on_along_the_record(hooked: Hooked, wrapper: str) -> None:
    model: Any = hooked("olmoe") if wrapper == "bridge" else RoutedModel(tiny_model("olmoe"), tokenizer())
    _, cache = run(model, given=tokens(2, 9))
    ran: list[torch.Tensor] = []
    note = (hook_names.topk_indices(0), lambda indices, hook: ran.append(indices.clone()))
    with torch.no_grad(), model.hooks([*replay_hooks(RouteRecord.from_cache(cache)), note]):
        model.generate(tokens(2, 5), max_new_tokens=4, **WRITE)
    assert torch.equal(torch.cat(ran, dim=1), cache["topk_indices", 0][:, :8])


def test_one_prompts_route_serves_a_batch(hooked: Hooked) -> None:
    model = hooked("mixtral")
    _, cache = run(model, given=tokens(1, 6))
    record = RouteRecord.from_cache(cache)
    _, frozen = run(model, replay_hooks(record))
    for layer in model.moe_layers:
        assert torch.equal(frozen["topk_indices", layer], cache["topk_indices", layer].expand(2, -1, -1))
    _, three = run(model, given=tokens(3, 6))
    with pytest.raises(HookError, match="is that of 3 prompts, and 2 are running"):
        run(model, replay_hooks(RouteRecord.from_cache(three)))


def test_replay_overrules_what_edits_the_logits(hooked: Hooked) -> None:
    model = hooked("olmoe")
    logits, cache = run(model)
    record = RouteRecord.from_cache(cache, weights=True)
    for hooks in (
        [*bias_experts({0: torch.arange(6.0)}), *replay_hooks(record)],
        [*replay_hooks(record), *steer_hooks(SteeringPlan(deactivate=[(1, 0)]))],
    ):
        assert torch.equal(run(model, hooks)[0], logits)


def test_filtered_and_plain_caches(hooked: Hooked) -> None:
    model = hooked("olmoe")
    _, cache = run(model)
    whole = RouteRecord.from_cache(cache)
    with torch.no_grad():
        _, filtered = model.run_with_cache(tokens(2, 6), names_filter=is_routing_point)
        _, single = model.run_with_cache(tokens(1, 6), remove_batch_dim=True)
    assert torch.equal(RouteRecord.from_cache(filtered).indices, whole.indices)
    assert RouteRecord.from_cache(single).indices.shape == (3, 1, 6, 3)
    plain = {name: filtered[name] for name in filtered.keys()}  # noqa: SIM118
    assert RouteRecord.from_cache(plain).shape.model == "unknown"
    assert whole.indices.dtype == torch.uint8
    broken = {name: x for name, x in plain.items() if hook_names.parse(name) != (1, "hook_topk_indices")}
    for cache_, match in ((broken, "topk_indices of layer 1"), ({}, "no routing")):
        with pytest.raises(DataError, match=match):
            RouteRecord.from_cache(cache_)
    with pytest.raises(DataError, match="needs a cache"):
        RouteRecord.from_cache(3)
    with pytest.raises(DataError, match="no weights"):
        replay_hooks(whole, weights=True)
    with pytest.raises(DataError, match="no layer 7"):
        replay_hooks(whole, layers=[7])
    for wrong in (True, [], [-1]):
        with pytest.raises(DataError, match="layers must be numbers"):
            replay_hooks(whole, layers=wrong)  # type: ignore[arg-type]


def test_records_of_other_models_are_refused(hooked: Hooked) -> None:
    _, cache = run(hooked("olmoe"))
    with pytest.raises(HookError, match="another model"):
        run(hooked("mixtral"), replay_hooks(RouteRecord.from_cache(cache), layers=[0]))


@settings(deadline=None, max_examples=25)
@given(
    n_experts=st.sampled_from([2, 8, 256, 257, 300]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    weights=st.sampled_from([None, torch.float32, torch.bfloat16]),
    known=st.booleans(),
)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, n_experts: int, sizes: Any, weights: Any, known: bool
) -> None:
    n_layers, batch, pos = sizes
    indices = torch.rand(n_layers, batch, pos, n_experts).topk(2).indices
    record = RouteRecord(
        MoEShape("m", tuple(range(n_layers)), n_experts, 2),
        indices,
        None if weights is None else torch.rand(indices.shape).to(weights),
        torch.randint(9, (batch, pos)) if known else None,
    )
    path = tmp_path_factory.mktemp("records") / "deep" / "route.safetensors"
    record.save(path)
    loaded = RouteRecord.load(path)
    assert loaded.shape == record.shape
    assert torch.equal(loaded.indices.long(), indices)
    assert loaded.indices.dtype == (torch.uint8 if n_experts <= 256 else torch.int16)
    for ours, theirs in ((loaded.weights, record.weights), (loaded.tokens, record.tokens)):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


def test_files_of_schema_1_are_read_under_their_former_kind(tmp_path: Path) -> None:
    """Before the file layer: one JSON value a metadata key, no digest."""
    indices = torch.tensor([[[[0, 3], [2, 1]]]], dtype=torch.uint8)
    weights, tokens_ = torch.rand(1, 1, 2, 2), torch.tensor([[5, 6]])
    shape = {"model": "m", "layers": [4], "n_experts": 4, "top_k": 2}
    about = {"kind": "moe_lens routes", "schema": 1, "shape": shape}
    save_file(
        {"indices": indices, "weights": weights, "tokens": tokens_},
        tmp_path / "old",
        {key: json.dumps(value) for key, value in about.items()},
    )
    loaded = RouteRecord.load(tmp_path / "old")
    assert loaded.shape == MoEShape("m", (4,), 4, 2)
    for tensor, expected in ((loaded.indices, indices), (loaded.weights, weights), (loaded.tokens, tokens_)):
        assert tensor is not None
        assert torch.equal(tensor, expected)
    loaded.save(tmp_path / "new")
    assert b"moe_lens.RouteRecord" in (tmp_path / "new").read_bytes()
    assert torch.equal(RouteRecord.load(tmp_path / "new").indices, indices)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "route.safetensors"
    about = {"kind": "moe_lens routes", "schema": 1}
    shape = {"model": "m", "layers": [0], "n_experts": 4, "top_k": 2}
    good = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({"indices": good}, {**about, "shape": {}}, "field 'shape'"),
        ({"indices": good + 4}, {**about, "shape": shape}, "experts beyond"),
        ({"indices": good[..., :1]}, {**about, "shape": shape}, "no routes of"),
        ({"indices": good.float()}, {**about, "shape": shape}, "indices is"),
        ({"weights": good.float()}, {**about, "shape": shape}, "no indices"),
        ({"indices": good, "more": good.clone()}, {**about, "shape": shape}, "more is"),
        (
            {"indices": good, "weights": good[:, :, :1].float()},
            {**about, "shape": shape},
            "weights have shape",
        ),
        ({"indices": good}, {"kind": "x"}, "no file of routes"),
    ]
    for tensors, metadata, match in cases:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            {key: json.dumps(value) for key, value in metadata.items()},
        )
        with pytest.raises(DataError, match=match):
            RouteRecord.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        RouteRecord.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        RouteRecord.load(tmp_path / "absent")
