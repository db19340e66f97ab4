"""At the door of an engine: requests are read and checked, plans written out, caches kept apart.

A request that cannot be served as it asks is refused: an exception in Python, HTTP 400 from a server. It
never reaches the engine, which it would stop, and it never runs unsteered.
"""

import functools
import sys
from typing import Any, Final

from moe_lens.engines.vllm.private_names import private
from moe_lens.engines.vllm.settings import checked_shape, default_plan, folder_of_plans
from moe_lens.engines.vllm.tables import check_fits
from moe_lens.engines.vllm.wishes import CANARY, PLAN, STATS, Wish, has_wishes, read_wish
from moe_lens.errors import DataError, HookError, MoELensError

_BEAMS: Final = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
)


def wrap_front_end() -> None:
    """Read every request before it is sent to the engine."""
    processor, refused = private().InputProcessor, private().VLLMValidationError
    process = processor.process_inputs

    @functools.wraps(process)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            wish = _admitted(self.vllm_config, params)
            request = process(self, request_id, prompt, params, *args, **kwargs)
            if wish is not None:
                _seal(request, wish)
        except MoELensError as error:
            raise refused(f"moe_lens: {error}", parameter=PLAN) from error
        return request

    processor.process_inputs = process_inputs
    for module, name in _BEAMS:
        if module in sys.modules:  # a server's; elsewhere there are no such requests
            _refuse_beams(getattr(sys.modules[module], name))


def _admitted(config: Any, params: Any) -> Wish | None:
    """What a request wants, checked; None: nothing."""
    extra = getattr(params, "extra_args", None)
    if not isinstance(params, private().SamplingParams):
        if has_wishes(getattr(params, "extra_kwargs", None)) or default_plan() is not None:
            raise HookError("requests of pooling models are neither steered nor counted.")
        return None
    if not has_wishes(extra) and default_plan() is None:
        return None
    if (extra or {}).get(PLAN) == CANARY:
        raise HookError(f"{CANARY} {checked_shape(config.instance_id).words}")
    wish = read_wish(extra, folder_of_plans(), default_plan())
    if wish.plan is None and wish.stats is None:
        return None
    if wish.stats is not None and params.n != 1:
        raise DataError(
            f"n={params.n} answers would count the prompt {params.n} times; send one that counts."
        )
    shape = checked_shape(config.instance_id)
    if wish.plan is not None:
        check_fits(wish.plan, shape)
    return wish


def _seal(request: Any, wish: Wish) -> None:
    """Write what it wants into the engine's copy of a request, once and for all workers alike."""
    if wish.steers and request.resumable:
        raise HookError("streaming sessions are not steered.")
    n_prompt = len(request.prompt_token_ids or ())
    if wish.stats is not None and (wish.span or ((0, 1),))[-1][1] > n_prompt:
        raise DataError(f"the span {wish.span} reaches beyond the prompt's {n_prompt} tokens.")
    params = request.sampling_params
    params.extra_args = {**(params.extra_args or {}), **wish.arguments()}
    if wish.stats is not None:
        params.skip_reading_prefix_cache = True  # what comes from the cache does not run, and is not counted
    if wish.salt:
        request.cache_salt = f"{request.cache_salt or ''}|moe_lens {wish.salt}"


def _refuse_beams(protocol: Any) -> None:
    """vLLM's beam search drops a request's arguments, so that it would run unsteered."""
    to_params = protocol.to_beam_search_params

    @functools.wraps(to_params)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_wishes(self.vllm_xargs):
            raise private().VLLMValidationError(
                f"moe_lens: vLLM's beam search passes no {PLAN} and no {STATS} on; sample instead (n=...).",
                parameter=PLAN,
            )
        return to_params(self, *args, **kwargs)

    protocol.to_beam_search_params = to_beam_search_params
