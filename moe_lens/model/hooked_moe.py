"""`HookedMoE`: a TransformerLens bridge with causal hook points on routing.

    model = HookedMoE.from_pretrained("allenai/OLMoE-1B-7B-0125-Instruct")
    model = HookedMoE.from_hf(hf_model, tokenizer)
    moe_lens.attach(bridge)                     # an existing bridge becomes a HookedMoE
    moe_lens.detach(bridge)                     # ... and what it was before, with HF's own router code

Each MoE layer l gets blocks.{l}.mlp.hook_router_logits, .hook_topk_indices and .hook_topk_weights (see
hook_names), with block-level aliases, and on request .hook_expert_out. Every TransformerLens tool knows them.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.slice import Slice

from moe_lens import hook_names
from moe_lens.checks import looks_padded, may_be_padded
from moe_lens.encoding import adds_bos, has_own_mask, padded_rows
from moe_lens.errors import DataError, HookError, MoELensError, warn
from moe_lens.model.bridge_reading import BridgeReading, follow_tokenizer
from moe_lens.model.compatibility import refuse_wrong_options
from moe_lens.model.layers import find_moe_layers, no_moe
from moe_lens.model.loading import boot, check_wrappable, placed, wrap
from moe_lens.model.private_names import become
from moe_lens.model.reading import is_written
from moe_lens.model.registration import (
    allow_training,
    common_size,
    find_routing_layers,
    register,
    running_of,
    shape_of,
    unregister,
)
from moe_lens.model.router_points import points_of
from moe_lens.model.self_check import check_router
from moe_lens.model.state import Generation, as_prompts
from moe_lens.model.wrapper import Model, check_options

P = ParamSpec("P")


def signature_of(base: Callable[P, Any]) -> Callable[[Callable[..., Any]], Callable[P, Any]]:
    """Show an override with the parameters of the TransformerLens method that it overrides.

    `help`, `inspect.signature`, completion and type checkers then know them; the docstring stays its own.
    """
    return functools.wraps(base, assigned=())


class HookedMoE(Model, BridgeReading, TransformerBridge):
    """A TransformerBridge whose routers can be read and edited.

    >>> from moe_lens import hook_names, organisms
    >>> model = organisms.load("specialised")                # or HookedMoE.from_pretrained(name_or_folder)
    >>> logits, cache = model.run_with_cache("Question : what is")
    >>> cache["router_logits", 0].shape                      # [batch pos expert]
    torch.Size([1, 5, 8])
    >>> def avoid_expert_0(router_logits, hook):
    ...     router_logits, hook.rule = hook.rule.without(router_logits, 0)
    ...     return router_logits
    >>> edited = model.run_with_hooks("Question : what is",
    ...                               fwd_hooks=[(hook_names.router_logits(0), avoid_expert_0)])

    It is a TransformerBridge in every other respect; see TransformerLens' documentation.
    """

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, prepend_bos: bool | None = None, **kwargs: Any
    ) -> "HookedMoE":
        """Load a model by its name on the Hugging Face hub or from a folder, and attach the hook points.

        Args:
            name_or_path: hub id ("allenai/OLMoE-1B-7B-0125-Instruct") or checkpoint folder. An existing
                folder goes before a name.
            prepend_bos: whether a BOS stands before every text; None as the tokenizer does by itself.
            **kwargs: passed to `TransformerBridge.boot_transformers`: device, dtype (a torch.dtype, its name,
                or "auto", the default: the checkpoint's), device_map, offload_folder, n_devices, max_memory,
                revision, tokenizer, hf_config_overrides...

        Raises:
            UnsupportedRouterError: the model has no router, or one without a routing rule.
            RouterMismatchError: a router does not compute what its rule says.
            MoELensError: TransformerLens has no adapter for the architecture, or there is no such folder.
        """
        bridge, adds = boot(placed(name_or_path, "HookedMoE"), **kwargs)
        follow_tokenizer(bridge, adds if prepend_bos is None else prepend_bos)
        return cls._of(bridge)

    @classmethod
    def from_hf(
        cls, hf_model: nn.Module, tokenizer: Any = None, *, prepend_bos: bool | None = None
    ) -> "HookedMoE":
        """Wrap a Hugging Face model that is already in memory, in place, and put it in eval mode.

        Args:
            hf_model: an MoE model (`OlmoeForCausalLM`, `MixtralForCausalLM`...) on any device, in any dtype.
            tokenizer: optional; without one the model takes token tensors only.
            prepend_bos: whether a BOS stands before every text; None as the tokenizer does by itself.

        Raises:
            UnsupportedRouterError, RouterMismatchError: as in `from_pretrained`; the model is left as it was.
            MoELensError: the model is wrapped already, by a bridge or a RoutedModel.
        """
        check_wrappable(hf_model, tokenizer)
        checked = _checked_routers(hf_model)
        adds = None if tokenizer is None else adds_bos(tokenizer)
        bridge = wrap(hf_model, tokenizer)
        follow_tokenizer(bridge, adds if prepend_bos is None else prepend_bos)
        return cls._of(bridge, checked)

    @classmethod
    def _of(cls, bridge: TransformerBridge, checked: Collection[nn.Module] = ()) -> "HookedMoE":
        become(bridge, cls)
        attach(bridge, checked)
        assert isinstance(bridge, cls)
        return bridge

    @signature_of(TransformerBridge.forward)
    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; hooks know which text is running (see `positions=` of the interventions).

        The input may also be a chat or several, or a tokenizer's output (a `BatchEncoding` or dictionary with
        "input_ids" and "attention_mask"). Warns of a token tensor with padding but without `attention_mask`,
        where every number would be wrong.

        Raises:
            DataError: a text longer than the model's context, which TransformerLens would cut.
        """
        state, given = running_of(self), input
        input, kwargs = self._read(input, kwargs)
        unmasked = kwargs.get("attention_mask") is None and not state.generating
        if unmasked and not has_own_mask(given) and looks_padded(self.tokenizer, input):
            warn(
                "Some rows of these tokens begin or end with the padding token, without an attention_mask: "
                "the model reads padding as text. Pass attention_mask=, or the prompts as a list of strings."
            )
        with state.reading(given):
            return super().forward(input, *args, **kwargs)

    @signature_of(TransformerBridge.generate)
    def generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; hooks know which tokens are the prompt's.

        The input may also be a chat or several, or a tokenizer's output, padded on either side.
        """
        check_options(kwargs)
        with running_of(self).generation(input):
            input, kwargs = self._read(input, kwargs, writes=True)
            return super().generate(input, *args, **kwargs)

    @signature_of(TransformerBridge.hf_generate)
    def hf_generate(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; hooks know which tokens are the prompt's, and text gets its usual BOS."""
        bound = inspect.signature(super().hf_generate).bind(input, *args, **kwargs)
        options = {name: value for name, value in bound.arguments.items() if name != "generation_kwargs"}
        options |= bound.arguments.get("generation_kwargs", {})
        del options["input"]
        check_options(options)
        as_text = is_written(input) and options.get("return_type", "input") != "tokens"
        if as_text:
            options["return_type"] = "tokens"
        with running_of(self).generation(input):
            tokens, options = self._read(input, options, writes=True, tokens=True)
            output: Any = super().hf_generate(tokens, **options)
        return self._decoded(output, alone=isinstance(input, str)) if as_text else output

    @signature_of(TransformerBridge.generate_stream)
    def generate_stream(self, input: Any = "", *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens; hooks know which tokens are the prompt's."""
        check_options(kwargs)
        state, generation = running_of(self), Generation(as_prompts(input))
        input, kwargs = self._read(input, kwargs, writes=True)
        stream = iter(super().generate_stream(input, *args, **kwargs))
        while True:
            with state.generation(generation):  # between two steps, other runs are not this generation's
                try:
                    step = next(stream)
                except StopIteration:
                    return
            yield step

    def run_with_cache(
        self,
        input: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: str | list[str] | Callable[[str], bool] | None = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        pos_slice: Any = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in TransformerLens; the cache also gets an attribute `attention_mask`, bool [batch pos] or None.

        It says which positions hold the prompts' own tokens when a list of prompts was padded or a mask was
        given, and lets `RoutingStats.from_cache` leave padding out by itself. `padding_unknown` is True where
        tokens came with padding and without a mask.
        """
        if isinstance(input, list) and not input:
            raise DataError("The list of prompts is empty; give at least one prompt.")
        self._refuse_absent_points(names_filter)
        bridge: Any = super()  # its overloads tell True from False for return_cache_object
        state, given = running_of(self), input
        input, kwargs = self._read(input, kwargs)
        with state.hooking(), state.reading(given):
            output, activations = bridge.run_with_cache(
                *(() if input is None else (input,)),
                return_cache_object=return_cache_object,
                remove_batch_dim=remove_batch_dim,
                names_filter=names_filter,
                stop_at_layer=stop_at_layer,
                start_at_layer=start_at_layer,
                pos_slice=pos_slice,
                incl_bwd=incl_bwd,
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **kwargs,
            )
        if isinstance(activations, ActivationCache):
            mask = self._own_tokens(input, {**kwargs, "pos_slice": pos_slice})
            vars(activations).update(
                attention_mask=mask, padding_unknown=mask is None and may_be_padded(self.tokenizer, input)
            )
        return output, activations

    def run_with_hooks(
        self,
        input: Any,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in TransformerLens; a routing hook on a layer without router raises `HookError`."""
        with running_of(self).hooking():
            return super().run_with_hooks(
                input,
                self._checked_hooks(fwd_hooks),
                self._checked_hooks(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                return_type=return_type,
                stop_at_layer=stop_at_layer,
                start_at_layer=start_at_layer,
                remove_batch_dim=remove_batch_dim,
                **kwargs,
            )

    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Any:
        """As in TransformerLens; a routing hook on a layer without router raises `HookError`."""
        fwd_hooks, bwd_hooks = self._checked_hooks(fwd_hooks), self._checked_hooks(bwd_hooks)
        hooks = super().hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)
        return allow_training(self, False, hooks)

    @signature_of(TransformerBridge.add_hook)
    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; a routing hook on a layer without router raises `HookError`."""
        self._refuse_absent_points(name, args[0] if args else kwargs.get("hook"))
        super().add_hook(name, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the bridge holds the model's weights in TransformerLens' parts, under other names.

        Raises:
            MoELensError: always; it says what to save instead.
        """
        raise MoELensError(
            f"A {type(self).__name__} cannot be saved: TransformerLens' bridge has taken the Hugging Face "
            "model apart, and its keys are others now. Save the model before it is wrapped, or use a "
            "RoutedModel, whose model stays what it is: model.hf_model.save_pretrained(folder). For a "
            "checkpoint that behaves as under a plan: bake(hf_model, plan).save_pretrained(folder)."
        )

    @signature_of(TransformerBridge.enable_compatibility_mode)
    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens, and refused with options that change what this model computes.

        See `wrong_in_compatibility_mode` of `supported_models`: fold_ln where shared experts are exactly as
        wide as the model, fold_value_biases where attention has value biases.
        """
        options = inspect.signature(super().enable_compatibility_mode).bind(*args, **kwargs)
        options.apply_defaults()
        refuse_wrong_options(self, options.arguments)
        super().enable_compatibility_mode(*args, **kwargs)

    def _checked_hooks(self, hooks: Any) -> list[tuple[Any, Any]]:
        hooks = hook_names.hook_list(hooks)
        for name, hook in hooks:
            self._refuse_absent_points(name, hook)
        return hooks

    def _refuse_absent_points(self, names: Any, hook: Any = None) -> None:
        """Raise for a name that no point has, on which `hook` is put; filters pass."""
        names = names if isinstance(names, list | tuple) else [names]
        for name in names:
            parsed = hook_names.parse(name) if isinstance(name, str) else None
            if parsed is None:
                if isinstance(name, str) and name not in self.hook_dict:
                    raise HookError(f"{hook_names.unknown(name, self.hook_dict)} See model.hook_dict.")
                continue
            layer, point = parsed
            if layer not in self.moe_layers:
                raise self._no_router(name, layer, hook)
            if point == hook_names.EXPERT_OUT and not self.use_expert_out:
                raise HookError(f"{name} is switched off; call model.set_use_expert_out(True) first.")

    def _own_tokens(self, input: Any, kwargs: dict[str, Any]) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are not padding; None where that is unknown or cannot matter (one string)."""
        mask = kwargs.get("attention_mask")
        if mask is None and isinstance(input, list) and len(input) > 1:
            rows = [self._row(text, kwargs.get("prepend_bos")) for text in input]
            _, mask = padded_rows(rows, None, self._side(kwargs.get("padding_side")))
        elif (
            mask is None
            and isinstance(input, Tensor)
            and not (input.is_floating_point() or may_be_padded(self.tokenizer, input))
        ):
            mask = torch.ones_like(input if input.ndim == 2 else input[None])
        if mask is None:
            return None
        pos_slice = Slice.unwrap(kwargs.get("pos_slice"))
        return (mask if pos_slice is None else pos_slice.apply(mask, dim=1)).bool()


def attach(bridge: TransformerBridge, checked: Collection[nn.Module] = ()) -> HookedMoE:
    """`moe_lens.attach` of a bridge; routers of `checked` have been compared with their rules already."""
    _require_bridge(bridge, "attach")
    hooked_class, layers = _hooked_class(type(bridge)), find_routing_layers(bridge)
    hooked = [number for number, moe in layers.items() if points_of(moe) is not None]
    if any(hook_names.router_logits(number) not in bridge.hook_dict for number in hooked):
        raise MoELensError(
            "This model's routers are hooked through another bridge or RoutedModel around the same "
            "model; detach that first."
        )
    shape = shape_of(bridge, layers)
    for moe in layers.values():
        if points_of(moe) is None and moe.router not in checked:
            check_router(moe)
    register(bridge, layers, shape)
    become(bridge, hooked_class)
    assert isinstance(bridge, HookedMoE)
    return bridge


def detach(bridge: TransformerBridge) -> TransformerBridge:
    """`moe_lens.detach` of a bridge."""
    _require_bridge(bridge, "detach")
    unregister(bridge)
    become(bridge, _plain_class(type(bridge)))
    return bridge


@cache
def _hooked_class(cls: type[TransformerBridge]) -> type[TransformerBridge]:
    """HookedMoE, or for a subclass of TransformerBridge a class that is both."""
    if issubclass(cls, HookedMoE):
        return cls
    if cls is TransformerBridge:
        return HookedMoE
    return type(f"Hooked{cls.__name__}", (HookedMoE, cls), {"_plain_class": cls})


def _plain_class(cls: type[TransformerBridge]) -> type[TransformerBridge]:
    """The class that `_hooked_class` was given; a user's own subclass of HookedMoE stays what it is."""
    return TransformerBridge if cls is HookedMoE else vars(cls).get("_plain_class", cls)


def _require_bridge(bridge: Any, verb: str) -> None:
    if not isinstance(bridge, TransformerBridge):
        raise MoELensError(
            f"{verb} needs a TransformerBridge, got {type(bridge).__name__}; for a Hugging Face model use "
            "RoutedModel(model) or HookedMoE.from_hf(model)."
        )


def _checked_routers(hf_model: nn.Module) -> set[nn.Module]:
    """The routers of a bare model, compared with their rules, so that a refusal leaves it unchanged."""
    layers = list(find_moe_layers(hf_model))
    if not layers:
        raise no_moe(type(hf_model).__name__)
    if any(points_of(moe) is not None for moe in layers):
        raise MoELensError(
            f"The routers of this {type(hf_model).__name__} are hooked by a RoutedModel; detach that first."
        )
    common_size(layers)
    for moe in layers:
        check_router(moe)
    return {moe.router for moe in layers}
