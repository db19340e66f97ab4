"""register_rule from end to end: a model with a router of one's own gets hook points and steering.

Bad arguments are also tried in test_routing_rules.py, together with the rest of the table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lens import RoutingRule, SteeringPlan, hook_names, register_rule, steer_hooks
from moe_lens.errors import HookError, MoELensError, PlanError, RouterMismatchError, UnsupportedRouterError
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.model.layers import find_moe_layers
from moe_lens.model.self_check import check_router
from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.routers.table import RULES
from moe_lens.routers.transform import steer_raw_logits
from tests.tiny_models import plain_bridge, router_of, sparse_blocks, tiny_model, tokenizer, tokens

EVERY_OLMOE_LAYER = (0, 1, 2)
N_EXPERTS, TOP_K = 6, 3


@pytest.fixture(autouse=True)
def rows() -> Iterator[None]:
    """Take out again what a test registers."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class TemperedRouter(nn.Module):
    """Sigmoids of logits over a temperature, the k largest, shared out by their squares."""

    def __init__(self, like: Any, temperature: float = 1.7) -> None:
        super().__init__()
        self.matrix = nn.Parameter(like.weight.detach().clone())
        self.k, self.temperature = like.top_k, temperature

    def forward(self, hidden: Tensor) -> Any:
        logits = F.linear(hidden, self.matrix)
        scores, indices = torch.sigmoid(logits.float() / self.temperature).topk(self.k, dim=-1)
        weights = scores**2 / (scores**2).sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), indices


@dataclass(frozen=True, eq=False)
class Tempered(RoutingRule):
    n_experts: int
    top_k: int
    temperature: float

    def select(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits.float() / self.temperature).topk(self.top_k, dim=-1).indices

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        scores = torch.sigmoid(logits.float() / self.temperature).gather(-1, indices)
        return (scores**2 / (scores**2).sum(-1, keepdim=True)).to(logits.dtype)


def tempered(router: Any) -> Tempered:
    return Tempered(router.matrix.shape[0], router.k, router.temperature)


