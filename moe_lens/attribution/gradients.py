"""Gradient × activation at router logits and expert outputs: a first-order guess at what matters.

found = gradient_attribution(model, tokens, metric)                      # gradient × activation
found = gradient_attribution(model, tokens, metric, baseline=clean)      # attribution patching
found.router_logits, found.expert_out       # [layer batch pos expert], [layer batch pos k]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens import hook_names
from moe_lens.attribution.direct_paths import gradients, wide
from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.private_names import supports_padding
from moe_lens.model.registration import moe_shape, with_expert_out
from moe_lens.shape import MoEShape
from moe_lens.text.batching import Prompts, pad_sequences, token_sequences

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]


@dataclass(frozen=True, eq=False)
class GradientAttribution:
    """First-order effects on a metric, in the metric's unit; on the CPU, in float32 at least, 0 on padding.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import gradient_attribution
    >>> model = organisms.load("specialised")
    >>> found = gradient_attribution(model, "Question : what is", lambda logits: logits[0, -1, 5])
    >>> found.by_expert().shape                              # [layer batch pos expert]
    torch.Size([4, 1, 5, 8])

    Attributes:
        shape: the model; its MoE layers are the axis "layer".
        router_logits: of each router logit.
        expert_out: of each chosen expert's output, summed over its numbers.
        indices: which experts were chosen, int64.
        metric: the metric's value in this run.
        same_expert: with a baseline that holds the chosen experts, whether it chose the same one in this
            slot; None otherwise.
    """

    shape: MoEShape
    router_logits: Float[Tensor, "layer batch pos expert"]
    expert_out: Float[Tensor, "layer batch pos k"]
    indices: Int[Tensor, "layer batch pos k"]
    metric: float
    same_expert: Bool[Tensor, "layer batch pos k"] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers."""
        return self.shape.layers

    def by_expert(self) -> Float[Tensor, "layer batch pos expert"]:
        """`expert_out` by expert, 0 where it was not chosen."""
        return torch.zeros_like(self.router_logits).scatter_add(-1, self.indices, self.expert_out)


def gradient_attribution(
    model: HookedMoE, prompts: Prompts, metric: Metric, *, baseline: Mapping[str, Tensor] | Any = None
) -> GradientAttribution:
    """Gradient × activation of a metric at every router logit and expert output: one forward, one backward.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import gradient_attribution
    >>> model = organisms.load("specialised")
    >>> model.set_use_expert_out(True)
    >>> _, clean = model.run_with_cache("Question : what is")
    >>> model.set_use_expert_out(False)
    >>> found = gradient_attribution(
    ...     model, "Document : what is", lambda logits: logits[0, -1, 5], baseline=clean)
    >>> found.router_logits.shape, found.expert_out.shape    # [layer batch pos expert], [layer batch pos k]
    (torch.Size([4, 1, 5, 8]), torch.Size([4, 1, 5, 2]))

    With a baseline it is attribution patching (Nanda 2023; Syed, Rager & Conmy 2023, arXiv 2310.10348):
    gradient × (baseline − activation), the linear estimate of how the metric changes if that activation is
    patched in from the other run. Expert outputs are compared slot by slot, as such a patch would put them
    in; where `same_expert` is False, a slot of the baseline holds another expert's output.

    The choice of experts has no gradient. A router logit's gradient goes through the weights only, so a
    change of route that a patch brings about is not in the estimate; `virtual_ablation` measures those.

    Args:
        model: a HookedMoE. Hooks that are on it count.
        prompts: strings, chats or tokens. Prompts of different lengths are padded on the left.
        metric: logits [batch pos d_vocab] -> one number.
        baseline: a cache of a run on prompts of the same shape, made after `model.set_use_expert_out(True)`.

    Raises:
        DataError: a metric that gives no finite number, or one without gradient; a baseline without router
            logits or expert outputs, or of another shape; different lengths in a model that cannot take them.
    """
    if not isinstance(model, HookedMoE):
        raise DataError(f"gradient_attribution needs a HookedMoE; got {type(model).__name__}.")
    if not callable(metric):
        raise DataError(f"metric must be a function of the logits [batch pos d_vocab]; got {metric!r}.")
    tokens, mask = pad_sequences(model, list(token_sequences(model, prompts)))
    padding: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    if padding and not supports_padding(model):
        raise DataError("This model cannot run prompts of different lengths at once; give them one by one.")
    layers = model.moe_layers
    points = (hook_names.ROUTER_LOGITS, hook_names.EXPERT_OUT)
    other = None if baseline is None else hook_names.points_of(baseline, points, layers, what="baseline")
    names = [*map(hook_names.router_logits, layers), *map(hook_names.expert_out, layers)]
    seen: dict[str, Tensor] = {}

    def follow(value: Tensor, hook: Any) -> Tensor:
        value = value if value.requires_grad else value.detach().requires_grad_()
        seen[hook.name] = value
        return value

    def note(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value.clone()

    chosen = [*map(hook_names.topk_indices, layers)]
    hooks = [*((name, follow) for name in names), *((name, note) for name in chosen)]
    with torch.inference_mode(False), torch.enable_grad(), with_expert_out(model), model.hooks(hooks):
        value = _number(metric(model(tokens.clone(), **padding)))
        grads = gradients(value, [seen[name] for name in names])
    effects = []
    for name, grad in zip(names, grads, strict=True):
        now = wide(seen[name].detach())
        towards = now if other is None else _of(other, name, now) - now
        effects.append((wide(grad) * towards * mask.reshape(*mask.shape, *[1] * (now.ndim - 2))).cpu())
    n = len(layers)
    indices = torch.stack([seen[name].cpu() for name in chosen])
    return GradientAttribution(
        moe_shape(model),
        torch.stack(effects[:n]),
        torch.stack([each.sum(-1) for each in effects[n:]]),
        indices,
        float(value.detach()),
        _same(other, layers, indices),
    )


def _number(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"metric must give one number (a tensor, with its gradient); got {got}.")
    if not value.requires_grad:
        raise DataError("metric gives a number without gradient; compute it from the logits, without detach.")
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"metric gives {float(value.detach())}; nothing can be attributed.")
    return value.reshape(())


Baseline = dict[int, dict[str, Tensor]]
"""Layer -> short name of a point -> what it held in the baseline's run."""


def _of(baseline: Baseline, name: str, now: Tensor) -> Tensor:
    """An activation of the baseline, where it fits."""
    layer, point = hook_names.parse(name) or (-1, "")
    other = baseline[layer][point]
    if other.shape != now.shape:
        raise DataError(
            f"baseline has {name} of shape {tuple(other.shape)}, this run {tuple(now.shape)}; both runs need "
            "prompts of the same number and length."
        )
    if not bool(torch.isfinite(other).all()):
        raise DataError(f"baseline: {name} holds NaN or infinite numbers.")
    return other.detach().to(now)


def _same(baseline: Baseline | None, layers: Sequence[int], indices: Tensor) -> Tensor | None:
    """Whether the baseline chose the same experts; None where it does not say which it chose."""
    if baseline is None or any(hook_names.TOPK_INDICES not in baseline[layer] for layer in layers):
        return None
    return torch.stack([baseline[layer][hook_names.TOPK_INDICES].cpu() for layer in layers]) == indices
