"""Output layouts: what Hugging Face's routers return is read right, and written so that their blocks use it.

Oracles: each block's own forward, and loops over tokens and experts.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lens.model.layers import MoELayer, find_moe_layers
from moe_lens.routers.layouts import (
    AllExperts,
    InOrder,
    Layout,
    LayoutError,
    Probabilities,
    RouterOutput,
    SortedTokens,
)
from tests.families import every_family
from tests.tiny_models import tiny_model

N_TOKENS = 20


def layer(recipe: str, dtype: torch.dtype = torch.float32) -> MoELayer:
    *_, last = find_moe_layers(tiny_model(recipe, dtype))
    return last


def hidden_states(dtype: torch.dtype = torch.float32) -> Tensor:
    hidden = torch.randn(1, N_TOKENS, 32, generator=torch.Generator().manual_seed(0))
    return hidden.to(dtype)


def call(moe: MoELayer, hidden: Tensor) -> tuple[Any, Tensor]:
    with torch.no_grad():
        return moe.row.layout.call(moe.router, moe.router, *moe.row.inputs(moe.block, hidden.flatten(0, 1)))


def decide(moe: MoELayer, seed: int = 1) -> RouterOutput:
    """A random decision of the router's size, without duplicates, in an order that no router would give."""
    generator = torch.Generator().manual_seed(seed)
    n_experts, k = moe.rule.n_experts, moe.rule.top_k
    logits = torch.randn(N_TOKENS, n_experts, generator=generator)
    indices = torch.stack([torch.randperm(n_experts, generator=generator)[:k] for _ in range(N_TOKENS)])
    return RouterOutput(logits, torch.rand(N_TOKENS, k, generator=generator) + 0.1, indices)


