"""vLLM under plans writes and counts what a `RoutedModel` does, request by request, however it runs."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens import RoutedModel, RoutingStats, SteeringPlan, collect_routing, compare_routing, steer_hooks
from tests.engines.vllm import expected
from tests.engines.vllm.environment import N_CORES, needs_vllm, run
from tests.tiny_models import tokenizer

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MODES: dict[str, tuple[str, list[str], dict[str, Any], dict[str, str]]] = {
    "in process": (
        "olmoe",
        ["mixed", "counted", "prefix", "refused", "collected", "page", "runner_v2"],
        {},
        IN_PROCESS,
    ),
    "compiled": ("olmoe", ["mixed", "counted"], {"enforce_eager": False}, IN_PROCESS),
    "multiprocess": ("qwen3_moe", ["mixed", "counted", "preempted"], {"num_gpu_blocks_override": 14}, {}),
    "tensor parallel": (
        "mixtral",
        ["mixed", "counted"],
        {"tensor_parallel_size": 2},
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
}
"""Model, jobs, options of the engine, environment."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def made(folder: Path) -> Any:
    """`made(name)`: the RoutedModel of a checkpoint, its requests and what is expected."""

    @cache
    def once(name: str) -> tuple[RoutedModel, Any, Any]:
        model = expected.make(folder, name)
        requests, answers = (folder / name / f"{file}.json" for file in ("requests", "expected"))
        return model, json.loads(requests.read_text()), json.loads(answers.read_text())

    return once


@pytest.fixture(scope="module")
def ran(folder: Path, made: Any) -> Any:
    """`ran(mode)`: what an engine of a mode wrote, one engine each; and the folder with its files."""

    @cache
    def once(mode: str) -> tuple[Any, Path]:
        name, jobs, options, variables = MODES[mode]
        if mode == "tensor parallel" and N_CORES < 2:
            pytest.skip("tensor parallel needs two cores")
        made(name)
        out = folder / mode.replace(" ", "-")
        return run(folder / name, out / "out.json", jobs, options, **variables), out

    return once


@needs_vllm
@pytest.mark.parametrize("mode", MODES)
def test_mixed_plans_in_one_batch_write_what_a_routed_model_writes(ran: Any, made: Any, mode: str) -> None:
    found, wanted = ran(mode)[0]["mixed"], made(MODES[mode][0])[2]
    for case, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert mine["tokens"] == theirs["tokens"], case
        torch.testing.assert_close(
            torch.tensor(mine["logprobs"]), torch.tensor(theirs["logprobs"]), rtol=0, atol=1e-4
        )
    plain = wanted[0]["tokens"]
    assert all(case["tokens"] != plain for case in wanted[1:])  # else nothing was tested


@needs_vllm
@pytest.mark.parametrize("mode", MODES)
def test_counts_of_each_prompt_are_those_of_collect_routing(ran: Any, made: Any, mode: str) -> None:
    found, out = ran(mode)
    model, requests, wanted = made(MODES[mode][0])
    n_cases = len(requests["cases"])
    counted = found["counted"]
    assert counted["same on ranks"]
    assert {tuple(names) for names in counted["names"]} == {tuple(f"case {c}" for c in range(n_cases))}
    assert not any(counted["left"])
    for number, theirs in enumerate(wanted):
        stats = RoutingStats.load(out / f"case{number}.safetensors")
        assert stats.shape == model.moe_shape
        assert stats.per_prompt is not None
        assert stats.per_prompt.n_tokens.tolist() == [len(prompt) for prompt in requests["prompts"]]
        assert stats.per_prompt.counts.tolist() == theirs["counts"]
        sums = {"probability_sums": stats.per_prompt.probability_sums.double()}
        sums |= {"weight_sums": stats.weight_sums, "entropy_sums": stats.entropy_sums}
        for name, mine in sums.items():
            other = torch.tensor(theirs[name], dtype=torch.float64)
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@needs_vllm
def test_detection_runs_on_what_vllm_counted(ran: Any, made: Any) -> None:
    _, out = ran("in process")
    model, requests, _ = made("olmoe")
    one, other = (RoutingStats.load(out / f"case{number}.safetensors") for number in (1, 0))
    hooks = expected.hooks_of(requests["cases"][1])
    again = [
        collect_routing(model, requests["prompts"], hooks=h, per_prompt=True, progress=False)
        for h in (hooks, [])
    ]
    scores = compare_routing(one, other)
    wanted = compare_routing(*again)
    assert torch.equal(scores.delta, wanted.delta)
    assert scores.q is not None
    assert wanted.q is not None
    assert torch.equal(torch.as_tensor(scores.q), torch.as_tensor(wanted.q))


