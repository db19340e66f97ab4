"""Runs in which a token's column does not tell its place in a prompt, and why: positions are refused there.

    reason = of_forward(hf_model, kwargs) or of_generation(hf_model, args, kwargs)     # None: it tells

Plans and edits on every token, and those one a row, need no places.
"""

from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from moe_lens.model.private_names import adapters_are_off

VIRTUAL: Final = (
    "prompt learning (prompt tuning, prefix tuning) puts virtual tokens before each prompt, so that columns "
    "are not those of the prompt. Steer without positions, or with the adapters off"
)
PACKED: Final = (
    "several prompts run in one row (continuous batching, packed sequences), and hooks do not know where "
    "each begins. Give each prompt a row of its own (generate instead of generate_batch), or act without "
    "positions"
)
GUIDANCE: Final = (
    "classifier-free guidance runs a second, unconditional prompt within each step of the generation. Leave "
    "guidance_scale out, or act without positions"
)


def adds_tokens(model: Any) -> bool:
    """Whether adapters (PEFT) put virtual tokens before what the model is given."""
    learns = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return bool(learns) and not adapters_are_off(model)


def is_within_prompt_learning(frame: FrameType | None) -> bool:
    """Whether a call of such a model is among a frame's callers: hooks may be on the model inside alone."""
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and adds_tokens(frame.f_locals.get("self")):
            return True
        frame = frame.f_back
    return False


def of_forward(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the columns of a forward with these arguments tell no places; None where they do."""
    if adds_tokens(model):
        return VIRTUAL
    if kwargs.get("cu_seq_lens_q") is not None:
        return PACKED
    numbers = kwargs.get("position_ids")
    alone = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
    if alone and isinstance(numbers, Tensor) and numbers.ndim == 2 and len(numbers) == 1:
        return PACKED if bool((numbers.diff() != 1).any()) else None  # transformers reads it so, too
    return None


def of_generation(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why, of a call of `generate` with these arguments after the prompt; None where they do."""
    prepares = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    if adds_tokens(model) or adds_tokens(prepares):  # of a PEFT model around it
        return VIRTUAL
    processors = kwargs.get("logits_processor") or ()
    guides = any(isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in processors)
    return GUIDANCE if guides or setting("guidance_scale", model, args, kwargs) not in (None, 1) else None


def setting(name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A setting of a call of `generate`, as transformers finds it."""
    if name in kwargs:
        return kwargs[name]
    configs = (
        kwargs.get("generation_config", args[0] if args else None),
        getattr(model, "generation_config", None),
    )
    return next((value for each in configs if (value := getattr(each, name, None)) is not None), None)


def inferred_mask(tokens: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask [batch pos] that `generate` infers from padding tokens where it is given none."""
    pad, eos = (setting(name, model, args, kwargs) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        return None
    ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    return None if int(pad) in ends else tokens.ne(int(pad)).long()
