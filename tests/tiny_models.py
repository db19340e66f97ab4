"""Tiny random MoE models, a tokenizer for them, and the plain TransformerLens bridge to compare with.

    model = tiny_model("qwen2_moe", dtype=torch.bfloat16)       # a Hugging Face model, seeded, eval mode
    model = tiny_model("olmoe", num_experts=11, num_hidden_layers=1)     # any config field can be given
    hooked = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    plain = plain_bridge(tiny_model("olmoe"))                   # same seed, so the same weights

Weights are large enough that tokens choose different experts. Import as `from tests.tiny_models import …`.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests import model_recipes

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = tuple(f"w{i}" for i in range(46))
VOCAB_SIZE = len(SPECIAL) + len(WORDS)

_OLMOE = (OlmoeConfig, OlmoeForCausalLM)
_MIXTRAL = (MixtralConfig, MixtralForCausalLM)
_QWEN2 = (Qwen2MoeConfig, Qwen2MoeForCausalLM)
_QWEN3 = (Qwen3MoeConfig, Qwen3MoeForCausalLM)

_RECIPES: dict[str, tuple[tuple[Any, Any], dict[str, Any]]] = {
    "olmoe": (
        _OLMOE,
        {"num_hidden_layers": 3, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "olmoe_norm_gqa": (
        _OLMOE,
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_experts": 10,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        _MIXTRAL,
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2_moe": (  # layer 1 is dense; a shared expert in every MoE layer
        _QWEN2,
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "num_experts": 7,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": (  # layers 0 and 2 are dense
        _QWEN3,
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_k1": (
        _QWEN3,
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 3,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "norm_topk_prob": False,
        },
    ),
}

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")
"""One recipe per router class; what most tests are parametrised over."""

ALL_RECIPES = tuple(_RECIPES)
"""FAMILIES and a few more shapes: norm_topk_prob the other way, k = 1, GQA in OLMoE."""

EVERY_FAMILY = (*FAMILIES, *(name for name in model_recipes.RECIPES if name != "switch"))
"""At least one recipe for every architecture of `supported_models`."""

ONE_OF_EACH_KIND = (
    "olmoe", "qwen2_moe", "deepseek_v3", "deepseek_v4_hash", "ernie4_5_moe", "gemma4", "gpt_oss", "llama4",
    "phimoe",
)  # fmt: skip
"""One recipe of each kind that differs much: plain softmax, shared experts, biases with and without groups,
a table by token id, scales of experts, a softmax after the choice, scaled inputs, sparsemixer."""

SOME_KINDS = ("olmoe", "deepseek_v3", "deepseek_v4_hash", "gpt_oss")
"""Of these, a plain softmax, biases with groups, a table by token id, and a softmax after the choice."""

_CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias")

MOE_LAYERS = {
    "olmoe": (0, 1, 2),
    "olmoe_norm_gqa": (0, 1),
    "mixtral": (0, 1),
    "qwen2_moe": (0, 2, 3),
    "qwen3_moe": (1, 3),
    "qwen3_moe_k1": (0, 1),
}
N_EXPERTS = {
    "olmoe": 6,
    "olmoe_norm_gqa": 10,
    "mixtral": 5,
    "qwen2_moe": 7,
    "qwen3_moe": 9,
    "qwen3_moe_k1": 3,
}
TOP_K = {"olmoe": 3, "olmoe_norm_gqa": 2, "mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 3, "qwen3_moe_k1": 1}


def tiny_model(
    recipe: str = "olmoe", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> Any:
    """A tiny random Hugging Face language model of `ALL_RECIPES` or `EVERY_FAMILY`, in eval mode.

    The same arguments give the same weights, whatever was drawn from torch's generator before; that
    generator is left as it was. `config` overrides fields of the recipe's config.
    """
    if recipe in _RECIPES:
        (config_class, model_class), fields = _RECIPES[recipe]
        fields = {**model_recipes.COMMON, **fields}
    else:
        config_class, model_class, fields = model_recipes.RECIPES[recipe]
    return randomised(lambda: model_class(config_class(**{**copy.deepcopy(fields), **config})), dtype, seed)


def randomised(build: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """`build()` with random weights (normal, std 0.2; norms around 1) and correction biases, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _randomise(name, parameter)
            for name, buffer in model.named_buffers():
                _randomise_buffer(name, buffer, model.config)
    phases = {name: buffer for name, buffer in model.named_buffers() if buffer.is_complex()}
    with warnings.catch_warnings():  # `to` drops the imaginary part of Llama 4's phases, with a warning
        warnings.simplefilter("ignore", UserWarning)
        model = model.to(dtype)
    for name, buffer in model.named_buffers():
        if name in phases:
            buffer.data = phases[name]
    return model.eval()


