"""On every family: the chosen experts, their weights, the sum of their outputs, and the counts of them."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from moe_lens import hook_names
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.routing_stats import RoutingStats, is_routing_point
from tests import router_oracle as oracle
from tests.edits import SPELLERS
from tests.families import every_dtype_first_float32, in_every_dtype, recipes
from tests.promises.decisions import Hooked, Plain, assert_near, hf_model, is_hash, other_experts, padded
from tests.tiny_models import (
    EVERY_FAMILY,
    ONE_OF_EACH_KIND,
    tiny_model,
    tokens,
)

LLAMA4 = ("llama4", "llama4_vl")

pytestmark = pytest.mark.usefixtures("no_gradients")


def weights_of_any_experts(router: Any, logits: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    """HF's weights for experts that its router did not choose: [token expert], [token k] -> [token k].

    From the same router choosing all experts, and divided by the chosen ones' sum if that is what it does.
    """
    if type(router).__name__ == "PhimoeTopKRouter":
        return sparsemixer_weights(logits, indices, router.router_jitter_noise)
    every = oracle.decide(router, logits, *rest, top_k=logits.shape[-1]).weights
    scale = getattr(router, "per_expert_scale", torch.ones(logits.shape[-1]))
    few = oracle.decide(router, logits, *rest).weights
    totals = torch.stack([(each / scale).sum(-1) for each in (every, few)])
    chosen = (every / scale).gather(-1, indices)
    if torch.allclose(totals, totals[0, 0].expand_as(totals), rtol=1e-4):  # it divides by their sum
        chosen = chosen / chosen.sum(-1, keepdim=True) * totals[0, 0]
    return chosen * scale[indices]


def sparsemixer_weights(logits: Tensor, indices: Tensor, jitter: float) -> Tensor:
    rows = []
    for z, chosen in zip(logits.tolist(), indices.tolist(), strict=True):
        row, left = [], dict(enumerate(z))
        for expert in chosen:
            highest = max(left.values())
            near = {
                other: value
                for other, value in left.items()
                if other == expert or (highest - value) / max(abs(value), highest) <= 2 * jitter
            }
            powers = {other: torch.tensor(value - highest).exp() for other, value in near.items()}
            row.append(powers[expert] / sum(powers.values()))
            del left[expert]
        rows.append(torch.stack(row))
    return torch.stack(rows)


@in_every_dtype(float32=ONE_OF_EACH_KIND)
def test_edited_indices_get_the_weights_of_hfs_router(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare = hooked(recipe, dtype), hf_model(plain(recipe, dtype))
    alone = tiny_model(recipe, dtype)  # HF's own forward; inside a bridge FlexOlmo's fails in half precision
    for layer, router in oracle.routers(bare).items():
        rest = oracle.arguments(alone, layer, tokens())
        if is_hash(router):  # it weighs as its neighbour does
            router, rest = oracle.routers(bare)[layer + 1], ()
        wanted = other_experts(torch.zeros(2, 7, model.n_experts), model.top_k)
        with model.hooks([(hook_names.topk_indices(layer), lambda i, hook, wanted=wanted: wanted)]):
            _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
        assert torch.equal(cache[hook_names.topk_indices(layer)], wanted)
        logits = cache[hook_names.router_logits(layer)].flatten(0, 1)
        # in float32, whatever the model computes in: the same numbers, only finer
        router = copy.deepcopy(router).float()
        expected = weights_of_any_experts(router, logits.float(), wanted.flatten(0, 1), *rest)
        assert_near(cache[hook_names.topk_weights(layer)].flatten(0, 1), expected)


class Block:
    """The MoE block of the last layer that has one, with experts and weights of our choice."""

    def __init__(self, model: HookedMoE):
        self.model, self.layer = model, model.moe_layers[-1]
        block = oracle.moe_block(hf_model(model), self.layer)
        gemma = type(oracle.routers(hf_model(model))[self.layer]).__name__ == "Gemma4TextRouter"
        self.block = getattr(block.experts, "original_component", block.experts) if gemma else block
        self.input = torch.empty(0)

    def output(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """What the block (Gemma 4: its experts) gives for the tokens, [token d_model]."""
        given = {hook_names.topk_indices(self.layer): indices, hook_names.topk_weights(self.layer): weights}
        hooks: list[Any] = [
            (name, lambda old, hook, new=new: new.reshape(old.shape).to(old.dtype))
            for name, new in given.items()
            if new is not None
        ]
        outputs: list[Any] = []

        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.input = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2).clone()
            outputs.append(output)

        handle = self.block.register_forward_hook(note, with_kwargs=True)
        self.model.run_with_hooks(tokens(), fwd_hooks=hooks)
        handle.remove()
        output = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
        return output.flatten(0, -2).clone()


@every_dtype_first_float32
@recipes(
    (recipe for recipe in ONE_OF_EACH_KIND if recipe not in LLAMA4),
    (recipe for recipe in EVERY_FAMILY if recipe not in LLAMA4),
)
def test_the_block_adds_weight_times_output_of_each_chosen_expert(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    block, (n_experts, k) = Block(model), (model.n_experts, model.top_k)
    zero, first = torch.zeros(14, k), torch.eye(k)[0].expand(14, k)
    rest = block.output(weights=zero)  # what is there without routed experts
    alone = torch.stack(
        [
            block.output((torch.arange(k) + expert).remainder(n_experts).expand(14, k), first) - rest
            for expert in range(n_experts)
        ]
    )  # [expert token d_model]
    assert alone.abs().amax(dim=(1, 2)).min() > 0

    def expected(indices: Tensor, weights: Tensor) -> Tensor:
        of_slots = alone[indices, torch.arange(14)[:, None]]  # [token k d_model]
        return rest + (weights[..., None] * of_slots).sum(dim=1)

    _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    own = [cache[spell(block.layer)].flatten(0, 1) for spell in SPELLERS[1:]]
    assert_near(block.output(), expected(own[0], own[1]))  # no hook: HF's own code
    wanted = other_experts(torch.zeros(14, n_experts), k)
    weights = torch.randn(14, k, generator=torch.Generator().manual_seed(1))
    assert_near(block.output(wanted, weights), expected(wanted, weights))


@every_dtype_first_float32
@pytest.mark.parametrize("recipe", LLAMA4)
def test_the_weights_of_llama4_multiply_each_experts_input(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    block, k = Block(model), model.top_k
    experts = block.block.experts
    experts = getattr(experts, "original_component", experts)

    def expected(indices: Tensor, weights: Tensor) -> Tensor:
        total = rest.clone()
        for token, (chosen, scales) in enumerate(zip(indices.tolist(), weights, strict=True)):
            for expert, scale in zip(chosen, scales, strict=True):
                gate, up = (scale * block.input[token] @ experts.gate_up_proj[expert]).chunk(2)
                total[token] += (gate / (1 + torch.exp(-gate)) * up) @ experts.down_proj[expert]
        return total

    rest = block.output(weights=torch.zeros(14, k))
    _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    own = [cache[spell(block.layer)].flatten(0, 1) for spell in SPELLERS[1:]]
    assert_near(block.output(), expected(own[0], own[1]))
    wanted = other_experts(torch.zeros(14, model.n_experts), k)
    weights = torch.rand(14, k, generator=torch.Generator().manual_seed(1))
    assert_near(block.output(wanted, weights), expected(wanted, weights))


@in_every_dtype(float32=ONE_OF_EACH_KIND)
def test_statistics_count_what_hfs_routers_chose(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare, seen = hooked(recipe, dtype), plain(recipe, dtype), cast(oracle.Seen, {})
    input_ids, mask = padded()
    _, cache = model.run_with_cache(input_ids, **mask)
    stats = RoutingStats.from_cache(cache)
    with oracle.rerouted(hf_model(bare), {}, seen):
        bare(input_ids, **mask)
    own = mask["attention_mask"].bool().flatten()
    assert stats.shape == model.moe_shape
    assert stats.n_tokens == int(own.sum())
    for row, (layer, (decided,)) in enumerate(seen.items()):
        assert stats.shape.layers[row] == layer
        assert torch.equal(stats.counts[row], decided.chosen[own].sum(0))
        torch.testing.assert_close(stats.weight_sums[row], decided.weights[own].double().sum(0))
