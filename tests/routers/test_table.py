"""The table of rules against Hugging Face's own routers, bit for bit; finding, adding and refusing rows."""

import importlib
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moe_lens.errors import MoELensError, UnsupportedRouterError
from moe_lens.routers.layouts import InOrder
from moe_lens.routers.plain import SoftmaxTopK
from moe_lens.routers.readers import hidden_dtype
from moe_lens.routers.table import RULES, is_known_router, register_rule, row_for, rule_for

D_MODEL, VOCAB = 24, 50
BATCH, POS = 7, 43  # an odd number of tokens: torch rounds an element by its place in the tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [0.05, 1.0, 20.0, 300.0]  # of the router's weights; at the last one softmax and sigmoid underflow
SHAPES = [(7, 1), (7, 3), (5, 5), (64, 8), (8, 2)]
GROUPED = [  # experts, k, groups, groups that are chosen
    (7, 3, 1, 1),
    (5, 5, 1, 1),
    (8, 1, 4, 3),
    (8, 2, 4, 1),
    (8, 3, 2, 1),
    (8, 4, 4, 2),
    (8, 4, 4, 1),  # a group has only two: the other two come from anywhere
    (12, 4, 3, 2),
    (12, 12, 3, 3),
    (64, 8, 8, 4),
]
MODULES = {
    "AfmoeTokenChoiceRouter": "afmoe",
    "DeepseekV2TopkRouter": "deepseek_v2",
    "DeepseekV3TopkRouter": "deepseek_v3",
    "DeepseekV4HashRouter": "deepseek_v4",
    "DeepseekV4TopKRouter": "deepseek_v4",
    "Ernie4_5_MoeTopKRouter": "ernie4_5_moe",
    "FlexOlmoTopKRouter": "flex_olmo",
    "Gemma4TextRouter": "gemma4",
    "Glm4MoeLiteTopkRouter": "glm4_moe_lite",
    "Glm4MoeTopkRouter": "glm4_moe",
    "GlmMoeDsaTopkRouter": "glm_moe_dsa",
    "GptOssTopKRouter": "gpt_oss",
    "GraniteMoeHybridTopKRouter": "granitemoehybrid",
    "GraniteMoeTopKRouter": "granitemoe",
    "JambaTopKRouter": "jamba",
    "JetMoeTopKGating": "jetmoe",
    "LagunaTopKRouter": "laguna",
    "Lfm2MoeTopKRouter": "lfm2_moe",
    "Llama4Router": "llama4",
    "MiniMaxM2TopKRouter": "minimax_m2",
    "MixtralTopKRouter": "mixtral",
    "NemotronHTopkRouter": "nemotron_h",
    "OlmoeTopKRouter": "olmoe",
    "PhimoeTopKRouter": "phimoe",
    "Qwen2MoeTopKRouter": "qwen2_moe",
    "Qwen3MoeTopKRouter": "qwen3_moe",
    "Qwen3NextTopKRouter": "qwen3_next",
    "Qwen3VLMoeTextTopKRouter": "qwen3_vl_moe",
    "Qwen3_5MoeTopKRouter": "qwen3_5_moe",
}
V3_LIKE = [
    "DeepseekV3TopkRouter",
    "Glm4MoeTopkRouter",
    "Glm4MoeLiteTopkRouter",
    "GlmMoeDsaTopkRouter",
    "NemotronHTopkRouter",
]
NORM_FROM_CONFIG = [
    "FlexOlmoTopKRouter",
    "OlmoeTopKRouter",
    "Qwen2MoeTopKRouter",
    "Qwen3MoeTopKRouter",
    "Qwen3NextTopKRouter",
]
VARIANTS: dict[str, list[dict[str, Any]]] = {  # config fields to try; [{}] for the other routers
    **{name: [{"norm_topk_prob": norm} for norm in (False, True)] for name in NORM_FROM_CONFIG},
    **{
        name: [
            {"norm_topk_prob": norm, "routed_scaling_factor": s}
            for norm, s in [(True, 2.5), (False, 1.0), (False, 0.3)]
        ]
        for name in V3_LIKE
    },
    "AfmoeTokenChoiceRouter": [{"route_scale": 1.0}, {"route_scale": 2.826}],
    "DeepseekV2TopkRouter": [
        {"topk_method": method, "routed_scaling_factor": scaling}
        for method in ("greedy", "group_limited_greedy")
        for scaling in (1.0, 16.0)
    ],
    "DeepseekV4TopKRouter": [{"scoring_func": name} for name in ("sqrtsoftplus", "sigmoid")],
    "DeepseekV4HashRouter": [{"scoring_func": name} for name in ("sqrtsoftplus", "sigmoid")],
    "Ernie4_5_MoeTopKRouter": [{"moe_norm_min": 1e-12}, {"moe_norm_min": 0.5}],
    "LagunaTopKRouter": [{"moe_router_logit_softcapping": 0.0}, {"moe_router_logit_softcapping": 5.0}],
    "Lfm2MoeTopKRouter": [
        {"norm_topk_prob": norm, "use_expert_bias": bias, "routed_scaling_factor": scaling}
        for norm, bias, scaling in [
            (True, True, 1.0),
            (True, False, 2.5),
            (False, True, 2.5),
            (False, False, 1.0),
        ]
    ],
    "PhimoeTopKRouter": [{"router_jitter_noise": 0.01}, {"router_jitter_noise": 0.3}],
}
CASES = [(name, variant) for name in MODULES for variant in VARIANTS.get(name, [{}])]
IN_THE_BLOCK = ["AfmoeTokenChoiceRouter", "Lfm2MoeTopKRouter", "MiniMaxM2TopKRouter"]
BIASED = [
    *V3_LIKE,
    *IN_THE_BLOCK,
    "DeepseekV4TopKRouter",
    "Ernie4_5_MoeTopKRouter",
    "LagunaTopKRouter",
]
FLOAT32_ROUTERS = ["Ernie4_5_MoeTopKRouter", "MiniMaxM2TopKRouter", "DeepseekV2TopkRouter", *V3_LIKE]
LIVE = {  # attributes of some routers -> another value
    "top_k": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 0.25,
    "route_scale": 0.25,
    "topk_method": "group_limited_greedy",
    "topk_group": 1,
    "norm_min": 0.9,
    "use_expert_bias": False,
    "router_jitter_noise": 0.4,
}
every_case = pytest.mark.parametrize(
    ("name", "fields"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_name = pytest.mark.parametrize("name", MODULES)


class Fields:
    """A config: just attributes."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


class Decision(NamedTuple):
    """What a Hugging Face router decided."""

    logits: Tensor
    weights: Tensor
    indices: Tensor


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def biases(n_experts: int) -> list[Tensor]:
    """Correction biases: none, a mild one, one that overrules every score, one that makes ties."""
    strong = torch.tensor([-5e4, 0.0, 5e4])[torch.arange(n_experts) * 5 % 3]
    return [torch.zeros(n_experts), 0.3 * normal(n_experts, seed=5), strong, torch.full((n_experts,), -1e3)]


def build(
    name: str,
    shape: tuple[int, ...] = (8, 2),
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    bias: Tensor | None = None,
    float32_bias: bool = False,
    **fields: Any,
) -> tuple[Any, Any]:
    """A router and a block around it, with random parameters."""
    n_experts, k, n_groups, n_chosen = (*shape, 1, 1)[:4]
    k = 2 if name == "PhimoeTopKRouter" else k
    config = Fields(
        **{
            "num_experts": n_experts,
            "num_local_experts": n_experts,
            "num_experts_per_tok": k,
            "top_k_experts": k,
            "hidden_size": D_MODEL,
            "vocab_size": VOCAB,
            "n_group": n_groups,
            "topk_group": n_chosen,
            "routed_scaling_factor": 1.7,
            "route_scale": 1.0,
            "topk_method": "greedy",
            "norm_topk_prob": True,
            "scoring_func": "sqrtsoftplus",
            "use_expert_bias": True,
            "rms_norm_eps": 1e-6,
            "moe_norm_min": 1e-12,
            "moe_router_logit_softcapping": 0.0,
            "router_jitter_noise": 0.01,
            "input_jitter_noise": 0.1,
            **fields,
        }
    )
    module = importlib.import_module(f"transformers.models.{MODULES[name]}.modeling_{MODULES[name]}")
    router_class = getattr(module, name)
    router = router_class(D_MODEL, n_experts, k) if name == "JetMoeTopKGating" else router_class(config)
    block: Any = nn.Module()
    block.gate, block.experts = router, nn.Linear(1, 1)
    bias = biases(n_experts)[1] if bias is None else bias
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.requires_grad:
                # Gemma's are a scale of the normed hidden states and one of the weights
                mean, std = (0.3 * scale, 0.3 * scale) if parameter.ndim == 2 else (0.5, 1.0)
                parameter.copy_(mean * (parameter.ndim == 1) + std * normal(*parameter.shape, seed=1))
    if hasattr(router, "tid2eid"):
        router.tid2eid.copy_(normal(VOCAB, n_experts, seed=3).argsort(dim=-1)[:, :k])
    if name == "Lfm2MoeTopKRouter" and router.use_expert_bias:
        block.expert_bias = nn.Buffer(torch.zeros(n_experts))
    elif name == "AfmoeTokenChoiceRouter":
        block.expert_bias = nn.Parameter(torch.zeros(n_experts), requires_grad=False)
    elif name == "MiniMaxM2TopKRouter":
        block.e_score_correction_bias = nn.Buffer(torch.zeros(n_experts))
    block.to(dtype).eval()
    for owner in block.modules():
        for key in ("expert_bias", "e_score_correction_bias"):
            if hasattr(owner, key):
                held = getattr(owner, key)
                held.data = bias.reshape(held.shape).to(torch.float32 if float32_bias else dtype)
    return router, block


def hidden_states(dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(BATCH * POS, D_MODEL, seed=2).to(dtype)


def call(router: Any, block: Any, hidden: Tensor) -> Decision:
    """The router's own forward, its output read without moe_lens."""
    name = type(router).__name__
    if name == "AfmoeTokenChoiceRouter":
        return Decision(*router(hidden[None], block.expert_bias))
    if name == "Lfm2MoeTopKRouter":
        return Decision(*router(hidden, getattr(block, "expert_bias", None)))
    if name == "MiniMaxM2TopKRouter":
        return Decision(*router(hidden, block.e_score_correction_bias))
    if name == "DeepseekV4HashRouter":
        return Decision(*router(hidden, token_ids(hidden)))
    if name == "Gemma4TextRouter":
        probabilities, weights, indices = router(hidden)
        logits = router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)
        assert torch.equal(probabilities, logits.softmax(-1, dtype=torch.float32))
        return Decision(logits, weights, indices)
    if name == "Llama4Router":
        weights, logits = router(hidden)
        indices = logits.topk(router.top_k, dim=1).indices
        assert not weights.scatter(1, indices, 0).any()
        return Decision(logits, weights.gather(1, indices), indices)
    if name == "JetMoeTopKGating":
        order, _, weights, sizes, logits = router(hidden)
        place = order.argsort()
        experts = torch.tensor([expert for expert, size in enumerate(sizes) for _ in range(size)])
        return Decision(logits, weights[place].view(-1, router.top_k), experts[place].view(-1, router.top_k))
    return Decision(*router(hidden))


def token_ids(hidden: Tensor) -> Tensor:
    return torch.arange(len(hidden)) * 7 % VOCAB


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit; NaN (0 / 0 where all sigmoids underflow) equals NaN."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def shapes(name: str) -> list[Any]:
    return GROUPED if name in V3_LIKE or name == "DeepseekV2TopkRouter" else SHAPES


def read(router: Any, block: Any, hidden: Tensor) -> Any:
    return rule_for(router, block).for_call(token_ids(hidden))


def assert_equals_hf(router: Any, block: Any, hidden: Tensor) -> None:
    with torch.no_grad():
        theirs = call(router, block, hidden)
        ours = read(router, block, hidden).route(theirs.logits)
        batched = read(router, block, hidden).route(theirs.logits.view(BATCH, POS, -1))
    assert theirs.logits.isfinite().all()
    assert torch.equal(ours.indices, theirs.indices)
    assert same(ours.weights, theirs.weights)
    assert torch.equal(batched.indices, theirs.indices.view(BATCH, POS, -1))
    assert same(batched.weights, theirs.weights.view(BATCH, POS, -1))


# ---------------------------------------------------------------------------------------- bit for bit


def test_every_row_of_the_table_has_a_case() -> None:
    assert set(MODULES) == set(RULES)


@every_case
@every_dtype
def test_a_rule_equals_hf_bit_for_bit(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    # Gemma's weights are made as large by its `scale`, for its hidden states are normed
    for n, (shape, scale) in enumerate(product(shapes(name), SCALES)):
        bias = biases(shape[0])[(n + n // 4) % 4]
        router, block = build(name, shape, dtype, scale, bias, **fields)
        assert_equals_hf(router, block, hidden_states(dtype))


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", range(4))
def test_a_bias_that_stays_float32_in_half_precision_counts_as_in_hf(
    name: str, dtype: torch.dtype, kind: int
) -> None:
    shape = shapes(name)[-1]
    router, block = build(name, shape, dtype, 1.0, biases(shape[0])[kind], float32_bias=True)
    assert_equals_hf(router, block, hidden_states(dtype))


@pytest.mark.parametrize("name", FLOAT32_ROUTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_router_that_stays_float32_among_half_precision_experts_equals_hf(
    name: str, dtype: torch.dtype
) -> None:
    router, block = build(name)
    block.experts.to(dtype)
    assert_equals_hf(router, block, hidden_states(dtype))


@every_case
@every_dtype
def test_the_gradient_equals_hfs_bit_for_bit(name: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    router, block = build(name, (8, 3, 4, 2), dtype, 0.3, **fields)
    ours, theirs = (hidden_states(dtype).requires_grad_() for _ in range(2))
    weights = call(router, block, theirs).weights
    readout = normal(*weights.shape, seed=4)
    (weights * readout).sum().backward()
    (read(router, block, ours).route(call(router, block, ours).logits).weights * readout).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.isfinite().all()
    assert ours.grad.abs().max() > 0
    assert torch.equal(ours.grad, theirs.grad)


# ------------------------------------------------------------------------------- reading live routers


@every_name
def test_the_rule_is_read_from_the_live_router(name: str) -> None:
    router, block = build(name, (8, 3, 4, 2))
    before = rule_for(router, block)
    assert (before.n_experts, before.top_k) == (8, 2 if name == "PhimoeTopKRouter" else 3)
    assert rule_for(router, block) == before
    for attribute, value in LIVE.items():
        ignored = attribute == "top_k" and name in ("PhimoeTopKRouter", "DeepseekV4HashRouter")  # by HF too
        if hasattr(router, attribute) and not ignored:
            setattr(router, attribute, value)
            assert rule_for(router, block) != before, attribute
            assert_equals_hf(router, block, hidden_states())
            before = rule_for(router, block)


@pytest.mark.parametrize("name", BIASED)
def test_an_edit_of_the_bias_in_place_is_seen(name: str) -> None:
    router, block = build(name)
    before = rule_for(router, block).select(normal(300, 8, seed=6))
    for owner in block.modules():
        for key in ("expert_bias", "e_score_correction_bias"):
            if hasattr(owner, key):
                getattr(owner, key).data[..., 5] += 10.0
    after = rule_for(router, block).select(normal(300, 8, seed=6))
    assert not torch.equal(after, before)
    assert bool((after == 5).any(-1).all())
    assert_equals_hf(router, block, hidden_states())


@pytest.mark.parametrize("name", ["AfmoeTokenChoiceRouter", "Lfm2MoeTopKRouter", "MiniMaxM2TopKRouter"])
def test_a_router_whose_bias_lives_in_the_block_needs_the_block(name: str) -> None:
    router, _ = build(name)
    with pytest.raises(UnsupportedRouterError, match=f"{name}.*bias.*rule_for\\(router, block\\)"):
        rule_for(router)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in IN_THE_BLOCK])
def test_the_other_routers_need_no_block(name: str) -> None:
    router, block = build(name)
    assert rule_for(router) == rule_for(router, block)


def test_lfm2_without_a_bias_needs_no_block() -> None:
    router, block = build("Lfm2MoeTopKRouter", use_expert_bias=False)
    assert rule_for(router) == rule_for(router, block)


def test_a_way_of_choosing_that_no_rule_describes_is_refused() -> None:
    router, _ = build("DeepseekV2TopkRouter", topk_method="noaux_tc")
    with pytest.raises(UnsupportedRouterError, match=r"DeepseekV2TopkRouter.*'noaux_tc'.*'greedy'"):
        rule_for(router)
    for name in ("DeepseekV4TopKRouter", "DeepseekV4HashRouter"):
        router, _ = build(name, scoring_func="relu")
        with pytest.raises(UnsupportedRouterError, match=f"{name} scores by ReLU.*sqrtsoftplus"):
            rule_for(router)


def test_as_many_chosen_groups_as_there_are_limit_nothing() -> None:
    for n_groups in (1, 2, 4):
        rule: Any = rule_for(build("DeepseekV3TopkRouter", (8, 2, n_groups, n_groups))[0])
        assert rule.groups is None


def test_the_dtype_of_hidden_states_is_that_of_the_experts() -> None:
    router, block = nn.Linear(2, 2), nn.Module()
    assert hidden_dtype(router, None) == hidden_dtype(router, block) == torch.float32
    block.experts = nn.Linear(2, 2).to(torch.bfloat16)
    assert hidden_dtype(router, block) == torch.bfloat16
    for quantised in (torch.uint8, torch.float8_e4m3fn):  # says nothing of the hidden states
        block.experts = nn.Linear(2, 2)
        for parameter in block.experts.parameters():
            parameter.requires_grad_(False)
            parameter.data = torch.zeros(2, dtype=quantised)
        assert hidden_dtype(router.half(), block) == torch.float16
    assert hidden_dtype(nn.Identity(), nn.Module()) == torch.float32


# ------------------------------------------------------------------------------- known and unknown routers


def test_a_subclass_follows_its_parents_rule() -> None:
    router, block = build("OlmoeTopKRouter")
    parents = rule_for(router, block)
    router.__class__ = type("MyRouter", (type(router),), {})
    assert is_known_router(router)
    assert rule_for(router, block) == parents


def test_the_nearest_parent_with_a_rule_counts(rows: None) -> None:
    router, block = build("OlmoeTopKRouter")
    router.__class__ = type("MyRouter", (type(router),), {})
    register_rule("MyRouter", lambda router: SoftmaxTopK(8, 1, renormalize=True))
    router.__class__ = type("Child", (type(router),), {})
    assert rule_for(router, block) == SoftmaxTopK(8, 1, renormalize=True)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), type("MyRouter", (nn.Linear,), {})(2, 2)])
def test_an_unknown_router_is_refused_by_name(module: nn.Module) -> None:
    assert not is_known_router(module)
    with pytest.raises(UnsupportedRouterError, match=type(module).__name__) as error:
        rule_for(module)
    assert isinstance(error.value, MoELensError)
    assert all(known in str(error.value) for known in [*RULES, "register_rule"])


@pytest.fixture
def rows() -> Any:
    """Takes rows that a test adds out again."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class MyRouter(nn.Linear):
    """A router that nobody knows."""


def test_a_registered_rule_is_read_from_the_live_router(rows: None) -> None:
    register_rule("MyRouter", lambda router: SoftmaxTopK(router.out_features, 2, renormalize=True))
    assert rule_for(MyRouter(3, 5)) == SoftmaxTopK(5, 2, renormalize=True)
    assert row_for(MyRouter(3, 5)).layout == InOrder()
    hidden = torch.ones(4, 3)
    assert row_for(MyRouter(3, 5)).inputs(None, hidden) == (hidden,)


def test_a_factory_of_two_arguments_gets_the_block_too(rows: None) -> None:
    block: Any = nn.Module()
    block.k = 3
    register_rule("MyRouter", lambda router, block, more=1: SoftmaxTopK(router.out_features, block.k, False))
    assert rule_for(MyRouter(3, 5), block).top_k == 3


def test_a_registered_row_keeps_its_order_and_inputs(rows: None) -> None:
    register_rule(
        "MyRouter",
        lambda router: SoftmaxTopK(5, 2, False),
        order=("indices", "logits", "weights"),
        inputs=lambda block, hidden: (hidden, block),
    )
    row = row_for(MyRouter(3, 5))
    assert row.layout == InOrder(("indices", "logits", "weights"))
    assert row.inputs("block", torch.ones(4, 3))[1] == "block"


def test_a_taken_name_is_kept_unless_replace_is_said(rows: None) -> None:
    factory = lambda router: SoftmaxTopK(8, 1, False)  # noqa: E731
    with pytest.raises(MoELensError, match=r"OlmoeTopKRouter has a rule already.*replace=True"):
        register_rule("OlmoeTopKRouter", factory)
    router, block = build("OlmoeTopKRouter")
    assert rule_for(router, block).top_k == 2
    register_rule("OlmoeTopKRouter", factory, replace=True)
    assert rule_for(router, block).top_k == 1


FACTORY = lambda router: SoftmaxTopK(8, 1, False)  # noqa: E731


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("my router", FACTORY), "router_class_name.*'my router'"),
        (("MyRouter", lambda: None), "factory for MyRouter"),
        (("MyRouter", lambda a, b, c: None), "factory for MyRouter"),
    ],
)
def test_what_is_no_row_is_refused(rows: None, arguments: tuple[Any, Any], message: str) -> None:
    before = dict(RULES)
    with pytest.raises(MoELensError, match=message):
        register_rule(*arguments)
    assert before == RULES


@pytest.mark.parametrize("order", [("logits", "weights"), ("logits", "weights", "weights"), ()])
def test_an_order_that_is_not_the_three_names_is_refused(rows: None, order: Any) -> None:
    with pytest.raises(MoELensError, match="order must hold 'logits', 'weights', 'indices'"):
        register_rule("MyRouter", FACTORY, order=order)


def test_a_factory_that_gives_no_rule_is_refused_when_it_is_read(rows: None) -> None:
    nothing: Any = lambda router: "softmax"  # noqa: E731
    register_rule("MyRouter", nothing)
    with pytest.raises(MoELensError, match=r"MyRouter gave str.*RoutingRule"):
        rule_for(MyRouter(3, 5))


def test_an_order_of_other_things_and_a_keyword_only_factory_are_refused(rows: None) -> None:
    order = ("logits", "weights", "scores")
    with pytest.raises(MoELensError, match="order must hold"):
        register_rule("MyRouter", lambda router: SoftmaxTopK(5, 2, False), order=order)
    with pytest.raises(MoELensError, match="must be a function of the live router"):
        register_rule("MyRouter", lambda *, router: SoftmaxTopK(5, 2, False))
