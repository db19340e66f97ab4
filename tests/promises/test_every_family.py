"""The promises of README and CONTRIBUTING, on a tiny model of every supported family.

Oracles: TransformerLens' plain bridge, bit for bit; and tests/router_oracle.py, Hugging Face's own router
code fed with the edited logits inside such a plain bridge, bit for bit too.
"""

import copy
import gc
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import HookError, PlanError
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.statistics.routing_stats import RoutingStats, is_routing_point
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests import router_oracle as oracle
from tests.tiny_models import (
    EVERY_FAMILY,
    ONE_OF_EACH_KIND,
    hook_census,
    plain_bridge,
    save,
    tiny_model,
    tokenizer,
    tokens,
)

Hooked = Callable[..., HookedMoE]
Plain = Callable[..., TransformerBridge]
Layers = dict[int, list[int]]
every_family = pytest.mark.parametrize("recipe", EVERY_FAMILY)
one_of_each_kind = pytest.mark.parametrize("recipe", ONE_OF_EACH_KIND)
in_both_dtypes = pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        *(pytest.param(name, torch.float32, id=f"{name}-float32") for name in EVERY_FAMILY),
        *(pytest.param(name, torch.bfloat16, id=f"{name}-bfloat16") for name in ONE_OF_EACH_KIND),
    ],
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SPELLERS = (hook_names.router_logits, hook_names.topk_indices, hook_names.topk_weights)
SCALES = (0.3, 2.0, 10.0)
LLAMA4 = ("llama4", "llama4_vl")


