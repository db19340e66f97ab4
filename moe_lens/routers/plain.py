"""Rules of routers that choose the experts with the k largest logits. They differ in the weights.

SoftmaxTopK   softmax over all experts, then the k largest     OLMoE, Mixtral, Qwen, Jamba, Gemma 4...
TopKSoftmax   the k largest, then softmax over those           GPT-OSS, Granite, JetMoE
TopKSigmoid   the k largest, then a sigmoid of each            Llama 4
SparseMixer   two masked arg-max rounds                        Phi-3.5-MoE
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.routers.held import HeldRule, Steered
from moe_lens.routers.hold import Hold
from moe_lens.routers.transform import moved


@dataclass(frozen=True, eq=False)
class ByOrderOfLogits(HeldRule):
    """What these rules share: they compare logits, and may weigh in the logits' dtype."""

    def _choice(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        return logits

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights of the experts of `indices`, see the class.

        Steered logits are float32. Among them, tokens that are not steered are weighed in the dtype that
        they had before, as if there were no plan.
        """
        weights, hold = self._weights(logits, indices), self.hold
        if hold is None or hold.dtype in (None, logits.dtype) or hold.steers_all:
            return weights
        unsteered = self._weights(logits.to(hold.dtype), indices).to(weights.dtype)
        return torch.where(hold.upon(logits).tokens, weights, unsteered)

    @abstractmethod
    def _weights(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights by these logits alone."""

    def _hold_out(
        self, logits: Float[Tensor, "*batch expert"], mask: Bool[Tensor, "*#batch expert"]
    ) -> Steered:
        """The experts' logits become -inf: weights are those of a router without them."""
        removed = logits.masked_fill(mask, -math.inf)
        hold = Hold(torch.zeros_like(mask), mask).like(logits)
        hold = replace(hold, dtype=logits.dtype, given=removed.detach().clone())
        return removed, replace(self, hold=hold.after(self.held(logits), self._possible))


@dataclass(frozen=True, eq=False)
class SoftmaxTopK(ByOrderOfLogits):
    """Softmax over all experts in float32, then the k largest: OLMoE, Mixtral, the Qwen family and others.

    With p = softmax(logits): select = top-k(p); the weight of expert i is p_i, divided by the sum of the
    chosen p if `renormalize`, times `scaling`, times `expert_scale[i]` where the router has one (Gemma 4).
    Weights come in float32 if `float32_weights`, else in the logits' dtype. `in_order=False` leaves the
    experts in whatever order torch finds them (DeepSeek-V2). Among experts more than about 100 nats below the
    best, p is 0 in float32 and the router's choice arbitrary.

    Steering: epsilon is in nats of log-probability above the largest and below the smallest (SteerMoE's own
    formulas). The others' log-probabilities move together, so their order and ratios stay.

    >>> rule = SoftmaxTopK(n_experts=4, top_k=2, renormalize=True)
    >>> logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    >>> rule.select(logits).tolist(), rule.routing_margin(logits).tolist()
    ([[0, 2]], [1.0])
    """

    by_log_probability: ClassVar[bool] = True

    renormalize: bool
    float32_weights: bool = False
    scaling: float = 1.0
    expert_scale: Float[Tensor, " expert"] | None = field(default=None, repr=False)
    in_order: bool = True

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """Indices of the k most probable experts, most probable first if `in_order`, int64.

        On steered tokens the logits are compared, whose order is the same and does not underflow.
        """
        held = self.held(logits)
        if held is None:
            choice = probabilities(logits)
        elif held.steers_all:
            choice = held.scores(logits)
        else:
            p = probabilities(logits)
            choice = held.scores(torch.where(held.tokens, logits.to(p.dtype), p))
        return torch.topk(choice, self.top_k, dim=-1, sorted=self.in_order).indices

    def decide(
        self, logits: Float[Tensor, "*batch expert"], hold: Hold, epsilon: float | Float[Tensor, "*#batch 1"]
    ) -> tuple[Float[Tensor, "*batch expert"], Int[Tensor, "*batch k"], Float[Tensor, "*batch k"]]:
        """As in `HeldRule`; for a plan that holds on all tokens the same operations with no way around.

        (In a small model functions that are called cost more than what they compute.)
        """
        named, steps, ranks = hold.named, hold.steps, hold.ranks
        if self.hold is not None or not hold.everywhere or named is None or steps is None or ranks is None:
            return super().decide(logits, hold, epsilon)
        steered = moved(torch.log_softmax(logits.float(), dim=-1), hold.inside, named, steps)
        indices = torch.topk(steered + ranks, self.top_k, dim=-1, sorted=self.in_order).indices
        return steered, indices, self._weights(steered, indices)

    def _weights(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights of the experts of `indices`: in [0, 1] before the scalings."""
        weights = probabilities(logits).gather(-1, indices)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.to(weights.device)[indices]
        weights = weights if self.scaling == 1.0 else weights * self.scaling
        return weights if self.float32_weights else weights.to(logits.dtype)


@dataclass(frozen=True, eq=False)
class TopKSoftmax(ByOrderOfLogits):
    """The k largest logits, then softmax over those k: GPT-OSS, Granite MoE, JetMoE.

    Weights sum to 1. They come in `weights_dtype` (Granite, JetMoE: the hidden states'), or in the logits'
    dtype if that is None (GPT-OSS); softmax runs in the logits' dtype.

    Steering: epsilon is in nats of log-probability (SteerMoE's own formulas); the others keep their order and
    the differences of their logits.

    >>> rule = TopKSoftmax(n_experts=4, top_k=2)
    >>> indices, weights = rule.route(torch.tensor([[2.0, 0.0, 2.0, -1.0]]))
    >>> weights.tolist()
    [[0.5, 0.5]]
    """

    by_log_probability: ClassVar[bool] = True

    weights_dtype: torch.dtype | None = None

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """Indices of the k largest logits, largest first, int64."""
        return torch.topk(self.selection_scores(logits), self.top_k, dim=-1).indices

    def _weights(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights in [0, 1] that sum to 1 over the experts of `indices`."""
        weights = torch.softmax(logits.gather(-1, indices), dim=-1)
        return weights.to(self.weights_dtype or logits.dtype)


@dataclass(frozen=True, eq=False)
class TopKSigmoid(ByOrderOfLogits):
    """The k largest logits, each through a sigmoid of its own: Llama 4.

    The weight of expert i is sigmoid(z_i), in the logits' dtype. Llama 4 multiplies the expert's *input* by
    it, and calls all experts: those that are not chosen with an input of zero.

    Steering: epsilon is in units of the logit (log-odds) above the largest and below the smallest; the others
    keep their logits bit for bit, and so their weights.

    >>> rule = TopKSigmoid(n_experts=3, top_k=1)
    >>> rule.route(torch.tensor([[-1.0, 0.0, -2.0]])).weights.tolist()
    [[0.5]]
    """

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """Indices of the k largest logits, largest first, int64."""
        return torch.topk(self.selection_scores(logits), self.top_k, dim=-1).indices

    def _weights(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights in [0, 1], each of its own expert's logit alone."""
        # of all logits, as the router: torch rounds an element by its place in the tensor
        return torch.sigmoid(logits.float()).gather(-1, indices).to(logits.dtype)


@dataclass(frozen=True, eq=False)
class SparseMixer(ByOrderOfLogits):
    """Phi-3.5-MoE's sparsemixer (arXiv 2409.12136) as it runs outside training; k is always 2.

    First the largest logit, then the largest of the rest. Each round's weight is the expert's share of a
    softmax over the round's logits z_i with (m − z_i) / max(|z_i|, m) ≤ 2 `jitter`, m the round's largest; in
    the second round the first expert is out. The two weights do not sum to 1. They come in the logits' dtype.

    Steering: epsilon is in units of the logit above the largest and below the smallest; the others keep their
    logits bit for bit (the threshold sees more than differences of logits).

    >>> rule = SparseMixer(n_experts=3, jitter=0.01)
    >>> rule.route(torch.tensor([[3.0, 1.0, -2.0]]))
    Route(indices=tensor([[0, 1]]), weights=tensor([[1., 1.]]))
    """

    jitter: float
    top_k: int = field(default=2, init=False)

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """Index of the largest logit and of the largest of the rest, int64."""
        scores = self.selection_scores(logits)
        first = scores.max(dim=-1, keepdim=True).indices
        second = scores.scatter(-1, first, -torch.inf).max(dim=-1, keepdim=True).indices
        return torch.cat([first, second], dim=-1)

    def _weights(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """The first expert's weight of the first round and the second's of the second, in [0, 1].

        An expert below its round's threshold that an edit of the indices chose takes part in the softmax of
        those that pass the threshold.
        """
        first, second = indices.split(1, dim=-1)
        rest = logits.scatter(-1, first, -torch.inf)
        # an expert that an edit chose twice weighs the same both times
        rest = torch.where(second == first, logits, rest)
        is_first = torch.arange(2, device=logits.device) == 0
        return torch.where(is_first, self._round(logits, logits, first), self._round(logits, rest, second))

    def _round(self, logits: Tensor, left: Tensor, chosen: Tensor) -> Tensor:
        with torch.no_grad():
            largest = left.max(dim=-1, keepdim=True).values
            factor = logits.abs().clamp(min=largest)
            too_low = ((largest - logits) / factor) > (2 * self.jitter)
            too_low = too_low.scatter(-1, chosen, False)
        return torch.softmax(left.masked_fill(too_low, -torch.inf), dim=-1).gather(-1, chosen)


def probabilities(logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
    """Softmax over all experts, in float32 whatever the logits' dtype."""
    return torch.softmax(logits, dim=-1, dtype=torch.float32)
