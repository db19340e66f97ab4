"""Choosing among groups of experts, under steering too, and how far the choice is from another one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from moe_lens.routers.hold import Hold


@dataclass(frozen=True)
class GroupLimit:
    """Experts are chosen only from the `n_chosen` best of `n_groups` groups of neighbouring experts.

    A group's score is the sum of its `n_summed` largest selection scores (DeepSeek-V3: 2, V2: 1).
    """

    n_groups: int
    n_chosen: int
    n_summed: int

    def allowed(
        self, choice: Float[Tensor, "*batch expert"], top_k: int, held: Hold | None
    ) -> Bool[Tensor, "*batch expert"]:
        """Which experts stand in a chosen group."""
        best = torch.topk(self._scores(choice), k=self.n_chosen, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(self._scores(choice), dtype=torch.bool).scatter(-1, best, True)
        if held is not None:
            inside, outside = held.inside, held.outside
            lowest = choice.amin(dim=-1, keepdim=True)  # a deactivated expert does not lift its group
            steered = self._feasible_groups(
                self._scores(torch.where(outside, lowest, choice)),
                required=inside.unflatten(-1, (self.n_groups, -1)).any(dim=-1),
                available=(~outside).unflatten(-1, (self.n_groups, -1)).sum(dim=-1),
                top_k=top_k,
            )
            chosen = torch.where(held.tokens, steered, chosen)
        return chosen.repeat_interleave(choice.shape[-1] // self.n_groups, dim=-1)

    def _scores(self, choice: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch group"]:
        in_groups = choice.unflatten(-1, (self.n_groups, -1))
        return in_groups.topk(self.n_summed, dim=-1).values.sum(dim=-1)

    def required(self, n_experts: int, activate: Sequence[int]) -> list[int]:
        """The groups in which activated experts stand, ascending."""
        size = n_experts // self.n_groups
        return sorted({expert // size for expert in activate})

    def available(self, n_experts: int, deactivate: Sequence[int]) -> list[int]:
        """How many experts of each group are not deactivated."""
        size = n_experts // self.n_groups
        left = [size] * self.n_groups
        for expert in deactivate:
            left[expert // size] -= 1
        return left

    def obstacle(
        self, n_experts: int, top_k: int, activate: Sequence[int], deactivate: Sequence[int]
    ) -> str | None:
        """Why no choice of groups serves these experts, in words; None where one does."""
        required, available = self.required(n_experts, activate), self.available(n_experts, deactivate)
        if len(required) > self.n_chosen:
            return (
                f"the activated experts {sorted(activate)} stand in {len(required)} of the router's "
                f"{self.n_groups} groups, and experts come from {self.n_chosen} group(s) only"
            )
        others = sorted((n for group, n in enumerate(available) if group not in required), reverse=True)
        room = sum(available[group] for group in required) + sum(others[: self.n_chosen - len(required)])
        if room < top_k:
            return (
                f"without the deactivated experts {sorted(deactivate)}, no {self.n_chosen} of the "
                f"router's {self.n_groups} groups hold the {top_k} experts that must run"
            )
        return None

    def possible(
        self, inside: Bool[Tensor, "*batch expert"], outside: Bool[Tensor, "*batch expert"], top_k: int
    ) -> Bool[Tensor, "*batch 1"]:
        """Where `obstacle` has nothing to say, token by token."""
        size = inside.shape[-1] // self.n_groups
        required = inside.unflatten(-1, (self.n_groups, -1)).any(dim=-1)
        available = (~outside).unflatten(-1, (self.n_groups, -1)).sum(dim=-1)
        first = available + required * (size + 1)  # the required groups come before all others
        best = first.topk(self.n_chosen, dim=-1).indices
        room = available.gather(-1, best).sum(dim=-1, keepdim=True)
        return (required.sum(dim=-1, keepdim=True) <= self.n_chosen) & (room >= top_k)

    def _feasible_groups(
        self,
        scores: Float[Tensor, "*batch group"],
        required: Bool[Tensor, "*batch group"],
        available: Int[Tensor, "*batch group"],
        top_k: int,
    ) -> Bool[Tensor, "*batch group"]:
        """The best groups, one by one, passing over those after which fewer than k experts could run."""
        scores = scores.masked_fill(required, torch.inf)
        picked = torch.zeros_like(required)
        for still_to_come in reversed(range(self.n_chosen)):
            room = torch.where(picked, -1, available)
            top = room.topk(still_to_come + 1, dim=-1).values
            least = top[..., -1:]
            best_with = top.sum(-1, keepdim=True) + (room - least).clamp(max=0)  # if this one is next
            have = (available * picked).sum(-1, keepdim=True)
            feasible = ~picked & (have + best_with >= top_k)
            best = scores.masked_fill(~feasible, -torch.inf).argmax(dim=-1, keepdim=True)
            picked = picked.scatter(-1, best, True)
        return picked


def group_margin(
    choice: Float[Tensor, "*batch expert"], top_k: int, n_groups: int, n_chosen: int, n_summed: int
) -> Float[Tensor, "*batch"]:
    """The smallest change of one expert's score that changes the set of chosen experts; inf where none does.

    A router chooses the `n_chosen` best of `n_groups` groups of neighbouring experts by the sum of the
    `n_summed` largest scores in each, then the `top_k` experts with the largest scores in those groups. The
    margin is the infimum of all δ ≥ 0 such that raising or lowering a single score of `choice` by δ, all
    others held fixed, gives another set of experts. It is exact up to rounding, in units of `choice` and in
    its dtype. Where equal scores leave open which experts are chosen, it is 0. Scores are finite, and the
    chosen groups hold at least k experts.

    It is the least of three distances:

    - from the k-th chosen expert to the best other expert of the chosen groups;
    - from coming in, for the best expert of a group that is not chosen: it has to lift the group to the last
      chosen one, and itself to the k-th chosen expert;
    - from the score of a group that holds a chosen expert to the best group that is not chosen: experts of
      the one can drag it down, and if it is the last chosen one, those of the other can lift theirs.

    >>> scores = torch.tensor([0.9, 0.1, 0.5, 0.4])     # groups (0, 1) and (2, 3)
    >>> group_margin(scores, top_k=1, n_groups=2, n_chosen=1, n_summed=2)   # 0.9 + 0.1 against 0.5 + 0.4
    tensor(0.1000)
    >>> group_margin(scores, top_k=1, n_groups=2, n_chosen=2, n_summed=2)   # 0.9 against 0.5
    tensor(0.4000)
    """
    in_groups = choice.unflatten(-1, (n_groups, -1))
    best = in_groups.topk(n_summed, dim=-1).values
    highest, scores = best[..., 0], best.sum(dim=-1)  # [*batch group]
    indices = scores.topk(n_chosen, dim=-1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
    eligible = in_groups.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(-2)
    last_expert, next_expert = _edge(eligible, top_k)
    last_group, next_group = _edge(scores, n_chosen)

    come_in = torch.maximum(last_group - scores, last_expert - highest).masked_fill(chosen, torch.inf)
    # An expert that only equals the k-th chosen one may not be chosen, but then the margin is 0 anyway.
    holds_chosen = chosen & (highest >= last_expert)
    # An expert can drag its group no further than to the sum with the (n + 1)-th score, a, in place of its
    # own. Where that sum still beats the next group, another distance is as short, so no case is needed: if a
    # is not chosen, the group's best expert falls to it first. If a is, the k-th chosen expert is at most
    # the mean of this group's n largest, and the next group's best expert at least the mean of its own: so
    # that one comes in over a distance no longer than the one between the sums.
    drop_out = scores.masked_fill(~holds_chosen, torch.inf) - next_group
    return torch.cat([last_expert - next_expert, come_in, drop_out], dim=-1).amin(dim=-1)


def _edge(
    values: Float[Tensor, "*batch value"], k: int
) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """The k-th largest value and the next smaller one, -inf where there is none."""
    ordered = F.pad(values, (0, 1), value=-torch.inf).topk(k + 1, dim=-1).values
    return ordered[..., -2:-1], ordered[..., -1:]
