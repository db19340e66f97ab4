"""Rules of routers that choose by more than the order of their logits: biases, groups, tables.

    SigmoidTopK          sigmoid + bias within the best groups    DeepSeek-V3, GLM-4.x, MiniMax-M2, LFM2...
    BiasedSoftmaxTopK    softmax + bias                           ERNIE 4.5
    GroupLimitedSoftmax  softmax within the best groups           DeepSeek-V2
    FixedExperts         a table by token id                      DeepSeek-V4's first layers

With these rules, an expert with the lowest logit can still be chosen, and one with the highest left out. So
steering changes more than logits: it returns a rule that keeps deactivated experts out and puts activated
ones in, whatever their bias and group (`Hold`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from moe_lens.errors import HookError
from moe_lens.routers.groups import GroupLimit, group_margin
from moe_lens.routers.held import HeldRule
from moe_lens.routers.hold import Hold
from moe_lens.routers.plain import probabilities
from moe_lens.routers.rule import RoutingRule, at_least_float32
from moe_lens.routers.transform import move

SCORES: Final = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
"""Score functions by the name that configs give them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _ChoiceRule(HeldRule):
    """What these rules share: a top-k of selection scores, perhaps within groups."""

    _LEFT_OUT: ClassVar[float] = -torch.inf
    """The selection score of experts in groups that were not chosen."""
    _EPSILON_WITHOUT: ClassVar[float] = 0.01
    """How far `without` lowers the logits of excluded experts: as far as a steering plan, since the other
    experts' weights do not depend on them."""

    groups: GroupLimit | None = None
    in_order: bool = True

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """Indices of the k experts with the largest selection scores, of the chosen groups only, int64."""
        choice = self._allowed_scores(logits)
        return torch.topk(choice, self.top_k, dim=-1, sorted=self.in_order).indices

    def margin_of(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch"]:
        """As in `RoutingRule`; under group limits `group_margin`, which does not consider steering."""
        if self.groups is None:
            return super().margin_of(logits, indices)
        groups, choice = self.groups, self._choice(logits)
        return group_margin(
            at_least_float32(choice), self.top_k, groups.n_groups, groups.n_chosen, groups.n_summed
        )

    def cannot_steer(self, activate: Sequence[int], deactivate: Sequence[int]) -> str | None:
        """As in `RoutingRule`, and where group limits exclude the plan (`GroupLimit.obstacle`)."""
        reason = super().cannot_steer(activate, deactivate)
        if reason is not None or self.groups is None:
            return reason
        return self.groups.obstacle(self.n_experts, self.top_k, activate, deactivate)

    def _possible(
        self, inside: Bool[Tensor, "*batch expert"], outside: Bool[Tensor, "*batch expert"]
    ) -> Bool[Tensor, "*batch 1"]:
        possible = super()._possible(inside, outside)
        if self.groups is None:
            return possible
        return possible & self.groups.possible(inside, outside, self.top_k)

    def _allowed_scores(self, logits: Tensor) -> Tensor:
        """Selection scores, `_LEFT_OUT` for experts of groups that were not chosen."""
        choice, held = self._choice(logits), self.held(logits)
        if held is not None:
            choice = torch.where(held.tokens, self._steered_choice(choice, logits), choice)
        if self.groups is not None:
            left_out = ~self.groups.allowed(choice, self.top_k, None if held is None else held.like(logits))
            choice = choice.masked_fill(left_out, self._LEFT_OUT)
            if held is not None:
                choice = choice.masked_fill(left_out & held.tokens, -torch.inf)
        return choice if held is None else held.scores(choice)

    def _steered_choice(self, choice: Tensor, logits: Tensor) -> Tensor:
        """Scores to compare on steered tokens, in the order of `choice`."""
        return choice


@dataclass(frozen=True, eq=False, kw_only=True)
class SigmoidTopK(_ChoiceRule):
    """Sigmoid scores, chosen after adding a correction bias: DeepSeek-V3, GLM-4.x, MiniMax-M2...

    With s = score(logits): select = top-k(s + bias), within the best groups where `groups` are given; the
    weight of expert i is s_i without the bias, divided by (sum of the chosen s + `sum_epsilon`) if
    `renormalize`, times `scaling`. Scores are computed in float32, or in the logits' dtype if not
    `float32_scores`; weights come in `weights_dtype`, or in the scores' dtype if that is None.

    Selection scores (`routing_margin`) are in units of s + bias, s in [0, 1] for the sigmoid.

    Steering: epsilon is in units of the logit (for the sigmoid: log-odds): activated experts get the largest
    logit + epsilon and so the largest weight, deactivated ones the smallest − epsilon. That alone does not
    decide the choice, for the bias stays: so the steered rule puts activated experts in and keeps deactivated
    ones out directly. The others keep logits, scores and order bit for bit. With groups, those of activated
    experts are chosen first; the rest follow by score, passing over groups with too few experts left.

    >>> rule = SigmoidTopK(n_experts=3, top_k=1, bias=torch.tensor([0.0, 0.0, 0.9]))
    >>> rule.route(torch.tensor([[2.0, 1.0, 0.0]])).indices.tolist()      # 0.88, 0.73, 0.5 + 0.9
    [[2]]
    """

    bias: Float[Tensor, " expert"] | None = field(default=None, repr=False)
    renormalize: bool = True
    sum_epsilon: float = 1e-20
    scaling: float = 1.0
    score: str = "sigmoid"
    float32_scores: bool = True
    weights_dtype: torch.dtype | None = None

    def _choice(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        scores = self._scores(logits)
        return scores if self.bias is None else scores + self.bias.to(scores.device)

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights ≥ 0 of the experts of `indices`."""
        weights = self._scores(logits).gather(-1, indices)
        if self.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.sum_epsilon)
        return (weights * self.scaling).to(self.weights_dtype or weights.dtype)

    def _scores(self, logits: Tensor) -> Tensor:
        dtype = torch.float32
        if not self.float32_scores:  # steered logits, which are float32, as those that they were made of
            dtype = logits.dtype if self.hold is None or self.hold.dtype is None else self.hold.dtype
        return SCORES[self.score](logits.to(dtype))


@dataclass(frozen=True, eq=False, kw_only=True)
class BiasedSoftmaxTopK(_ChoiceRule):
    """Softmax over all experts, chosen after adding a correction bias: ERNIE 4.5.

    With p = softmax(logits) in float32: select = top-k(p + bias); the weight of expert i is p_i / max(sum of
    the chosen p, `smallest_sum`), in `weights_dtype`, or in float32 if that is None.

    Selection scores (`routing_margin`) are in units of p + bias, the other experts' p held fixed.

    Steering: epsilon is in nats of log-probability (SteerMoE's own formulas), which decides the weights. The
    choice is made directly, as the bias would overrule it; and as steering one expert scales every other p,
    `Hold.scale` undoes that for the choice, token by token, so that the others keep their scores and order
    (up to float32's rounding).

    >>> rule = BiasedSoftmaxTopK(n_experts=3, top_k=1, bias=torch.tensor([0.0, 0.5, 0.0]))
    >>> rule.route(torch.tensor([[1.0, 0.9, 0.0]]))
    Route(indices=tensor([[1]]), weights=tensor([[1.]]))
    """

    by_log_probability: ClassVar[bool] = True

    bias: Float[Tensor, " expert"] = field(repr=False)
    smallest_sum: float = 1e-12
    weights_dtype: torch.dtype | None = None

    def _choice(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        p = probabilities(logits)
        held = self.held(logits)
        if held is not None and held.scale is not None:
            p = torch.where(held.tokens, p * held.scale, p)
        return p + self.bias.to(p.device)

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights in [0, 1] of the experts of `indices`."""
        weights = probabilities(logits).gather(-1, indices)
        weights = weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=self.smallest_sum)
        return weights.to(self.weights_dtype or weights.dtype)

    def _scale(
        self, logits: Float[Tensor, "*batch expert"], hold: Hold, epsilon: float | Tensor
    ) -> Float[Tensor, "*batch 1"]:
        """The others' p before / after."""
        scores = torch.log_softmax(logits.detach().float(), dim=-1)
        moved = move(scores, hold.inside, hold.outside, epsilon)
        scale = torch.exp(torch.logsumexp(moved, dim=-1, keepdim=True))
        return torch.where(hold.tokens, scale, 1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupLimitedSoftmax(_ChoiceRule):
    """Softmax over all experts in float32, then the k largest within the best groups: DeepSeek-V2.

    With p = softmax(logits): a group's score is its largest p, experts of groups that are not chosen count as
    p = 0; the weight of expert i is p_i times `scaling`, not renormalised, float32.

    Selection scores (`routing_margin`) are in units of p, the other experts' p held fixed.

    Steering: epsilon is in nats of log-probability (SteerMoE's own formulas). The groups of activated experts
    are chosen first, the rest follow by score, passing over groups with too few experts left.

    >>> rule = GroupLimitedSoftmax(n_experts=4, top_k=2, groups=GroupLimit(2, 1, 1))
    >>> sorted(rule.route(torch.tensor([3.0, 0.0, 2.0, 2.0])).indices.tolist())     # groups (0, 1) and (2, 3)
    [0, 1]
    """

    by_log_probability: ClassVar[bool] = True

    _LEFT_OUT: ClassVar[float] = 0.0
    _EPSILON_WITHOUT: ClassVar[float] = torch.inf  # its weights are shares of all experts' probability

    scaling: float = 1.0
    in_order: bool = False

    def _choice(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        return probabilities(logits)

    def _steered_choice(self, choice: Tensor, logits: Tensor) -> Tensor:
        return logits.to(choice.dtype)  # which do not underflow

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights in [0, `scaling`] of the experts of `indices`, whatever their group.

        Only where p underflows in the chosen groups does the router itself take an expert from another group,
        with weight 0.
        """
        weights = probabilities(logits).gather(-1, indices)
        is_makeshift, held = self._allowed_scores(logits).gather(-1, indices) <= 0, self.held(logits)
        if held is not None:  # steering takes no expert from another group
            is_makeshift = is_makeshift & ~held.tokens
        # an expert outside the groups that an edit of the indices chose keeps its p
        chosen = (self.select(logits).unsqueeze(-2) == indices.unsqueeze(-1)).any(dim=-1)
        return weights.masked_fill(is_makeshift & chosen, 0.0) * self.scaling


@dataclass(frozen=True, eq=False)
class FixedExperts(RoutingRule):
    """Experts from a table by token id, weighed by scores of their logits: the first layers of DeepSeek-V4.

    Logits change the weights only (those of `weights`), so no steering is possible here. Which tokens are
    routed is known only while the model runs; offline use `rule.for_call(token_ids)`.
    """

    chooses_by_logits: ClassVar[bool] = False

    n_experts: int
    top_k: int
    table: Int[Tensor, "vocab k"] = field(repr=False)
    weights: SigmoidTopK
    token_ids: Int[Tensor, "*batch"] | None = field(default=None, repr=False)

    def for_call(self, *arguments: Any) -> "FixedExperts":
        """The rule for these token ids, [*batch]."""
        if not arguments or not isinstance(arguments[0], Tensor):
            raise HookError("Give the token ids as a tensor: rule.for_call(token_ids).")
        return replace(self, token_ids=arguments[0])

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """The table's experts for the tokens, whatever their logits."""
        if self.token_ids is None:
            raise HookError(
                "This layer's experts depend on token ids, not on logits; use rule.for_call(token_ids)."
            )
        n_ids, n_tokens = self.token_ids.numel(), logits.shape[:-1].numel()
        if n_ids != n_tokens:
            raise HookError(f"There are {n_ids} token ids for the logits of {n_tokens} tokens.")
        chosen = self.table[self.token_ids.to(self.table.device)].long()
        return chosen.reshape(*logits.shape[:-1], self.top_k).to(logits.device)

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """Weights ≥ 0 of the experts of `indices`, by the scores of their logits."""
        return self.weights.weigh(logits, indices)

    def routing_margin(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch"]:
        """Infinite: no change of logits changes the set of experts."""
        return torch.full(logits.shape[:-1], torch.inf, device=logits.device)

    def cannot_steer(self, activate: Sequence[int], deactivate: Sequence[int]) -> str | None:
        """Always a reason."""
        return "its experts come from a table by token id, which no router logit changes"