def same_output(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def dense(decision: RouterOutput) -> Tensor:
    """Weight of each expert for each token, by a loop; an expert named twice counts twice."""
    weights = torch.zeros(decision.logits.shape)
    for token, (experts, values) in enumerate(zip(decision.indices, decision.weights, strict=True)):
        for expert, value in zip(experts.tolist(), values.tolist(), strict=True):
            weights[token, expert] += value
    return weights


# Round trips


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_router_says_is_unpacked_and_packed_bit_for_bit(recipe: str, dtype: torch.dtype) -> None:
    moe = layer(recipe, dtype)
    output, logits = call(moe, hidden_states(dtype))
    decision = moe.row.layout.unpack(output, logits)
    assert logits.shape == (N_TOKENS, moe.rule.n_experts)
    assert decision.indices.shape == decision.weights.shape == (N_TOKENS, moe.rule.top_k)
    assert decision.indices.dtype == torch.int64
    assert decision.weights.dtype == moe.row.layout.weights_dtype(output)
    assert torch.equal(decision.logits, logits)
    packed = moe.row.layout.pack(output, decision)
    if isinstance(moe.row.layout, Probabilities):  # softmax again: the same to the last bit or two
        torch.testing.assert_close(packed[0], output[0])
        packed = (output[0], *packed[1:])
    assert same_output(packed, output)


@every_family
def test_a_decision_is_packed_and_unpacked(recipe: str) -> None:
    moe = layer(recipe)
    output, _ = call(moe, hidden_states())
    decision = decide(moe)
    logits, weights, indices = moe.row.layout.unpack(moe.row.layout.pack(output, decision), decision.logits)
    assert torch.equal(logits, decision.logits)
    if isinstance(moe.row.layout, AllExperts):  # says nothing of the order
        assert torch.equal(indices.sort(-1).values, decision.indices.sort(-1).values)
        assert torch.equal(dense(RouterOutput(logits, weights, indices)), dense(decision))
    else:
        assert torch.equal(indices, decision.indices)
        assert torch.equal(weights, decision.weights)


@every_family
def test_a_router_is_called_once_and_left_as_it_was(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = layer(recipe)
    original, calls = moe.router.forward, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(moe.router, "forward", counted)
    call(moe, hidden_states())
    assert len(calls) == 1
    assert not any(module._forward_hooks for module in moe.router.modules())


# Blocks run the experts of a packed decision


def run(moe: MoELayer, decision: RouterOutput) -> Tensor:
    """What the block of `moe` gives when its router says `decision`."""
    block: Any = moe.block
    output, _ = call(moe, hidden_states())
    packed = moe.row.layout.pack(output, decision)
    if isinstance(moe.row.layout, Probabilities):  # a whole decoder layer: its experts alone
        with torch.no_grad():
            return block.experts(hidden_states()[0], packed[2], packed[1])
    moe.router.forward = lambda *args: packed
    with torch.no_grad():
        result = block(hidden_states())
    del moe.router.forward
    return (result[0] if isinstance(result, tuple) else result).reshape(N_TOKENS, -1)


def nothing(decision: RouterOutput) -> RouterOutput:
    return decision._replace(weights=torch.zeros_like(decision.weights))


@pytest.mark.parametrize(
    "recipe", ["olmoe", "gpt_oss", "deepseek_v3", "afmoe", "granitemoe", "gemma4", "jetmoe", "laguna"]
)
def test_the_block_runs_each_expert_as_often_as_it_is_named(recipe: str) -> None:
    """Also one that a hook names twice: its output counts with the sum of both weights."""
    moe = layer(recipe)
    decision = decide(moe)
    twice = decision.indices.clone()
    twice[::2, 1] = twice[::2, 0]
    decision = decision._replace(indices=twice)
    base = run(moe, nothing(decision))  # what shared experts and biases of the block give
    expected = torch.zeros_like(base)
    for slot in range(twice.shape[-1]):
        alone = torch.zeros_like(decision.weights)
        alone[:, slot] = decision.weights[:, slot]
        expected += run(moe, decision._replace(weights=alone)) - base
    torch.testing.assert_close(run(moe, decision) - base, expected, rtol=1e-4, atol=1e-5)
    merged = decision.weights.clone()
    merged[::2, 0] += merged[::2, 1]
    merged[::2, 1] = 0
    torch.testing.assert_close(
        run(moe, decision), run(moe, decision._replace(weights=merged)), rtol=1e-4, atol=1e-5
    )
    assert (run(moe, decision) - base).abs().max() > 1e-2


def test_all_experts_adds_the_weights_of_an_expert_that_is_named_twice() -> None:
    moe = layer("llama4")
    output, _ = call(moe, hidden_states())
    decision = decide(moe)
    twice = decision._replace(indices=decision.indices[:, :1].expand(-1, 2).clone())
    weights, logits = AllExperts().pack(output, twice)
    assert torch.equal(logits, twice.logits)
    torch.testing.assert_close(weights, dense(twice))
    assert ((weights != 0).sum(-1) == 1).all()


@pytest.mark.parametrize("duplicates", [False, True])
def test_sorted_tokens_counts_every_slot(duplicates: bool) -> None:
    moe = layer("jetmoe")
    output, _ = call(moe, hidden_states())
    decision = decide(moe)
    if duplicates:
        decision = decision._replace(indices=decision.indices[:, :1].expand(-1, 2).clone())
    order, tokens, weights, sizes, logits = SortedTokens().pack(output, decision)
    assert logits is decision.logits
    assert sum(sizes) == decision.indices.numel()
    assert sizes == [int((decision.indices == expert).sum()) for expert in range(moe.rule.n_experts)]
    k, seen = decision.indices.shape[-1], set()
    place = 0
    for expert, size in enumerate(sizes):
        for _ in range(size):
            token, slot = divmod(int(order[place]), k)
            assert int(tokens[place]) == token
            assert int(decision.indices[token, slot]) == expert
            assert weights[place] == decision.weights[token, slot]
            seen.add((token, slot))
            place += 1
    assert len(seen) == decision.indices.numel()


def test_sorted_tokens_has_an_entry_for_an_expert_that_no_token_takes() -> None:
    moe = layer("jetmoe")
    output, _ = call(moe, hidden_states())
    decision = decide(moe)
    decision = decision._replace(indices=torch.tensor([[0, 2]]).expand(N_TOKENS, -1).clone())
    assert SortedTokens().pack(output, decision)[3] == [N_TOKENS, 0, N_TOKENS, 0, 0, 0]


# Shapes and dtypes


def test_packed_parts_have_the_shape_and_dtype_of_the_output() -> None:
    logits = torch.randn(2, 3, 5)
    output = (torch.ones(2, 3, 2, dtype=torch.int32), torch.ones(2, 3, 2, dtype=torch.bfloat16), logits)
    layout = InOrder(("indices", "weights", "logits"))
    decision = RouterOutput(torch.randn(6, 5), torch.full((6, 2), 0.5), torch.full((6, 2), 3))
    indices, weights, packed_logits = layout.pack(output, decision)
    assert (indices.dtype, indices.shape) == (torch.int32, (2, 3, 2))
    assert (weights.dtype, weights.shape) == (torch.bfloat16, (2, 3, 2))
    assert torch.equal(packed_logits, decision.logits.view(2, 3, 5))
    assert layout.weights_dtype(output) == torch.bfloat16
    unpacked = layout.unpack((indices, weights, packed_logits), packed_logits)
    assert unpacked.indices.tolist() == [[3, 3]] * 6
    assert unpacked.weights.tolist() == [[0.5, 0.5]] * 6


def test_probabilities_follow_edited_logits() -> None:
    moe = layer("gemma4")
    output, _ = call(moe, hidden_states())
    decision = decide(moe)
    packed = Probabilities().pack(output, decision)
    expected = decision.logits.double().exp()
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(packed[0].double(), expected)
    assert packed[0].dtype == torch.float32


def test_all_experts_finds_experts_that_are_not_the_largest_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    decision = AllExperts().unpack((torch.tensor([[0.0, 0.2, 0.7]]), logits), logits)
    assert decision.indices.tolist() == [[2, 1]]
    torch.testing.assert_close(decision.weights, torch.tensor([[0.7, 0.2]]))


def test_every_layout_is_a_layout() -> None:
    assert all(isinstance(each(), Layout) for each in (InOrder, Probabilities, AllExperts, SortedTokens))


# Errors


X = torch.zeros(4, 3)
BAD: dict[str, tuple[Any, Any, str]] = {
    "a tensor": (InOrder(), X, r"returns no \(logits, weights, indices\)"),
    "a list": (InOrder(), [X, X, X], r"returns no \(logits, weights, indices\)"),
    "two tensors": (InOrder(("weights", "indices", "logits")), (X, X), r"no \(weights, indices, logits\)"),
    "None among them": (InOrder(), (X, X, None), "returns no"),
    "one tensor for all experts": (AllExperts(), (X,), "returns no .weights of all experts, logits"),
    "fewer weights than logits": (AllExperts(), (X[:, 1:], X), r"shape \(4, 2\), not \(4, 3\) as its logits"),
    "no order": (SortedTokens(), (X, X, X), "returns no .order, tokens, weights, tokens per expert, logits"),
    "logits elsewhere": (SortedTokens(), (X, X, X, X, [1]), "returns no .order, tokens"),
}


@pytest.mark.parametrize(("layout", "output", "words"), BAD.values(), ids=BAD)
def test_an_output_that_is_none_is_refused(layout: Layout, output: Any, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        layout.call(nn.Identity(), lambda: output)
    with pytest.raises(LayoutError, match=words):
        layout.unpack(output, X)


def test_slots_that_do_not_divide_among_the_tokens_are_refused() -> None:
    moe = layer("jetmoe")
    output, logits = call(moe, hidden_states())
    cut = (output[0][:-1], *output[1:])
    with pytest.raises(LayoutError, match=f"gives {2 * N_TOKENS - 1} experts to {N_TOKENS} tokens"):
        SortedTokens().unpack(cut, logits)


@pytest.mark.parametrize("n_calls", [0, 2])
def test_a_router_that_does_not_call_its_projection_once_is_refused(n_calls: int) -> None:
    router: Any = copy.deepcopy(layer("gemma4").router)
    output = (torch.zeros(4, 6), torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))

    def forward(hidden: Tensor) -> Any:
        for _ in range(n_calls):
            router.proj(hidden)
        return output

    with pytest.raises(LayoutError, match=r"does not call router\.proj once"):
        Probabilities().call(router, forward, hidden_states()[0])
    assert not router.proj._forward_hooks
