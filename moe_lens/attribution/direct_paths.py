"""The direct path: how the logits follow from what each part of the model writes, everything else held fixed.

    path = direct_path(model, tokens)          # one forward
    path.logits                                # [batch pos d_vocab], in a graph that is affine in ...
    path.expert_out[layer], path.parts         # ... outputs of experts, of attention, embedding, biases...

On this path attention, routing and everything that experts compute are constants; only the residual stream
carries a change of one part to the logits, through norms with the scales that they had in this run. So the
gradient of a logit, times what a part wrote, is exactly the part's share of the logit, and the shares add up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_lens import hook_names
from moe_lens.errors import MoELensError
from moe_lens.model.hf_models import decoder_of, original_model, text_config
from moe_lens.model.layers import unwrap
from moe_lens.model.registration import routing_layers, running_of, with_expert_out
from moe_lens.model.state import ForwardState
from moe_lens.model.wrapper import Model

_TOLERANCE: Final = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest output; half: 5e-2
_PASSING_ON: Final = (nn.Dropout, nn.Identity)  # modules that change nothing outside training
_NAMES: Final = {
    "self_attn": "attn",
    "self_attention": "attn",
    "feed_forward": "mlp",
    "block_sparse_moe": "mlp",
    "mamba": "mixer",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
}
"""Hugging Face's name of a part of a block -> TransformerLens' name, where no bridge says it."""


@dataclass(frozen=True, eq=False)
class Part:
    """Something that is added into the residual stream or the logits.

    Attributes:
        name: "embed", "blocks.3.attn", "ln_final.bias"...
        tensor: where it is added, in the graph of the logits.
        value: what it adds there.
    """

    name: str
    tensor: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class DirectPath:
    """One run of a model, as an affine function of what its parts wrote.

    Attributes:
        logits: [batch pos d_vocab], what the model returned; before the soft cap if it has one.
        expert_out: layer -> outputs of the chosen experts [batch pos k d_model], leaves of the graph.
        indices: layer -> the chosen experts [batch pos k].
        parts: everything else that is added.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    expert_out: dict[int, Float[Tensor, "batch pos k d"]]
    indices: dict[int, Int[Tensor, "batch pos k"]]
    parts: tuple[Part, ...]

    def shares(self, target: Float[Tensor, "batch"]) -> tuple[Tensor, Tensor]:
        """How much of `target`, one number a row made of its logits, experts and parts wrote.

        Returns: shares of experts [layer batch pos k] and of parts [part batch]; in float32 at least.
        """
        tensors = [*self.expert_out.values(), *(part.tensor for part in self.parts)]
        grads = gradients(target.sum(), tensors)
        n_layers = len(self.expert_out)
        experts = [
            (wide(grad) * wide(out.detach())).sum(-1)
            for grad, out in zip(grads, self.expert_out.values(), strict=False)
        ]
        parts = [
            (wide(grad) * wide(part.value)).reshape(len(target), -1).sum(-1)
            for grad, part in zip(grads[n_layers:], self.parts, strict=True)
        ]
        device = experts[0].device  # layers may lie on several
        stacked = (torch.stack([share.to(device) for share in shares]) for shares in (experts, parts))
        return next(stacked), next(stacked)


def direct_path(model: Model, tokens: Int[Tensor, "batch pos"]) -> DirectPath:
    """Run a model on tokens without padding, and keep its direct path. The model is left as it was.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> path = direct_path(model, model.to_tokens("Question : what is"))
    >>> experts, parts = path.shares(path.logits[:, -1, 5])          # [layer batch pos k], [part batch]
    >>> bool((experts.sum() + parts.sum() - path.logits[0, -1, 5]).abs() < 1e-4)
    True

    Raises:
        MoELensError: a norm that is neither an RMSNorm nor a LayerNorm; blocks whose parts are not modules.
    """
    with torch.inference_mode(False), torch.enable_grad(), with_expert_out(model):
        freezer = _Freezer(model)
        try:
            freezer.install()
            with model.hooks(freezer.point_hooks()):
                logits = model(tokens.clone())
        finally:
            freezer.remove()
        parts = [*freezer.parts, *freezer.non_routed()]
    capped = logit_cap(model) is not None
    return DirectPath(
        freezer.unembedded if capped else logits, freezer.expert_out, freezer.indices, tuple(parts)
    )


