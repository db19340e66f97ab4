"""A vLLM server under sixteen clients: each gets its own plan, and who asks for nonsense gets HTTP 400."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import lm_eval
import pytest
import torch
from datasets import config as datasets_config
from lm_eval.tasks import TaskManager

from moe_lens import RoutedModel, SteeringPlan, harness_task
from moe_lens.engines import check_server, plan_args
from moe_lens.engines.harness_model import quiet
from tests.engines.harness_files import log_prob_by_loop, write_tasks, written_by_loop
from tests.engines.vllm import expected
from tests.engines.vllm.environment import PYTHON, needs_vllm, settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that is served."""
    folder = tmp_path_factory.mktemp("server")
    expected.make(folder, "qwen3_moe")
    return folder / "qwen3_moe"


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[tuple[str, Any, Any]]:
    """Address of a server, requests, and what is expected; case 1 is its default plan, and named "doc"."""
    folder = home.parent
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
def test_lm_evaluation_harness_scores_the_server_as_a_routed_model(
    served: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, requests, _ = served
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = RoutedModel.from_pretrained(str(home), dtype=torch.float32)
    texts = [" ".join(f"w{token - 4}" for token in row) for row in requests["prompts"]]
    given = [
        SimpleNamespace(open_book=text, document_answer=f"w{n}", memory_answer=f"w{2 * n + 1}", entity=f"{n}")
        for n, text in enumerate(texts)
    ]
    write_tasks(tmp_path, given)  # type: ignore[arg-type]
    asked = {"model": "tiny", "base_url": f"{url}/v1/completions", "tokenizer": str(home)}
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides what it takes
    with quiet():
        found = evaluate(
            model="local-completions",  # the server's default plan is carried out, so nothing is said of one
            model_args={
                **asked,
                "add_bos_token": True,
                "tokenizer_backend": "huggingface",
                "max_length": 160,
            },
            tasks=["conflict_long", "conflict_gen"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    rows = {name: sorted(some, key=lambda row: row["doc_id"]) for name, some in found["samples"].items()}
    hooks = expected.hooks_of(requests["cases"][1])
    options = [(f"{c.document_answer} .", f"{c.memory_answer} .", c.memory_answer) for c in given]
    chosen = harness_task("conflict_long", "acc", include_path=tmp_path)
    steered = chosen.values(model, hooks).tolist()
    assert [row["acc"] for row in rows["conflict_long"]] == steered
    assert found["results"]["conflict_long"]["acc,none"] == sum(steered) / len(steered)
    for row, prompt, several in zip(rows["conflict_long"], texts, options, strict=True):
        sums = [log_prob_by_loop(model, prompt, text, hooks) for text in several]
        assert [float(answer[0]) for answer in row["filtered_resps"]] == pytest.approx(sums, abs=1e-3)
    written = [row["resps"][0][0].split() for row in rows["conflict_gen"] if row["filter"] == "all"]
    wanted, unsteered = (
        [str(text).split() for text in written_by_loop(model, texts, 3, some)] for some in (hooks, [])
    )
    assert written == wanted
    assert wanted != unsteered  # else an unsteered server would have passed
    assert steered != chosen.values(model).tolist()


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
