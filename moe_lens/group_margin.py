"""How far a choice of experts within the best groups is from another one."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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
    """The k-th largest value and the next one, -inf where there is none."""
    ordered = F.pad(values, (0, 1), value=-torch.inf).topk(k + 1, dim=-1).values
    return ordered[..., -2:-1], ordered[..., -1:]
