"""vLLM's entry point `vllm.general_plugins`: runs in its front end, its engine and each of its workers."""

from collections.abc import Callable
from typing import Any

from moe_lens.engines.vllm.admitting import wrap_front_end
from moe_lens.engines.vllm.checking import wrap_engine
from moe_lens.engines.vllm.private_names import private
from moe_lens.engines.vllm.seam import wrap_layers
from moe_lens.engines.vllm.settings import begin_session
from moe_lens.engines.vllm.worker import wrap_workers

_run: Callable[..., None] | None = None
"""vLLM's `run_engine_core`, once the plugin is registered."""


def register() -> None:
    """Wrap vLLM where requests come in and where experts are chosen; called by vLLM, once in each process.

    Raises:
        MoELensError: another release of vLLM than those that moe_lens was run in.
    """
    global _run
    if _run is not None:
        return
    private()  # all names or none
    begin_session()
    wrap_front_end()
    wrap_layers()
    wrap_workers()
    wrap_engine()
    _run = private().EngineCoreProc.run_engine_core
    private().EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """What vLLM runs in the process of an engine: its own function, with the plugin there from the start.

    (vLLM loads plugins in that process only when the engine is half made, too late to check it.)
    """
    register()
    assert _run is not None
    _run(*args, **kwargs)
