"""Hook points in the routers of bare Hugging Face models: installing, uninstalling, refusing."""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import RoutedModel, SteeringPlan, steer_hooks
from moe_lens.errors import HookError, MoELensError
from moe_lens.model.layers import MoELayer, find_moe_layers
from moe_lens.model.points import RoutingPoints
from moe_lens.model.router_points import install, points_of, uninstall
from moe_lens.model.running import Running
from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.shape import MoEShape
from tests.families import core_family, every_recipe
from tests.tiny_models import (
    MOE_LAYERS,
    N_EXPERTS,
    TOP_K,
    hook_census,
    router_of,
    sparse_blocks,
    tiny_model,
    tokens,
)


def with_points(recipe: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[RoutingPoints]]:
    """A tiny model with points in every router; the points get the names that a bridge would give them."""
    model = tiny_model(recipe, dtype)
    shape = MoEShape(recipe, MOE_LAYERS[recipe], N_EXPERTS[recipe], TOP_K[recipe])
    return model, [install(moe, shape, Running()) for moe in find_moe_layers(model)]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


# Installing and uninstalling


@every_recipe
def test_points_without_hooks_change_nothing(recipe: str) -> None:
    model, _ = with_points(recipe)
    assert torch.equal(logits_of(model), logits_of(tiny_model(recipe)))


