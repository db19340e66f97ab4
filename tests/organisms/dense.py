"""Tiny dense models and their tokens, of which splits are made."""

from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SHAPE: Final[dict[str, Any]] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}


def llama(**changes: Any) -> PreTrainedModel:
    """A random Llama, the same for the same changes of its config."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, **changes})
    return LlamaForCausalLM(config).eval()


def tokens(n: int = 40, seed: int = 0) -> torch.Tensor:
    """Random tokens [n 12]."""
    return torch.randint(60, (n, 12), generator=torch.Generator().manual_seed(seed))
