"""k as a setting, against fresh models whose config has that k and whose weights are the same."""

import copy
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import MoELensError
from moe_lens.model.hf_models import numbered_layers, tensors_of, text_config
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.top_k import with_top_k
from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.routers.table import RULES, register_rule
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokens

REFUSED = {"phimoe": "two rounds of one expert each", "deepseek_v4_hash": "table by token id, which names 2"}
"""Families whose k cannot be set -> the reason."""
CONFIG_FIELDS = {"ernie4_5_moe": "moe_k", "gemma4": "top_k_experts", "gemma4_vl": "top_k_experts"}
PROMPTS = tokens(2, 9)


def logits_of(hf_model: Any) -> Tensor:
    with torch.no_grad():
        return hf_model(PROMPTS).logits


def k_of(hf_model: Any) -> int:
    return next(iter(numbered_layers(hf_model).values())).rule.top_k


def fresh(recipe: str, k: int) -> Any:
    """A model built from a config with this k, with the recipe's weights."""
    model = tiny_model(recipe)
    config = copy.deepcopy(model.config)
    setattr(config.get_text_config(), CONFIG_FIELDS.get(recipe, "num_experts_per_tok"), k)
    built = type(model)(config).eval()
    for name, tensor in tensors_of(model).items():
        path, _, last = name.rpartition(".")
        setattr(built.get_submodule(path), last, tensor)
    if recipe == "jetmoe":  # the same field is the number of its attention's heads, which stays
        for layer, old in zip(built.model.layers, model.model.layers, strict=True):
            layer.self_attention = old.self_attention
    return built


@pytest.mark.parametrize("change", [-1, 1])
@some_kinds
def test_logits_are_those_of_a_model_built_with_that_k(recipe: str, change: int) -> None:
    model = tiny_model(recipe)
    before, k = logits_of(model), k_of(model) + change
    if recipe in REFUSED:
        with pytest.raises(MoELensError, match=REFUSED[recipe]), with_top_k(model, k):
            pass
        assert torch.equal(logits_of(model), before)
        return
    expected = logits_of(fresh(recipe, k))
    with with_top_k(model, k):
        assert torch.equal(logits_of(model), expected)
        assert k_of(model) == k
    assert float((expected - before).abs().max()) > 0.01
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("change", [-1, 1])
@some_kinds
def test_a_bridge_its_hooks_and_its_shape_follow(recipe: str, change: int) -> None:
    if recipe in REFUSED:
        return
    model = HookedMoE.from_hf(tiny_model(recipe))
    k, seen = model.top_k + change, {}

    def note(value: Tensor, hook: Any) -> None:
        seen[hook.name] = tuple(value.shape)

    expected = HookedMoE.from_hf(fresh(recipe, k))(PROMPTS)
    points = (hook_names.topk_indices, hook_names.topk_weights)
    with with_top_k(model, k):
        assert torch.equal(model(PROMPTS), expected)
        hooks = [(point(layer), note) for layer in model.moe_layers for point in points]
        assert torch.equal(model.run_with_hooks(PROMPTS, fwd_hooks=hooks), expected)
        assert model.moe_shape.top_k == k
    assert len(seen) == 2 * len(model.moe_layers)
    assert set(seen.values()) == {(2, 9, k)}
    assert model.moe_shape.top_k == k - change


def test_an_exception_and_nesting_leave_nothing_behind() -> None:
    model = tiny_model("mixtral")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    config, block = model.config.to_dict(), model.model.layers[0].mlp
    with with_top_k(model, 4):
        with with_top_k(model, 1):
            assert (k_of(model), block.top_k, model.num_experts_per_tok) == (1, 1, 1)
        assert (k_of(model), block.top_k, model.config.num_experts_per_tok) == (4, 4, 4)
    with pytest.raises(KeyError), with_top_k(model, 4):
        raise KeyError
    assert model.config.to_dict() == config
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert getattr(module, "top_k", 0) == before[name].get("top_k", 0)


def test_a_model_saved_within_keeps_this_k(tmp_path: Any) -> None:
    model = tiny_model("olmoe")
    with with_top_k(model, 2):
        model.save_pretrained(tmp_path)
        expected = logits_of(model)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path)), expected)
    model = tiny_model("jetmoe")
    with with_top_k(model, 1):
        assert text_config(model).num_experts_per_tok == 2


@pytest.mark.parametrize(("recipe", "most"), [("olmoe", 6), ("deepseek_v3", 4), ("phimoe", 5)])
@pytest.mark.parametrize("k", [0, -1, 7])
def test_impossible_numbers(recipe: str, most: int, k: int) -> None:
    """DeepSeek-V3 chooses two groups of two."""
    with (
        pytest.raises(MoELensError, match=f"layer . *: give a whole number from 1 to {most}"),
        with_top_k(tiny_model(recipe), k),
    ):
        pass


@pytest.mark.parametrize("k", [2.5, "2", None])
def test_what_is_no_number(k: Any) -> None:
    with pytest.raises((MoELensError, TypeCheckError), match=str(k)), with_top_k(tiny_model(), k):
        pass


def test_the_k_that_it_has_is_always_possible() -> None:
    for recipe in ("phimoe", "deepseek_v4_hash"):
        model = tiny_model(recipe)
        before = logits_of(model)
        with with_top_k(model, 2):
            assert torch.equal(logits_of(model), before)


def test_a_router_that_reads_its_k_elsewhere() -> None:
    olmoe = RULES["OlmoeTopKRouter"]
    try:
        register_rule(
            "OlmoeTopKRouter",
            lambda router: SoftmaxTopK(router.num_experts, router.k_of_mine, renormalize=False),
            replace=True,
        )
        model = tiny_model("olmoe")
        for layer in model.model.layers:
            layer.mlp.gate.k_of_mine = 3
        with (
            pytest.raises(MoELensError, match="still runs 3 experts when its top_k is 2, so it reads"),
            with_top_k(model, 2),
        ):
            pass
        assert model.config.num_experts_per_tok == model.model.layers[0].mlp.gate.top_k == 3
    finally:
        RULES["OlmoeTopKRouter"] = olmoe


def test_what_holds_no_model() -> None:
    with pytest.raises(MoELensError, match="got Linear"), with_top_k(torch.nn.Linear(2, 2), 1):
        pass
