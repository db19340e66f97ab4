"""What a router computes: pure functions `logits -> indices -> weights`, one frozen dataclass a rule.

    rule = rule_for(hf_router)                 # parameters are read from the live router
    indices = rule.select(logits)              # [*batch expert] -> [*batch k], int64
    weights = rule.weigh(logits, indices)      # [*batch expert], [*batch k] -> [*batch k]

Rules hold no tensors and know no models, so they also serve offline, on cached or edited logits.
`RULES` says which Hugging Face router class follows which rule; a new family is a new row there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouterError


@runtime_checkable
class RoutingRule(Protocol):
    """What every rule offers: the router's size and its two steps."""

    @property
    def n_experts(self) -> int:
        """Number of experts that the router chooses from."""
        ...

    @property
    def top_k(self) -> int:
        """Number of experts that it chooses for each token."""
        ...

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """The experts that run."""
        ...

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """How much each expert of `indices` counts."""
        ...


@dataclass(frozen=True)
class SoftmaxTopK:
    """Softmax over all experts in float32, then the k largest: OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE.

    With p = softmax(logits): select = top-k(p); the weight of expert i is p_i, divided by the sum of
    the chosen p if `renormalize`. Weights come in float32 if `float32_weights`, else in the logits' dtype.

    >>> rule = SoftmaxTopK(n_experts=4, top_k=2, renormalize=True)
    >>> logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    >>> rule.select(logits).tolist()
    [[0, 2]]
    """

    n_experts: int
    top_k: int
    renormalize: bool
    float32_weights: bool = False

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """Indices of the k most probable experts, most probable first, int64."""
        return torch.topk(_probabilities(logits), self.top_k, dim=-1).indices

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights in [0, 1] of the experts of `indices`, which need not be the top-k."""
        weights = _probabilities(logits).gather(-1, indices)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights if self.float32_weights else weights.to(logits.dtype)


def _probabilities(logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def _qwen_style(router: Any) -> SoftmaxTopK:
    return SoftmaxTopK(router.num_experts, router.top_k, renormalize=router.norm_topk_prob)


def _mixtral(router: Any) -> SoftmaxTopK:
    return SoftmaxTopK(router.num_experts, router.top_k, renormalize=True, float32_weights=True)


RULES: dict[str, Callable[[Any], RoutingRule]] = {
    "OlmoeTopKRouter": _qwen_style,
    "Qwen2MoeTopKRouter": _qwen_style,
    "Qwen3MoeTopKRouter": _qwen_style,
    "MixtralTopKRouter": _mixtral,
}
"""Hugging Face router class name -> function that reads the rule's parameters from a live router."""


def is_known_router(module: nn.Module) -> bool:
    """Whether `RULES` has a rule for this module's class or one of its parent classes."""
    return _factory(module) is not None


def rule_for(router: nn.Module) -> RoutingRule:
    """The rule of a live Hugging Face router, with the parameters it has now.

    A subclass of a known router gets its parent's rule; the self-check at attach tells whether that is true.

    Raises:
        UnsupportedRouterError: no row of `RULES` names the router's class.
    """
    factory = _factory(router)
    if factory is None:
        raise UnsupportedRouterError(
            f"{type(router).__name__} is no router that moe_lens has a rule for. "
            f"Known router classes: {', '.join(sorted(RULES))}."
        )
    return factory(router)


def _factory(module: nn.Module) -> Callable[[Any], RoutingRule] | None:
    return next((RULES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in RULES), None)
