"""The canary: a server that reads no plans is found out, and one that cannot steer says why."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from moe_lens import HookError
from moe_lens.engines import check_llm, check_server
from moe_lens.engines.vllm.wishes import CANARY

WORDS = "OLMoE, 16 layers × 64 experts, top 8"


@contextmanager
def server(status: int, content: Any, seen: list[Any] | None = None) -> Iterator[str]:
    """Answers to completions with this; lists one model."""

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, content: Any) -> None:
            body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "served"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None:
                seen.append((self.path, self.headers.get("Authorization"), body))
            self._send(status, content)

        def log_message(self, format: str, *args: Any) -> None: ...

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()


def test_a_server_that_refuses_the_canary_is_believed() -> None:
    seen: list[Any] = []
    message = f"moe_lens: {CANARY} {WORDS} (parameter=moe_plan)"
    with server(400, {"error": {"message": message, "code": 400}}, seen) as url:
        assert check_server(f"{url}/v1/", api_key="k") == WORDS
        assert check_server(url, model="mine") == WORDS
    (path, key, body), (_, no_key, other) = seen
    assert (path, key, no_key) == ("/v1/completions", "Bearer k", None)
    assert (body["model"], other["model"]) == ("served", "mine")
    assert body["vllm_xargs"] == {"moe_plan": CANARY}


def test_a_server_that_takes_the_canary_reads_no_plans() -> None:
    with server(200, {"choices": []}) as url, pytest.raises(HookError, match="unsteered"):
        check_server(url)


@pytest.mark.parametrize(
    "content", [{"error": {"message": "moe_lens: nothing is steered: V2"}}, "no JSON: V2"]
)
def test_a_server_that_cannot_steer_says_why(content: Any) -> None:
    with server(400, content) as url, pytest.raises(HookError, match=r"does not steer.*V2"):
        check_server(url)


def test_no_server_is_an_error_too() -> None:
    with pytest.raises(HookError, match="Is the server up"):
        check_server("http://127.0.0.1:9", model="m", timeout=5.0)


def test_an_engine_in_python_is_asked_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_lens.engines.vllm.client as client

    fake = SimpleNamespace(SamplingParams=lambda **options: options)
    monkeypatch.setattr(client, "import_module", lambda name: fake)

    def llm(error: Exception | None) -> Any:
        def generate(prompt: Any, params: Any, use_tqdm: bool) -> Any:
            assert params["extra_args"] == {"moe_plan": CANARY}
            if error is not None:
                raise error

        return SimpleNamespace(generate=generate, collective_rpc=None)

    assert check_llm(llm(ValueError(f"moe_lens: {CANARY} {WORDS} (parameter=moe_plan)"))) == WORDS
    with pytest.raises(HookError, match="unsteered"):
        check_llm(llm(None))
    with pytest.raises(HookError, match="does not steer: V2"):
        check_llm(llm(ValueError("V2")))
