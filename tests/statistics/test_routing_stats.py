"""RoutingStats against loops over Hugging Face's own router outputs, captured by plain torch hooks.

The tables that come beside the sums are tested against loops over single unpadded runs.
"""

import dataclasses
import gc
import itertools
import json
import math
import os
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lens.errors import DataError, HookError, MoELensError
from moe_lens.model.hooked_moe import HookedMoE, attach
from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.shape import MoEShape
from moe_lens.statistics import routing_stats
from moe_lens.statistics.collection import collect_routing, iterate_routing
from moe_lens.statistics.routing_stats import RoutingStats, is_routing_point
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.families import core_family, every_dtype
from tests.tiny_models import (
    MOE_LAYERS,
    N_EXPERTS,
    TOP_K,
    plain_bridge,
    prompt,
    router_of,
    sparse_blocks,
    tiny_model,
    tokens,
)

Hooked = Callable[..., HookedMoE]
Captured = dict[int, tuple[Tensor, Tensor, Tensor]]


def run_hf(hf_model: Any, batch: Tensor, forward: Any = None) -> Captured:
    """Layer -> (logits, weights, indices) of Hugging Face's routers, flat [batch·pos ...], in float64.

    `forward`: what to call instead of `hf_model` itself, TransformerLens' plain bridge around it for one.
    """
    captured: Captured = {}
    handles = []
    for layer, block in sparse_blocks(hf_model).items():

        def keep(_module: Any, _args: Any, output: tuple[Tensor, ...], layer: int = layer) -> None:
            logits, weights, indices = output
            captured[layer] = logits.double(), weights.double(), indices

        handles.append(router_of(block).register_forward_hook(keep))
    with torch.no_grad():
        (forward or hf_model)(batch)
    for handle in handles:
        handle.remove()
    return captured


def add_up(captured: Captured, recipe: str, keep: list[bool]) -> dict[str, list[list[float]]]:
    """Counts, summed probabilities and summed weights [layer expert] over the flat positions to keep."""
    names = ("counts", "probability_sums", "weight_sums")
    sums = {name: [[0.0] * N_EXPERTS[recipe] for _ in captured] for name in names}
    for row, layer in enumerate(sorted(captured)):
        logits, weights, indices = (tensor.tolist() for tensor in captured[layer])
        for position in (position for position, kept in enumerate(keep) if kept):
            largest = max(logits[position])
            powers = [math.exp(z - largest) for z in logits[position]]
            for expert, power in enumerate(powers):
                sums["probability_sums"][row][expert] += power / sum(powers)
            for expert, weight in zip(indices[position], weights[position], strict=True):
                sums["counts"][row][expert] += 1
                sums["weight_sums"][row][expert] += weight
    return sums


def agrees(stats: RoutingStats, sums: dict[str, list[list[float]]], n_tokens: int) -> bool:
    assert stats.n_tokens == n_tokens
    assert stats.counts.dtype == torch.int64
    for name in ("probability_sums", "weight_sums"):
        torch.testing.assert_close(
            getattr(stats, name), torch.tensor(sums[name]).double(), rtol=1e-5, atol=1e-6
        )
    return stats.counts.tolist() == sums["counts"]


def same(a: RoutingStats, b: RoutingStats, exact: bool = False) -> bool:
    tolerance = 0.0 if exact else 1e-5
    for name in ("probability_sums", "weight_sums"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)
    return (a.shape, a.n_tokens, a.counts.tolist()) == (b.shape, b.n_tokens, b.counts.tolist())


def one_by_one(model: HookedMoE, prompts: Any) -> RoutingStats:
    """The sum of one run a prompt, through TransformerLens' own run_with_cache."""
    parts = [RoutingStats.from_cache(model.run_with_cache(prompt)[1]) for prompt in prompts]
    return sum(parts[1:], parts[0])


def random_stats(seed: int, shape: MoEShape | None = None, n_tokens: int = 5) -> RoutingStats:
    """Statistics of random logits, routed by torch.topk."""
    shape = shape or MoEShape("m", (0, 2), 4, 2)
    generator = torch.Generator().manual_seed(seed)
    cache = {}
    for layer in shape.layers:
        logits = torch.randn(n_tokens, shape.n_experts, generator=generator)
        top = logits.softmax(-1).topk(shape.top_k)
        for point, value in zip(
            ("router_logits", "topk_weights", "topk_indices"), (logits, *top), strict=True
        ):
            cache[f"blocks.{layer}.mlp.hook_{point}"] = value
    return dataclasses.replace(RoutingStats.from_cache(cache), shape=shape)


# From a cache


