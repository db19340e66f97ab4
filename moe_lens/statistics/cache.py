"""What a cache of `run_with_cache` says beside its tensors: its model, its padding, the tokens that count."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.errors import DataError, warn
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape


class KnownModel(NamedTuple):
    """What is known about the model that a cache came from."""

    shape: MoEShape
    rules: dict[int, RoutingRule]
    n_vocab: int


def known_model(cache: Any) -> KnownModel | None:
    """What the cache's model knows about itself; None for a dictionary of tensors."""
    model = getattr(cache, "model", None)
    if model is None:
        return None
    from moe_lens.model import registration, wrapper  # a cache without its model needs no TransformerLens

    if not isinstance(model, wrapper.Model):
        return None
    layers = registration.routing_layers(model)
    rules = {layer: moe.rule for layer, moe in layers.items()}
    return KnownModel(registration.shape_of(model, layers), rules, model.cfg.d_vocab)


def known_padding(cache: Any, given: Any, batch: torch.Size) -> Bool[Tensor, "*batch"] | None:
    """Where the prompts' own tokens are; None where that is not known."""
    if given is not None:
        return checked_mask(given, batch)
    mask = getattr(cache, "attention_mask", None)
    if mask is None:
        return None
    dropped_batch = mask.ndim == len(batch) + 1 and mask.shape[0] == 1  # remove_batch_dim=True
    return checked_mask(mask[0] if dropped_batch else mask, batch)


def as_prompts(keep: Bool[Tensor, "*batch"]) -> Bool[Tensor, "prompt pos"]:
    """A mask with one row per prompt, on the CPU; a batch [pos] is a single prompt."""
    return keep.reshape(-1, keep.shape[-1] if keep.ndim else 1).cpu()


def every_token(cache: Any, real: Bool[Tensor, "*batch"] | None, batch: torch.Size) -> Bool[Tensor, "*batch"]:
    """The prompts' own tokens; every position, with a warning, where padding is not known.

    Raises DataError where the cache's run got padding as if it were text.
    """
    if real is not None:
        return real
    if getattr(cache, "padding_unknown", False):
        raise DataError(
            "The run of this cache got tokens that begin or end with the padding token, and no "
            "attention_mask: which positions count is not known, and the model read padding as text. Run "
            "texts, the tokenizer's whole output, or with attention_mask=; or say with mask= which positions "
            "count."
        )
    if len(batch) > 1 and batch[0] > 1:
        warn(
            "This cache does not say which positions are padding, so every position is counted. "
            "Pass mask= if the prompts were padded."
        )
    return torch.ones(batch, dtype=torch.bool)


def checked_mask(mask: Any, batch: torch.Size) -> Bool[Tensor, "*batch"]:
    """A user's mask as a tensor. Raises DataError for another shape, other values, or nothing selected."""
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"The mask must be a tensor of shape {tuple(batch)}; got {mask!r}.") from error
    if mask.shape != batch:
        raise DataError(f"The mask has shape {tuple(mask.shape)}, the routing is over {tuple(batch)}.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise DataError("The mask must hold true and false, or 1 and 0, only.")
    if not bool(mask.any()):
        raise DataError("The mask selects no token; nothing would be counted.")
    return mask.bool()


def positions_in_prompts(
    rows: Bool[Tensor, "prompt pos"], real: Bool[Tensor, "*batch"] | None, masked: bool
) -> Int[Tensor, "token"]:
    """The position of each counted token, from its prompt's first token on."""
    if real is None and masked:
        raise DataError(
            "positions=True needs to know where each prompt begins, and this cache does not say which "
            "positions are padding; also pass attention_mask=."
        )
    unpadded = torch.ones_like(rows) if real is None else real.cpu().reshape(rows.shape)
    return (unpadded.long().cumsum(1) - 1).clamp(min=0)[rows]


def counted_tokens(tokens: Any, keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "token"]:
    """The ids of the tokens that count. Raises DataError for tokens of another shape or kind."""
    try:
        tokens = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"vocabulary=True needs tokens= of the run; got {tokens!r}.") from error
    if tokens.shape != keep.shape or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise DataError(
            f"tokens must be integers of shape {tuple(keep.shape)}; got {tokens.dtype} {tuple(tokens.shape)}."
        )
    return tokens[keep.cpu()].flatten().long()
