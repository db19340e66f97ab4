"""vLLM's entry point `vllm.general_plugins`: runs in its front end, its engine and each of its workers."""

from moe_lens.engines.vllm.admitting import wrap_front_end
from moe_lens.engines.vllm.checking import wrap_engine
from moe_lens.engines.vllm.private_names import private
from moe_lens.engines.vllm.seam import wrap_layers
from moe_lens.engines.vllm.settings import begin_session
from moe_lens.engines.vllm.worker import wrap_workers

_done = False


def register() -> None:
    """Wrap vLLM where requests come in and where experts are chosen; called by vLLM, once in each process.

    Raises:
        MoELensError: another release of vLLM than those that moe_lens was run in.
    """
    global _done
    if _done:
        return
    private()  # all names or none
    begin_session()
    wrap_front_end()
    wrap_layers()
    wrap_workers()
    wrap_engine()
    _done = True