@core_family
@every_dtype
def test_sums_equal_a_loop_over_hugging_faces_own_router_outputs(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    batch = tokens(3, 6)
    stats = RoutingStats.from_cache(hooked(recipe, dtype).run_with_cache(batch)[1])
    hf_model = tiny_model(recipe, dtype)
    # In bfloat16 the bridge's attention rounds otherwise than HF's, so the same attention must run.
    forward = hf_model if dtype == torch.float32 else plain_bridge(hf_model)
    assert agrees(stats, add_up(run_hf(hf_model, batch, forward), recipe, [True] * 18), 18)


@core_family
def test_the_shape_is_the_models_and_leaves_dense_layers_out(hooked: Hooked, recipe: str) -> None:
    shape = RoutingStats.from_cache(hooked(recipe).run_with_cache(tokens())[1]).shape
    assert (shape.layers, shape.n_experts, shape.top_k) == (
        MOE_LAYERS[recipe],
        N_EXPERTS[recipe],
        TOP_K[recipe],
    )
    assert shape == hooked(recipe).moe_shape


@core_family
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_mask_chooses_the_positions(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    batch, mask = tokens(3, 6), torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    stats = RoutingStats.from_cache(hooked(recipe).run_with_cache(batch)[1], mask.to(dtype))
    keep = mask.flatten().tolist()
    assert agrees(stats, add_up(run_hf(tiny_model(recipe), batch), recipe, keep), sum(keep))


@core_family
def test_padding_is_left_out_by_itself(hooked: Hooked, recipe: str) -> None:
    model, prompts = hooked(recipe), [prompt(2), prompt(9, 1), prompt(5, 2)]
    stats = RoutingStats.from_cache(model.run_with_cache(prompts)[1])
    assert stats.n_tokens == sum(model.to_tokens(text).numel() for text in prompts)
    assert same(stats, one_by_one(model, prompts))


def test_an_attention_mask_given_to_the_run_is_used(hooked: Hooked) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = tokens(2, 5)
    _, cache = hooked("olmoe").run_with_cache(batch, attention_mask=mask)
    assert same(RoutingStats.from_cache(cache), one_by_one(hooked("olmoe"), [batch[:1, 2:], batch[1:]]))


def test_a_mask_overrules_the_cache(hooked: Hooked) -> None:
    _, cache = hooked("olmoe").run_with_cache([prompt(2), prompt(5)])
    assert RoutingStats.from_cache(cache, torch.ones(2, 6, dtype=torch.bool)).n_tokens == 12


@core_family
def test_a_cache_without_batch_dimension_counts_the_same(hooked: Hooked, recipe: str) -> None:
    model, batch = hooked(recipe), tokens(1, 6)
    _, cache = model.run_with_cache(batch, remove_batch_dim=True)
    assert same(RoutingStats.from_cache(cache), RoutingStats.from_cache(model.run_with_cache(batch)[1]))
    last = torch.tensor([False] * 5 + [True])
    sums = add_up(run_hf(tiny_model(recipe), batch), recipe, last.tolist())
    assert agrees(RoutingStats.from_cache(cache, last), sums, 1)


def test_a_plain_dictionary_counts_the_same_under_an_unknown_name(hooked: Hooked) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens())
    whole, plain = RoutingStats.from_cache(cache), RoutingStats.from_cache(dict(cache.cache_dict))
    assert plain.shape == dataclasses.replace(whole.shape, model="unknown")
    assert same(dataclasses.replace(plain, shape=whole.shape), whole, exact=True)


@core_family
def test_rates_and_means_are_shares_of_tokens(hooked: Hooked, recipe: str) -> None:
    stats = RoutingStats.from_cache(hooked(recipe).run_with_cache(tokens(3, 6))[1])
    ones = torch.ones(len(stats.shape.layers), dtype=torch.float64)
    torch.testing.assert_close(stats.rates.sum(-1), stats.shape.top_k * ones)
    assert stats.rates.min() >= 0
    assert stats.rates.max() <= 1
    torch.testing.assert_close(stats.mean_probability.sum(-1), ones, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.mean_weight, stats.weight_sums / 18)


def test_the_mean_weight_when_chosen_is_nan_for_an_expert_never_chosen() -> None:
    stats = random_stats(0, n_tokens=1)
    mean = stats.mean_weight_when_chosen
    assert torch.equal(mean.isnan(), stats.counts == 0)
    torch.testing.assert_close(mean.nan_to_num(0.0), stats.weight_sums)


@pytest.mark.parametrize("point", ["router_logits", "topk_indices", "topk_weights"])
def test_a_missing_tensor_is_named(hooked: Hooked, point: str) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens())
    lacking = {name: value for name, value in cache.items() if not name.endswith(f"1.mlp.hook_{point}")}
    lacking = {name: value for name, value in lacking.items() if name != f"blocks.1.hook_{point}"}
    with pytest.raises(DataError, match=rf"hook_{point} of layer 1"):
        RoutingStats.from_cache(lacking)


