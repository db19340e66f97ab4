"""Published methods on odd models, put together: plans a prompt, positions, noise, generation, spans.

Models with dense layers between, correction biases and groups; the formulas are written out as loops.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lens import (
    RoutedModel,
    SteeringPlan,
    collect_by_prompt,
    is_routing_point,
    noisy_routes,
    saliency,
    steer_hooks,
)
from moe_lens.interventions.noise import noise_at
from tests.tiny_models import prompt, router_of, sparse_blocks, tiny_model, tokenizer

Hooked = Callable[..., Any]
TEXTS = [prompt(5, 1), prompt(3, 2), prompt(6, 3)]


def routed(model: Any, texts: Any, hooks: Any = ()) -> Any:
    with torch.no_grad(), model.hooks(list(hooks)):
        _, cache = model.run_with_cache(texts, names_filter=is_routing_point)
    return cache


def softened(z: Tensor, chosen: list[int], up: list[int], down: list[int], strength: float) -> list[float]:
    """Only where the router does otherwise; z of one token."""
    numbers = [float(value) for value in z]
    mean = sum(numbers) / len(numbers)
    std = (sum((value - mean) ** 2 for value in numbers) / len(numbers)) ** 0.5
    moved = list(numbers)
    for expert in range(len(numbers)):
        if expert in up and expert not in chosen:
            moved[expert] += strength * std
        if expert in down and expert in chosen:
            moved[expert] -= strength * std
    return moved


@pytest.mark.parametrize(("recipe", "dtype"), [("deepseek_v3", torch.bfloat16), ("qwen3_moe", torch.float32)])
def test_soft_plans_a_prompt_beside_noise(hooked: Hooked, recipe: str, dtype: Any) -> None:
    """The plan's step is of the noisy logits, at its positions of each prompt's own tokens only."""
    model = hooked(recipe, dtype)
    first = model.moe_layers[0]
    shared: dict[str, Any] = {"strength": 0.8, "only_unmet": True}
    ones, others = (
        SteeringPlan([(first, 1)], [(first, 2)], **shared),
        SteeringPlan([], [(first, 0)], **shared),
    )
    noise = noisy_routes({first: 0.6}, seed=3, positions=[0, 1])
    hooks = [*noise, *steer_hooks([ones, None, others], positions=[0, -1])]
    plain, noisy, got = (routed(model, TEXTS, each) for each in ((), noise, hooks))
    width = plain["router_logits", first].shape[1]
    lengths = [model.to_tokens(text).shape[1] for text in TEXTS]
    for row, (length, up, down) in enumerate(zip(lengths, ([1], [], []), ([2], [], [0]), strict=True)):
        for pos in range(length):
            column = width - length + pos
            z = plain["router_logits", first][row, column].double()
            if pos < 2:
                places = torch.tensor([[pos]])
                z = z + 0.6 * noise_at(3, first, torch.tensor([row]), places, model.n_experts)[0, 0].double()
            if pos in (0, length - 1):
                chosen = noisy["topk_indices", first][row, column].tolist()
                z = torch.tensor(softened(z, chosen, up, down, 0.8), dtype=torch.float64)
            found = got["router_logits", first][row, column].double()
            rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.03)
            torch.testing.assert_close(found, z, rtol=rtol, atol=atol)


@pytest.mark.parametrize("recipe", ["deepseek_v3", "qwen3_moe"])
def test_a_plan_a_prompt_under_noise_holds_while_a_model_writes(recipe: str) -> None:
    """With a cache and without: the same tokens; the deactivated expert runs for its own prompt's never."""
    model: Any = RoutedModel(tiny_model(recipe), tokenizer())
    layer = model.moe_layers[-1]
    noise = noisy_routes(1.5, seed=2)
    usual = routed(model, TEXTS, noise)["topk_indices", layer]
    busy = [int(row.flatten().bincount().argmax()) for row in usual]
    plans = [SteeringPlan(deactivate=[(layer, busy[0])]), None, SteeringPlan(deactivate=[(layer, busy[2])])]
    hooks = [*noise, *steer_hooks(plans)]
    given = model.to_tokens(TEXTS)
    options = {
        "attention_mask": (given != 0).long(), "max_new_tokens": 5, "do_sample": False,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    seen: list[Tensor] = []
    watch = (f"blocks.{layer}.mlp.hook_topk_indices", lambda value, hook: seen.append(value.clone()))
    with torch.no_grad(), model.hooks([*hooks, watch]):
        written = model.original_model.generate(given, **options)
    assert len(seen) == 5
    for part in seen:
        assert not bool((part[0] == busy[0]).any())
        assert not bool((part[2] == busy[2]).any())
    assert any(bool((part[1] == busy[1]).any()) for part in seen)
    with torch.no_grad(), model.hooks(hooks):
        again = model.original_model.generate(given, use_cache=False, **options)
    assert torch.equal(written, again)


def routers_inputs(model: Any, text: str, hooks: Any) -> tuple[dict[int, Tensor], Any]:
    """What each router reads [pos d_model], and the routing."""
    inputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, args: inputs.__setitem__(layer, args[0].reshape(-1, 32))

    blocks = sparse_blocks(model.original_model)
    handles = [router_of(block).register_forward_pre_hook(keep(layer)) for layer, block in blocks.items()]
    cache = routed(model, text, hooks)
    for handle in handles:
        handle.remove()
    return inputs, cache


@pytest.mark.parametrize("recipe", ["deepseek_v3", "qwen3_moe"])
def test_reap_of_a_span_under_a_plan(recipe: str) -> None:
    """Each chosen expert's output from its own matrices: mean of g · ‖down(silu(gate) · up)‖."""
    hf_model = tiny_model(recipe)
    model: Any = RoutedModel(hf_model, tokenizer())
    plan = SteeringPlan(deactivate=[(layer, 1) for layer in model.moe_layers])
    hooks, texts = steer_hooks(plan), [prompt(6, seed) for seed in (4, 5)]
    found = saliency(
        collect_by_prompt(model, texts, span=slice(2, None), hooks=hooks, outputs=True, progress=False),
        "reap",
    )
    sums = torch.zeros(len(model.moe_layers), model.n_experts, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for text in texts:
        inputs, cache = routers_inputs(model, text, hooks)
        for row, (layer, block) in enumerate(sparse_blocks(hf_model).items()):
            experts: Any = block.experts
            for pos in range(2, len(inputs[layer])):
                x = inputs[layer][pos].double()
                for expert, weight in zip(
                    cache["topk_indices", layer][0, pos].tolist(),
                    cache["topk_weights", layer][0, pos].tolist(),
                    strict=True,
                ):
                    gate, up = (experts.gate_up_proj[expert].double() @ x).chunk(2)
                    out = experts.down_proj[expert].double() @ (F.silu(gate) * up)
                    sums[row, expert] += weight * float(out.detach().norm())
                    counts[row, expert] += 1
    assert bool((counts[:, 1] == 0).all())
    expected = torch.where(counts > 0, sums / counts.clamp(min=1), 0.0)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-6)
