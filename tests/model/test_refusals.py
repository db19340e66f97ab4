"""HookedMoE refuses hooks that could not fire or return nonsense, and models that it does not know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moe_lens import RoutedModel, SteeringPlan, hook_names, steer_hooks
from moe_lens.errors import HookError, MoELensError, PlanError, RouterMismatchError, UnsupportedRouterError
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.shape import MoEShape
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.writing import generate_text
from tests.edits import SPELLERS, on_logits, same
from tests.families import core_family
from tests.model.recorded import Hooked, negate, point_names
from tests.model.test_layers import SoftmaxRouter, alter, four_outputs, other_renormalisation, scaling
from tests.tiny_models import (
    hook_census,
    plain_bridge,
    randomised,
    router_of,
    save,
    sparse_blocks,
    tiny_model,
    tokenizer,
    tokens,
)


@core_family
def test_hooks_in_training_mode_are_refused(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe)).train()
    unhooked = model(tokens())
    for name in point_names(model):
        with pytest.raises(HookError, match="training mode"):
            model.run_with_hooks(tokens(), fwd_hooks=[(name, same)])
    with pytest.raises(HookError, match="training mode"):
        model.run_with_cache(tokens())
    assert torch.equal(model(tokens()), unhooked)
    assert torch.equal(model.eval().run_with_cache(tokens())[0], unhooked)


@core_family
def test_a_fused_block_is_refused(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe))
    layer = model.moe_layers[-1]
    block: Any = sparse_blocks(model.original_model)[layer]
    block.forward = lambda hidden: hidden
    with pytest.raises(HookError, match=f"blocks.{layer}.mlp.*without calling its router"):
        model.run_with_hooks(tokens(), fwd_hooks=on_logits(negate, layer))


@pytest.mark.parametrize("wrap", [RoutedModel, HookedMoE.from_hf])
def test_plans_alone_watch_the_block_until_its_router_is_seen_to_run(wrap: Callable[[Any], Any]) -> None:
    model = wrap(tiny_model("olmoe"))
    block: Any = sparse_blocks(model.original_model)[0]
    steer, census = steer_hooks(SteeringPlan(deactivate=[(0, 1)])), hook_census(block)
    with model.hooks(steer):
        assert hook_census(block) != census
        steered = model(tokens())
        assert hook_census(block) == census  # torch's hooks are not cheap
        model.train()
        with pytest.raises(HookError, match=r"mlp: .* training mode"):
            model(tokens())
        model.eval()
        assert torch.equal(model(tokens()), steered)
    block.forward = lambda hidden: hidden  # a fused kernel
    with model.hooks(steer):
        for _ in range(2):
            with pytest.raises(HookError, match="without calling its router, so the steering plan"):
                model(tokens())
    del block.forward
    with model.hooks(steer):
        assert torch.equal(model(tokens()), steered)
    assert hook_census(block) == census


@pytest.mark.parametrize("spell", SPELLERS)
def test_a_layer_without_router_is_refused(hooked: Hooked, spell: Callable[[int], str]) -> None:
    model = hooked("qwen2_moe")  # layer 1 is dense
    before = hook_census(model)
    name, alias = spell(1), spell(1).replace("mlp.", "")
    for absent in (name, alias, spell(17)):
        with pytest.raises(HookError, match=r"no router; the MoE layers are \(0, 2, 3\)"):
            model.run_with_hooks(tokens(), fwd_hooks=[(spell(0), same), (absent, same)])
        with pytest.raises(HookError, match="no router"):
            model.run_with_hooks(tokens(), bwd_hooks=[(absent, same)])
        with pytest.raises(HookError, match="no router"), model.hooks([(absent, same)]):
            pass
        with pytest.raises(HookError, match="no router"):
            model.add_hook(absent, same)
        with pytest.raises(HookError, match="no router"):
            model.add_perma_hook(absent, same)
        with pytest.raises(HookError, match="no router"):
            model.run_with_cache(tokens(), names_filter=absent)
        with pytest.raises(HookError, match="no router"):
            model.run_with_cache(tokens(), names_filter=[spell(0), absent])
    assert hook_census(model) == before


# What a hook may not return, seen through the bridge (all cases: test_router_hooks.py)
@pytest.mark.parametrize(
    ("spell", "bad"),
    [
        (hook_names.router_logits, lambda x, hook: x[..., 1:]),
        (hook_names.router_logits, lambda x, hook: x * float("nan")),
        (hook_names.topk_indices, lambda x, hook: x + 100),
        (hook_names.topk_indices, lambda x, hook: x.float()),
        (hook_names.topk_weights, lambda x, hook: (x, x)),
    ],
)
@core_family
def test_a_bad_return_is_named_and_leaves_no_hook(
    hooked: Hooked, recipe: str, spell: Callable[[int], str], bad: Any
) -> None:
    model = hooked(recipe)
    before, census, layer = model(tokens()), hook_census(model), model.moe_layers[-1]
    with pytest.raises(HookError, match=rf"blocks\.{layer}\.mlp"):
        model.run_with_hooks(tokens(), fwd_hooks=[(spell(layer), bad)])
    assert hook_census(model) == census
    assert torch.equal(model(tokens()), before)


def dense(build: str) -> Any:
    if build == "gpt2":
        return randomised(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)))
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4
    )
    return randomised(lambda: LlamaForCausalLM(config))


def made_up() -> Any:
    """An OLMoE whose routers are of a class that moe_lens does not know."""
    hf_model = tiny_model("olmoe")
    for block in sparse_blocks(hf_model).values():
        cast(Any, block).gate = SoftmaxRouter(router_of(block))
    return hf_model.eval()


def assert_refused_untouched(hf_model: Any, error: type[MoELensError], words: str) -> None:
    with torch.no_grad():
        before = hf_model(tokens()).logits
        census, modules = hook_census(hf_model), [name for name, _ in hf_model.named_modules()]
        was_training = hf_model.training
        with pytest.raises(error, match=words):
            HookedMoE.from_hf(hf_model)
        assert [name for name, _ in hf_model.named_modules()] == modules
        assert hook_census(hf_model) == census
        assert hf_model.training == was_training
        assert torch.equal(hf_model(tokens()).logits, before)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: dense("gpt2"), "GPT2LMHeadModel has no Mixture-of-Experts layer"),
        (lambda: dense("llama").train(), "LlamaForCausalLM has no Mixture-of-Experts layer"),
        (lambda: made_up(), r"model\.layers\.0\.mlp.*SoftmaxRouter.*register_rule"),
    ],
)
def test_a_model_without_a_known_router_is_refused_untouched(build: Callable[[], Any], words: str) -> None:
    assert_refused_untouched(build(), UnsupportedRouterError, words)


@core_family
@pytest.mark.parametrize(
    ("alteration", "words"),
    [(other_renormalisation, "weights differ"), (scaling, "weights differ"), (four_outputs, "returns no")],
)
@pytest.mark.parametrize("as_subclass", [True, False])
def test_a_model_with_an_altered_router_is_refused_untouched(
    recipe: str, alteration: Callable[..., Any], words: str, as_subclass: bool
) -> None:
    hf_model = tiny_model(recipe)
    layer, block = list(sparse_blocks(hf_model).items())[-1]
    router = router_of(block)
    alter(router, alteration, as_subclass)
    if alteration is four_outputs:  # such a model cannot run, so only the refusal is looked at
        with pytest.raises(RouterMismatchError, match=words):
            HookedMoE.from_hf(hf_model)
        return
    expected = rf"model\.layers\.{layer}\.mlp: {type(router).__name__} .*{words}"
    assert_refused_untouched(hf_model, RouterMismatchError, expected)


@core_family
def test_attach_to_a_bridge_with_an_altered_router_is_refused_untouched(recipe: str) -> None:
    bridge = plain_bridge(tiny_model(recipe))
    layer, block = list(sparse_blocks(bridge.original_model).items())[-1]
    alter(router_of(block), scaling)
    before, names, census = bridge(tokens()), set(bridge.hook_dict), hook_census(bridge)
    with pytest.raises(
        RouterMismatchError, match=rf"blocks\.{layer}\.mlp: {type(router_of(block)).__name__}"
    ):
        attach(bridge)
    assert set(bridge.hook_dict) == names
    assert hook_census(bridge) == census
    assert torch.equal(bridge(tokens()), before)


@pytest.mark.parametrize("build", ["gpt2", "llama"])
def test_attach_to_a_dense_bridge_is_refused_untouched(build: str) -> None:
    bridge = plain_bridge(dense(build))
    before, names = bridge(tokens()), set(bridge.hook_dict)
    with pytest.raises(UnsupportedRouterError, match="no Mixture-of-Experts layer"):
        attach(bridge)
    assert set(bridge.hook_dict) == names
    assert torch.equal(bridge(tokens()), before)


def test_attach_to_a_bridge_with_an_unknown_router_is_refused() -> None:
    with pytest.raises(UnsupportedRouterError, match=r"blocks\.0\.mlp.*SoftmaxRouter"):
        attach(plain_bridge(made_up()))


def test_from_pretrained_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    folder = save(dense("llama"), tmp_path, tokenizer())
    with pytest.raises(UnsupportedRouterError, match="no Mixture-of-Experts layer"):
        HookedMoE.from_pretrained(folder)


def test_layers_of_different_k_are_refused_untouched() -> None:
    hf_model = tiny_model("olmoe")
    router_of(sparse_blocks(hf_model)[1]).top_k = 2
    assert_refused_untouched(hf_model, UnsupportedRouterError, r"differ.*\(6, 3\).*\(6, 2\)")


def test_a_model_that_a_bridge_wraps_already_is_refused() -> None:
    hf_model = tiny_model("olmoe")
    bridge = plain_bridge(hf_model)
    before = bridge(tokens())
    for wrapped in (hf_model, bridge):
        with pytest.raises(MoELensError, match="attach"):
            HookedMoE.from_hf(wrapped)
    assert torch.equal(bridge(tokens()), before)


@pytest.mark.parametrize("wrong", ["a name", None, 3])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    for call in (HookedMoE.from_hf, attach, detach):
        with pytest.raises((MoELensError, TypeCheckError)):
            call(wrong)


def test_a_router_whose_weights_are_nan_is_refused_as_such() -> None:
    hf_model = tiny_model("olmoe")
    with torch.no_grad():
        router_of(sparse_blocks(hf_model)[1]).weight.fill_(float("nan"))
    with pytest.raises(RouterMismatchError, match=r"layers\.1.*NaN or infinite"):
        HookedMoE.from_hf(hf_model)


def test_a_hook_that_makes_the_weights_nan_is_named(hooked: Hooked) -> None:
    def spoil(weights: torch.Tensor, hook: Any) -> torch.Tensor:
        return weights * float("nan")

    with pytest.raises(HookError, match="hook on the weights"):
        hooked("olmoe").run_with_hooks(tokens(), fwd_hooks=[(hook_names.topk_weights(0), spoil)])


def test_an_unknown_router_is_refused_by_its_layer() -> None:
    bridge = plain_bridge(tiny_model("olmoe"))
    router = router_of(bridge.blocks[2].mlp.original_component)
    router.__class__ = type("BrandNewRouter", (torch.nn.Module,), {})
    with pytest.raises(UnsupportedRouterError, match=r"blocks\.2\.mlp.*BrandNewRouter"):
        attach(bridge)


def test_a_model_hooked_through_another_bridge_is_refused() -> None:
    hf_model = tiny_model("olmoe")
    HookedMoE.from_hf(hf_model)
    with pytest.raises(MoELensError, match="another bridge"):
        attach(plain_bridge(hf_model))


def test_from_pretrained_of_an_architecture_without_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dbrx", "architectures": ["DbrxForCausalLM"]}')
    with pytest.raises(MoELensError, match="no adapter for the architecture"):
        HookedMoE.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrap", [RoutedModel, HookedMoE.from_hf])
def test_a_mistyped_point_is_answered_with_the_nearest_names(wrap: Callable[[Any], Any]) -> None:
    model = wrap(tiny_model("olmoe"))
    name, tokens_ = "blocks.1.hook_resid_pots", tokens()
    ways: list[Callable[[], Any]] = [
        lambda: model.run_with_hooks(tokens_, fwd_hooks=[(name, same)]),
        lambda: model.run_with_cache(tokens_, names_filter=[name]),
        lambda: model.run_with_cache(tokens_, names_filter=name),
        lambda: model.add_hook(name, same),
        lambda: model.hooks([(name, same)]).__enter__(),
    ]
    for way in ways:
        with pytest.raises(HookError, match=r"no hook point .*did you mean .*blocks\.1\.hook_resid_post"):
            way()
    model.run_with_hooks(tokens_, fwd_hooks=[(lambda each: each.endswith("resid_post"), same)])


@pytest.mark.parametrize("wrap", [RoutedModel, HookedMoE.from_hf])
def test_a_plan_of_another_model_says_so_before_it_misses_a_layer(wrap: Callable[[Any], Any]) -> None:
    model = wrap(tiny_model("olmoe"))
    layer = model.moe_layers[-1] + 1
    other = MoEShape("other", (0, layer), model.n_experts, model.top_k)
    hooks = steer_hooks(SteeringPlan(deactivate=[(layer, 1)], shape=other))
    message = r"made for another model \(plan / model\): model 'other'"
    with pytest.raises(PlanError, match=message):
        model.run_with_hooks(tokens(), fwd_hooks=hooks)
    with pytest.raises(PlanError, match=message), model.hooks(hooks):
        pass
    with pytest.raises(PlanError, match=message):
        model.add_hook(*hooks[0])
    with pytest.raises(PlanError, match=f"layer {layer} has no router"):
        model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(SteeringPlan(deactivate=[(layer, 1)])))
    with pytest.raises(HookError, match=f"layer {layer} has no router"):
        model.run_with_hooks(tokens(), fwd_hooks=[(hooks[0][0], same)])


@pytest.mark.parametrize("wrap", [RoutedModel, HookedMoE.from_hf])
@pytest.mark.parametrize("name", ["plan", "hooks", "fwd_hooks"])
def test_generate_says_where_a_plan_belongs(wrap: Callable[..., Any], name: str) -> None:
    model, plan = wrap(tiny_model("olmoe"), tokenizer()), SteeringPlan(deactivate=[(0, 1)])
    given: Any = {name: plan if name == "plan" else steer_hooks(plan)}
    ways = ["generate", "hf_generate", "generate_stream"] if isinstance(model, HookedMoE) else ["generate"]
    for way in ways:
        with pytest.raises(HookError, match=rf"no {name}=.*with model\.hooks\("):
            list(getattr(model, way)("w1 w2", max_new_tokens=1, **given))
    if name != "hooks":  # which generate_text has
        with pytest.raises(HookError, match=r"generate_text\(model, prompts, hooks="):
            generate_text(model, ["w1 w2"], max_new_tokens=1, progress=False, **given)


def test_a_fresh_model_in_training_mode_is_told_what_its_caller_can_do() -> None:
    model = RoutedModel(tiny_model("olmoe").train())
    with pytest.raises(HookError, match=r"Call model\.eval\(\) first") as refusal:
        collect_routing(model, tokens(), progress=False)
    assert "or allow it" not in str(refusal.value)
    assert "steered(..., training=True)" in str(refusal.value)
