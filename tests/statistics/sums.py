"""What the tests of statistics share: loops over Hugging Face's router outputs, and random statistics."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.shape import MoEShape
from moe_lens.statistics.routing_stats import RoutingStats
from tests.tiny_models import (
    N_EXPERTS,
    router_of,
    sparse_blocks,
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


EVERYTHING: dict[str, Any] = {"per_prompt": True, "positions": True, "vocabulary": True, "progress": False}


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
