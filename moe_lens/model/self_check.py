"""The self-check at attach: a rule and the router that it stands for must agree, number by number."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_lens.errors import RouterMismatchError, UnsupportedRouterError
from moe_lens.model.layers import MoELayer
from moe_lens.model.probing import evaluating, hidden_states
from moe_lens.routers.layouts import Layout, LayoutError, RouterOutput
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.table import Family


def check_router(moe: MoELayer) -> None:
    """Compare the rule with HF's own forward on 3 × 1024 random hidden states of three scales, bit for bit.

    Tokens on which a half-precision router overflows are left out. A router that has been compared, and still
    has the same forward, rule and dtype, is not compared again.

    Raises:
        RouterMismatchError: logits, indices, weights or a dtype differ; the message says which and where.
    """
    now = _what_counts(moe)
    if now is not None and _CHECKED.get(moe.router) == now:
        return
    with evaluating(moe.router):
        for scale, hidden in hidden_states(moe.router, moe.block):
            try:
                difference = _difference(moe.router, moe.block, moe.rule, moe.row, hidden)
            except UnsupportedRouterError:
                raise
            except Exception as error:  # whatever a changed router, or an output of another form, leads to
                difference = f"it cannot be run and read: {type(error).__name__}: {error}"
            if difference is not None:
                raise RouterMismatchError(
                    f"{moe.where}: {type(moe.router).__name__} does not compute what its rule {moe.rule} "
                    f"says: {difference} (hidden states of scale {scale}). moe_lens leaves the model as it "
                    "was rather than route wrongly; has transformers changed this router?"
                )
    if now is not None:
        _CHECKED[moe.router] = now


_CHECKED: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def _what_counts(moe: MoELayer) -> tuple[Any, ...] | None:
    """What the comparison depends on; None where somebody's own forward stands on the router."""
    if "forward" in vars(moe.router):
        return None
    dtypes = tuple(parameter.dtype for parameter in moe.router.parameters())
    return type(moe.router).forward, moe.row, moe.rule, dtypes


def _difference(router: Any, block: Any, rule: RoutingRule, row: Family, hidden: Tensor) -> str | None:
    """What differs between HF's router output and the rule's, in words; None if nothing does."""
    inputs = row.inputs(block, hidden)
    try:
        output, logits = row.layout.call(router, router, *inputs)
        if logits.is_meta:
            return "its weights are on the meta device, not loaded"
        if logits.shape != (len(hidden), rule.n_experts):
            return f"logits have shape {tuple(logits.shape)}, not {(len(hidden), rule.n_experts)}"
        finite = torch.isfinite(logits).all(dim=-1)
        if not bool(finite.any()):
            return "all its logits are NaN or infinite; are its weights?"
        if not bool(finite.all()):  # half precision overflows
            return _difference(router, block, rule, row, hidden[finite])
        theirs = row.layout.unpack(output, logits)
        finite = torch.isfinite(theirs.weights).all(dim=-1)
        if not bool(finite.any()):
            return "all its weights are NaN or infinite"
        if not bool(finite.all()):
            return _difference(router, block, rule, row, hidden[finite])
    except LayoutError as error:
        return str(error)
    return _mismatch(rule.for_call(*inputs[1:]), row.layout, output, theirs)


def _mismatch(rule: RoutingRule, layout: Layout, output: Any, theirs: RouterOutput) -> str | None:
    logits, weights, indices = theirs
    tensors = [value for value in vars(rule).values() if isinstance(value, Tensor)]
    if any(tensor.is_floating_point() and not bool(tensor.isfinite().all()) for tensor in tensors):
        return "a bias or scale of the router holds NaN or infinity"
    if indices.shape != (len(logits), rule.top_k):
        return f"indices have shape {tuple(indices.shape)}, not {(len(logits), rule.top_k)}"
    expected_indices = rule.select(logits)
    if not torch.equal(expected_indices, indices):
        n_different = int((expected_indices != indices).any(-1).sum())
        return f"indices differ on {n_different} of {len(logits)} tokens"
    expected = rule.weigh(logits, indices)
    if weights.shape != expected.shape or weights.dtype != expected.dtype:
        got, want = (f"{x.dtype} of shape {tuple(x.shape)}" for x in (weights, expected))
        return f"weights are {got}, not {want}"
    if not torch.equal(expected, weights):
        return f"weights differ by up to {float((expected - weights).abs().max()):.3g}"
    packed = layout.pack(output, RouterOutput(logits, expected, expected_indices))
    same = [
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(packed, output, strict=True)
    ]
    return None if all(same) else f"part {same.index(False)} of its output differs"
