"""What the plugin uses of vLLM, which is no public API: looked up here alone, and refused where it changed.

vLLM moves these names between releases, so that only the releases in `VERSIONS` are accepted, and each name
is looked for when the plugin is loaded, not when the first request needs it.
"""

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final

from moe_lens.errors import MoELensError

VERSIONS: Final = ("0.32.0",)
"""Releases of vLLM that the plugin was run in; what follows a plus sign (+cpu) does not matter."""

_WORKER: Final = "vllm.v1.worker"
_MOE: Final = "vllm.model_executor.layers.fused_moe"
_NAMES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "InputProcessor": ("vllm.v1.engine.input_processor", ("process_inputs",)),
    "SamplingParams": ("vllm.sampling_params", ("clone",)),
    "VLLMValidationError": ("vllm.exceptions", ()),
    "EngineCoreRequest": ("vllm.v1.engine", ("cache_salt", "sampling_params", "prompt_token_ids")),
    "EngineCore": ("vllm.v1.engine.core", ("preprocess_add_request", "add_request", "collective_rpc")),
    "EngineCoreProc": ("vllm.v1.engine.core", ("run_engine_core",)),
    "VllmConfig": ("vllm.config", ("use_v2_model_runner",)),
    "Worker": (f"{_WORKER}.gpu_worker", ("load_model",)),
    "GPUModelRunner": (f"{_WORKER}.gpu_model_runner", ("_prepare_inputs", "_dummy_run", "execute_model")),
    "MoERunner": (f"{_MOE}.runner.moe_runner", ("_maybe_dispatch", "_forward_impl", "forward")),
    "FusedTopKRouter": (f"{_MOE}.router.fused_topk_router", ("_compute_routing",)),
    "CPURouter": (f"{_MOE}.router.cpu_router", ("_compute_routing",)),
}
"""Name -> (module, attributes that it must have)."""


@cache
def private() -> Any:
    """A namespace of vLLM's classes, by their own names.

    Raises:
        MoELensError: another release of vLLM, or one in which a name is not what it was.
    """
    version = str(import_module("vllm").__version__)
    if version.partition("+")[0] not in VERSIONS:
        raise MoELensError(
            f"moe_lens steers in vLLM {' or '.join(VERSIONS)}, and this is {version}, whose insides may "
            "differ. Install that release, or keep moe_lens out of this one: VLLM_PLUGINS=''."
        )
    found = {}
    for name, (module, attributes) in _NAMES.items():
        thing = getattr(import_module(module), name, None)
        missing = [attribute for attribute in attributes if not hasattr(thing, attribute)]
        if thing is None or missing:
            what = name if thing is None else f"{name}.{missing[0]}"
            raise MoELensError(
                f"This vLLM {version} has no {module}.{what}, which moe_lens needs to steer; was it patched? "
                "Install the release as it was published."
            )
        found[name] = thing
    return SimpleNamespace(**found)
