"""The router families that moe_lens knows: a family is a row of `RULES`, and all that is said of it follows.

    rule = rule_for(hf_router, block)          # parameters are read from the live router
    indices, weights = rule.route(logits)      # [*batch expert] -> [*batch k], int64, and [*batch k]
    register_rule("MyRouter", lambda router: SoftmaxTopK(router.n, router.k, renormalize=True))

From the rows follow the rules that attached models route by, `supported_models()`, the table of the
documentation, and what `HookedMoE.enable_compatibility_mode` refuses. The rules themselves, pure functions of
logits, are in `routers/plain.py` and `routers/biased.py`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, get_args

from torch import Tensor, nn

from moe_lens.errors import MoELensError, RouterMismatchError, UnsupportedRouterError
from moe_lens.routers import readers
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
from moe_lens.routers.rule import RoutingRule

PER_TOKEN: Final = "num_experts_per_tok"
"""The config field in which nearly every architecture has k."""


def _hidden_alone(block: Any, hidden: Tensor) -> tuple[Tensor]:
    return (hidden,)


@dataclass(frozen=True)
class Family:
    """One class of routers: how to read it, and the models that it is in.

    >>> from moe_lens.routers import RULES
    >>> RULES["MixtralTopKRouter"].rule_names, RULES["MixtralTopKRouter"].architectures
    (('SoftmaxTopK',), {'MixtralForCausalLM': ''})

    Where the layers of an architecture have routers of two classes, each class is a row of its own, and what
    the rows say of the architecture is put together.

    Attributes:
        rule: its reader, a function of the live router and the MoE block around it (None if not at hand). Its
            return annotation names the class of the rule, or a union of classes.
        layout: how the router's forward returns its decision.
        inputs: function of the block and hidden states [token d_model] that gives everything that the block
            passes to the router's forward for them.
        experts: how the block runs its experts.
        architectures: the model classes of transformers that have such routers -> what a user should know
            about each; may be empty.
        top_k: the config field that says how many experts run for a token, or the number.
        refused: what moe_lens refuses there, and why; may be empty.
        wrong_in_compatibility_mode: as in `SupportedModel`.
    """

    rule: Callable[[Any, Any], RoutingRule]
    layout: Layout = InOrder()  # noqa: RUF009 (frozen)
    inputs: Callable[[Any, Tensor], tuple[Any, ...]] = _hidden_alone
    experts: ExpertsLayout = Batched()  # noqa: RUF009 (frozen)
    architectures: Mapping[str, str] = field(default_factory=dict)
    top_k: str = PER_TOKEN
    refused: str = ""
    wrong_in_compatibility_mode: tuple[str, ...] = ()

    @property
    def rule_names(self) -> tuple[str, ...]:
        """The classes of rules that the reader gives, by its annotation."""
        returned = inspect.signature(self.rule).return_annotation
        return tuple(rule.__name__ for rule in get_args(returned) or (returned,))


_LIKE_V3 = "correction bias, expert groups, shared experts, dense first layers"

RULES: dict[str, Family] = {
    "AfmoeTokenChoiceRouter": Family(
        readers.afmoe,
        inputs=readers.afmoe_inputs,
        architectures={"AfmoeForCausalLM": "correction bias, shared experts, dense first layers"},
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    "DeepseekV2TopkRouter": Family(
        readers.deepseek_v2,
        architectures={
            "DeepseekV2ForCausalLM": (
                "expert groups if topk_method is group_limited_greedy, shared experts, dense first layers"
            )
        },
    ),
    "DeepseekV3TopkRouter": Family(readers.deepseek_v3, architectures={"DeepseekV3ForCausalLM": _LIKE_V3}),
    "DeepseekV4TopKRouter": Family(
        readers.deepseek_v4, architectures={"DeepseekV4ForCausalLM": "correction bias, shared experts"}
    ),
    "DeepseekV4HashRouter": Family(
        readers.deepseek_v4_hash,
        inputs=readers.with_token_ids,
        architectures={"DeepseekV4ForCausalLM": "hash layers take their experts from a table by token id"},
        refused="steering of hash layers: no router logit changes their experts",
    ),
    "Ernie4_5_MoeTopKRouter": Family(
        readers.ernie,
        architectures={"Ernie4_5_MoeForCausalLM": "correction bias, shared experts, dense first layers"},
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    "FlexOlmoTopKRouter": Family(readers.softmax, architectures={"FlexOlmoForCausalLM": ""}),
    "Gemma4TextRouter": Family(
        readers.gemma4,
        Probabilities(),
        architectures={
            "Gemma4ForCausalLM": (
                "a dense MLP beside the experts in every layer; a learned scale for each expert"
            ),
            "Gemma4ForConditionalGeneration": "as Gemma4ForCausalLM; text model only",
        },
        top_k="top_k_experts",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    "Glm4MoeTopkRouter": Family(
        readers.deepseek_v3,
        architectures={"Glm4MoeForCausalLM": _LIKE_V3},
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    "Glm4MoeLiteTopkRouter": Family(readers.deepseek_v3, architectures={"Glm4MoeLiteForCausalLM": _LIKE_V3}),
    "GlmMoeDsaTopkRouter": Family(readers.deepseek_v3, architectures={"GlmMoeDsaForCausalLM": _LIKE_V3}),
    "GptOssTopKRouter": Family(
        readers.gpt_oss,
        architectures={
            "GptOssForCausalLM": (
                "router logits have a bias; load without fused kernels (they bypass the router)"
            )
        },
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    "GraniteMoeTopKRouter": Family(readers.granite, architectures={"GraniteMoeForCausalLM": ""}),
    "GraniteMoeHybridTopKRouter": Family(
        readers.granite,
        architectures={"GraniteMoeHybridForCausalLM": "Mamba and attention layers; a shared MLP"},
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    "JambaTopKRouter": Family(
        readers.jamba,
        architectures={"JambaForCausalLM": "Mamba and attention layers; dense layers"},
    ),
    "JetMoeTopKGating": Family(
        readers.granite,
        SortedTokens(),
        experts=Sorted(),
        architectures={
            "JetMoeForCausalLM": "the MLP's router; that of the attention heads has no hook points"
        },
    ),
    "LagunaTopKRouter": Family(
        readers.laguna,
        architectures={
            "LagunaForCausalLM": (
                "correction bias, soft-capped logits, shared experts, dense layers; a scaled block output"
            )
        },
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    "Lfm2MoeTopKRouter": Family(
        readers.lfm2,
        inputs=readers.with_bias("expert_bias"),
        architectures={
            "Lfm2MoeForCausalLM": "correction bias, convolution and attention layers, dense first layers"
        },
    ),
    "Llama4Router": Family(
        readers.llama4,
        AllExperts(),
        experts=InputWeighted(),
        architectures={
            "Llama4ForCausalLM": "weights multiply the experts' input; a shared expert; dense layers",
            "Llama4ForConditionalGeneration": "as Llama4ForCausalLM; text model only",
        },
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    "MiniMaxM2TopKRouter": Family(
        readers.minimax_m2,
        inputs=readers.with_bias("e_score_correction_bias"),
        architectures={"MiniMaxM2ForCausalLM": "correction bias"},
    ),
    "MixtralTopKRouter": Family(
        partial(readers.softmax, renormalize=True, float32_weights=True),
        architectures={"MixtralForCausalLM": ""},
    ),
    "NemotronHTopkRouter": Family(
        readers.deepseek_v3,
        architectures={
            "NemotronHForCausalLM": (
                "correction bias, expert groups, shared experts; Mamba, attention, MLP and MoE layers"
            )
        },
    ),
    "OlmoeTopKRouter": Family(readers.softmax, architectures={"OlmoeForCausalLM": ""}),
    "PhimoeTopKRouter": Family(readers.phimoe, architectures={"PhimoeForCausalLM": ""}, top_k="2"),
    "Qwen2MoeTopKRouter": Family(
        readers.softmax,
        architectures={"Qwen2MoeForCausalLM": "a gated shared expert; dense layers"},
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    "Qwen3MoeTopKRouter": Family(readers.softmax, architectures={"Qwen3MoeForCausalLM": "dense layers"}),
    "Qwen3NextTopKRouter": Family(
        readers.softmax,
        architectures={
            "Qwen3NextForCausalLM": "linear and full attention; a gated shared expert; dense layers"
        },
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    "Qwen3VLMoeTextTopKRouter": Family(
        partial(readers.softmax, renormalize=True),
        architectures={"Qwen3VLMoeForConditionalGeneration": "text model only; dense layers"},
    ),
    "Qwen3_5MoeTopKRouter": Family(
        partial(readers.softmax, renormalize=True),
        architectures={
            "Qwen3_5MoeForCausalLM": "linear and full attention; a gated shared expert",
            "Qwen3_5MoeForConditionalGeneration": "as Qwen3_5MoeForCausalLM; text model only",
        },
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
}
"""Hugging Face router class name -> its family; `register_rule` adds rows."""

REFUSED_ROUTERS: Final = {
    "SwitchTransformersTop1Router": (
        "an expert takes only so many tokens of a sequence and drops the rest, so that a token's expert is "
        "not a function of its own router logits, and the model is an encoder-decoder"
    ),
}
"""Router classes that moe_lens knows and refuses -> the reason."""


def is_known_router(module: nn.Module) -> bool:
    """Whether `RULES` has a row for this module's class or one of its parent classes."""
    return _row(module) is not None


