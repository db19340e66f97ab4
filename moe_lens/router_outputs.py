"""How a Hugging Face router's output is laid out: reading its logits, building it anew.

`InOrder` serves nearly all: a tuple of logits, weights and indices. `AllExperts` (Llama 4), `SortedTokens`
(JetMoE) and `Probabilities` (Gemma 4) are single families' layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens.errors import RouterMismatchError


class LayoutError(RouterMismatchError):
    """A router's output that is laid out otherwise."""


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
        """Run the router: its output as it is, and the logits [token expert]."""
        ...

    def weights_dtype(self, output: Any) -> torch.dtype:
        """Dtype of the weights in an output."""
        ...

    def pack(self, output: Any, decision: RouterOutput) -> Any:
        """An output like `output` that says `decision`."""
        ...

    def unpack(self, output: Any, logits: Tensor) -> RouterOutput:
        """The decision in an output; raises LayoutError, saying what it is not, where there is none."""
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
        like = dict(zip(self.order, output, strict=True))
        parts = {name: part.reshape(like[name].shape) for name, part in decision._asdict().items()}
        for name in ("weights", "indices"):
            parts[name] = parts[name].to(like[name].dtype)
        return tuple(parts[name] for name in self.order)

    def unpack(self, output: Any, logits: Tensor) -> RouterOutput:
        self._check(output)
        parts = {name: part.flatten(0, -2) for name, part in zip(self.order, output, strict=True)}
        return RouterOutput(**parts)

    def _check(self, output: Any) -> None:
        if not _tensors(output, 3):
            raise LayoutError(f"its forward returns no ({', '.join(self.order)})")


class Probabilities(InOrder):
    """Gemma 4: probabilities [token expert] in the place of logits, which are what `router.proj` gives."""

    def call(self, router: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
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
        sizes = torch.bincount(experts, minlength=logits.shape[-1]).tolist()
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
