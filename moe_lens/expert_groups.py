"""Choosing among groups of experts, and the experts that steering puts in and keeps out of the choice."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Steering:
    """Experts that a steered rule puts in and keeps out, whatever their scores."""

    activate: tuple[int, ...] = ()
    deactivate: tuple[int, ...] = ()

    def after(self, earlier: "Steering") -> "Steering":
        """This steering and what it leaves of an earlier one."""
        taken = {*self.activate, *self.deactivate}
        return Steering(
            (*self.activate, *(expert for expert in earlier.activate if expert not in taken)),
            (*self.deactivate, *(expert for expert in earlier.deactivate if expert not in taken)),
        )

    def apply(self, choice: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        """Selection scores with those experts at +inf and -inf."""
        choice = choice.clone()
        choice[..., list(self.activate)] = torch.inf
        choice[..., list(self.deactivate)] = -torch.inf
        return choice


@dataclass(frozen=True)
class GroupLimit:
    """Experts are chosen only from the `n_chosen` best of `n_groups` groups of neighbouring experts.

    A group's score is the sum of its `n_summed` largest selection scores (DeepSeek-V3: 2, V2: 1).
    """

    n_groups: int
    n_chosen: int
    n_summed: int

    def allowed(
        self, choice: Float[Tensor, "*batch expert"], top_k: int, steering: Steering | None
    ) -> Bool[Tensor, "*batch expert"]:
        """Which experts stand in a chosen group."""
        n_experts = choice.shape[-1]
        if steering is not None:  # a deactivated expert does not lift its group
            lowest = choice.amin(dim=-1, keepdim=True)
            choice = choice.clone()
            choice[..., list(steering.deactivate)] = lowest
        in_groups = choice.unflatten(-1, (self.n_groups, -1))
        scores = in_groups.topk(self.n_summed, dim=-1).values.sum(dim=-1)
        if steering is None:
            best = torch.topk(scores, k=self.n_chosen, dim=-1, sorted=False).indices
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        else:
            chosen = self._feasible_groups(scores, n_experts, top_k, steering)
        return chosen.unsqueeze(-1).expand(in_groups.shape).flatten(-2)

    def required(self, n_experts: int, steering: Steering) -> list[int]:
        """The groups in which activated experts stand, ascending."""
        size = n_experts // self.n_groups
        return sorted({expert // size for expert in steering.activate})

    def available(self, n_experts: int, steering: Steering) -> list[int]:
        """How many experts of each group are not deactivated."""
        size = n_experts // self.n_groups
        out = [expert // size for expert in steering.deactivate]
        return [size - out.count(group) for group in range(self.n_groups)]

    def obstacle(self, n_experts: int, top_k: int, steering: Steering) -> str | None:
        """Why no choice of groups serves this steering, in words; None where one does."""
        required, available = self.required(n_experts, steering), self.available(n_experts, steering)
        if len(required) > self.n_chosen:
            return (
                f"the activated experts {sorted(steering.activate)} stand in {len(required)} of the router's "
                f"{self.n_groups} groups, and experts come from {self.n_chosen} group(s) only"
            )
        others = sorted((n for group, n in enumerate(available) if group not in required), reverse=True)
        room = sum(available[group] for group in required) + sum(others[: self.n_chosen - len(required)])
        if room < top_k:
            return (
                f"without the deactivated experts {sorted(steering.deactivate)}, no {self.n_chosen} of the "
                f"router's {self.n_groups} groups hold the {top_k} experts that must run"
            )
        return None

    def _feasible_groups(
        self, scores: Float[Tensor, "*batch group"], n_experts: int, top_k: int, steering: Steering
    ) -> Bool[Tensor, "*batch group"]:
        """The best groups, one by one, passing over those after which fewer than k experts could run."""
        available = torch.tensor(self.available(n_experts, steering), device=scores.device)
        scores = scores.clone()
        scores[..., self.required(n_experts, steering)] = torch.inf
        picked = torch.zeros_like(scores, dtype=torch.bool)
        for still_to_come in reversed(range(self.n_chosen)):
            room = torch.where(picked, -1, available)  # [*batch group]
            top = room.topk(still_to_come + 1, dim=-1).values
            least = top[..., -1:]
            best_with = top.sum(-1, keepdim=True) + (room - least).clamp(max=0)  # if this one is next
            have = (available * picked).sum(-1, keepdim=True)
            feasible = ~picked & (have + best_with >= top_k)
            best = scores.masked_fill(~feasible, -torch.inf).argmax(dim=-1, keepdim=True)
            picked = picked.scatter(-1, best, True)
        return picked
