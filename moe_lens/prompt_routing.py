"""The route of one prompt, token by token: what a figure colours.

routing = route_prompt(model, "Document : the capital of Eldria is Bergen .")
routing.tokens, routing.indices                        # the tokens' text; [layer pos k]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.batching import token_sequences
from moe_lens.bridge_layers import moe_shape
from moe_lens.errors import DataError
from moe_lens.moe_shape import MoEShape


@dataclass(frozen=True, eq=False)
class PromptRouting:
    """Which experts every token of one prompt went to, and with what weights.

    Attributes:
        shape: the model; rows of the tensors are `shape.layers`.
        tokens: the text of each token, special ones included.
        indices: int64, [layer pos k], the experts.
        weights: float32, [layer pos k], their routing weights.
    """

    shape: MoEShape
    tokens: tuple[str, ...]
    indices: Int[Tensor, "layer pos k"]
    weights: Float[Tensor, "layer pos k"]

    def row(self, layer: int) -> int:
        """The row of a layer. Raises DataError for a layer without router."""
        if layer not in self.shape.layers:
            raise DataError(f"Layer {layer} has no router; MoE layers are {self.shape.layers}.")
        return self.shape.layers.index(layer)

    def top_expert(self, layer: int) -> Int[Tensor, "pos"]:
        """The expert with the largest weight at each token of a layer."""
        row = self.row(layer)
        best = self.weights[row].argmax(-1, keepdim=True)
        return self.indices[row].gather(-1, best)[:, 0]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer, token and chosen expert: layer, pos, token, expert, weight."""
        return pd.DataFrame(
            [
                (layer, pos, token, expert, weight)
                for layer, experts, weights in zip(
                    self.shape.layers, self.indices.tolist(), self.weights.tolist(), strict=True
                )
                for pos, token in enumerate(self.tokens)
                for expert, weight in zip(experts[pos], weights[pos], strict=True)
            ],
            columns=["layer", "pos", "token", "expert", "weight"],
        )


def route_prompt(
    model: TransformerBridge,
    prompt: Any,
    *,
    hooks: Sequence[tuple[str | Callable[..., Any], Callable[..., Any]]] = (),
) -> PromptRouting:
    """The route of one prompt.

    >>> from moe_lens import organisms, route_prompt
    >>> routing = route_prompt(organisms.load("specialised"), "Question : what is")
    >>> routing.tokens[1:], routing.indices.shape
    (('Question', ':', 'what', 'is'), torch.Size([4, 5, 2]))

    Args:
        model: a HookedMoE, or a bridge after `attach`.
        prompt: a string, a chat (a list of messages), or token numbers [pos].
        hooks: forward hooks to run under, `steer_hooks(plan)` for example.

    Raises:
        DataError: an empty prompt, more than one prompt, or tokens that the model does not have.
    """
    sequences = list(token_sequences(model, prompt))
    if len(sequences) != 1:
        raise DataError(f"route_prompt takes one prompt; got {len(sequences)}.")
    tokens, shape = sequences[0], moe_shape(model)
    points = (hook_names.topk_indices, hook_names.topk_weights)
    wanted = {name(layer) for name in points for layer in shape.layers}
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        _, cache = model.run_with_cache(
            tokens[None].to(model.cfg.device), names_filter=lambda name: name in wanted, return_type=None
        )
    indices, weights = (
        torch.stack([cache[name(layer)][0].cpu() for layer in shape.layers]) for name in points
    )
    return PromptRouting(shape, tuple(_texts(model, tokens)), indices, weights.float())


def _texts(model: TransformerBridge, tokens: Int[Tensor, "pos"]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in tokens.tolist()]
    return [model.tokenizer.decode([token]) for token in tokens.tolist()]
