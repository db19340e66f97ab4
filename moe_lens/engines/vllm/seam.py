"""Where vLLM's layers are entered: after the gate, and where the experts are chosen.

`MoERunner._maybe_dispatch` gets hidden states and router logits right after the gate and before any exchange
between ranks, so that its rows are the worker's own tokens. `_compute_routing` of a router returns weights
and logical experts, before any are renamed for load balancing.
"""

import functools
from typing import Any

from moe_lens.engines.vllm.private_names import private
from moe_lens.engines.vllm.steered_rows import steered_rows
from moe_lens.errors import MoELensError


def wrap_layers() -> None:
    """Let every MoE layer look for its tables. A layer without any (`Tables`) runs as before."""
    _wrap_dispatch(private().MoERunner)
    for name in ("FusedTopKRouter", "CPURouter"):
        _wrap_routing(getattr(private(), name))


def _wrap_dispatch(runner: Any) -> None:
    dispatch = runner._maybe_dispatch

    @functools.wraps(dispatch)
    def _maybe_dispatch(self: Any, hidden_states: Any, router_logits: Any) -> Any:
        if hasattr(self, "moe_lens_sign"):
            router_logits = _steered(self, router_logits)
        return dispatch(self, hidden_states, router_logits)

    runner._maybe_dispatch = _maybe_dispatch


def _steered(layer: Any, logits: Any) -> Any:
    n_rows = logits.shape[0]
    if logits.shape[-1] != layer.moe_lens_sign.shape[-1]:
        n_experts = layer.moe_lens_sign.shape[-1]
        raise MoELensError(f"{layer.layer_name}: {logits.shape[-1]} router logits for {n_experts} experts.")
    slot = layer.moe_lens_slot[:n_rows]
    steered = steered_rows(
        logits, layer.moe_lens_sign[slot], layer.moe_lens_epsilon[slot], layer.moe_lens_strength[slot]
    )
    layer.moe_lens_logits[:n_rows].copy_(steered)
    return steered


def _wrap_routing(router: Any) -> None:
    compute = router._compute_routing

    @functools.wraps(compute)
    def _compute_routing(self: Any, hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
        weights, indices = compute(self, hidden_states, router_logits, *args, **kwargs)
        records = getattr(self, "moe_lens_records", None)
        if records is not None:
            n_rows = indices.shape[0]
            records[0][:n_rows].copy_(indices)
            records[1][:n_rows].copy_(weights)
        return weights, indices

    router._compute_routing = _compute_routing
