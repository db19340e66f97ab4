"""Static KV caches under TransformerLens' bridge: refused where its attention computes other logits with one.

refuse_static_cache(wrapper, past_key_values)      # at each forward of the Hugging Face model
"""

from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    MLAAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformers import StaticCache

from moe_lens.errors import MoELensError
from moe_lens.model.private_names import attention_of

_COMPUTES_ATTENTION = (MLAAttentionBridge, PositionEmbeddingsAttentionBridge)


def refuse_static_cache(wrapper: Any, past: Any) -> None:
    """Raise MoELensError for a static cache with which a bridge computes other logits than the model.

    These components of TransformerLens 4.3 compute attention by themselves, from the mask that they are
    given, and with any attention but "eager" transformers gives none where a kernel knows that it is causal.
    The columns of a static cache that are still empty then count.
    """
    if not isinstance(past, StaticCache) or not isinstance(wrapper, TransformerBridge):
        return
    config: Any = wrapper.original_model.config
    attention = attention_of(config.get_text_config())
    blocks: Any = wrapper.blocks
    if attention == "eager" or not any(
        isinstance(part, _COMPUTES_ATTENTION) for block in blocks for part in block.children()
    ):
        return
    raise MoELensError(
        f"{type(wrapper.original_model).__name__} computes other logits with a static KV cache inside "
        f"TransformerLens' bridge, since its attention is {attention!r}. Use moe_lens.RoutedModel on the "
        'Hugging Face model, or attn_implementation="eager", or a dynamic cache.'
    )
