"""Which layers of a model in vLLM can be steered, and why another engine is refused.

Everything here is looked at once, when a worker has loaded its model; the check at start then counts what a
plan does in the running engine (`checking.py`).
"""

from typing import Any, Final

from moe_lens.engines.vllm.private_names import private
from moe_lens.engines.vllm.settings import tries_v2

_PLAIN: Final = ("FusedTopKRouter", "CPURouter")
"""Routers that may choose by the largest softmax of the logits they are given, and by nothing else."""


def refused_config(config: Any) -> str | None:
    """Why an engine of this `VllmConfig` is not steered, in words; None where nothing speaks against it."""
    parallel, reasons = config.parallel_config, []
    if config.use_v2_model_runner and not tries_v2():
        reasons.append(
            "moe_lens was never run in its model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0 for the runner in "
            "which it was; or MOE_LENS_V2=1, and the check at start decides)"
        )
    for field, what in (
        ("data_parallel_size", "data parallel"),
        ("pipeline_parallel_size", "pipeline parallel"),
        ("prefill_context_parallel_size", "prefill context parallel"),
    ):
        if getattr(parallel, field, 1) > 1:
            reasons.append(f"{what} was never tested (use one engine for each replica, or tensor parallel)")
    if getattr(parallel, "use_ubatching", False):
        reasons.append("micro-batches (DBO) cut the rows of a batch")
    if getattr(parallel, "enable_eplb", False):
        reasons.append("experts that are moved between ranks (EPLB) were never tested")
    if config.speculative_config is not None:
        reasons.append("speculative decoding was never tested")
    if config.kv_transfer_config is not None:
        reasons.append("keys and values from other engines may come from other plans")
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        reasons.append("fast prefill (kv_sharing_fast_prefill) leaves layers out")
    return "; ".join(reasons) or None


def moe_layers(model: Any) -> dict[int, Any]:
    """Layer number -> vLLM's MoERunner, in order."""
    runners = [module for module in model.modules() if isinstance(module, private().MoERunner)]
    return {runner.layer_id: runner for runner in sorted(runners, key=lambda runner: runner.layer_id)}


def refused_layers(layers: dict[int, Any], text_config: Any) -> str | None:
    """Why a model with these MoE layers is not steered, in words; None where nothing speaks against it."""
    if not layers:
        return "it has no MoE layer that runs through vLLM's MoERunner"
    for number, runner in layers.items():
        if (reason := _refused_layer(runner, text_config)) is not None:
            return f"layer {number}: {reason}"
    sizes = {(runner.router.global_num_experts, runner.router.top_k) for runner in layers.values()}
    if len(sizes) > 1:
        return f"its layers differ in (number of experts, k): {sorted(sizes)}"
    expected = sparse_layers(text_config)
    if expected is None:
        return "its config does not say which layers are MoE layers in a way that moe_lens knows"
    if list(layers) != expected:
        return f"the MoE layers of its config are {expected}, and {list(layers)} run through vLLM's MoERunner"
    return None


def _refused_layer(runner: Any, text_config: Any) -> str | None:
    router, base = runner.router, private().MoERunner
    name, config = type(router).__name__, runner.moe_config
    if any(getattr(type(runner), method) is not getattr(base, method) for method in _SEAM):
        return f"{type(runner).__name__} does not run as MoERunner does"
    if name not in _PLAIN:
        return f"its router is a {name}, which is not steered here"
    if getattr(router, "scoring_func", "softmax") != "softmax":
        return f"its router scores by {router.scoring_func}"
    for attribute, what in _BESIDES.items():
        if getattr(router, attribute, None) not in (None, False):
            return f"its router has {what}, beside the logits"
    if runner.is_monolithic:
        return "its kernel routes by itself, so that nobody could see who ran (choose another moe_backend)"
    if config.is_sequence_parallel or runner.do_naive_dispatch_combine:
        return "its tokens are spread over ranks (sequence or data parallel)"
    if runner.gate is not None and runner.shared_expert_gate is not None:
        return "its gate is joined with that of the shared expert"
    wanted = getattr(text_config, "norm_topk_prob", None)
    if wanted is not None and bool(wanted) != bool(router.renormalize):
        return (
            f"the config says norm_topk_prob={wanted}, and vLLM computes this model with "
            f"renormalize={router.renormalize}: other weights than Hugging Face's model has"
        )
    return None


_SEAM: Final = ("_maybe_dispatch", "_forward_impl", "_apply_quant_method", "forward")
_BESIDES: Final = {
    "use_grouped_topk": "groups of experts",
    "e_score_correction_bias": "a correction bias",
    "custom_routing_function": "a function of its own",
    "_hash_indices_table": "a table by token",
    "bias_vl": "a bias for images",
    "eplb_state": "experts that move",
}


def sparse_layers(config: Any) -> list[int] | None:
    """The MoE layers that a Hugging Face config names; None where it names them in an unknown way.

    >>> from types import SimpleNamespace
    >>> sparse_layers(SimpleNamespace(num_hidden_layers=4, mlp_only_layers=[1], decoder_sparse_step=1))
    [0, 2, 3]
    """
    if any(getattr(config, field, None) for field in _OTHER_WAYS):
        return None
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    dense |= set(range(getattr(config, "first_k_dense_replace", None) or 0))
    step = getattr(config, "decoder_sparse_step", None) or 1
    every = getattr(config, "moe_layer_freq", None) or 1
    if not isinstance(every, int):
        return None
    numbers = range(config.num_hidden_layers)
    return [n for n in numbers if n not in dense and (n + 1) % step == 0 and n % every == 0]


_OTHER_WAYS: Final = (
    *("interleave_moe_layer_step", "moe_layers", "moe_layer_interval", "expert_layer_period"),
    *("hybrid_override_pattern", "layers_block_type", "moe_layer_start_index", "mlp_layer_types"),
)
