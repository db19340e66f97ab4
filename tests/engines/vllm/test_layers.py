"""Engines and layers that are refused by looking at them."""

from types import SimpleNamespace
from typing import Any

import pytest

import moe_lens.engines.vllm.layers as layers_file
from moe_lens.engines.vllm.layers import refused_config, refused_layers, sparse_layers


def config(**fields: Any) -> Any:
    parallel = {"data_parallel_size": 1, "pipeline_parallel_size": 1, "tensor_parallel_size": 2}
    parallel |= {name: value for name, value in fields.items() if name in PARALLEL}
    others = {"use_v2_model_runner": False, "speculative_config": None, "kv_transfer_config": None}
    others |= {name: value for name, value in fields.items() if name not in PARALLEL}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), cache_config=SimpleNamespace(), **others
    )


PARALLEL = (
    *("data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"),
    *("use_ubatching", "enable_eplb"),
)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("data_parallel_size", 2, "data parallel"),
        ("pipeline_parallel_size", 2, "pipeline parallel"),
        ("prefill_context_parallel_size", 2, "context parallel"),
        ("use_ubatching", True, "DBO"),
        ("enable_eplb", True, "EPLB"),
        ("speculative_config", object(), "speculative"),
        ("kv_transfer_config", object(), "other engines"),
    ],
)
def test_what_an_engine_must_not_do(field: str, value: Any, says: str) -> None:
    assert refused_config(config()) is None
    assert says in (refused_config(config(**{field: value})) or "")


class MoERunner:
    layer_id = 0
    gate = shared_expert_gate = None
    is_monolithic = do_naive_dispatch_combine = False

    def _maybe_dispatch(self) -> None: ...
    def _forward_impl(self) -> None: ...
    def _apply_quant_method(self) -> None: ...
    def forward(self) -> None: ...


class Another(MoERunner):
    def forward(self) -> None: ...


class CPURouter:
    scoring_func, renormalize, global_num_experts, top_k = "softmax", True, 8, 2
    use_grouped_topk = False
    e_score_correction_bias = custom_routing_function = eplb_state = None


class GroupedTopKRouter(CPURouter): ...


def layer(kind: Any = MoERunner, router: Any = CPURouter, **fields: Any) -> Any:
    made = kind()
    made.router, made.moe_config = router(), SimpleNamespace(is_sequence_parallel=False)
    for name, value in fields.items():
        holder = made.router if hasattr(router, name) else made
        setattr(holder, name, value)
    return made


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_file, "private", lambda: SimpleNamespace(MoERunner=MoERunner))


ALL = SimpleNamespace(num_hidden_layers=2)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (layer(Another), "Another does not run"),
        (layer(router=GroupedTopKRouter), "GroupedTopKRouter"),
        (layer(scoring_func="sigmoid"), "sigmoid"),
        (layer(use_grouped_topk=True), "groups"),
        (layer(e_score_correction_bias=object()), "bias"),
        (layer(custom_routing_function=print), "function of its own"),
        (layer(eplb_state=object()), "move"),
        (layer(is_monolithic=True), "moe_backend"),
        (layer(do_naive_dispatch_combine=True), "ranks"),
        (layer(gate=1, shared_expert_gate=1), "shared expert"),
        (layer(top_k=3), "differ"),
    ],
)
def test_a_layer_that_steering_would_miss(made: Any, says: str) -> None:
    assert refused_layers({0: layer(), 1: layer()}, ALL) is None
    assert says in (refused_layers({0: layer(), 1: made}, ALL) or "")


def test_weights_that_vllm_does_not_divide_by_their_sum_are_refused() -> None:
    layers = {0: layer(renormalize=False), 1: layer(renormalize=False)}
    named = SimpleNamespace(num_hidden_layers=2, norm_topk_prob=True)
    assert "norm_topk_prob=True" in (refused_layers(layers, named) or "")
    named.norm_topk_prob = False
    assert refused_layers(layers, named) is None


def test_layers_that_do_not_pass_by_are_missed() -> None:
    assert "no MoE layer" in (refused_layers({}, ALL) or "")
    assert "[0, 1]" in (refused_layers({0: layer()}, ALL) or "")
    assert "[1]" in (
        refused_layers({0: layer(), 1: layer()}, SimpleNamespace(num_hidden_layers=2, mlp_only_layers=[0]))
        or ""
    )


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"mlp_only_layers": [0, 3], "decoder_sparse_step": 1}, [1, 2, 4, 5]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, [1, 2, 3, 4, 5]),
        ({"moe_layer_freq": [0, 1, 1, 1, 1, 1]}, None),
        ({"interleave_moe_layer_step": 2}, None),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 5}, None),
    ],
)
def test_the_moe_layers_of_a_config(fields: dict[str, Any], layers: list[int] | None) -> None:
    assert sparse_layers(SimpleNamespace(num_hidden_layers=6, **fields)) == layers