@core_family
def test_without_hooks_hfs_own_code_runs_and_the_rule_does_not(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(recipe)
    router_class, calls = type(router_of(next(iter(sparse_blocks(model).values())))), []
    original = router_class.forward

    def counted(self: Any, hidden_states: Tensor) -> Any:
        calls.append(self)
        return original(self, hidden_states)

    def forbidden(*args: Any) -> Any:
        raise AssertionError("the rule ran")

    monkeypatch.setattr(router_class, "forward", counted)
    layers = list(find_moe_layers(model))
    for moe in layers:
        install(moe, MoEShape("m", (0,), N_EXPERTS[recipe], TOP_K[recipe]), Running())
    monkeypatch.setattr(SoftmaxTopK, "select", forbidden)
    monkeypatch.setattr(SoftmaxTopK, "weigh", forbidden)
    logits_of(model)
    assert calls == [moe.router for moe in layers]


@core_family
def test_uninstall_leaves_no_trace(recipe: str) -> None:
    model, _ = with_points(recipe)
    for moe in find_moe_layers(model):
        assert points_of(moe) is not None
        uninstall(moe)
        assert points_of(moe) is None
        assert "forward" not in vars(moe.router)
    assert hook_census(model) == {}
    assert torch.equal(logits_of(model), logits_of(tiny_model(recipe)))


def test_uninstall_gives_back_a_forward_that_was_on_the_instance() -> None:
    moe = next(find_moe_layers(tiny_model("olmoe")))
    original = type(moe.router).forward
    own = MethodType(lambda self, hidden: original(self, hidden), moe.router)
    moe.router.forward = own
    install(moe, MoEShape("m", (0,), 6, 3), Running())
    uninstall(moe)
    assert vars(moe.router)["forward"] is own


def test_uninstall_does_nothing_where_nothing_is_installed() -> None:
    model = tiny_model("olmoe")
    for moe in find_moe_layers(model):
        uninstall(moe)
    assert torch.equal(logits_of(model), logits_of(tiny_model("olmoe")))


def test_points_can_be_installed_again() -> None:
    model, _ = with_points("olmoe")
    moe = next(find_moe_layers(model))
    uninstall(moe)
    points = install(moe, MoEShape("m", (0,), 6, 3), Running())
    points.topk_weights.add_hook(lambda weights, hook: 0 * weights)
    assert not torch.equal(logits_of(model), logits_of(tiny_model("olmoe")))


def test_hooks_see_batch_and_position() -> None:
    model, points = with_points("qwen3_moe")
    seen: list[tuple[torch.Size, torch.dtype]] = []
    for point in (points[0].router_logits, points[0].topk_indices, points[0].topk_weights):
        point.add_hook(lambda value, hook: seen.append((value.shape, value.dtype)))
    model(tokens(batch=3, pos=5))
    assert seen == [
        (torch.Size([3, 5, 9]), torch.float32),
        (torch.Size([3, 5, 3]), torch.int64),
        (torch.Size([3, 5, 3]), torch.float32),
    ]


def test_a_copy_of_the_model_has_points_of_its_own() -> None:
    model, points = with_points("olmoe")
    before = logits_of(model)
    clone = copy.deepcopy(model)
    copied = points_of(next(find_moe_layers(clone)))
    assert copied is not None
    assert copied is not points[0]
    copied.topk_weights.add_hook(lambda weights, hook: 0 * weights)
    assert not torch.equal(logits_of(clone), before)
    assert torch.equal(logits_of(model), before)


def test_uninstalling_from_a_copy_leaves_the_original_hooked() -> None:
    model, points = with_points("olmoe")
    before = logits_of(model)
    clone = copy.deepcopy(model)
    for moe in find_moe_layers(clone):
        uninstall(moe)
    assert hook_census(clone) == {}
    assert torch.equal(logits_of(clone), before)
    points[0].topk_weights.add_hook(lambda weights, hook: 0 * weights)
    assert not torch.equal(logits_of(model), before)


# A hook that could not fire raises


@core_family
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_hooks_in_training_mode_are_refused(recipe: str, direction: Any) -> None:
    model, points = with_points(recipe)
    points[-1].topk_weights.add_hook(lambda value, hook: None, dir=direction)
    model.train()
    with pytest.raises(HookError, match="training mode") as error:
        model(tokens())
    assert f"model.layers.{MOE_LAYERS[recipe][-1]}.mlp" in str(error.value)
    assert "eval()" in str(error.value)


def test_training_mode_without_hooks_works() -> None:
    model, _ = with_points("olmoe")
    assert torch.equal(logits_of(model.train()), logits_of(tiny_model("olmoe").train()))


@core_family
def test_a_block_that_bypasses_its_router_is_refused(recipe: str) -> None:
    model, points = with_points(recipe)
    block = sparse_blocks(model)[MOE_LAYERS[recipe][-1]]
    block.forward = lambda hidden: hidden  # a fused kernel
    before = logits_of(model)  # nothing hooked, nothing to refuse
    handle = points[-1].router_logits.add_hook(lambda value, hook: None)
    with pytest.raises(HookError, match="without calling its router") as error:
        model(tokens())
    assert f"model.layers.{MOE_LAYERS[recipe][-1]}.mlp" in str(error.value)
    handle.hook.remove()
    assert torch.equal(logits_of(model), before)


def test_under_plans_a_block_that_later_bypasses_its_router_is_refused() -> None:
    """After the first forward nothing of torch's watches the block any more."""
    model = RoutedModel(tiny_model("olmoe"))
    block = sparse_blocks(model.original_model)[1]
    router = router_of(block)
    with model.hooks(steer_hooks(SteeringPlan(deactivate=[(0, 0), (1, 1)]))):
        steered = model(tokens())
        block.forward = lambda hidden: hidden  # a fused kernel
        with pytest.raises(HookError, match=r"blocks\.1\.mlp.*without calling its router"):
            model(tokens())
        del block.forward
        assert torch.equal(model(tokens()), steered)
        stands, router.forward = router.forward, MethodType(type(router).forward, router)
        with pytest.raises(HookError, match="without calling its router"):
            model(tokens())
        router.forward = stands
        assert torch.equal(model(tokens()), steered)


def test_a_router_whose_forward_was_replaced_after_attaching_is_refused() -> None:
    model, points = with_points("olmoe")
    router = router_of(sparse_blocks(model)[0])
    router.forward = MethodType(type(router).forward, router)
    points[0].router_logits.add_hook(lambda value, hook: None)
    with pytest.raises(HookError, match="without calling its router"):
        model(tokens())


def test_a_hooked_router_called_without_its_block_is_refused() -> None:
    model, points = with_points("olmoe")
    logits_of(model)
    router = router_of(sparse_blocks(model)[0])
    router(torch.randn(4, 32))  # nothing hooked, nothing to refuse
    points[0].router_logits.add_hook(lambda value, hook: None)
    with pytest.raises(HookError, match="run the whole model"):
        router(torch.randn(4, 32))


def test_a_hook_asks_whether_it_fits_before_it_is_added() -> None:
    class Misfit:
        def check_fits(self, shape: MoEShape) -> None:
            raise MoELensError(f"made for another model than {shape.model}")

        def __call__(self, value: Tensor, hook: Any) -> None: ...

    _, points = with_points("olmoe")
    with pytest.raises(MoELensError, match="another model than olmoe"):
        points[0].router_logits.add_hook(Misfit())
    assert points[0].mode == "off"


# Hooks that return what the router cannot use


BAD_RETURNS: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "one expert too few": ("router_logits", lambda x: x[..., 1:], r"shape \(2, 7, 5\)|\(2, 7, 5\)"),
    "flat logits": ("router_logits", lambda x: x.flatten(0, 1), r"\(14, 6\)"),
    "a scalar tensor": ("router_logits", lambda x: x.sum(), r"\(\)"),
    "one index too many": ("topk_indices", lambda x: torch.cat([x, x[..., :1]], -1), r"\(2, 7, 4\)"),
    "weights without batch": ("topk_weights", lambda x: x[0], r"\(7, 3\)"),
    "no tensor": ("router_logits", lambda x: 0.0, "float"),
    "a tuple": ("topk_weights", lambda x: (x, x), "tuple"),
    "integer logits": ("router_logits", lambda x: x.long(), r"torch\.int64"),
    "float indices": ("topk_indices", lambda x: x.float(), r"torch\.float32"),
    "boolean logits": ("router_logits", lambda x: x > 0, r"torch\.bool"),
    "boolean indices": ("topk_indices", lambda x: x > 0, r"torch\.bool"),
    "integer weights": ("topk_weights", lambda x: x.long(), r"torch\.int64"),
    "an expert too high": ("topk_indices", lambda x: 0 * x + 6, "expert 6.*experts 0 to 5"),
    "a negative expert": ("topk_indices", lambda x: 0 * x - 1, "expert -1.*experts 0 to 5"),
}


