"""What a worker does: tables at load, rows before each forward, sums after it; and what it answers.

Runner V1 is `GPUModelRunner`, from which the CPU's is made; V2 has a file of its own (`runner_v2.py`).
"""

import functools
from pathlib import Path
from typing import Any

from moe_lens.engines.vllm import runner_v2, seam, steered_rows
from moe_lens.engines.vllm.layers import moe_layers, refused_config, refused_layers
from moe_lens.engines.vllm.private_names import private
from moe_lens.engines.vllm.tables import Tables, on_device, shape_of_layers
from moe_lens.errors import MoELensError
from moe_lens.files import digest_of_file


def wrap_workers() -> None:
    """Wrap loading, preparing and running, and add what `collective_rpc` calls."""
    worker, runner = private().Worker, private().GPUModelRunner
    _wrap_load(worker)
    _wrap_prepare(runner)
    _wrap_dummy(runner)
    _wrap_execute(runner)
    worker.moe_lens_report = _report
    worker.moe_lens_stats = _stats
    worker.moe_lens_names = _names
    worker.moe_lens_save = _save
    worker.moe_lens_forget = _forget


def _wrap_load(worker: Any) -> None:
    load = worker.load_model

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        self.moe_lens_refused = refused_config(self.vllm_config)
        if self.moe_lens_refused is None and self.vllm_config.use_v2_model_runner:
            self.moe_lens_refused = _wrap_runner_v2(type(self.model_runner))
        if self.moe_lens_refused is None:
            _install(self)
        return result

    worker.load_model = load_model


def _wrap_runner_v2(runner: Any) -> str | None:
    """Wrap this class, once; returns why it cannot be. It is met here, since importing it needs a GPU."""
    if getattr(runner, "moe_lens_wrapped", False):
        return None
    if (reason := runner_v2.refused_runner(runner)) is not None:
        return reason
    for wrap in (runner_v2.wrap_add, runner_v2.wrap_prepare, _wrap_dummy, _wrap_execute):
        wrap(runner)
    runner.moe_lens_wrapped = True
    return None


def _install(worker: Any) -> None:
    config, runner = worker.vllm_config, worker.model_runner
    layers = moe_layers(runner.get_model())
    worker.moe_lens_refused = refused_layers(layers, config.model_config.hf_text_config)
    if worker.moe_lens_refused is not None:
        return
    scheduler = config.scheduler_config
    shape = shape_of_layers(layers, config.model_config.model)
    device = on_device(layers).device
    runner.moe_lens = Tables(layers, shape, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, device)
    # For the key of vLLM's cache: graphs compiled without tables, or by other code, are not taken from it.
    if isinstance(config.additional_config, dict):
        traced = (seam.__file__, steered_rows.__file__)
        config.additional_config["moe_lens"] = [digest_of_file(path) for path in traced]


def _wrap_prepare(runner: Any) -> None:
    prepare = runner._prepare_inputs

    @functools.wraps(prepare)
    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if (tables := getattr(self, "moe_lens", None)) is not None:
            names = self.input_batch.req_ids
            starts = self.input_batch.num_computed_tokens_cpu[: len(names)].tolist()
            batch = list(zip(names, [int(n) for n in num_scheduled_tokens], starts, strict=True))
            tables.place(batch, self.requests)
        return prepare(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)

    runner._prepare_inputs = _prepare_inputs


def _wrap_dummy(runner: Any) -> None:
    dummy = runner._dummy_run

    @functools.wraps(dummy)
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (tables := getattr(self, "moe_lens", None)) is not None:
            tables.clear()
        return dummy(self, *args, **kwargs)

    runner._dummy_run = _dummy_run


def _wrap_execute(runner: Any) -> None:
    execute = runner.execute_model

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        tables = getattr(self, "moe_lens", None)
        if tables is not None:
            tables.forget(scheduler_output.finished_req_ids)  # also where no token is scheduled
        result = execute(self, scheduler_output, *args, **kwargs)
        if tables is not None:
            tables.count()
        return result

    runner.execute_model = execute_model


def _tables(worker: Any) -> Tables:
    tables = getattr(worker.model_runner, "moe_lens", None)
    if tables is None:
        reason = getattr(worker, "moe_lens_refused", None)
        raise MoELensError(f"Nothing is steered or counted in this engine: {reason}.")
    return tables


def _report(self: Any) -> dict[str, Any]:
    """The shape of the model, by MoEShape's fields, or why it is refused."""
    if self.moe_lens_refused is not None:
        return {"refused": self.moe_lens_refused}
    shape = _tables(self).shape
    sizes = {"n_experts": shape.n_experts, "top_k": shape.top_k}
    return {"refused": None, "model": shape.model, "layers": list(shape.layers), **sizes}


def _stats(self: Any, name: str) -> dict[str, Any]:
    """The sums of these statistics as numbers: of each prompt n_tokens and counts [layer expert]."""
    table = _tables(self).counts.stats(name).per_prompt
    assert table is not None
    return {"n_tokens": table.n_tokens.tolist(), "counts": table.counts.tolist()}


def _names(self: Any) -> list[str]:
    """Names of the statistics that hold tokens."""
    return _tables(self).counts.names()


def _save(self: Any, name: str, path: str) -> int:
    """Write these statistics into a file, by the first rank alone; returns how many tokens they hold."""
    stats = _tables(self).counts.stats(name)
    if self.rank == 0:
        stats.save(Path(path))
    return stats.n_tokens


def _forget(self: Any, name: str) -> None:
    """Drop these statistics."""
    _tables(self).counts.forget(name)
