"""Baked models: plain Hugging Face models that compute what routing around the plan's experts does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_lens import organisms
from moe_lens.errors import MoELensError, PlanError
from moe_lens.interventions.ablation import route_around
from moe_lens.model.hf_models import numbered_layers, tensors_of
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.shape import MoEShape
from moe_lens.steering.baking import bake
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests import oracle
from tests.families import core_family, every_dtype, recipes, some_kinds
from tests.tiny_models import EVERY_FAMILY, tiny_model, tokens

GROUPED = (
    "deepseek_v2_grouped", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "nemotron_h",
    "nemotron_h_latent",
)  # fmt: skip
BIAS_ONLY = {"deepseek_v4_hash", "ernie4_5_moe"}
NEITHER = {"jetmoe"}
WITH_BIAS = BIAS_ONLY | {*GROUPED[1:], "afmoe", "deepseek_v4", "gpt_oss", "laguna", "lfm2_moe", "minimax_m2"}
CAN = {
    "prune": set(EVERY_FAMILY) - BIAS_ONLY - NEITHER,
    "bias": WITH_BIAS,
}
"""Way of baking -> the families in which it serves a plan that takes as many from each layer and group."""
PROMPTS = tokens(2, 9)


def model_of(recipe: str, **config: Any) -> Any:
    """Groups of 3, of which two experts stay; the recipes' have 2."""
    return tiny_model(recipe, **({"n_routed_experts": 12} if recipe in GROUPED else {}), **config)


def plan_of(hf_model: Any) -> SteeringPlan:
    """Other experts in every layer that can be steered; of each group one."""
    pairs = []
    for number, moe in numbered_layers(hf_model).items():
        rule = moe.rule
        if getattr(rule, "groups", None) is not None:
            pairs += [(number, 3 * group + (number + group) % 3) for group in range(4)]
        elif rule.chooses_by_logits:
            n_out = min(2, rule.n_experts - rule.top_k)
            pairs += [(number, (number + 3 * i) % rule.n_experts) for i in range(n_out)]
    return SteeringPlan(deactivate=pairs)


def logits_of(hf_model: Any) -> Tensor:
    with torch.no_grad():
        return hf_model(PROMPTS).logits


def around(hf_model: Any, plan: SteeringPlan) -> Tensor:
    """Logits of a model under `route_around`; the model becomes a bridge's."""
    with torch.no_grad():
        return HookedMoE.from_hf(hf_model).run_with_hooks(PROMPTS, fwd_hooks=route_around(plan.deactivate))


def weights_equal(a: Any, b: Any) -> bool:
    mine, theirs = tensors_of(a), tensors_of(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("how", ["prune", "bias"])
@some_kinds
def test_it_computes_what_routing_around_computes_or_says_why_not(recipe: str, how: Any) -> None:
    model = model_of(recipe)
    plan, plain = plan_of(model), logits_of(model)
    if recipe not in CAN[how]:
        with pytest.raises(PlanError, match=f"cannot be baked with this plan. {how}: .{{30}}"):
            bake(model, plan, how=how)
        return
    baked = bake(model, plan, how=how)
    assert type(baked) is type(model)
    assert not any("forward" in vars(module) or module._forward_hooks for module in baked.modules())
    assert float((logits_of(baked) - plain).abs().max()) > 0.01
    torch.testing.assert_close(logits_of(baked), around(model, plan), atol=2e-5, rtol=0)


@every_dtype
@recipes(("deepseek_v3", "gpt_oss"), sorted(WITH_BIAS - {"ernie4_5_moe"}))  # which scales probabilities
def test_a_written_bias_changes_nothing_else_bit_for_bit(recipe: str, dtype: torch.dtype) -> None:
    """Both models in bridges, which run the same attention."""
    model = model_of(recipe, dtype=dtype)
    plan = plan_of(model)
    baked = HookedMoE.from_hf(bake(model, plan, how="bias"))
    with torch.no_grad():
        assert torch.equal(baked(PROMPTS), around(model, plan))


@pytest.mark.parametrize("how", ["prune", "bias"])
@some_kinds
def test_a_saved_one_is_an_ordinary_checkpoint(recipe: str, how: Any, tmp_path: Path) -> None:
    if recipe not in CAN[how]:
        return
    model = model_of(recipe)
    baked = bake(model, plan_of(model), how=how)
    baked.save_pretrained(tmp_path / "baked")
    model.save_pretrained(tmp_path / "model")
    loader = (
        AutoModelForCausalLM if recipe != "llama4" and "CausalLM" in type(model).__name__ else type(model)
    )
    loaded = loader.from_pretrained(tmp_path / "baked")
    assert type(loaded) is type(model)
    assert weights_equal(loaded, baked)
    torch.testing.assert_close(logits_of(loaded), logits_of(baked), atol=1e-5, rtol=0)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("baked", "model")]
    assert sizes[0] < sizes[1] if how == "prune" else sizes[0] == sizes[1]


