"""Which Hugging Face router follows which rule: a kind of router is a row of `RULES`.

    rule = rule_for(hf_router, block)          # parameters are read from the live router
    indices, weights = rule.route(logits)      # [*batch expert] -> [*batch k], int64, and [*batch k]
    register_rule("MyRouter", lambda router: SoftmaxTopK(router.n, router.k, renormalize=True))

The rules themselves, pure functions of logits, are in `plain_rules` and `biased_rules`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from moe_lens.biased_rules import (
    SCORES,
    BiasedSoftmaxTopK,
    FixedExperts,
    GroupLimit,
    GroupLimitedSoftmax,
    SigmoidTopK,
)
from moe_lens.errors import MoELensError, RouterMismatchError, UnsupportedRouterError
from moe_lens.expert_outputs import Batched, ExpertsLayout, InputWeighted, Sorted
from moe_lens.plain_rules import SoftmaxTopK, SparseMixer, TopKSigmoid, TopKSoftmax
from moe_lens.router_outputs import (
    ORDER,
    AllExperts,
    InOrder,
    Layout,
    Probabilities,
    SortedTokens,
)
from moe_lens.rule_base import RoutingRule


@dataclass(frozen=True)
class RouterRow:
    """How to read one class of routers.

    Attributes:
        rule: function of the live router and the MoE block around it (None if not at hand).
        layout: how its forward returns its decision.
        inputs: function of the block and hidden states [token d_model]; all that the block passes to the
            router's forward for them.
        experts: how the block around it runs its experts.
    """

    rule: Callable[[Any, Any], RoutingRule]
    layout: Layout = InOrder()  # noqa: RUF009 (frozen)
    inputs: Callable[[Any, Tensor], tuple[Any, ...]] = lambda block, hidden: (hidden,)
    experts: ExpertsLayout = Batched()  # noqa: RUF009 (frozen)


def _softmax(router: Any, block: Any, renormalize: bool | None = None, **fields: Any) -> SoftmaxTopK:
    if renormalize is None:
        renormalize = router.norm_topk_prob
    return SoftmaxTopK(router.num_experts, router.top_k, bool(renormalize), **fields)


def _gemma4(router: Any, block: Any) -> SoftmaxTopK:
    n_experts, k = router.proj.weight.shape[0], router.config.top_k_experts
    return SoftmaxTopK(
        n_experts, k, True, float32_weights=True, expert_scale=_tensor(router, "per_expert_scale")
    )


def _gpt_oss(router: Any, block: Any) -> TopKSoftmax:
    return TopKSoftmax(router.num_experts, router.top_k)


def _granite(router: Any, block: Any) -> TopKSoftmax:
    return TopKSoftmax(router.num_experts, router.top_k, weights_dtype=next(router.parameters()).dtype)


def _llama4(router: Any, block: Any) -> TopKSigmoid:
    return TopKSigmoid(router.num_experts, router.top_k)


def _phimoe(router: Any, block: Any) -> SparseMixer:
    return SparseMixer(router.num_experts, router.router_jitter_noise)


def _groups(router: Any, n_summed: int) -> GroupLimit | None:
    if router.topk_group >= router.num_group:  # all groups are chosen
        return None
    return GroupLimit(router.num_group, router.topk_group, n_summed)


def _deepseek_v2(router: Any, block: Any) -> RoutingRule:
    scaling = float(router.routed_scaling_factor)
    if router.topk_method == "greedy":
        return _softmax(router, block, False, float32_weights=True, scaling=scaling, in_order=False)
    if router.topk_method == "group_limited_greedy":
        return GroupLimitedSoftmax(
            n_experts=router.num_experts, top_k=router.top_k, groups=_groups(router, 1), scaling=scaling
        )
    raise UnsupportedRouterError(
        f"{type(router).__name__} with topk_method={router.topk_method!r}: moe_lens has rules for 'greedy' "
        "and 'group_limited_greedy'."
    )


def _deepseek_v3(router: Any, block: Any) -> SigmoidTopK:
    return SigmoidTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        groups=_groups(router, 2),
        in_order=False,
        bias=_tensor(router, "e_score_correction_bias"),
        renormalize=bool(router.norm_topk_prob),
        scaling=float(router.routed_scaling_factor),
    )


def _deepseek_v4(router: Any, block: Any) -> SigmoidTopK:
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


def _deepseek_v4_hash(router: Any, block: Any) -> FixedExperts:
    return FixedExperts(
        router.num_experts, router.top_k, _tensor(router, "tid2eid"), _deepseek_v4(router, block)
    )


def _ernie(router: Any, block: Any) -> BiasedSoftmaxTopK:
    return BiasedSoftmaxTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        bias=_tensor(router.moe_statics, "e_score_correction_bias").squeeze(),
        smallest_sum=float(router.norm_min),
        weights_dtype=hidden_dtype(router, block),
    )


def _afmoe(router: Any, block: Any) -> SigmoidTopK:
    bias = _of_block(router, block, "expert_bias")
    return SigmoidTopK(
        n_experts=router.num_experts, top_k=router.top_k, bias=bias, scaling=float(router.route_scale)
    )


def _minimax_m2(router: Any, block: Any) -> SigmoidTopK:
    bias = _of_block(router, block, "e_score_correction_bias")
    return SigmoidTopK(
        n_experts=router.num_experts, top_k=router.top_k, in_order=False, bias=bias, sum_epsilon=0.0
    )


def _lfm2(router: Any, block: Any) -> SigmoidTopK:
    return SigmoidTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        bias=_of_block(router, block, "expert_bias") if router.use_expert_bias else None,
        renormalize=bool(router.norm_topk_prob),
        sum_epsilon=1e-6,
        scaling=float(router.routed_scaling_factor),
        float32_scores=False,
    )


def _laguna(router: Any, block: Any) -> SigmoidTopK:
    return SigmoidTopK(
        n_experts=router.num_experts,
        top_k=router.top_k,
        bias=_tensor(router, "e_score_correction_bias").float(),
        sum_epsilon=0.0,
        weights_dtype=router.weight.dtype,
    )


def _with_bias(name: str) -> Callable[[Any, Tensor], tuple[Any, ...]]:
    """The block passes a bias of its own to the router."""
    return lambda block, hidden: (hidden, _tensor(block, name) if hasattr(block, name) else None)


def _afmoe_inputs(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden[None], _tensor(block, "expert_bias")  # [batch pos d_model]


def _with_token_ids(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    table = next(router for router in block.modules() if hasattr(router, "tid2eid")).tid2eid
    return hidden, torch.arange(len(hidden), device=table.device) % len(table)


_renormalized = partial(_softmax, renormalize=True)

RULES: dict[str, RouterRow] = {
    "AfmoeTokenChoiceRouter": RouterRow(_afmoe, inputs=_afmoe_inputs),
    "DeepseekV2TopkRouter": RouterRow(_deepseek_v2),
    "DeepseekV3TopkRouter": RouterRow(_deepseek_v3),
    "DeepseekV4HashRouter": RouterRow(_deepseek_v4_hash, inputs=_with_token_ids),
    "DeepseekV4TopKRouter": RouterRow(_deepseek_v4),
    "Ernie4_5_MoeTopKRouter": RouterRow(_ernie),
    "FlexOlmoTopKRouter": RouterRow(_softmax),
    "Gemma4TextRouter": RouterRow(_gemma4, Probabilities()),
    "Glm4MoeLiteTopkRouter": RouterRow(_deepseek_v3),
    "Glm4MoeTopkRouter": RouterRow(_deepseek_v3),
    "GlmMoeDsaTopkRouter": RouterRow(_deepseek_v3),
    "GptOssTopKRouter": RouterRow(_gpt_oss),
    "GraniteMoeHybridTopKRouter": RouterRow(_granite),
    "GraniteMoeTopKRouter": RouterRow(_granite),
    "JambaTopKRouter": RouterRow(partial(_softmax, renormalize=False)),
    "JetMoeTopKGating": RouterRow(_granite, SortedTokens(), experts=Sorted()),
    "LagunaTopKRouter": RouterRow(_laguna),
    "Lfm2MoeTopKRouter": RouterRow(_lfm2, inputs=_with_bias("expert_bias")),
    "Llama4Router": RouterRow(_llama4, AllExperts(), experts=InputWeighted()),
    "MiniMaxM2TopKRouter": RouterRow(_minimax_m2, inputs=_with_bias("e_score_correction_bias")),
    "MixtralTopKRouter": RouterRow(partial(_renormalized, float32_weights=True)),
    "NemotronHTopkRouter": RouterRow(_deepseek_v3),
    "OlmoeTopKRouter": RouterRow(_softmax),
    "PhimoeTopKRouter": RouterRow(_phimoe),
    "Qwen2MoeTopKRouter": RouterRow(_softmax),
    "Qwen3MoeTopKRouter": RouterRow(_softmax),
    "Qwen3NextTopKRouter": RouterRow(_softmax),
    "Qwen3VLMoeTextTopKRouter": RouterRow(_renormalized),
    "Qwen3_5MoeTopKRouter": RouterRow(_renormalized),
}
"""Hugging Face router class name -> how to read it; `register_rule` adds rows."""


def register_rule(
    router_class_name: str,
    factory: Callable[..., RoutingRule],
    *,
    order: tuple[str, ...] = ORDER,
    inputs: Callable[[Any, Tensor], tuple[Any, ...]] | None = None,
    replace: bool = False,
) -> None:
    """Teach moe_lens a router that it does not know.

    >>> from moe_lens import register_rule
    >>> from moe_lens.routing_rules import RULES, SoftmaxTopK
    >>> def read(router):
    ...     return SoftmaxTopK(router.n_experts, router.k, renormalize=True)
    >>> register_rule("MyRouter", read)
    >>> del RULES["MyRouter"]

    The rule holds for routers of that class and of its subclasses, and the self-check at attach still
    compares it with the router's own forward, bit for bit.

    Args:
        router_class_name: `type(router).__name__`.
        factory: function of the live router, or of the router and the MoE block around it (where parameters
            live in the block), that gives the rule; called again at every run, so that it sees edits.
        order: in which the router's forward returns "logits" [token expert], "weights" [token k] and
            "indices" [token k].
        inputs: function (block, hidden states [token d_model]) -> tuple of all that the block passes to the
            router's forward for them; None where that is the hidden states alone. The self-check uses it.
        replace: allow a class that has a rule already.

    Raises:
        MoELensError: a name that is taken, a factory that cannot be called with one or two arguments, or an
            order that is not those three names.
    """
    if not isinstance(router_class_name, str) or not router_class_name.isidentifier():
        raise MoELensError(f"router_class_name must be the name of a class; got {router_class_name!r}.")
    if router_class_name in RULES and not replace:
        raise MoELensError(
            f"{router_class_name} has a rule already; pass replace=True to put yours in its place."
        )
    if not isinstance(order, tuple) or len(order) != len(ORDER) or set(order) != set(ORDER):
        raise MoELensError(f"order must hold {', '.join(map(repr, ORDER))}, each once; got {order!r}.")
    if inputs is not None and not callable(inputs):
        raise MoELensError(f"inputs must be a function (block, hidden_states) -> tuple; got {inputs!r}.")
    RULES[router_class_name] = RouterRow(
        _reader(router_class_name, factory), InOrder(order), inputs or (lambda block, hidden: (hidden,))
    )


def is_known_router(module: nn.Module) -> bool:
    """Whether `RULES` has a row for this module's class or one of its parent classes."""
    return _row(module) is not None


