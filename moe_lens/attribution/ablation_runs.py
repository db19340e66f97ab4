"""The runs behind `virtual_ablation`, for prompts of equal length.

    batch = AblationBatch(model, layers, tokens, metric)
    batch.run_estimate()                   # batch.estimate, .indices, .replacement, .loss
    batch.run_exact(batch_size, bar)       # batch.exact

All runs take place under the hooks that are on the model.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from accelerate.utils import find_executable_batch_size
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens import hook_names
from moe_lens.attribution.direct_paths import gradients, wide
from moe_lens.errors import DataError, HookError
from moe_lens.model.metric import TokenMetric
from moe_lens.model.registration import running_of, with_expert_out
from moe_lens.model.wrapper import Model

_MEMORY: Final = 2**30
"""Bytes that stacked forwards may take on a CPU; on a GPU, half of what is free."""


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each prompt's tokens after the first, in nats."""
    log_probs = wide(logits[:, :-1]).log_softmax(-1)
    return -log_probs.gather(-1, tokens[:, 1:, None].to(log_probs.device)).squeeze(-1).mean(-1)


def losses(metric: TokenMetric, logits: Tensor, tokens: Tensor) -> Float[Tensor, "batch"]:
    """What a metric gives for each row. Raises DataError if that is not one finite number a row."""
    values = metric(logits, tokens)
    if not isinstance(values, Tensor) or values.shape != (len(tokens),) or not values.is_floating_point():
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise DataError(f"metric must give one number for each of the {len(tokens)} prompts; got {got}.")
    if not bool(torch.isfinite(values).all()):
        raise DataError("metric gives NaN or infinite numbers; look for a log of 0 or a division by 0 in it.")
    return wide(values)


@dataclass
class AblationBatch:
    """Prompts of equal length, and what the runs find out about them.

    Attributes:
        model: the model.
        layers: numbers of the layers whose experts are routed around.
        tokens: the prompts, without padding.
        metric: the loss of each prompt.
        others: layer -> indices and weights [batch pos slot k] of the route without the expert of each slot.
        estimate: loss changes to first order, [layer batch pos k] on the CPU; None until they were run.
        exact: exact loss changes, likewise.
        indices: the expert of each slot, likewise.
        replacement: the expert that comes in for it, likewise.
        loss: of each prompt, [batch].
    """

    model: Model
    layers: list[int]
    tokens: Int[Tensor, "batch pos"]
    metric: TokenMetric
    others: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    estimate: Any = None
    exact: Any = None
    indices: Any = None
    replacement: Any = None
    loss: Any = None

    def run_estimate(self) -> None:
        """Loss, routes without each chosen expert, and the linear estimates: a forward and a backward."""
        seen = _Seen()
        points: list[tuple[Any, Callable[..., Any]]] = []
        for layer in self.layers:
            points += [
                (hook_names.router_logits(layer), seen.note_logits),
                (hook_names.topk_indices(layer), seen.note_indices),
                (hook_names.topk_weights(layer), seen.note_weights),
                (hook_names.expert_out(layer), seen.follow_outputs),
            ]
        with torch.inference_mode(False), torch.enable_grad(), with_expert_out(self.model):
            with self.model.hooks(points):
                tokens = self.tokens.clone()  # they may come from inference mode
                loss = losses(self.metric, self.model(tokens), tokens)
            if not loss.requires_grad:
                raise DataError("metric gives numbers without gradient; compute them from the logits.")
            grads = gradients(loss.sum(), [seen.outputs[layer] for layer in self.layers])
        self.others = seen.others
        self.estimate = _stack(map(seen.estimate, self.layers, grads))
        self.indices = _stack(seen.indices[layer] for layer in self.layers)
        self.replacement = _stack(_newcomers(seen.indices[n], *self.others[n]) for n in self.layers)
        self.loss = self._loss(self.tokens).cpu()  # under the same hooks as the exact runs, and no more

    def run_exact(self, batch_size: int | None, bar: Any) -> None:
        """The exact changes: each row of a batch has one token of one layer routed around one expert."""
        self.exact = torch.zeros(self.indices.shape, dtype=self.loss.dtype)
        for layer in range(len(self.layers)):
            run: Callable[..., None] = partial(self._run_layer, layer, bar)
            rows = batch_size or _rows_that_fit(self.model, self.tokens.shape[1])
            if batch_size is None and self.tokens.is_cuda:  # fewer rows if memory runs out
                find_executable_batch_size(lambda batch_size, run=run: run(batch_size), rows)()
            else:
                run(rows)

    def _run_layer(self, layer: int, bar: Any, batch_size: int) -> None:
        n_batch, n_pos, n_slots = self.indices.shape[1:]
        todo = torch.cartesian_prod(*map(torch.arange, (n_batch, n_pos, n_slots)))
        for cells in todo.reshape(-1, 3).split(batch_size):
            row, pos, slot = cells.to(self.tokens.device).unbind(1)
            hooks = self._instead(self.layers[layer], row, pos, slot)
            with running_of(self.model).of_prompts(cells[:, 0]):
                loss = self._loss(self.tokens[row], hooks).cpu()
            row, pos, slot = cells.unbind(1)
            self.exact[layer, row, pos, slot] = loss - self.loss[row]
            bar.update(len(cells))

    def _instead(self, layer: int, row: Tensor, pos: Tensor, slot: Tensor) -> list[Any]:
        """Hooks that put the other route in, at one token of each row."""
        indices, weights = (
            other[row.to(other.device), pos.to(other.device), slot.to(other.device)]
            for other in self.others[layer]
        )

        def put(other: Tensor, value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[torch.arange(len(value)), pos.to(value.device)] = other.to(value)
            return value

        return [
            (hook_names.topk_indices(layer), partial(put, indices)),
            (hook_names.topk_weights(layer), partial(put, weights)),
        ]

    @torch.no_grad()
    def _loss(self, tokens: Tensor, hooks: Any = ()) -> Tensor:
        with self.model.hooks(list(hooks)):
            return losses(self.metric, self.model(tokens), tokens)


@dataclass
class _Seen:
    """What hooks see, by layer, in the run whose gradient gives the estimates."""

    logits: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    indices: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    others: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)  # [batch pos slot d]
    weights_on_input: dict[int, bool] = field(default_factory=dict)

    def note_logits(self, value: Tensor, hook: Any) -> None:
        rule = hook.rule  # a steering hook may have set it
        self.logits[hook_names.layer_of(hook.name)] = (value.detach().clone(), rule)

    def note_indices(self, value: Tensor, hook: Any) -> None:
        self.indices[hook_names.layer_of(hook.name)] = value.clone()

    def note_weights(self, value: Tensor, hook: Any) -> None:
        layer = hook_names.layer_of(hook.name)
        self.weights[layer] = value.detach().clone()
        self.others[layer] = _routes_without(*self.logits[layer], self.indices[layer], self.weights[layer])

    def follow_outputs(self, value: Tensor, hook: Any) -> Tensor:
        layer = hook_names.layer_of(hook.name)
        value = value if value.requires_grad else value.detach().requires_grad_()
        self.outputs[layer], self.weights_on_input[layer] = value, hook.weights_on_input
        self.changes[layer] = _change(hook, value, self.weights[layer], *self.others[layer])
        return value

    def estimate(self, layer: int, grad: Tensor) -> Float[Tensor, "batch pos slot"]:
        """The gradient at the routed output of a layer, times the change of that output."""
        at_routed = _at_routed(grad, self.weights[layer], self.weights_on_input[layer])
        return (at_routed.unsqueeze(-2) * self.changes[layer]).sum(-1)