@core_family
def test_pruned_models_equal_loops_over_the_experts_that_are_left(recipe: str) -> None:
    """In float64, written without moe_lens: experts that are out have logit -inf."""
    model = tiny_model(recipe)
    plan = plan_of(model)

    def without(layer: int) -> oracle.Edit:
        out = [expert for at, expert in plan.deactivate if at == layer]
        return lambda logits: logits.index_fill(-1, torch.tensor(out), -torch.inf)

    baked = bake(model, plan, how="prune")
    rewritten = oracle.rewrite(model, {layer: without(layer) for layer in numbered_layers(model)})
    torch.testing.assert_close(logits_of(baked), logits_of(rewritten), atol=2e-5, rtol=0)


@some_kinds
def test_a_model_within_a_bridge_gives_the_same_one(recipe: str) -> None:
    bare = model_of(recipe)
    plan = plan_of(bare)
    if recipe in NEITHER:
        plan = SteeringPlan()
    hooked = HookedMoE.from_hf(model_of(recipe))
    from_bridge, from_bare = bake(hooked, plan), bake(bare, plan)
    assert weights_equal(from_bridge, from_bare)
    assert from_bridge.config.to_dict() == from_bare.config.to_dict()
    wrapper = SimpleNamespace(hf_model=bare)
    assert weights_equal(bake(wrapper, plan), from_bare)


@pytest.mark.parametrize("recipe", ["olmoe", "gpt_oss", "deepseek_v3", "gemma4_vl"])
def test_the_given_model_is_not_touched(recipe: str) -> None:
    model, same = model_of(recipe), model_of(recipe)
    drawn = torch.random.get_rng_state()
    baked = bake(model, plan_of(model))
    with torch.no_grad():
        for tensor in tensors_of(baked).values():
            tensor.zero_()
    assert weights_equal(model, same)
    assert model.config.to_dict() == same.config.to_dict()
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_dtype_mode_ties_gradients_and_generation_config_are_kept() -> None:
    model = tiny_model("olmoe", dtype=torch.bfloat16, tie_word_embeddings=True).train()
    model.generation_config.max_new_tokens = 17
    model.model.embed_tokens.requires_grad_(False)
    baked = bake(model, plan_of(model))
    assert baked.dtype == torch.bfloat16
    assert baked.training
    assert baked.lm_head.weight is baked.model.embed_tokens.weight
    assert not baked.model.embed_tokens.weight.requires_grad
    assert baked.model.norm.weight.requires_grad
    assert baked.generation_config.max_new_tokens == 17


@pytest.mark.parametrize("recipe", ["mixtral", "gpt_oss", "afmoe"])
def test_it_generates_what_the_steered_model_generates(recipe: str) -> None:
    model: Any = tiny_model(recipe)
    plan = plan_of(model)
    new = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    prompt = PROMPTS[:1]
    baked: Any = bake(model, plan)
    written = baked.generate(prompt, attention_mask=torch.ones_like(prompt), **new)
    with HookedMoE.from_hf(model).hooks(steer_hooks(plan)):
        steered = model.generate(prompt, attention_mask=torch.ones_like(prompt), **new)
    assert torch.equal(written, steered)


def test_deactivated_experts_share_in_weights_under_steering_where_these_are_not_divided() -> None:
    """What the docstring says of OLMoE, and that dividing by the sum (Mixtral) makes no difference."""
    off = {}
    for recipe in ("olmoe", "mixtral"):
        model = tiny_model(recipe)
        plan = plan_of(model)
        baked = logits_of(bake(model, plan))
        with torch.no_grad():
            steered = HookedMoE.from_hf(model).run_with_hooks(PROMPTS, fwd_hooks=steer_hooks(plan))
        off[recipe] = float((steered - baked).abs().max())
    assert off["mixtral"] < 2e-5 < 0.01 < off["olmoe"]