def test_a_cache_without_routing_is_refused() -> None:
    with pytest.raises(DataError, match="no routing"):
        RoutingStats.from_cache(plain_bridge(tiny_model()).run_with_cache(tokens())[1])


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool), torch.ones(7).bool()]
)
def test_a_mask_that_selects_nothing_or_has_another_shape_is_refused(hooked: Hooked, mask: Tensor) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(2, 7))
    with pytest.raises(DataError, match="mask"):
        RoutingStats.from_cache(cache, mask)


def test_nan_logits_are_refused(hooked: Hooked) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(), names_filter=is_routing_point)
    broken = {name: value.clone() for name, value in cache.items()}
    broken["blocks.0.mlp.hook_router_logits"][0, 0, 0] = torch.nan
    broken["blocks.0.hook_router_logits"] = broken["blocks.0.mlp.hook_router_logits"]
    with pytest.raises(DataError, match="NaN"):
        RoutingStats.from_cache(broken)


def test_an_expert_forced_twice_on_one_token_is_no_rate_above_one(hooked: Hooked) -> None:
    """Hooks on the chosen experts may repeat one; its rate stays a share of tokens, or it is refused."""
    name = "blocks.0.mlp.hook_topk_indices"
    model = hooked("olmoe")
    with model.hooks([(name, lambda indices, hook: torch.zeros_like(indices))]):
        _, cache = model.run_with_cache(tokens())
    try:
        stats = RoutingStats.from_cache(cache)
    except DataError:
        return
    assert stats.rates.max() <= 1


# Streamed over many prompts


