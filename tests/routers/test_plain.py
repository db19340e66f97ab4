"""Rules that choose by the order of logits, against loops in float64; steering them, against brute force."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.errors import DataError, HookError, PlanError
from moe_lens.routers.biased import SigmoidTopK
from moe_lens.routers.groups import GroupLimit
from moe_lens.routers.plain import SoftmaxTopK, SparseMixer, TopKSigmoid, TopKSoftmax
from moe_lens.routers.rule import RoutingRule
from moe_lens.steering.plan import EPSILON_RANGE
from tests import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Weigh = Callable[[list[float], list[int]], list[float]]

# ------------------------------------------------------------------------------------------- the oracle


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / math.fsum(powers) for power in powers]


def of_all(renormalize: bool, factors: Sequence[float]) -> Weigh:
    def weigh(z: list[float], chosen: list[int]) -> list[float]:
        p = [softmax(z)[i] for i in chosen]
        return [
            factors[i] * each / (math.fsum(p) if renormalize else 1)
            for i, each in zip(chosen, p, strict=True)
        ]

    return weigh


def of_chosen(z: list[float], chosen: list[int]) -> list[float]:
    return softmax([z[i] for i in chosen])


def sigmoids(z: list[float], chosen: list[int]) -> list[float]:
    return [1 / (1 + math.exp(-z[i])) for i in chosen]


def sparsemixer(jitter: float) -> Weigh:
    def share(z: list[float], left: list[int], chosen: int) -> float:
        largest = max(z[i] for i in left)
        near = {
            i for i in left if z[i] == largest or (largest - z[i]) / max(abs(z[i]), largest) <= 2 * jitter
        } | {chosen}
        return math.exp(z[chosen] - largest) / math.fsum(math.exp(z[i] - largest) for i in near)

    def weigh(z: list[float], chosen: list[int]) -> list[float]:
        first, second = chosen
        everyone = list(range(len(z)))
        return [share(z, everyone, first), share(z, [i for i in everyone if i != first], second)]

    return weigh


N, K = 7, 3
FACTORS = [0.5, 1.5, 1.0, 2.0, -1.0, 0.25, 3.0]
RULES: dict[str, tuple[Any, Weigh]] = {
    "softmax": (SoftmaxTopK(N, K, False), of_all(False, [1] * N)),
    "softmax_renormalized": (SoftmaxTopK(N, K, True, float32_weights=True), of_all(True, [1] * N)),
    "softmax_scaled": (SoftmaxTopK(N, K, False, scaling=16.0, in_order=False), of_all(False, [16] * N)),
    "softmax_expert_scale": (
        SoftmaxTopK(N, K, True, expert_scale=torch.tensor(FACTORS), float32_weights=True),
        of_all(True, FACTORS),
    ),
    "top_k_softmax": (TopKSoftmax(N, K), of_chosen),
    "top_k_sigmoid": (TopKSigmoid(N, K), sigmoids),
    "sparsemixer": (SparseMixer(N, 0.3), sparsemixer(0.3)),
    "sparsemixer_narrow": (SparseMixer(N, 0.01), sparsemixer(0.01)),
}
every_rule = pytest.mark.parametrize("name", RULES)


def sized(rule: Any, n_experts: int, k: int) -> Any:
    """The rule for another number of experts, of which it chooses k."""
    if isinstance(rule, SparseMixer):
        return replace(rule, n_experts=n_experts)
    fields = {"expert_scale": None} if isinstance(rule, SoftmaxTopK) else {}
    return replace(rule, n_experts=n_experts, top_k=k, **fields)


def logits(n_tokens: int = 60, n_experts: int = N, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))


def by_formula(weigh: Weigh, z: Tensor, indices: Tensor) -> Tensor:
    rows = zip(z.double().tolist(), indices.tolist(), strict=True)
    return torch.tensor([weigh(token, chosen) for token, chosen in rows], dtype=torch.float64)


def best_sets(z: list[float], k: int, activate: Sequence[int], deactivate: Sequence[int]) -> list[set[int]]:
    """Of all sets of k experts that a plan allows, those whose unsteered members are best: by brute force."""
    allowed = [
        set(some)
        for some in combinations(range(len(z)), k)
        if set(activate) <= set(some) and not set(deactivate) & set(some)
    ]
    worth = [sorted((z[i] for i in some if i not in activate), reverse=True) for some in allowed]
    return [some for some, each in zip(allowed, worth, strict=True) if each == max(worth)]


# ---------------------------------------------------------------------------------- selecting and weighing


@every_rule
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_selects_the_largest_and_weighs_by_the_formula(name: str, scale: float) -> None:
    rule, weigh = RULES[name]
    z = logits(scale=scale)
    indices, weights = rule.route(z)
    for token, chosen in zip(z.tolist(), indices.tolist(), strict=True):
        best = sorted(range(N), key=lambda i: -token[i])[: rule.top_k]
        assert chosen == best if getattr(rule, "in_order", True) else set(chosen) == set(best)
    torch.testing.assert_close(weights.double(), by_formula(weigh, z, indices), atol=1e-6, rtol=1e-5)


@every_rule
def test_weighs_experts_that_are_not_the_largest_by_the_formula(name: str) -> None:
    rule, weigh = RULES[name]
    indices = torch.tensor(list(combinations(range(N), rule.top_k))).flip(-1)
    z = logits(len(indices))
    weights = rule.weigh(z, indices)
    assert weights.isfinite().all()
    assert (weights != 0).all()
    torch.testing.assert_close(weights.double(), by_formula(weigh, z, indices), atol=1e-6, rtol=1e-5)


@every_rule
@every_dtype
def test_weights_come_in_their_dtype_and_indices_in_int64(name: str, dtype: torch.dtype) -> None:
    rule, _ = RULES[name]
    indices, weights = rule.route(logits().to(dtype))
    assert indices.dtype == torch.int64
    assert weights.dtype == (torch.float32 if getattr(rule, "float32_weights", False) else dtype)


@every_dtype
def test_granites_weights_take_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    assert TopKSoftmax(N, K, weights_dtype=dtype).route(logits()).weights.dtype == dtype


@every_rule
@settings(max_examples=10, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=0, max_size=3))
def test_rules_work_on_any_batch_shape(name: str, shape: list[int]) -> None:
    rule, _ = RULES[name]
    z = logits(math.prod(shape)).reshape(*shape, N)
    indices, weights = rule.route(z)
    flat = rule.route(z.reshape(-1, N))
    assert indices.shape == weights.shape == (*shape, rule.top_k)
    assert torch.equal(indices.reshape(flat.indices.shape), flat.indices)
    torch.testing.assert_close(weights.reshape(flat.weights.shape), flat.weights)


# Distinct multiples of 1/8: no ties, and exact in every dtype.
distinct_logits = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.integers(-60, 60), min_size=n, max_size=n, unique=True)
)


@settings(max_examples=60, deadline=None)
@given(values=distinct_logits, data=st.data(), renormalise=st.booleans())
def test_invariants_of_the_softmax_rule(values: list[int], data: st.DataObject, renormalise: bool) -> None:
    k = data.draw(st.integers(1, len(values)))
    z = torch.tensor(values, dtype=torch.float32) / 8
    rule = SoftmaxTopK(len(values), k, renormalise)
    indices = rule.select(z)
    weights = rule.weigh(z, indices)
    p = oracle.probabilities(z)
    if p.sort().values.diff().min() > 1e-7:  # float32 can tell the experts apart
        assert indices.tolist() == oracle.choose(z, k)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1 if renormalise else p[indices].sum().item(), abs=1e-5)
    shifted = rule.weigh(z + 3.0, indices)  # a softmax does not see a shift of all logits
    torch.testing.assert_close(shifted, weights, atol=1e-5, rtol=1e-4)


def test_an_expert_at_minus_infinity_is_never_chosen_while_others_are_left() -> None:
    z = logits(50, 6)
    z[:, [1, 4]] = -float("inf")
    for name in ("softmax_renormalized", "top_k_softmax", "top_k_sigmoid"):
        indices, weights = sized(RULES[name][0], 6, 4).route(z)
        assert set(indices.unique().tolist()) == {0, 2, 3, 5}
        assert torch.isfinite(weights).all()


# ------------------------------------------------------------------------------------------ steering


@st.composite
def plans(draw: st.DrawFn, k: int | None = None) -> tuple[int, int, list[int], list[int]]:
    """(experts, k, activated, deactivated): a plan that fits, often as large as possible."""
    n_experts = draw(st.integers(2, 8))
    k = k or draw(st.integers(1, n_experts))
    order = draw(st.permutations(range(n_experts)))
    n_activate = draw(st.sampled_from([0, 1, k, k]).filter(lambda n: n <= k))
    n_deactivate = draw(
        st.sampled_from([0, 1, n_experts - k, n_experts - k]).filter(lambda n: n <= n_experts - k)
    )
    return n_experts, k, order[:n_activate], order[n_experts - n_deactivate :]


def grid(n_experts: int, seed: int, stretch: float, dtype: torch.dtype) -> Tensor:
    """Logits of 12 tokens, multiples of 1/8 (exact in every dtype) with many ties, stretched."""
    generator = torch.Generator().manual_seed(seed)
    span = 2 + seed % 120
    return (stretch * torch.randint(-span, span, (12, n_experts), generator=generator) / 8).to(dtype)


def assert_steered(rule: Any, z: Tensor, activate: list[int], deactivate: list[int], epsilon: float) -> None:
    steered, after = rule.steer(z, activate, deactivate, epsilon)
    indices, weights = after.route(steered)
    for token, chosen in zip(z.tolist(), indices.tolist(), strict=True):
        assert set(chosen) in best_sets(token, rule.top_k, activate, deactivate)
    assert weights.isfinite().all()
    if not isinstance(rule, SparseMixer):
        largest = weights.amax(dim=-1)
        for expert in activate:
            assert (weights[indices == expert] >= largest * (1 - 1e-6)).all()
    others = [expert for expert in range(rule.n_experts) if expert not in activate + deactivate]
    if isinstance(rule, TopKSigmoid | SparseMixer):
        assert torch.equal(steered[:, others], z[:, others].float())
    else:
        shift = (steered.double() - z.double())[:, others]
        shallow = (steered.log_softmax(-1) > -59.9).all(-1)
        shift, reach = shift[shallow], 1 + z.double().abs().amax(-1, keepdim=True)[shallow]
        if others:
            assert ((shift - shift[:, :1]).abs() <= 1e-6 * reach).all()


@every_rule
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 10**6),
    stretch=st.sampled_from([1.0, 1.0, 64.0, 1024.0]),
    dtype=st.sampled_from(DTYPES),
    epsilon=st.sampled_from([*EPSILON_RANGE, 0.01, 1.0]),
)
def test_steering_runs_the_best_of_all_sets_that_the_plan_allows(
    name: str, data: st.DataObject, seed: int, stretch: float, dtype: torch.dtype, epsilon: float
) -> None:
    rule = RULES[name][0]
    n_experts, k, activate, deactivate = data.draw(plans(2 if isinstance(rule, SparseMixer) else None))
    assume(activate or deactivate)
    z = grid(n_experts, seed, stretch, dtype)
    rule = replace(sized(rule, n_experts, k), **({"scaling": 1.0} if isinstance(rule, SoftmaxTopK) else {}))
    assert_steered(rule, z, activate, deactivate, epsilon)


@pytest.mark.parametrize("name", ["softmax_renormalized", "top_k_softmax", "top_k_sigmoid", "sparsemixer"])
def test_every_plan_is_possible_and_holds(name: str) -> None:
    rule = sized(RULES[name][0], 6, 2)
    z = torch.cat([grid(6, 3, 1.0, torch.float32)[:3], 100 * logits(1, 6), torch.zeros(1, 6)])
    for wishes in product((-1, 0, 1), repeat=6):
        activate = [expert for expert in range(6) if wishes[expert] == 1]
        deactivate = [expert for expert in range(6) if wishes[expert] == -1]
        if len(activate) <= 2 and len(deactivate) <= 4:
            assert rule.cannot_steer(activate, deactivate) is None
            steered, after = rule.steer(z, activate, deactivate, 0.01)
            for chosen in after.select(steered).tolist():
                assert set(activate) <= set(chosen)
                assert not set(deactivate) & set(chosen)


@every_rule
@every_dtype
def test_an_empty_plan_keeps_the_choice_and_the_rule(name: str, dtype: torch.dtype) -> None:
    rule, _ = RULES[name]
    z = torch.stack(
        [torch.randperm(N, generator=torch.Generator().manual_seed(i)) / 2 - 2 for i in range(40)]
    )
    steered, after = rule.steer(z.to(dtype), [], [], 0.01)
    assert after == rule
    assert torch.equal(after.select(steered), rule.select(z.to(dtype)))
    before, now = rule.route(z.float()).weights, after.route(steered).weights
    torch.testing.assert_close(now.float(), before, atol=1e-6, rtol=1e-5)


@every_rule
def test_gradients_of_a_steered_choice_reach_unsteered_logits(name: str) -> None:
    rule, _ = RULES[name]
    z = logits(20, scale=0.2).requires_grad_()
    steered, after = rule.steer(z, [1], [2], 0.01)
    indices, weights = after.route(steered)
    (weights * torch.arange(1.0, 1 + rule.top_k)).sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    runs = torch.zeros(20, N, dtype=torch.bool).scatter(1, indices, True)
    runs[:, [1, 2]] = False
    reached = z.grad[runs].abs() > 1e-6
    # sparsemixer: an expert that is alone above its threshold weighs 1, whatever its logit
    assert reached.any() if isinstance(rule, SparseMixer) else reached.all()


# ------------------------------------------------------------------------------------ what every rule offers


@dataclass(frozen=True, eq=False)
class LastFirst(RoutingRule):
    """Chooses the k smallest logits: not what the base class takes for granted."""

    n_experts: int
    top_k: int
    table: Tensor | None = None

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        return (-logits).topk(self.top_k).indices

    def weigh(
        self, logits: Float[Tensor, "*batch expert"], indices: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch k"]:
        return logits.gather(-1, indices)


@dataclass(frozen=True, eq=False)
class Largest(LastFirst):
    """Chooses the k largest."""

    def select(self, logits: Float[Tensor, "*batch expert"]) -> Int[Tensor, "*batch k"]:
        return logits.topk(self.top_k).indices


def test_a_rule_of_ones_own_is_steered_by_its_logits() -> None:
    rule, z = Largest(N, K), logits()
    steered, after = rule.steer(z, [1, 2], [3], 0.5)
    assert after is rule
    for token, chosen in zip(z.tolist(), rule.select(steered).tolist(), strict=True):
        assert set(chosen) in best_sets(token, K, [1, 2], [3])
    assert torch.equal(steered[:, [0, 4, 5, 6]], z[:, [0, 4, 5, 6]])
    torch.testing.assert_close(steered[:, 1], z.amax(-1) + 0.5)


def test_steering_a_rule_that_does_not_choose_by_the_order_of_logits_raises() -> None:
    with pytest.raises(HookError, match=r"LastFirst.*left out the activated experts \[1\]"):
        LastFirst(N, K).steer(logits(), [1], [], 0.01)
    with pytest.raises(HookError, match=r"LastFirst.*chose the deactivated experts \[4\]"):
        LastFirst(N, K).steer(logits(), [], [4], 0.01)


@every_rule
def test_rules_are_equal_where_all_their_parameters_are(name: str) -> None:
    rule, _ = RULES[name]
    assert rule == replace(rule)
    assert hash(rule) == hash(replace(rule))
    assert rule != replace(rule, n_experts=N + 1)
    assert rule.for_call(torch.zeros(3)) is rule
    assert [other for other, (each, _) in RULES.items() if each == rule] == [name]


def test_tensors_among_the_parameters_are_compared_by_value() -> None:
    def with_table(table: Tensor | None) -> LastFirst:
        return LastFirst(N, K, table)

    table = torch.tensor([1.0, 2.0])
    assert with_table(table) == with_table(table.clone())
    assert hash(with_table(table)) == hash(with_table(table.clone()))
    assert with_table(table) == with_table(torch.nn.Parameter(table))
    for other in (table + 1, table.half(), torch.ones(3), table.reshape(2, 1), None):
        assert with_table(table) != with_table(other)
        assert with_table(other) != with_table(table)
    assert Largest(N, K) != LastFirst(N, K)
    assert Largest(N, K) != (N, K)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (([0, 1, 2], []), "at most 2 experts can be activated"),
        (([], [0, 1, 2, 3]), "and 3 deactivated"),
        (([5], []), "experts are 0 to 4"),
        (([1], [1]), "named twice"),
    ],
)
def test_steer_refuses_what_is_no_plan_for_the_router(plan: tuple[list[int], list[int]], words: str) -> None:
    activate, deactivate = plan
    for rule in (SoftmaxTopK(5, 2, True), TopKSoftmax(5, 2), TopKSigmoid(5, 2), SparseMixer(5, 0.1)):
        with pytest.raises(PlanError, match=words):
            rule.steer(torch.randn(4, 5), activate, deactivate, 0.01)


def test_an_expert_chosen_twice_weighs_the_same_both_times_in_sparsemixer() -> None:
    z = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    indices = torch.full((50, 2), 3)
    weights = SparseMixer(5, 0.3).weigh(z, indices)
    assert torch.equal(weights[:, 0], weights[:, 1])
    assert bool((weights > 0).all())


@pytest.mark.parametrize("shape", [(3, 5), (7,), (8, 3)])
def test_logits_of_another_number_of_experts_are_refused(shape: tuple[int, ...]) -> None:
    grouped = SigmoidTopK(n_experts=8, top_k=2, groups=GroupLimit(4, 2, 2))
    for rule in (SoftmaxTopK(8, 2, True), TopKSigmoid(8, 2), SparseMixer(8, 0.1), grouped):
        for verb in (rule.route, rule.routing_margin):
            with pytest.raises(DataError, match="a router with 8 experts"):
                verb(torch.randn(shape))