@torch.no_grad()
def _routes_without(
    logits: Tensor, rule: Any, indices: Tensor, weights: Tensor
) -> tuple[Int[Tensor, "batch pos slot k"], Float[Tensor, "batch pos slot k"]]:
    """The route of each token without the expert of each slot."""
    n_slots = indices.shape[-1]
    other_indices = indices.unsqueeze(-2).repeat_interleave(n_slots, dim=-2)
    other_weights = weights.unsqueeze(-2).repeat_interleave(n_slots, dim=-2)
    for expert in indices.unique().tolist():
        without, ruled = rule.without(logits, expert)
        instead, weighed = ruled.route(without)
        is_it = (indices == expert).unsqueeze(-1)
        other_indices = torch.where(is_it, instead.unsqueeze(-2), other_indices)
        other_weights = torch.where(is_it, weighed.unsqueeze(-2).to(weights.dtype), other_weights)
    return other_indices, other_weights


@torch.no_grad()
def _change(
    hook: Any, outputs: Tensor, weights: Tensor, other_indices: Tensor, other_weights: Tensor
) -> Float[Tensor, "batch pos slot d"]:
    """How the routed output of the layer changes, for each slot whose expert is routed around."""
    routed = _sum(outputs, weights, hook.weights_on_input)
    changes = []
    for slot in range(other_indices.shape[-2]):
        indices, weighed = other_indices[..., slot, :], other_weights[..., slot, :]
        others = hook.outputs_of(indices, weighed)
        changes.append(_sum(others, weighed, hook.weights_on_input) - routed)
    return torch.stack(changes, dim=-2)


def _sum(outputs: Tensor, weights: Tensor, weights_on_input: bool) -> Tensor:
    outputs = wide(outputs)
    return outputs.sum(-2) if weights_on_input else (outputs * wide(weights).unsqueeze(-1)).sum(-2)


def _at_routed(grad: Tensor, weights: Tensor, weights_on_input: bool) -> Float[Tensor, "batch pos d"]:
    """The gradient at the routed output, from that at the expert's output with the largest weight."""
    largest = wide(weights).abs().max(-1, keepdim=True)
    if not weights_on_input and bool((largest.values == 0).any()):
        raise HookError(
            "Hooks on the model set all weights of a token to 0, so no gradient says what its experts are "
            "worth; leave some weight (scale_experts with a small factor, say)."
        )
    slot = largest.indices.unsqueeze(-1).expand(*grad.shape[:-2], 1, grad.shape[-1])
    at_output = wide(grad).gather(-2, slot).squeeze(-2)
    return at_output if weights_on_input else at_output / wide(weights).gather(-1, largest.indices)


def _newcomers(
    indices: Tensor, other_indices: Tensor, other_weights: Tensor
) -> Int[Tensor, "batch pos slot"]:
    """Of the experts that came in when each slot's was routed around, the one with the largest weight."""
    stayed = (other_indices.unsqueeze(-1) == indices[..., None, None, :]).any(-1)
    best = wide(other_weights).abs().masked_fill(stayed, -1).argmax(-1, keepdim=True)
    return other_indices.gather(-1, best).squeeze(-1)


def _rows_that_fit(model: Model, n_pos: int) -> int:
    """How many prompts fit into a forward: a few copies of the logits, and one layer's activations."""
    device = torch.device(model.cfg.device or "cpu")
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _MEMORY
    numbers = 4 * model.cfg.d_vocab + (32 + 8 * model.top_k) * model.cfg.d_model
    return int(min(max(free // (4 * n_pos * numbers), 1), 512))


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().cpu() for tensor in tensors])