@core_family
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6), batch_size=st.integers(1, 7))
def test_batching_and_padding_change_nothing(
    hooked: Hooked, recipe: str, lengths: list[int], batch_size: int
) -> None:
    sequences = [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    stats = collect_routing(hooked(recipe), sequences, batch_size=batch_size, progress=False)
    assert stats.n_tokens == sum(lengths)
    assert same(stats, one_by_one(hooked(recipe), [sequence[None] for sequence in sequences]))


def test_every_kind_of_prompts_is_counted_alike(hooked: Hooked) -> None:
    model, texts = hooked("olmoe"), [prompt(4, seed) for seed in range(3)]
    expected = one_by_one(model, texts)
    batch = model.to_tokens(texts)
    for prompts in (texts, batch, batch.tolist(), list(batch), tuple(texts)):
        assert same(collect_routing(model, prompts, batch_size=2, progress=False), expected)
    assert same(collect_routing(model, texts[0], progress=False), one_by_one(model, texts[:1]))


def in_span(span: Any, sequence: Tensor) -> list[int]:
    positions = list(range(len(sequence)))
    if span is None or isinstance(span, slice):
        return positions[span or slice(None)]
    return [position for position in positions if bool(span(sequence)[position])]


@pytest.mark.parametrize(
    "span", [slice(-1, None), slice(None, 2), slice(1, None, 2), lambda t: t % 2 == t[0] % 2, None]
)
def test_a_span_counts_its_tokens_alone(hooked: Hooked, span: Any) -> None:
    model, sequences = hooked("qwen2_moe"), [tokens(1, n, n)[0] for n in (4, 2, 6)]
    expected = None
    for sequence in sequences:
        chosen = in_span(span, sequence)
        keep = [position in chosen for position in range(len(sequence))]
        captured = run_hf(tiny_model("qwen2_moe"), sequence[None])
        part = add_up(captured, "qwen2_moe", keep)
        expected = part if expected is None else _sum_of(expected, part)
    assert expected is not None
    stats = collect_routing(model, sequences, span=span, batch_size=2, progress=False)
    assert agrees(stats, expected, round(sum(expected["counts"][0])) // TOP_K["qwen2_moe"])


def _sum_of(a: dict[str, list[list[float]]], b: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    return {name: (torch.tensor(a[name]) + torch.tensor(b[name])).tolist() for name in a}


@pytest.mark.parametrize("span", [slice(3, None), lambda t: t > 6], ids=["slice", "callable"])
def test_a_span_that_misses_a_prompt_is_refused_by_its_number(hooked: Hooked, span: Any) -> None:
    with pytest.raises(DataError, match="prompt 1 "):
        collect_routing(hooked("olmoe"), [[4, 5, 6, 7], [4, 5]], span=span, progress=False)


def test_a_span_of_another_length_is_refused(hooked: Hooked) -> None:
    span: Any = lambda t: t[1:] > 0  # noqa: E731
    with pytest.raises(DataError, match="one bool a token"):
        collect_routing(hooked("olmoe"), [[4, 5, 6]], span=span, progress=False)


def test_no_more_than_one_batch_of_routing_is_alive(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    original, alive, most = RoutingStats.from_cache, [], []

    def counting(cache: Any, mask: Any = None, **kwargs: Any) -> RoutingStats:
        gc.collect()
        alive.append(weakref.ref(cache["blocks.0.mlp.hook_router_logits"]))
        most.append(sum(reference() is not None for reference in alive))
        return original(cache, mask, **kwargs)

    monkeypatch.setattr(RoutingStats, "from_cache", counting)
    collect_routing(hooked("olmoe"), tokens(10, 3), batch_size=2, progress=False)
    assert most == [1] * 5


def test_only_routing_points_are_cached(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = RoutingStats.from_cache

    def spying(cache: Any, mask: Any = None, **kwargs: Any) -> RoutingStats:
        seen.extend(cache.keys())
        return original(cache, mask, **kwargs)

    monkeypatch.setattr(RoutingStats, "from_cache", spying)
    collect_routing(hooked("olmoe"), tokens(), progress=False)
    assert {name.split(".")[-1] for name in seen} == {
        "hook_router_logits",
        "hook_topk_indices",
        "hook_topk_weights",
    }


def test_no_gradient_graph_is_built(hooked: Hooked) -> None:
    stats = collect_routing(hooked("olmoe"), tokens(), progress=False)
    assert not stats.probability_sums.requires_grad
    assert not stats.weight_sums.requires_grad


@core_family
def test_a_bridge_after_attach_is_counted_the_same(hooked: Hooked, recipe: str) -> None:
    sequences = [[5, 6, 7, 8], [9, 10]]
    stats = collect_routing(attach(plain_bridge(tiny_model(recipe))), sequences, progress=False)
    expected = collect_routing(hooked(recipe), sequences, progress=False)
    assert same(dataclasses.replace(stats, shape=expected.shape), expected, exact=True)


@core_family
def test_steered_routes_are_counted_under_steering_hooks(hooked: Hooked, recipe: str) -> None:
    model, layer = hooked(recipe), MOE_LAYERS[recipe][-1]
    plain = collect_routing(model, tokens(3, 6), progress=False)
    often, seldom = int(plain.counts[-1].argmax()), int(plain.counts[-1].argmin())
    with model.hooks(steer_hooks(SteeringPlan(activate=[(layer, seldom)], deactivate=[(layer, often)]))):
        steered = collect_routing(model, tokens(3, 6), progress=False)
    assert int(steered.counts[-1, seldom]) == steered.n_tokens
    assert int(steered.counts[-1, often]) == 0
    assert same(collect_routing(model, tokens(3, 6), progress=False), plain, exact=True)


def test_without_prompts_nothing_is_collected(hooked: Hooked) -> None:
    with pytest.raises(DataError, match="at least one prompt"):
        collect_routing(hooked("olmoe"), [])


# Merging


@settings(max_examples=30, deadline=None)
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3), sizes=st.tuples(*[st.integers(1, 9)] * 3))
def test_addition_is_exact_commutative_and_associative(seeds: Any, sizes: Any) -> None:
    a, b, c = (random_stats(seed, n_tokens=n) for seed, n in zip(seeds, sizes, strict=True))
    assert same(a + b, b + a, exact=True)
    assert same((a + b) + c, a + (b + c))
    assert ((a + b) + c).counts.tolist() == (a.counts + b.counts + c.counts).tolist()
    assert torch.equal((a + b).probability_sums, a.probability_sums + b.probability_sums)
    assert (a + b).n_tokens == sizes[0] + sizes[1]


def test_adding_leaves_the_parts_alone() -> None:
    a, b = random_stats(0), random_stats(1)
    before = a.counts.clone()
    _ = a + b
    assert torch.equal(a.counts, before)


OTHER_SHAPES = {
    "model": MoEShape("other", (0, 2), 4, 2),
    "layers": MoEShape("m", (0, 1), 4, 2),
    "n_experts": MoEShape("m", (0, 2), 5, 2),
    "top_k": MoEShape("m", (0, 2), 4, 3),
}


@pytest.mark.parametrize("differs", OTHER_SHAPES)
def test_other_models_are_not_added(differs: str) -> None:
    with pytest.raises(DataError, match=differs):
        _ = random_stats(0) + random_stats(0, OTHER_SHAPES[differs])


# Files


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


def test_sum_adds_statistics(hooked: Hooked) -> None:
    model = hooked("olmoe")
    parts = [collect_routing(model, tokens(2, length), progress=False) for length in (3, 5)]
    assert torch.equal(sum(parts[1:], parts[0]).counts, sum(parts).counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[True, True, False]], np.array([[1, 1, 0]])])
def test_a_mask_may_be_a_list_or_an_array(hooked: Hooked, mask: Any) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(1, 3))
    expected = RoutingStats.from_cache(cache, torch.tensor([[True, True, False]]))
    assert torch.equal(RoutingStats.from_cache(cache, mask).counts, expected.counts)


