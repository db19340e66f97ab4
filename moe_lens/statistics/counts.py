"""Counts by prompt, by position and by token of the vocabulary, and sums over tokens.

stats = collect_routing(model, prompts, per_prompt=True, positions=True)
stats.per_prompt.counts               # [prompt layer expert]
stats.by_position.rates               # [pos layer expert]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Shaped
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.results import Result
from moe_lens.routers.rule import at_least_float32

COMPACT: Final = (torch.uint8, torch.int16, torch.int32)
"""Dtypes of counts by prompt: the first that holds the largest of them."""


@dataclass(frozen=True, eq=False, repr=False)
class PromptCounts(Result):
    """The counts of each prompt, compactly, on the CPU; `+` appends those of further prompts.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question :", "the"], per_prompt=True, progress=False)
    >>> stats.per_prompt.n_tokens.tolist(), stats.per_prompt.counts.shape, stats.per_prompt.counts.dtype
    ([3, 2], torch.Size([2, 4, 8]), torch.uint8)

    Attributes:
        n_tokens: int64, tokens that count; 0 where a mask selected none of the prompt.
        counts: at how many of them the expert was chosen; uint8, int16 or int32, the smallest that will do.
        probability_sums: float32, sum over them of softmax(router logits).
    """

    n_tokens: Int[Tensor, "prompt"]
    counts: Integer[Tensor, "prompt layer expert"]
    probability_sums: Float[Tensor, "prompt layer expert"]

    def __post_init__(self) -> None:
        if self.counts.dtype not in COMPACT or self.n_tokens.dtype != torch.int64:
            raise DataError(f"PromptCounts.counts must be uint8, int16 or int32; got {self.counts.dtype}.")
        sums = self.probability_sums
        if sums.dtype != torch.float32 or not bool(torch.isfinite(sums).all()) or bool((sums < 0).any()):
            raise DataError("PromptCounts.probability_sums must be float32, finite and not negative.")

    @classmethod
    def count(
        cls,
        indices: Sequence[Int[Tensor, "token k"]] | Int[Tensor, "layer token k"],
        probability_sums: Sequence[Float[Tensor, "prompt expert"]],
        prompt_of: Int[Tensor, "token"],
    ) -> "PromptCounts":
        """Count one batch.

        Args:
            indices: of each MoE layer, the experts of the tokens that count.
            probability_sums: of each MoE layer, from `probability_sums_by_prompt`.
            prompt_of: the prompt of each of those tokens.
        """
        n_prompts, n_experts = probability_sums[0].shape
        counts = counts_by_group(indices, prompt_of, n_prompts, n_experts)
        n_tokens = torch.bincount(prompt_of.cpu(), minlength=n_prompts)
        return cls(n_tokens, compact(counts), torch.stack(list(probability_sums), dim=1).cpu())

    def of(self, prompts: Int[Tensor, "prompt"]) -> "PromptCounts":
        """The rows of these prompts, in this order."""
        return PromptCounts(**{name: tensor[prompts] for name, tensor in vars(self).items()})

    def __add__(self, other: "PromptCounts") -> "PromptCounts":
        pairs = ((tensor, getattr(other, name)) for name, tensor in vars(self).items())
        n_tokens, counts, sums = (torch.cat(pair) for pair in pairs)  # counts take the wider dtype
        return PromptCounts(n_tokens, counts, sums)

    def summary(self) -> str:
        """Numbers of prompts, tokens, layers and experts."""
        n_prompts, n_layers, n_experts = self.counts.shape
        n_tokens = int(self.n_tokens.sum())
        return f"{n_prompts} prompts, {n_tokens} tokens; {n_layers} layers × {n_experts} experts"

    def check(self, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int) -> None:
        """Raise DataError unless the table is about the tokens with these counts."""
        size = (len(self.n_tokens), *counts.shape)
        if self.n_tokens.ndim != 1 or self.counts.shape != size or self.probability_sums.shape != size:
            raise DataError(f"PromptCounts.counts has shape {tuple(self.counts.shape)}, not {size}.")
        _check_sums("PromptCounts", self.counts, self.n_tokens, counts, n_tokens, top_k)


@dataclass(frozen=True, eq=False, repr=False)
class PositionCounts(Result):
    """The counts at each position, counted from each prompt's own first token; padding does not shift them.

    `+` adds position by position; prompts may have different lengths.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question :", "the"], positions=True, progress=False)
    >>> stats.by_position.n_tokens.tolist(), stats.by_position.rates.shape
    ([2, 2, 1], torch.Size([3, 4, 8]))

    Attributes:
        n_tokens: int64, tokens that count at this position.
        counts: int32, at how many of them the expert was chosen.
    """

    n_tokens: Int[Tensor, "pos"]
    counts: Int[Tensor, "pos layer expert"]

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int32 or self.n_tokens.dtype != torch.int64:
            raise DataError(f"PositionCounts.counts must be int32; got {self.counts.dtype}.")

    @classmethod
    def count(
        cls,
        indices: Sequence[Int[Tensor, "token k"]] | Int[Tensor, "layer token k"],
        position: Int[Tensor, "token"],
        n_experts: int,
    ) -> "PositionCounts":
        """Count one batch; `indices` of each MoE layer, `position` of each token in its own prompt."""
        length = int(position.max()) + 1
        counts = counts_by_group(indices, position, length, n_experts)
        return cls(torch.bincount(position.cpu(), minlength=length), counts.int())

    @property
    def rates(self) -> Float[Tensor, "pos layer expert"]:
        """Activation rate at each position, in [0, 1], float64; NaN where no token counts."""
        return self.counts.double() / self.n_tokens[:, None, None]

    def __add__(self, other: "PositionCounts") -> "PositionCounts":
        length = max(len(self.n_tokens), len(other.n_tokens))
        padded = [
            (_lengthened(t, length), _lengthened(getattr(other, name), length))
            for name, t in vars(self).items()
        ]
        return PositionCounts(*(first + second for first, second in padded))

    def summary(self) -> str:
        """Numbers of positions, tokens, layers and experts."""
        length, n_layers, n_experts = self.counts.shape
        n_tokens = int(self.n_tokens.sum())
        return f"{length} positions, {n_tokens} tokens; {n_layers} layers × {n_experts} experts"

    def check(self, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int) -> None:
        """Raise DataError unless the table is about the tokens with these counts."""
        size = (len(self.n_tokens), *counts.shape)
        if self.n_tokens.ndim != 1 or self.counts.shape != size:
            raise DataError(f"PositionCounts.counts has shape {tuple(self.counts.shape)}, not {size}.")
        _check_sums("PositionCounts", self.counts, self.n_tokens, counts, n_tokens, top_k)


def counts_by_group(
    indices: Sequence[Int[Tensor, "token k"]] | Int[Tensor, "layer token k"],
    group: Int[Tensor, "token"],
    n_groups: int,
    n_experts: int,
) -> Int[Tensor, "group layer expert"]:
    """How often each expert was chosen by the tokens of each group, int64, on the CPU."""
    rows = []
    for layer in indices:
        keys = (group.to(layer.device)[:, None] * n_experts + layer).flatten()
        counts = torch.zeros(n_groups * n_experts, dtype=torch.int64, device=layer.device)
        rows.append(counts.scatter_add_(0, keys, torch.ones_like(keys)))
    return torch.stack(rows).cpu().reshape(len(rows), n_groups, n_experts).transpose(0, 1).contiguous()


def compact(counts: Int[Tensor, "*any"]) -> Integer[Tensor, "*any"]:
    """The same counts in the smallest dtype of `COMPACT` that holds the largest of them."""
    largest = int(counts.max()) if counts.numel() else 0
    return counts.to(next(dtype for dtype in COMPACT if largest <= torch.iinfo(dtype).max))


def _lengthened(tensor: Shaped[Tensor, "pos *any"], length: int) -> Shaped[Tensor, "longer *any"]:
    missing = tensor.new_zeros(length - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, missing])


def _check_sums(
    who: str, parts: Tensor, sizes: Tensor, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int
) -> None:
    by_row = parts.sum(-1, dtype=torch.int64) == (sizes * top_k)[:, None]
    total = parts.sum(0, dtype=torch.int64)
    if bool((sizes < 0).any()) or bool((parts < 0).any()) or not bool(by_row.all()):
        raise DataError(f"{who}.counts of a row must sum to its n_tokens × k = n_tokens × {top_k}.")
    if int(sizes.sum()) != n_tokens or not torch.equal(total, counts):
        raise DataError(f"{who} does not belong to these counts: its rows have a different sum.")


def softmax_over_experts(logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
    """Probabilities by which models are compared, in float32 at least, however the router itself scores."""
    return torch.softmax(at_least_float32(logits), dim=-1)


def probability_sums_by_prompt(
    probabilities: Float[Tensor, "token expert"], lengths: Int[Tensor, "prompt"]
) -> Float[Tensor, "prompt expert"]:
    """Sums over each prompt's tokens, float32; added up in float64.

    Args:
        probabilities: of the tokens that count, prompt after prompt.
        lengths: how many tokens each prompt has there, on the same device.
    """
    p = probabilities.double()
    return torch.segment_reduce(p, "sum", lengths=lengths, axis=0, unsafe=True, initial=0).float()


def one_hot(
    indices: Int[Tensor, "*token k"], values: Float[Tensor, "*token k"], n_experts: int
) -> Float[Tensor, "*token expert"]:
    """The values in the columns of their experts, 0 elsewhere, float64.

    (Summed by `sum`: on a GPU the order of `index_add_` is another one at each call.)
    """
    size = (*indices.shape[:-1], n_experts)
    table = torch.zeros(size, dtype=torch.float64, device=values.device)
    return table.scatter_add_(-1, indices, values.double())


def router_entropy(router_logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch"]:
    """Entropy of softmax(router logits) of each token, nats, in [0, ln n_experts]: −Σ_i p_i ln p_i.

    Computed in float32 at least. Softmax over all experts also where the router scores otherwise.

    >>> router_entropy(torch.zeros(2, 8)).exp().round().tolist()       # as undecided as among 8 experts
    [8.0, 8.0]
    """
    return torch.special.entr(softmax_over_experts(router_logits)).sum(-1)


_SHIFT: Final = 32
"""Keys are (layer row × n_experts + expert) · 2^32 + token, so that they do not depend on the vocabulary."""


@dataclass(frozen=True, eq=False, repr=False)
class TokenCounts(Result):
    """How often each expert ran for each token of the vocabulary, sparse, on the CPU; `+` adds.

    Only what occurred is stored, 12 bytes per pair of expert and token: a table of [layer expert vocab] would
    hold 50 million numbers for OLMoE, nearly all of them 0.

    >>> table = TokenCounts.count([torch.tensor([[0], [0], [1]])], torch.tensor([7, 7, 5]), n_experts=2)
    >>> table.totals.tolist(), table.dense(0, n_experts=2)[0].tolist()
    ([0, 0, 0, 0, 0, 1, 0, 2], [0, 0, 0, 0, 0, 0, 0, 2])

    Attributes:
        keys: int64, ascending: which expert and token.
        counts: int32, how often that expert was chosen for that token.
        totals: int64, how often each token was counted at all.
    """

    keys: Int[Tensor, "pair"]
    counts: Int[Tensor, "pair"]
    totals: Int[Tensor, "vocab"]

    def __post_init__(self) -> None:
        dtypes = (self.keys.dtype, self.counts.dtype, self.totals.dtype)
        if dtypes != (torch.int64, torch.int32, torch.int64) or self.keys.shape != self.counts.shape:
            raise DataError(
                f"TokenCounts: keys, counts and totals have the dtypes {dtypes}, or unequal lengths."
            )

    @classmethod
    def count(
        cls,
        indices: Sequence[Int[Tensor, "token k"]] | Int[Tensor, "layer token k"],
        tokens: Int[Tensor, "token"],
        n_experts: int,
        n_vocab: int = 0,
    ) -> "TokenCounts":
        """Count one batch; `indices` of each MoE layer. `totals` is at least `n_vocab` long."""
        tokens = tokens.cpu().long()
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= 2**31):
            raise DataError("Token ids must lie between 0 and 2^31.")
        keys = [
            ((row * n_experts + layer.cpu().long()) << _SHIFT) + tokens[:, None]
            for row, layer in enumerate(indices)
        ]
        pairs, counts = torch.cat([key.flatten() for key in keys]).unique(return_counts=True)
        return cls(pairs, counts.int(), torch.bincount(tokens, minlength=n_vocab))

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        keys = np.concatenate([self.keys.numpy(), other.keys.numpy()])
        order = np.argsort(keys, kind="stable")  # two ascending runs: merged in linear time
        keys = keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.concatenate([self.counts.numpy(), other.counts.numpy()])[order].astype(np.int64)
        summed = np.add.reduceat(counts, starts)
        if summed.max() > np.iinfo(np.int32).max:
            raise DataError("TokenCounts cannot hold an expert and token that met more than 2^31 − 1 times.")
        short, long = sorted((self.totals, other.totals), key=len)
        totals = long.clone()
        totals[: len(short)] += short
        return TokenCounts(torch.from_numpy(keys[starts]), torch.from_numpy(summed.astype(np.int32)), totals)

    @property
    def experts(self) -> Int[Tensor, "pair"]:
        """Of each key, layer row × n_experts + expert."""
        return self.keys >> _SHIFT

    @property
    def tokens(self) -> Int[Tensor, "pair"]:
        """Of each key, the token."""
        return self.keys & (2**_SHIFT - 1)

    def dense(self, row: int, n_experts: int) -> Int[Tensor, "expert vocab"]:
        """The counts of one layer's row, int64."""
        part = self._between(row * n_experts, (row + 1) * n_experts)
        table = torch.zeros(n_experts, len(self.totals), dtype=torch.int64)
        table[self.experts[part] - row * n_experts, self.tokens[part]] = self.counts[part].long()
        return table

    def of_expert(self, row: int, expert: int, n_experts: int) -> Int[Tensor, "vocab"]:
        """The counts of one expert, int64."""
        first = row * n_experts + expert
        part = self._between(first, first + 1)
        return torch.zeros_like(self.totals).index_put_((self.tokens[part],), self.counts[part].long())

    def _between(self, first: int, last: int) -> slice:
        """The pairs of these experts, `last` left out; keys are in ascending order."""
        bounds = torch.tensor([first << _SHIFT, last << _SHIFT])
        return slice(*torch.searchsorted(self.keys, bounds).tolist())

    def summary(self) -> str:
        """Numbers of tokens counted, of different ones, and of pairs of expert and token."""
        n_tokens, different = int(self.totals.sum()), int((self.totals > 0).sum())
        return f"{n_tokens} tokens, {different} different; {len(self.keys)} pairs with an expert"

    def check(self, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int) -> None:
        """Raise DataError unless the table is about the tokens with these counts."""
        expert, token = self.experts, self.tokens
        fits = (
            self.keys.ndim == self.totals.ndim == 1
            and bool((self.keys[1:] > self.keys[:-1]).all())
            and bool(((expert >= 0) & (expert < counts.numel()) & (token < len(self.totals))).all())
            and bool((self.counts > 0).all())
            and bool((self.totals >= 0).all())
            and int(self.totals.sum()) == n_tokens
        )
        if fits:
            sums = torch.zeros(counts.numel(), dtype=torch.int64).index_add_(0, expert, self.counts.long())
            fits = torch.equal(sums.reshape(counts.shape), counts) and bool(
                (self.counts <= self.totals[token]).all()
            )
        if not fits:
            raise DataError("TokenCounts does not belong to these counts: an expert's tokens do not add up.")
