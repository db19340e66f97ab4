"""hook_expert_out, on every family: against Hugging Face's own experts, and by brute force."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lens import HookedMoE, hook_names
from moe_lens.errors import HookError
from moe_lens.model.hooked_moe import detach
from moe_lens.model.registration import routing_layers
from moe_lens.model.router_points import installed_points
from tests.families import core_family, some_kinds
from tests.tiny_models import (
    hook_census,
    prompt,
    tiny_model,
    tokenizer,
    tokens,
)

Hooked = Callable[..., Any]

OUTPUTS_ADDED_AS_THEY_ARE = ("llama4", "llama4_vl")


def with_points(recipe: str, dtype: torch.dtype = torch.float32, implementation: str | None = None) -> Any:
    hf_model = tiny_model(recipe, dtype)
    if implementation is not None:
        hf_model.set_experts_implementation(implementation)
    model = HookedMoE.from_hf(hf_model, tokenizer())
    model.set_use_expert_out(True)
    return model


def on_all(model: Any, hook: Any) -> list[tuple[str, Any]]:
    return [(hook_names.expert_out(layer), hook) for layer in model.moe_layers]


def run(model: Any, hooks: Any = (), pos: int = 6) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens(2, pos), fwd_hooks=list(hooks))


def unchanged(value: Tensor, hook: Any) -> Tensor:
    return value


def routed_outputs(model: Any, forward: Callable[[], Any]) -> dict[int, Tensor]:
    """What each layer's experts add up to, seen by torch's own hooks on Hugging Face's modules."""
    seen: dict[int, Tensor] = {}
    handles = []
    for layer, moe in routing_layers(model).items():
        jet = not hasattr(moe.block, "experts")
        module: Any = moe.block if jet else moe.experts

        def note(module: Any, args: Any, output: Tensor, layer: int = layer, jet: bool = jet) -> None:
            seen[layer] = (output - module.bias if jet else output).flatten(0, -2)

        handles.append(module.register_forward_hook(note))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@some_kinds
def test_identity_hooks_are_bit_for_bit_and_the_weighted_sum_is_the_routed_output(
    with_outputs: Hooked, recipe: str
) -> None:
    model = with_outputs(recipe)
    plain = run(model)
    assert torch.equal(run(model, on_all(model, unchanged)), plain)
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name] = value

    hooks = [
        (spell(layer), keep)
        for layer in model.moe_layers
        for spell in (hook_names.expert_out, hook_names.topk_weights)
    ]
    theirs = routed_outputs(model, lambda: run(model, hooks))
    for layer in model.moe_layers:
        outputs, weights = kept[hook_names.expert_out(layer)], kept[hook_names.topk_weights(layer)]
        assert outputs.shape[:3] == weights.shape == (2, 6, model.top_k)
        if recipe in OUTPUTS_ADDED_AS_THEY_ARE:
            weights = torch.ones_like(weights)
        total = torch.einsum("bpkd,bpk->bpd", outputs.double(), weights.double()).flatten(0, 1)
        if recipe in OUTPUTS_ADDED_AS_THEY_ARE:  # every expert runs, the others on zeros
            theirs[layer] = theirs[layer].unflatten(0, (-1, total.shape[0])).sum(0)
        torch.testing.assert_close(theirs[layer].double(), total, rtol=1e-5, atol=1e-6)


