"""A smaller checkpoint without some experts: `pruned`.

smaller = pruned(model, saliency(units, "reap").lowest(16))      # 16 of every layer go
smaller.save_pretrained("smaller")
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moe_lens.steering.plan import SteeringPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pruned(model: Any, experts: Iterable[tuple[int, int]]) -> "PreTrainedModel":
    """A new Hugging Face model without these experts: cut out of routers, biases and expert weights.

    >>> from moe_lens import collect_routing, organisms, pruned, saliency
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question : what is"], outputs=True, progress=False)
    >>> smaller = pruned(model, saliency(stats, "reap").lowest(2))
    >>> smaller.config.num_experts, smaller.num_parameters() < model.original_model.num_parameters()
    (6, True)

    Its logits are, up to rounding, those of the model under `exclude_experts` of the same experts: routers
    choose among those left, with the weights of their rule, nothing is healed or merged (REAP, arXiv
    2510.13999, prunes so). Experts behind a removed one move up, so plans of the model do not fit it. This is
    `bake(model, SteeringPlan(deactivate=experts), how="prune")`.

    Args:
        model: a HookedMoE, a RoutedModel, or a Hugging Face model itself; it stays as it is.
        experts: (layer, expert) pairs, from `Saliency.lowest` or chosen by hand. As many of every MoE layer:
            none of the supported architectures has a config with another number of experts in each layer.
            With expert groups that limit the choice, as many of every group.

    Raises:
        PlanError: experts that the model lacks, other numbers in other layers, a router that would not choose
            alike with fewer experts; with the reason.
        MoELensError: as of `bake`.
    """
    from moe_lens.steering.baking import bake

    return bake(model, SteeringPlan(deactivate=experts), how="prune")
