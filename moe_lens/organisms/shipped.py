"""The organisms that ship: their names, folders and worlds, and loading one as a `HookedMoE`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from transformers.utils import logging

from moe_lens.errors import MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.organisms.recipes import RECIPES
from moe_lens.organisms.worlds import World

WEIGHTS: Final = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The organisms that ship with the package, in the order of `recipes.RECIPES`."""
    return tuple(name for name in RECIPES if (WEIGHTS / name / "config.json").is_file())


def path(name: str) -> Path:
    """The folder of an organism's checkpoint: config, weights (safetensors, float32), tokenizer, model card.

    Raises:
        MoELensError: for a name that is not in `names()`.
    """
    if name not in names():
        raise MoELensError(
            f"organisms: no organism {name!r} ships with moe_lens; there are {', '.join(names())}. "
            f"Train one of your own with `python -m moe_lens.organisms.train RECIPE --out DIR` "
            f"(recipes: {', '.join(RECIPES)}) and open it with HookedMoE.from_pretrained(DIR)."
        )
    return WEIGHTS / name


def world(name: str) -> World:
    """The world that an organism was trained in.

    Raises:
        MoELensError: for a name that is not in `names()`.
    """
    return World(RECIPES[path(name).name].variant)


def load(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> HookedMoE:
    """An organism as a HookedMoE, ready for hooks; no progress bar for half a million parameters.

    >>> from moe_lens import organisms
    >>> organisms.load("null", dtype=torch.bfloat16).moe_shape.n_experts
    8

    Args:
        name: one of `names()`.
        dtype: of the weights.
        device: where the model is to be; by default where TransformerLens puts it.

    Raises:
        MoELensError: for a name that is not in `names()`.
    """
    with _without_progress_bar():
        return HookedMoE.from_pretrained(path(name), dtype=dtype, device=device)


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
