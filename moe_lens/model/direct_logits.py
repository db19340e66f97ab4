"""A router's logits without the rest of what its forward computes, where they are seen to be a product.

    direct = direct_logits(moe, forward)       # None where the router must be run whole
    logits = direct(moe.router, hidden)        # [token expert], bit for bit those of its forward; or None

A plan needs no more than the logits; choosing and weighing experts twice would cost more than steering does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moe_lens.model.layers import MoELayer
from moe_lens.model.probing import evaluating, hidden_states
from moe_lens.routers.layouts import ORDER, InOrder, RouterOutput

_N_TOKENS = 16


@dataclass(frozen=True)
class DirectLogits:
    """The product of hidden states and the router's weight.

    Attributes:
        in_float32: both are widened first.
        has_bias: the router's bias is added.
        weights_dtype: that of the router's weights; None where it is the logits'.
        dtype, hidden_dtype: of the weight and of what it was given when this was seen.
    """

    in_float32: bool
    has_bias: bool
    weights_dtype: torch.dtype | None
    dtype: torch.dtype
    hidden_dtype: torch.dtype

    def __call__(
        self, router: Any, hidden: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "token expert"] | None:
        """None where router or run are not of the kind for which this was seen, and under autocast."""
        weight = router.weight
        if weight.dtype != self.dtype or hidden.dtype != self.hidden_dtype or router.training:
            return None
        if torch.is_autocast_enabled(hidden.device.type):
            return None
        bias = router.bias if self.has_bias else None
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if self.in_float32:
            hidden, weight = hidden.float(), weight.float()
        return F.linear(hidden, weight, bias)


def direct_logits(moe: MoELayer, forward: Callable[..., Any]) -> DirectLogits | None:
    """How the logits that the router's forward gives are a product, by trying; None if none is seen."""
    router, layout = moe.router, cast(Any, moe.row.layout)
    weight: Any = getattr(router, "weight", None)
    if type(layout) is not InOrder or not isinstance(weight, Tensor) or weight.is_meta or weight.ndim != 2:
        return None
    with evaluating(router):
        try:
            _, hidden = next(iter(hidden_states(router, moe.block)))
            hidden = hidden[:_N_TOKENS]
            inputs = moe.row.inputs(moe.block, hidden)
            output: Any
            output, logits = layout.call(router, forward, *inputs)
        except Exception:  # it is the self-check that says what is wrong with a router
            return None
        if len(inputs) != 1 or any(part.ndim != 2 for part in output):
            return None
        dtype = layout.weights_dtype(output)
        bias: Any = getattr(router, "bias", None)
        if isinstance(bias, Tensor) and not bool(bias.any()):
            return None  # that it is added cannot be seen
        like = None if dtype == logits.dtype else dtype
        for in_float32 in (False, True):
            direct = DirectLogits(in_float32, isinstance(bias, Tensor), like, weight.dtype, hidden.dtype)
            if _same(direct, router, hidden, logits):
                return direct
    return None


def in_order(layout: Any, decision: RouterOutput) -> tuple[Tensor, ...]:
    """What the forward of a router with `DirectLogits` returns for a decision."""
    if layout.order == ORDER:
        return decision.logits, decision.weights, decision.indices
    return tuple(getattr(decision, name) for name in layout.order)


def _same(direct: DirectLogits, router: Any, hidden: Tensor, logits: Tensor) -> bool:
    try:
        product = direct(router, hidden)
    except RuntimeError:  # of two dtypes
        return False
    return product is not None and product.dtype == logits.dtype and torch.equal(product, logits)
