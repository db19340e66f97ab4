"""Before anything is measured: is there somebody in the engine who reads plans?

    check_server("http://127.0.0.1:8000")      # over HTTP; also from an environment without vLLM
    check_llm(llm)                             # a vllm.LLM

vLLM takes arguments that it does not know without a word, and starts without a plugin that fails to load. So
a client must not trust that a plan is carried out: it sends the canary, a plan that moe_lens alone refuses.
"""

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from moe_lens.engines.vllm.wishes import CANARY, PLAN
from moe_lens.errors import HookError


def check_server(
    url: str, *, model: str | None = None, api_key: str | None = None, timeout: float = 60.0
) -> str:
    """Make sure that a vLLM server steers by plans, and that its check at start passed.

    >>> check_server("http://127.0.0.1:9")
    Traceback (most recent call last):
    ...
    moe_lens.errors.HookError: http://127.0.0.1:9/v1/models cannot be read: ...

    Args:
        url: of the server, without "/v1".
        model: the name it is served under; None: the first that the server lists.
        api_key: sent as a bearer token, if the server wants one.
        timeout: of each of the two requests, in seconds.

    Returns: the model in the server's words: its name, number of layers and experts, k.

    Raises:
        HookError: the server cannot be reached, took the canary for a plan (so nobody reads plans there), or
            says that it cannot steer, and why.
    """
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    if model is None:
        status, content = _answer(f"{base}/models", None, api_key, timeout)
        if status != 200 or not content.get("data"):
            raise HookError(f"{base}/models lists no model (HTTP {status}: {content}); name one.")
        model = content["data"][0]["id"]
    asked = {"model": model, "prompt": [1], "max_tokens": 1, "vllm_xargs": {PLAN: CANARY}}
    status, content = _answer(f"{base}/completions", asked, api_key, timeout)
    if status == 200:
        raise HookError(
            f"The server {url} takes any plan and reads none: moe_lens is not installed in its environment, "
            "did not load (see its log), or is left out by VLLM_PLUGINS. Everything would run unsteered."
        )
    return _words(f"The server {url}", f"HTTP {status}: {json.dumps(content, ensure_ascii=False)}")


def check_llm(llm: Any) -> str:
    """Make sure that a `vllm.LLM` steers by plans, and that its check at start passed.

    >>> check_llm("a name")
    Traceback (most recent call last):
    ...
    moe_lens.errors.HookError: check_llm needs a vllm.LLM; got str.

    Returns: the model in words, as `check_server`.

    Raises:
        HookError: no LLM; it took the canary for a plan (so nobody reads plans), or says that it cannot
            steer.
    """
    if not hasattr(llm, "generate") or not hasattr(llm, "collective_rpc"):
        raise HookError(f"check_llm needs a vllm.LLM; got {type(llm).__name__}.")
    params = import_module("vllm").SamplingParams(max_tokens=1, extra_args={PLAN: CANARY})
    try:
        llm.generate({"prompt_token_ids": [1]}, params, use_tqdm=False)
    except Exception as error:  # vLLM's own classes, which this environment may not have
        return _words("The engine", str(error))
    raise HookError(
        "The engine takes any plan and reads none: moe_lens' plugin did not load (see the log), or is left "
        "out by VLLM_PLUGINS. Everything would run unsteered."
    )


def _words(who: str, answer: str) -> str:
    """What follows the canary in an answer."""
    _, found, words = answer.partition(f"{CANARY} ")
    if not found:
        raise HookError(f"{who} does not steer: {answer}")
    return words.partition(" (parameter=")[0].partition('"')[0]


def _answer(url: str, body: Mapping[str, Any] | None, key: str | None, timeout: float) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=timeout) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            return error.code, json.loads(text)
        except ValueError:
            return error.code, {"text": text}
    except (OSError, ValueError) as error:
        raise HookError(f"{url} cannot be read: {error}. Is the server up?") from error
