"""The MoE layers of a Hugging Face model: finding them, and comparing each router with its rule.

for moe in find_moe_layers(hf_model):      # works on a bare HF model and on one inside a bridge
    check_router(moe)                      # HF's forward and our rule must agree, number by number
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_lens.biased_rules import SigmoidTopK
from moe_lens.errors import RouterMismatchError, UnsupportedRouterError
from moe_lens.plain_rules import SoftmaxTopK, TopKSigmoid, TopKSoftmax
from moe_lens.router_outputs import Layout, LayoutError, RouterOutput
from moe_lens.routing_rules import RULES, RouterRow, hidden_dtype, is_known_router, row_for, rule_for
from moe_lens.rule_base import RoutingRule

CHECK_SCALES: Final = (0.1, 1.0, 10.0)
CHECK_TOKENS: Final = 1024

REFUSED_ROUTERS: Final = {
    "SwitchTransformersTop1Router": (
        "an expert takes only so many tokens of a sequence and drops the rest, so that a token's expert is "
        "no function of its own router logits, and the model is an encoder-decoder"
    ),
}
"""Router classes that moe_lens knows and refuses -> the reason."""

_NOT_FEED_FORWARD: Final = ("JetMoeAttention", "JetMoeMoA")  # attention heads as experts


@dataclass(frozen=True)
class MoELayer:
    """One MoE block of a Hugging Face model and the router inside it."""

    where: str
    block: nn.Module
    router: nn.Module

    @property
    def row(self) -> RouterRow:
        """How this class of routers is read."""
        return row_for(self.router)

    @property
    def rule(self) -> RoutingRule:
        """The routing rule, with the parameters that the router has now."""
        return rule_for(self.router, self.block)

    @property
    def experts(self) -> nn.Module | None:
        """The module whose forward `expert_hooks` stands in for; None where experts are run otherwise."""
        experts = self.row.experts.module(self.block)
        return None if experts is None else _unwrap(experts)

    @property
    def points(self) -> Any:
        """The installed hook points (`router_hooks.RoutingPoints`); None where there are none."""
        return getattr(self.router.__dict__.get("forward"), "points", None)


def find_moe_layers(root: nn.Module, prefix: str = "") -> Iterator[MoELayer]:
    """Every MoE block below `root` with its router, in module order; `prefix` goes before their names.

    Raises:
        UnsupportedRouterError: a block holds experts but no router that `RULES` names. The message says which
            rules come closest to what its router computes.
    """
    for name, block in root.named_modules(prefix=prefix):
        if hasattr(block, "original_component"):  # a bridge's wrapper around the block or router proper
            continue
        if type(block).__name__ in _NOT_FEED_FORWARD:
            continue
        where = name.replace("._original_component", "") or type(block).__name__
        children = [_unwrap(child) for child in block.children()]
        routers = [child for child in children if is_known_router(child)]
        if len(routers) == 1:
            yield MoELayer(where, block, routers[0])
        elif len(routers) > 1 or (not routers and hasattr(block, "experts")):
            raise UnsupportedRouterError(_why_refused(where, block, children))


def check_router(moe: MoELayer) -> None:
    """Compare the rule with HF's own forward on 3 × 1024 random hidden states of three scales, bit for bit.

    Tokens on which a half-precision router overflows are left out.

    Raises:
        RouterMismatchError: logits, indices, weights or a dtype differ; the message says which and where.
    """
    with _evaluating(moe.router):
        for scale, hidden in _hidden_states(moe.router, moe.block):
            try:
                difference = _difference(moe.router, moe.block, moe.rule, moe.row, hidden)
            except UnsupportedRouterError:
                raise
            except Exception as error:  # whatever a changed router or an output of another form leads to
                difference = f"it cannot be run and read: {type(error).__name__}: {error}"
            if difference is not None:
                raise RouterMismatchError(
                    f"{moe.where}: {type(moe.router).__name__} does not compute what its rule {moe.rule} "
                    f"says: {difference} (hidden states of scale {scale}). moe_lens leaves the model as it "
                    "was rather than route wrongly; has transformers changed this router?"
                )


def closest_rules(router: nn.Module, block: nn.Module) -> list[str]:
    """What comes closest to the decisions of a router without a rule, best first, in words; at most three.

    The router runs on random hidden states, and its output is compared with rules of every kind: with those
    of known routers whose parameters it has too, and with the common ones.
    """
    try:
        with torch.random.fork_rng(devices=[]), _evaluating(router):
            decision = _read(copy.deepcopy(router), next(_hidden_states(router, block))[1])
    except Exception:  # anything may be wrong with a router that nobody knows; there is only less to say then
        return []
    scored: list[tuple[tuple[float, float], RoutingRule, list[str]]] = []
    for name, rule in _candidates(router, block, decision.logits.shape[-1], decision.indices.shape[-1]):
        try:
            agreement = _agreement(rule, decision)
        except Exception:  # a rule of another kind of router, whose parameters do not fit
            continue
        if (same := next((names for _, known, names in scored if known == rule), None)) is not None:
            same.extend(name)
        else:
            scored.append((agreement, rule, name))
    scored.sort(key=lambda item: item[0], reverse=True)
    return [
        f"{rule}{' as in ' + ', '.join(names) if names else ''} (the same experts on {same:.0%} of random "
        f"tokens, weights off by {-off:.2g} on average)"
        for (same, off), rule, names in scored[:3]
    ]


def _read(router: Any, hidden: Tensor) -> RouterOutput:
    """The decision of a router that nobody knows, as far as it shows; raises anything where it does not."""
    with torch.no_grad():
        try:
            output = router(hidden)
        except Exception:
            output = router(hidden[None])
    parts = list(output.values()) if isinstance(output, dict) else list(output)
    tensors = [part.reshape(len(hidden), -1) for part in parts if isinstance(part, Tensor) and part.ndim > 1]
    [indices] = [part for part in tensors if not part.is_floating_point()]
    numbers = [part for part in tensors if part.is_floating_point()]
    weights = next(part for part in reversed(numbers) if part.shape == indices.shape)
    logits = next((part for part in numbers if part is not weights), None)
    if logits is None:
        [matrix] = [parameter for parameter in router.parameters() if parameter.ndim == 2]
        logits = torch.nn.functional.linear(hidden, matrix.detach())
    return RouterOutput(logits, weights, indices)


@contextmanager
def _evaluating(router: nn.Module) -> Iterator[None]:
    """The router in eval mode, in which models route when they are hooked, without gradients."""
    modes = [(module, module.training) for module in router.modules()]
    router.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _hidden_states(router: nn.Module, block: nn.Module | None) -> Iterator[tuple[float, Tensor]]:
    """Scales and random hidden states [CHECK_TOKENS d_model] for a router."""
    weight = next(parameter for parameter in router.parameters() if parameter.ndim == 2)
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device  # accelerate moves it
    generator = torch.Generator().manual_seed(0)
    for scale in CHECK_SCALES:
        hidden = scale * torch.randn(CHECK_TOKENS, weight.shape[-1], generator=generator)
        yield scale, hidden.to(device, hidden_dtype(router, block))


def _difference(router: Any, block: Any, rule: RoutingRule, row: RouterRow, hidden: Tensor) -> str | None:
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
    tensors = [each for each in vars(rule).values() if isinstance(each, Tensor)]
    if any(each.is_floating_point() and not bool(each.isfinite().all()) for each in tensors):
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


def _candidates(
    router: nn.Module, block: nn.Module, n_experts: int, k: int
) -> Iterator[tuple[list[str], RoutingRule]]:
    """Rules to compare with, and the known router that follows each, if any."""
    for name, row in sorted(RULES.items()):
        try:
            rule = row.rule(router, block)
        except Exception:  # a parameter of that router which this one does not have
            continue
        if (rule.n_experts, rule.top_k) == (n_experts, k):
            yield [name], rule
    for rule in (
        SoftmaxTopK(n_experts, k, renormalize=True),
        SoftmaxTopK(n_experts, k, renormalize=False),
        TopKSoftmax(n_experts, k),
        TopKSigmoid(n_experts, k),
        SigmoidTopK(n_experts=n_experts, top_k=k),
    ):
        yield [], rule


def _agreement(rule: RoutingRule, theirs: RouterOutput) -> tuple[float, float]:
    """Share of tokens with the same set of experts, and minus the mean difference of their weights."""
    same = rule.select(theirs.logits).sort(-1).values == theirs.indices.sort(-1).values
    weights = rule.weigh(theirs.logits, theirs.indices.long()).float()
    return float(same.all(-1).float().mean()), -float((weights - theirs.weights.float()).abs().mean())


def _why_refused(where: str, block: nn.Module, children: list[nn.Module]) -> str:
    for child in children:
        if (reason := REFUSED_ROUTERS.get(type(child).__name__)) is not None:
            return f"{where}: moe_lens does not hook {type(child).__name__}: {reason}."
    found = ", ".join(sorted(type(child).__name__ for child in children)) or "nothing"
    close = next((words for child in _routers_first(children) if (words := closest_rules(child, block))), [])
    hint = (
        f"Closest rules: {'; '.join(close)}" if close else "Its decision could not be compared with any rule"
    )
    return (
        f"{where}: {type(block).__name__} holds experts but no router that moe_lens has a rule for (its "
        f"parts: {found}). {hint}. Known router classes: {', '.join(sorted(RULES))}. If a rule fits yours, "
        "add it with moe_lens.register_rule(router_class_name, factory); CONTRIBUTING.md shows how."
    )


def _routers_first(children: list[nn.Module]) -> list[nn.Module]:
    """What may be a router, by name; experts are none."""

    def rank(child: nn.Module) -> int:
        name = type(child).__name__.lower()
        return 0 if "router" in name or "gat" in name else 2 if "expert" in name or "mlp" in name else 1

    return sorted((child for child in children if rank(child) < 2), key=rank)


def _unwrap(module: nn.Module) -> nn.Module:
    """The HF module inside a bridge's wrapper, or the module itself."""
    while isinstance(inner := getattr(module, "original_component", None), nn.Module):
        module = inner
    return module
