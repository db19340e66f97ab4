"""What if each chosen expert had been routed around? The loss change, exact and by a linear estimate.

    found = virtual_ablation(model, prompts)
    found.exact, found.estimate                 # [layer batch pos k], nats
    found.correlation                           # how well the one tells the other

For every layer, token and chosen expert: the next-best expert takes its place at that token, with weights by
the router's rule, and everything after it runs on. The exact change takes a forward each, many at a time as
rows of a batch; the estimate takes one forward and one backward for all.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.attribution.ablation_runs import AblationBatch, Metric, next_token_loss
from moe_lens.attribution.equal_lengths import equal_length_batches, side_by_side
from moe_lens.checks import as_index
from moe_lens.errors import DataError, HookError, MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.registration import forward_state
from moe_lens.shape import MoEShape
from moe_lens.text.batching import Prompts

_BATCH: Final = 8
"""Prompts at a time for the estimate, where no batch size is given."""

_FIELDS: Final = ("exact", "estimate", "indices", "replacement", "loss")


@dataclass(frozen=True, eq=False)
class VirtualAblation:
    """Loss changes for every layer, token and chosen expert, on the CPU; positive: the loss would be higher.

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
            id (the first of DeepSeek-V4) have no next-best expert and are left out.
        exact: loss with the expert routed around − loss; None if it was not asked for.
        estimate: the same to first order in the change of the layer's output at that token.
        indices: the expert that was routed around, int64.
        replacement: the expert that took its place. Under group limits a whole group may change; then the one
            with the largest weight among those that came in.
        loss: of each prompt as the model runs it, in the metric's unit (nats a token).
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
    def correlation(self) -> float | None:
        """Pearson's, of estimate and exact change over all tokens; NaN where one of them is constant."""
        return None if self.exact is None else _pearson(self.estimate, self.exact)

    @property
    def correlation_by_layer(self) -> tuple[float, ...] | None:
        """`correlation` within each layer."""
        if self.exact is None:
            return None
        return tuple(_pearson(a, b) for a, b in zip(self.estimate, self.exact, strict=True))

    def by_expert(self) -> Float[Tensor, "layer expert"]:
        """Mean change over the tokens that chose the expert (exact, if known); NaN where none did."""
        changes = (self.estimate if self.exact is None else self.exact).flatten(1)
        chosen, real = self.indices.flatten(1).clamp(min=0), self.indices.flatten(1) >= 0
        sums, counts = torch.zeros(2, len(self.layers), self.shape.n_experts, dtype=changes.dtype)
        sums.scatter_add_(-1, chosen, changes.where(real, 0))
        counts.scatter_add_(-1, chosen, real.to(changes.dtype))
        return sums / counts

    def __repr__(self) -> str:
        size = "×".join(map(str, self.estimate.shape))
        about = f"VirtualAblation({self.shape.model}, layer×prompt×pos×k {size}, loss {self.loss.mean():.4g}"
        if self.exact is None or self.correlation_by_layer is None:
            return f"{about}; estimate only)"
        known = self.exact[self.indices >= 0]
        layers = ", ".join(
            f"{layer}: {r:.2f}" for layer, r in zip(self.layers, self.correlation_by_layer, strict=True)
        )
        return (
            f"{about}; mean |change| {known.abs().mean():.3g}, largest {known.abs().max():.3g}; correlation "
            f"of estimate and exact {self.correlation:.2f}, by layer {layers})"
        )