def row_for(router: nn.Module) -> Family:
    """The row of `RULES` for a router's class, or for the nearest of its parent classes that has one.

    Raises:
        UnsupportedRouterError: there is none.
    """
    row = _row(router)
    if row is None:
        raise UnsupportedRouterError(
            f"moe_lens has no routing rule for {type(router).__name__}. "
            f"Known router classes: {', '.join(sorted(RULES))}. Add yours with moe_lens.register_rule."
        )
    return row


def rule_for(router: nn.Module, block: nn.Module | None = None) -> RoutingRule:
    """The rule of a live Hugging Face router, with the parameters it has now.

    A subclass of a known router gets its parent's rule; the self-check at attach tells whether that is right.

    Args:
        router: the router module.
        block: the MoE block around it; needed for AFMoE, LFM2-MoE and MiniMax-M2, whose correction bias lives
            there, and for ERNIE 4.5, where it tells the dtype of the hidden states.

    Raises:
        UnsupportedRouterError: no row of `RULES` names the router's class, or the rule does not cover its
            parameters. RouterMismatchError: its parameters cannot be read.
    """
    row = RULES.get(type(router).__name__) or row_for(router)
    try:
        return row.rule(router, block)
    except MoELensError:
        raise
    except Exception as error:  # a parameter that has another name or form now
        raise RouterMismatchError(
            f"The parameters of {type(router).__name__} cannot be read ({type(error).__name__}: {error}). "
            "Has transformers changed this router?"
        ) from error


def _row(module: nn.Module) -> Family | None:
    for cls in type(module).__mro__:
        if (row := RULES.get(cls.__name__)) is not None:
            return row
    return None


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
        inputs: function (block, hidden states [token d_model]) -> tuple of everything that the block passes
            to the router's forward for them; None where that is the hidden states alone. The self-check uses
            it.
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
    reader = _reader(router_class_name, factory)
    row = RULES.get(router_class_name) or Family(reader)  # a replaced rule leaves what models it is in
    RULES[router_class_name] = dataclasses.replace(
        row, rule=reader, layout=InOrder(order), inputs=inputs or _hidden_alone
    )


def _reader(name: str, factory: Callable[..., RoutingRule]) -> Callable[[Any, Any], RoutingRule]:
    """A factory of one or two arguments as one of two, which also refuses to give anything but a rule."""
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
    """How many arguments a function needs, if it takes them by position; None for anything else."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in variable]
    return None if any(p.kind is p.KEYWORD_ONLY for p in needed) else len(needed)
