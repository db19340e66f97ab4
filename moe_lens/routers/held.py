"""`HeldRule`: what the built-in rules share. They carry a hold, which has the last word in a choice.

    logits, rule = rule.steer(logits, [3], [1], 0.01)       # expert 3 in, expert 1 out, on every token
    rule.select(logits + 0.1 * noise)                       # still so

Each rule says how it scores experts (`_choice`); steering is here.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.routers.hold import Hold
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.transform import move, moved

Steered = tuple[Float[Tensor, "*batch expert"], RoutingRule]
Rule = TypeVar("Rule", bound="HeldRule")


@dataclass(frozen=True, eq=False)
class HeldRule(RoutingRule):
    """A rule whose choice a hold overrules.

    Attributes:
        hold: experts that steering put in and kept out, of the shape of the logits; None without steering.
    """

    by_log_probability: ClassVar[bool] = False
    """Whether steering moves log-probabilities (SteerMoE's formulas) rather than the logits themselves."""
    _EPSILON_WITHOUT: ClassVar[float] = math.inf
    """How far below the others an excluded expert's logit is put; infinitely far where it would take a part
    of all experts' probability."""

    n_experts: int
    top_k: int
    hold: Hold | None = field(default=None, kw_only=True, repr=False)

    @abstractmethod
    def _choice(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        """Selection scores without steering."""

    def selection_scores(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        """What the choice compares, larger is better; ±inf for experts that steering holds in or out."""
        choice, held = self._choice(logits), self.held(logits)
        return choice if held is None else held.scores(choice)

    def held(self, logits: Float[Tensor, "*batch expert"]) -> Hold | None:
        """Whom steering holds once the logits are these (`Hold.upon`); None without steering."""
        return None if self.hold is None else self.hold.upon(logits)

    def steer(
        self,
        logits: Float[Tensor, "*batch expert"],
        activate: Sequence[int],
        deactivate: Sequence[int],
        epsilon: float,
    ) -> Steered:
        """Transformed logits, float32, and this rule with the experts put in and kept out.

        Without experts, the logits and this rule.

        Raises:
            PlanError: `cannot_steer` gives a reason.
        """
        self.refuse_plan(activate, deactivate)
        if not activate and not deactivate:
            return logits.float(), self
        hold = Hold.of_experts(activate, deactivate, self.n_experts, logits.device)
        return self.steer_by(logits, hold, epsilon)

    def steer_by(
        self: Rule,
        logits: Float[Tensor, "*batch expert"],
        hold: Hold,
        epsilon: float | Float[Tensor, "*#batch 1"],
        watched: bool = True,
    ) -> tuple[Float[Tensor, "*batch expert"], Rule]:
        """`steer` with other experts on every token, none on some: what a hold says. It must be possible.

        Logits of tokens that are not steered keep their values (in float32).

        Args:
            watched: keep the logits that come out, so that later hooks about steered experts set them free.
                Not needed where no hook follows.
        """
        if self.hold is None and hold.everywhere and not watched:
            return self._steer_all(logits, hold, epsilon)
        everywhere, hold = hold.everywhere, hold.like(logits)
        scores = torch.log_softmax(logits.float(), dim=-1) if self.by_log_probability else logits.float()
        steered = move(scores, hold.inside, hold.outside, epsilon)
        if not everywhere and self.by_log_probability:
            steered = torch.where(hold.tokens, steered, logits.float())
        hold = replace(
            hold,
            dtype=logits.dtype,
            given=steered.detach().clone() if watched else None,
            scale=self._scale(logits, hold, epsilon),
        )
        return steered, replace(self, hold=hold.after(self.held(logits), self._possible))

    def _steer_all(
        self: Rule, logits: Float[Tensor, "*batch expert"], hold: Hold, epsilon: float | Tensor
    ) -> tuple[Float[Tensor, "*batch expert"], Rule]:
        """The same on every token, with nothing to look at afterwards: as few operations as can be.

        In a small model each one costs more than it computes, and so does each function that is called.
        """
        scores = torch.log_softmax(logits.float(), dim=-1) if self.by_log_probability else logits.float()
        scale = self._scale(logits, hold, epsilon)
        if scale is not None:
            hold = replace(hold.like(logits), dtype=logits.dtype, scale=scale)
        elif hold.dtype != logits.dtype:
            hold = replace(hold, dtype=logits.dtype)
        if hold.steps is None or hold.named is None:
            return move(scores, hold.inside, hold.outside, epsilon), self._holding(hold)
        return moved(scores, hold.inside, hold.named, hold.steps), self._holding(hold)

    def decide(
        self, logits: Float[Tensor, "*batch expert"], hold: Hold, epsilon: float | Float[Tensor, "*#batch 1"]
    ) -> tuple[Float[Tensor, "*batch expert"], Int[Tensor, "*batch k"], Float[Tensor, "*batch k"]]:
        """`steer_by`, where no hook follows, then `select` and `weigh`: steered logits, indices, weights."""
        steered, rule = self.steer_by(logits, hold, epsilon, watched=False)
        indices = rule.select(steered)
        return steered, indices, rule.weigh(steered, indices)

    def _holding(self: Rule, hold: Hold) -> Rule:
        """`replace(self, hold=hold)`, which checks and copies field by field, at a tenth of its time."""
        if torch.compiler.is_compiling():
            return replace(self, hold=hold)
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), hold=hold)
        return twin

    def _scale(
        self, logits: Float[Tensor, "*batch expert"], hold: Hold, epsilon: float | Tensor
    ) -> Float[Tensor, "*batch 1"] | None:
        """`Hold.scale`; None where steering does not scale what the choice compares."""
        return None

    def _possible(
        self, inside: Bool[Tensor, "*batch expert"], outside: Bool[Tensor, "*batch expert"]
    ) -> Bool[Tensor, "*batch 1"]:
        """Whether the router can put these in and keep those out: `cannot_steer`, token by token."""
        n_in, n_out = inside.sum(dim=-1, keepdim=True), outside.sum(dim=-1, keepdim=True)
        return (n_in <= self.top_k) & (n_out <= self.n_experts - self.top_k)

    def _leave_out(self, logits: Float[Tensor, "*batch expert"], experts: list[int]) -> Steered:
        return self._hold_out(logits, Hold.of_experts([], experts, self.n_experts, logits.device).outside)

    def _hold_out(
        self, logits: Float[Tensor, "*batch expert"], mask: Bool[Tensor, "*#batch expert"]
    ) -> Steered:
        return self.steer_by(logits, Hold(torch.zeros_like(mask), mask), self._EPSILON_WITHOUT)

    def _can_exclude(self, mask: Bool[Tensor, "*batch expert"]) -> Bool[Tensor, "*batch"]:
        return self._possible(torch.zeros_like(mask), mask).squeeze(-1)

    def released(self: Rule, tokens: Bool[Tensor, "*batch"]) -> Rule:
        """The rule that holds nobody on these tokens."""
        return self if self.hold is None else replace(self, hold=self.hold.on(~tokens))

    def only_on(self, tokens: Bool[Tensor, "*batch"], before: RoutingRule) -> RoutingRule:
        """This rule on these tokens; elsewhere that of `before`."""
        if self.hold is None:  # it set everybody free, so on the other tokens `before` goes on
            return before.released(tokens)
        earlier = before.hold if isinstance(before, HeldRule) else None
        return replace(self, hold=self.hold.elsewhere(tokens, earlier))

    def at(self: Rule, tokens: Int[Tensor, "*part"]) -> Rule:
        """The rule for some tokens, given by their numbers in the flattened batch."""
        return self if self.hold is None else replace(self, hold=self.hold.at(tokens))

    def joined(self: Rule, part: Any, tokens: Int[Tensor, "*part"], batch: tuple[int, ...]) -> Rule:
        """The rule of a whole batch of which some tokens, given by their numbers, are routed by `part`."""
        whole = part.hold.spread(tokens, batch)
        is_part = torch.zeros(batch, dtype=torch.bool, device=whole.inside.device)
        is_part.view(-1)[tokens.reshape(-1).to(is_part.device)] = True
        return replace(self, hold=whole.elsewhere(is_part, self.hold))
