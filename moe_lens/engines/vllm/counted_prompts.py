"""Routing statistics from vLLM: prompts and a span in, the library's own `RoutingStats` out.

stats = collect_vllm(llm, prompts, span="question", plan=plan)
stats.save("with.safetensors")                        # read by RoutingStats.load wherever moe_lens is
"""

import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, SupportsFloat
from uuid import uuid4

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.encoding import text_ids
from moe_lens.engines.vllm.client import check_llm
from moe_lens.engines.vllm.wishes import Ranges, plan_args, stats_args
from moe_lens.errors import DataError
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.plan import SteeringPlan
from moe_lens.text.batching import Prompts
from moe_lens.text.spans import Span, counted_batches


def collect_vllm(
    llm: Any,
    prompts: Prompts,
    *,
    span: Span = None,
    special_tokens: bool = False,
    plan: SteeringPlan | str | None = None,
    strength: SupportsFloat | None = None,
    positions: str | None = None,
    progress: bool = True,
) -> RoutingStats:
    """Routing statistics over many prompts, counted in vLLM: what `collect_routing(per_prompt=True)` counts.

    >>> collect_vllm("a name", ["Question : what is"])
    Traceback (most recent call last):
    ...
    moe_lens.errors.HookError: check_llm needs a vllm.LLM; got str.

    Counts, the sums of probabilities and weights, and entropies; of each prompt, too. Experts that run
    together, margins, positions and the vocabulary are not counted here. A token is counted once, however the
    prompts are cut into batches; what lies in the prefix cache runs again.

    Args:
        llm: a `vllm.LLM`, in whose environment this runs.
        prompts: as in `collect_routing`.
        span, special_tokens: which tokens of each prompt count, as there.
        plan, strength, positions: to steer by meanwhile, as in `plan_args`; None: no plan.
        progress: show vLLM's progress bar.

    Raises:
        HookError: nobody counts in this engine (`check_llm`).
        DataError, PlanError: as in `collect_routing`, or a plan that does not fit the model.
    """
    check_llm(llm)
    name = f"collect {uuid4().hex}"
    steering = plan_args(plan, strength=strength, positions=positions)
    make, given, params, n_tokens = import_module("vllm").SamplingParams, [], [], []
    reader = _Reader(llm)
    for number, (tokens, _, counted) in enumerate(
        counted_batches(reader, prompts, span, 1, special_tokens=special_tokens)
    ):
        asked = {**steering, **stats_args(name, number, _ranges(counted[0]))}
        given.append({"prompt_token_ids": tokens[0].tolist()})
        params.append(make(max_tokens=1, temperature=0.0, extra_args=asked))
        n_tokens.append(int(counted.sum()))
    try:
        llm.generate(given, params, use_tqdm=progress)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stats.safetensors"
            llm.collective_rpc("moe_lens_save", args=(name, str(path)))
            if not path.is_file():
                raise DataError("The engine's first worker is not on this machine, so its file is not here.")
            return _complete(RoutingStats.load(path), n_tokens)
    finally:
        llm.collective_rpc("moe_lens_forget", args=(name,))


def _complete(stats: RoutingStats, n_tokens: list[int]) -> RoutingStats:
    """Statistics that hold all tokens of each prompt."""
    found = [] if stats.per_prompt is None else stats.per_prompt.n_tokens.tolist()
    if found != n_tokens:
        raise DataError(
            f"The engine counted {found} tokens of the prompts, not {n_tokens}; were some aborted?"
        )
    return stats


class _Reader:
    """What reading text needs of a model (`TextModel`)."""

    def __init__(self, llm: Any) -> None:
        config = llm.llm_engine.model_config
        self.tokenizer: Any = None if config.skip_tokenizer_init else llm.get_tokenizer()
        self.cfg: Any = SimpleNamespace(
            d_vocab=config.get_vocab_size(), n_ctx=config.max_model_len, device="cpu"
        )

    def to_tokens(self, text: str, **_: Any) -> Int[Tensor, "batch pos"]:
        """A text's tokens, [1 pos], as vLLM reads it: with what the tokenizer itself puts before it."""
        return torch.tensor([text_ids(self.tokenizer, text)])


def _ranges(counted: Bool[Tensor, " pos"]) -> Ranges:
    """Ranges [first, end) of the positions that count."""
    steps = torch.diff(torch.nn.functional.pad(counted.int(), (1, 1)))
    return tuple(
        zip((steps == 1).nonzero()[:, 0].tolist(), (steps == -1).nonzero()[:, 0].tolist(), strict=True)
    )