def test_layers_that_lose_different_numbers() -> None:
    plan = SteeringPlan(deactivate=[(0, 1), (0, 4), (1, 2)])
    with pytest.raises(PlanError, match=r"\{0: 2, 1: 1, 2: 0\}; deactivate as many in each") as error:
        bake(tiny_model("olmoe"), plan)
    assert "bias: model.layers.0.mlp: OlmoeTopKRouter has no bias" in str(error.value)
    model = tiny_model("gpt_oss")
    baked = bake(model, plan)
    assert baked.config.num_local_experts == model.config.num_local_experts
    torch.testing.assert_close(logits_of(baked), around(model, plan), atol=2e-5, rtol=0)


def test_auto_prunes_where_it_can() -> None:
    model = tiny_model("gpt_oss")
    assert bake(model, plan_of(model)).config.num_local_experts == 4


def test_an_activation_is_refused_for_what_it_is() -> None:
    for recipe in ("olmoe", "gpt_oss", "deepseek_v3"):
        with pytest.raises(PlanError, match=r"activates experts \[2\] of layer 1.*keep the activation as"):
            bake(tiny_model(recipe), SteeringPlan(activate=[(1, 2)], deactivate=[(1, 3)]))
    both = SteeringPlan(activate=[(1, 2)], deactivate=[(0, 2), (1, 2), (2, 2)])  # deactivation wins
    assert bake(tiny_model("olmoe"), both).config.num_experts == 5


def test_a_plan_for_another_model_or_too_large_a_one_is_refused() -> None:
    model = tiny_model("olmoe")
    other = MoEShape("other", (0, 1, 2), 64, 8)
    with pytest.raises(PlanError, match="made for another model"):
        bake(model, SteeringPlan(deactivate=[(0, 1)], shape=other))
    with pytest.raises(PlanError, match="at most 3 are possible"):
        bake(model, SteeringPlan(deactivate=[(0, expert) for expert in range(4)]))
    with pytest.raises(PlanError, match="layer 9 has no router"):
        bake(model, SteeringPlan(deactivate=[(9, 0)]))
    unnamed = MoEShape("a name", (0, 1, 2), 6, 3)
    assert (
        bake(model, SteeringPlan(deactivate=[(n, 0) for n in range(3)], shape=unnamed)).config.num_experts
        == 5
    )


def test_an_empty_plan_gives_a_plain_copy() -> None:
    model = tiny_model("olmoe")
    copy = bake(HookedMoE.from_hf(model), SteeringPlan())
    assert weights_equal(copy, tiny_model("olmoe"))


def test_twice_baked_by_bias() -> None:
    """The second time, experts of the first count as the lowest ones: as for routing around the second's."""
    first, second = (
        SteeringPlan(deactivate=[(1, 0), (1, 1)]),
        SteeringPlan(deactivate=[(1, 2), (1, 3), (1, 4)]),
    )
    once = bake(tiny_model("deepseek_v4"), first, how="bias")
    twice = bake(once, second, how="bias")
    torch.testing.assert_close(logits_of(twice), around(once, second), atol=2e-5, rtol=0)


