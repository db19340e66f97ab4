"""Hugging Face's own router code, run on router logits of our choice: the oracle for every family.

    with rerouted(plain.original_model, edit, seen):     # every MoE router of a HF model, in a bridge or not
        plain(tokens())                                  # edit: [token expert] -> [token expert]

`identity_router(router)` is a copy of a router whose weight is the identity, without a bias on its logits and
without a soft cap: its logits are the hidden states that it gets. Correction biases, scales, groups and code
stay Hugging Face's. Shares no code with moe_lens.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


class Decision(NamedTuple):
    """What a router decided, [token expert] each: logits, weights (0 where not chosen), who was chosen."""

    logits: Tensor
    weights: Tensor
    chosen: Tensor


Seen = dict[int, list[Decision]]
"""Layer -> its decisions, one for each forward pass."""


def routers(hf_model: nn.Module) -> dict[int, Any]:
    """Layer number -> router of its feed-forward block, in a HF model, inside a bridge or not."""
    found = {}
    for name, module in hf_model.named_modules():
        if re.search(r"(Router|Gating)$", type(module).__name__) and "self_attention" not in name:
            number = re.search(r"\blayers\.(\d+)\.", name)
            assert number is not None, name
            found[int(number.group(1))] = module
    return found


def moe_block(hf_model: nn.Module, layer: int) -> Any:
    """The HF module whose child is the layer's router: the MoE block, or the whole layer (Gemma 4)."""
    router = routers(hf_model)[layer]
    return next(
        module
        for module in hf_model.modules()
        if not hasattr(module, "original_component")
        and any(getattr(child, "original_component", child) is router for child in module.children())
    )


def arguments(hf_model: nn.Module, layer: int, token_ids: Tensor) -> tuple[Any, ...]:
    """What a layer's block passes to its router's forward after the hidden states."""
    seen: list[tuple[Any, ...]] = []
    router = routers(hf_model)[layer]
    handle = router.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    try:
        hf_model(input_ids=token_ids, use_cache=False)
    finally:
        handle.remove()
    return seen[-1]


def identity_router(router: Any, dtype: torch.dtype = torch.float32, top_k: int | None = None) -> Any:
    """A copy of `router` whose logits are the hidden states it gets, in `dtype`.

    With `top_k` it chooses so many experts, whatever their group.
    """
    bare = copy.copy(router)
    bare.__dict__ = {name: value for name, value in vars(router).items() if name != "forward"}
    twin = copy.deepcopy(bare)
    layer = _logits_layer(twin)
    n_experts = layer.weight.shape[0]
    layer.weight = nn.Parameter(torch.eye(n_experts, dtype=dtype))
    if hasattr(twin, "hidden_dim"):
        twin.hidden_dim = n_experts
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(torch.zeros(n_experts, dtype=dtype))
    if hasattr(twin, "router_logit_softcapping"):
        twin.router_logit_softcapping = 0.0
    if type(router).__name__ == "Gemma4TextRouter":
        twin.norm, twin.scale, twin.scalar_root_size = nn.Identity(), nn.Parameter(torch.ones(())), 1.0
    if top_k is not None:
        twin.top_k = top_k
        if hasattr(getattr(twin, "config", None), "top_k_experts"):
            twin.config.top_k_experts = top_k
        if hasattr(twin, "topk_group"):
            twin.topk_group = twin.num_group
    return twin.requires_grad_(False)


def decide(router: Any, logits: Tensor, *rest: Any, top_k: int | None = None) -> Decision:
    """What HF's router code makes of these logits [token expert]; `rest` as in `arguments`."""
    given = logits[None] if type(router).__name__ == "AfmoeTokenChoiceRouter" else logits
    return _decision(router, identity_router(router, logits.dtype, top_k)(given, *rest), logits)


def by_expert(logits: Tensor, indices: Tensor, weights: Tensor) -> Decision:
    """A decision from indices and weights [*batch k], no expert twice."""
    logits, indices, weights = (part.flatten(0, -2) for part in (logits, indices, weights))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, indices.long(), True)
    dense = torch.zeros(logits.shape, dtype=weights.dtype).scatter(-1, indices.long(), weights)
    return Decision(logits, dense, chosen)


@contextmanager
def rerouted(hf_model: nn.Module, edit: Edit | dict[int, Edit], seen: Seen | None = None) -> Iterator[None]:
    """Meanwhile HF's router code decides on edited logits; its decisions are added to `seen`.

    `edit` is for all layers, or layer -> edit.
    """
    with ExitStack() as stack:
        for layer, router in routers(hf_model).items():
            own = edit.get(layer, _same) if isinstance(edit, dict) else edit
            record = [] if seen is None else seen.setdefault(layer, [])
            stack.enter_context(patch.object(router, "forward", _Rerouted(router, own, record)))
        yield


class _Rerouted:
    def __init__(self, router: Any, edit: Edit, record: list[Decision]):
        self.router, self.edit, self.record = router, edit, record
        self.original = router.forward

    def __call__(self, hidden: Tensor, *rest: Any) -> Any:
        output, logits = self._own_logits(hidden, *rest)
        edited = self.edit(logits)
        twin = identity_router(self.router, edited.dtype)
        given = twin(edited.reshape(*hidden.shape[:-1], -1), *rest)
        result = tuple(
            part.to(like.dtype) if isinstance(part, Tensor) else part
            for part, like in zip(given, output, strict=True)
        )
        self.record.append(_decision(self.router, result, edited))
        return result

    def _own_logits(self, hidden: Tensor, *rest: Any) -> tuple[Any, Tensor]:
        """The router's own output, and its logits [token expert]."""
        if type(self.router).__name__ == "Gemma4TextRouter":  # which returns probabilities instead
            made: list[Tensor] = []
            handle = self.router.proj.register_forward_hook(lambda module, args, logits: made.append(logits))
            output = self.original(hidden, *rest)
            handle.remove()
            return output, made[0]
        output = self.original(hidden, *rest)
        place = {"Llama4Router": 1, "JetMoeTopKGating": 4}.get(type(self.router).__name__, 0)
        return output, output[place].flatten(0, -2)


def _same(logits: Tensor) -> Tensor:
    return logits


def _logits_layer(router: Any) -> Any:
    """The module that owns the weight which makes logits: the router itself or a linear layer in it."""
    return next(
        (getattr(router, name) for name in ("gate", "proj", "layer") if hasattr(router, name)), router
    )


def _decision(router: Any, output: Any, logits: Tensor) -> Decision:
    """A router's output, whatever its layout."""
    if type(router).__name__ == "Llama4Router":
        return Decision(logits, output[0], output[0] != 0)
    if type(router).__name__ == "JetMoeTopKGating":
        _, token, weights, sizes, _ = output
        expert = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        dense = torch.zeros(logits.shape, dtype=weights.dtype).index_put((token, expert), weights)
        chosen = torch.zeros(logits.shape, dtype=torch.bool).index_put((token, expert), torch.tensor(True))
        return Decision(logits, dense, chosen)
    return by_expert(logits, output[2], output[1])
