"""Which experts run together: in one layer, at neighbouring tokens, in consecutive MoE layers.

stats.coactivation.jaccard            # [layer expert expert], experts of one token
stats.adjacent_overlap.mean           # [layer], share of experts that consecutive tokens have in common
stats.transitions.conditional         # [layer-1 expert expert], P(expert j in the next MoE layer | expert i)

`CoRouting` is the table of exact counts that RoutingStats carries; the others are views of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class CoRouting(Result):
    """Counts of experts that run together, int64, on the CPU; `+` adds those of other tokens.

    >>> indices = torch.tensor([[0, 1], [0, 2], [1, 2]])             # the experts of three tokens, k = 2
    >>> table = CoRouting.count([indices], torch.ones(1, 3).bool(), n_experts=3)
    >>> table.coactivation[0].tolist(), table.overlaps.tolist(), int(table.n_adjacent)
    ([[2, 1, 1], [1, 2, 1], [1, 1, 2]], [2], 2)

    Attributes:
        coactivation: at how many tokens both experts were chosen; symmetric, the diagonal holds the counts.
        transitions: tokens that chose expert i (row) in an MoE layer and j (column) in the next one.
        overlaps: experts in common, summed over adjacent pairs of tokens.
        n_adjacent: pairs of consecutive positions of one prompt that both count.
    """

    coactivation: Int[Tensor, "layer expert expert"]
    transitions: Int[Tensor, "gap expert expert"]
    overlaps: Int[Tensor, "layer"]
    n_adjacent: Int[Tensor, ""]

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            if tensor.dtype != torch.int64 or bool((tensor < 0).any()):
                raise DataError(f"CoRouting.{name} must hold int64 counts; got {tensor.dtype}.")

    @classmethod
    def count(
        cls,
        indices: Sequence[Int[Tensor, "token k"]],
        keep: Bool[Tensor, "prompt pos"],
        n_experts: int,
    ) -> "CoRouting":
        """Count one batch.

        Args:
            indices: of each MoE layer in order, the experts of the tokens that count.
            keep: which positions those tokens are, row by row.
        """
        number = (keep.flatten().cumsum(0) - 1).reshape(keep.shape)  # position -> row of indices
        both = keep[:, :-1] & keep[:, 1:]
        layers = torch.stack(list(indices)).cpu()
        return cls(
            pair_counts(layers, layers, n_experts),
            pair_counts(layers[:-1], layers[1:], n_experts),
            n_shared(layers, number[:, :-1][both], number[:, 1:][both]),
            both.sum(),
        )

    def __add__(self, other: "CoRouting") -> "CoRouting":
        return CoRouting(**{name: tensor + getattr(other, name) for name, tensor in vars(self).items()})

    def summary(self) -> str:
        """Numbers of layers, experts and adjacent pairs of tokens."""
        n_layers, n_experts, _ = self.coactivation.shape
        return f"{n_layers} layers × {n_experts} experts, {int(self.n_adjacent)} adjacent pairs of tokens"

    def check(self, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int) -> None:
        """Raise DataError unless the table is about the tokens with these counts."""
        n_layers, n_experts = counts.shape
        sizes = {"coactivation": n_layers, "transitions": n_layers - 1}
        for name, length in sizes.items():
            if getattr(self, name).shape != (length, n_experts, n_experts):
                raise DataError(f"CoRouting.{name} has shape {tuple(getattr(self, name).shape)}.")
        if not torch.equal(self.coactivation.diagonal(dim1=1, dim2=2), counts) or not torch.equal(
            self.coactivation.sum(-1), top_k * counts
        ):
            raise DataError(
                "CoRouting.coactivation does not belong to these counts; did a hook on the top-k indices "
                "name an expert twice for one token?"
            )
        rows, columns = self.transitions.sum(2), self.transitions.sum(1)
        if not torch.equal(rows, top_k * counts[:-1]) or not torch.equal(columns, top_k * counts[1:]):
            raise DataError("CoRouting.transitions does not belong to these counts.")
        n_adjacent = int(self.n_adjacent)
        if (
            self.overlaps.shape != (n_layers,)
            or n_adjacent >= n_tokens
            or (bool((self.overlaps > top_k * n_adjacent).any()))
        ):
            raise DataError("CoRouting.overlaps does not belong to these counts.")


def pair_counts(
    first: Int[Tensor, "layer token k"], second: Int[Tensor, "layer token k"], n_experts: int
) -> Int[Tensor, "layer expert expert"]:
    """At how many tokens expert i is among `first` and j among `second`, int64."""
    n_layers = len(first)
    layer = torch.arange(n_layers, device=first.device)[:, None, None] * n_experts
    pairs = ((first + layer)[..., None] * n_experts + second[:, :, None, :]).flatten()
    counts = torch.zeros(n_layers * n_experts**2, dtype=torch.int64, device=first.device)
    one = torch.ones((), dtype=torch.int64, device=first.device)
    return counts.scatter_add_(0, pairs, one.expand(len(pairs))).reshape(n_layers, n_experts, n_experts)


def n_shared(
    indices: Int[Tensor, "layer token k"], first: Int[Tensor, "pair"], second: Int[Tensor, "pair"]
) -> Int[Tensor, "layer"]:
    """How many experts the tokens of these pairs have in common, over all pairs."""
    one, other = (indices.index_select(1, tokens) for tokens in (first, second))
    return (one[..., :, None] == other[..., None, :]).sum(dim=(1, 2, 3))


@dataclass(frozen=True, eq=False, repr=False)
class CoActivation(Result):
    """How often two experts of a layer run for the same token; every tensor is [layer expert expert].

    A token chooses k experts without replacement, so that experts that know nothing of each other still have
    a lift below 1: (k − 1) E / (k (E − 1)) at equal rates.

    >>> from moe_lens import collect_routing, organisms
    >>> stats = collect_routing(organisms.load("specialised"), "Question : what is", progress=False)
    >>> stats.coactivation.jaccard.shape
    torch.Size([4, 8, 8])

    Attributes:
        counts: N_ij, int64, tokens that chose both; the diagonal holds the experts' own counts N_i.
        n_tokens: N.
    """

    counts: Int[Tensor, "layer expert expert"]
    n_tokens: int

    @property
    def own(self) -> Int[Tensor, "layer expert"]:
        """N_i, the tokens that chose the expert, int64."""
        return self.counts.diagonal(dim1=1, dim2=2)

    @property
    def conditional(self) -> Float[Tensor, "layer expert expert"]:
        """P(j | i) = N_ij / N_i, in [0, 1], rows i; NaN where i was never chosen.

        As in OLMoE, arXiv 2409.02060, section 5.2.
        """
        return self.counts.double() / self.own[:, :, None]

    @property
    def jaccard(self) -> Float[Tensor, "layer expert expert"]:
        """N_ij / (N_i + N_j − N_ij), in [0, 1]; NaN where neither was ever chosen (Jaccard 1912)."""
        either = self.own[:, :, None] + self.own[:, None, :] - self.counts
        return self.counts.double() / either

    @property
    def lift(self) -> Float[Tensor, "layer expert expert"]:
        """P(i, j) / (P(i) P(j)) = N_ij N / (N_i N_j), ≥ 0; NaN where one was never chosen.

        Brin et al. 1997, "Dynamic itemset counting", where it is called interest.
        """
        return _lift(self.counts, self.own, self.own, self.n_tokens)

    def summary(self) -> str:
        """Numbers of tokens, layers and experts."""
        n_layers, n_experts, _ = self.counts.shape
        return f"{self.n_tokens} tokens, {n_layers} layers × {n_experts} experts"


@dataclass(frozen=True, eq=False, repr=False)
class AdjacentOverlap(Result):
    """How many experts a token shares with the next token of its prompt, as a share of k.

    The repetition of experts along a text (Mixtral, arXiv 2401.04088, section 5, table 5), for all k experts
    at once and whatever their order.

    Attributes:
        mean: [layer], float64, in [0, 1]; NaN without adjacent tokens.
        expected: [layer], float64, Σ_i r_i² / k with activation rates r: the mean if consecutive tokens chose
            independently of each other at these rates.
        n_adjacent: pairs of consecutive positions of one prompt that both count.
    """

    mean: Float[Tensor, "layer"]
    expected: Float[Tensor, "layer"]
    n_adjacent: int

    def summary(self) -> str:
        """Means over layers, and the number of pairs."""
        return (
            f"{self.mean.mean():.2f}, expected {self.expected.mean():.2f}, mean over layers; "
            f"{self.n_adjacent} adjacent pairs of tokens"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Transitions(Result):
    """From the experts of an MoE layer to those of the next one, for the same token.

    Row g of every tensor goes from the layer in row g of the statistics to that in row g + 1. Inter-layer
    affinity in ExFlow (arXiv 2401.08383).

    Attributes:
        counts: N_ij, int64, tokens that chose i in a layer and j in the next one.
        own: [layer expert], int64, tokens that chose the expert.
        n_tokens: N.
    """

    counts: Int[Tensor, "gap expert expert"]
    own: Int[Tensor, "layer expert"]
    n_tokens: int

    @property
    def conditional(self) -> Float[Tensor, "gap expert expert"]:
        """P(j | i) = N_ij / N_i, in [0, 1], rows sum to k; NaN where i was never chosen."""
        return self.counts.double() / self.own[:-1, :, None]

    @property
    def lift(self) -> Float[Tensor, "gap expert expert"]:
        """P(i, j) / (P(i) P(j)), ≥ 0, 1 if the layers chose independently; NaN where one was never chosen."""
        return _lift(self.counts, self.own[:-1], self.own[1:], self.n_tokens)

    def summary(self) -> str:
        """Numbers of tokens, of pairs of consecutive layers, and of experts."""
        n_gaps, n_experts, _ = self.counts.shape
        return f"{self.n_tokens} tokens, {n_gaps} pairs of layers × {n_experts} experts"


def adjacent_overlap(
    table: CoRouting, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int
) -> AdjacentOverlap:
    """The share of experts that adjacent tokens have in common, from a table and the counts of its tokens."""
    mean = table.overlaps.double() / (top_k * table.n_adjacent)
    expected = (counts.double() / n_tokens).square().sum(-1) / top_k
    return AdjacentOverlap(mean, expected, int(table.n_adjacent))


def _lift(
    both: Int[Tensor, "layer row column"],
    rows: Int[Tensor, "layer row"],
    columns: Int[Tensor, "layer column"],
    n_tokens: int,
) -> Float[Tensor, "layer row column"]:
    return both.double() * n_tokens / (rows.double()[:, :, None] * columns.double()[:, None, :])