class TestGroups:
    def test_unequal_losses_cannot_be_pruned_but_written(self) -> None:
        model = model_of("deepseek_v3")
        plan = SteeringPlan(deactivate=[(1, 4), (1, 9), (2, 0)])
        with pytest.raises(PlanError, match=r"different numbers \(layer: number\) \{1: 2, 2: 1\}"):
            bake(model, plan, how="prune")
        same = SteeringPlan(deactivate=[(1, 4), (2, 0)])
        with pytest.raises(
            PlanError, match=r"leaves \[3, 2, 3, 3\] experts in them; deactivate as many in each"
        ):
            bake(model, same, how="prune")
        baked = bake(model, plan)
        torch.testing.assert_close(logits_of(baked), around(model, plan), atol=2e-5, rtol=0)

    def test_a_whole_group(self) -> None:
        model = tiny_model("deepseek_v3")
        plan = SteeringPlan(deactivate=[(1, 2), (1, 3)])
        torch.testing.assert_close(logits_of(bake(model, plan)), around(model, plan), atol=2e-5, rtol=0)

    def test_a_group_that_keeps_fewer_than_its_score_sums(self) -> None:
        one_of_two = SteeringPlan(deactivate=[(1, 2)])
        with pytest.raises(PlanError, match=r"best 2 experts, and the plan leaves \[2, 1, 2, 2\]"):
            bake(tiny_model("deepseek_v3"), one_of_two, how="bias")

    def test_groups_that_may_not_hold_k(self) -> None:
        plan = SteeringPlan(deactivate=[(1, 0), (1, 3)])
        model = model_of("deepseek_v3", num_experts_per_tok=5)
        with pytest.raises(PlanError, match="may hold fewer than the 5 that must run"):
            bake(model, plan, how="bias")

    @pytest.mark.parametrize("recipe", ["deepseek_v2_grouped", "deepseek_v3"])
    def test_groups_that_limit_nothing_become_one(self, recipe: str) -> None:
        model = tiny_model(recipe, topk_group=4)
        plan = SteeringPlan(deactivate=[(1, 2), (2, 5)])
        baked = bake(model, plan, how="prune")
        assert (baked.config.n_routed_experts, baked.config.n_group, baked.config.topk_group) == (7, 1, 1)
        torch.testing.assert_close(logits_of(baked), around(model, plan), atol=2e-5, rtol=0)

    def test_one_expert_is_too_few_for_a_sum_of_two(self) -> None:
        model = tiny_model("deepseek_v3", n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1)
        plan = SteeringPlan(deactivate=[(layer, expert) for layer in (1, 2) for expert in (0, 1, 3)])
        with pytest.raises(PlanError, match="sums the two best scores of a group, and the plan leaves one"):
            bake(model, plan, how="prune")
        torch.testing.assert_close(logits_of(bake(model, plan)), around(model, plan), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("jetmoe", "also gives the size of model.layers.0.self_attention.experts.input_linear.weight"),
        ("deepseek_v4_hash", r"layers \[0\] take experts from a table by token id"),
        ("ernie4_5_moe", "adds a bias to probabilities over all experts"),
    ],
)
def test_why_a_family_cannot_be_pruned(recipe: str, reason: str) -> None:
    model = tiny_model(recipe)
    with pytest.raises(PlanError, match=reason):
        bake(model, plan_of(model), how="prune")
    if recipe == "deepseek_v4_hash":
        with pytest.raises(PlanError, match="layer 0 cannot be steered by this plan: its experts come from"):
            bake(model, SteeringPlan(deactivate=[(0, 1)]))


class TestRefused:
    plan = SteeringPlan(deactivate=[(n, 1) for n in range(3)])

    def test_what_is_no_model_no_plan_or_no_way(self) -> None:
        with pytest.raises(MoELensError, match=r"got Linear\. Of a PEFT model"):
            bake(nn.Linear(2, 2), self.plan)
        with pytest.raises((PlanError, TypeCheckError), match="SteeringPlan"):
            bake(tiny_model(), [(0, 1)])  # pyright: ignore[reportArgumentType]
        with pytest.raises((PlanError, TypeCheckError), match=r"auto.*prune.*bias"):
            bake(tiny_model(), self.plan, how="cut")  # pyright: ignore[reportArgumentType]

    def test_quantised_weights(self) -> None:
        model = tiny_model()
        model.config.quantization_config = {"quant_method": "fp8"}
        with pytest.raises(MoELensError, match=r"is quantised.*Load it in a floating-point dtype"):
            bake(model, self.plan)

    def test_offloaded_weights(self) -> None:
        model = tiny_model()
        model.model.layers[1].to("meta")
        with pytest.raises(MoELensError, match=r"offloaded.*Load it without"):
            bake(model, self.plan)

    def test_processed_weights(self) -> None:
        model = organisms.load("specialised")
        model.enable_compatibility_mode()
        with pytest.raises(
            MoELensError, match=r"processed by enable_compatibility_mode\. Load the model again"
        ):
            bake(model, SteeringPlan(deactivate=[(n, 1) for n in model.moe_layers]))

    def test_adapters_within_the_model(self) -> None:
        class Adapted(nn.Module):
            def __init__(self, base_layer: nn.Module) -> None:
                super().__init__()
                self.base_layer = base_layer

        model = tiny_model()
        model.model.layers[0].self_attn.q_proj = Adapted(model.model.layers[0].self_attn.q_proj)
        with pytest.raises(MoELensError, match=r"q_proj.weight of OlmoeForCausalLM is not there.*merge_and"):
            bake(model, self.plan)


def test_every_family_is_somewhere() -> None:
    assert CAN["prune"] | CAN["bias"] | NEITHER == set(EVERY_FAMILY)
    assert not (CAN["prune"] | CAN["bias"]) & NEITHER
