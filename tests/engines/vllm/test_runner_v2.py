"""Model runner V2, as vLLM 0.32.0's source has it, without vLLM: rows in its order, and who is forgotten."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import SteeringPlan
from moe_lens.engines import plan_args, stats_args
from moe_lens.engines.vllm.layers import refused_config
from moe_lens.engines.vllm.tables import Tables
from moe_lens.engines.vllm.worker import _wrap_runner_v2
from tests.engines.vllm.fakes import LAYERS, hidden, tables
from tests.engines.vllm.test_layers import config
from tests.engines.vllm.test_tables import chosen

PUT_IN = SteeringPlan(activate=[(layer, e) for layer in LAYERS for e in (0, 5)])


def runner_class() -> Any:
    """As vLLM's: requests are added, rows sorted by length, and a graph is replayed over padded rows."""

    class GPUModelRunner:
        moe_lens: Tables

        def __init__(self) -> None:
            self.moe_lens = tables()
            self.computed: dict[str, int] = {}
            self.ran: list[tuple[str, int, int]] = []
            self.experts: dict[int, Any] = {}

        def add_requests(self, scheduler_output: Any) -> None:
            for new in scheduler_output.scheduled_new_reqs:
                self.computed[new.req_id] = new.num_computed_tokens

        def prepare_inputs(self, scheduler_output: Any, state: Any, description: Any, loras: int) -> Any:
            numbers = scheduler_output.num_scheduled_tokens
            names = sorted(numbers, key=numbers.__getitem__)  # decodes before prefills
            return SimpleNamespace(
                req_ids=names,
                num_scheduled_tokens=np.array([numbers[name] for name in names], dtype=np.int32),
                num_computed_tokens_np=np.array([self.computed[name] for name in names], dtype=np.int32),
            )

        def execute_model(self, scheduler_output: Any, *args: Any, dummy_run: bool = False) -> None:
            if not dummy_run:
                self.add_requests(scheduler_output)
                if not scheduler_output.num_scheduled_tokens:
                    return
                batch = self.prepare_inputs(scheduler_output, None, None, 0)
                parts = (
                    batch.req_ids,
                    batch.num_scheduled_tokens.tolist(),
                    batch.num_computed_tokens_np.tolist(),
                )
                self.ran = list(zip(*parts, strict=True))
            rows = torch.cat([hidden(name, range(start, start + n)) for name, n, start in self.ran])
            padded = torch.cat([rows, torch.full((5, 8), 9.0)])
            layers = self.moe_lens.layers
            self.experts = {number: layer.run(padded)[: len(rows)] for number, layer in layers.items()}
            for name, n, start in self.ran if not dummy_run else ():
                self.computed[name] = start + n

        def _dummy_run(self, n_tokens: int) -> None:
            self.execute_model(output({}), dummy_run=True)

    assert _wrap_runner_v2(GPUModelRunner) is None
    wrapped = GPUModelRunner.prepare_inputs
    assert _wrap_runner_v2(GPUModelRunner) is None
    assert GPUModelRunner.prepare_inputs is wrapped  # once
    return GPUModelRunner


def new(name: str, n_prompt: int, extra: Any = None, n_computed: int = 0) -> Any:
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        req_id=name, sampling_params=params, prompt_len=n_prompt, num_computed_tokens=n_computed
    )


def output(scheduled: dict[str, int], added: Any = (), finished: Any = ()) -> Any:
    return SimpleNamespace(
        num_scheduled_tokens=scheduled, scheduled_new_reqs=list(added), finished_req_ids=set(finished)
    )


def sets(runner: Any, layer: int) -> list[set[int]]:
    return [set(row) for row in runner.experts[layer].tolist()]


def test_rows_are_those_of_the_input_batch_not_of_the_scheduler() -> None:
    runner = runner_class()()
    first = [new("a", 4, plan_args(PUT_IN)), new("b", 2)]
    runner.execute_model(output({"a": 4, "b": 2}, first))
    for layer in LAYERS:  # the shorter one stands first
        assert sets(runner, layer) == [*chosen("b", range(2), layer), *[{0, 5}] * 4]
    third = new("c", 3, plan_args(PUT_IN, positions="generated"))
    runner.execute_model(output({"c": 3, "a": 1, "b": 1}, [third]))
    for layer in LAYERS:
        rows = [{0, 5}, *chosen("b", range(2, 3), layer), *chosen("c", range(3), layer)]
        assert sets(runner, layer) == rows
    runner.execute_model(output({"c": 1, "b": 1}, finished=["a"]))
    assert sets(runner, 1) == [{0, 5}, *chosen("b", range(3, 4), 1)]


def test_a_preempted_request_comes_back_as_a_new_one_and_counts_once() -> None:
    runner = runner_class()()
    asked = {**plan_args(PUT_IN), **stats_args("s")}
    runner.execute_model(output({"a": 3}, [new("a", 5, asked)]))
    runner.execute_model(output({"b": 2}, [new("b", 2)]))
    runner.execute_model(output({"a": 5}, [new("a", 5, asked)]))
    assert sets(runner, 1) == [{0, 5}] * 5
    assert runner.moe_lens.counts.stats("s").n_tokens == 5


def test_who_is_over_is_forgotten_though_nothing_runs_and_a_dummy_steers_nobody() -> None:
    runner = runner_class()()
    runner.execute_model(output({"a": 3}, [new("a", 3, {**plan_args(PUT_IN), **stats_args("s")})]))
    runner._dummy_run(3)
    assert sets(runner, 1) == chosen("a", range(3), 1)
    assert runner.moe_lens.counts.stats("s").n_tokens == 3
    runner.execute_model(output({}, finished=["a"]))
    assert runner.moe_lens.requests == runner.moe_lens.states == {}


@pytest.mark.parametrize("name", ["add_requests", "prepare_inputs", "_dummy_run", "execute_model"])
def test_another_runner_is_refused(name: str) -> None:
    methods: dict[str, Any] = dict.fromkeys(
        ("add_requests", "prepare_inputs", "_dummy_run", "execute_model"), print
    )
    del methods[name]
    assert f"no {name}" in (_wrap_runner_v2(type("GPUModelRunner", (), methods)) or "")


def test_it_is_tried_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(use_v2_model_runner=True)
    for value in ("0", ""):
        monkeypatch.setenv("MOE_LENS_V2", value)
        assert "MOE_LENS_V2=1" in (refused_config(asked) or "")
    monkeypatch.setenv("MOE_LENS_V2", "1")
    assert refused_config(asked) is None
