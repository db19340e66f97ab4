"""What the tests of the model share: edits of logits, and blocks recorded and checked in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lens import hook_names
from moe_lens.model.hooked_moe import HookedMoE
from tests import oracle
from tests.edits import SPELLERS, roll
from tests.tiny_models import (
    sparse_blocks,
    tokens,
)

Hooked = Callable[..., HookedMoE]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest value compared


def point_names(model: Any) -> list[str]:
    return [spell(layer) for layer in model.moe_layers for spell in SPELLERS]


def negate(logits: Tensor) -> Tensor:
    return -logits


def force_expert_0(logits: Tensor) -> Tensor:
    return logits + 8.0 * nn.functional.one_hot(torch.tensor(0), logits.shape[-1])


def halve_and_remove_expert_1(logits: Tensor) -> Tensor:
    gone = nn.functional.one_hot(torch.tensor(1), logits.shape[-1]).bool()
    return (logits / 2).masked_fill(gone, -float("inf"))


def reverse_ranks(logits: Tensor) -> Tensor:
    """The least likely expert becomes the likeliest; values half a unit apart, exact in every dtype."""
    return logits.argsort(dim=-1, stable=True).argsort(-1).to(logits.dtype) * -0.5


EDITS = [negate, roll, force_expert_0, halve_and_remove_expert_1]
every_edit = pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.double().abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)


def padded() -> tuple[Tensor, Tensor]:
    """Left-padded tokens and their mask, [3 8]; the rows have 8, 5 and 2 tokens of their own."""
    mask = torch.arange(8) >= torch.tensor([[0], [3], [6]])
    return tokens(3, 8).masked_fill(~mask, 0), mask


class Record:
    """Hooks that keep what passes some points, one entry a forward pass."""

    def __init__(self, *names: str):
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}

    @property
    def hooks(self) -> list[tuple[str, Any]]:
        return [(name, self._keep) for name in self.seen]

    def _keep(self, value: Tensor, hook: Any) -> None:
        self.seen[hook.name].append(value.detach().clone())


def record_block(layer: int) -> Record:
    mlp = f"blocks.{layer}.mlp"
    return Record(f"{mlp}.hook_in", f"{mlp}.hook_out", *(spell(layer) for spell in SPELLERS))


def assert_block_ran_as_recorded(model: HookedMoE, layer: int, record: Record, dtype: torch.dtype) -> None:
    """Every pass: selection and weights follow from the recorded logits, the output from these."""
    block = sparse_blocks(model.original_model)[layer]
    assert len(record.seen[hook_names.router_logits(layer)]) > 0
    for hidden, output, logits, indices, weights in zip(*record.seen.values(), strict=True):
        expected = oracle.route(logits, model.top_k, oracle.renormalises(model.original_model))
        assert torch.equal(indices, expected[0])
        assert_close(weights, expected[1], dtype)
        assert_close(output, oracle.block_output(block, hidden, *expected), dtype)
