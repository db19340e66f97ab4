"""Models of random weights that the benchmarks run, and prompts for them.

model = olmoe(hidden=256, vocabulary=49152)         # OLMoE's proportions, float32
model = real_size()                                 # OLMoE-1B-7B's own shape, bfloat16, 14 GB
routed, bridge = RoutedModel(sharing(model)), HookedMoE.from_hf(sharing(model))     # no second 14 GB
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

TIE = 1e-5
"""Two logits closer than this share of their standard deviation may change places by rounding."""


def olmoe(
    hidden: int = 64,
    vocabulary: int = 8192,
    *,
    layers: int = 8,
    experts: int = 64,
    top_k: int = 8,
    expert_width: int | None = None,
) -> Any:
    """An OLMoE in float32; unless told otherwise its experts are half as wide as it is, as the real one's."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=expert_width or hidden // 2,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, num_experts=experts,
        num_experts_per_tok=top_k, max_position_embeddings=1024,
    )  # fmt: skip
    return OlmoeForCausalLM(config).eval()


def real_size(layers: int = 16) -> Any:
    """OLMoE-1B-7B's shape in bfloat16: 0.43 GB, and 0.84 GB for each layer. Built in a few seconds.

    Drawing 7 billion numbers takes more than a minute. So every parameter is a stretch of one pool of 16
    million, each from another place on; the pool's length is prime, so that no two experts are alike.
    """
    config = OlmoeConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = OlmoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not stored
    pool = torch.empty(16_777_259, dtype=torch.bfloat16)
    pool.normal_(std=config.initializer_range, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                _fill(parameter.view(-1), pool.roll(-7919 * number))
    return model.eval()


def _fill(flat: Tensor, pool: Tensor) -> None:
    for part in flat.split(len(pool)):
        part.copy_(pool[: len(part)])


def sharing(model: Any) -> Any:
    """A copy of a model with the same parameters and buffers, not copies of them."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def natural_lengths(n_prompts: int, seed: int = 0) -> list[int]:
    """Log-normal lengths of 8 to 600 tokens; half of them below 66."""
    draw = torch.Generator().manual_seed(seed)
    return torch.empty(n_prompts).log_normal_(4.2, 0.9, generator=draw).clamp(8, 600).long().tolist()


def clear_prompts(model: Any, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Random prompts, int64 [pos], on which no router has a tie that rounding could decide.

    So that all ways of counting them, in whatever batches and padding, must find the same integers.
    """
    draw, prompts = torch.Generator().manual_seed(seed), []
    for length in lengths:
        prompt = torch.randint(model.config.vocab_size, (length,), generator=draw)
        while _smallest_gap(model, prompt) < TIE:
            prompt = torch.randint(model.config.vocab_size, (length,), generator=draw)
        prompts.append(prompt)
    return prompts


@torch.no_grad()
def _smallest_gap(model: Any, prompt: Tensor) -> float:
    """Between the last chosen expert's logit and the first one's not chosen, in standard deviations."""
    logits = torch.stack(model.model(prompt[None], output_router_logits=True).router_logits)
    best = logits.topk(model.config.num_experts_per_tok + 1).values
    return float(((best[..., -2] - best[..., -1]) / logits.std(-1)).min())


def padded(prompts: Sequence[Tensor], batch_size: int) -> list[tuple[Tensor, Tensor | None]]:
    """(tokens, mask or None if nothing is padded) [batch pos] of each batch, padded on the left."""
    batches = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(len(prompt) for prompt in batch)
        tokens, mask = torch.zeros(2, len(batch), longest, dtype=torch.int64)
        for row, prompt in enumerate(batch):
            tokens[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        batches.append((tokens, None if bool(mask.all()) else mask))
    return batches