def logit_cap(model: Model) -> float | None:
    """c if the model returns c · tanh(logits / c), as Gemma 4 does; None if it has no soft cap."""
    return getattr(text_config(original_model(model)), "final_logit_softcapping", None)


def gradients(target: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a number with respect to some tensors; zeros for those that it does not depend on."""
    grads = torch.autograd.grad(target, tensors, allow_unused=True)
    return [
        torch.zeros_like(tensor) if grad is None else grad
        for tensor, grad in zip((tensor.detach() for tensor in tensors), grads, strict=True)
    ]


def wide(numbers: Tensor) -> Tensor:
    """In float32 at least: sums of products in half precision lose too many digits."""
    return numbers if numbers.dtype == torch.float64 else numbers.float()


@dataclass
class _Freezer:
    """Torch hooks on the modules of a model that make its logits affine in what its parts write."""

    model: Model
    parts: list[Part] = field(default_factory=list)
    expert_out: dict[int, Tensor] = field(default_factory=dict)
    indices: dict[int, Tensor] = field(default_factory=dict)
    blocks_with_experts: dict[str, tuple[nn.Module, Any, Any]] = field(default_factory=dict)
    their_outputs: dict[str, Tensor] = field(default_factory=dict)
    unembedded: Any = None
    forward: ForwardState = field(default_factory=ForwardState)
    handles: list[Any] = field(default_factory=list)

    def install(self) -> None:
        trunk, blocks = _decoder(self.model)
        first = unwrap(blocks[0])
        self.handles.append(first.register_forward_pre_hook(self._cut_embedding, with_kwargs=True))
        for number, block in enumerate(blocks):
            inner = unwrap(block)
            own = {} if inner is block else {id(child): name for name, child in block.named_children()}
            for name, child in inner.named_children():  # by TransformerLens' names
                name = own.get(id(child), name if own else _NAMES.get(name, name))
                self._freeze(f"blocks.{number}.{name}", child, number)
        norms = [child for child in trunk.children() if _is_norm(child)]
        for number, norm in enumerate(norms):
            self._freeze("ln_final" if len(norms) == 1 else f"ln_final.{number}", norm, None)
        for child in trunk.children():
            if _is_hyper(child):
                self._hold_mixing(child)
        unembed = original_model(self.model).get_output_embeddings()
        self.handles.append(unembed.register_forward_hook(self._keep_unembedded))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def point_hooks(self) -> list[tuple[Any, Callable[..., Any]]]:
        """Hooks that make experts' outputs leaves of the graph, and note whose outputs they are."""

        def leave(outputs: Tensor, hook: Any) -> Tensor:
            leaf = outputs.detach().requires_grad_()
            self.expert_out[hook_names.layer_of(hook.name)] = leaf
            return leaf

        def note(indices: Tensor, hook: Any) -> None:
            self.indices[hook_names.layer_of(hook.name)] = indices.clone()
            self.forward = hook.state

        layers = self.model.moe_layers
        return [
            *((hook_names.topk_indices(layer), note) for layer in layers),
            *((hook_names.expert_out(layer), leave) for layer in layers),
        ]

    @torch.no_grad()
    def non_routed(self) -> list[Part]:
        """What MoE blocks add beside their routed experts: they run again, with experts that output zero."""
        names = [hook_names.expert_out(layer) for layer in self.model.moe_layers]
        silent = self.model.hooks([(name, lambda outputs, hook: torch.zeros_like(outputs)) for name in names])
        with running_of(self.model).again(self.forward), silent:  # so that hooks know the prompts
            return [
                Part(name, self.their_outputs[name], _first(name, block(*args, **kwargs)))
                for name, (block, args, kwargs) in self.blocks_with_experts.items()
            ]

    def _freeze(self, name: str, module: nn.Module, layer: int | None) -> None:
        """One module of a decoder layer: a norm, a mixing of streams, or a branch off the residual stream."""
        if isinstance(unwrap(module), _PASSING_ON):
            return
        if _is_norm(module):
            self.handles.append(module.register_forward_hook(self._linear_norm(name), with_kwargs=True))
        elif _is_hyper(module):
            self._hold_mixing(module)
        else:
            moe = routing_layers(self.model).get(-1 if layer is None else layer)
            inside = set() if moe is None else set(map(id, module.modules()))
            runs_experts = moe is not None and id(moe.experts) in inside
            runs_block = moe is not None and id(moe.block) in inside
            self.handles += [
                module.register_forward_pre_hook(self._branch_in(name, runs_block), with_kwargs=True),
                module.register_forward_hook(self._branch_out(name, runs_experts, runs_block)),
            ]

    def _hold_mixing(self, module: nn.Module) -> None:
        """Hyper-connections (DeepSeek-V4): their mixing weights, computed from a norm, are held fixed."""
        for inner in module.modules():
            if _is_norm(inner) and unwrap(inner) is inner:
                self.handles.append(inner.register_forward_hook(lambda module, args, output: output.detach()))

    def _cut_embedding(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Everything before the first block becomes one leaf of the graph."""
        given = args[0] if args else kwargs["hidden_states"]
        leaf = given.detach().requires_grad_()
        self.parts.append(Part("embed", leaf, leaf.detach()))
        if args:
            return (leaf.clone(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": leaf.clone()}

    def _branch_in(self, name: str, keep: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            args, kwargs = tuple(map(_detach, args)), {key: _detach(arg) for key, arg in kwargs.items()}
            if keep:
                self.blocks_with_experts[name] = (module, args, kwargs)
            return args, kwargs

        return hook

    def _branch_out(self, name: str, runs_experts: bool, runs_block: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = _first(name, output)
            if runs_block:
                self.their_outputs[name] = first
            if not runs_experts:
                first = first.detach()
                if first.is_floating_point():
                    first.requires_grad_()
                    self.parts.append(Part(name, first, first.detach()))
            first = first.clone()  # Hugging Face may write into it
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    def _linear_norm(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given = args[0] if args else next(iter(kwargs.values()))
            scaled, bias = _as_linear(name, unwrap(module), given, output.detach())
            frozen = output.detach() + (scaled - scaled.detach()).to(output.dtype)
            if bias is not None:
                self.parts.append(Part(f"{name}.bias", frozen, bias.expand_as(frozen)))
            return frozen

        return hook

    def _keep_unembedded(self, module: Any, args: Any, output: Tensor) -> None:
        self.unembedded = output
        inner: Any = unwrap(module)
        if getattr(inner, "bias", None) is not None:  # of zeros in a bridge, where the model has none
            with align_module_device(inner):
                bias = inner.bias.detach().clone().to(output.device)
            self.parts.append(Part("unembed.bias", output, bias.expand_as(output)))


def _as_linear(name: str, norm: Any, given: Tensor, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the norm with each token's scale held fixed, its bias): their sum is the norm's output.

    Its weight (w, 1 + w or none) and its scale are those that fit the output best.
    """
    with align_module_device(norm):
        weight, bias = (
            None if tensor is None else wide(tensor.detach()).to(given.device).clone()
            for tensor in (getattr(norm, "weight", None), getattr(norm, "bias", None))
        )
    wanted = wide(output) if bias is None else wide(output) - bias
    x = wide(given)
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    fits = []
    for multiplier in (torch.ones_like(x[..., :1]),) if weight is None else (weight, 1 + weight):
        direction = x.detach() * multiplier
        size = direction.square().sum(-1, keepdim=True)
        scale = (direction * wanted).sum(-1, keepdim=True) / size.where(size > 0, 1)
        off = float((scale * direction - wanted).abs().max())
        fits.append((off, scale * multiplier))
    off, multiplier = min(fits, key=lambda fit: fit[0])
    if not off <= _TOLERANCE.get(output.dtype, 5e-2) * float(wanted.abs().max()):
        raise MoELensError(
            f"{name}: {type(norm).__name__} is neither an RMSNorm nor a LayerNorm as moe_lens knows them "
            f"(off by {off:.2g}), or hooks change its output (take them off); the direct path through it is "
            "not known."
        )
    return x * multiplier, bias


def _decoder(model: Model) -> tuple[nn.Module, list[nn.Module]]:
    """The module that holds the decoder's blocks, and the norm after them; and the blocks."""
    trunk, blocks = decoder_of(original_model(model), routing_layers(model))
    if trunk is None:
        raise MoELensError(
            f"{model.cfg.model_name}: its MoE blocks do not stand in one list of decoder blocks, so the "
            "residual stream between them is not known."
        )
    return trunk, blocks


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(unwrap(module)).__name__


def _is_hyper(module: nn.Module) -> bool:
    return "Hyper" in type(unwrap(module)).__name__


def _detach(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) else argument


def _first(name: str, output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        raise MoELensError(
            f"{name} gives a {type(first).__name__}, not a tensor, so its share is unknown; take off hooks "
            "that change its output."
        )
    return first