def row_for(router: nn.Module) -> RouterRow:
    """The row of `RULES` for a router's class, or for the nearest of its parent classes that has one.

    Raises:
        UnsupportedRouterError: there is none.
    """
    row = _row(router)
    if row is None:
        raise UnsupportedRouterError(
            f"{type(router).__name__} is no router that moe_lens has a rule for. "
            f"Known router classes: {', '.join(sorted(RULES))}. Add yours with moe_lens.register_rule."
        )
    return row


def rule_for(router: nn.Module, block: nn.Module | None = None) -> RoutingRule:
    """The rule of a live Hugging Face router, with the parameters it has now.

    A subclass of a known router gets its parent's rule; the self-check at attach tells whether that is true.

    Args:
        router: the router module.
        block: the MoE block around it; needed for AFMoE, LFM2-MoE and MiniMax-M2, whose correction bias lives
            there, and for ERNIE 4.5, where it tells the dtype of the hidden states.

    Raises:
        UnsupportedRouterError: no row of `RULES` names the router's class, or its parameters are none that
            the rule knows. RouterMismatchError: its parameters cannot be read.
    """
    row = row_for(router)
    try:
        return row.rule(router, block)
    except MoELensError:
        raise
    except Exception as error:  # a parameter that has another name or form now
        raise RouterMismatchError(
            f"The parameters of {type(router).__name__} cannot be read ({type(error).__name__}: {error}). "
            "Has transformers changed this router?"
        ) from error