@pytest.mark.parametrize("mask", [[[0.5, 1, 1]], [[float("nan"), 1, 1]], [[-1, 1, 1]], [["a", "b", "c"]]])
def test_a_mask_holds_only_true_and_false(hooked: Hooked, mask: Any) -> None:
    _, cache = hooked("olmoe").run_with_cache(tokens(1, 3))
    with pytest.raises(DataError, match="mask"):
        RoutingStats.from_cache(cache, mask)


def test_what_is_no_cache_is_refused(hooked: Hooked) -> None:
    for wrong in (None, hooked("olmoe").run_with_cache(tokens(1, 3))):
        with pytest.raises(DataError, match="second of the two"):
            RoutingStats.from_cache(wrong)


def test_a_cache_that_cannot_tell_padding_warns(hooked: Hooked) -> None:
    _, several = hooked("olmoe").run_with_cache(tokens(2, 3), return_cache_object=False)
    with pytest.warns(UserWarning, match="padding"):
        RoutingStats.from_cache(several)
    _, one = hooked("olmoe").run_with_cache(tokens(1, 3), return_cache_object=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RoutingStats.from_cache(one)


def test_a_generator_of_prompts_is_read_batch_by_batch(hooked: Hooked) -> None:
    model, read = hooked("olmoe"), []
    seen: list[int] = []
    original = model.run_with_cache

    def prompts():
        for index in range(6):
            read.append(index)
            yield [4, 5 + index]

    def run_with_cache(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(read))
        return original(*args, **kwargs)

    with mock.patch.object(model, "run_with_cache", run_with_cache):
        stats = collect_routing(model, prompts(), batch_size=2, progress=False)
    assert seen == [2, 4, 6]
    assert stats.n_tokens == 12


@pytest.mark.parametrize("bad", [[[4, 99999]], [[-1, 4]], [""], 7])
def test_prompts_that_cannot_be_run_are_refused(hooked: Hooked, bad: Any) -> None:
    with pytest.raises(DataError):
        collect_routing(hooked("olmoe"), bad, progress=False)


@pytest.mark.parametrize("span", ["question", slice(None, None, -1), lambda tokens: None])
def test_a_span_that_is_none_is_refused(hooked: Hooked, span: Any) -> None:
    with pytest.raises((DataError, TypeCheckError), match=r"span|collect_routing"):
        collect_routing(hooked("olmoe"), [[4, 5]], span=span, progress=False)


# Tables beside the sums

FAMILIES_WITH_GROUPS = ("olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
LENGTHS = (4, 7, 1, 6)
EVERYTHING: dict[str, Any] = {"per_prompt": True, "positions": True, "vocabulary": True, "progress": False}


def sequences() -> list[Tensor]:
    return [tokens(1, length, seed)[0] % 9 + 4 for seed, length in enumerate(LENGTHS)]


def routes(model: HookedMoE, sequence: Tensor) -> dict[int, tuple[list[list[float]], list[list[int]]]]:
    """Layer -> (logits, chosen experts) of each token of one prompt, run alone."""
    _, cache = model.run_with_cache(sequence[None])
    return {
        layer: (cache["router_logits", layer][0].tolist(), cache["topk_indices", layer][0].tolist())
        for layer in model.moe_layers
    }


def entropy(logits: list[float]) -> float:
    total = sum(math.exp(z) for z in logits)
    return -sum(math.exp(z) / total * math.log(math.exp(z) / total) for z in logits)


@pytest.mark.parametrize("recipe", FAMILIES_WITH_GROUPS)
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_table_equals_a_loop(hooked: Hooked, recipe: str, batch_size: int) -> None:
    model = hooked(recipe)
    span = lambda t: (t != 6) | (torch.arange(len(t)) == 0)  # noqa: E731 (some positions between are left out)
    stats = collect_routing(model, sequences(), batch_size=batch_size, span=span, **EVERYTHING)
    layers, n_experts, k = model.moe_layers, model.n_experts, model.top_k
    size = (len(layers), n_experts)
    together, gaps = np.zeros((*size, n_experts)), np.zeros((size[0] - 1, n_experts, n_experts))
    overlaps, pairs = np.zeros(len(layers)), 0
    by_prompt, by_position = np.zeros((len(LENGTHS), *size)), np.zeros((max(LENGTHS), *size))
    by_token, entropies = np.zeros((*size, model.cfg.d_vocab)), np.zeros(len(layers))
    for prompt_number, sequence in enumerate(sequences()):
        kept = [position for position in range(len(sequence)) if bool(span(sequence)[position])]
        route = routes(model, sequence)
        pairs += sum(position + 1 in kept for position in kept)
        for row, layer in enumerate(layers):
            logits, chosen = route[layer]
            for position in kept:
                entropies[row] += entropy(logits[position])
                for i in chosen[position]:
                    by_prompt[prompt_number, row, i] += 1
                    by_position[position, row, i] += 1
                    by_token[row, i, int(sequence[position])] += 1
                    for j in chosen[position]:
                        together[row, i, j] += 1
                    if row + 1 < len(layers):
                        for j in route[layers[row + 1]][1][position]:
                            gaps[row, i, j] += 1
                if position + 1 in kept:
                    overlaps[row] += len(set(chosen[position]) & set(chosen[position + 1]))
    assert stats.coactivation.counts.tolist() == together.tolist()
    assert stats.transitions.counts.tolist() == gaps.tolist()
    assert stats.adjacent_overlap.n_adjacent == pairs < stats.n_tokens - len(LENGTHS)
    np.testing.assert_allclose(stats.adjacent_overlap.mean, overlaps / (k * pairs))
    np.testing.assert_allclose(stats.mean_entropy, entropies / stats.n_tokens, rtol=1e-5)
    assert stats.per_prompt is not None
    assert stats.by_position is not None
    assert stats.vocabulary is not None
    assert stats.per_prompt.counts.tolist() == by_prompt.tolist()
    assert stats.per_prompt.n_tokens.tolist() == [int(span(sequence).sum()) for sequence in sequences()]
    assert stats.by_position.counts.tolist() == by_position.tolist()
    torch.testing.assert_close(
        stats.per_prompt.probability_sums.double().sum(0), stats.probability_sums, rtol=1e-6, atol=1e-6
    )
    for row in range(len(layers)):
        assert stats.vocabulary.dense(row, n_experts).tolist() == by_token[row].tolist()
    assert len(stats.vocabulary.totals) == model.cfg.d_vocab


@pytest.mark.parametrize("recipe", ["olmoe", "mixtral", "qwen2_moe"])
def test_the_margin_is_the_gap_after_the_kth_logit(hooked: Hooked, recipe: str) -> None:
    model, k = hooked(recipe), TOP_K[recipe]
    stats = collect_routing(model, sequences(), batch_size=2, progress=False)
    expected = np.zeros(len(model.moe_layers))
    for sequence in sequences():
        for row, (logits, _) in enumerate(routes(model, sequence).values()):
            for token in logits:
                ordered = sorted(token, reverse=True)
                expected[row] += ordered[k - 1] - ordered[k]
    np.testing.assert_allclose(stats.mean_margin, expected / stats.n_tokens, rtol=1e-5, atol=1e-6)


def test_the_margin_under_a_bias_and_groups_is_the_rules_own(hooked: Hooked) -> None:
    model = hooked("deepseek_v3")
    stats = collect_routing(model, sequences(), batch_size=3, progress=False)
    for row, layer in enumerate(model.moe_layers):
        margins = [
            float(model.routing_rule(layer).routing_margin(torch.tensor(token)))
            for sequence in sequences()
            for token in routes(model, sequence)[layer][0]
        ]
        assert float(stats.mean_margin[row]) == pytest.approx(np.mean(margins), rel=1e-5)


def test_a_layer_that_routes_by_a_table_has_an_infinite_margin(hooked: Hooked, tmp_path: Path) -> None:
    stats = collect_routing(hooked("deepseek_v4_hash"), tokens(3, 4), batch_size=2, progress=False)
    assert stats.mean_margin.isinf().tolist() == [True, False, False]
    stats.save(tmp_path / "s")
    assert torch.equal(RoutingStats.load(tmp_path / "s").mean_margin, stats.mean_margin)


def test_rules_that_cannot_tell_a_margin_leave_it_nan() -> None:
    class Unknown(SoftmaxTopK):
        def routing_margin(self, logits: Tensor) -> Tensor:
            raise HookError("needs more than logits")

    rules = {
        0: Unknown(n_experts=4, top_k=2, renormalize=False),
        2: SoftmaxTopK(n_experts=4, top_k=2, renormalize=False),
    }
    stats = RoutingStats.from_cache(random_cache(0), rules=rules)
    assert stats.mean_margin.isnan().tolist() == [True, False]
    with pytest.raises(DataError, match="lacks layer 2"):
        RoutingStats.from_cache(random_cache(0), rules={0: rules[0]})
    with pytest.raises(DataError, match="rules"):
        _ = RoutingStats.from_cache(random_cache(0)).mean_margin


def test_a_caches_model_gives_the_rules(hooked: Hooked) -> None:
    model = hooked("olmoe")
    from_cache = RoutingStats.from_cache(model.run_with_cache(tokens())[1])
    streamed = collect_routing(model, tokens(), progress=False)
    torch.testing.assert_close(from_cache.mean_margin, streamed.mean_margin)
    assert (from_cache + streamed).n_tokens == 28


@pytest.mark.parametrize("recipe", FAMILIES_WITH_GROUPS)
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6), batch_size=st.integers(1, 7))
def test_streaming_in_any_batch_size_is_one_batch(
    hooked: Hooked, recipe: str, lengths: list[int], batch_size: int
) -> None:
    """Counts exactly; the sums as far as padding leaves the model's own float32 numbers alone."""
    prompts = [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    whole = collect_routing(hooked(recipe), prompts, batch_size=len(prompts), **EVERYTHING).tensors()
    streamed = collect_routing(hooked(recipe), prompts, batch_size=batch_size, **EVERYTHING).tensors()
    assert streamed.keys() == whole.keys()
    for name, tensor in streamed.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(tensor, whole[name]), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 7), max_size=4, unique=True))
