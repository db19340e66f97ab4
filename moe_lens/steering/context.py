"""`steered`: a plan on a model, for as long as a block of code lasts. What an application writes.

with steered(hf_model, plan):
    hf_model.generate(**inputs)            # pipelines, trainers, evaluators alike
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, SupportsFloat

from moe_lens.interventions.positions import Positions
from moe_lens.model.attaching import attach, detach, wrapper_of
from moe_lens.model.registration import allow_training
from moe_lens.model.wrapper import Model
from moe_lens.steering.hooks import steer_hooks


@contextmanager
def steered(
    model: Any,
    plan: Any,
    *,
    positions: Positions = None,
    strength: SupportsFloat | None = None,
    training: bool = False,
) -> Iterator[Any]:
    """Steer a Hugging Face model, a `RoutedModel` or a `HookedMoE` while the context lasts.

    >>> import torch
    >>> from moe_lens import RoutedModel, SteeringPlan, organisms, steered
    >>> model = RoutedModel.from_pretrained(organisms.path("specialised"))
    >>> hf_model = model.detach()
    >>> tokens = model.to_tokens("Question : what is")
    >>> before = hf_model(tokens).logits
    >>> with steered(hf_model, SteeringPlan(deactivate=[(2, 5)])):
    ...     during = hf_model(tokens).logits
    >>> torch.equal(during, before), torch.equal(hf_model(tokens).logits, before)
    (False, True)

    Args:
        model: where a Hugging Face model has no hook points, it gets them for the time; then it has no trace
            of them.
        plan, positions, strength: as in `steer_hooks`.
        training: allow it in training mode; see `RoutedModel.hooks`.

    Yields: the model that it was given.

    Raises:
        as in `steer_hooks` and `attach`.
    """
    hooks = steer_hooks(plan, positions=positions, strength=strength)
    given: Any = model
    there = model if isinstance(model, Model) else wrapper_of(model)
    wrapper: Any = attach(given) if there is None else there
    try:
        with allow_training(wrapper, training), wrapper.hooks(hooks):
            yield model
    finally:
        if there is None:
            detach(wrapper)
