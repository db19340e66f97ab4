"""How Hugging Face lays out a router's output, and how its blocks run their experts.

Routers: `InOrder` serves nearly all, a tuple of logits, weights and indices. `AllExperts` (Llama 4),
`SortedTokens` (JetMoE) and `Probabilities` (Gemma 4) are single families' layouts.

Experts, one at a time:

    call = layout.open(Request(block, forward, decision, hidden, args))     # inside the experts' forward
    call.outputs()                          # [token k d_model]: what each chosen expert gives, unweighted
    call.outputs(indices, weights)          # ... and what other experts would give the same tokens
    call.combine(outputs)                   # what the experts' forward returns for such outputs

Three layouts are known: batched experts that take indices and weights; Llama 4, where every expert runs on
its weighted input; JetMoe, where tokens are sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens.errors import HookError, RouterMismatchError


class LayoutError(RouterMismatchError):
    """A router's output is laid out in another way than its row says."""


class RouterOutput(NamedTuple):
    """What a router decided, token by token."""

    logits: Float[Tensor, "token expert"]
    weights: Float[Tensor, "token k"]
    indices: Int[Tensor, "token k"]


ORDER: Final = RouterOutput._fields
"""("logits", "weights", "indices")"""


@runtime_checkable
class Layout(Protocol):
    """How one kind of router returns its decision."""

    def call(self, router: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run the router; gives its output unchanged, and the logits [token expert]."""
        ...

    def weights_dtype(self, output: Any) -> torch.dtype:
        """Dtype of the weights in an output."""
        ...

    def pack(self, output: Any, decision: RouterOutput) -> Any:
        """An output of the form of `output` that holds `decision`."""
        ...

    def unpack(self, output: Any, logits: Tensor) -> RouterOutput:
        """The decision in an output; raises LayoutError, with what is missing, where there is none."""
        ...


@dataclass(frozen=True)
class InOrder:
    """A tuple that holds logits, weights and indices, in the order given."""

    order: tuple[str, ...] = ORDER

    def call(self, router: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        output = forward(*args, **kwargs)
        self._check(output)
        return output, output[self.order.index("logits")].flatten(0, -2)

    def weights_dtype(self, output: Any) -> torch.dtype:
        return output[self.order.index("weights")].dtype

    def pack(self, output: Any, decision: RouterOutput) -> Any:
        parts = []
        for name, like in zip(self.order, output, strict=True):
            part: Tensor = getattr(decision, name)
            if part.shape != like.shape:
                part = part.reshape(like.shape)
            parts.append(part if name == "logits" else part.to(like.dtype))
        return tuple(parts)

    def unpack(self, output: Any, logits: Tensor) -> RouterOutput:
        self._check(output)
        parts = {name: part.flatten(0, -2) for name, part in zip(self.order, output, strict=True)}
        return RouterOutput(**parts)

    def _check(self, output: Any) -> None:
        if not _tensors(output, 3):
            raise LayoutError(f"its forward returns no ({', '.join(self.order)})")


class Probabilities(InOrder):
    """Gemma 4: probabilities [token expert] stand in place of the logits, which `router.proj` gives."""

    def call(self, router: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        if torch.compiler.is_compiling():  # which knows no hooks that come and go
            output = forward(*args, **kwargs)
            return output, router.proj(router.norm(args[0]) * router.scale * router.scalar_root_size)
        seen: list[Tensor] = []

        def note(projection: nn.Module, inputs: Any, logits: Tensor) -> None:
            seen.append(logits)

        handle = router.proj.register_forward_hook(note)
        try:
            output = forward(*args, **kwargs)
        finally:
            handle.remove()
        self._check(output)
        if len(seen) != 1:
            raise LayoutError("its forward does not call router.proj once")
        return output, seen[0]

    def pack(self, output: Any, decision: RouterOutput) -> Any:
        probabilities = torch.softmax(decision.logits, dim=-1, dtype=torch.float32)
        return super().pack(output, decision._replace(logits=probabilities))

    def unpack(self, output: Any, logits: Tensor) -> RouterOutput:
        return super().unpack(output, logits)._replace(logits=logits)


class AllExperts:
    """Llama 4: (weights of all experts, 0 for those not chosen; logits), both [token expert]."""

    def call(self, router: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        output = forward(*args, **kwargs)
        self._check(output)
        return output, output[1]

    def weights_dtype(self, output: Any) -> torch.dtype:
        return output[0].dtype

    def pack(self, output: Any, decision: RouterOutput) -> Any:
        weights = decision.weights.to(output[0].dtype)
        nothing = torch.zeros(decision.logits.shape, dtype=weights.dtype, device=weights.device)
        return nothing.scatter_add(1, decision.indices, weights), decision.logits

    def unpack(self, output: Any, logits: Tensor) -> RouterOutput:
        self._check(output)
        weights = output[0]
        k = int((weights != 0).sum(dim=-1).max())
        indices = logits.topk(k, dim=-1).indices
        elsewhere = weights.scatter(-1, indices, 0) != 0
        if bool(elsewhere.any()):
            indices = weights.topk(k, dim=-1).indices
        return RouterOutput(logits, weights.gather(-1, indices), indices)

    def _check(self, output: Any) -> None:
        if not _tensors(output, 2):
            raise LayoutError("its forward returns no (weights of all experts, logits)")
        if output[0].shape != output[1].shape:
            raise LayoutError(
                f"weights have shape {tuple(output[0].shape)}, not {tuple(output[1].shape)} as its logits"
            )


class SortedTokens:
    """JetMoE: (order, tokens, weights, tokens per expert, logits), the (token, slot) pairs by expert."""

    def call(self, router: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        output = forward(*args, **kwargs)
        self._check(output)
        return output, output[-1]

    def weights_dtype(self, output: Any) -> torch.dtype:
        return output[2].dtype

    def pack(self, output: Any, decision: RouterOutput) -> Any:
        logits, weights, indices = decision
        experts = indices.flatten()
        order = experts.sort(0).indices
        tokens = order.div(indices.shape[-1], rounding_mode="trunc")
        chosen = torch.zeros_like(logits, dtype=torch.long)
        sizes = chosen.scatter_add(1, indices, torch.ones_like(indices)).sum(0).tolist()
        return order, tokens, weights.to(output[2].dtype).flatten()[order], sizes, logits

    def unpack(self, output: Any, logits: Tensor) -> RouterOutput:
        self._check(output)
        order, _, sorted_weights, sizes, _ = output
        if len(order) % max(len(logits), 1):
            raise LayoutError(f"it gives {len(order)} experts to {len(logits)} tokens")
        in_order = torch.arange(len(sizes), device=order.device).repeat_interleave(
            torch.tensor(sizes, device=order.device)
        )
        indices = torch.empty_like(order).scatter(0, order, in_order).reshape(len(logits), -1)
        weights = torch.empty_like(sorted_weights).scatter(0, order, sorted_weights).reshape(indices.shape)
        return RouterOutput(logits, weights, indices)

    def _check(self, output: Any) -> None:
        if not (isinstance(output, tuple) and len(output) == 5 and isinstance(output[-1], Tensor)):
            raise LayoutError("its forward returns no (order, tokens, weights, tokens per expert, logits)")


def _tensors(output: Any, number: int) -> bool:
    return isinstance(output, tuple) and len(output) == number and all(isinstance(x, Tensor) for x in output)


Outputs = Float[Tensor, "token slot d_model"]


@dataclass
class Request:
    """One call of the forward of a block's experts, with what the router decided.

    Attributes:
        block: the MoE block. hidden: what it was given, [token d_model]; None if no other expert is asked.
        forward: the module's own forward. args: what it was called with.
        decision: what the router decided for these tokens.
    """

    block: Any
    forward: Callable[..., Tensor]
    decision: RouterOutput
    hidden: Tensor | None
    args: list[Any]

    @property
    def block_input(self) -> Tensor:
        """What the block was given, [token d_model]."""
        if self.hidden is None:
            raise HookError(f"{type(self.block).__name__}: what other experts give is known only to hooks.")
        return self.hidden


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
    """Whether a weight multiplies what the expert reads, so that its output is added as it is."""

    def module(self, block: Any) -> nn.Module | None:
        """The module of the block whose forward runs the experts; None where the block has no such module."""
        ...

    def open(self, request: Request) -> ExpertsCall:
        """What `module(block).forward` is to compute."""
        ...


class Batched:
    """experts(hidden [token d_model], indices [token k], weights [token k]): nearly every family."""

    weights_on_input = False

    def module(self, block: Any) -> nn.Module | None:
        experts = getattr(block, "experts", None)
        return experts if isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList) else None

    def open(self, request: Request) -> ExpertsCall:
        if len(request.args) != 3 or not all(isinstance(arg, Tensor) for arg in request.args):
            raise HookError(
                f"{type(request.block).__name__} does not call its experts with (hidden states, indices, "
                "weights), so their outputs cannot be told apart. Leave set_use_expert_out(False)."
            )
        return _BatchedCall(request.forward, *request.args)


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

    def open(self, request: Request) -> ExpertsCall:
        return _InputWeightedCall(request)


@dataclass
class _InputWeightedCall:
    request: Request
    all_outputs: Tensor | None = None  # [token expert d_model]

    def outputs(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Outputs:
        if indices is None:
            self.all_outputs = self._run(self.request.args[0])
            return self._of(self.all_outputs, self.request.decision.indices)
        weights = self.request.decision.weights if weights is None else weights
        columns = []
        for slot, weight in zip(indices.unbind(-1), weights.unbind(-1), strict=True):
            scores = torch.zeros(self.request.decision.logits.shape, dtype=weight.dtype, device=weight.device)
            scores = scores.scatter(1, slot[:, None], weight[:, None])
            routed = self.request.block_input.repeat(scores.shape[1], 1)
            routed = routed * scores.to(routed.dtype).transpose(0, 1).reshape(-1, 1)
            columns.append(self._of(self._run(routed), slot[:, None]))
        return torch.cat(columns, dim=1)

    def combine(self, outputs: Outputs) -> Tensor:
        assert self.all_outputs is not None
        index = self.request.decision.indices.unsqueeze(-1).expand_as(outputs)
        return self.all_outputs.scatter(1, index, outputs).transpose(0, 1).flatten(0, 1)

    def _run(self, routed: Tensor) -> Tensor:
        outputs = self.request.forward(routed)
        return outputs.unflatten(0, (self.request.decision.logits.shape[-1], -1)).transpose(0, 1)

    def _of(self, outputs: Tensor, indices: Tensor) -> Tensor:
        return outputs.gather(1, indices.unsqueeze(-1).expand(-1, -1, outputs.shape[-1]))


class Sorted:
    """JetMoe: input_linear, activation and output_linear on the (token, slot) pairs sorted by expert."""

    weights_on_input = False

    def module(self, block: Any) -> nn.Module | None:
        return getattr(block, "output_linear", None)

    def open(self, request: Request) -> ExpertsCall:
        return _SortedCall(request)


@dataclass
class _SortedCall:
    request: Request

    def outputs(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Outputs:
        if indices is None:
            return self._in_slots(self.request.forward(*self.request.args), self.request.decision.indices)
        order = indices.flatten().sort(0).indices
        n_experts = self.request.decision.logits.shape[-1]
        sizes = torch.bincount(indices.flatten(), minlength=n_experts).tolist()
        sorted_tokens = order.div(indices.shape[-1], rounding_mode="trunc")
        gate, up = self.request.block.input_linear(self.request.block_input[sorted_tokens], sizes).chunk(
            2, dim=-1
        )
        return self._in_slots(self.request.forward(self.request.block.activation(gate) * up, sizes), indices)

    def combine(self, outputs: Outputs) -> Tensor:
        return outputs.flatten(0, 1)[self.request.decision.indices.flatten().sort(0).indices]

    def _in_slots(self, sorted_outputs: Tensor, indices: Tensor) -> Tensor:
        order = indices.flatten().sort(0).indices
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return sorted_outputs[back].unflatten(0, tuple(indices.shape))
