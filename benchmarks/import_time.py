"""Time of imports: `python benchmarks/import_time.py [repeats]` (default: 5)

Every line is run in fresh processes, all lines in turn, so that a change of the machine's load meets all of
them. Prints the median in seconds and its ratio to `import torch`; asserts nothing, since machines differ.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import moe_lens

ROOT = Path(moe_lens.__file__).parent.parent
SCORES = """
import torch
from moe_lens import RoutingStats, risk_difference

def stats(seed):
    logits = torch.randn(1, 40, 4, generator=torch.Generator().manual_seed(seed))
    weights, indices = logits.softmax(-1).topk(2)
    points = {"router_logits": logits, "topk_weights": weights, "topk_indices": indices}
    return RoutingStats.from_cache({f"blocks.0.mlp.hook_{name}": value for name, value in points.items()})

risk_difference(stats(0), stats(1)).save("scores.safetensors")
"""
COMMAND = "from moe_lens.cli import main; main"
LINES = {
    "python": "pass",
    "import torch": "import torch",
    "import moe_lens": "import moe_lens",
    "a plan": "from moe_lens import SteeringPlan",
    "statistics": "from moe_lens import RoutingStats",
    "scores": "from moe_lens import ExpertScores",
    "a report": "from moe_lens import SteeringReport",
    "a published ranking": "from moe_lens import read_published_ranking",
    "HookedMoE": "from moe_lens import HookedMoE",
    "moe-lens --help": f"{COMMAND}(['--help'])",
    "moe-lens plan": f"{COMMAND}(['plan', 'scores.safetensors', '--deactivate', '1', '--out', 'plan.json'])",
}


def seconds(code: str, folder: str) -> float:
    """Wall time of a fresh process that runs the code in `folder`."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{code}\n{done.stderr.decode()}")
    return time.perf_counter() - start


def main(repeats: int = 5) -> None:
    times: dict[str, list[float]] = {name: [] for name in LINES}
    with tempfile.TemporaryDirectory() as folder:
        seconds(SCORES, folder)
        for code in LINES.values():
            seconds(code, folder)  # not counted: files come from the disk
        for _ in range(repeats):
            for name, code in LINES.items():
                times[name].append(seconds(code, folder))
    torch_alone = statistics.median(times["import torch"])
    print(f"{'what':22} {'seconds':>8} {'ratio to import torch':>22}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:22} {median:8.2f} {median / torch_alone:22.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
