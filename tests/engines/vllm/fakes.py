"""What the plugin sees of vLLM, without vLLM: layers with a router, requests, a batch that runs."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens import MoEShape
from moe_lens.engines.vllm.seam import _steered
from moe_lens.engines.vllm.tables import Tables

N_EXPERTS, TOP_K = 6, 2
LAYERS = (1, 2, 4)
SHAPE = MoEShape("fake", LAYERS, N_EXPERTS, TOP_K)


class Layer(nn.Module):
    """A MoE layer: a gate, and a softmax router that renormalises nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gate = nn.Parameter(torch.randn(N_EXPERTS, 8, generator=generator))
        self.router: Any = SimpleNamespace()
        self.layer_name = f"layers.{seed}"

    def run(self, hidden: Tensor) -> Tensor:
        """As vLLM runs it, with the plugin's two calls; returns the experts."""
        logits = _steered(self, hidden @ self.gate.T)
        weights, indices = logits.softmax(-1).topk(TOP_K)
        self.router.moe_lens_records[0][: len(indices)].copy_(indices)
        self.router.moe_lens_records[1][: len(indices)].copy_(weights)
        return indices


def tables(n_plans: int = 3, n_rows: int = 64) -> Tables:
    """Of three layers."""
    layers = {number: Layer(number) for number in LAYERS}
    return Tables(layers, SHAPE, n_plans, n_rows, torch.device("cpu"))


def state(n_prompt: int, extra: dict[str, Any] | None = None) -> Any:
    """vLLM's state of a request."""
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), num_prompt_tokens=n_prompt)


def hidden(name: str, positions: range) -> Tensor:
    """[pos 8]: what a request's tokens look like, the same whenever they run."""
    rows = [
        torch.randn(8, generator=torch.Generator().manual_seed(hash((ord(name), p)) % 2**31))
        for p in positions
    ]
    return torch.stack(rows)


def step(
    tables: Tables, batch: list[tuple[str, int, int]], states: dict[str, Any], finished: Any = ()
) -> dict[int, Tensor]:
    """A batch runs, with some padding after it; returns the experts of its rows in each layer."""
    tables.forget(finished)
    tables.place(batch, states)
    rows = torch.cat([hidden(name, range(start, start + n)) for name, n, start in batch])
    padded = torch.cat([rows, torch.full((3, 8), 9.0)])
    experts = {number: layer.run(padded)[: len(rows)] for number, layer in tables.layers.items()}
    tables.count()
    return experts
