"""Gradient × activation at router logits and expert outputs: a first-order guess at what matters.

    found = gradient_attribution(model, tokens, metric)                      # gradient × activation
    found = gradient_attribution(model, tokens, metric, baseline=clean)      # attribution patching
    found.router_logits, found.expert_out       # [layer batch pos expert], [layer batch pos k]

The choice of experts has no gradient, so what a change of route does is not in these numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lens import hook_names
from moe_lens.attribution.direct_paths import gradients, wide
from moe_lens.attribution.results import GradientAttribution
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.metric import Metric, check_metric
from moe_lens.model.private_names import supports_padding
from moe_lens.model.registration import moe_shape, with_expert_out
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.text.batching import Prompts, pad_sequences, padding, token_sequences


def gradient_attribution(
    model: Model,
    prompts: Prompts,
    metric: Metric,
    *,
    baseline: Mapping[str, Tensor] | Any = None,
    hooks: Hooks = (),
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

    The choice of experts has no gradient: a router logit's gradient flows through the weights only. So the
    estimate does not contain the change of route that a patch causes; `virtual_ablation` measures that.

    Args:
        model: a HookedMoE or RoutedModel. Hooks that are on it act, too.
        prompts: strings, chats or tokens, see `moe_lens.text.Prompts`, all in one forward. Prompts of
            different lengths are padded on the left.
        metric: logits [batch pos d_vocab] -> one number.
        baseline: the cache of a run on prompts of the same shape, made after
            `model.set_use_expert_out(True)`.
        hooks: forward hooks to run under (`steer_hooks(plan)`, for one).

    Raises:
        DataError: a metric that gives anything but one finite number with a gradient; a baseline without
            router logits or expert outputs, or of another shape; prompts of different lengths in a model that
            cannot run them together.
    """
    check_hooked(model, error=DataError)
    check_metric(metric)
    sequences = list(token_sequences(model, prompts))
    if len({len(sequence) for sequence in sequences}) > 1 and not supports_padding(model):
        raise DataError("This model cannot run prompts of different lengths at once; give them one by one.")
    tokens, mask = pad_sequences(model, sequences)
    attention_mask = padding(mask)
    layers = model.moe_layers
    points = (hook_names.ROUTER_LOGITS, hook_names.EXPERT_OUT)
    other = None if baseline is None else hook_names.points_of(baseline, points, layers, what="baseline")
    followed = [*map(hook_names.router_logits, layers), *map(hook_names.expert_out, layers)]
    choices = [hook_names.topk_indices(layer) for layer in layers]
    seen: dict[str, Tensor] = {}

    def follow(value: Tensor, hook: Any) -> Tensor:
        value = value if value.requires_grad else value.detach().requires_grad_()
        seen[hook.name] = value
        return value

    def note(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value.clone()

    watchers = [*((name, follow) for name in followed), *((name, note) for name in choices)]
    with torch.inference_mode(False), torch.enable_grad(), with_expert_out(model):
        with model.hooks([*hook_list(hooks), *watchers]):
            value = _number(metric(model(tokens.clone(), **attention_mask)))
        grads = gradients(value, [seen[name] for name in followed])
    effects = []
    for name, grad in zip(followed, grads, strict=True):
        now = wide(seen[name].detach())
        towards = now if other is None else _of(other, name, now) - now
        effects.append((wide(grad) * towards * mask.reshape(*mask.shape, *[1] * (now.ndim - 2))).cpu())
    indices = torch.stack([seen[name].cpu() for name in choices])
    return GradientAttribution(
        shape=moe_shape(model),
        router_logits=torch.stack(effects[: len(layers)]),
        expert_out=torch.stack([effect.sum(-1) for effect in effects[len(layers) :]]),
        indices=indices,
        metric=float(value.detach()),
        same_expert=_same(other, layers, indices),
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
"""Layer -> short name of a point -> its value in the baseline's run."""


def _of(baseline: Baseline, name: str, now: Tensor) -> Tensor:
    """An activation of the baseline, checked to fit this run's."""
    layer, point = hook_names.parse(name) or (-1, "")
    other = baseline[layer][point]
    if other.shape != now.shape:
        raise DataError(
            f"baseline has {name} of shape {tuple(other.shape)}, this run {tuple(now.shape)}; both runs need "
            "equally many prompts of equal lengths."
        )
    if not bool(torch.isfinite(other).all()):
        raise DataError(f"baseline: {name} holds NaN or infinite numbers.")
    return other.detach().to(now)


def _same(baseline: Baseline | None, layers: Sequence[int], indices: Tensor) -> Tensor | None:
    """Whether the baseline chose the same experts; None if it does not say which it chose."""
    if baseline is None or any(hook_names.TOPK_INDICES not in baseline[layer] for layer in layers):
        return None
    return torch.stack([baseline[layer][hook_names.TOPK_INDICES].cpu() for layer in layers]) == indices
