"""A static KV cache gives the logits of a dynamic one, steered or not, or is refused by name.

Oracle: Hugging Face's own generation with a dynamic cache.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, hook_names, steered
from moe_lens.errors import MoELensError
from tests.families import first_of, some_kinds
from tests.tiny_models import EVERY_FAMILY, plain_bridge, tiny_model, tokenizer, tokens

WITHOUT = {
    "deepseek_v4": "transformers has no static layer for its compressed attention",
    "deepseek_v4_hash": "transformers has no static layer for its compressed attention",
    "glm_moe_dsa": "Hugging Face's own model computes other logits with one",
}
WRONG_ON_THE_BRIDGE = (
    "mixtral", "deepseek_v2", "deepseek_v2_grouped", "deepseek_v3", "ernie4_5_moe", "glm4_moe_lite",
    "granitemoe", "granitemoehybrid", "minimax_m2", "qwen3_5_moe",
)  # fmt: skip
AS_ON_THE_MODEL = [
    name for name in EVERY_FAMILY if name not in (*WITHOUT, *WRONG_ON_THE_BRIDGE, "qwen3_5_moe_vl")
]


def logits(model: Any, **options: Any) -> Tensor:
    """Those of five steps, [step batch d_vocab]."""
    output = model.generate(
        tokens(2, 5),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def plan_for(model: RoutedModel) -> SteeringPlan:
    """Without an expert, in each layer, that the first prompt's last token goes to."""
    _, cache = model.run_with_cache(tokens(2, 5))
    used = [(layer, int(cache["topk_indices", layer][0, -1, 0])) for layer in model.moe_layers]
    return SteeringPlan(
        deactivate=[(layer, expert) for layer, expert in used if model.top_k < model.n_experts]
    )


@some_kinds
def test_a_routed_model_is_right_with_a_static_cache(recipe: str) -> None:
    if recipe in WITHOUT:
        with pytest.raises((KeyError, AssertionError)):
            close(logits(tiny_model(recipe), cache_implementation="static"), logits(tiny_model(recipe)))
        return
    hf_model = tiny_model(recipe)
    plain, model = logits(hf_model), RoutedModel(hf_model)
    close(logits(hf_model, cache_implementation="static"), plain)
    with steered(hf_model, plan_for(model)):
        dynamic, static = logits(hf_model), logits(hf_model, cache_implementation="static")
    close(static, dynamic)
    assert not torch.allclose(dynamic, plain, atol=1e-2)


@pytest.mark.parametrize("recipe", first_of(["mixtral", "deepseek_v3"], WRONG_ON_THE_BRIDGE))
def test_a_bridge_that_is_wrong_with_a_static_cache_refuses_it(recipe: str) -> None:
    """Where the first part fails, TransformerLens has been mended: refuse it no longer."""
    expected, bridge = logits(tiny_model(recipe)), plain_bridge(tiny_model(recipe))
    assert (logits(bridge.original_model, cache_implementation="static") - expected).abs().max() > 0.1
    hf_model = tiny_model(recipe)
    model = HookedMoE.from_hf(hf_model, tokenizer())
    refused = rf"{type(hf_model).__name__} computes other logits with a static KV cache.*RoutedModel"
    with pytest.raises(MoELensError, match=refused):
        logits(hf_model, cache_implementation="static")
    cache = StaticCache(config=hf_model.config, max_cache_len=16)
    with pytest.raises(MoELensError, match=refused):
        logits(hf_model, past_key_values=cache)
    with pytest.raises(MoELensError, match=refused):
        model.hf_generate(tokens(2, 5), max_new_tokens=2, cache_implementation="static")
    hf_model.generation_config.cache_implementation = "static"
    with pytest.raises(MoELensError, match=refused):
        model.hf_generate(tokens(2, 5), max_new_tokens=2)
    hf_model.generation_config.cache_implementation = None
    close(logits(hf_model), expected)


@pytest.mark.parametrize("recipe", first_of(["mixtral"], WRONG_ON_THE_BRIDGE))
def test_eager_attention_is_right_there(recipe: str) -> None:
    expected, hf_model = logits(tiny_model(recipe)), tiny_model(recipe)
    hf_model.set_attn_implementation("eager")
    HookedMoE.from_hf(hf_model)
    close(logits(hf_model, cache_implementation="static"), expected)


@pytest.mark.parametrize("recipe", first_of(["olmoe", "jamba", "gpt_oss"], AS_ON_THE_MODEL))
def test_other_bridges_take_it(recipe: str) -> None:
    expected, hf_model = logits(tiny_model(recipe)), tiny_model(recipe)
    HookedMoE.from_hf(hf_model)
    close(logits(hf_model, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
@pytest.mark.parametrize(
    "recipe", ["olmoe", "gpt_oss"]
)  # masks of four dimensions, and one for each kind of layer
def test_hooks_know_padding_under_a_static_cache(recipe: str, options: dict[str, Any]) -> None:
    hf_model = tiny_model(recipe)
    model, given = RoutedModel(hf_model), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def own_columns(**more: Any) -> list[Tensor]:
        seen = []

        def see(value: Tensor, hook: Any) -> None:
            own = hook.state.own_tokens()
            seen.append(torch.ones(value.shape[:2], dtype=torch.bool) if own is None else own)

        with model.hooks([(hook_names.router_logits(model.moe_layers[0]), see)]):
            hf_model.generate(
                given,
                attention_mask=mask,
                max_new_tokens=3,
                do_sample=False,
                eos_token_id=None,
                **options,
                **more,
            )
        return seen

    dynamic, static = own_columns(), own_columns(cache_implementation="static")
    assert [seen.tolist() for seen in static] == [seen.tolist() for seen in dynamic]
    assert not dynamic[0].all()