def hidden_dtype(router: nn.Module, block: nn.Module | None) -> torch.dtype:
    """The dtype of the hidden states that reach a router: that of the experts' weights beside it."""
    experts = getattr(block, "experts", None)
    for module in (experts, router):
        for parameter in module.parameters() if isinstance(module, nn.Module) else ():
            if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
                return parameter.dtype
    return torch.float32


def _row(module: nn.Module) -> RouterRow | None:
    return next((RULES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in RULES), None)


def _reader(name: str, factory: Callable[..., RoutingRule]) -> Callable[[Any, Any], RoutingRule]:
    """A factory of one or two arguments as one of two, which also refuses what is no rule."""
    n_arguments = _n_required(factory)
    if n_arguments not in (1, 2):
        raise MoELensError(
            f"The factory for {name} must be a function of the live router, or of the router and its block; "
            f"got {factory!r}."
        )

    def read(router: Any, block: Any) -> RoutingRule:
        rule = factory(router, block) if n_arguments == 2 else factory(router)
        if not isinstance(rule, RoutingRule):
            raise MoELensError(
                f"The factory registered for {name} gave {type(rule).__name__}; it must give an instance of "
                "a subclass of moe_lens.RoutingRule."
            )
        return rule

    return read


def _n_required(factory: Any) -> int | None:
    """How many arguments a function needs, all by position; None where it is no such function."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each for each in parameters if each.default is each.empty and each.kind not in variable]
    return None if any(each.kind is each.KEYWORD_ONLY for each in needed) else len(needed)


def _of_block(router: Any, block: Any, name: str) -> Tensor:
    if block is None:
        raise UnsupportedRouterError(
            f"{type(router).__name__} takes {name} from its MoE block: use rule_for(router, block)."
        )
    return _tensor(block, name)


def _tensor(module: Any, name: str) -> Tensor:
    """A parameter or buffer of a module, fetched where accelerate has offloaded it."""
    if getattr(module, name).is_meta:
        with align_module_device(module):
            return getattr(module, name)
    return getattr(module, name)
