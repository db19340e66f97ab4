"""Dense routing weights: how much each of all experts would count, before any is left out; and the way back.

weights = dense_weights(rule, logits)            # [*batch expert], float32
logits = logits_of_dense(rule, weights)          # logits whose dense weights these are
"""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.errors import HookError
from moe_lens.routers.biased import SCORES, BiasedSoftmaxTopK, GroupLimitedSoftmax, SigmoidTopK
from moe_lens.routers.plain import SoftmaxTopK, TopKSigmoid, TopKSoftmax
from moe_lens.routers.rule import RoutingRule

_SOFTMAX: Final = (SoftmaxTopK, TopKSoftmax, BiasedSoftmaxTopK, GroupLimitedSoftmax)
"""Rules whose choice and weights depend on softmax(logits) alone."""
_LEAST: Final = 1e-30
"""The smallest weight that is told from 0: its logarithm is a finite logit in every dtype."""


def no_dense_weights(rule: RoutingRule) -> str | None:
    """Why a rule has no dense weights that logits can be had from, in words; None where it has."""
    if isinstance(rule, (*_SOFTMAX, TopKSigmoid, SigmoidTopK)):
        return None
    if not rule.chooses_by_logits:
        return "its experts come from a table by token id, whatever the logits"
    return f"{type(rule).__name__} does not follow from one probability or score of each expert"


def dense_weights(
    rule: RoutingRule, logits: Float[Tensor, "*batch expert"]
) -> Float[Tensor, "*batch expert"]:
    """Softmax over all experts, or each one's own score (sigmoid routers), float32.

    >>> from moe_lens import organisms
    >>> dense_weights(organisms.load("null").routing_rule(0), torch.zeros(8)).tolist()
    [0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125]

    A correction bias, groups, the top-k and what normalises the chosen weights come after it.

    Raises:
        HookError: `no_dense_weights` gives a reason.
    """
    _refuse(rule)
    if isinstance(rule, _SOFTMAX):
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    return SCORES[_score(rule)](logits.float())


def logits_of_dense(
    rule: RoutingRule, weights: Float[Tensor, "*batch expert"]
) -> Float[Tensor, "*batch expert"]:
    """Logits, float32, by which the rule routes as if these were its dense weights.

    >>> from moe_lens import organisms
    >>> rule = organisms.load("null").routing_rule(0)
    >>> logits_of_dense(rule, torch.tensor([0.25, 0.5, 0.25, 0, 0, 0, 0, 0])).softmax(-1)[:3]
    tensor([0.2500, 0.5000, 0.2500])

    Softmax rules get the logarithm (so what the weights sum to plays no part), others the inverse of their
    score. A weight of 0 counts as 1e-30.

    Raises:
        HookError: `no_dense_weights` gives a reason.
    """
    _refuse(rule)
    weights = weights.float().clamp(min=_LEAST)
    if isinstance(rule, _SOFTMAX):
        return weights.log()
    if _score(rule) == "sigmoid":
        return weights.log() - torch.log1p(-weights.clamp(max=1 - torch.finfo(torch.float32).eps))
    softplus = weights.square()  # sqrtsoftplus
    return softplus + torch.log(-torch.expm1(-softplus.clamp(min=_LEAST)))


def _score(rule: RoutingRule) -> str:
    return rule.score if isinstance(rule, SigmoidTopK) else "sigmoid"


def _refuse(rule: RoutingRule) -> None:
    if (reason := no_dense_weights(rule)) is not None:
        raise HookError(f"There are no dense routing weights here: {reason}.")
