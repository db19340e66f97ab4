"""vLLM's own environment, `.venv-vllm`: where it is, why it is not there, and how an engine is run in it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
HOME = ROOT / ".venv-vllm"
PYTHON = HOME / "bin" / "python"
N_CORES = len(os.sched_getaffinity(0))


def reason() -> str | None:
    """Why there is no such environment; None: there is."""
    if (HOME / "installed").is_file():
        return None
    if (failed := HOME / "failed").is_file():
        return f"make env-vllm failed: {failed.read_text().strip()}"
    return "no .venv-vllm: run `make test-vllm`"


def needs_vllm(test: Any) -> Any:
    """Marks a test that runs there."""
    return pytest.mark.broad(pytest.mark.skipif(reason() is not None, reason=str(reason()))(test))


def settings(**more: str) -> dict[str, str]:
    """The environment variables of an engine on a small machine; nothing is asked of the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM", "MOE_LENS"))}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(HOME / "cache"),
        **more,
    }


def run(checkpoint: Path, out: Path, jobs: list[str], options: dict[str, Any], **variables: str) -> Any:
    """Run jobs of `inside.py` in one engine, and read what they wrote."""
    out.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("inside.py")
    command = [str(PYTHON), str(script), str(checkpoint), str(out), *jobs, "--", json.dumps(options)]
    with (out.parent / "log").open("w") as log:
        code = subprocess.run(
            command, env=settings(**variables), stdout=log, stderr=log, timeout=1800
        ).returncode
    assert code == 0, (out.parent / "log").read_text()[-4000:]
    return json.loads(out.read_text())
