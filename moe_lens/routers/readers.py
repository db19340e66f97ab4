"""Reading a live Hugging Face router's parameters into its rule.

    rule = deepseek_v3(router, block)          # block: the MoE block around the router

A reader's return annotation is the rule's name in the table of supported models, so it says which classes of
rules can come out. Below the readers: what blocks pass to a router besides the hidden states.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedRouterError
from moe_lens.routers.biased import SCORES, BiasedSoftmaxTopK, FixedExperts, GroupLimitedSoftmax, SigmoidTopK
from moe_lens.routers.groups import GroupLimit
from moe_lens.routers.plain import SoftmaxTopK, SparseMixer, TopKSigmoid, TopKSoftmax


def softmax(router: Any, block: Any, renormalize: bool | None = None, **fields: Any) -> SoftmaxTopK:
    if renormalize is None:
        renormalize = router.norm_topk_prob
    return SoftmaxTopK(router.num_experts, router.top_k, bool(renormalize), **fields)


def jamba(router: Any, block: Any) -> SoftmaxTopK:
    # weights come in the hidden states' dtype, which under autocast is not the logits'
    return softmax(router, block, False, float32_weights=router.weight.dtype == torch.float32)


def gemma4(router: Any, block: Any) -> SoftmaxTopK:
    n_experts, k = router.proj.weight.shape[0], router.config.top_k_experts
    return SoftmaxTopK(
        n_experts, k, True, float32_weights=True, expert_scale=_tensor(router, "per_expert_scale")
    )


def gpt_oss(router: Any, block: Any) -> TopKSoftmax:
    return TopKSoftmax(router.num_experts, router.top_k)


def granite(router: Any, block: Any) -> TopKSoftmax:
    return TopKSoftmax(router.num_experts, router.top_k, weights_dtype=next(router.parameters()).dtype)


def llama4(router: Any, block: Any) -> TopKSigmoid:
    return TopKSigmoid(router.num_experts, router.top_k)


def phimoe(router: Any, block: Any) -> SparseMixer:
    return SparseMixer(router.num_experts, router.router_jitter_noise)


def _groups(router: Any, n_summed: int) -> GroupLimit | None:
    if router.topk_group >= router.num_group:  # all groups are chosen
        return None
    return GroupLimit(router.num_group, router.topk_group, n_summed)


def deepseek_v2(router: Any, block: Any) -> SoftmaxTopK | GroupLimitedSoftmax:
    scaling = float(router.routed_scaling_factor)
    if router.topk_method == "greedy":
        return softmax(router, block, False, float32_weights=True, scaling=scaling, in_order=False)
    if router.topk_method == "group_limited_greedy":
        return GroupLimitedSoftmax(
            n_experts=router.num_experts, top_k=router.top_k, groups=_groups(router, 1), scaling=scaling
        )
    raise UnsupportedRouterError(
        f"{type(router).__name__} with topk_method={router.topk_method!r}: moe_lens has rules for 'greedy' "
        "and 'group_limited_greedy'."
    )


def deepseek_v3(router: Any, block: Any) -> SigmoidTopK:
    return SigmoidTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        groups=_groups(router, 2),
        in_order=False,
        float32_scores=False,  # the logits are float32, but for autocast
        bias=_tensor(router, "e_score_correction_bias"),
        renormalize=bool(router.norm_topk_prob),
        scaling=float(router.routed_scaling_factor),
    )


def deepseek_v4(router: Any, block: Any) -> SigmoidTopK:
    names = {"SqrtSoftplusActivation": "sqrtsoftplus", "Sigmoid": "sigmoid"}
    if (name := type(router.score_fn).__name__) not in names:
        raise UnsupportedRouterError(
            f"{type(router).__name__} scores by {name}; moe_lens has rules for {', '.join(SCORES)}."
        )
    return SigmoidTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        in_order=False,
        bias=_tensor(router, "e_score_correction_bias")
        if hasattr(router, "e_score_correction_bias")
        else None,
        scaling=float(router.routed_scaling_factor),
        score=names[name],
        float32_scores=False,
    )


def deepseek_v4_hash(router: Any, block: Any) -> FixedExperts:
    return FixedExperts(
        router.num_experts, router.top_k, _tensor(router, "tid2eid"), deepseek_v4(router, block)
    )


def ernie(router: Any, block: Any) -> BiasedSoftmaxTopK:
    return BiasedSoftmaxTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        bias=_tensor(router.moe_statics, "e_score_correction_bias").squeeze(),
        smallest_sum=float(router.norm_min),
        weights_dtype=hidden_dtype(router, block),
    )


def afmoe(router: Any, block: Any) -> SigmoidTopK:
    bias = _of_block(router, block, "expert_bias")
    return SigmoidTopK(
        n_experts=router.num_experts, top_k=router.top_k, bias=bias, scaling=float(router.route_scale)
    )


def minimax_m2(router: Any, block: Any) -> SigmoidTopK:
    bias = _of_block(router, block, "e_score_correction_bias")
    return SigmoidTopK(
        n_experts=router.num_experts, top_k=router.top_k, in_order=False, bias=bias, sum_epsilon=0.0
    )


def lfm2(router: Any, block: Any) -> SigmoidTopK:
    return SigmoidTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        bias=_of_block(router, block, "expert_bias") if router.use_expert_bias else None,
        renormalize=bool(router.norm_topk_prob),
        sum_epsilon=1e-6,
        scaling=float(router.routed_scaling_factor),
        float32_scores=False,
    )


def laguna(router: Any, block: Any) -> SigmoidTopK:
    return SigmoidTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        bias=_tensor(router, "e_score_correction_bias").float(),
        sum_epsilon=0.0,
        weights_dtype=router.weight.dtype,
    )


def with_bias(name: str) -> Callable[[Any, Tensor], tuple[Any, ...]]:
    """Inputs of a router to which its block passes a bias that the block holds under this name."""
    return lambda block, hidden: (hidden, _tensor(block, name) if hasattr(block, name) else None)


def afmoe_inputs(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of AFMoE's router: hidden states with a batch dimension, and the block's bias."""
    return hidden[None], _tensor(block, "expert_bias")  # [batch pos d_model]


def with_token_ids(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of DeepSeek-V4's hash router: the hidden states, and ids of as many tokens."""
    table = next(router for router in block.modules() if hasattr(router, "tid2eid")).tid2eid
    return hidden, torch.arange(len(hidden), device=table.device) % len(table)


def hidden_dtype(router: nn.Module, block: nn.Module | None) -> torch.dtype:
    """The dtype of the hidden states that reach a router: that of the experts' weights beside it."""
    experts = getattr(block, "experts", None)
    for module in (experts, router):
        for parameter in module.parameters() if isinstance(module, nn.Module) else ():
            if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
                return parameter.dtype
    return torch.float32


def _of_block(router: Any, block: Any, name: str) -> Tensor:
    if block is None:
        raise UnsupportedRouterError(
            f"{type(router).__name__} takes {name} from its MoE block: use rule_for(router, block)."
        )
    return _tensor(block, name)


def _tensor(module: Any, name: str) -> Tensor:
    """A parameter or buffer of a module, fetched where accelerate has offloaded it."""
    if getattr(module, name).is_meta:
        from accelerate.utils import align_module_device  # slow to import, and rarely needed

        with align_module_device(module):
            return getattr(module, name)
    return getattr(module, name)
