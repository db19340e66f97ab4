"""k as a setting: how many experts run for each token.

with with_top_k(model, 4):
    logits = model(prompt)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from transformers import PreTrainedModel

from moe_lens.checks import as_index
from moe_lens.errors import MoELensError
from moe_lens.model.hf_models import hf_model_of, numbered_layers, text_config
from moe_lens.model.layers import MoELayer
from moe_lens.routers.biased import FixedExperts
from moe_lens.routers.plain import SparseMixer
from moe_lens.routers.rule import RoutingRule

_NAMES: Final = ("top_k", "num_experts_per_tok")
"""The attributes in which routers, their blocks and models keep k."""
_SIZES_ATTENTION: Final = ("JetMoeTopKGating",)
"""Routers whose config field for k gives the shapes of attention weights, too."""


@contextmanager
def with_top_k(model: Any, k: int) -> Iterator[None]:
    """Let k experts run for each token in every MoE layer; afterwards, and after an exception, as before.

    >>> from moe_lens import organisms, with_top_k
    >>> model = organisms.load("specialised")
    >>> with with_top_k(model, 4):
    ...     _, cache = model.run_with_cache("Question : what is")
    >>> cache["topk_indices", 0].shape, model.top_k              # [batch pos k]
    (torch.Size([1, 5, 4]), 2)

    The model computes what one with this k in its config and the same weights computes; hooks, rules and
    `moe_shape` follow. Routers that do not divide the chosen weights by their sum give larger outputs with
    larger k: that is the family's own arithmetic. k is a setting of the model, not of a thread. The config's
    field is set, too, so that a model saved within keeps this k; JetMoE's is left alone, since the same field
    gives the size of its attention.

    Args:
        model: a HookedMoE, or a Hugging Face model itself.
        k: from 1 to the number of experts; under expert groups, to that of the experts in the chosen groups.

    Raises:
        MoELensError: another k, or a router whose k cannot be set: Phi-3.5-MoE's always runs 2 experts, and
            DeepSeek-V4's hash layers take theirs from a table. The model is left as it was.
    """
    hf_model = hf_model_of(model)
    layers = numbered_layers(hf_model)
    wanted = as_index(k)
    for number, moe in layers.items():
        if (reason := _cannot_run(moe.rule, wanted)) is not None:
            raise MoELensError(f"with_top_k: k = {k!r} is impossible in layer {number}: {reason}.")
    settings = [] if wanted is None else list(_settings(hf_model, layers))
    before = [(owner, name, getattr(owner, name)) for owner, name in settings]
    try:
        for owner, name in settings:
            setattr(owner, name, wanted)
        for number, moe in layers.items():
            if moe.rule.top_k != wanted:
                raise MoELensError(
                    f"with_top_k: {type(moe.router).__name__} in layer {number} still runs {moe.rule.top_k} "
                    f"experts when its top_k is {wanted}, so it reads k from somewhere else. Set it there."
                )
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _cannot_run(rule: RoutingRule, k: int | None) -> str | None:
    """Why a router cannot run k experts, in words; None where it can."""
    most, of = rule.n_experts, "experts"
    groups = getattr(rule, "groups", None)
    if groups is not None:
        most = groups.n_chosen * (rule.n_experts // groups.n_groups)
        of = f"experts in the {groups.n_chosen} of {groups.n_groups} groups that it chooses"
    if k is None or not 1 <= k <= most:
        return f"give a whole number from 1 to {most}, the number of {of}"
    if k == rule.top_k:
        return None
    if isinstance(rule, SparseMixer):
        return "its sparsemixer runs two rounds of one expert each, whatever its top_k says"
    if isinstance(rule, FixedExperts):
        return f"it takes its experts from a table by token id, which names {rule.top_k} for each"
    return None


def _settings(hf_model: PreTrainedModel, layers: dict[int, MoELayer]) -> Iterator[tuple[Any, str]]:
    """(object, attribute) wherever this model keeps the k of its MoE layers."""
    owners: list[Any] = [hf_model]
    for moe in layers.values():
        owners += [moe.block, moe.router]
    for owner in owners:
        yield from ((owner, name) for name in _NAMES if type(getattr(owner, name, None)) is int)
    fields = {moe.row.top_k for moe in layers.values() if type(moe.router).__name__ not in _SIZES_ATTENTION}
    config = text_config(hf_model)
    yield from ((config, name) for name in fields if type(getattr(config, name, None)) is int)
