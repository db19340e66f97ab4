"""What a server is told by its environment, and where an engine leaves word of its check for the front end.

MOE_LENS_PLANS=/plans            plans that requests may name
MOE_LENS_DEFAULT_PLAN=doc        the plan of requests that name none: a name, or JSON
MOE_LENS_V2=1                    steer in model runner V2, in which moe_lens was never run
"""

import atexit
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from moe_lens.engines.vllm.wishes import Wish, read_wish
from moe_lens.errors import HookError
from moe_lens.files import atomic_write
from moe_lens.shape import MoEShape, shape_from_json

_PLANS: Final = "MOE_LENS_PLANS"
_DEFAULT: Final = "MOE_LENS_DEFAULT_PLAN"
_V2: Final = "MOE_LENS_V2"
_SESSION: Final = "MOE_LENS_SESSION"
"""Set by the plugin itself: a folder that the front end and its engine share, as a child does its parent's
environment."""


def folder_of_plans() -> str | None:
    """The folder in which requests' plans are looked up by name; None: there is none."""
    return os.environ.get(_PLANS) or None


def default_plan() -> str | None:
    """The plan of requests that say nothing of one; None: they are not steered."""
    return os.environ.get(_DEFAULT) or None


def default_wish() -> Wish:
    """What a request wants that says nothing. Raises PlanError where the default plan cannot be read."""
    return read_wish({}, folder_of_plans(), default_plan())


def is_set_up() -> bool:
    """Whether the environment asks for steering, so that an engine without it must not start."""
    return folder_of_plans() is not None or default_plan() is not None


def tries_v2() -> bool:
    """Whether the environment asks for steering in runner V2."""
    return os.environ.get(_V2) == "1"


def begin_session() -> None:
    """Choose the folder where engines leave word, before they are started; it goes when this process does."""
    if _SESSION not in os.environ:
        os.environ[_SESSION] = tempfile.mkdtemp(prefix="moe_lens-")
        atexit.register(shutil.rmtree, os.environ[_SESSION], ignore_errors=True)


def leave_word(engine: str, shape: MoEShape | None, refused: str | None) -> None:
    """Written by an engine when it is checked.

    Args:
        engine: vLLM's id of it.
        shape: of its model, if it was found.
        refused: why nothing is steered there; None: it is.
    """
    content = {"shape": None if shape is None else asdict(shape), "refused": refused}
    with atomic_write(_file(engine)) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def checked_shape(engine: str) -> MoEShape:
    """The shape of the model in an engine that was checked and steers.

    Raises:
        HookError: it does not steer, with the reason, or it left no word.
    """
    try:
        content: dict[str, Any] = json.loads(_file(engine).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HookError(
            "this engine left no word that its check at start passed, so that nothing is steered or counted "
            f"in it ({error}). Are engine and front end on one machine, and is moe_lens installed in both?"
        ) from error
    if content["refused"] is not None:
        raise HookError(f"nothing is steered or counted in this engine: {content['refused']}.")
    return shape_from_json(content["shape"])


def _file(engine: str) -> Path:
    return Path(os.environ[_SESSION]) / f"{engine}.json"