def test_parts_of_one_run_add_up_to_the_whole(seed: int, cuts: list[int]) -> None:
    whole, ids = random_cache(seed, (8, 5)), torch.randint(9, (8, 5))
    rules = {layer: SoftmaxTopK(n_experts=4, top_k=2, renormalize=False) for layer in (0, 2)}
    mask = torch.rand(8, 5) < 0.8
    mask[:, 0] = True

    def of(rows: slice) -> RoutingStats:
        return RoutingStats.from_cache(
            {name: value[rows] for name, value in whole.items()}, mask[rows], tokens=ids[rows], rules=rules,
            attention_mask=torch.ones_like(mask[rows]), per_prompt=True, positions=True, vocabulary=True,
        )  # fmt: skip

    bounds = [0, *sorted(cuts), 8]
    parts = [of(slice(start, stop)) for start, stop in itertools.pairwise(bounds)]
    added, expected = sum(parts[1:], parts[0]).tensors(), of(slice(0, 8)).tensors()
    for name, tensor in added.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=0)
        else:
            assert torch.equal(tensor, expected[name]), name


def test_batches_added_in_order_are_the_whole_bit_for_bit(hooked: Hooked, tmp_path: Path) -> None:
    model, prompts = hooked("qwen2_moe"), [tokens(1, 2 + n % 5, n)[0] for n in range(13)]
    whole = collect_routing(model, prompts, batch_size=2, **EVERYTHING).tensors()
    total = None
    for part in iterate_routing(model, prompts, batch_size=2, **EVERYTHING):
        total = part if total is None else total + part
        total.save(tmp_path / "partial")  # an interrupted run continues from the file
        total = RoutingStats.load(tmp_path / "partial")
    assert total is not None
    assert total.tensors().keys() == whole.keys()
    for name, tensor in total.tensors().items():
        assert torch.equal(tensor, whole[name]), name
        assert tensor.dtype == whole[name].dtype