@some_kinds
def test_an_edit_counts_and_off_leaves_no_trace(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    plain, names, census = run(model), set(model.hook_dict), hook_census(model)
    model.set_use_expert_out(True)
    model.set_use_expert_out(True)  # twice is once
    assert set(model.hook_dict) - names == {
        f"blocks.{layer}.{prefix}hook_expert_out" for layer in model.moe_layers for prefix in ("", "mlp.")
    }
    none = run(model, on_all(model, lambda value, hook: value * 0))
    by_weights = [(hook_names.topk_weights(n), lambda value, hook: value * 0) for n in model.moe_layers]
    assert not torch.equal(none, plain)
    torch.testing.assert_close(none, run(model, by_weights), rtol=0, atol=0)
    model.set_use_expert_out(False)
    assert torch.equal(run(model), plain)
    model._scan_existing_hooks(model, "")  # as attaching does; it must not find them again
    assert set(model.hook_dict) == names
    assert hook_census(model) == census
    for moe in routing_layers(model).values():
        assert moe.experts is not None
        assert "forward" not in vars(moe.experts)
    with pytest.raises(HookError, match=r"set_use_expert_out\(True\)"):
        run(model, on_all(model, unchanged))
    with pytest.raises(HookError, match="switched off"):
        model.run_with_cache(tokens(), names_filter=[hook_names.expert_out(model.moe_layers[0])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@core_family
def test_half_precision_is_bit_for_bit_too(recipe: str, dtype: torch.dtype) -> None:
    model = with_points(recipe, dtype)
    assert torch.equal(run(model, on_all(model, unchanged)), run(model))


@core_family
def test_batched_mm_is_bit_for_bit_and_eager_close(recipe: str) -> None:
    model = with_points(recipe, implementation="batched_mm")
    assert torch.equal(run(model, on_all(model, unchanged)), run(model))
    model = with_points(recipe, implementation="eager")
    torch.testing.assert_close(run(model, on_all(model, unchanged)), run(model), rtol=1e-5, atol=1e-5)


@core_family
def test_outputs_are_those_of_the_experts_formula(recipe: str) -> None:
    """Gate, up and down of one expert at a time, written out."""
    model = with_points(recipe)
    for layer, moe in routing_layers(model).items():
        experts: Any = moe.experts
        seen: list[Tensor] = []
        handle = experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        _, cache = model.run_with_cache(tokens(1, 4))
        handle.remove()
        hidden, indices = seen[0], cache["topk_indices", layer][0]
        for token, slot in ((0, 0), (3, model.top_k - 1)):
            gate_up, down = (
                experts.gate_up_proj[indices[token, slot]],
                experts.down_proj[indices[token, slot]],
            )
            gate, up = (gate_up @ hidden[token]).chunk(2)
            expected = down @ (F.silu(gate) * up)
            torch.testing.assert_close(cache["expert_out", layer][0, token, slot], expected)


@some_kinds
def test_gradients_reach_the_outputs(with_outputs: Hooked, recipe: str) -> None:
    """d loss / d output is the weight times d loss / d routed output, whose gradient torch gives."""
    model = with_outputs(recipe)
    outputs: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor]) -> Any:
        def hook_function(value: Tensor, hook: Any) -> None:
            value.requires_grad_() if not value.requires_grad else value.retain_grad()
            into[int(hook.name.split(".")[1])] = value

        return hook_function

    hooks = [(hook_names.expert_out(n), keep(outputs)) for n in model.moe_layers]
    hooks += [(hook_names.topk_weights(n), keep(weights)) for n in model.moe_layers]
    routed: dict[int, Tensor] = {}

    def forward() -> None:
        logits = model.run_with_hooks(tokens(1, 4), fwd_hooks=hooks)
        for total in routed.values():
            total.retain_grad()
        logits.log_softmax(-1)[0, :, 7].sum().backward()
        model.zero_grad(set_to_none=True)

    def note(layer: int) -> Any:
        return lambda module, args, output: routed.__setitem__(layer, output)

    handles = [
        moe.experts.register_forward_hook(note(layer))
        for layer, moe in routing_layers(model).items()
        if hasattr(moe.block, "experts") and moe.experts is not None
    ]
    forward()
    for handle in handles:
        handle.remove()
    for layer in model.moe_layers:
        gradient = outputs[layer].grad
        assert gradient is not None
        assert bool((gradient != 0).any())
        if layer in routed and recipe not in OUTPUTS_ADDED_AS_THEY_ARE:
            of_sum = routed[layer].grad
            assert of_sum is not None
            of_sum = of_sum.reshape(*gradient.shape[:2], 1, -1)
            torch.testing.assert_close(gradient, weights[layer].unsqueeze(-1) * of_sum)


@pytest.mark.parametrize("recipe", ["olmoe", "gpt_oss", "llama4", "jetmoe", "deepseek_v3"])
def test_outputs_of_other_experts(recipe: str) -> None:
    """What `outputs_of` says another expert would give is what it gives when it is chosen."""
    model = with_points(recipe)
    layer = model.moe_layers[0]
    others = torch.arange(model.top_k).expand(2, 6, -1)
    said: list[Tensor] = []
    weights: list[Tensor] = []
    given: list[Tensor] = []
    force = (hook_names.topk_indices(layer), lambda value, hook: others.clone())
    note = (hook_names.topk_weights(layer), lambda value, hook: weights.append(value))
    run(model, [force, note, (hook_names.expert_out(layer), lambda value, hook: given.append(value))])

    def ask(value: Tensor, hook: Any) -> None:
        said.append(hook.outputs_of(others, weights[0]))

    run(model, [(hook_names.expert_out(layer), ask)])
    torch.testing.assert_close(said[0], given[0])
    point: Any = installed_points(routing_layers(model)[layer]).expert_out
    with pytest.raises(HookError, match="only within a hook"):
        point.outputs_of(others)


def test_points_follow_a_deep_copy_and_go_with_detach() -> None:
    model = with_points("olmoe")
    plain = run(model)
    twin = copy.deepcopy(model)
    changed = run(twin, on_all(twin, lambda value, hook: value * 0))
    assert not torch.equal(changed, plain)
    assert torch.equal(run(model), plain)
    bridge = detach(model)
    assert not any("expert_out" in name or "router_logits" in name for name in bridge.hook_dict)


def test_hooks_in_generation_see_every_step() -> None:
    model = with_points("mixtral")
    lengths: list[int] = []
    with model.hooks(on_all(model, lambda value, hook: lengths.append(value.shape[1]))):
        model.generate(prompt(4), max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert lengths == [5, 5, 1, 1, 1, 1]  # two layers each


def test_hooks_are_gone_after_an_exception_in_a_hook() -> None:
    model = with_points("olmoe")
    plain = run(model)

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, on_all(model, fail))
    assert torch.equal(run(model), plain)
    with pytest.raises(HookError, match="shape"):
        run(model, on_all(model, lambda value, hook: value[..., :3]))
    assert torch.equal(run(model), plain)


def test_training_mode_is_refused() -> None:
    model = with_points("olmoe").train()
    with pytest.raises(HookError, match="training mode"):
        run(model, on_all(model, unchanged))


def test_experts_that_do_not_add_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    experts: Any = routing_layers(model)[1].experts
    own = experts.forward
    monkeypatch.setattr(experts, "forward", lambda hidden, indices, weights: own(hidden, indices, weights**2))
    model.set_use_expert_out(True)  # weights² of unit weights are 1
    with pytest.raises(HookError, match=r"blocks\.1\.mlp.*do not add up"):
        run(model, on_all(model, unchanged))


def test_blocks_that_loop_over_their_experts_are_refused() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    routing_layers(model)[2].block.experts = nn.ModuleList([nn.Linear(2, 2)])
    names = set(model.hook_dict)
    with pytest.raises(HookError, match=r"blocks\.2\.mlp.*no module that runs all its experts"):
        model.set_use_expert_out(True)
    assert set(model.hook_dict) == names
    assert not model.use_expert_out


def test_experts_whose_router_did_not_run_are_refused() -> None:
    model = with_points("olmoe")
    moe = routing_layers(model)[0]
    assert moe.experts is not None
    with model.hooks(on_all(model, unchanged)), pytest.raises(HookError, match="without its router"):
        moe.experts(torch.zeros(1, 32), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3))
