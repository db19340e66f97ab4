"""What the tests of promises share: edits of routes, padded prompts, and how decisions are compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.model.hooked_moe import HookedMoE
from tests import router_oracle as oracle
from tests.edits import SPELLERS
from tests.tiny_models import (
    tokens,
)

Hooked = Callable[..., HookedMoE]
Plain = Callable[..., TransformerBridge]
SCALES = (0.3, 2.0, 10.0)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest value


def on_all_points(model: HookedMoE, function: Any) -> list[Any]:
    return [(spell(layer), function) for layer in model.moe_layers for spell in SPELLERS]


def shuffle(scale: float, seed: int = 0, n_tokens: int | None = None) -> oracle.Edit:
    """Rolls the experts and adds noise: for each of `n_tokens` tokens its own, or the same for all."""

    def edit(logits: Tensor) -> Tensor:
        rows = 1 if n_tokens is None else n_tokens
        noise = scale * torch.randn(
            rows, logits.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )
        rolled = logits.roll(1, dims=-1)
        noise = noise if n_tokens is None else noise.reshape(logits.shape)
        return rolled + noise.to(logits.dtype)

    return edit


def padded() -> tuple[Tensor, dict[str, Any]]:
    """Left-padded tokens [3 8] and their mask; the rows have 8, 5 and 2 tokens of their own."""
    mask = torch.arange(8) >= torch.tensor([[0], [3], [6]])
    return tokens(3, 8).masked_fill(~mask, 0), {"attention_mask": mask.long()}


def routing(cache_or_dict: Any, layer: int) -> oracle.Decision:
    return oracle.by_expert(*(cache_or_dict[spell(layer)] for spell in SPELLERS))


def assert_decided(actual: oracle.Decision, expected: oracle.Decision) -> None:
    for name, ours, theirs in zip(expected._fields, actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def assert_near(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Equal but for rounding: that of the dtype of `actual`, if no tolerance is given."""
    if tolerance is None:
        tolerance = TOLERANCE[actual.dtype]
        actual, expected = actual.float(), expected.float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def generate(model: TransformerBridge, length: int = 4) -> Tensor:
    """The tokens of a greedy generation with cache, prompt included."""
    generated = model.generate(
        tokens(2, 4), max_new_tokens=length, do_sample=False, stop_at_eos=False, verbose=False
    )
    assert isinstance(generated, Tensor)
    return generated


def given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def hf_model(bridge: TransformerBridge) -> Any:
    return bridge.original_model


def other_experts(logits: Tensor, k: int, seed: int = 0) -> Tensor:
    """Random experts, none twice: [*batch k]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(logits.shape, generator=generator).argsort(dim=-1)[..., :k]


def is_hash(router: Any) -> bool:
    return type(router).__name__ == "DeepseekV4HashRouter"
