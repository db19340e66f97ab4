"""Sizes of a Hugging Face model, by the names that TransformerLens' tools read."""

from dataclasses import dataclass
from typing import Any

import torch

from moe_lens.model.hf_models import device_of, text_config


@dataclass(frozen=True)
class ModelConfig:
    """What TransformerLens' tools and this library read of a model; `hf` is Hugging Face's own config."""

    model_name: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    n_heads: int | None
    d_mlp: int | None
    eos_token_id: int | list[int] | None
    device: torch.device
    dtype: torch.dtype
    hf: Any


def config_of(hf_model: Any, n_layers: int) -> ModelConfig:
    """Sizes, device and dtype, read from the model as it is now."""
    config: Any = text_config(hf_model)
    ends = getattr(getattr(hf_model, "generation_config", None), "eos_token_id", None)
    return ModelConfig(
        model_name=str(getattr(hf_model.config, "name_or_path", "") or type(hf_model).__name__),
        n_layers=n_layers,
        d_model=config.hidden_size,
        d_vocab=config.vocab_size,
        n_ctx=getattr(config, "max_position_embeddings", None) or 2**31 - 1,
        n_heads=getattr(config, "num_attention_heads", None),
        d_mlp=getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None),
        eos_token_id=getattr(config, "eos_token_id", None) if ends is None else ends,
        device=device_of(hf_model),
        dtype=next(hf_model.parameters()).dtype,
        hf=config,
    )
