"""enable_compatibility_mode: what TransformerLens 4.3 gets wrong is refused, the rest keeps its meaning.

Oracle: the model itself before the mode; weight processing must leave its log-probabilities as they are.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import MoELensError
from moe_lens.model.hooked_moe import HookedMoE, detach
from moe_lens.routers.models import supported_models
from tests import model_recipes
from tests.families import some_kinds
from tests.tiny_models import hook_census, plain_bridge, tiny_model, tokenizer, tokens

OPTIONS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not support:UserWarning")  # folds that it skips
NAMED = {model.architecture: model.wrong_in_compatibility_mode for model in supported_models()}

SHARED_EXPERT_AS_WIDE_AS_THE_MODEL = {"moe_intermediate_size": 32}
"""fold_ln then scales its down projection too: TransformerLens takes any Linear from d_model for a reader."""
SQUARE = {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True}
"""fold_value_biases then reads the output projection transposed, or folds through a gate, or past sinks."""
_QWEN35_ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    }
}
WRONG: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen2_moe", "fold_ln"): {"shared_expert_intermediate_size": 32},
    ("glm4_moe", "fold_ln"): {**SHARED_EXPERT_AS_WIDE_AS_THE_MODEL, "attention_bias": False},
    ("ernie4_5_moe", "fold_ln"): SHARED_EXPERT_AS_WIDE_AS_THE_MODEL,
    ("llama4", "fold_ln"): {"intermediate_size": 32},
    ("llama4_vl", "fold_ln"): {"intermediate_size": 32},
    ("gpt_oss", "fold_value_biases"): SQUARE,
    ("afmoe", "fold_value_biases"): SQUARE,
    ("laguna", "fold_value_biases"): SQUARE,
    ("granitemoehybrid", "fold_value_biases"): {"num_key_value_heads": 4, "attention_bias": True},
    ("qwen3_next", "fold_value_biases"): SQUARE,
    ("qwen3_5_moe", "fold_value_biases"): {**SQUARE, **_QWEN35_ROPE},
    ("qwen3_5_moe_vl", "fold_value_biases"): {**SQUARE, **_QWEN35_ROPE},
    ("gemma4", "fold_value_biases"): {**SQUARE, "global_head_dim": 8},
    ("gemma4_vl", "fold_value_biases"): {**SQUARE, "global_head_dim": 8},
}
"""Recipe and option -> config fields with which that option changes what the model computes."""
AS_RIGHT: dict[str, list[dict[str, Any]]] = {
    "qwen2_moe": [{"shared_expert_intermediate_size": 24}, {"shared_expert_intermediate_size": 48}],
    "glm4_moe": [{"moe_intermediate_size": 24, "attention_bias": False}],
    "ernie4_5_moe": [{"moe_intermediate_size": 24}, {"moe_intermediate_size": 48}],
    "llama4": [{"intermediate_size": 24}, {"intermediate_size": 48}],
}
"""Recipe -> config fields with which the shared experts are narrower or wider than the model."""
every_wrong = pytest.mark.parametrize(("recipe", "option"), WRONG, ids=lambda x: x)

BIASED = {
    "olmoe": SQUARE,
    "qwen2_moe": {"num_key_value_heads": 4, "qkv_bias": True},
    "qwen3_moe": SQUARE,
    "flex_olmo": {"num_key_value_heads": 4, "attention_bias": True},
    "glm4_moe": SQUARE,
    "granitemoe": {"num_key_value_heads": 4, "attention_bias": True},
    "llama4": SQUARE,
    "phimoe": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"num_key_value_heads": 4},
    "nemotron_h": {**SQUARE, "use_bias": True, "mlp_bias": True},
}
"""Attention biases and one key-value head for each query head, where that goes well."""
DENSE_OR_NOT = {
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "glm4_moe": {"first_k_dense_replace": 0},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "lfm2_moe": {"num_dense_layers": 0},
    "llama4": {"interleave_moe_layer_step": 1},
    "laguna": {"mlp_layer_types": ["sparse"] * 3},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0},
}
"""Every layer an MoE layer, in families whose recipe has dense ones."""


def variant(recipe: str, fields: dict[str, Any]) -> Any:
    """The recipe's model with other config fields, in the text config where there is one."""
    given = model_recipes.RECIPES[recipe][2] if recipe in model_recipes.RECIPES else {}
    if "text_config" in given:
        return tiny_model(recipe, text_config={**given["text_config"], **fields})
    return tiny_model(recipe, **fields)


def named(model: Any) -> tuple[str, ...]:
    return NAMED[type(model).__name__]


def enable(model: HookedMoE, but: tuple[str, ...]) -> None:
    """Compatibility mode with every option but those, and but one that TransformerLens itself cannot do."""
    biases = any(
        "v_proj" in name and name.endswith("bias") for name, _ in model.original_model.named_parameters()
    )
    if biases and "fold_ln" in but and model.cfg.n_key_value_heads not in (None, model.cfg.n_heads):
        but = (*but, "fold_value_biases")  # of fewer heads than query heads, without folded norms: it raises
    model.enable_compatibility_mode(disable_warnings=True, **dict.fromkeys(but, False))


def only(*options: str) -> dict[str, bool]:
    return {option: option in options for option in OPTIONS}


def reverse(logits: Tensor, hook: Any) -> Tensor:
    return -logits


def runs(model: HookedMoE) -> list[tuple[Tensor, list[Tensor]]]:
    """Log-probabilities and router log-probabilities, without an edit and with one in every MoE layer."""
    points = [hook_names.router_logits(layer) for layer in model.moe_layers]
    result = []
    with torch.no_grad():
        for edits in ([], [(name, reverse) for name in points]):
            with model.hooks(edits):
                logits, cache = model.run_with_cache(tokens(), names_filter=points)
            result.append((logits.log_softmax(-1), [cache[name].log_softmax(-1) for name in points]))
    return result


