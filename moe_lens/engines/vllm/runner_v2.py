"""vLLM's model runner V2, the default on GPUs: which request each row of its batches belongs to.

It was wrapped by what the source of vLLM 0.32.0 says; there was no GPU to run it on. So an engine with it is
refused unless MOE_LENS_V2=1 is set (`settings.py`), and then the check at start decides (`checking.py`).

`add_requests` sees a request's parameters (anew after a preemption), and `prepare_inputs` returns the rows in
their order. That is before the forward, and before a full CUDA graph is replayed, which calls no Python: so
the tables are filled there, on the stream on which the forward runs.
"""

import functools
from types import SimpleNamespace
from typing import Any, Final

NEEDED: Final = ("add_requests", "prepare_inputs", "_dummy_run", "execute_model")
"""Methods of the runner that are used."""
FIELDS: Final = ("req_ids", "num_scheduled_tokens", "num_computed_tokens_np")
"""Of what `prepare_inputs` returns."""


def refused_runner(runner: Any) -> str | None:
    """Why a runner V2 cannot be wrapped; None: it can."""
    missing = [name for name in NEEDED if not callable(getattr(runner, name, None))]
    return (
        f"its model runner V2 has no {missing[0]}: another vLLM than moe_lens has read" if missing else None
    )


def wrap_add(runner: Any) -> None:
    """Remember what each request carries."""
    add = runner.add_requests

    @functools.wraps(add)
    def add_requests(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if (tables := getattr(self, "moe_lens", None)) is not None:
            for new in scheduler_output.scheduled_new_reqs:
                tables.states[new.req_id] = SimpleNamespace(
                    sampling_params=new.sampling_params, num_prompt_tokens=new.prompt_len
                )
        return add(self, scheduler_output, *args, **kwargs)

    runner.add_requests = add_requests


def wrap_prepare(runner: Any) -> None:
    """Place the rows that are about to run."""
    prepare = runner.prepare_inputs

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = prepare(self, *args, **kwargs)
        if (tables := getattr(self, "moe_lens", None)) is not None:
            names, numbers, starts = (list(getattr(batch, field)) for field in FIELDS)
            rows = [(name, int(n), int(start)) for name, n, start in zip(names, numbers, starts, strict=True)]
            tables.place(rows, tables.states)
        return batch

    runner.prepare_inputs = prepare_inputs
