"""What stands on a Hugging Face model to note its forwards and generations (`running`).

    module.register_forward_pre_hook(Enter(running, of_decoder=False), with_kwargs=True, prepend=True)
    module.register_forward_hook(Leave(running, of_decoder=False), always_call=True)
    hf_model.generate = Generate(running, hf_model.generate)

Objects, so that a deep copy of the model notes its own forwards.
"""

import inspect
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn

from moe_lens.model.state import Bound, Generation, uncompiled
from moe_lens.model.unplaced import inferred_mask, of_generation


class Enter:
    """A forward pre-hook. An object, so that a deep copy of the model notes its own forwards."""

    def __init__(self, running: Any, of_decoder: bool):
        self.running = running
        self.of_decoder = of_decoder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() and not self.running.needs_state:
            return
        _enter(self.running, module, args, kwargs, self.of_decoder)


class Leave:
    """A forward hook that is called after an exception, too."""

    def __init__(self, running: Any, of_decoder: bool):
        self.running = running
        self.of_decoder = of_decoder

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() and not self.running.needs_state:
            return
        _leave(self.running, self.of_decoder, output is not None)


@uncompiled
def _enter(
    running: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], of_decoder: bool
) -> None:
    running.enter(named(module, args, kwargs), of_decoder)


@uncompiled
def _leave(running: Any, of_decoder: bool, completed: bool) -> None:
    running.leave(of_decoder, completed)


class Generate:
    """Stands in for a Hugging Face model's `generate`: the prompt is what it is given."""

    def __init__(self, running: Any, original: Any):
        update_wrapper(self, original)
        self.running = running
        self.original = original
        self.was_on_instance = not inspect.ismethod(original)

    def __getstate__(self) -> dict[str, Any]:
        own = ("running", "was_on_instance")
        return {**{name: vars(self)[name] for name in own}, "original": Bound.of(self.original)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        update_wrapper(self, self.original)

    def __call__(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        candidates = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        given = next((tensor for tensor in candidates if isinstance(tensor, Tensor)), None)
        model, mask = self.running.model, padding_mask(kwargs.get("attention_mask"))
        generation = Generation(unplaced=of_generation(model, args, kwargs))
        if given is not None and given.ndim > 1:
            generation.n_prompts, generation.n_prompt = given.shape[:2]
            if mask is not None and kwargs.get("past_key_values") is not None:
                # the new columns alone are given
                generation.n_prompt = max(generation.n_prompt, mask.shape[1])
            generation.attention_mask = inferred_mask(given, model, args, kwargs) if mask is None else mask
        with self.running.generation(generation):
            return self.original(inputs, *args, **kwargs)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by their names; the first one is its input, whatever its name."""
    if not args:
        return kwargs
    first, *others = args
    names = list(inspect.signature(module.forward).parameters)[1:] if others else []
    return {"input_ids": first, **dict(zip(names, others, strict=False)), **kwargs}


def padding_mask(mask: Any) -> Tensor | None:
    """A mask [batch total]; those of other forms tell no padding."""
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
