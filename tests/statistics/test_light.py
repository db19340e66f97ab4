"""Statistics, scores and routes load with torch alone: no pandas, no scipy, no library of models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import first_of

HEAVY = ("pandas", "scipy", "transformers", "transformer_lens", "accelerate", "matplotlib")
USES = {
    "import": "",
    "RoutingStats": "moe_lens.RoutingStats",
    "ExpertScores": "moe_lens.ExpertScores",
    "risk_difference": "moe_lens.risk_difference",
    "compare_routing": "moe_lens.compare_routing",
    "RouteRecord": "moe_lens.RouteRecord",
    "measures": "moe_lens.vocabulary_specialisation, moe_lens.domain_specialisation",
    "SCORES": "moe_lens.detection.SCORES, moe_lens.detection.PairedCounts, moe_lens.detection.interval",
    "counted, saved, loaded and printed": """
import torch
weights, indices = (logits := torch.randn(1, 2, 4)).softmax(-1).topk(2)
values = {"router_logits": logits, "topk_weights": weights, "topk_indices": indices}
cache = {f"blocks.1.mlp.hook_{point}": value for point, value in values.items()}
moe_lens.RoutingStats.from_cache(cache).save("stats")
stats = moe_lens.RoutingStats.load("stats")
scores = moe_lens.risk_difference(stats, stats)
scores.save("scores")
repr((moe_lens.ExpertScores.load("scores"), scores.ranked(), stats.load_balance(), stats.rates))
moe_lens.RouteRecord.from_cache(cache).save("route")
""",
}


@pytest.mark.parametrize("use", first_of(["RoutingStats"], USES))
def test_torch_is_enough(use: str, tmp_path: Path) -> None:
    code = f"import sys\nimport moe_lens\n{USES[use]}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
