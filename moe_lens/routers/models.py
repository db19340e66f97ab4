"""Which models moe_lens supports, and what it refuses there: the table behind the README's.

    for model in supported_models():
        print(model.architecture, model.router, model.rule)

`moe-lens models` prints it as Markdown.
"""

from dataclasses import dataclass
from typing import Final

from moe_lens.errors import DataError

PER_TOKEN: Final = "num_experts_per_tok"
MARKS: Final = ("<!-- supported models -->", "<!-- /supported models -->")


@dataclass(frozen=True)
class SupportedModel:
    """One Hugging Face architecture.

    Attributes:
        architecture: its class in transformers.
        router: the class of its routers (two where layers differ).
        rule: the class of the rule that they follow.
        top_k: the config field that says how many experts run for a token, or the number.
        special: what a user should know about it; may be empty.
        refused: what moe_lens refuses there, and why; may be empty.
        wrong_in_compatibility_mode: options of `enable_compatibility_mode` that can change what the model
            computes in TransformerLens 4.3, and are refused: "fold_ln" (it scales a shared expert's down
            projection too where that is as wide as the model), and, where attention has value biases,
            "fold_value_biases".
    """

    architecture: str
    router: str
    rule: str
    top_k: str = PER_TOKEN
    special: str = ""
    refused: str = ""
    wrong_in_compatibility_mode: tuple[str, ...] = ()


_CONDITIONS: Final = {
    "fold_ln": "`fold_ln`",
    "fold_value_biases": "`fold_value_biases`, if there are value biases",
}
_GROUPS = "correction bias, expert groups, shared experts, dense first layers"

