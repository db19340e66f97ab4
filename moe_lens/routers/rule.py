"""`RoutingRule`: what every rule offers. The rules themselves are in `plain_rules` and `biased_rules`.

    indices, weights = rule.route(logits)         # [*batch expert] -> [*batch k], [*batch k]
    margin = rule.routing_margin(logits)          # [*batch]: how far each token is from other experts

Rules know no models and no hooks, so they serve live routers and also offline, on cached or edited logits.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    parameters; `n_experts` and `top_k` are among them. What is said here holds for rules that choose the
    experts with the k largest logits; a rule that chooses otherwise overrides `selection_scores`,
    `routing_margin`, `cannot_steer` and `steer`.
    """

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
        scores = at_least_float32(self.selection_scores(logits))
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, self.select(logits), True)
        lowest = scores.masked_fill(~chosen, torch.inf).amin(dim=-1)
        highest = scores.masked_fill(chosen, -torch.inf).amax(dim=-1)
        return (lowest - highest).clamp(min=0)  # probabilities that round to equals may change places

    def check_width(self, logits: Tensor) -> None:
        """Raise DataError unless the last dimension of the logits holds `n_experts` experts."""
        if logits.ndim == 0 or logits.shape[-1] != self.n_experts:
            raise DataError(
                f"Logits of shape {tuple(logits.shape)} are not those of a router with {self.n_experts} "
                "experts, which has them in the last dimension."
            )

    def cannot_steer(self, activate: Sequence[int], deactivate: Sequence[int]) -> str | None:
        """Why no steering keeps its guarantee for these experts, in words; None where it does."""
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

    def __eq__(self, other: object) -> bool:
        """Whether it is the same rule with the same parameters, tensors among them compared by value."""
        return type(self) is type(other) and all(
            _same(getattr(self, each.name), getattr(other, each.name)) for each in fields(cast(Any, self))
        )

    def __hash__(self) -> int:
        return hash((type(self), self.n_experts, self.top_k))

    def for_call(self, *arguments: Any) -> "RoutingRule":
        """The rule for one call of the router, given what its block passes beside the hidden states."""
        return self


def at_least_float32(scores: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
    """Half precision widened, so that differences are exact."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and a == b