@pytest.fixture(scope="module")
def plain() -> Plain:
    """`plain("olmoe", torch.bfloat16)`: TransformerLens' own bridge around the same weights, built once."""

    @cache
    def build(recipe: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
        bridge = plain_bridge(tiny_model(recipe, dtype), tokenizer())
        bridge.run_with_cache(tokens(1, 2))  # transformers puts hooks of its own at the first such run
        gc.freeze()  # the collector need not look at all these models again and again
        return bridge

    return build


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():  # tests of gradients switch them on
        yield


def same(value: Tensor, hook: HookPoint) -> Tensor:
    return value


def on_all_points(model: HookedMoE, function: Any) -> list[Any]:
    return [(spell(layer), function) for layer in model.moe_layers for spell in SPELLERS]


def on_logits(edit: oracle.Edit, *layers: int) -> list[Any]:
    return [(hook_names.router_logits(layer), lambda z, hook: edit(z)) for layer in layers]


def shuffle(scale: float, seed: int = 0, n_tokens: int | None = None) -> oracle.Edit:
    """Rolls the experts and adds noise: for each of `n_tokens` tokens its own, or the same for all."""

    def edit(logits: Tensor) -> Tensor:
        rows = 1 if n_tokens is None else n_tokens
        noise = scale * torch.randn(
            rows, logits.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )
        rolled = logits.roll(1, dims=-1)
        noise = noise if n_tokens is None else noise.reshape(logits.shape)
        return rolled + noise.to(logits.dtype)

    return edit


def roll(logits: Tensor) -> Tensor:
    return logits.roll(1, dims=-1)


def padded() -> tuple[Tensor, dict[str, Any]]:
    """Left-padded tokens [3 8] and their mask; the rows have 8, 5 and 2 tokens of their own."""
    mask = torch.arange(8) >= torch.tensor([[0], [3], [6]])
    return tokens(3, 8).masked_fill(~mask, 0), {"attention_mask": mask.long()}


def routing(cache_or_dict: Any, layer: int) -> oracle.Decision:
    return oracle.by_expert(*(cache_or_dict[spell(layer)] for spell in SPELLERS))


def assert_decided(actual: oracle.Decision, expected: oracle.Decision) -> None:
    for name, ours, theirs in zip(expected._fields, actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def generate(model: TransformerBridge, length: int = 4) -> Tensor:
    """The tokens of a greedy generation with cache, prompt included."""
    generated = model.generate(
        tokens(2, 4), max_new_tokens=length, do_sample=False, stop_at_eos=False, verbose=False
    )
    assert isinstance(generated, Tensor)
    return generated


def given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def hf_model(bridge: TransformerBridge) -> Any:
    return bridge.original_model


# Nothing hooked, nothing changed


@in_both_dtypes
def test_unhooked_it_is_the_plain_bridge_bit_for_bit(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    ours, theirs = hooked(recipe, dtype), plain(recipe, dtype)
    input_ids, mask = padded()
    assert torch.equal(ours(tokens()), theirs(tokens()))
    assert torch.equal(ours(input_ids, **mask), theirs(input_ids, **mask))
    assert torch.equal(ours(tokens(), return_type="loss"), theirs(tokens(), return_type="loss"))


@one_of_each_kind
def test_attach_to_a_plain_bridge_changes_no_bit_in_float16(recipe: str) -> None:
    bridge = plain_bridge(tiny_model(recipe, torch.float16))
    before = bridge(tokens())
    assert torch.isfinite(before).all()
    assert attach(bridge) is bridge
    assert isinstance(bridge, HookedMoE)
    assert torch.equal(bridge(tokens()), before)
    assert torch.equal(bridge.run_with_hooks(tokens(), fwd_hooks=on_all_points(bridge, same)), before)
    edit = shuffle(3.0, n_tokens=14)
    rerouted = bridge.run_with_hooks(tokens(), fwd_hooks=on_logits(edit, *bridge.moe_layers))
    with oracle.rerouted(hf_model(detach(bridge)), edit):
        assert torch.equal(rerouted, bridge(tokens()))
    assert not torch.equal(rerouted, before)


@one_of_each_kind
def test_gradients_are_those_of_the_plain_bridge(hooked: Hooked, plain: Plain, recipe: str) -> None:
    def gradients(bridge: TransformerBridge, hooks: list[Any]) -> dict[str, Tensor | None]:
        parameters = {n: p for n, p in hf_model(bridge).named_parameters() if p.requires_grad}
        with torch.enable_grad(), bridge.hooks(hooks):
            loss = bridge(tokens(), return_type="loss")
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    model = hooked(recipe)
    expected = gradients(plain(recipe), [])
    unhooked, identity = gradients(model, []), gradients(model, on_all_points(model, same))
    embedding = next(name for name in expected if "embed_tokens" in name or "embeddings" in name)
    assert expected[embedding] is not None
    for name, gradient in expected.items():
        if gradient is None:
            assert unhooked[name] is identity[name] is None
        else:
            assert torch.equal(given(unhooked[name]), gradient), name
            assert_near(given(identity[name]), gradient, 1e-6)


# Hooks that change nothing


@in_both_dtypes
def test_identity_hooks_and_caching_change_no_bit(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    expected, their_cache = plain(recipe, dtype).run_with_cache(tokens())
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=on_all_points(model, same)), expected)
    output, our_cache = model.run_with_cache(tokens())
    assert torch.equal(output, expected)
    for name, value in their_cache.items():
        assert torch.equal(our_cache[name], value), name


@in_both_dtypes
def test_the_points_have_their_names_shapes_and_dtypes(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare = hooked(recipe, dtype), plain(recipe, dtype)
    _, ours = model.run_with_cache(tokens())
    _, theirs = bare.run_with_cache(tokens())
    layers = oracle.routers(hf_model(bare))
    assert model.moe_layers == tuple(layers)
    assert set(ours.keys()) - set(theirs.keys()) == {
        f"blocks.{layer}.{mlp}{point}"
        for layer in layers
        for mlp in ("mlp.", "")
        for point in hook_names.POINTS
    }
    seen: oracle.Seen = {}
    with oracle.rerouted(hf_model(bare), {}, seen):
        bare(tokens())
    for layer, (decided,) in seen.items():
        n_experts, k = decided.logits.shape[-1], int(decided.chosen[0].sum())
        logits, indices, weights = (ours[spell(layer)] for spell in SPELLERS)
        assert logits.shape == (2, 7, n_experts)
        assert indices.shape == weights.shape == (2, 7, k)
        assert indices.dtype == torch.int64
        assert (n_experts, k) == (model.n_experts, model.top_k)
        assert_decided(routing(ours, layer), decided)
        for spell, point in zip(SPELLERS, ("router_logits", "topk_indices", "topk_weights"), strict=True):
            assert torch.equal(ours[point, layer], ours[spell(layer)])


@every_family
def test_a_layer_without_router_has_no_points(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    parsed = [hook_names.parse(name) for name in model.hook_dict]
    assert {found[0] for found in parsed if found} == set(model.moe_layers)
    for layer in {*range(model.cfg.n_layers + 1)} - set(model.moe_layers):
        with pytest.raises(HookError, match="no router"):
            model.run_with_hooks(tokens(), fwd_hooks=[(hook_names.router_logits(layer), same)])


# Edited logits re-route as the architecture's own router does


@in_both_dtypes
def test_edited_logits_reroute_as_hf_would(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare = hooked(recipe, dtype), plain(recipe, dtype)
    unedited = bare(tokens())
    for seed, scale in enumerate(SCALES):
        edit, seen = shuffle(scale, seed, n_tokens=14), cast(oracle.Seen, {})
        with model.hooks(on_logits(edit, *model.moe_layers)):
            actual, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
        with oracle.rerouted(hf_model(bare), edit, seen):
            expected = bare(tokens())
        for layer, (decided,) in seen.items():
            assert_decided(routing(cache, layer), decided)
        assert torch.equal(actual, expected)
        assert not torch.equal(actual, unedited)


@one_of_each_kind
def test_each_layer_has_its_own_point(hooked: Hooked, plain: Plain, recipe: str) -> None:
    model, bare = hooked(recipe), plain(recipe)
    for layer in model.moe_layers:
        with oracle.rerouted(hf_model(bare), {layer: roll}):
            expected = bare(tokens())
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=on_logits(roll, layer)), expected)
        assert not torch.equal(expected, bare(tokens()))


@one_of_each_kind
def test_edited_logits_reroute_as_in_a_bare_hf_model(hooked: Hooked, recipe: str) -> None:
    model, bare, edit = hooked(recipe), tiny_model(recipe), shuffle(1.0)
    actual = model.run_with_hooks(tokens(), fwd_hooks=on_logits(edit, *model.moe_layers))
    with oracle.rerouted(bare, edit):
        assert_near(actual, bare(input_ids=tokens(), use_cache=False).logits)


@in_both_dtypes
def test_edited_logits_reroute_under_left_padding(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare, edit = hooked(recipe, dtype), plain(recipe, dtype), shuffle(2.0, n_tokens=24)
    input_ids, mask = padded()
    actual = model.run_with_hooks(input_ids, fwd_hooks=on_logits(edit, *model.moe_layers), **mask)
    with oracle.rerouted(hf_model(bare), edit):
        assert torch.equal(actual, bare(input_ids, **mask))


@in_both_dtypes
def test_edited_logits_reroute_in_every_cached_step(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare, edit = hooked(recipe, dtype), plain(recipe, dtype), shuffle(2.0)
    ours: list[dict[str, Tensor]] = []

    def keep(value: Tensor, hook: HookPoint) -> None:
        if not ours or str(hook.name) in ours[-1]:
            ours.append({})
        ours[-1][str(hook.name)] = value.clone()

    with model.hooks(on_logits(edit, *model.moe_layers) + on_all_points(model, keep)):
        generated = generate(model)
    seen: oracle.Seen = {}
    with oracle.rerouted(hf_model(bare), edit, seen):
        assert torch.equal(generated, generate(bare))
    for layer, decisions in seen.items():
        assert [len(each.logits) for each in decisions] == [8, 2, 2, 2]
        for step, decided in zip(ours, decisions, strict=True):
            assert_decided(routing(step, layer), decided)


@every_family
def test_the_gradient_at_the_logits_is_that_of_hfs_router(hooked: Hooked, plain: Plain, recipe: str) -> None:
    model, bare = hooked(recipe), plain(recipe)

    def gradients(run: Callable[[dict[int, oracle.Edit]], Tensor]) -> list[Tensor]:
        deltas = {n: torch.zeros(14, model.n_experts, requires_grad=True) for n in model.moe_layers}
        with torch.enable_grad():
            loss = run({n: lambda z, d=delta: roll(z) + d.reshape(z.shape) for n, delta in deltas.items()})
        return list(torch.autograd.grad(loss, list(deltas.values())))

    def hooked_loss(edits: dict[int, oracle.Edit]) -> Tensor:
        hooks = [hook for layer, edit in edits.items() for hook in on_logits(edit, layer)]
        return model.run_with_hooks(tokens(), fwd_hooks=hooks, return_type="loss")

    def oracle_loss(edits: dict[int, oracle.Edit]) -> Tensor:
        with oracle.rerouted(hf_model(bare), edits):
            return bare(tokens(), return_type="loss")

    for actual, expected in zip(gradients(hooked_loss), gradients(oracle_loss), strict=True):
        assert expected.abs().max() > 0
        assert_near(actual, expected)


@one_of_each_kind
def test_gradients_reach_the_logits_in_bfloat16(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe, torch.bfloat16)
    for layer in model.moe_layers:
        delta = torch.zeros(2, 7, model.n_experts, requires_grad=True)
        with torch.enable_grad():
            hooks = on_logits(lambda z, delta=delta: z + delta.to(z.dtype), layer)
            loss = model.run_with_hooks(tokens(), fwd_hooks=hooks, return_type="loss")
        (gradient,) = torch.autograd.grad(loss, delta)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


# Edited indices and weights


def weights_of_any_experts(router: Any, logits: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    """HF's weights for experts that its router did not choose: [token expert], [token k] -> [token k].

    From the same router choosing all experts, and divided by the chosen ones' sum if that is what it does.
    """
    if type(router).__name__ == "PhimoeTopKRouter":
        return sparsemixer_weights(logits, indices, router.router_jitter_noise)
    every = oracle.decide(router, logits, *rest, top_k=logits.shape[-1]).weights
    scale = getattr(router, "per_expert_scale", torch.ones(logits.shape[-1]))
    few = oracle.decide(router, logits, *rest).weights
    totals = torch.stack([(each / scale).sum(-1) for each in (every, few)])
    chosen = (every / scale).gather(-1, indices)
    if torch.allclose(totals, totals[0, 0].expand_as(totals), rtol=1e-4):  # it divides by their sum
        chosen = chosen / chosen.sum(-1, keepdim=True) * totals[0, 0]
    return chosen * scale[indices]


def sparsemixer_weights(logits: Tensor, indices: Tensor, jitter: float) -> Tensor:
    rows = []
    for z, chosen in zip(logits.tolist(), indices.tolist(), strict=True):
        row, left = [], dict(enumerate(z))
        for expert in chosen:
            highest = max(left.values())
            near = {
                other: value
                for other, value in left.items()
                if other == expert or (highest - value) / max(abs(value), highest) <= 2 * jitter
            }
            powers = {other: torch.tensor(value - highest).exp() for other, value in near.items()}
            row.append(powers[expert] / sum(powers.values()))
            del left[expert]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def other_experts(logits: Tensor, k: int, seed: int = 0) -> Tensor:
    """Random experts, none twice: [*batch k]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(logits.shape, generator=generator).argsort(dim=-1)[..., :k]


def is_hash(router: Any) -> bool:
    return type(router).__name__ == "DeepseekV4HashRouter"


@every_family
def test_edited_indices_get_the_weights_of_hfs_router(hooked: Hooked, plain: Plain, recipe: str) -> None:
    model, bare = hooked(recipe), hf_model(plain(recipe))
    for layer, router in oracle.routers(bare).items():
        rest = oracle.arguments(bare, layer, tokens())
        if is_hash(router):  # it weighs as its neighbour does
            router, rest = oracle.routers(bare)[layer + 1], ()
        wanted = other_experts(torch.zeros(2, 7, model.n_experts), model.top_k)
        with model.hooks([(hook_names.topk_indices(layer), lambda i, hook, wanted=wanted: wanted)]):
            _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
        assert torch.equal(cache[hook_names.topk_indices(layer)], wanted)
        logits = cache[hook_names.router_logits(layer)].flatten(0, 1)
        expected = weights_of_any_experts(router, logits, wanted.flatten(0, 1), *rest)
        assert_near(cache[hook_names.topk_weights(layer)].flatten(0, 1), expected)


class Block:
    """The MoE block of the last layer that has one, with experts and weights of our choice."""

    def __init__(self, model: HookedMoE):
        self.model, self.layer = model, model.moe_layers[-1]
        block = oracle.moe_block(hf_model(model), self.layer)
        gemma = type(oracle.routers(hf_model(model))[self.layer]).__name__ == "Gemma4TextRouter"
        self.block = getattr(block.experts, "original_component", block.experts) if gemma else block
        self.input = torch.empty(0)

    def output(self, indices: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """What the block (Gemma 4: its experts) gives for the tokens, [token d_model]."""
        given = {hook_names.topk_indices(self.layer): indices, hook_names.topk_weights(self.layer): weights}
        hooks: list[Any] = [
            (name, lambda old, hook, new=new: new.reshape(old.shape).to(old.dtype))
            for name, new in given.items()
            if new is not None
        ]
        outputs: list[Any] = []

        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.input = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2).clone()
            outputs.append(output)

        handle = self.block.register_forward_hook(note, with_kwargs=True)
        self.model.run_with_hooks(tokens(), fwd_hooks=hooks)
        handle.remove()
        output = outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]
        return output.flatten(0, -2).clone()


@pytest.mark.parametrize("recipe", [each for each in EVERY_FAMILY if each not in LLAMA4])
def test_the_block_adds_weight_times_output_of_each_chosen_expert(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    block, (n_experts, k) = Block(model), (model.n_experts, model.top_k)
    zero, first = torch.zeros(14, k), torch.eye(k)[0].expand(14, k)
    rest = block.output(weights=zero)  # what is there without routed experts
    alone = torch.stack(
        [
            block.output((torch.arange(k) + expert).remainder(n_experts).expand(14, k), first) - rest
            for expert in range(n_experts)
        ]
    )  # [expert token d_model]
    assert alone.abs().amax(dim=(1, 2)).min() > 0

    def expected(indices: Tensor, weights: Tensor) -> Tensor:
        of_slots = alone[indices, torch.arange(14)[:, None]]  # [token k d_model]
        return rest + (weights[..., None] * of_slots).sum(dim=1)

    _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    own = [cache[spell(block.layer)].flatten(0, 1) for spell in SPELLERS[1:]]
    assert_near(block.output(), expected(own[0], own[1]))  # no hook: HF's own code
    wanted = other_experts(torch.zeros(14, n_experts), k)
    weights = torch.randn(14, k, generator=torch.Generator().manual_seed(1))
    assert_near(block.output(wanted, weights), expected(wanted, weights))


@pytest.mark.parametrize("recipe", LLAMA4)
def test_the_weights_of_llama4_multiply_each_experts_input(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    block, k = Block(model), model.top_k
    experts = block.block.experts
    experts = getattr(experts, "original_component", experts)

    def expected(indices: Tensor, weights: Tensor) -> Tensor:
        total = rest.clone()
        for token, (chosen, scales) in enumerate(zip(indices.tolist(), weights, strict=True)):
            for expert, scale in zip(chosen, scales, strict=True):
                gate, up = (scale * block.input[token] @ experts.gate_up_proj[expert]).chunk(2)
                total[token] += (gate / (1 + torch.exp(-gate)) * up) @ experts.down_proj[expert]
        return total

    rest = block.output(weights=torch.zeros(14, k))
    _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    own = [cache[spell(block.layer)].flatten(0, 1) for spell in SPELLERS[1:]]
    assert_near(block.output(), expected(own[0], own[1]))
    wanted = other_experts(torch.zeros(14, model.n_experts), k)
    weights = torch.rand(14, k, generator=torch.Generator().manual_seed(1))
    assert_near(block.output(wanted, weights), expected(wanted, weights))


# A hook that could not fire raises


@one_of_each_kind
def test_hooks_in_training_mode_are_refused(hooked: Hooked, recipe: str) -> None:
    model = copy.deepcopy(hooked(recipe)).train()
    for spell in SPELLERS:
        with pytest.raises(HookError, match="training mode"):
            model.run_with_hooks(tokens(), fwd_hooks=[(spell(model.moe_layers[-1]), same)])
    assert torch.equal(model.eval()(tokens()), hooked(recipe)(tokens()))


@one_of_each_kind
def test_a_block_that_bypasses_its_router_is_refused(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    for layer in model.moe_layers:
        block = oracle.moe_block(hf_model(model), layer)

        def fused(*args: Any, **kwargs: Any) -> Any:
            return args[0] if args else kwargs["hidden_states"]

        with (
            patch.object(block, "forward", fused),
            pytest.raises(HookError, match=rf"blocks\.{layer}\.mlp.*without calling its router"),
        ):
            model.run_with_hooks(tokens(), fwd_hooks=on_logits(roll, layer))


# Attach, detach, copies


@every_family
def test_detach_leaves_no_trace(hooked: Hooked, plain: Plain, recipe: str) -> None:
    model: Any = copy.deepcopy(hooked(recipe))
    bare: Any = copy.deepcopy(plain(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detach(model) is model
    assert type(model) is TransformerBridge
    assert set(model.hook_dict) == set(bare.hook_dict)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in bare.named_modules()]
    assert hook_census(model) == hook_census(bare)
    for ours, theirs in zip(model.blocks, bare.blocks, strict=True):
        assert set(vars(ours)) == set(vars(theirs))
        assert ours.hook_aliases == theirs.hook_aliases
        assert hasattr(ours, "mlp") == hasattr(theirs, "mlp")
    for router in oracle.routers(hf_model(model)).values():
        assert "forward" not in vars(router)
    output, cache = model.run_with_cache(tokens())
    expected, their_cache = bare.run_with_cache(tokens())
    assert torch.equal(output, expected)
    assert set(cache.keys()) == set(their_cache.keys())


@one_of_each_kind
def test_attach_after_detach_gives_the_points_back(hooked: Hooked, recipe: str) -> None:
    model = attach(detach(copy.deepcopy(hooked(recipe))))
    hooks = on_logits(roll, *model.moe_layers)
    assert set(model.hook_dict) == set(hooked(recipe).hook_dict)
    expected = hooked(recipe).run_with_hooks(tokens(), fwd_hooks=hooks)
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)


@one_of_each_kind
def test_a_deep_copy_has_points_of_its_own(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    before, clone, hooks = model(tokens()), copy.deepcopy(model), on_logits(roll, *model.moe_layers)
    edited = model.run_with_hooks(tokens(), fwd_hooks=hooks)
    with clone.hooks(hooks):
        assert torch.equal(clone(tokens()), edited)
        assert torch.equal(model(tokens()), before)
    with model.hooks(hooks):
        assert torch.equal(clone(tokens()), before)
    detach(clone)
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), edited)


# Steering


def group_limit(router: Any) -> tuple[int, int]:
    """Number of groups, and of how many of them experts may come."""
    if not hasattr(router, "topk_group") or getattr(router, "topk_method", "") == "greedy":
        return 1, 1
    return router.num_group, router.topk_group


def is_feasible(router: Any, n_experts: int, k: int, activate: list[int], deactivate: list[int]) -> bool:
    """Whether some choice of groups holds all activated experts and k that are not deactivated."""
    n_groups, n_chosen = group_limit(router)
    size = n_experts // n_groups
    for groups in itertools.combinations(range(n_groups), n_chosen):
        inside = [expert for expert in range(n_experts) if expert // size in groups]
        if set(activate) <= set(inside) and len(set(inside) - set(deactivate)) >= k:
            return True
    return False


def draw(generator: random.Random, n_experts: int, k: int, most: bool) -> tuple[list[int], list[int]]:
    """Random experts to activate and to deactivate, as many as possible if `most`."""
    n_activate = k if most else generator.randint(0, k)
    n_deactivate = n_experts - k if most else generator.randint(0, n_experts - k)
    experts = generator.sample(range(n_experts), n_activate + n_deactivate)
    return experts[:n_activate], experts[n_activate:]


def feasible_plan(model: HookedMoE, seed: int) -> SteeringPlan:
    """Every layer but hash layers is steered; with every third seed as much as possible."""
    generator, (n_experts, k) = random.Random(seed), (model.n_experts, model.top_k)
    activate, deactivate = [], []
    for layer, router in oracle.routers(hf_model(model)).items():
        if is_hash(router):
            continue
        drawn = (draw(generator, n_experts, k, seed % 3 == 0) for _ in itertools.count())
        ups, downs = next(each for each in drawn if is_feasible(router, n_experts, k, *each))
        activate += [(layer, expert) for expert in ups]
        deactivate += [(layer, expert) for expert in downs]
    epsilon = (0.01, 0.0001, 3.0)[seed % 3]
    return SteeringPlan(activate, deactivate, epsilon, shape=model.moe_shape)


class Obeyed:
    """Hooks that hold every forward's choice of experts against a plan."""

    def __init__(self, plan: SteeringPlan):
        self.plan, self.n_forwards = plan, 0
        layers = sorted({layer for layer, _ in (*plan.activate, *plan.deactivate)})
        self.hooks: list[Any] = [(hook_names.topk_indices(layer), self._check) for layer in layers]

    def _check(self, indices: Tensor, hook: HookPoint) -> None:
        layer = int(str(hook.name).split(".")[1])
        self.n_forwards += 1
        for steered, expert in self.plan.activate:
            assert steered != layer or (indices == expert).any(-1).all()
        for steered, expert in self.plan.deactivate:
            assert steered != layer or not (indices == expert).any()
        assert (indices.sort(-1).values.diff() > 0).all()  # no expert twice


@in_both_dtypes
def test_steering_keeps_its_guarantee_on_every_token(hooked: Hooked, recipe: str, dtype: torch.dtype) -> None:
    model = hooked(recipe, dtype)
    before, (input_ids, mask) = model(tokens()), padded()
    for seed in range(3):
        plan = feasible_plan(model, seed)
        obeyed = Obeyed(plan)
        with model.hooks(steer_hooks(plan) + obeyed.hooks):
            assert torch.isfinite(model(tokens(2, 7, seed))).all()
            model(input_ids, **mask)
        assert obeyed.n_forwards == 2 * len(obeyed.hooks) > 0
    assert torch.equal(model(tokens()), before)
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(SteeringPlan())), before)


@one_of_each_kind
@both_dtypes
def test_steering_holds_in_generation_with_and_without_cache(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    plan = feasible_plan(model, 1)
    obeyed = Obeyed(plan)
    with model.hooks(steer_hooks(plan) + obeyed.hooks):
        cached = generate(model)
        grown = tokens(2, 4)
        for _ in range(4):
            grown = torch.cat([grown, model(grown)[:, -1:].argmax(-1)], dim=1)
    assert obeyed.n_forwards == 8 * len(obeyed.hooks)
    if dtype == torch.float32:  # in half precision cached and whole passes round differently
        assert torch.equal(cached, grown)


@every_family
def test_what_groups_of_experts_exclude_is_refused_before_the_run(hooked: Hooked, recipe: str) -> None:
    model, generator = hooked(recipe), random.Random(5)
    before, (n_experts, k) = hook_census(model), (model.n_experts, model.top_k)
    refused = 0
    for layer, router in oracle.routers(hf_model(model)).items():
        for attempt in range(12):
            ups, downs = draw(generator, n_experts, k, attempt % 2 == 0)
            plan = SteeringPlan([(layer, up) for up in ups], [(layer, down) for down in downs])
            if len(plan) and (is_hash(router) or not is_feasible(router, n_experts, k, ups, downs)):
                refused += 1
                with pytest.raises(PlanError, match=f"Layer {layer} cannot be steered"):
                    model.run_with_hooks(None, fwd_hooks=steer_hooks(plan))
            else:
                with model.hooks(steer_hooks(plan)):
                    pass
    limited = [is_hash(r) or group_limit(r) != (1, 1) for r in oracle.routers(hf_model(model)).values()]
    assert (refused > 0) == any(limited)
    assert hook_census(model) == before


def ranks(router: Any, logits: Tensor, *rest: Any) -> Tensor:
    """HF's order of preference in no groups, [token expert], best is 0: it chooses 1, 2, 3... experts."""
    n_experts = logits.shape[-1]
    if type(router).__name__ == "PhimoeTopKRouter":  # always two; without groups or biases
        return logits.argsort(-1, descending=True).argsort(-1)
    chosen = [oracle.decide(router, logits, *rest, top_k=k + 1).chosen for k in range(n_experts)]
    return n_experts - torch.stack(chosen).sum(0)


@one_of_each_kind
@pytest.mark.parametrize("seed", [0, 1])
def test_steering_keeps_the_others_in_their_order(
    hooked: Hooked, plain: Plain, recipe: str, seed: int
) -> None:
    model = hooked(recipe)
    layer, router = list(oracle.routers(hf_model(plain(recipe))).items())[-1]
    rest = oracle.arguments(hf_model(plain(recipe)), layer, tokens())
    whole = feasible_plan(model, seed)
    ups, downs = (
        [expert for number, expert in part if number == layer] for part in (whole.activate, whole.deactivate)
    )
    plan = SteeringPlan([(layer, up) for up in ups], [(layer, down) for down in downs], whole.epsilon)
    _, unsteered = model.run_with_cache(tokens(), names_filter=is_routing_point)
    with model.hooks(steer_hooks(plan)):
        _, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)
    logits = unsteered[hook_names.router_logits(layer)].flatten(0, 1)
    order, (_, weights, chosen) = ranks(router, logits, *rest), routing(cache, layer)
    others = [expert for expert in range(model.n_experts) if expert not in ups + downs]
    n_groups, n_chosen = group_limit(router)
    size = model.n_experts // n_groups
    for rank, picked in zip(order.tolist(), chosen.tolist(), strict=True):
        groups = {expert // size for expert, is_in in enumerate(picked) if is_in}
        inside = [expert for expert in others if expert // size in groups]
        assert len(groups) <= n_chosen
        best = sorted(inside, key=lambda expert: rank[expert])[: model.top_k - len(ups)]
        assert {expert for expert, is_in in enumerate(picked) if is_in} == {*ups, *best}
    change = (cache[hook_names.router_logits(layer)].flatten(0, 1) - logits)[:, others]
    if type(model.routing_rule(layer)).__name__ in ("SigmoidTopK", "TopKSigmoid", "SparseMixer"):
        assert torch.equal(change, torch.zeros_like(change))
    elif others:  # nats of log-probability
        torch.testing.assert_close(change, change[:, :1].expand_as(change), rtol=0, atol=1e-4)
    assert ((weights > 0) == chosen).all()


# Statistics and loading


@every_family
def test_statistics_count_what_hfs_routers_chose(hooked: Hooked, plain: Plain, recipe: str) -> None:
    model, bare, seen = hooked(recipe), plain(recipe), cast(oracle.Seen, {})
    input_ids, mask = padded()
    _, cache = model.run_with_cache(input_ids, **mask)
    stats = RoutingStats.from_cache(cache)
    with oracle.rerouted(hf_model(bare), {}, seen):
        bare(input_ids, **mask)
    own = mask["attention_mask"].bool().flatten()
    assert stats.shape == model.moe_shape
    assert stats.n_tokens == int(own.sum())
    for row, (layer, (decided,)) in enumerate(seen.items()):
        assert stats.shape.layers[row] == layer
        assert torch.equal(stats.counts[row], decided.chosen[own].sum(0))
        torch.testing.assert_close(stats.weight_sums[row], decided.weights[own].double().sum(0))


@pytest.mark.parametrize(
    "recipe", [each for each in EVERY_FAMILY if not each.endswith("_vl") and each != "qwen3_vl_moe"]
)
def test_from_pretrained_gives_the_saved_model(hooked: Hooked, recipe: str, tmp_path: Path) -> None:
    in_memory = hooked(recipe)
    model = HookedMoE.from_pretrained(save(tiny_model(recipe), tmp_path / "tiny-moe", tokenizer()))
    assert isinstance(model, HookedMoE)
    assert model.moe_shape == replace(in_memory.moe_shape, model="tiny-moe")
    assert not model.training
    for hooks in ([], on_logits(roll, *model.moe_layers)):  # another attention implementation may serve here
        expected = in_memory.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert_near(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)


@pytest.mark.parametrize("recipe", ["afmoe", "deepseek_v3", "ernie4_5_moe", "gemma4", "laguna", "minimax_m2"])
def test_parameters_that_the_rule_needs_may_be_offloaded_to_disk(recipe: str, tmp_path: Path) -> None:
    folder = save(tiny_model(recipe), tmp_path / "model", tokenizer())
    in_memory = HookedMoE.from_pretrained(folder)
    trunk: Any = in_memory.original_model.model
    device_map = {f"model.{name}": "cpu" for name, _ in trunk.named_children() if name != "layers"}
    device_map |= {f"model.layers.{n}": "disk" if n else "cpu" for n in range(in_memory.cfg.n_layers)}
    device_map["lm_head"] = "cpu"
    model = HookedMoE.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    layers = in_memory.moe_layers
    steered = steer_hooks(SteeringPlan([(n, 3) for n in layers], [(n, 0) for n in layers]))
    for hooks in ([], steered, on_logits(roll, *layers)):
        expected = in_memory.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)


@one_of_each_kind
@both_dtypes
def test_logits_that_a_later_hook_puts_back_undo_the_plan(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    layers = [n for n in model.moe_layers if model.routing_rule(n).cannot_steer([3], [0]) is None]
    clean, cache = model.run_with_cache(tokens(), names_filter=is_routing_point)

    def put_back(logits: Tensor, hook: HookPoint) -> Tensor:
        return cache[str(hook.name)]

    hooks: list[Any] = steer_hooks(SteeringPlan([(n, 3) for n in layers], [(n, 0) for n in layers]))
    assert not torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), clean)
    hooks += [(hook_names.router_logits(n), put_back) for n in layers]
    assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), clean)


def test_a_router_alone_in_training_mode_is_refused() -> None:
    model = HookedMoE.from_hf(tiny_model("phimoe"))
    model.run_with_cache(tokens())
    for router in (module for module in model.modules() if type(module).__name__ == "PhimoeTopKRouter"):
        router.train()
    with pytest.raises(HookError, match="training mode"):
        model.run_with_cache(tokens())