def virtual_ablation(
    model: HookedMoE,
    prompts: Prompts,
    metric: Metric | None = None,
    *,
    exact: bool = True,
    batch_size: int | Any | None = None,
    progress: bool = False,
) -> VirtualAblation:
    """The loss change if each chosen expert were routed around at its token, exactly and by linear estimate.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import virtual_ablation
    >>> model = organisms.load("specialised")
    >>> found = virtual_ablation(model, ["Question : what is the", "Document : the"], progress=False)
    >>> found.exact.shape, bool((found.replacement != found.indices)[:, 0].all())
    (torch.Size([4, 2, 6, 2]), True)

    The estimate is the gradient of the loss at the layer's routed output, times the exact change of that
    output (first-order, as in attribution patching, arXiv 2310.10348): it sees what the token's output loses
    and gains, and takes all that comes after to be linear. Where an expert writes most of the residual stream
    (the norm's scale follows it) or a prediction is near certain (the loss is flat), it can be far off: read
    `correlation` before trusting it.

    Args:
        model: a HookedMoE. Hooks that are on it count (steered logits, for one), but at the ablated token
            the route is the one that follows from the router logits.
        prompts: strings, chats or tokens; see `collect_routing`. They run in batches of equal length, so no
            prompt's numbers depend on another.
        metric: (logits [batch pos d_vocab], tokens [batch pos]) -> [batch], each number from its own row;
            by default the mean cross-entropy of a prompt's tokens after the first, in nats.
        exact: whether to run the exact changes: layers × tokens × k forwards in all.
        batch_size: how many of those at a time. By default as many as memory seems to allow, fewer if it
            runs out.

    Raises:
        MoELensError: every expert runs for every token (k = number of experts), or group limits leave no
            other expert. HookError: no layer's experts depend on its router logits.
        DataError: a metric that does not give a finite number a prompt; prompts of one token without a metric
            of your own; prompts as in `collect_routing`.
    """
    if batch_size is not None and not as_index(batch_size):
        raise DataError(f"batch_size must be a number from 1 on; got {batch_size!r}.")
    batches = equal_length_batches(model, prompts, batch_size or _BATCH)
    layers = _ablatable(model)
    metric = next_token_loss if metric is None else metric
    if not callable(metric):
        raise DataError(f"metric must be a function of logits and tokens; got {metric!r}.")
    shortest = batches[0][1].shape[1]
    if metric is next_token_loss and shortest < 2:
        raise DataError("A prompt of one token has no next token to predict; give longer ones, or a metric.")
    n_tokens = sum(tokens.numel() for _, tokens in batches)
    n_forwards = len(layers) * n_tokens * model.top_k if exact else 0
    found: dict[str, list[tuple[list[int], Tensor]]] = {name: [] for name in _FIELDS}
    with tqdm(total=n_forwards, desc="routing around", unit="run", disable=not (progress and exact)) as bar:
        for rows, tokens in batches:
            batch = AblationBatch(model, layers, tokens, metric)
            with forward_state(model).of_prompts(rows):
                batch.run_estimate()
                if exact:
                    batch.run_exact(batch_size, bar)
            for name, each in found.items():
                if (value := getattr(batch, name)) is not None:
                    each.append((rows, value))
    whole = {name: _assembled(name, pieces) for name, pieces in found.items()}
    shape = model.moe_shape
    return VirtualAblation(
        MoEShape(shape.model, tuple(layers), shape.n_experts, shape.top_k),
        whole["exact"],
        *(_present(whole[name]) for name in ("estimate", "indices", "replacement", "loss")),
    )


def _ablatable(model: HookedMoE) -> list[int]:
    """The layers that have a next-best expert."""
    layers = []
    for layer in model.moe_layers:
        rule = model.routing_rule(layer)
        if not rule.chooses_by_logits:
            continue
        reasons = (rule.cannot_steer([], [expert]) for expert in range(rule.n_experts))
        if (reason := next((each for each in reasons if each is not None), None)) is not None:
            raise MoELensError(
                f"Layer {layer} of {model.moe_shape.model} has no expert to take another's place: {reason}. "
                "Zero ablation, which removes an expert's output, needs none."
            )
        layers.append(layer)
    if not layers:
        raise HookError(
            f"{model.moe_shape.model}: the experts of all layers come from tables by token id, so none can "
            "be routed around."
        )
    return layers


def _assembled(name: str, pieces: list[tuple[list[int], Tensor]]) -> Tensor | None:
    if not pieces:
        return None
    if name == "loss":
        return side_by_side(pieces, (0, None), torch.nan)
    return side_by_side(pieces, (1, 2), -1 if name in ("indices", "replacement") else torch.nan)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _pearson(a: Tensor, b: Tensor) -> float:
    known = ~torch.isnan(b)
    x, y = a[known].double().numpy(), b[known].double().numpy()
    if len(x) < 2 or not x.std() or not y.std():
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
