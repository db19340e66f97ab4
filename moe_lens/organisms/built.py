"""Which organisms are built on the user's machine, and where they lie."""

import os
import sys
from pathlib import Path
from typing import Final

from moe_lens.errors import MoELensError

BUILT: Final = ("smollm2-split",)
"""Organisms that are too large to ship: `build` makes them, and `load` opens them where they were made."""


def cache_folder() -> Path:
    """Where moe_lens keeps what it has built or fetched: MOE_LENS_CACHE, or the platform's folder for caches.

    >>> from moe_lens.organisms.built import cache_folder
    >>> cache_folder().is_absolute()
    True
    """
    given = os.environ.get("MOE_LENS_CACHE")
    if given:
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.absolute() / "moe_lens"


def built_path(name: str) -> Path:
    """The folder of a built organism's checkpoint.

    Raises:
        MoELensError: if it has not been built.
    """
    folder = cache_folder() / name
    if not (folder / "config.json").is_file():
        raise MoELensError(
            f"organisms: {name!r} does not ship with moe_lens and has not been built here. Build it with "
            f"`moe-lens organism build {name}`, which takes about an hour on two cores and needs the "
            "package gguf (`pip install gguf`)."
        )
    return folder
