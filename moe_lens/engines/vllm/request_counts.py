"""Sums of routing by statistics and prompt, from vLLM's batches, and the `RoutingStats` that they make.

    counts = RequestCounts(shape)
    counts.add([("with", 0), ("with", 1)], rows, group, recorded)     # rows of one batch
    counts.stats("with")                                              # a RoutingStats with per_prompt

A prompt may come in many batches, in any order; each position of it is counted once by whoever calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.shape import MoEShape
from moe_lens.statistics.counts import PromptCounts, compact, softmax_over_experts
from moe_lens.statistics.routing_stats import RoutingStats

Key = tuple[str, int]
"""Name of the statistics, number of the prompt."""


class Recorded(NamedTuple):
    """What a layer did with the rows of a batch."""

    logits: Float[Tensor, "row expert"]
    indices: Integer[Tensor, "row k"]
    weights: Float[Tensor, "row k"]


@dataclass(eq=False)
class RequestCounts:
    """Sums over the tokens counted so far, on the CPU: counts int64, the others float64."""

    shape: MoEShape
    n_tokens: dict[Key, int] = field(default_factory=dict)
    sums: dict[Key, dict[str, Tensor]] = field(default_factory=dict)

    def add(
        self,
        keys: Sequence[Key],
        rows: Int[Tensor, " token"],
        group: Int[Tensor, " token"],
        recorded: Mapping[int, Recorded],
    ) -> None:
        """Count tokens of one batch.

        Args:
            keys: whose they are.
            rows: where each of them stands in the batch.
            group: which of the keys each belongs to.
            recorded: of every layer.
        """
        parts = [_sums(recorded[layer], rows, group, len(keys)) for layer in self.shape.layers]
        whole = {name: torch.stack([part[name] for part in parts], dim=1).cpu() for name in parts[0]}
        n_tokens = torch.bincount(group, minlength=len(keys)).tolist()
        for number, key in enumerate(keys):
            mine = {name: tensor[number] for name, tensor in whole.items()}
            before = self.sums.get(key)
            self.sums[key] = {n: t.clone() if before is None else before[n] + t for n, t in mine.items()}
            self.n_tokens[key] = self.n_tokens.get(key, 0) + n_tokens[number]

    def names(self) -> list[str]:
        """Of the statistics that hold tokens, in the order in which they began."""
        return list(dict.fromkeys(name for name, _ in self.sums))

    def stats(self, name: str) -> RoutingStats:
        """The statistics of this name, one row of `per_prompt` a prompt.

        Raises:
            DataError: nothing was counted under it, or prompts between the first and the last are missing.
        """
        prompts = sorted(prompt for other, prompt in self.sums if other == name)
        if not prompts:
            raise DataError(f"No statistics {name!r} were counted; there are {self.names()}.")
        if missing := sorted(set(range(prompts[-1])) - set(prompts)):
            raise DataError(
                f"Statistics {name!r}: no token of prompt {missing[0]} was counted, but some of prompt "
                f"{prompts[-1]}; did a request fail? Send it again, or number the prompts from 0 on."
            )
        keys = [(name, prompt) for prompt in prompts]
        rows = {part: torch.stack([self.sums[key][part] for key in keys]) for part in self.sums[keys[0]]}
        n_tokens = torch.tensor([self.n_tokens[key] for key in keys])
        per_prompt = PromptCounts(n_tokens, compact(rows["counts"]), rows["probability_sums"].float())
        sums: dict[str, Any] = {part: tensor.sum(dim=0) for part, tensor in rows.items()}
        return RoutingStats(self.shape, int(n_tokens.sum()), **sums, per_prompt=per_prompt)

    def forget(self, name: str) -> None:
        """Drop the statistics of this name, if there are any."""
        for key in [key for key in self.sums if key[0] == name]:
            del self.sums[key], self.n_tokens[key]


def _sums(
    layer: Recorded, rows: Int[Tensor, " token"], group: Int[Tensor, " token"], n_groups: int
) -> dict[str, Tensor]:
    """One layer's, [group expert], and its entropy [group]."""
    device = layer.logits.device
    rows, group = rows.to(device), group.to(device)
    probability = softmax_over_experts(layer.logits[rows])
    indices, weights = layer.indices[rows].long(), layer.weights[rows].double()
    n_experts = probability.shape[-1]
    place = (group[:, None] * n_experts + indices).flatten()

    def added(size: tuple[int, ...], where: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(size, dtype=values.dtype, device=device).index_add_(0, where, values)

    return {
        "counts": added((n_groups * n_experts,), place, torch.ones_like(place)).view(n_groups, n_experts),
        "probability_sums": added((n_groups, n_experts), group, probability.double()),
        "weight_sums": added((n_groups * n_experts,), place, weights.flatten()).view(n_groups, n_experts),
        "entropy_sums": added((n_groups,), group, torch.special.entr(probability).sum(-1).double()),
    }