def assert_the_same(ours: Any, expected: Any) -> None:
    for (logits, routers), (expected_logits, expected_routers) in zip(ours, expected, strict=True):
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-3)
        for router, expected_router in zip(routers, expected_routers, strict=True):
            torch.testing.assert_close(router, expected_router, rtol=0, atol=1e-3)
    (plain, _), (edited, _) = ours
    assert (plain - edited).abs().max() > 1e-2


def log_p(bridge: Any) -> Tensor:
    with torch.no_grad():
        return bridge(tokens()).log_softmax(-1)


# Options that are right


@some_kinds
def test_options_that_are_not_named_keep_predictions_routing_and_hooks(recipe: str) -> None:
    hf_model = tiny_model(recipe)
    model = HookedMoE.from_hf(hf_model, tokenizer())
    before = runs(model)
    enable(model, named(hf_model))
    assert_the_same(runs(model), before)
    layer = model.moe_layers[-1]
    _, cache = model.run_with_cache(tokens())
    assert torch.equal(cache["router_logits", layer], cache[hook_names.router_logits(layer)])
    detach(model)
    assert not any(hook_names.parse(name) for name in model.hook_dict)
    torch.testing.assert_close(log_p(model), before[0][0], rtol=0, atol=1e-3)


@pytest.mark.broad
@pytest.mark.parametrize("fields", [BIASED, DENSE_OR_NOT], ids=["biased", "all sparse"])
def test_they_do_in_other_shapes_too(fields: dict[str, dict[str, Any]]) -> None:
    for recipe, config in fields.items():
        hf_model = variant(recipe, config)
        model = HookedMoE.from_hf(hf_model)
        before = runs(model)
        enable(model, named(hf_model))
        assert_the_same(runs(model), before)


@pytest.mark.parametrize("recipe", BIASED)
@pytest.mark.parametrize("option", ["fold_ln", "fold_value_biases"])
def test_each_option_alone_keeps_predictions(recipe: str, option: str) -> None:
    hf_model = variant(recipe, BIASED[recipe])
    if option in named(hf_model):
        return
    model = HookedMoE.from_hf(hf_model)
    before = log_p(model)
    model.enable_compatibility_mode(disable_warnings=True, **only(option))
    torch.testing.assert_close(log_p(model), before, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("recipe", "config"), [("glm4_moe", {}), ("afmoe", {"attention_bias": True})])
def test_a_fold_that_transformer_lens_cannot_do_is_loud_and_leaves_the_model(
    recipe: str, config: dict[str, Any]
) -> None:
    plain = plain_bridge(variant(recipe, config))
    before = log_p(plain)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        plain.enable_compatibility_mode(disable_warnings=True, **only("fold_value_biases"))
    assert torch.equal(log_p(plain), before)


def test_no_processing_is_never_refused() -> None:
    model = HookedMoE.from_hf(variant("gpt_oss", SQUARE))
    before = runs(model)
    model.enable_compatibility_mode(True, True)  # disable_warnings, no_processing
    assert_the_same(runs(model), before)


@pytest.mark.parametrize("recipe", AS_RIGHT)
def test_norms_are_folded_where_shared_experts_are_not_as_wide_as_the_model(recipe: str) -> None:
    for fields in AS_RIGHT[recipe]:
        model = HookedMoE.from_hf(variant(recipe, fields))
        before = runs(model)
        model.enable_compatibility_mode(disable_warnings=True)
        assert_the_same(runs(model), before)


# Options that are wrong


def test_the_table_names_every_option_that_is_wrong_and_no_other() -> None:
    wrong = {(type(variant(recipe, {})).__name__, option) for recipe, option in WRONG}
    assert wrong == {(architecture, option) for architecture, options in NAMED.items() for option in options}
    assert {option for _, option in wrong} <= set(OPTIONS)


@pytest.mark.broad
@every_wrong
def test_transformer_lens_is_wrong_about_what_the_table_names(recipe: str, option: str) -> None:
    """Where this fails, TransformerLens has been mended: take the option out of the table."""
    hf_model = variant(recipe, WRONG[recipe, option])
    bridge = plain_bridge(copy.deepcopy(hf_model))
    before = log_p(bridge)
    TransformerBridge.enable_compatibility_mode(bridge, disable_warnings=True, **only(option))
    assert (log_p(bridge) - before).abs().max() > 1e-2
    others = [other for other in OPTIONS if other != option]
    bridge = plain_bridge(hf_model)
    TransformerBridge.enable_compatibility_mode(bridge, disable_warnings=True, **only(*others))
    torch.testing.assert_close(log_p(bridge), before, rtol=0, atol=1e-3)


@every_wrong
def test_a_wrong_option_is_refused_before_anything_changes(recipe: str, option: str) -> None:
    hf_model = variant(recipe, WRONG[recipe, option])
    architecture = type(hf_model).__name__
    model = HookedMoE.from_hf(hf_model)
    before, names, census = model(tokens()), set(model.hook_dict), hook_census(model)
    weights = {name: value.clone() for name, value in hf_model.state_dict().items()}
    for options in ({}, only(option)):
        with pytest.raises(MoELensError, match=rf"{option}.*{architecture}.*{option}=False"):
            model.enable_compatibility_mode(**options)
    assert set(model.hook_dict) == names
    assert hook_census(model) == census
    assert not model.compatibility_mode
    assert all(torch.equal(value, weights[name]) for name, value in hf_model.state_dict().items())
    assert torch.equal(model(tokens()), before)
