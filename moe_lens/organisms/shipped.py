"""The organisms that ship, or were built here: their names, folders and worlds, and loading one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from transformers.utils import logging

from moe_lens.errors import MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.model.wrapper import Model
from moe_lens.organisms.built import BUILT, built_path
from moe_lens.organisms.recipes import RECIPES
from moe_lens.organisms.worlds import World

WEIGHTS: Final = Path(__file__).parent / "weights"

Wrapper = TypeVar("Wrapper", bound=Model)


def names() -> tuple[str, ...]:
    """The organisms that ship with the package, in the order of `recipes.RECIPES`."""
    return tuple(name for name in RECIPES if (WEIGHTS / name / "config.json").is_file())


def path(name: str) -> Path:
    """The folder of an organism's checkpoint: config, weights (safetensors), tokenizer, model card.

    Raises:
        MoELensError: for a name that is neither in `names()` nor in `BUILT`, or one of `BUILT` that has not
            been built on this machine.
    """
    if name in BUILT:
        return built_path(name)
    if name not in names():
        raise MoELensError(
            f"organisms: no organism {name!r} ships with moe_lens; there are {', '.join(names())}, and "
            f"{', '.join(BUILT)}, which `moe-lens organism build` makes. "
            f"Train one of your own with `python -m moe_lens.organisms.train RECIPE --out DIR` "
            f"(recipes: {', '.join(RECIPES)}) and open it with HookedMoE.from_pretrained(DIR)."
        )
    return WEIGHTS / name


def world(name: str) -> World:
    """The world that an organism was trained in.

    Raises:
        MoELensError: for a name that is not in `names()`; models of real language have no world.
    """
    if name in BUILT:
        raise MoELensError(f"organisms: {name!r} has no world: it is a model of real language.")
    return World(RECIPES[path(name).name].variant)


def load(
    name: str,
    *,
    wrapper: type[Wrapper] = HookedMoE,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Wrapper:
    """An organism, ready for hooks; no progress bar for half a million parameters.

    >>> from moe_lens import RoutedModel, organisms
    >>> organisms.load("null", dtype=torch.bfloat16).moe_shape.n_experts
    8
    >>> type(organisms.load("null", wrapper=RoutedModel).hf_model).__name__
    'OlmoeForCausalLM'

    Args:
        name: one of `names()`, or of `BUILT` where it has been built (`moe-lens organism build`).
        wrapper: `HookedMoE` or `RoutedModel`.
        dtype: of the weights.
        device: where the model is to be; by default where the wrapper's `from_pretrained` puts it.

    Raises:
        MoELensError: for a name that is in neither, one that has not been built, or another wrapper.
    """
    if wrapper not in (HookedMoE, RoutedModel):
        raise MoELensError(
            f"organisms.load: wrapper must be the class itself, moe_lens.HookedMoE (the default) or "
            f"moe_lens.RoutedModel; got {wrapper!r}."
        )
    kwargs: dict[str, Any] = {"dtype": dtype}
    if device is not None:
        kwargs["device" if wrapper is HookedMoE else "device_map"] = device
    with _without_progress_bar():
        return cast(Any, wrapper).from_pretrained(path(name), **kwargs)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