@pytest.mark.parametrize(("point", "bad", "words"), BAD_RETURNS.values(), ids=BAD_RETURNS)
def test_a_return_that_cannot_be_used_is_refused(
    point: str, bad: Callable[[Tensor], Any], words: str
) -> None:
    model, points = with_points("olmoe")
    getattr(points[1], point).name = "here"
    getattr(points[1], point).add_hook(lambda value, hook: bad(value))
    with pytest.raises(HookError, match=words) as error:
        model(tokens())
    assert "here" in str(error.value)


BAD_LOGITS: dict[str, tuple[Any, Any, float]] = {
    "one NaN": ((1, 4), 2, float("nan")),
    "one +inf": ((1, 4), 2, float("inf")),
    "a row of -inf": ((1, 4), slice(None), -float("inf")),
}


@core_family
@pytest.mark.parametrize(("token", "expert", "value"), BAD_LOGITS.values(), ids=BAD_LOGITS)
def test_logits_that_leave_no_weights_are_refused(recipe: str, token: Any, expert: Any, value: float) -> None:
    def spoil(logits: Tensor, hook: Any) -> Tensor:
        logits = logits.clone()
        logits[(*token, expert)] = value
        return logits

    model, points = with_points(recipe)
    points[-1].router_logits.add_hook(spoil)
    says = r"NaN or infinite on 1 token\(s\), first at \[batch, pos\] \[1, 4\]"
    with pytest.raises(HookError, match=says) as error:
        model(tokens())
    assert f"model.layers.{MOE_LAYERS[recipe][-1]}.mlp" in str(error.value)


@pytest.mark.parametrize("factor", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(factor: str) -> None:
    model, points = with_points("olmoe")
    points[0].topk_weights.add_hook(lambda weights, hook: weights * float(factor))
    with pytest.raises(HookError, match=r"NaN or infinite on 14 token\(s\)"):
        model(tokens())


def test_int32_indices_are_as_good_as_int64() -> None:
    model, points = with_points("olmoe")
    before = logits_of(model)
    points[0].topk_indices.add_hook(lambda indices, hook: indices.to(torch.int32))
    assert torch.equal(logits_of(model), before)


def test_logits_in_a_wider_dtype_are_taken() -> None:
    model, points = with_points("olmoe", torch.bfloat16)
    points[0].router_logits.add_hook(lambda logits, hook: logits.double())
    assert logits_of(model).dtype == torch.bfloat16
    assert torch.isfinite(logits_of(model)).all()


def test_a_refused_run_does_not_spoil_the_next() -> None:
    model, points = with_points("olmoe")
    before = logits_of(model)
    handle = points[1].topk_indices.add_hook(lambda indices, hook: indices + 100)
    with pytest.raises(HookError):
        model(tokens())
    handle.hook.remove()
    points[1].topk_indices.fwd_hooks.clear()
    assert torch.equal(logits_of(model), before)


def test_moe_layer_reads_points_of_its_own_router_only() -> None:
    first, second, _ = find_moe_layers(tiny_model("olmoe"))
    points = install(first, MoEShape("m", (0,), 6, 3), Running())
    assert points_of(MoELayer("x", first.block, first.router)) is points
    assert points_of(second) is None