def with_routers(make: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny OLMoE whose routers are those that `make` gives for its own."""
    model = tiny_model("olmoe", dtype)
    for block in sparse_blocks(model).values():
        any_block: Any = block
        any_block.gate = make(router_of(block)).to(dtype)
    return model.eval()


def tempered_model(dtype: torch.dtype = torch.float32) -> Any:
    return with_routers(TemperedRouter, dtype)


# From end to end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_a_router_of_ones_own_is_hooked(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedRouterError, match=r"TemperedRouter.*register_rule"):
        HookedMoE.from_hf(tempered_model(dtype))
    register_rule("TemperedRouter", tempered)
    bare = tempered_model(dtype)
    with torch.no_grad():
        expected = bare(tokens()).logits
    model = HookedMoE.from_hf(tempered_model(dtype), tokenizer())
    assert model.moe_layers == EVERY_OLMOE_LAYER
    assert (model.n_experts, model.top_k) == (N_EXPERTS, TOP_K)
    assert model.routing_rule(1) == Tempered(N_EXPERTS, TOP_K, 1.7)
    plain = plain_bridge(tempered_model(dtype))
    assert torch.equal(model(tokens()), plain(tokens()))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    scale = float(expected.abs().max())
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=tolerance * scale)

    logits, cache = model.run_with_cache(tokens())
    assert torch.equal(logits, plain(tokens()))
    for layer in EVERY_OLMOE_LAYER:
        router: Any = router_of(sparse_blocks(model.original_model)[layer])
        seen = cache[f"blocks.{layer}.mlp.hook_in"].flatten(0, 1)
        theirs = router(seen)
        for name, value in zip(("router_logits", "topk_weights", "topk_indices"), theirs, strict=True):
            assert torch.equal(cache[name, layer].flatten(0, 1), value)


def test_an_edit_of_the_logits_reroutes_as_the_router_itself_would() -> None:
    register_rule("TemperedRouter", tempered)
    model = HookedMoE.from_hf(tempered_model())
    point = hook_names.router_logits(1)
    edited = model.run_with_hooks(tokens(), fwd_hooks=[(point, lambda logits, hook: -logits)])
    other = tempered_model()
    with torch.no_grad():
        router_of(sparse_blocks(other)[1]).matrix.neg_()  # logits are linear in it
        expected = other(tokens()).logits
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(edited, model(tokens()))


@pytest.mark.parametrize(
    ("activate", "deactivate"), [([2], []), ([], [0, 4]), ([1, 3], [0, 5]), ([0, 1, 2], [3, 4, 5])]
)
def test_steering_keeps_its_guarantee(activate: list[int], deactivate: list[int]) -> None:
    register_rule("TemperedRouter", tempered)
    model = HookedMoE.from_hf(tempered_model())
    plan = SteeringPlan(
        [(layer, expert) for layer in EVERY_OLMOE_LAYER for expert in activate],
        [(layer, expert) for layer in EVERY_OLMOE_LAYER for expert in deactivate],
    )
    with model.hooks(steer_hooks(plan)):
        _, cache = model.run_with_cache(tokens())
    for layer in EVERY_OLMOE_LAYER:
        indices = cache["topk_indices", layer]
        assert all((indices == expert).any(-1).all() for expert in activate)
        assert not any((indices == expert).any() for expert in deactivate)


def test_detach_and_attach_work() -> None:
    register_rule("TemperedRouter", tempered)
    model = HookedMoE.from_hf(tempered_model())
    before = model(tokens())
    assert torch.equal(attach(detach(model))(tokens()), before)


def test_the_live_router_is_read_at_every_run() -> None:
    register_rule("TemperedRouter", tempered)
    model = HookedMoE.from_hf(tempered_model())
    router_of(sparse_blocks(model.original_model)[0]).temperature = 0.3
    assert model.routing_rule(0) == Tempered(N_EXPERTS, TOP_K, 0.3)
    unhooked = model(tokens())
    hooked = model.run_with_hooks(tokens(), fwd_hooks=[(hook_names.topk_indices(0), lambda i, hook: i)])
    assert torch.equal(hooked, unhooked)


def test_a_wrong_rule_is_caught_by_the_self_check() -> None:
    register_rule("TemperedRouter", lambda router: Tempered(router.matrix.shape[0], router.k, 1.6))
    model = tempered_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(RouterMismatchError, match=r"model\.layers\.0\.mlp: TemperedRouter .*weights differ"):
        HookedMoE.from_hf(model)
    assert [name for name, _ in model.named_modules()] == names
    register_rule("TemperedRouter", lambda router: Tempered(router.matrix.shape[0], 2, 1.7), replace=True)
    with pytest.raises(RouterMismatchError, match="indices have shape"):
        HookedMoE.from_hf(model)
    register_rule("TemperedRouter", tempered, order=("indices", "weights", "logits"), replace=True)
    with pytest.raises(RouterMismatchError):
        HookedMoE.from_hf(model)


# A rule that does not choose by the order of logits


class ContraryRouter(TemperedRouter):
    def forward(self, hidden: Tensor) -> Any:
        logits = F.linear(hidden, self.matrix)
        indices = (-logits).topk(self.k, dim=-1).indices
        return logits, torch.full_like(indices, 0.25, dtype=logits.dtype), indices


@dataclass(frozen=True, eq=False)
class Contrary(RoutingRule):
    """The k smallest logits, all with weight a quarter."""

    n_experts: int
    top_k: int

    def select(self, logits: Tensor) -> Tensor:
        return (-logits).topk(self.top_k, dim=-1).indices

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return torch.full_like(indices, 0.25, dtype=logits.dtype)


@dataclass(frozen=True, eq=False)
class ContraryButSteerable(Contrary):
    def steer(
        self, logits: Tensor, activate: Sequence[int], deactivate: Sequence[int], epsilon: float
    ) -> tuple[Tensor, RoutingRule]:
        return steer_raw_logits(logits, deactivate, activate, epsilon), self


@dataclass(frozen=True, eq=False)
class ContraryAndStubborn(Contrary):
    def cannot_steer(self, activate: Sequence[int], deactivate: Sequence[int]) -> str | None:
        return "it does not want to"


@pytest.mark.parametrize("plan", [SteeringPlan([(1, 2)]), SteeringPlan([], [(1, 2)])], ids=["in", "out"])
def test_steering_that_would_break_its_promise_raises(plan: SteeringPlan) -> None:
    register_rule("ContraryRouter", lambda router: Contrary(router.matrix.shape[0], router.k))
    model = HookedMoE.from_hf(with_routers(ContraryRouter))
    before = model(tokens())
    with pytest.raises(HookError, match=r"Contrary does not choose by the order of logits.*\[2\].*`steer`"):
        model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(plan))
    assert torch.equal(model(tokens()), before)


def test_a_steer_method_of_its_own_makes_it_steerable() -> None:
    register_rule("ContraryRouter", lambda router: ContraryButSteerable(router.matrix.shape[0], router.k))
    model = HookedMoE.from_hf(with_routers(ContraryRouter))
    with model.hooks(steer_hooks(SteeringPlan([(1, 2)], [(1, 0)]))):
        _, cache = model.run_with_cache(tokens())
    assert (cache["topk_indices", 1] == 2).any(-1).all()
    assert not (cache["topk_indices", 1] == 0).any()


def test_a_rule_that_says_that_it_cannot_is_asked_before_the_run() -> None:
    register_rule("ContraryRouter", lambda router: ContraryAndStubborn(router.matrix.shape[0], router.k))
    model = HookedMoE.from_hf(with_routers(ContraryRouter))
    with pytest.raises(PlanError, match="Layer 1 cannot be steered by this plan: it does not want to"):
        model.add_hook(*steer_hooks(SteeringPlan([(1, 2)]))[0])


# Parameters in the block, other orders, further arguments


class BlockBiasedRouter(TemperedRouter):
    """Logits with a bias, which the block holds and hands over."""

    def forward(self, hidden: Tensor, bias: Tensor | None = None) -> Any:
        logits = F.linear(hidden, self.matrix)
        indices = (logits.float() if bias is None else logits.float() + bias).topk(self.k, dim=-1).indices
        return indices, logits, logits.sigmoid().gather(-1, indices)


@dataclass(frozen=True, eq=False)
class BlockBiased(RoutingRule):
    n_experts: int
    top_k: int
    bias: Tensor

    def select(self, logits: Tensor) -> Tensor:
        return (logits.float() + self.bias).topk(self.top_k, dim=-1).indices

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return logits.sigmoid().gather(-1, indices)


def biased_forward(block: Any, hidden: Tensor) -> Tensor:
    indices, _, weights = block.gate(hidden.flatten(0, 1), block.level)
    return block.experts(hidden.flatten(0, 1), indices, weights).view(hidden.shape)


def block_biased_model() -> Any:
    model = with_routers(BlockBiasedRouter)
    for number, block in sparse_blocks(model).items():
        block.register_buffer("level", torch.linspace(-2, 2, N_EXPERTS).roll(number))
        block.__class__ = type("MyBlock", (type(block),), {"forward": biased_forward})
    return model


def block_biased(router: Any, block: Any) -> BlockBiased:
    return BlockBiased(router.matrix.shape[0], router.k, block.level)


ORDER = ("indices", "logits", "weights")


def test_a_factory_of_two_arguments_an_order_and_inputs_work_together() -> None:
    register_rule(
        "BlockBiasedRouter", block_biased, order=ORDER, inputs=lambda block, hidden: (hidden, block.level)
    )
    bare = block_biased_model()
    with torch.no_grad():
        expected = bare(tokens()).logits
    model = HookedMoE.from_hf(block_biased_model())
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-4)
    for spell in (hook_names.router_logits, hook_names.topk_indices, hook_names.topk_weights):
        hooks: Any = [(spell(layer), lambda value, hook: value.clone()) for layer in EVERY_OLMOE_LAYER]
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), model(tokens()))
    _, cache = model.run_with_cache(tokens())
    for layer in EVERY_OLMOE_LAYER:
        level: Any = sparse_blocks(model.original_model)[layer].level
        best = (cache["router_logits", layer] + level).topk(TOP_K).indices
        assert torch.equal(cache["topk_indices", layer], best)
    # the bias overrules the logits, so steering them alone cannot promise anything
    with pytest.raises(HookError, match="BlockBiased does not choose by the order of logits"):
        model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(SteeringPlan([(0, 0)])))


@pytest.mark.parametrize(
    "given",
    [{"order": ORDER}, {"inputs": lambda block, hidden: (hidden, block.level)}],
    ids=["order", "inputs"],
)
def test_both_are_needed(given: dict[str, Any]) -> None:
    register_rule("BlockBiasedRouter", block_biased, **given)
    with pytest.raises(RouterMismatchError, match=r"model\.layers\.0\.mlp: BlockBiasedRouter"):
        HookedMoE.from_hf(block_biased_model())


def test_inputs_get_the_hidden_states() -> None:
    asked: list[int] = []

    def inputs(block: Any, hidden: Tensor) -> tuple[Any, ...]:
        asked.append(len(hidden))
        return hidden, block.level

    register_rule("BlockBiasedRouter", block_biased, order=ORDER, inputs=inputs)
    for moe in find_moe_layers(block_biased_model()):
        check_router(moe)
    assert set(asked) == {1024}


# Names


def test_replace_puts_another_rule_in_place_and_subclasses_inherit_it() -> None:
    register_rule("TemperedRouter", lambda router: SoftmaxTopK(N_EXPERTS, router.k, renormalize=True))
    with pytest.raises(MoELensError, match="has a rule already; pass replace=True"):
        register_rule("TemperedRouter", tempered)
    with pytest.raises(RouterMismatchError):
        HookedMoE.from_hf(tempered_model())
    register_rule("TemperedRouter", tempered, replace=True)
    child = type("ChildRouter", (TemperedRouter,), {})
    assert HookedMoE.from_hf(with_routers(child)).routing_rule(0) == Tempered(N_EXPERTS, TOP_K, 1.7)


def test_a_shipped_rule_is_taken_and_can_be_replaced() -> None:
    with pytest.raises(MoELensError, match="OlmoeTopKRouter has a rule already"):
        register_rule("OlmoeTopKRouter", tempered)
    register_rule("OlmoeTopKRouter", lambda router: SoftmaxTopK(N_EXPERTS, TOP_K, True), replace=True)
    with pytest.raises(RouterMismatchError, match="OlmoeTopKRouter"):
        HookedMoE.from_hf(tiny_model("olmoe"))


def no_arguments() -> Any: ...


def three_arguments(router: Any, block: Any, config: Any) -> Any: ...


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "a class": ((TemperedRouter, tempered), {}, "name of a class"),
    "no name": (("", tempered), {}, "name of a class"),
    "a path": (("my.TemperedRouter", tempered), {}, "name of a class"),
    "no function": (("MyRouter", 3), {}, "must be a function of the live router"),
    "a rule": (("MyRouter", SoftmaxTopK(6, 3, True)), {}, "must be a function of the live router"),
    "no argument": (("MyRouter", no_arguments), {}, "must be a function of the live router"),
    "three arguments": (("MyRouter", three_arguments), {}, "must be a function of the live router"),
    "two names": (("MyRouter", tempered), {"order": ("logits", "weights")}, "each once"),
    "one twice": (("MyRouter", tempered), {"order": ("logits", "logits", "weights")}, "each once"),
    "another name": (("MyRouter", tempered), {"order": ("logits", "weights", "experts")}, "each once"),
    "no inputs": (("MyRouter", tempered), {"inputs": 3}, "inputs must be a function"),
}


@pytest.mark.parametrize(("args", "kwargs", "words"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_and_register_nothing(
    args: tuple[Any, ...], kwargs: dict[str, Any], words: str
) -> None:
    before = dict(RULES)
    with pytest.raises((MoELensError, TypeCheckError)) as error:
        register_rule(*args, **kwargs)
    if isinstance(error.value, MoELensError):
        assert words in str(error.value)
    assert before == RULES


@pytest.mark.parametrize("result", [None, "a rule", SoftmaxTopK])
def test_a_factory_that_gives_no_rule_is_named(result: Any) -> None:
    register_rule("TemperedRouter", lambda router: result)
    with pytest.raises((MoELensError, TypeCheckError)) as error:
        HookedMoE.from_hf(tempered_model())
    assert "TemperedRouter gave" in str(error.value)
