"""`RoutingRule`: what every rule offers. The rules themselves are in `plain.py` and `biased.py`.

    indices, weights = rule.route(logits)         # [*batch expert] -> [*batch k], [*batch k]
    margin = rule.routing_margin(logits)          # [*batch]: how far each token is from other experts
    logits, rule = rule.without(logits, 3)        # routing as if expert 3 were not there

Rules know no models and no hooks, so they serve live routers and also offline, on cached or edited logits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.checks import as_index
from moe_lens.errors import DataError, HookError, PlanError
from moe_lens.routers.transform import steer_raw_logits


class Route(NamedTuple):
    """Which experts run for each token, and how much each counts."""

    indices: Int[Tensor, "*batch k"]
    weights: Float[Tensor, "*batch k"]


class RoutingRule(ABC):
    """Two pure functions, `select` and `weigh`, and what follows from them.

    >>> from moe_lens import organisms
    >>> rule = organisms.load("specialised").routing_rule(0)     # the rule of that layer's router
    >>> rule.n_experts, rule.top_k
    (8, 2)
    >>> indices, weights = rule.route(torch.arange(8.0))         # logits of one token
    >>> indices.tolist()
    [7, 6]

    A rule is a frozen dataclass (`eq=False`, for tensors among its fields) whose fields are the router's
    parameters; `n_experts` and `top_k` are among them. The methods here are right for rules that choose the
    experts with the k largest logits; a rule that chooses otherwise overrides `selection_scores`,
    `routing_margin`, `cannot_steer` and `steer`, and `without` where steering does not serve it.
    """

    chooses_by_logits: ClassVar[bool] = True
    """Whether the choice of experts depends on the router logits at all."""

    n_experts: int
    """Number of experts that the router chooses from."""
    top_k: int
    """Number of experts that it chooses for each token."""

    @abstractmethod
    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        """The experts that run, int64, in the router's own order."""

    @abstractmethod
    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        """How much each expert of `indices` counts; they need not be the ones that `select` gives."""

    def route(self, logits: Float[Tensor, "*batch expert"]) -> Route:
        """The experts that run and their weights: `select`, then `weigh`.

        Raises:
            DataError: the logits are not those of `n_experts` experts.
        """
        self.check_width(logits)
        indices = self.select(logits)
        return Route(indices, self.weigh(logits, indices))

    def selection_scores(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        """What the choice compares, larger is better: the logits themselves (nats)."""
        return logits

    def routing_margin(self, logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch"]:
        """How far each token is from another set of experts, ≥ 0; inf where every expert runs.

        The smallest change of one expert's selection score, up or down, that changes the set of chosen
        experts: the lowest chosen score minus the highest score that was not chosen (`selection_scores`: nats
        of router logit, unless the rule says otherwise).
        """
        self.check_width(logits)
        return self.margin_of(logits, self.select(logits))

    def margin_of(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch"]:
        """`routing_margin`, where it is known that `select(logits)` gives these indices."""
        scores = at_least_float32(self.selection_scores(logits))
        lowest = scores.gather(-1, indices).amin(dim=-1)
        highest = scores.scatter(-1, indices, -torch.inf).amax(dim=-1)
        return (lowest - highest).clamp(min=0)  # probabilities that round to equals may change places

    def check_width(self, logits: Tensor) -> None:
        """Raise DataError unless the last dimension of the logits holds `n_experts` experts."""
        if logits.ndim == 0 or logits.shape[-1] != self.n_experts:
            raise DataError(
                f"Logits of shape {tuple(logits.shape)} are not those of a router with {self.n_experts} "
                "experts, which has them in the last dimension."
            )

    def cannot_steer(self, activate: Sequence[int], deactivate: Sequence[int]) -> str | None:
        """Why steering cannot keep its guarantee for these experts, in words; None where it can."""
        experts, room = [*activate, *deactivate], self.n_experts - self.top_k
        if len(set(experts)) < len(experts):
            return "an expert is named twice"
        if any(not 0 <= expert < self.n_experts for expert in experts):
            return f"the experts are 0 to {self.n_experts - 1}"
        if len(activate) > self.top_k or len(deactivate) > room:
            return f"at most {self.top_k} experts can be activated and {room} deactivated"
        return None

    def refuse_plan(self, activate: Sequence[int], deactivate: Sequence[int]) -> None:
        """Raise PlanError where `cannot_steer` gives a reason."""
        if (reason := self.cannot_steer(activate, deactivate)) is not None:
            raise PlanError(f"This router cannot be steered so: {reason}.")

    def steer(
        self,
        logits: Float[Tensor, "*batch expert"],
        activate: Sequence[int],
        deactivate: Sequence[int],
        epsilon: float,
    ) -> "tuple[Float[Tensor, '*batch expert'], RoutingRule]":
        """Logits, and the rule to route them by, that run activated experts and no deactivated ones.

        Activated experts get the largest logit plus epsilon, deactivated ones the smallest minus epsilon,
        others keep theirs; the rule stays the same. Activated and deactivated experts are different ones.

        Raises:
            PlanError: `cannot_steer` gives a reason.
            HookError: the rule does not choose by the order of its logits, so that the guarantee is not met.
        """
        self.refuse_plan(activate, deactivate)
        steered = steer_raw_logits(logits, activate, deactivate, epsilon)
        indices = self.select(steered)
        missing = [expert for expert in activate if not bool((indices == expert).any(-1).all())]
        present = [expert for expert in deactivate if bool((indices == expert).any())]
        if missing or present:
            raise HookError(
                f"{type(self).__name__} does not choose by the order of logits: on some token, steering left "
                f"out the activated experts {missing} or chose the deactivated experts {present}. Give the "
                "rule a `steer` method of its own."
            )
        return steered, self

    def without(
        self, logits: Float[Tensor, "*batch expert"], experts: int | Sequence[int] | Any
    ) -> "tuple[Float[Tensor, '*batch expert'], RoutingRule]":
        """Logits, and the rule to route them by, that never choose an expert (or any of several).

        >>> from moe_lens import organisms
        >>> rule = organisms.load("specialised").routing_rule(0)
        >>> logits, rule = rule.without(torch.arange(8.0), 7)
        >>> rule.route(logits).indices.tolist()                 # the next-best one takes its place
        [6, 5]

        Where the router chooses by the order of its logits, the expert's becomes -inf and that is all, so
        that the weights of softmax routers are those of a model without the expert. Where a bias or expert
        groups decide too, the route is that of `SteeringPlan(deactivate=...)`, and the rule that comes back
        keeps the expert out itself. Either way the other experts keep their order (in groups: a group with
        too few experts left is passed over), and gradients flow to their logits.
        Within a hook on the router logits: `logits, hook.rule = hook.rule.without(logits, expert)`. (A logit
        of -inf alone excludes nobody from a router with a correction bias: the expert's score is the lowest
        before the bias, and the bias may still lift it into the top-k.)

        Raises:
            HookError: the router takes its experts from a table, so that no logit matters; fewer than k
                experts would be left, not counting those that another hook set to -inf; no such expert.
        """
        excluded = self._numbers(experts)
        if (reason := self.cannot_steer([], excluded)) is not None:
            raise HookError(f"{type(self).__name__} cannot route around experts {excluded}: {reason}.")
        remaining, rule = self._leave_out(logits, excluded)
        if bool(chooses_any(rule, remaining, excluded).any()):
            raise HookError(
                f"Experts {excluded} cannot be routed around: on some token fewer than {self.top_k} others "
                "have finite logits. Another hook has set theirs to -inf; let fewer hooks exclude experts."
            )
        return remaining, rule

    def _leave_out(
        self, logits: Float[Tensor, "*batch expert"], experts: list[int]
    ) -> "tuple[Float[Tensor, '*batch expert'], RoutingRule]":
        """What `without` gives for experts that the rule can leave out."""
        return self.steer(logits, [], experts, math.inf)

    def excluding(
        self, logits: Float[Tensor, "*batch expert"], mask: Tensor
    ) -> "tuple[Float[Tensor, '*batch expert'], RoutingRule]":
        """`without` token by token: logits, and the rule, that never choose an expert of `mask`.

        >>> from moe_lens import organisms
        >>> rule = organisms.load("specialised").routing_rule(0)
        >>> mask = torch.zeros(2, 8, dtype=torch.bool)           # [token expert]
        >>> mask[0, 7] = True
        >>> logits, rule = rule.excluding(torch.arange(8.0).expand(2, 8), mask)
        >>> rule.route(logits).indices.tolist()
        [[6, 5], [7, 6]]

        Within a hook on the router logits: `logits, hook.rule = hook.rule.excluding(logits, mask)`. Tokens of
        which nothing is excluded keep their logits.

        Args:
            mask: bool [*batch expert] or [expert], true for experts that must not run.

        Raises:
            HookError: a mask that does not fit the logits; on some token, which the message names, it leaves
                fewer than k experts, or none that the router's groups allow; the router takes its experts
                from a table.
        """
        if mask.dtype != torch.bool or mask.ndim == 0 or mask.ndim > logits.ndim:
            raise HookError(
                f"A mask of excluded experts must be bool and fit logits of shape {tuple(logits.shape)}; got "
                f"{mask.dtype} of shape {tuple(mask.shape)}."
            )
        try:
            mask = mask.to(logits.device).expand(logits.shape)
        except RuntimeError as error:
            raise HookError(
                f"A mask of excluded experts of shape {tuple(mask.shape)} does not fit logits of shape "
                f"{tuple(logits.shape)}."
            ) from error
        if not self.chooses_by_logits:
            raise HookError(f"{type(self).__name__} cannot exclude experts: {self.cannot_steer([], [0])}.")
        self._refuse_tokens(mask, ~self._can_exclude(mask))
        remaining, rule = self._hold_out(logits, mask)
        self._refuse_tokens(mask, mask.gather(-1, rule.select(remaining)).any(dim=-1))
        return remaining, rule

    def _can_exclude(self, mask: Bool[Tensor, "*batch expert"]) -> Bool[Tensor, "*batch"]:
        """On which tokens the router can do without the experts of the mask."""
        return (~mask).sum(dim=-1) >= self.top_k

    def _hold_out(
        self, logits: Float[Tensor, "*batch expert"], mask: Bool[Tensor, "*#batch expert"]
    ) -> "tuple[Float[Tensor, '*batch expert'], RoutingRule]":
        """What `excluding` gives for a mask that leaves enough experts."""
        return logits.masked_fill(mask, -math.inf), self

    def _refuse_tokens(self, mask: Bool[Tensor, "*batch expert"], refused: Bool[Tensor, "*batch"]) -> None:
        if bool(refused.any()):
            token = refused.nonzero()[0].tolist()
            excluded = mask[tuple(token)].nonzero().flatten().tolist()
            raise HookError(
                f"Experts {excluded} cannot be excluded on token {token}: of the router's {self.n_experts} "
                f"experts it must run {self.top_k}, and too few others are left (that have finite logits and "
                "stand in groups that it may choose together). Exclude fewer there."
            )

    def released(self, tokens: Bool[Tensor, "*batch"]) -> "RoutingRule":
        """The rule without what steering holds on these tokens: for hooks that replace their logits.

        >>> from moe_lens import organisms
        >>> rule = organisms.load("specialised").routing_rule(0)
        >>> logits = torch.arange(8.0)
        >>> _, steered = rule.steer(logits, [0], [7], 0.01)
        >>> steered.select(logits).tolist(), steered.released(torch.tensor(True)).select(logits).tolist()
        ([0, 6], [7, 6])

        Within a hook on the router logits: `hook.rule = hook.rule.released(tokens)`, with bool [batch pos].
        """
        return self

    def only_on(self, tokens: Bool[Tensor, "*batch"], before: "RoutingRule") -> "RoutingRule":
        """This rule on these tokens and `before` on all others, where they differ in what steering holds."""
        return self

    def _numbers(self, experts: Any) -> list[int]:
        given = list(experts) if isinstance(experts, Sequence | set) else [experts]
        numbers = [number for expert in given if (number := as_index(expert)) is not None]
        if len(numbers) < len(given) or not numbers:
            raise HookError(
                "Routing around experts needs an expert's number "
                f"(0 to {self.n_experts - 1}) or several; got {experts!r}."
            )
        return numbers

    def __eq__(self, other: object) -> bool:
        """Whether it is the same rule with the same parameters, tensors among them compared by value."""
        return type(self) is type(other) and all(
            _same(getattr(self, field.name), getattr(other, field.name)) for field in fields(cast(Any, self))
        )

    def __hash__(self) -> int:
        return hash((type(self), self.n_experts, self.top_k))

    def for_call(self, *arguments: Any) -> "RoutingRule":
        """The rule for one call of the router, given what its block passes besides the hidden states."""
        return self


def route_without(
    rule: RoutingRule, logits: Float[Tensor, "*batch expert"], expert: int | Sequence[int] | Any
) -> tuple[Float[Tensor, "*batch expert"], RoutingRule]:
    """`rule.without(logits, expert)`, as a function."""
    return rule.without(logits, expert)


def chooses_any(
    rule: RoutingRule, logits: Float[Tensor, "*batch expert"], experts: Sequence[int]
) -> Bool[Tensor, "*batch"]:
    """On which tokens the rule chooses one of these experts."""
    named = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    named[list(experts)] = True
    return named[rule.select(logits)].any(dim=-1)


def at_least_float32(scores: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
    """Half precision widened, so that differences are exact."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and a == b
