"""Running one router by itself on random hidden states; which rules come closest to an unknown one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_lens.routers.biased import SigmoidTopK
from moe_lens.routers.layouts import RouterOutput
from moe_lens.routers.plain import SoftmaxTopK, TopKSigmoid, TopKSoftmax
from moe_lens.routers.readers import hidden_dtype
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.table import RULES

CHECK_SCALES: Final = (0.1, 1.0, 10.0)
CHECK_TOKENS: Final = 1024


def closest_rules(router: nn.Module, block: nn.Module) -> list[str]:
    """What comes closest to the decisions of a router without a rule, best first, in words; at most three.

    The router runs on random hidden states, and its output is compared with rules of every kind: the rules of
    known routers, if it has the parameters that they read, and the common ones.
    """
    try:
        with torch.random.fork_rng(devices=[]), evaluating(router):
            decision = _read(copy.deepcopy(router), next(hidden_states(router, block))[1])
    except Exception:  # anything may be wrong with an unknown router; then the error has no hint
        return []
    scored: list[tuple[tuple[float, float], RoutingRule, list[str]]] = []
    for names, rule in _candidates(router, block, decision.logits.shape[-1], decision.indices.shape[-1]):
        try:
            agreement = _agreement(rule, decision)
        except Exception:  # a rule of another kind of router, whose parameters do not fit
            continue
        listed = next((known_as for _, known, known_as in scored if known == rule), None)
        if listed is not None:
            listed.extend(names)
        else:
            scored.append((agreement, rule, names))
    scored.sort(key=lambda item: item[0], reverse=True)
    return [
        f"{rule}{' as in ' + ', '.join(names) if names else ''} (the same experts on {same:.0%} of random "
        f"tokens, weights off by {-off:.2g} on average)"
        for (same, off), rule, names in scored[:3]
    ]


def _read(router: Any, hidden: Tensor) -> RouterOutput:
    """The decision of an unknown router, guessed from shapes and dtypes; any exception where that fails."""
    with torch.no_grad():
        try:
            output = router(hidden)
        except Exception:  # whatever it raises, it may want a batch dimension
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
def evaluating(router: nn.Module) -> Iterator[None]:
    """The router in eval mode, the only one in which hooked models route, without gradients."""
    modes = [(module, module.training) for module in router.modules()]
    router.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def hidden_states(router: nn.Module, block: nn.Module | None) -> Iterator[tuple[float, Tensor]]:
    """Scales and random hidden states [CHECK_TOKENS d_model] for a router."""
    weight = next(parameter for parameter in router.parameters() if parameter.ndim == 2)
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device  # accelerate moves it
    generator = torch.Generator().manual_seed(0)
    for scale in CHECK_SCALES:
        hidden = scale * torch.randn(CHECK_TOKENS, weight.shape[-1], generator=generator)
        yield scale, hidden.to(device, hidden_dtype(router, block))


def _candidates(
    router: nn.Module, block: nn.Module, n_experts: int, k: int
) -> Iterator[tuple[list[str], RoutingRule]]:
    """Rules to compare with, and the known routers that follow each, if any."""
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
