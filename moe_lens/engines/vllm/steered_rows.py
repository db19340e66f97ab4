"""The steering of router logits whose rows belong to different requests: tables in, no branch on data.

So it can be traced by a compiler and captured in a CUDA graph once, and serves every batch after that.
"""

from typing import Final

import torch
from jaxtyping import Float, Int8
from torch import Tensor

_LOW: Final = 50.0
"""Nats below the largest logit from which on scores are drawn together, so that no softmax makes ties."""
_ROOM: Final = 15.0
_BELOW: Final = 75.0
"""Where deactivated experts stand then: below all others, and no float32 softmax rounds to 0 there."""


def steered_rows(
    logits: Float[Tensor, "token expert"],
    sign: Int8[Tensor, "token expert"],
    epsilon: Float[Tensor, "token 1"],
    strength: Float[Tensor, "token 1"],
) -> Float[Tensor, "token expert"]:
    """Router logits, steered row by row; rows of sign 0 come out bit for bit.

    >>> sign = torch.tensor([[0, 1, -1], [0, 0, 0]], dtype=torch.int8)
    >>> epsilon, strength = torch.tensor([[0.5], [0.5]]), torch.tensor([[torch.inf], [torch.inf]])
    >>> steered_rows(torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]), sign, epsilon, strength)
    tensor([[1.0000, 4.5000, 0.5000],
            [1.0000, 2.0000, 4.0000]])

    Activated experts get the row's largest logit + epsilon, deactivated ones its smallest − epsilon
    (SteerMoE, arXiv 2509.09660, section 4; the log-softmax there shifts all of a row alike, which no softmax
    router sees), in float32, then in the logits' dtype: at least by as much as that dtype tells apart. Where
    logits lie more than 50 nats below the largest one, those are drawn together in their order, as in
    `moe_lens.routers.transform.steer_logits`, and all of the row is shifted so that the largest is 0.

    Args:
        logits: of a softmax router, nats, finite.
        sign: 1 where the expert is activated, −1 where it is deactivated.
        epsilon: of the row's plan, nats.
        strength: λ of the soft form z ± λ·std(z), std of the population over the row; inf for the above.
    """
    z = logits.float()
    lowest, highest = torch.aminmax(z, dim=-1, keepdim=True)
    least = torch.finfo(logits.dtype).eps
    top = highest + torch.maximum(epsilon, highest.abs() * least)
    bottom = lowest - torch.maximum(epsilon, lowest.abs() * least)
    firm = torch.where(sign > 0, top, torch.where(sign < 0, bottom, z))
    under = top - _LOW - firm  # of low ones positive
    drawn = torch.where(under > 0, -_LOW - _ROOM * (under / (1 + under)), firm - top)
    drawn = torch.where(sign < 0, -_BELOW, drawn)
    firm = torch.where(bottom < top - _LOW, drawn, firm)
    spread = z.std(dim=-1, correction=0, keepdim=True)
    soft = z + sign * torch.where(strength.isfinite(), strength, 0.0) * spread
    moved = torch.where(strength.isfinite(), soft, firm).to(logits.dtype)
    steered = (sign != 0).any(dim=-1, keepdim=True) & ((sign != 0) | ~strength.isfinite())
    return torch.where(steered, moved, logits)