@settings(max_examples=20, deadline=None)
@given(seeds=st.tuples(*[st.integers(0, 10**6)] * 3), sizes=st.tuples(*[st.integers(1, 6)] * 3))
def test_tables_add_associatively_and_exactly(seeds: Any, sizes: Any) -> None:
    a, b, c = (random_tables(seed, n) for seed, n in zip(seeds, sizes, strict=True))
    left, right = ((a + b) + c).tensors(), (a + (b + c)).tensors()
    for name, tensor in left.items():
        if name in ("probability_sums", "weight_sums", "entropy_sums"):
            torch.testing.assert_close(tensor, right[name])
        else:
            assert torch.equal(tensor, right[name]), name
    swapped = (b + a).tensors()
    for name in ("co_routing.coactivation", "by_position.counts", "vocabulary.counts", "vocabulary.totals"):
        assert torch.equal((a + b).tensors()[name], swapped[name])


def random_cache(seed: int, batch: tuple[int, ...] = (5,)) -> dict[str, Tensor]:
    generator, cache = torch.Generator().manual_seed(seed), {}
    for layer in (0, 2):
        logits = torch.randn(*batch, 4, generator=generator)
        weights, indices = logits.softmax(-1).topk(2)
        for point, value in (("router_logits", logits), ("topk_weights", weights), ("topk_indices", indices)):
            cache[f"blocks.{layer}.mlp.hook_{point}"] = value
    return cache


def random_tables(seed: int, n_prompts: int = 2, length: int = 3) -> RoutingStats:
    ids = torch.randint(9, (n_prompts, length), generator=torch.Generator().manual_seed(seed))
    everything = {name: value for name, value in EVERYTHING.items() if name != "progress"}
    return RoutingStats.from_cache(
        random_cache(seed, (n_prompts, length)), torch.ones(n_prompts, length), tokens=ids,
        attention_mask=torch.ones(n_prompts, length), **everything,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["co_routing", "per_prompt", "by_position", "vocabulary", "entropy_sums"])
def test_a_table_that_only_one_has_is_not_added(name: str) -> None:
    whole = random_tables(0)
    for first, second in ((whole, whole.without(name)), (whole.without(name), whole)):
        with pytest.raises(DataError, match=rf"without\('{name}'\)"):
            _ = first + second
    assert getattr(whole.without(name) + whole.without(name), name) is None


