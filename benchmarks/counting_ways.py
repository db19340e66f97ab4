"""Six ways to count which experts run: each a function of prompts that gives counts, int64 [layer expert].

ways = Ways(olmoe())
ways.all()["RoutedModel"](prompts)
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from models import padded, sharing
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from moe_lens import HookedMoE, RoutedModel, collect_routing

try:
    import nnsight  # pyright: ignore[reportMissingImports]
except ImportError:
    nnsight = None

BARE, HEADLESS = "bare Hugging Face model", "bare decoder, one by one"
OUTPUTS = "outputs" in inspect.signature(collect_routing).parameters
"""Whether counting can also measure what experts write."""

Way = Callable[[Sequence[Tensor]], Tensor | None]


class Ways:
    """One model's parameters under every tool; batches of `batch_size` prompts."""

    def __init__(self, model: Any, batch_size: int = 8) -> None:
        self.bare, self.batch_size = model, batch_size
        self.top_k, self.n_experts = model.config.num_experts_per_tok, model.config.num_experts
        self.routed, self.hooked = RoutedModel(sharing(model)), HookedMoE.from_hf(sharing(model))
        copy = sharing(model)
        self.bridge = build_bridge_from_module(copy, type(copy).__name__, hf_config=copy.config).eval()
        self.traced = nnsight and nnsight.NNsight(sharing(model))

    def all(self) -> dict[str, Way]:
        """By name; the first two count nothing and are what the others are held against."""
        ways: dict[str, Way] = {BARE: self.forward, HEADLESS: self.one_by_one}
        ways["`output_router_logits`, bincount"] = self.by_router_logits
        ways["TransformerLens `run_with_cache`"] = self.by_bridge
        if self.traced is not None:
            ways["nnsight, stopped at the last router"] = self.by_nnsight
        ways |= {"RoutedModel": self.by_routed, "HookedMoE": self.by_hooked}
        return ways | ({"RoutedModel, `outputs=True`": self.with_outputs} if OUTPUTS else {})

    def forward(self, prompts: Sequence[Tensor]) -> None:
        """Batches through the whole model, with its vocabulary's logits."""
        for tokens, mask in padded(prompts, self.batch_size):
            self.bare(tokens, **_masked(mask))

    def one_by_one(self, prompts: Sequence[Tensor]) -> None:
        """Without padding and without the vocabulary's logits: what no batching has to compute in vain."""
        for prompt in prompts:
            self.bare.model(prompt[None])

    def by_router_logits(self, prompts: Sequence[Tensor]) -> Tensor:
        """Hugging Face's own router logits."""
        outputs = (
            (self.bare(tokens, output_router_logits=True, **_masked(mask)).router_logits, mask)
            for tokens, mask in padded(prompts, self.batch_size)
        )
        return self._counted(outputs)

    def by_bridge(self, prompts: Sequence[Tensor]) -> Tensor:
        """The plain bridge's own hook points on the routers."""
        names = [f"blocks.{layer}.mlp.gate.hook_out" for layer in range(self.bridge.cfg.n_layers)]
        options: dict[str, Any] = {"names_filter": names, "return_type": None}

        def outputs() -> Iterable[tuple[list[Tensor], Tensor | None]]:
            for tokens, mask in padded(prompts, self.batch_size):
                _, cache = self.bridge.run_with_cache(tokens, **options, **_masked(mask))
                yield [cache[name] for name in names], mask

        return self._counted(outputs())

    def by_nnsight(self, prompts: Sequence[Tensor]) -> Tensor:
        """Router logits saved by nnsight, which stops the forward after the last of them."""
        return self._counted((self._traced(*batch), batch[1]) for batch in padded(prompts, self.batch_size))

    def _traced(self, tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
        model: Any = self.traced
        options = _masked(mask)
        with model.trace(tokens, **options) as tracer:
            logits = nnsight.save([])  # pyright: ignore[reportOptionalMemberAccess]
            for layer in model.model.layers:
                logits.append(layer.mlp.gate.output[0])
            tracer.stop()
        return logits

    def by_routed(self, prompts: Sequence[Tensor]) -> Tensor:
        return collect_routing(self.routed, prompts, progress=False).counts

    def by_hooked(self, prompts: Sequence[Tensor]) -> Tensor:
        return collect_routing(self.hooked, prompts, progress=False).counts

    def with_outputs(self, prompts: Sequence[Tensor]) -> Tensor:
        options: dict[str, Any] = {"outputs": True}
        return collect_routing(self.routed, prompts, progress=False, **options).counts

    def _counted(self, outputs: Iterable[tuple[Sequence[Tensor], Tensor | None]]) -> Tensor:
        """By hand, from each batch's router logits, [batch * pos, expert] a layer, and its mask."""
        counts = torch.zeros(self.bare.config.num_hidden_layers, self.n_experts, dtype=torch.int64)
        for layers, mask in outputs:
            for layer, logits in enumerate(layers):
                chosen = logits.reshape(-1, self.n_experts).topk(self.top_k).indices
                if mask is not None:
                    chosen = chosen[mask.flatten().bool()]
                counts[layer] += chosen.flatten().bincount(minlength=self.n_experts)
        return counts


def assert_same_counts(ways: dict[str, Way], prompts: Sequence[Tensor], top_k: int = 8) -> None:
    """All ways that count find the same integers, as many as there are tokens, layers and chosen experts."""
    counts = {name: found for name, way in ways.items() if (found := way(prompts)) is not None}
    first, *others = counts
    n_tokens = sum(len(prompt) for prompt in prompts)
    assert counts[first].sum() == n_tokens * top_k * len(counts[first]), f"{first} misses some"
    for name in others:
        assert torch.equal(counts[name], counts[first]), f"{name} counts otherwise than {first}"


def _masked(mask: Tensor | None) -> dict[str, Any]:
    return {} if mask is None else {"attention_mask": mask}
