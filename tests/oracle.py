"""What an MoE block computes, written out token by token and expert by expert in float64.

Shares no code with moe_lens and none with the forward of Hugging Face's blocks. Everything is
differentiable, so gradients can be compared too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny_models import router_of, sparse_blocks

Edit = Callable[[Tensor], Tensor]


def renormalises(hf_model: Any) -> bool:
    """Mixtral always divides the chosen probabilities by their sum; the others where the config says so."""
    return "Mixtral" in type(hf_model).__name__ or hf_model.config.norm_topk_prob


def probabilities(logits: Tensor) -> Tensor:
    """exp(z) / sum exp(z) of one token, [expert] -> [expert]."""
    powers = (logits.double() - logits.double().max()).exp()
    return powers / powers.sum()


def choose(logits: Tensor, k: int) -> list[int]:
    """The k experts with the largest logits of one token, largest first."""
    values = logits.tolist()
    return sorted(range(len(values)), key=lambda expert: -values[expert])[:k]


def weigh(logits: Tensor, experts: list[int], renormalise: bool) -> Tensor:
    """Weights of these experts for one token, [k]."""
    p = probabilities(logits)
    chosen = torch.stack([p[expert] for expert in experts])
    return chosen / sum(p[expert] for expert in experts) if renormalise else chosen


def expert_output(block: Any, x: Tensor, expert: int) -> Tensor:
    """What one expert makes of one token, [d_model] -> [d_model]."""
    gate_up, down = block.experts.gate_up_proj[expert].double(), block.experts.down_proj[expert].double()
    width = gate_up.shape[0] // 2
    gate, up = gate_up[:width] @ x, gate_up[width:] @ x
    return down @ (gate / (1 + torch.exp(-gate)) * up)


def shared_output(block: Any, x: Tensor) -> Tensor:
    """What the shared expert adds to one token; zero where there is none."""
    if not hasattr(block, "shared_expert"):
        return torch.zeros_like(x)
    gate, up, down, scale = (
        next(module.parameters()).double()
        for module in (
            block.shared_expert.gate_proj,
            block.shared_expert.up_proj,
            block.shared_expert.down_proj,
            block.shared_expert_gate,
        )
    )
    return torch.sigmoid(scale @ x) * (down @ (F.silu(gate @ x) * (up @ x)))


def combine(block: Any, x: Tensor, experts: list[int], weights: Tensor) -> Tensor:
    """Sum over the chosen experts of weight times output, plus the shared expert; one token, [d_model]."""
    x = x.double()
    total = shared_output(block, x)
    for expert, weight in zip(experts, weights, strict=True):
        total = total + weight.double() * expert_output(block, x, expert)
    return total


def block_output(block: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`combine` for every token: [batch pos d_model], [batch pos k], [batch pos k] -> [batch pos d_model]."""
    rows = [
        combine(block, x, experts.tolist(), w)
        for x, experts, w in zip(
            hidden.flatten(0, 1), indices.flatten(0, 1), weights.flatten(0, 1), strict=True
        )
    ]
    return torch.stack(rows).reshape(hidden.shape)


def route(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """`choose` and `weigh` for every token: [batch pos expert] -> indices and weights [batch pos k]."""
    rows = list(logits.flatten(0, 1))
    chosen = [choose(row, k) for row in rows]
    weights = [weigh(row, experts, renormalise) for row, experts in zip(rows, chosen, strict=True)]
    shape = (*logits.shape[:-1], k)
    return torch.tensor(chosen).reshape(shape), torch.stack(weights).reshape(shape)


def rewrite(hf_model: Any, edits: dict[int, Edit]) -> Any:
    """Make every MoE block of a bare Hugging Face model run the loops above, on logits edited by `edits`.

    `edits`: layer -> function of the router logits [batch pos expert]; layers left out are not edited.
    """
    renormalise = renormalises(hf_model)
    for layer, block in sparse_blocks(hf_model).items():
        block.forward = _oracle_forward(block, edits.get(layer, lambda logits: logits), renormalise)
    return hf_model


def _oracle_forward(block: Any, edit: Edit, renormalise: bool) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        router = router_of(block)
        logits = edit(torch.einsum("bpd,ed->bpe", hidden, router.weight))
        indices, weights = route(logits, router.top_k, renormalise)
        return block_output(block, hidden, indices, weights).to(hidden.dtype)

    return forward
