"""Settings that are numbers of NumPy's or PyTorch's: results have Python's, and can be saved.

In a process of its own, since the tests' type checks take Python's only.
"""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import numpy as np
import torch

from moe_lens import SteeringPlan, answer_task, audit, detect, evaluate_steering, organisms, sweep
from moe_lens.evaluation import CollateralMeasure, GreedySearch
from moe_lens.organisms import document_task
from moe_lens.organisms.demo import world_pairs

torch.set_num_threads(1)
model, world = organisms.load("null"), organisms.world("null")
conflicts = world.conflicts("test")[::24]
task = answer_task(
    [c.open_book for c in conflicts], [c.document_answer for c in conflicts],
    clusters=[c.entity for c in conflicts],
    neutral_texts=world.generic("test", n=2), loss_limit=np.float32(0.5),
)
numpys = {"seed": np.int64(3), "level": np.float32(0.75), "progress": False}
torchs = {"seed": torch.tensor(3), "level": np.float64(0.75), "progress": False}
plain = {"seed": 3, "level": 0.75, "progress": False}
pairs = world_pairs(world, "detection")
pairs = pairs.select(list(range(6)))
found = {}
for name, given in (("numpy", numpys), ("torch", torchs), ("plain", plain)):
    n = {"plain": int, "numpy": np.int64, "torch": torch.tensor}[name]
    scores = detect(model, pairs, n_resamples=n(20), n_permutations=n(20), **given)
    results = {
        "scores": scores,
        "report": evaluate_steering(
            model, SteeringPlan(deactivate=[(0, 1)]), task, reverse=SteeringPlan(deactivate=[(1, 1)]),
            n_random=n(3), alpha=np.float32(0.25) if name == "numpy" else 0.25, **given,
        ),
        "sweep": sweep(model, scores, task, sizes=np.array([1, 2]), n_random=n(1), **given),
        "audit": audit(
            model, task, n_noisy=n(0), n_random=n(1), max_size=n(1), held_out=0.5,
            search=GreedySearch(n_candidates=2), **given,
        ),
    }
    for what, result in results.items():
        result.save(f"{name}-{what}")
        content = open(f"{name}-{what}", "rb").read()
        assert found.setdefault(what, content) == content, (name, what)
for limit in ("0.1", None, True):
    try:
        CollateralMeasure(len, limit)
    except Exception as error:
        assert "limit" in str(error), error
    else:
        raise AssertionError(limit)
print("well")
"""


def test_settings_of_numpys_and_torchs_give_the_files_of_pythons(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout.endswith("well\n"), ran.stderr[-2000:]
