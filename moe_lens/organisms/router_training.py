"""Training-time access to a model's routers: noise and a bias on the logits, and the logits themselves.

A Hugging Face router returns (logits, weights, indices) and offers no place to add to the logits, so its
`forward` is wrapped while `training_routers` is open. Afterwards the model is an ordinary model again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

BLOCKED: Final = -1e9
"""Added to a router logit, it keeps the expert from being chosen."""


@dataclass
class RouterTap:
    """What goes into and comes out of the routers of one forward pass.

    Attributes:
        noise: standard deviation of the Gaussian noise added to every router logit.
        bias: added to the router logits of each sequence, at all its positions; None for nothing.
        logits: the logits of the last forward pass, one tensor a layer, before noise and bias.
    """

    noise: float = 0.0
    bias: Float[Tensor, "layer batch expert"] | None = None
    logits: list[Float[Tensor, "batch pos expert"]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.logits = []


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router of each layer of an OLMoE or Mixtral model, in order."""
    return [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]


@contextmanager
def training_routers(model: PreTrainedModel, batch_size: int) -> Iterator[RouterTap]:
    """Wrap the routers' `forward`; yields the tap through which they are read and biased.

    Selection and weights are recomputed from the edited logits as OLMoE with `norm_topk_prob=True` and
    Mixtral both compute them: the k largest of the softmax, divided by their sum.
    """
    tap = RouterTap()
    wrapped = routers(model)
    for router in wrapped:
        router.forward = _tapped(router, tap, batch_size)
    try:
        yield tap
    finally:
        for router in wrapped:
            del router.forward  # uncovers the class's own


def _tapped(router: nn.Module, tap: RouterTap, batch_size: int) -> Any:
    k = int(router.top_k)  # pyright: ignore[reportArgumentType]

    def forward(hidden: Float[Tensor, "... d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = nn.functional.linear(flat, router.weight)  # pyright: ignore[reportArgumentType]
        by_sequence = logits.view(batch_size, -1, logits.shape[-1])
        edited = by_sequence
        if tap.bias is not None:
            edited = edited + tap.bias[len(tap.logits)].unsqueeze(1)
        if tap.noise:
            edited = edited + tap.noise * torch.randn_like(edited)
        tap.logits.append(by_sequence)
        weights, indices = edited.flatten(0, 1).softmax(-1).topk(k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), indices

    return forward
