"""Rules against Hugging Face's own routers (bit for bit) and against formulas written otherwise."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_lens.errors import MoELensError, UnsupportedRouterError
from moe_lens.routing_rules import RULES, SoftmaxTopK, is_known_router, rule_for
from tests import oracle

D_MODEL = 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTERS = {  # name -> (class, norm_topk_prob)
    "olmoe": (OlmoeTopKRouter, False),
    "olmoe_norm": (OlmoeTopKRouter, True),
    "mixtral": (MixtralTopKRouter, None),
    "qwen2_moe": (Qwen2MoeTopKRouter, False),
    "qwen2_moe_norm": (Qwen2MoeTopKRouter, True),
    "qwen3_moe": (Qwen3MoeTopKRouter, False),
    "qwen3_moe_norm": (Qwen3MoeTopKRouter, True),
}


class Fields:
    """A config: just attributes."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


def make_router(name: str, n_experts: int = 7, top_k: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    router_class, norm = ROUTERS[name]
    config = Fields(
        num_experts=n_experts,
        num_local_experts=n_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm,
        hidden_size=D_MODEL,
    )
    router = router_class(config)
    nn.init.normal_(router.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return router.to(dtype)


def hidden_states(dtype: torch.dtype = torch.float32, n: int = 300, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(2))).to(dtype)


every_router = pytest.mark.parametrize("name", ROUTERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_router
@every_dtype
@pytest.mark.parametrize(("n_experts", "top_k"), [(7, 1), (7, 3), (5, 5), (64, 8)])
@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_equals_hf_bit_for_bit(
    name: str, dtype: torch.dtype, n_experts: int, top_k: int, scale: float
) -> None:
    router = make_router(name, n_experts, top_k, dtype)
    logits, weights, indices = router(hidden_states(dtype, scale=scale))
    rule = rule_for(router)
    assert torch.equal(rule.select(logits), indices)
    ours = rule.weigh(logits, indices)
    assert ours.dtype == weights.dtype
    assert torch.equal(ours, weights)


@every_router
def test_gradient_equals_hf_bit_for_bit(name: str) -> None:
    router = make_router(name)
    readout = torch.randn(300, 3, generator=torch.Generator().manual_seed(3))
    ours, theirs = (hidden_states().requires_grad_() for _ in range(2))
    (router(theirs)[1] * readout).sum().backward()
    logits, rule = nn.functional.linear(ours, router.weight), rule_for(router)
    (rule.weigh(logits, rule.select(logits)) * readout).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.abs().max() > 0
    assert torch.equal(ours.grad, theirs.grad)


@every_router
def test_equals_the_formula(name: str) -> None:
    router = make_router(name)
    logits = router(hidden_states(n=40))[0]
    rule = rule_for(router)
    indices, weights = oracle.route(logits[None], 3, renormalise=ROUTERS[name][1] is not False)
    assert torch.equal(rule.select(logits[None]), indices)
    torch.testing.assert_close(rule.weigh(logits[None], indices).double(), weights, atol=1e-6, rtol=1e-6)


@every_router
def test_weighs_experts_that_are_not_the_top_k(name: str) -> None:
    router = make_router(name)
    logits = router(hidden_states(n=40))[0]
    indices = torch.stack([torch.randperm(7)[:3] for _ in range(40)])
    expected = torch.stack(
        [
            oracle.weigh(z, i.tolist(), ROUTERS[name][1] is not False)
            for z, i in zip(logits, indices, strict=True)
        ]
    )
    ours = rule_for(router).weigh(logits, indices)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


def test_mixtral_weights_stay_float32_and_the_others_take_the_logits_dtype() -> None:
    logits = hidden_states(torch.bfloat16)[:, :7]
    for name, expected in [("mixtral", torch.float32), ("olmoe_norm", torch.bfloat16)]:
        rule = rule_for(make_router(name, dtype=torch.bfloat16))
        assert rule.weigh(logits, rule.select(logits)).dtype == expected


@every_router
def test_the_rule_is_read_from_the_live_router(name: str) -> None:
    router = make_router(name)
    assert (rule_for(router).n_experts, rule_for(router).top_k) == (7, 3)
    router.top_k = 2
    assert rule_for(router).top_k == 2
    logits, weights, indices = router(hidden_states())
    assert torch.equal(rule_for(router).select(logits), indices)
    assert torch.equal(rule_for(router).weigh(logits, indices), weights)


def test_renormalisation_is_read_from_the_live_router() -> None:
    router = make_router("olmoe")
    router.norm_topk_prob = True
    logits, weights, indices = router(hidden_states())
    assert torch.equal(rule_for(router).weigh(logits, indices), weights)


def test_a_subclass_follows_its_parents_rule() -> None:
    class MyRouter(OlmoeTopKRouter):
        pass

    router = make_router("olmoe")
    router.__class__ = MyRouter
    assert rule_for(router) == rule_for(make_router("olmoe"))


def test_an_unknown_router_is_refused_by_name() -> None:
    unknown = GraniteMoeTopKRouter(Fields(num_local_experts=4, num_experts_per_tok=2, hidden_size=8))  # pyright: ignore[reportArgumentType]
    assert not is_known_router(unknown)
    with pytest.raises(UnsupportedRouterError, match="GraniteMoeTopKRouter") as error:
        rule_for(unknown)
    assert isinstance(error.value, MoELensError)
    assert all(known in str(error.value) for known in RULES)


def test_a_module_without_routing_is_refused() -> None:
    with pytest.raises(UnsupportedRouterError, match="Linear"):
        rule_for(nn.Linear(2, 2))


# Distinct multiples of 1/8: no ties, and exact in every dtype.
distinct_logits = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.integers(-60, 60), min_size=n, max_size=n, unique=True)
)


@settings(max_examples=60, deadline=None)
@given(values=distinct_logits, data=st.data(), renormalise=st.booleans())
def test_invariants_of_the_softmax_rule(values: list[int], data: st.DataObject, renormalise: bool) -> None:
    k = data.draw(st.integers(1, len(values)))
    logits = torch.tensor(values, dtype=torch.float32) / 8
    rule = SoftmaxTopK(len(values), k, renormalise)
    indices = rule.select(logits)
    weights = rule.weigh(logits, indices)
    p = oracle.probabilities(logits)
    if p.sort().values.diff().min() > 1e-7:  # float32 can tell the experts apart
        assert indices.tolist() == oracle.choose(logits, k)
    assert indices.dtype == torch.int64
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1 if renormalise else p[indices].sum().item(), abs=1e-5)
    shifted = rule.weigh(logits + 3.0, indices)  # a softmax does not see a shift of all logits
    torch.testing.assert_close(shifted, weights, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3), renormalise=st.booleans())
def test_rules_work_on_any_batch_shape(shape: list[int], renormalise: bool) -> None:
    logits = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(0))
    rule = SoftmaxTopK(6, 2, renormalise)
    indices = rule.select(logits)
    flat = rule.select(logits.reshape(-1, 6))
    assert indices.shape == (*shape, 2)
    assert torch.equal(indices.reshape(-1, 2), flat)
    weights = rule.weigh(logits, indices).reshape(-1, 2)
    torch.testing.assert_close(weights, rule.weigh(logits.reshape(-1, 6), flat))


def test_an_expert_at_minus_infinity_is_never_chosen_while_others_are_left() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    logits[:, [1, 4]] = -float("inf")
    rule = SoftmaxTopK(6, 4, renormalize=True)
    indices = rule.select(logits)
    assert set(indices.unique().tolist()) == {0, 2, 3, 5}
    assert torch.isfinite(rule.weigh(logits, indices)).all()
