"""Raising some router scores above all others and lowering some below: what routing rules steer with.

    steer_logits(logits, activate=[3], deactivate=[1])        # softmax routers: SteerMoE's formulas
    steer_raw_logits(logits, activate=[3], deactivate=[1])    # where a shift of all logits matters
    move(scores, inside, outside, epsilon)                    # by masks, token by token
    soften(logits, inside, outside, strength)                 # z ± strength · std(z)

All work per token and leave the other experts' order as it was.
"""

from collections.abc import Iterable
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_LOWEST: Final = -60.0  # nats below which float32 softmax is nearing underflow (at -103); see _keep_apart
_ROOM: Final = 20.0  # nats below _LOWEST in which scores under it are put in their order


def steer_logits(
    logits: Float[Tensor, "*batch expert"],
    activate: Iterable[int] = (),
    deactivate: Iterable[int] = (),
    epsilon: float = 0.01,
) -> Float[Tensor, "*batch expert"]:
    """The steering transform of one layer, per token, in float32 (in bfloat16 min − 0.01 is min).

    With s = log_softmax(logits): activated s_k = max_j s_j + epsilon, deactivated s_k = min_j s_j − epsilon,
    max and min over the unsteered scores (SteerMoE, arXiv 2509.09660, section 4). The architecture's own
    softmax and top-k follow. Float32 needs two refinements to keep the guarantee: where epsilon is rounded
    away, the next smaller number serves; and on tokens with scores more than 60 nats below the largest, where
    softmax nears underflow, those scores are spread over the next 20 nats in their order (their probabilities
    are below 1e-26 before and after).

    Deactivated experts stay out as long as k others have finite logits: a hook that ran before and set most
    of them to -inf leaves the router no choice.
    """
    inside, outside = _masks(logits, list(activate), list(deactivate))
    scores = torch.log_softmax(logits.float(), dim=-1)
    return _keep_apart(move(scores, inside, outside, epsilon, strictly=True), outside)


def steer_raw_logits(
    logits: Float[Tensor, "*batch expert"],
    activate: Iterable[int] = (),
    deactivate: Iterable[int] = (),
    epsilon: float = 0.01,
) -> Float[Tensor, "*batch expert"]:
    """`steer_logits` without the log-softmax: the other experts keep their logits bit for bit, in float32.

    Activated z_k = max_j z_j + epsilon, deactivated z_k = min_j z_j − epsilon, or the next number where
    float32 rounds epsilon away. Choices by the order of logits are those of `steer_logits`; use it where a
    shift of all logits would change weights (sigmoid, sparsemixer).
    """
    inside, outside = _masks(logits, list(activate), list(deactivate))
    return move(logits.float(), inside, outside, epsilon, strictly=True)


def move(
    scores: Float[Tensor, "*batch expert"],
    inside: Bool[Tensor, "*#batch expert"],
    outside: Bool[Tensor, "*#batch expert"],
    epsilon: float | Float[Tensor, "*#batch 1"],
    strictly: bool = False,
) -> Float[Tensor, "*batch expert"]:
    """Experts `inside` at the largest score + epsilon, those `outside` at the smallest − epsilon.

    The others keep their scores bit for bit. Where rounding takes epsilon away, `strictly` takes the next
    number; a rule that holds its experts need not.
    """
    lowest, highest = _ends(scores)
    raised, lowered = highest + epsilon, lowest - epsilon
    if strictly:
        raised = torch.where(raised > highest, raised, _next(highest, torch.inf))
        lowered = torch.where(lowered < lowest, lowered, _next(lowest, -torch.inf))
    return torch.where(outside, lowered, torch.where(inside, raised, scores))


def moved(
    scores: Float[Tensor, "*batch expert"],
    inside: Bool[Tensor, "*#batch expert"],
    named: Bool[Tensor, "*#batch expert"],
    steps: Float[Tensor, "*#batch expert"],
) -> Float[Tensor, "*batch expert"]:
    """`move`, in fewer operations: of experts `named`, those `inside` go up, others down, by `steps`."""
    lowest, highest = _ends(scores)
    return torch.where(named, torch.where(inside, highest, lowest) + steps, scores)


def _ends(
    scores: Float[Tensor, "*batch expert"],
) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """The smallest and the largest; in one operation where no gradient is asked: older PyTorch has none."""
    if scores.requires_grad:
        return scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    lowest, highest = torch.aminmax(scores, dim=-1, keepdim=True)
    return lowest, highest


def soften(
    logits: Float[Tensor, "*batch expert"],
    inside: Bool[Tensor, "*#batch expert"],
    outside: Bool[Tensor, "*#batch expert"],
    strength: float | Float[Tensor, ""],
) -> Float[Tensor, "*batch expert"]:
    """The soft form: z + strength · std for experts `inside`, z − strength · std for those `outside`.

    std is the population's (correction 0) over the token's finite logits. In float32 or wider, then back
    in the logits' dtype; the others keep their logits bit for bit. Gradients flow to logits and strength.
    EasySteer's form of soft steering.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    step = strength * spread(z)
    moved = torch.where(inside, z + step, torch.where(outside, z - step, z)).to(logits.dtype)
    return torch.where(inside | outside, moved, logits)


def spread(logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch 1"]:
    """std(z) of each token: the population's (correction 0), over its finite logits, in float32 or wider.

    >>> spread(torch.tensor([1.0, 3.0])).tolist()
    [1.0]
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    finite = z.isfinite()
    n_finite = finite.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = z.masked_fill(~finite, 0.0).sum(dim=-1, keepdim=True) / n_finite
    # experts at -inf stand at the mean, where they add nothing
    deviation = torch.where(finite, z, mean).std(dim=-1, correction=0, keepdim=True)
    return deviation * (z.shape[-1] / n_finite).sqrt()


def _masks(scores: Float[Tensor, "*batch expert"], *named: list[int]) -> list[Bool[Tensor, " expert"]]:
    width = scores.shape[-1]
    return [
        torch.tensor([expert in experts for expert in range(width)], device=scores.device)
        for experts in named
    ]


def _next(number: Tensor, towards: float) -> Tensor:
    """The neighbouring number: float32 may round epsilon away."""
    return torch.nextafter(number.detach(), torch.full_like(number, towards))


def _keep_apart(
    steered: Float[Tensor, "*batch expert"], outside: Bool[Tensor, " expert"]
) -> Float[Tensor, "*batch expert"]:
    """Keep deactivated experts strictly last where softmax would underflow and make ties."""
    depth = steered.log_softmax(dim=-1)
    low = (depth < _LOWEST) & (depth > -torch.inf)
    key = steered.detach().masked_fill(outside, -torch.inf)
    rank = key.argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 = lowest
    spread = _LOWEST - _ROOM * (1 - rank / steered.shape[-1])
    return torch.where(low.any(dim=-1, keepdim=True), torch.where(low, spread, depth), steered)
