"""`RoutedModel`: hook points on the routing of a Hugging Face model, which stays exactly what it was.

    model = RoutedModel(hf_model, tokenizer)               # or RoutedModel.from_pretrained(name, ...)
    logits, cache = model.run_with_cache(prompt)
    hf_model.save_pretrained(folder)                       # ... as before, hooked or not
    model.detach()                                         # no trace is left

Each MoE layer l has blocks.{l}.mlp.hook_router_logits, .hook_topk_indices and .hook_topk_weights (see
hook_names), with block-level aliases, and hook_expert_out when asked for; every block has hook_resid_pre and
hook_resid_post. For TransformerLens' own points inside attention and experts use `HookedMoE`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformers import AutoModelForCausalLM

from moe_lens import hook_names
from moe_lens.checks import may_be_padded
from moe_lens.errors import DataError, HookError, MoELensError, warn
from moe_lens.model import registration
from moe_lens.model.contexts import HooksOfTheirOwn
from moe_lens.model.expert_points import uninstall_expert_out
from moe_lens.model.generating import Generating
from moe_lens.model.hf_models import decoder_of, numbered_layers
from moe_lens.model.layers import MoELayer
from moe_lens.model.loading import own_tokenizer, placed, with_quantisation
from moe_lens.model.model_config import ModelConfig, config_of
from moe_lens.model.reading import as_numbers
from moe_lens.model.residual_points import check_in_place, install_residual, residual_before
from moe_lens.model.router_points import install, installed_points, points_of, uninstall
from moe_lens.model.running import Running
from moe_lens.model.self_check import check_router
from moe_lens.model.wrapper import Model

_RETURN_TYPES = ("logits", "loss", "both", None)


class RoutedModel(Model, Generating, HooksOfTheirOwn):
    """A Hugging Face MoE model, unchanged, with hook points on its routing and its residual stream.

    >>> from moe_lens import RoutedModel, SteeringPlan, organisms, steer_hooks
    >>> model = RoutedModel.from_pretrained(organisms.path("specialised"))
    >>> logits, cache = model.run_with_cache("Question : what is")
    >>> cache["router_logits", 0].shape                       # [batch pos expert]
    torch.Size([1, 5, 8])
    >>> steered = model.run_with_hooks("Question : what is",
    ...                                fwd_hooks=steer_hooks(SteeringPlan(deactivate=[(0, 1)])))

    As a TransformerLens `HookedRootModule` it has `hooks`, `run_with_hooks`, `run_with_cache`, `add_hook` and
    `reset_hooks`. Nothing hooked, Hugging Face's own code runs; hooked, the model's parameters, buffers,
    modules and keys are those that it had, and so are `save_pretrained`, `generate`, `output_router_logits`,
    adapters, compilation and dispatch. Only the routers' `forward` and the model's `generate` are wrapped,
    and hooks stand at its blocks, until `detach`.

    Args:
        hf_model: an MoE model (`OlmoeForCausalLM`, `MixtralForCausalLM`...) on any devices, in any dtype.
        tokenizer: optional; without one the model takes tokens only.
        prepend_bos: whether a BOS stands before every text (also the attribute `model.prepend_bos`); None as
            the tokenizer does by itself.

    Raises:
        UnsupportedRouterError: no router, or one without a rule. RouterMismatchError: a router does not
            compute what its rule says. MoELensError: not a Hugging Face model, or one inside a bridge.
    """

    def __init__(self, hf_model: nn.Module, tokenizer: Any = None, prepend_bos: bool | None = None):
        super().__init__()
        layers = _layers_of(hf_model)
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self.prepend_bos = prepend_bos
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        vars(self)[registration.LAYERS] = layers
        running = next((points.running for moe in layers.values() if (points := points_of(moe))), None)
        if running is None:
            running = self._install(layers)
        else:
            running.widen(hf_model, decoder_of(hf_model, layers)[0])
        running.wrapper = self
        vars(self)[registration.RUNNING] = running
        for number, moe in layers.items():  # hooked before: the points that are there
            points = installed_points(moe)
            self.name_points({number: dict(zip(hook_names.POINTS, points.points, strict=False))})
            if points.expert_out is not None:
                self.name_points({number: {hook_names.EXPERT_OUT: points.expert_out}})
        for residual in running.residual:
            for point in (residual.pre, residual.post):
                self.hook_dict[str(point.name)] = self.mod_dict[str(point.name)] = point
        self.training = hf_model.training
        for point in self.hook_dict.values():
            point.train(self.training)

    def _install(self, layers: dict[int, MoELayer]) -> Running:
        decoder, blocks = decoder_of(self.hf_model, layers)
        running, shape = Running(self), registration.shape_of(self, layers)
        running.watch(self.hf_model, decoder)
        for moe in layers.values():
            install(moe, shape, running)
        running.residual = [install_residual(block, n, running) for n, block in enumerate(blocks)]
        return running

    def name_points(self, added: dict[int, dict[str, HookPoint]]) -> None:
        """Let hooks and caches know points (layer -> short name -> point)."""
        for number, points in added.items():
            for short, point in points.items():
                point.name = hook_names.name(number, short)
                self.hook_dict[point.name] = self.mod_dict[point.name] = point
                self.mod_dict[f"blocks.{number}.{short}"] = point.train(self.training)

    def forget_points(self, number: int, points: tuple[str, ...]) -> None:
        """The other way round."""
        for short in points:
            self.hook_dict.pop(hook_names.name(number, short), None)
            for name in (hook_names.name(number, short), f"blocks.{number}.{short}"):
                self.mod_dict.pop(name, None)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        tokenizer: Any = None,
        prepend_bos: bool | None = None,
        **kwargs: Any,
    ) -> "RoutedModel":
        """Load a causal language model with transformers, as it loads it, and put the points in.

        Args:
            name_or_path: hub id or checkpoint folder; an existing folder goes before a name.
            tokenizer: by default the checkpoint's own, padding on the left.
            prepend_bos: as in `RoutedModel(...)`.
            **kwargs: passed to `AutoModelForCausalLM.from_pretrained`: dtype (a torch.dtype, its name, or
                "auto"; by default the checkpoint's), device_map, quantization_config (load_in_4bit=True and
                load_in_8bit=True of older transformers are bitsandbytes' configs), attn_implementation,
                revision, trust_remote_code...

        Raises:
            as `RoutedModel(...)`; MoELensError: there is no such folder, or a shipped organism is named; what
                transformers raises for a checkpoint that it cannot load.
        """
        kwargs = with_quantisation(kwargs)
        name_or_path = placed(name_or_path, "RoutedModel")
        hf_model = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
        tokenizer = _own_tokenizer(name_or_path, kwargs) if tokenizer is None else tokenizer
        return cls(hf_model, tokenizer, prepend_bos)

    @property
    def cfg(self) -> ModelConfig:
        """Sizes, device and dtype, read from the model as it is now."""
        return config_of(self.hf_model, len(registration.running_of(self).residual))

    @property
    def original_model(self) -> nn.Module:
        """The Hugging Face model, under the name that TransformerLens' bridge gives it."""
        return self.hf_model

    def train(self, mode: bool = True) -> "RoutedModel":
        """As of any module; the hook points follow."""
        super().train(mode)
        for point in self.hook_dict.values():
            point.train(mode)
        return self

    def forward(
        self,
        input: Any = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Any = None,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on a text, texts, tokens [batch pos] or [pos], or embeddings [batch pos d_model].

        Args:
            input: several texts are padded and masked.
            return_type: "logits" [batch pos d_vocab], "loss" (mean next-token cross-entropy in nats, padding
                left out), "both", or None.
            loss_per_token: [batch pos - 1] instead of the mean.
            prepend_bos: None as the tokenizer does by itself; see `to_tokens`.
            padding_side: by default the tokenizer's.
            attention_mask: [batch pos], 0 on padding; with a cache, over the cached columns, too.
            stop_at_layer: stop before this block, from the end if negative, and give the residual stream
                [batch pos d_model] there; its own `hook_resid_pre` does not fire.
            **kwargs: passed to the Hugging Face model.

        Raises:
            DataError: an input or a return_type that is none of these. HookError: from hooks.
        """
        self._check_attached()
        kwargs.pop("return_dict", None)  # its logits are read by name
        if return_type not in _RETURN_TYPES:
            raise DataError(f"return_type must be one of {_RETURN_TYPES}; got {return_type!r}.")
        inputs = self._inputs(input, prepend_bos, padding_side, attention_mask)
        reading = registration.running_of(self).reading(input)
        with nullcontext() if torch.compiler.is_compiling() else reading:
            if stop_at_layer is not None and (block := self._block(stop_at_layer)) is not None:
                here = (str(registration.running_of(self).residual[0].pre.name), lambda value, hook: None)
                with self.hooks([here]):  # no other thread runs the model meanwhile
                    return residual_before(block, lambda: self.hf_model(**{**inputs, **kwargs}))
            output = self.hf_model(**{**inputs, **kwargs})
        if return_type is None:
            return None
        logits = output.logits
        if return_type == "logits":
            return logits
        if "input_ids" not in inputs:
            raise DataError("A loss needs the tokens; give tokens or text instead of embeddings.")
        loss = lm_cross_entropy_loss(
            logits,
            inputs["input_ids"].to(logits.device),
            inputs.get("attention_mask"),
            per_token=loss_per_token,
        )
        return loss if return_type == "loss" else (logits, loss)

    def run_with_hooks(
        self,
        input: Any = None,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in TransformerLens: a forward under hooks, which are gone afterwards."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(input, return_type=return_type, stop_at_layer=stop_at_layer, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Any = (),
        bwd_hooks: Any = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        training: bool = False,
    ) -> Iterator["RoutedModel"]:
        """As in TransformerLens: hooks while the block lasts.

        Args:
            training: allow routing hooks in training mode, where they are refused otherwise. Noise on what
                a router reads (`router_jitter_noise`) stays; a router that draws experts at random
                (Phi-3.5-MoE) chooses as in eval mode, with a warning. Under gradient checkpointing call
                backward() within the context: blocks are computed again, under the same hooks or not at all.

        Raises:
            HookError: a name that the model does not have, or hooks that are no pairs (name, function); a
                block of the model was replaced since the points were put in.
        """
        fwd_hooks, bwd_hooks = self._checked_hooks(fwd_hooks), self._checked_hooks(bwd_hooks)
        check_in_place(self.hf_model, registration.running_of(self).residual)
        with (
            registration.allow_training(self, training),
            super().hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts),
        ):
            yield self

    def add_hook(
        self,
        name: Any,
        hook: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """As in TransformerLens; a name that the model does not have raises `HookError`."""
        self._check_name(name, hook)
        super().add_hook(name, hook, dir, is_permanent, level, prepend)

    def run_with_cache(
        self,
        input: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: str | list[str] | Callable[[str], bool] | None = None,
        stop_at_layer: int | None = None,
        pos_slice: Any = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in TransformerLens: (output, cache) of a forward; cache is an `ActivationCache` or a dictionary.

        The cache has attributes `attention_mask`, bool [batch pos] or None, and `padding_unknown`, as a
        `HookedMoE`'s has.
        """
        if isinstance(input, list) and not input:
            raise DataError("The list of prompts is empty; give at least one prompt.")
        output, tensors = super().run_with_cache(
            input,
            names_filter=self._full_names(names_filter),
            remove_batch_dim=remove_batch_dim,
            incl_bwd=incl_bwd,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
            pos_slice=pos_slice,
            stop_at_layer=stop_at_layer,
            **kwargs,
        )
        tensors = self._with_aliases(tensors)
        if not return_cache_object:
            return output, tensors
        cache = ActivationCache(tensors, self, has_batch_dim=not remove_batch_dim)
        mask = self._own_tokens(input, {**kwargs, "pos_slice": pos_slice})
        unknown = mask is None and may_be_padded(self.tokenizer, as_numbers(input))
        vars(cache).update(attention_mask=mask, padding_unknown=unknown)
        return output, cache

    def detach(self) -> nn.Module:
        """Take everything out again: gives the Hugging Face model, without a trace of the points."""
        running = registration.running_of(self)
        for moe in registration.routing_layers(self).values():
            uninstall_expert_out(moe)
            uninstall(moe)
        for residual in running.residual:
            residual.take_off(residual.block)
        running.unwatch()
        for name in (registration.LAYERS, registration.RUNNING):
            vars(self).pop(name)
        self.hook_dict, self.mod_dict = {}, {}
        return self.hf_model

    def to_logits(self, residual: Float[Tensor, "batch pos *d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of a residual stream, as if it were what the last block gives: the logit lens.

        >>> from moe_lens import RoutedModel, organisms
        >>> model = RoutedModel.from_pretrained(organisms.path("specialised"))
        >>> logits, cache = model.run_with_cache("Question : what is")
        >>> torch.equal(model.to_logits(cache["resid_post", -1]), logits)
        True

        The model's own final norm, unembedding and scaling, on every family, at the cost of a forward.
        """
        self._check_attached()
        residuals = registration.running_of(self).residual
        if residual.ndim < 3:
            raise DataError(
                f"to_logits needs a residual stream [batch pos d_model]; got {tuple(residual.shape)}."
            )
        residual = residual.to(self.cfg.dtype)
        tokens = torch.zeros(residual.shape[:2], dtype=torch.long, device=self.cfg.device)
        instead = (str(residuals[-1].post.name), lambda value, hook: residual)
        with self.hooks([instead]):
            return self.hf_model(input_ids=tokens, use_cache=False).logits

    def _check_attached(self) -> None:
        if not registration.running_of(self).is_watching:
            raise HookError(
                "This RoutedModel has no hook points any more: they were detached, or a `steered` block in "
                "which it was made has ended. Make another one: attach(hf_model, tokenizer)."
            )

    def _block(self, layer: int) -> nn.Module | None:
        """A block by its number; None for the number after the last one, as in TransformerLens."""
        blocks = [points.block for points in registration.running_of(self).residual]
        if not -len(blocks) <= layer <= len(blocks):
            raise DataError(f"stop_at_layer={layer}: this model has blocks 0 to {len(blocks) - 1}.")
        return None if layer == len(blocks) else blocks[layer]

    def _with_aliases(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A cache's tensors under block-level names, too, which `cache["router_logits", 0]` looks for."""
        aliases = {}
        for name, tensor in tensors.items():
            base = name.removesuffix("_grad")
            if (parsed := hook_names.parse(base)) is not None:
                aliases[f"blocks.{parsed[0]}.{parsed[1]}{name[len(base) :]}"] = tensor
        return {**tensors, **aliases}

    def _full_names(self, names: Any) -> Any:
        """A filter by names, of which some may be aliases, by full names."""
        if not isinstance(names, str | list | tuple):
            return names
        names = [names] if isinstance(names, str) else names
        for name in names:
            self._check_name(name)
        return [str(self.mod_dict[name].name) for name in names]

    def _check_name(self, name: Any, hook: Any = None) -> None:
        """Raise HookError for a name that the model does not have, on which `hook` is put; filters pass."""
        self._check_attached()
        if not isinstance(name, str) or name in self.mod_dict:
            return
        parsed = hook_names.parse(name)
        if parsed is not None and parsed[0] not in self.moe_layers:
            raise self._no_router(name, parsed[0], hook)
        if parsed is not None and parsed[1] == hook_names.EXPERT_OUT:
            raise HookError(f"{name} is switched off; call model.set_use_expert_out(True) first.")
        raise HookError(
            f"{hook_names.unknown(name, self.mod_dict)} A RoutedModel has the points of routing and of the "
            "residual stream (model.hook_dict); for those inside attention and experts use HookedMoE."
        )

    def _checked_hooks(self, hooks: Any) -> list[tuple[Any, Any]]:
        hooks = hook_names.hook_list(hooks)
        for name, hook in hooks:
            self._check_name(name, hook)
        return hooks


def _layers_of(hf_model: Any) -> dict[int, MoELayer]:
    """The MoE layers by the number of their block, checked."""
    if not isinstance(hf_model, nn.Module):
        raise MoELensError(
            f"A Hugging Face model in memory is needed; got {type(hf_model).__name__}. For a name or folder "
            "use RoutedModel.from_pretrained."
        )
    if any(hasattr(module, "original_component") for module in hf_model.modules()):
        raise MoELensError(
            f"{type(hf_model).__name__} is wrapped by a TransformerBridge, which has points of its own. Use "
            "moe_lens.attach(bridge) on that bridge, or a freshly loaded model."
        )
    layers = {
        number: MoELayer(f"blocks.{number}.mlp", moe.block, moe.router)
        for number, moe in numbered_layers(hf_model).items()
    }
    registration.common_size(layers.values())
    for moe in layers.values():
        if points_of(moe) is None:
            check_router(moe)
    return layers


def _own_tokenizer(name_or_path: str | Path, kwargs: dict[str, Any]) -> Any:
    """The checkpoint's tokenizer, padding on the left; None, with a warning, where it has none."""
    tokenizer = own_tokenizer(str(name_or_path), kwargs, padding_side="left")
    if tokenizer is None:
        warn(f"{name_or_path} has no tokenizer that can be loaded; the model takes tokens only.")
    return tokenizer
