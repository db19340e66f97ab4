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

from torch import Tensor, nn

from moe_lens.errors import MoELensError, RouterMismatchError, UnsupportedRouterError
from moe_lens.routers.layouts import (
    ORDER,
    AllExperts,
    Batched,
    ExpertsLayout,
    InOrder,
    InputWeighted,
    Layout,
    Probabilities,
    Sorted,
    SortedTokens,
)
from moe_lens.routers.readers import (
    _afmoe,
    _afmoe_inputs,
    _deepseek_v2,
    _deepseek_v3,
    _deepseek_v4,
    _deepseek_v4_hash,
    _ernie,
    _gemma4,
    _gpt_oss,
    _granite,
    _laguna,
    _lfm2,
    _llama4,
    _minimax_m2,
    _phimoe,
    _renormalized,
    _softmax,
    _with_bias,
    _with_token_ids,
)
from moe_lens.routers.rule import RoutingRule


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
    >>> from moe_lens.routers import RULES
    >>> from moe_lens.routers import SoftmaxTopK
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
