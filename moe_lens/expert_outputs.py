"""How Hugging Face MoE blocks run their experts, one expert at a time.

    call = layout.open(Asked(block, forward, decision, hidden, args))   # inside the experts' forward
    call.outputs()                          # [token k d_model]: what each chosen expert gives, unweighted
    call.outputs(indices, weights)          # ... and what other experts would give the same tokens
    call.combine(outputs)                   # what the experts' forward returns for such outputs

Three ways are known: batched experts that take indices and weights; Llama 4, where every expert runs on its
weighted input; JetMoe, where tokens are sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens.errors import HookError
from moe_lens.router_outputs import RouterOutput

Outputs = Float[Tensor, "token slot d_model"]


@dataclass
class Asked:
    """What the forward of a block's experts was asked for.

    Attributes:
        block: the MoE block. hidden: what it was given, [token d_model].
        forward: the module's own forward. args: what it was called with.
        decision: what the router decided for these tokens.
    """

    block: Any
    forward: Callable[..., Tensor]
    decision: RouterOutput
    hidden: Tensor
    args: list[Any]


@runtime_checkable
class ExpertsCall(Protocol):
    """One call of a block's experts."""

    def outputs(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Outputs:
        """Unweighted outputs of the chosen experts, or of those of `indices` [token slot] at `weights`."""
        ...

    def combine(self, outputs: Outputs) -> Tensor:
        """What the experts' forward returns if the chosen experts' outputs are these."""
        ...


@runtime_checkable
class ExpertsLayout(Protocol):
    """How one kind of block runs its experts."""

    weights_on_input: bool
    """Whether a weight multiplies what the expert reads, so that its output counts as it is."""

    def module(self, block: Any) -> nn.Module | None:
        """The module of the block whose forward is stood in for; None where the block has no such module."""
        ...

    def open(self, asked: Asked) -> ExpertsCall:
        """The call that `module(block).forward` was asked for."""
        ...


class Batched:
    """experts(hidden [token d_model], indices [token k], weights [token k]): nearly every family."""

    weights_on_input = False

    def module(self, block: Any) -> nn.Module | None:
        experts = getattr(block, "experts", None)
        return experts if isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList) else None

    def open(self, asked: Asked) -> ExpertsCall:
        if len(asked.args) != 3 or not all(isinstance(arg, Tensor) for arg in asked.args):
            raise HookError(
                f"{type(asked.block).__name__} does not call its experts with (hidden states, indices, "
                "weights), so their outputs cannot be told apart. Leave set_use_expert_out(False)."
            )
        return _BatchedCall(asked.forward, *asked.args)


@dataclass
class _BatchedCall:
    forward: Callable[..., Tensor]
    hidden: Tensor
    indices: Int[Tensor, "token k"]
    weights: Float[Tensor, "token k"]

    def outputs(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Outputs:
        indices = self.indices if indices is None else indices.to(self.indices.dtype)
        n_slots = indices.shape[-1]
        repeated = self.hidden.repeat_interleave(n_slots, dim=0)
        unit = torch.ones(len(repeated), 1, dtype=self.weights.dtype, device=self.weights.device)
        return self.forward(repeated, indices.reshape(-1, 1), unit).unflatten(0, (-1, n_slots))

    def combine(self, outputs: Outputs) -> Tensor:
        return (outputs * self.weights.unsqueeze(-1)).sum(dim=1).to(self.hidden.dtype)


class InputWeighted:
    """Llama 4: experts([expert × token, d_model]), every expert on every token times its weight.

    An expert's output is what it gives for the weighted input; the outputs are added as they are.
    """

    weights_on_input = True

    def module(self, block: Any) -> nn.Module | None:
        return getattr(block, "experts", None)

    def open(self, asked: Asked) -> ExpertsCall:
        return _InputWeightedCall(asked)


@dataclass
class _InputWeightedCall:
    asked: Asked
    all_outputs: Tensor | None = None  # [token expert d_model]

    def outputs(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Outputs:
        if indices is None:
            self.all_outputs = self._run(self.asked.args[0])
            return self._of(self.all_outputs, self.asked.decision.indices)
        weights = self.asked.decision.weights if weights is None else weights
        columns = []
        for slot, weight in zip(indices.unbind(-1), weights.unbind(-1), strict=True):
            scores = torch.zeros(self.asked.decision.logits.shape, dtype=weight.dtype, device=weight.device)
            scores = scores.scatter(1, slot[:, None], weight[:, None])
            routed = self.asked.hidden.repeat(scores.shape[1], 1)
            routed = routed * scores.to(routed.dtype).transpose(0, 1).reshape(-1, 1)
            columns.append(self._of(self._run(routed), slot[:, None]))
        return torch.cat(columns, dim=1)

    def combine(self, outputs: Outputs) -> Tensor:
        assert self.all_outputs is not None
        index = self.asked.decision.indices.unsqueeze(-1).expand_as(outputs)
        return self.all_outputs.scatter(1, index, outputs).transpose(0, 1).flatten(0, 1)

    def _run(self, routed: Tensor) -> Tensor:
        outputs = self.asked.forward(routed)
        return outputs.unflatten(0, (self.asked.decision.logits.shape[-1], -1)).transpose(0, 1)

    def _of(self, outputs: Tensor, indices: Tensor) -> Tensor:
        return outputs.gather(1, indices.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))


class Sorted:
    """JetMoe: input_linear, activation and output_linear on the (token, slot) pairs sorted by expert."""

    weights_on_input = False

    def module(self, block: Any) -> nn.Module | None:
        return getattr(block, "output_linear", None)

    def open(self, asked: Asked) -> ExpertsCall:
        return _SortedCall(asked)


@dataclass
class _SortedCall:
    asked: Asked

    def outputs(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Outputs:
        if indices is None:
            return self._in_slots(self.asked.forward(*self.asked.args), self.asked.decision.indices)
        order = indices.flatten().sort(0).indices
        n_experts = self.asked.decision.logits.shape[-1]
        sizes = torch.bincount(indices.flatten(), minlength=n_experts).tolist()
        sorted_tokens = order.div(indices.shape[-1], rounding_mode="trunc")
        gate, up = self.asked.block.input_linear(self.asked.hidden[sorted_tokens], sizes).chunk(2, dim=-1)
        return self._in_slots(self.asked.forward(self.asked.block.activation(gate) * up, sizes), indices)

    def combine(self, outputs: Outputs) -> Tensor:
        return outputs.flatten(0, 1)[self.asked.decision.indices.flatten().sort(0).indices]

    def _in_slots(self, sorted_outputs: Tensor, indices: Tensor) -> Tensor:
        order = indices.flatten().sort(0).indices
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return sorted_outputs[back].unflatten(0, tuple(indices.shape))