def _randomise(name: str, parameter: Tensor) -> None:
    last = name.rsplit(".", 1)[-1]
    if last in _CORRECTION_BIASES:
        nn.init.normal_(parameter, std=0.3)
    elif last in ("A_log", "D", "dt_bias") or name.endswith("dt_proj.bias"):
        parameter.add_(0.1 * torch.randn_like(parameter))  # state spaces must still decay
    elif last in ("scale", "per_expert_scale", "hc_scale"):
        nn.init.normal_(parameter, mean=1.0, std=0.2)
    elif "norm" in name:  # around 1, or around 0 where the norm adds 1 itself
        nn.init.normal_(parameter, mean=float(parameter.float().mean().round().clamp(0, 1)), std=0.2)
    else:
        nn.init.normal_(parameter, std=0.2)


def _randomise_buffer(name: str, buffer: Tensor, config: Any) -> None:
    last = name.rsplit(".", 1)[-1]
    if last in _CORRECTION_BIASES:
        nn.init.normal_(buffer, std=0.3)
    elif last == "layer_scalar":
        nn.init.uniform_(buffer, 0.7, 1.0)
    elif last == "tid2eid":  # DeepSeek-V4's hash layers: different experts for every token
        rows = [torch.randperm(config.n_routed_experts)[: buffer.shape[1]] for _ in range(buffer.shape[0])]
        buffer.copy_(torch.stack(rows))


def tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """A word-level tokenizer: "w0 w1 …" separated by spaces; pad, bos, eos and unk are tokens 0 to 3."""
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side=padding_side,
        name_or_path="tiny-word-level",
        add_bos_token=True,  # else TransformerLens looks for a version that does on the hub
    )


def tokens(batch: int = 2, pos: int = 7, seed: int = 0) -> Tensor:
    """Random word tokens (no special ones), int64, [batch pos]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCAB_SIZE, (batch, pos), generator=generator)


def prompt(length: int, seed: int = 0) -> str:
    """A random prompt of `length` words."""
    return " ".join(WORDS[i - len(SPECIAL)] for i in tokens(1, length, seed)[0].tolist())


def plain_bridge(hf_model: Any, tokenizer: Any = None) -> TransformerBridge:
    """TransformerLens' own bridge around `hf_model` (in place): what moe_lens must not change."""
    name = type(hf_model).__name__
    bridge = build_bridge_from_module(
        hf_model,
        {"PhimoeForCausalLM": "PhiMoEForCausalLM"}.get(name, name),
        hf_config=hf_model.config,
        tokenizer=tokenizer,
    )
    return bridge.eval()


def save(hf_model: Any, folder: Path, tokenizer: Any = None, **kwargs: Any) -> Path:
    """Write an ordinary Hugging Face checkpoint folder (kwargs: those of save_pretrained)."""
    hf_model.save_pretrained(folder, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def sparse_blocks(hf_model: Any) -> dict[int, nn.Module]:
    """Layer number -> Hugging Face MoE block (its `gate` is the router), inside a bridge or not."""
    found = {}
    for number, layer in enumerate(hf_model.model.layers):
        layer = getattr(layer, "original_component", layer)
        mlp = getattr(layer.mlp, "original_component", layer.mlp)
        if hasattr(mlp, "experts"):
            found[number] = mlp
    return found


def router_of(block: Any) -> Any:
    """The Hugging Face router of a block of `sparse_blocks`, inside a bridge or not."""
    return getattr(block.gate, "original_component", block.gate)


def hook_census(root: nn.Module) -> dict[str, int]:
    """How many hooks wait on each module below `root`, TransformerLens' and torch's own; zeros left out."""
    kinds = (
        "fwd_hooks",
        "bwd_hooks",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    counts = {
        f"{name}.{kind}": len(getattr(module, kind, ()))
        for name, module in root.named_modules()
        for kind in kinds
    }
    return {where: count for where, count in counts.items() if count}
