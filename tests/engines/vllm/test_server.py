"""A vLLM server under sixteen clients: each gets its own plan, and who asks for nonsense gets HTTP 400."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from moe_lens import SteeringPlan
from moe_lens.engines import check_server, plan_args
from tests.engines.vllm import expected
from tests.engines.vllm.environment import PYTHON, needs_vllm, settings


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Any]]:
    """Address of a server, requests, and what is expected; case 1 is its default plan, and named "doc"."""
    folder = tmp_path_factory.mktemp("server")
    expected.make(folder, "qwen3_moe")
    home = folder / "qwen3_moe"
    requests, answers = (json.loads((home / f"{name}.json").read_text()) for name in ("requests", "expected"))
    plan_of(requests["cases"][1]).save(folder / "plans" / "doc.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(home), "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "160", "--max-num-seqs", "16"),
        *("--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(64 * 2**20)),
        *("--gpu-memory-utilization", "0.3", "--served-model-name", "tiny"),
    ]
    variables = settings(MOE_LENS_PLANS=str(folder / "plans"), MOE_LENS_DEFAULT_PLAN="doc")
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=variables, stdout=log, stderr=log, cwd=folder) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}", requests, answers
        finally:
            process.terminate()


def plan_of(case: dict[str, Any]) -> SteeringPlan:
    content = case["plan"]
    return SteeringPlan(content["activate"], content["deactivate"], content["epsilon"])


def wait_for(url: str, process: Any, log: Path) -> None:
    """Wait until a server answers, at most 20 minutes, or until it is gone."""
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def ask(url: str, body: dict[str, Any], route: str = "completions") -> tuple[int, Any]:
    whole = {"model": "tiny", "temperature": 0.0, "ignore_eos": True, "return_token_ids": True, **body}
    data = json.dumps(whole).encode()
    request = Request(f"{url}/v1/{route}", data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=600) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    plan = None if case["plan"] is None else plan_of(case)
    return plan_args(plan, strength=case["strength"], positions=case["positions"])


@needs_vllm
def test_sixteen_clients_get_what_a_routed_model_writes(served: Any) -> None:
    url, requests, answers = served
    todo = [(c, p) for p in range(len(requests["prompts"])) for c in range(len(requests["cases"]) + 2)]

    def one(which: tuple[int, int]) -> tuple[int, Any]:
        case, prompt = which
        xargs = [*(arguments(case) for case in requests["cases"]), {}, plan_args("doc")][case]
        body = {"prompt": requests["prompts"][prompt], "max_tokens": requests["n_new"], "vllm_xargs": xargs}
        return ask(url, body)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, todo))
    assert {status for status, _ in found} == {200}
    by_default = len(requests["cases"])
    for (case, prompt), (_, answer) in zip(todo, found, strict=True):
        wanted = answers[1 if case >= by_default else case]["tokens"][prompt]
        assert answer["choices"][0]["token_ids"] == wanted, (case, prompt)


@needs_vllm
def test_the_server_says_that_it_steers(served: Any) -> None:
    assert check_server(served[0]) == "qwen3_moe, 3 layers × 8 experts, top 2"


@needs_vllm
@pytest.mark.parametrize(
    ("xargs", "more", "says"),
    [
        ({"moe_plan": "nobody"}, {}, "there are ['doc']"),
        ({"moe_plan": "../doc"}, {}, "there are ['doc']"),
        (plan_args(SteeringPlan(deactivate=[(1, 0)])), {}, "layer 1 has no router"),
        ({"moe_plan": "doc", "moe_strenght": 1}, {}, "moe_strenght"),
        ({"moe_stats": "s", "moe_span": [0, 999]}, {}, "beyond the prompt"),
        ({"moe_plan": "doc"}, {"use_beam_search": True, "n": 2}, "beam search"),
    ],
)
def test_nonsense_is_refused_with_400(served: Any, xargs: Any, more: Any, says: str) -> None:
    url, requests, answers = served
    prompt = {"prompt": requests["prompts"][0], "max_tokens": requests["n_new"]}
    status, answer = ask(url, {**prompt, "vllm_xargs": xargs, **more})
    assert status == 400
    assert says in answer["error"]["message"]
    status, answer = ask(url, {**prompt, "vllm_xargs": plan_args(None)})
    assert status == 200
    assert answer["choices"][0]["token_ids"] == answers[0]["tokens"][0]