@needs_vllm
def test_blocks_of_the_prefix_cache_are_used_under_their_own_plan_only(ran: Any) -> None:
    runs = ran("in process")[0]["prefix"]
    assert [one["cached"] for one in runs] == [0, 0, 0, 64, 64]  # off, A, B, off, A
    assert [one["cached alone"] for one in runs] == [0] * 5
    for one in runs:
        assert one["shared"][0] == one["alone"][0]
        torch.testing.assert_close(
            torch.tensor(one["shared"][1]), torch.tensor(one["alone"][1]), rtol=0, atol=1e-4
        )
    assert len({tuple(one["alone"][0]) for one in runs}) == 3  # or the plans do nothing here


@needs_vllm
def test_a_request_that_cannot_be_served_is_refused_and_the_engine_lives(ran: Any, made: Any) -> None:
    found = ran("in process")[0]["refused"]
    says = {
        "layer": "layer 77 has no router",
        "expert": "expert 70",
        "shape": "another model",
        "damage": "damaged",
        "name": "no plan 'nobody'",
        "path": "no plan '../secret'",
        "brace": "no JSON",
        "number": "got 3",
        "key": "moe_plans",
        "strength": "moe_strength",
        "no plan": "give moe_plan",
        "positions": "moe_positions",
        "span": "moe_span",
        "long span": "beyond the prompt",
    }
    assert set(says) == set(found["asked"])
    for name, words in says.items():
        assert found["refusals"][name].startswith("VLLMValidationError: moe_lens: "), name
        assert words in found["refusals"][name]
    assert found["after"][0] == made("olmoe")[2][0]["tokens"][0]


@needs_vllm
@pytest.mark.parametrize(("name", "span"), [("all", None), ("last", "last"), ("slice", slice(2, 4))])
def test_collect_vllm_counts_the_tokens_of_a_span(ran: Any, made: Any, name: str, span: Any) -> None:
    found, out = ran("in process")
    model, requests, _ = made("olmoe")
    content = requests["cases"][1]["plan"]
    plan = SteeringPlan(content["activate"], content["deactivate"], content["epsilon"])
    stats = RoutingStats.load(out / f"collected {name}.safetensors")
    texts = found["collected"]["texts"]
    reading = RoutedModel(model.original_model, tokenizer())
    wanted = collect_routing(
        reading, texts, batch_size=1, span=span, hooks=steer_hooks(plan), per_prompt=True, progress=False
    )
    assert stats.per_prompt is not None
    assert wanted.per_prompt is not None
    assert stats.per_prompt.n_tokens.tolist() == wanted.per_prompt.n_tokens.tolist()
    assert torch.equal(stats.per_prompt.counts, wanted.per_prompt.counts)
    assert found["collected"]["left"] == [[]]


@needs_vllm
def test_the_pages_code_runs(ran: Any) -> None:
    found, out = ran("in process")
    assert found["page"]["blocks"] == 2
    steered, plain = found["page"]["texts"]
    assert steered != plain
    assert [RoutingStats.load(out / f"{name}.safetensors").n_tokens for name in ("with", "without")] == [2, 2]


@needs_vllm
def test_runner_v2_has_what_it_is_wrapped_by(ran: Any) -> None:
    assert ran("in process")[0]["runner_v2"]["missing"] == []


@needs_vllm
def test_what_was_thrown_out_and_ran_again_counts_once(ran: Any, made: Any) -> None:
    found, out = ran("multiprocess")
    assert found["preempted"]["preemptions"] > 0
    stats = RoutingStats.load(out / "preempted.safetensors")
    assert stats.per_prompt is not None
    assert stats.per_prompt.counts.tolist() == made("qwen3_moe")[2][1]["counts"]