_MODELS: Final = (
    SupportedModel(
        "AfmoeForCausalLM",
        "AfmoeTokenChoiceRouter",
        "SigmoidTopK",
        special="correction bias, shared experts, dense first layers",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel(
        "DeepseekV2ForCausalLM",
        "DeepseekV2TopkRouter",
        "SoftmaxTopK or GroupLimitedSoftmax",
        special="expert groups if topk_method is group_limited_greedy, shared experts, dense first layers",
    ),
    SupportedModel("DeepseekV3ForCausalLM", "DeepseekV3TopkRouter", "SigmoidTopK", special=_GROUPS),
    SupportedModel(
        "DeepseekV4ForCausalLM",
        "DeepseekV4TopKRouter, DeepseekV4HashRouter",
        "SigmoidTopK, FixedExperts",
        special="correction bias, shared experts; hash layers take their experts from a table by token id",
        refused="steering of hash layers: no router logit changes their experts",
    ),
    SupportedModel(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeTopKRouter",
        "BiasedSoftmaxTopK",
        special="correction bias, shared experts, dense first layers",
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    SupportedModel("FlexOlmoForCausalLM", "FlexOlmoTopKRouter", "SoftmaxTopK"),
    SupportedModel(
        "Gemma4ForCausalLM",
        "Gemma4TextRouter",
        "SoftmaxTopK",
        top_k="top_k_experts",
        special="a dense MLP beside the experts in every layer; a learned scale for each expert",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel(
        "Gemma4ForConditionalGeneration",
        "Gemma4TextRouter",
        "SoftmaxTopK",
        top_k="top_k_experts",
        special="as Gemma4ForCausalLM; text model only",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel(
        "Glm4MoeForCausalLM",
        "Glm4MoeTopkRouter",
        "SigmoidTopK",
        special=_GROUPS,
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    SupportedModel("Glm4MoeLiteForCausalLM", "Glm4MoeLiteTopkRouter", "SigmoidTopK", special=_GROUPS),
    SupportedModel("GlmMoeDsaForCausalLM", "GlmMoeDsaTopkRouter", "SigmoidTopK", special=_GROUPS),
    SupportedModel(
        "GptOssForCausalLM",
        "GptOssTopKRouter",
        "TopKSoftmax",
        special="router logits have a bias; load without fused kernels (they bypass the router)",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel("GraniteMoeForCausalLM", "GraniteMoeTopKRouter", "TopKSoftmax"),
    SupportedModel(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridTopKRouter",
        "TopKSoftmax",
        special="Mamba and attention layers; a shared MLP",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel(
        "JambaForCausalLM",
        "JambaTopKRouter",
        "SoftmaxTopK",
        special="Mamba and attention layers; dense layers",
    ),
    SupportedModel(
        "JetMoeForCausalLM",
        "JetMoeTopKGating",
        "TopKSoftmax",
        special="the MLP's router; that of the attention heads has no hook points",
    ),
    SupportedModel(
        "LagunaForCausalLM",
        "LagunaTopKRouter",
        "SigmoidTopK",
        special="correction bias, soft-capped logits, shared experts, dense layers; a scaled block output",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel(
        "Lfm2MoeForCausalLM",
        "Lfm2MoeTopKRouter",
        "SigmoidTopK",
        special="correction bias, convolution and attention layers, dense first layers",
    ),
    SupportedModel(
        "Llama4ForCausalLM",
        "Llama4Router",
        "TopKSigmoid",
        special="weights multiply the experts' input; a shared expert; dense layers",
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    SupportedModel(
        "Llama4ForConditionalGeneration",
        "Llama4Router",
        "TopKSigmoid",
        special="as Llama4ForCausalLM; text model only",
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    SupportedModel("MiniMaxM2ForCausalLM", "MiniMaxM2TopKRouter", "SigmoidTopK", special="correction bias"),
    SupportedModel("MixtralForCausalLM", "MixtralTopKRouter", "SoftmaxTopK"),
    SupportedModel(
        "NemotronHForCausalLM",
        "NemotronHTopkRouter",
        "SigmoidTopK",
        special="correction bias, expert groups, shared experts; Mamba, attention, MLP and MoE layers",
    ),
    SupportedModel("OlmoeForCausalLM", "OlmoeTopKRouter", "SoftmaxTopK"),
    SupportedModel("PhimoeForCausalLM", "PhimoeTopKRouter", "SparseMixer", top_k="2"),
    SupportedModel(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeTopKRouter",
        "SoftmaxTopK",
        special="a gated shared expert; dense layers",
        wrong_in_compatibility_mode=("fold_ln",),
    ),
    SupportedModel("Qwen3MoeForCausalLM", "Qwen3MoeTopKRouter", "SoftmaxTopK", special="dense layers"),
    SupportedModel(
        "Qwen3NextForCausalLM",
        "Qwen3NextTopKRouter",
        "SoftmaxTopK",
        special="linear and full attention; a gated shared expert; dense layers",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeTextTopKRouter",
        "SoftmaxTopK",
        special="text model only; dense layers",
    ),
    SupportedModel(
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTopKRouter",
        "SoftmaxTopK",
        special="linear and full attention; a gated shared expert",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
    SupportedModel(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeTopKRouter",
        "SoftmaxTopK",
        special="as Qwen3_5MoeForCausalLM; text model only",
        wrong_in_compatibility_mode=("fold_value_biases",),
    ),
)


def supported_models() -> tuple[SupportedModel, ...]:
    """Every Hugging Face architecture that moe_lens supports, by name.

    >>> from moe_lens import supported_models
    >>> models = {model.architecture: model for model in supported_models()}
    >>> models["MixtralForCausalLM"].rule
    'SoftmaxTopK'

    They are those that have both a TransformerLens 4.3 adapter and a native router in transformers 5.23. What
    is not in the table is refused by name; `register_rule` adds routers of your own.
    """
    return _MODELS


def markdown_table() -> str:
    """The table of supported models as Markdown: what stands in the README."""
    lines = ["| architecture | router | rule | k | special cases | refused |", "|---|---|---|---|---|---|"]
    for model in supported_models():
        refused = [model.refused] if model.refused else []
        if options := model.wrong_in_compatibility_mode:
            refused += [f"compatibility mode with {_CONDITIONS[option]}" for option in options]
        k = model.top_k if model.top_k.isdigit() else f"`{model.top_k}`"
        cells = (f"`{model.architecture}`", model.router, model.rule, k, model.special, "; ".join(refused))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A README's text with the table written anew between its two marks.

    Raises:
        DataError: the text does not hold each mark once.
    """
    if any(text.count(mark) != 1 for mark in MARKS):
        raise DataError(f"The text must hold {' and '.join(MARKS)}, each once.")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{markdown_table()}{MARKS[1]}{after}"
