"""`steered`: a plan on a model, for as long as a block of code lasts. What an application writes.

with steered(hf_model, plan):
    hf_model.generate(**inputs)            # pipelines, trainers, evaluators alike
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, SupportsFloat
from weakref import WeakKeyDictionary

from moe_lens.errors import HookError
from moe_lens.interventions.positions import Positions
from moe_lens.model.attaching import attach, detach, wrapper_of, wrappers_of
from moe_lens.model.registration import allow_training
from moe_lens.model.unplaced import VIRTUAL, adds_tokens
from moe_lens.model.wrapper import Model
from moe_lens.steering.hooks import steer_hooks


@contextmanager
def steered(
    model: Any,
    plan: Any,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    strength: SupportsFloat | None = None,
    only_unmet: bool | None = None,
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
            of them. (A deep copy made within has them for good: `detach(copy)`.)
        plan, layers, positions, strength, only_unmet: as in `steer_hooks`.
        training: allow it in training mode; see `RoutedModel.hooks`.

    Yields: the model that it was given.

    Raises:
        as in `steer_hooks` and `attach`.
    """
    if positions is not None and adds_tokens(model):
        raise HookError(f"positions={positions!r} cannot be found in {type(model).__name__}: {VIRTUAL}.")
    hooks = steer_hooks(plan, layers=layers, positions=positions, strength=strength, only_unmet=only_unmet)
    with _borrowed(model) as wrapper, allow_training(wrapper, training, wrapper.hooks(hooks)):
        yield model


_LOCK = threading.Lock()
_USERS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Wrappers that were made for `steered`, and how many contexts use each."""


@contextmanager
def _borrowed(model: Any) -> Iterator[Any]:
    """The model's wrapper; one of its own while the context lasts where it has none."""
    with _LOCK:
        given: Any = model
        is_new = not isinstance(model, Model) and wrapper_of(model) is None
        wrapper: Any = model if isinstance(model, Model) else attach(given)
        if is_new:
            _USERS[wrapper] = 0
        if wrapper in _USERS:
            _USERS[wrapper] += 1
    try:
        yield wrapper
    finally:
        with _LOCK:
            if wrapper in _USERS:
                _USERS[wrapper] -= 1
                if not _USERS[wrapper]:
                    del _USERS[wrapper]
                    # unless somebody has wrapped it for himself meanwhile
                    if any(each is wrapper for each in wrappers_of(model)):
                        detach(wrapper)
