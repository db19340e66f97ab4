"""On every family: edited logits re-route as the architecture's own router does, and gradients reach them.

The oracle is tests/router_oracle.py: Hugging Face's own router code, fed with the edited logits inside a
plain bridge, bit for bit.
"""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from moe_lens.statistics.routing_stats import is_routing_point
from tests import router_oracle as oracle
from tests.edits import on_logits, roll
from tests.families import every_family_in_every_dtype, half_precision, in_every_dtype, one_of_each_kind
from tests.promises.decisions import (
    SCALES,
    Hooked,
    Plain,
    assert_decided,
    assert_near,
    generate,
    hf_model,
    on_all_points,
    padded,
    routing,
    shuffle,
)
from tests.tiny_models import (
    ONE_OF_EACH_KIND,
    tiny_model,
    tokens,
)

pytestmark = pytest.mark.usefixtures("no_gradients")


@every_family_in_every_dtype
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


@in_every_dtype(float32=ONE_OF_EACH_KIND)
def test_each_layer_has_its_own_point(hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype) -> None:
    model, bare = hooked(recipe, dtype), plain(recipe, dtype)
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


@every_family_in_every_dtype
def test_edited_logits_reroute_under_left_padding(
    hooked: Hooked, plain: Plain, recipe: str, dtype: torch.dtype
) -> None:
    model, bare, edit = hooked(recipe, dtype), plain(recipe, dtype), shuffle(2.0, n_tokens=24)
    input_ids, mask = padded()
    actual = model.run_with_hooks(input_ids, fwd_hooks=on_logits(edit, *model.moe_layers), **mask)
    with oracle.rerouted(hf_model(bare), edit):
        assert torch.equal(actual, bare(input_ids, **mask))


@every_family_in_every_dtype
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


@one_of_each_kind
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
@half_precision
def test_gradients_reach_the_logits_in_half_precision(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    for layer in model.moe_layers:
        delta = torch.zeros(2, 7, model.n_experts, requires_grad=True)
        with torch.enable_grad():
            hooks = on_logits(lambda z, delta=delta: z + delta.to(z.dtype), layer)
            loss = model.run_with_hooks(tokens(), fwd_hooks=hooks, return_type="loss")
        (gradient,) = torch.autograd.grad(loss, delta)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0