def test_a_summary_has_the_sums_only() -> None:
    summary = random_tables(0).summary()
    assert set(summary.tensors()) == {"counts", "probability_sums", "weight_sums"}
    assert same(summary, random_tables(0), exact=True)
    with pytest.raises(DataError, match="counts"):
        summary.without("counts")
    for name in ("coactivation", "transitions", "adjacent_overlap", "mean_entropy", "position_rates"):
        with pytest.raises(DataError, match="hold no"):
            getattr(summary, name)


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


def test_one_prompt_without_batch_dimension_has_the_same_tables(hooked: Hooked) -> None:
    model, batch = hooked("olmoe"), tokens(1, 6)
    _, flat = model.run_with_cache(batch, remove_batch_dim=True)
    _, whole = model.run_with_cache(batch)
    options: dict[str, Any] = {"per_prompt": True, "positions": True, "vocabulary": True}
    first = RoutingStats.from_cache(flat, tokens=batch[0], **options)
    second = RoutingStats.from_cache(whole, tokens=batch, **options)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    assert first.adjacent_overlap.n_adjacent == 5


def test_positions_start_at_each_prompts_first_token(hooked: Hooked) -> None:
    model, texts = hooked("olmoe"), [prompt(2), prompt(5, 1)]
    _, cache = model.run_with_cache(texts)  # 3 and 6 tokens with BOS, padded on the left
    stats = RoutingStats.from_cache(cache, positions=True)
    assert stats.by_position is not None
    assert stats.by_position.n_tokens.tolist() == [2, 2, 2, 1, 1, 1]
    last = torch.zeros(2, 6).bool()
    last[:, -1] = True
    by_position = RoutingStats.from_cache(cache, last, positions=True).by_position
    assert by_position is not None
    assert by_position.n_tokens.tolist() == [0, 0, 1, 0, 0, 1]
    with pytest.raises(DataError, match="attention_mask"):
        RoutingStats.from_cache(random_cache(0, (2, 3)), torch.ones(2, 3), positions=True)


@pytest.mark.parametrize("wrong", [None, torch.ones(2, 3), torch.ones(3, 2, dtype=torch.int64), "text"])
def test_a_vocabulary_needs_the_tokens_of_the_run(wrong: Any) -> None:
    cache = random_cache(0, (2, 3))
    with pytest.raises(DataError, match="tokens"):
        RoutingStats.from_cache(cache, torch.ones(2, 3), tokens=wrong, vocabulary=True)


def test_an_expert_named_twice_on_one_token_is_refused() -> None:
    cache = random_cache(0, (1, 9))
    indices = cache["blocks.0.mlp.hook_topk_indices"]
    indices[0, 0] = indices[0, 0, 0]
    with pytest.raises(DataError, match="twice"):
        RoutingStats.from_cache(cache)


def test_a_single_token_has_no_neighbour() -> None:
    stats = RoutingStats.from_cache(random_cache(0, (1, 1)))
    assert stats.adjacent_overlap.n_adjacent == 0
    assert bool(stats.adjacent_overlap.mean.isnan().all())


def test_a_prompt_of_which_nothing_counts_keeps_its_row() -> None:
    stats = RoutingStats.from_cache(
        random_cache(0, (2, 3)), torch.tensor([[0, 0, 0], [1, 1, 0]]), per_prompt=True
    )
    assert stats.per_prompt is not None
    assert stats.per_prompt.n_tokens.tolist() == [0, 2]


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_top_experts_are_those_of_a_sort_by_hand(hooked: Hooked, recipe: str) -> None:
    stats = collect_routing(hooked(recipe), tokens(3, 6), progress=False)
    every = [
        (-stats.counts[row, expert].item(), layer, expert)
        for row, layer in enumerate(stats.shape.layers)
        for expert in range(stats.shape.n_experts)
    ]
    for layer in (None, *stats.shape.layers):
        expected = sorted(entry for entry in every if layer in (None, entry[1]))
        for n in (1, len(expected)):
            found = stats.top_experts(n, layer)
            assert list(zip(-found["count"], found["layer"], found["expert"], strict=True)) == expected[:n]
    for row in stats.to_dataframe().to_dict("records"):
        at = stats.shape.layers.index(row["layer"]), row["expert"]
        assert (row["rate"], row["mean_probability"], row["mean_weight"]) == (
            stats.rates[at], stats.mean_probability[at], stats.mean_weight[at]
        )  # fmt: skip


def test_top_experts_that_there_are_not(hooked: Hooked) -> None:
    stats = collect_routing(hooked("deepseek_v3"), tokens(1, 4), progress=False)
    with pytest.raises(DataError, match=r"Layer 0 has no counts here; those that have: \(1"):
        stats.top_experts(1, layer=0)  # a dense layer
    for n in (0, -1, stats.shape.n_experts + 1, True):
        with pytest.raises(DataError, match="n must be from 1 to"):
            stats.top_experts(n, layer=1)
