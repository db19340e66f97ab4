"""The check at start: an engine steers requests of its own and counts who ran, before it serves others.

It goes through the engine's scheduler, workers and compiled code in the mode that will serve. In one batch
run a request whose plan puts the first k experts in, one whose plan puts the last k in, one whose plan keeps
all but the last k out, and one without a plan; each has a prompt and new tokens. Of the first three it is
known which experts must have run, at every token, in every layer and on every rank.
"""

import functools
from typing import Any, Final

from moe_lens.engines.vllm.private_names import private
from moe_lens.engines.vllm.settings import default_wish, is_set_up, leave_word
from moe_lens.engines.vllm.tables import check_fits
from moe_lens.engines.vllm.wishes import plan_args, stats_args
from moe_lens.errors import HookError
from moe_lens.shape import MoEShape, shape_from_json
from moe_lens.steering.plan import SteeringPlan

_NAME: Final = "moe_lens check at start"
_N_PROMPT: Final = 12
_N_NEW: Final = 3
_STEPS: Final = 1000
"""More than any scheduler needs for four short requests."""


def wrap_engine() -> None:
    """Check each engine when it is made, and leave word of it for the front end."""
    core = private().EngineCore
    begin = core.__init__

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        _check_and_tell(self)

    core.__init__ = __init__


def _check_and_tell(core: Any) -> None:
    try:
        shape, refused = _looked_at(core)
        refused = _tried(core, shape) if refused is None and shape is not None else refused
    except Exception as error:  # whatever it is: an engine that nobody steers may still serve
        shape, refused = None, f"the check at start failed ({type(error).__name__}: {error})"
    if refused is not None and is_set_up():
        raise HookError(
            "MOE_LENS_PLANS or MOE_LENS_DEFAULT_PLAN is set, and nothing can be steered in this engine: "
            f"{refused}. Start it otherwise, or without these variables."
        )
    if shape is not None and (plan := default_wish().plan) is not None:
        check_fits(plan, shape)
    leave_word(core.vllm_config.instance_id, shape, refused)


def _looked_at(core: Any) -> tuple[MoEShape | None, str | None]:
    """The shape of the model that all ranks hold, or why it is refused."""
    reports = core.collective_rpc("moe_lens_report")
    for report in reports:
        if report["refused"] is not None:
            return None, report["refused"]
    if any(report != reports[0] for report in reports):
        return None, "its ranks hold different layers"
    return shape_from_json({key: value for key, value in reports[0].items() if key != "refused"}), None


def _tried(core: Any, shape: MoEShape) -> str | None:
    """Why the engine failed the check, in words; None: it passed."""
    n_prompt = min(_N_PROMPT, core.vllm_config.model_config.max_model_len - _N_NEW)
    if n_prompt < 1:
        return "its context is too short for the check at start"
    n_tokens = n_prompt + _N_NEW - 1  # the last new token is not run
    probes = _probes(shape)
    for number, (plan, _) in enumerate(probes):
        _add(core, number, plan, n_prompt, n_tokens)
    for _ in range(_STEPS):
        if not core.scheduler.has_requests() and not core.batch_queue:
            break
        core.step_fn()
    else:
        return "its scheduler did not finish the check at start"
    for rank, found in enumerate(core.collective_rpc("moe_lens_stats", args=(_NAME,))):
        if found["n_tokens"] != [n_tokens] * len(probes):
            return (
                f"in the check at start, rank {rank} counted {found['n_tokens']} tokens, not {n_tokens} each"
            )
        for (plan, experts), counts in zip(probes, found["counts"], strict=True):
            wrong = None if plan is None else _wrong(counts, experts, n_tokens, shape)
            if wrong is not None:
                return (
                    f"in the check at start, layer {wrong} (rank {rank}) did not run the experts that a plan "
                    "put in: this mode of running loses plans"
                )
    core.collective_rpc("moe_lens_forget", args=(_NAME,))
    return None


def _probes(shape: MoEShape) -> list[tuple[SteeringPlan | None, set[int]]]:
    """Plans, and the experts that must run under each."""
    first, last = range(shape.top_k), range(shape.n_experts - shape.top_k, shape.n_experts)
    others = range(shape.n_experts - shape.top_k)
    every = shape.layers
    return [
        (SteeringPlan(activate=[(layer, expert) for layer in every for expert in first]), set(first)),
        (SteeringPlan(activate=[(layer, expert) for layer in every for expert in last]), set(last)),
        (SteeringPlan(deactivate=[(layer, expert) for layer in every for expert in others]), set(last)),
        (None, set()),
    ]


def _wrong(counts: Any, experts: set[int], n_tokens: int, shape: MoEShape) -> int | None:
    """The first layer whose counts are not those of these experts at every token."""
    wanted = [n_tokens if expert in experts else 0 for expert in range(shape.n_experts)]
    return next((n for n, row in zip(shape.layers, counts, strict=True) if row != wanted), None)


def _add(core: Any, number: int, plan: SteeringPlan | None, n_prompt: int, n_tokens: int) -> None:
    """Send a request of our own past the front end."""
    params = private().SamplingParams(
        temperature=0.0,
        max_tokens=_N_NEW,
        ignore_eos=True,
        extra_args={**plan_args(plan), **stats_args(_NAME, number, [(0, n_tokens)])},
    )
    params.skip_reading_prefix_cache = True
    n_vocab = core.vllm_config.model_config.get_vocab_size()
    request = private().EngineCoreRequest(
        request_id=f"{_NAME} {number}",
        prompt_token_ids=[(7 * position + number) % n_vocab for position in range(n_prompt)],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=f"{_NAME} {number}",
        data_parallel_rank=None,
    )
    core.add_request(*core.preprocess_add_request(request))
