"""At the size of a real model: OLMoE-1B-7B's own shape in bfloat16, but for its number of layers.

8 of its 16 layers, 7 GB, since other tests run beside these; `make bench-real` counts and steers all 16.
Every model here has the same parameters in memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from benchmarks.models import real_size, sharing
from moe_lens import HookedMoE, RoutedModel, SteeringPlan, collect_routing, detach, steer_hooks
from tests.families import broad
from tests.tiny_models import hook_census, plain_bridge, router_of, sparse_blocks

LAYERS, EXPERTS, TOP_K = 8, 64, 8
NEEDED = 12 * 2**30
"""Bytes: the model's 7 GB, and what tests beside these may come to need."""

pytestmark = broad

UP = [(layer, (7 * layer + 3 * i) % EXPERTS) for layer in range(LAYERS) for i in (1, 2)]
DOWN = [(layer, (5 * layer + 11 * i + 1) % EXPERTS) for layer in range(LAYERS) for i in range(4)]
PLAN = SteeringPlan(UP, [expert for expert in DOWN if expert not in UP])


@pytest.fixture(scope="module")
def bare() -> Iterator[Any]:
    if psutil.virtual_memory().available < NEEDED:
        pytest.skip("needs 12 GB of free memory")
    with torch.no_grad():
        yield real_size(LAYERS)


def ids(batch: int = 2, pos: int = 32) -> Tensor:
    return torch.randint(50304, (batch, pos), generator=torch.Generator().manual_seed(1))


def counted(router_logits: Any) -> Tensor:
    """How often each expert of each layer is among the best, token by token: [layer expert]."""
    counts = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for layer, logits in enumerate(router_logits):
        for token in logits.flatten(0, -2).softmax(-1, dtype=torch.float32):
            counts[layer, token.topk(TOP_K).indices] += 1
    return counts


def test_a_routed_model_counts_what_hugging_face_routes(bare: Any) -> None:
    model = RoutedModel(sharing(bare))
    expected = counted(bare(ids(), output_router_logits=True).router_logits)
    stats = collect_routing(model, ids(), progress=False)
    assert stats.counts.tolist() == expected.tolist()
    assert stats.n_tokens == ids().numel()
    assert torch.equal(model(ids()), bare(ids()).logits)


def test_a_bridge_counts_what_the_plain_bridge_routes(bare: Any) -> None:
    """The bridge's attention rounds bfloat16 otherwise than Hugging Face's, so that close choices differ."""
    plain, hooked = plain_bridge(sharing(bare)), HookedMoE.from_hf(sharing(bare))
    names = [f"blocks.{layer}.mlp.gate.hook_out" for layer in range(LAYERS)]
    logits, cache = plain.run_with_cache(ids(), names_filter=names)
    stats = collect_routing(hooked, ids(), progress=False)
    assert stats.counts.tolist() == counted([cache[name] for name in names]).tolist()
    assert torch.equal(hooked(ids()), logits)


@pytest.mark.parametrize("wrap", [RoutedModel, HookedMoE.from_hf], ids=["RoutedModel", "HookedMoE"])
def test_a_plan_holds(bare: Any, wrap: Any) -> None:
    """Read where the experts are called."""
    model: Any = wrap(sharing(bare))
    ran: dict[int, Tensor] = {}

    def note(layer: int) -> Any:
        return lambda module, args: ran.update({layer: args[1].view(-1, TOP_K)})

    for layer, block in sparse_blocks(model.original_model).items():
        inner = next(module for module in block.modules() if type(module).__name__ == "OlmoeExperts")
        inner.register_forward_pre_hook(note(layer))
    model.run_with_hooks(ids(), fwd_hooks=steer_hooks(PLAN))
    assert ran.keys() == set(range(LAYERS))
    for layer, expert in PLAN.activate:
        assert (ran[layer] == expert).any(-1).all()
    for layer, expert in PLAN.deactivate:
        assert not (ran[layer] == expert).any()


def steered_by_hand(router: Any, layer: int) -> Any:
    """Makes Hugging Face's router choose by SteerMoE's formulas; returns the handle of the hook that does."""
    up, down = ([e for at, e in experts if at == layer] for experts in (PLAN.activate, PLAN.deactivate))

    def route(module: Any, args: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores = output[0].float().log_softmax(-1)
        least, most = scores.min(-1, keepdim=True).values, scores.max(-1, keepdim=True).values
        scores[:, up], scores[:, down] = most + 0.01, least - 0.01
        weights, indices = scores.softmax(-1).topk(TOP_K, dim=-1)
        return scores, weights.to(output[1].dtype), indices

    return router.register_forward_hook(route)


def test_a_steered_generation_is_the_one_by_hand(bare: Any) -> None:
    hf_model, by_hand = sharing(bare), sharing(bare)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids())}
    with RoutedModel(hf_model).hooks(steer_hooks(PLAN)):
        written = hf_model.generate(ids(), **options)
    with ExitStack() as handles:
        for layer, block in sparse_blocks(by_hand).items():
            handles.callback(steered_by_hand(router_of(block), layer).remove)
        expected = by_hand.generate(ids(), **options)
    assert written.sequences.tolist() == expected.sequences.tolist()
    assert all(map(torch.equal, written.logits, expected.logits))
    assert not torch.equal(written.logits[0], bare.generate(ids(), **options).logits[0])


def test_detached_the_model_is_hugging_faces(bare: Any) -> None:
    hf_model = sharing(bare)
    model = RoutedModel(hf_model)
    model.run_with_hooks(ids(1, 8), fwd_hooks=steer_hooks(PLAN))
    assert model.detach() is hf_model
    assert hook_census(hf_model) == hook_census(bare)
    assert not any("forward" in vars(module) for module in hf_model.modules())
    assert torch.equal(hf_model(ids()).logits, bare(ids()).logits)
    assert all(mine is its for mine, its in zip(hf_model.parameters(), bare.parameters(), strict=True))


def test_detached_the_bridge_is_the_plain_one(bare: Any) -> None:
    model, plain = HookedMoE.from_hf(sharing(bare)), plain_bridge(sharing(bare))
    model.run_with_hooks(ids(1, 8), fwd_hooks=steer_hooks(PLAN))
    left: Any = detach(model)
    assert torch.equal(left(ids()), plain(ids()))
    assert hook_census(left) == hook_census(plain)
    assert left.hook_dict.keys() == plain.hook_dict.keys()
    assert all(mine is its for mine, its in zip(left.parameters(), plain.parameters(), strict=True))
