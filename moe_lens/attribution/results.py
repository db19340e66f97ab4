"""What attribution gives: which expert wrote, or is worth, how much.

    expert_logit_attribution(model, prompts, " Paris")           # LogitAttribution: shares of a logit
    gradient_attribution(model, tokens, metric)                  # GradientAttribution: first-order effects
    virtual_ablation(model, prompts)                             # VirtualAblation: loss if routed around

All hold tensors on the CPU and give a table (`to_dataframe`); none needs a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.results import Result
from moe_lens.shape import MoEShape

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Result):
    """What experts and the rest of a model wrote into one logit (or difference of logits) of each prompt.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import expert_logit_attribution
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the"]
    >>> found = expert_logit_attribution(model, prompts, "the", progress=False)
    >>> found.by_expert().shape, found.rest.shape            # [layer batch expert], [batch]
    (torch.Size([4, 2, 8]), torch.Size([2]))
    >>> bool((found.total - found.logit).abs().max() < 1e-4)
    True

    Everything is in logits (nats) and float32 at least, on the CPU.

    Attributes:
        shape: the model; its MoE layers are the axis "layer".
        experts: share of each chosen expert, its weight included.
        indices: which experts they are, int64.
        parts: share of everything else, measured directly, not as a difference.
        part_names: what those are, by TransformerLens' names: "embed", "blocks.3.attn" (attention or another
            mixer), "blocks.3.mlp" (in a MoE block: what it adds beside its routed experts; elsewhere the
            dense MLP), "ln_final.bias", "unembed.bias"...
        logit: what the model returned; before the soft cap if it has one.
        soft_cap: c of c · tanh(logit / c), which Gemma 4 applies to its logits; None elsewhere.
        is_difference: whether it is that of two logits.
    """

    shape: MoEShape
    experts: Float[Tensor, "layer batch k"]
    indices: Int[Tensor, "layer batch k"]
    parts: Float[Tensor, "part batch"]
    part_names: tuple[str, ...]
    logit: Float[Tensor, "batch"]
    soft_cap: float | None = None
    is_difference: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers."""
        return self.shape.layers

    @property
    def rest(self) -> Float[Tensor, "batch"]:
        """The share of everything but routed experts."""
        return self.parts.sum(0)

    @property
    def total(self) -> Float[Tensor, "batch"]:
        """The sum of all shares; the logit up to `error`."""
        return self.experts.sum((0, 2)) + self.rest

    @property
    def error(self) -> Float[Tensor, "batch"]:
        """logit − total: what rounding in the model's dtype leaves over."""
        return self.logit - self.total

    def by_expert(self) -> Float[Tensor, "layer batch expert"]:
        """Share of every expert, 0 where it was not chosen."""
        shares = torch.zeros(*self.experts.shape[:2], self.shape.n_experts, dtype=self.experts.dtype)
        return shares.scatter_add(-1, self.indices, self.experts)

    def summary(self) -> str:
        """Model, prompts, and the mean logit as experts + rest + error, in logits."""
        n_prompts = len(self.logit)
        return (
            f"{self.shape.model}, {n_prompts} prompt{'s' * (n_prompts != 1)}: {self.logit_name} "
            f"{float(self.logit.mean()):+.3f} = experts {float(self.experts.sum((0, 2)).mean()):+.3f} "
            f"+ rest {float(self.rest.mean()):+.3f} + error, at most {float(self.error.abs().max()):.1g}"
        )

    def __str__(self) -> str:
        """The summary, and the five experts with the largest shares."""
        lines = [repr(self)]
        means = self.by_expert().mean(1)
        for place in means.abs().flatten().topk(min(5, means.numel())).indices.tolist():
            layer, expert = divmod(place, self.shape.n_experts)
            lines.append(f"  layer {self.layers[layer]} expert {expert}: {float(means[layer, expert]):+.3f}")
        return "\n".join(lines)

    @property
    def logit_name(self) -> str:
        """What is shared out: "logit" or "logit difference", before the soft cap if there is one."""
        name = "logit difference" if self.is_difference else "logit"
        return f"{name} before the soft cap" if self.soft_cap else name

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a writer, largest share first: every expert that was chosen, and every other part.

        Columns: part ("expert", or a name of `part_names`), layer and expert (empty for other parts),
        n_prompts (in which the expert was chosen), share (of the logit, mean over all prompts).
        """
        import pandas

        means, chosen = self.by_expert().mean(1), _counts(self.indices, self.shape.n_experts)
        rows: list[tuple[str, int | None, int | None, int, float]] = [
            ("expert", self.layers[row], expert, int(chosen[row, expert]), float(means[row, expert]))
            for row, expert in chosen.nonzero().tolist()
        ]
        shares = zip(self.part_names, self.parts.mean(1).tolist(), strict=True)
        rows += [(name, None, None, len(self.logit), share) for name, share in shares]
        rows.sort(key=lambda row: -abs(row[-1]))
        table = pandas.DataFrame(rows, columns=["part", "layer", "expert", "n_prompts", "share"])
        return table.astype({"layer": "Int64", "expert": "Int64"})


@dataclass(frozen=True, eq=False, repr=False)
class GradientAttribution(Result):
    """First-order effects on a metric, in its unit; on the CPU, in float32 at least, 0 on padding.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import gradient_attribution
    >>> model = organisms.load("specialised")
    >>> found = gradient_attribution(model, "Question : what is", lambda logits: logits[0, -1, 5])
    >>> found.by_expert().shape                              # [layer batch pos expert]
    torch.Size([4, 1, 5, 8])

    Attributes:
        shape: the model; its MoE layers are the axis "layer".
        router_logits: of each router logit.
        expert_out: of each chosen expert's output, summed over its d_model numbers.
        indices: which experts were chosen, int64.
        metric: the metric's value in this run.
        same_expert: whether the baseline chose the same expert in this slot; None without a baseline that
            holds the chosen experts.
    """

    shape: MoEShape
    router_logits: Float[Tensor, "layer batch pos expert"]
    expert_out: Float[Tensor, "layer batch pos k"]
    indices: Int[Tensor, "layer batch pos k"]
    metric: float
    same_expert: Bool[Tensor, "layer batch pos k"] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers."""
        return self.shape.layers

    def by_expert(self) -> Float[Tensor, "layer batch pos expert"]:
        """`expert_out` by expert, 0 where the expert was not chosen."""
        return torch.zeros_like(self.router_logits).scatter_add(-1, self.indices, self.expert_out)

    def summary(self) -> str:
        """Model, prompts, the metric, and the summed effects at both points, in its unit."""
        n_prompts = self.indices.shape[1]
        return (
            f"{self.shape.model}, {n_prompts} prompt{'s' * (n_prompts != 1)}: metric {self.metric:.4g}; "
            f"summed effects of router logits {float(self.router_logits.sum()):+.3g}, of expert outputs "
            f"{float(self.expert_out.sum()):+.3g}"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an expert, largest effect of its output first.

        Columns: layer, expert, router_logit and expert_out (the effects of its logit and of its output,
        summed over all tokens).
        """
        import pandas

        logits, outputs = self.router_logits.sum((1, 2)), self.by_expert().sum((1, 2))
        rows = [
            (layer, expert, float(logits[row, expert]), float(outputs[row, expert]))
            for row, layer in enumerate(self.layers)
            for expert in range(self.shape.n_experts)
        ]
        rows.sort(key=lambda row: -abs(row[-1]))
        return pandas.DataFrame(rows, columns=["layer", "expert", "router_logit", "expert_out"])


class Change(NamedTuple):
    """One loss change: where, of which expert, how much, and whether it is exact or an estimate.

    >>> print(Change(layer=2, prompt=0, pos=5, expert=3, change=0.25, is_exact=False))
    +0.25 by estimate at layer 2, prompt 0, pos 5, expert 3
    """

    layer: int
    prompt: int
    pos: int
    expert: int
    change: float
    is_exact: bool

    def __str__(self) -> str:
        known = "" if self.is_exact else " by estimate"
        return (
            f"{self.change:+.3g}{known} at layer {self.layer}, prompt {self.prompt}, pos {self.pos}, "
            f"expert {self.expert}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class VirtualAblation(Result):
    """Loss changes for every layer, token and chosen expert, on the CPU; positive means a higher loss.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import virtual_ablation
    >>> found = virtual_ablation(organisms.load("specialised"), "Question : what is the", progress=False)
    >>> found.exact.shape, found.by_expert().shape           # [layer batch pos k], [layer expert]
    (torch.Size([4, 1, 6, 2]), torch.Size([4, 8]))
    >>> -1 <= found.correlation <= 1
    True

    Shorter prompts have NaN on the left, or -1 among the experts.

    Attributes:
        shape: the model and the layers of the axis "layer". Layers whose experts come from a table by token
            id (the first ones of DeepSeek-V4) have no next-best expert and are left out.
        exact: loss with the expert routed around − loss; NaN where it was not run, None if only the estimate
            was made.
        estimate: the same to first order in the change of the layer's output at that token.
        indices: the expert that was routed around, int64.
        replacement: the expert that took its place. Under group limits a whole group may change; then it is
            the new expert with the largest weight.
        loss: of each prompt as the model runs it, in the metric's unit (by default nats a token).
    """

    shape: MoEShape
    exact: Float[Tensor, "layer batch pos k"] | None
    estimate: Float[Tensor, "layer batch pos k"]
    indices: Int[Tensor, "layer batch pos k"]
    replacement: Int[Tensor, "layer batch pos k"]
    loss: Float[Tensor, "batch"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers."""
        return self.shape.layers

    @property
    def is_exact(self) -> Bool[Tensor, "layer batch pos k"]:
        """Where the exact change is known; elsewhere there is the estimate."""
        if self.exact is None:
            return torch.zeros_like(self.indices, dtype=torch.bool)
        return ~torch.isnan(self.exact)

    @property
    def changes(self) -> Float[Tensor, "layer batch pos k"]:
        """The exact change where it is known, the estimate elsewhere."""
        return self.estimate if self.exact is None else torch.where(self.is_exact, self.exact, self.estimate)

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """The place of each token in its prompt, from 0; -1 before a shorter prompt."""
        return (self.indices[0, :, :, 0] >= 0).long().cumsum(-1) - 1

    @property
    def largest(self) -> Change:
        """Where the change (`changes`) is largest, up or down."""
        sizes = self.changes.abs().masked_fill(self.indices < 0, -1)
        layer, prompt, column, slot = np.unravel_index(int(sizes.argmax()), sizes.shape)
        place = (layer, prompt, column, slot)
        return Change(
            self.layers[layer],
            int(prompt),
            int(self.positions[prompt, column]),
            int(self.indices[place]),
            float(self.changes[place]),
            bool(self.is_exact[place]),
        )

    @property
    def correlation(self) -> float | None:
        """Pearson correlation of estimate and exact change, where both are; NaN if either is constant."""
        return self.correlate()

    @property
    def rank_correlation(self) -> float | None:
        """Spearman correlation, which a few large changes do not rule."""
        return self.correlate(ranks=True)

    def correlate(self, *, ranks: bool = False, without: Sequence[int] = ()) -> float | None:
        """How estimate and exact change go together; None if only the estimate was made.

        Args:
            ranks: Spearman's correlation instead of Pearson's.
            without: positions that do not count, from each prompt's start: [0] leaves out the first token,
                often an attention sink.
        """
        if self.exact is None:
            return None
        left_out = torch.isin(self.positions, torch.tensor(list(without), dtype=torch.int64))
        return _correlation(
            self.estimate, self.exact.masked_fill(left_out[None, :, :, None], torch.nan), ranks
        )

    @property
    def correlation_by_layer(self) -> tuple[float, ...] | None:
        """`correlation` within each layer."""
        if self.exact is None:
            return None
        return tuple(_correlation(a, b, ranks=False) for a, b in zip(self.estimate, self.exact, strict=True))

    def by_expert(self) -> Float[Tensor, "layer expert"]:
        """Mean of `changes` over the tokens that chose the expert; NaN if no token did."""
        changes = self.changes.flatten(1)
        chosen, real = self.indices.flatten(1).clamp(min=0), self.indices.flatten(1) >= 0
        sums = torch.zeros(len(self.layers), self.shape.n_experts, dtype=changes.dtype)
        sums.scatter_add_(-1, chosen, changes.where(real, 0))
        return sums / _counts(self.indices, self.shape.n_experts)

    def summary(self) -> str:
        """Mean loss in nats, how many changes are exact, correlations, and where the largest is."""
        start = f"{self.shape.model}: loss {self.loss.mean():.4g}"
        if self.exact is None:
            return f"{start}; estimate only; largest {self.largest}"
        n_exact, n_cells = int(self.is_exact.sum()), int((self.indices >= 0).sum())
        known = "" if n_exact == n_cells else f" (exact on {n_exact} of {n_cells})"
        return (
            f"{start}{known}; correlation of estimate and exact {self.correlation:.2f}, by rank "
            f"{self.rank_correlation:.2f}; largest {self.largest}"
        )

    def __str__(self) -> str:
        """The summary, and the correlation by layer and without the first token."""
        if self.correlation_by_layer is None or self.exact is None:
            return repr(self)
        layers = zip(self.layers, self.correlation_by_layer, strict=True)
        return (
            f"{self!r}\n  by layer {', '.join(f'{layer}: {r:.2f}' for layer, r in layers)}\n"
            f"  without position 0 {self.correlate(without=[0]):.2f}, by rank "
            f"{self.correlate(ranks=True, without=[0]):.2f}; mean |change| "
            f"{self.exact[self.is_exact].abs().mean():.3g}"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an expert that was chosen, largest mean change first.

        Columns: layer, expert, n_tokens (that chose it), n_exact (of its changes, those run exactly),
        change (`by_expert`: mean over those tokens).
        """
        import pandas

        changes, chosen = self.by_expert(), _counts(self.indices, self.shape.n_experts)
        exact = _counts(self.indices.where(self.is_exact, -1), self.shape.n_experts)
        rows = [
            (
                self.layers[row],
                expert,
                int(chosen[row, expert]),
                int(exact[row, expert]),
                float(changes[row, expert]),
            )
            for row, expert in chosen.nonzero().tolist()
        ]
        rows.sort(key=lambda row: -abs(row[-1]))
        return pandas.DataFrame(rows, columns=["layer", "expert", "n_tokens", "n_exact", "change"])


def _counts(indices: Int[Tensor, "layer *rest"], n_experts: int) -> Int[Tensor, "layer expert"]:
    """How often each expert was chosen; -1 among the indices is no expert."""
    flat = indices.flatten(1)
    counts = torch.zeros(len(flat), n_experts + 1, dtype=torch.int64)
    return counts.scatter_add_(1, flat + 1, torch.ones_like(flat))[:, 1:]


def _correlation(a: Tensor, b: Tensor, ranks: bool) -> float:
    """Pearson's or Spearman's, where b is known; NaN where either is constant."""
    known = ~torch.isnan(b)
    x, y = a[known].double().numpy(), b[known].double().numpy()
    if len(x) < 2 or not x.std() or not y.std():
        return float("nan")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1] if ranks else np.corrcoef(x, y)[0, 1])


def _ranks(values: Float[np.ndarray, "value"]) -> Float[np.ndarray, "value"]:
    """From 1 on; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]
