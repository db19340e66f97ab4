"""Plans, published rankings, reports, sweeps and tasks load where no model library can be imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_lens.evaluation.outcomes import Outcome
from moe_lens.evaluation.plan_sizes import SweepPoint, SweepResult
from moe_lens.evaluation.report import SteeringReport
from moe_lens.steering.plan import SteeringPlan
from tests.families import first_of
from tests.notebooks import ROOT

READERS = {
    "plan": "from moe_lens import SteeringPlan; assert len(SteeringPlan.load('plan')) == 1",
    "ranking.csv": "from moe_lens.steering import read_published_ranking as read\n"
    "assert read('ranking.csv').plan(1).activate == ((0, 0),)",
    "sweep": "from moe_lens.evaluation import SweepResult; assert SweepResult.load('sweep').sizes == (2,)",
    "task": "from moe_lens import load_task; assert load_task('task').name == 'task'",
    "report": "from moe_lens import SteeringReport; assert SteeringReport.load('report').gap == 1.0",
}
"""File -> code that reads it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light")
    plan, points = SteeringPlan(deactivate=[(0, 1)]), (SweepPoint(2, "+", 0.5, 0.4, 0.6, {}, []),)
    plan.save(folder / "plan")
    (folder / "ranking.csv").write_text("layer,expert,a1,a2,d1,d2\n0,0,3,2,1,2\n0,1,1,2,3,2\n")
    SweepResult("task", "m", "deactivate", 0.5, {}, {}, points).save(folder / "sweep")
    rows = [{"prompt": "why", "answer": "so", "cluster": cluster} for cluster in "ab"]
    (folder / "task").write_text(json.dumps({"kind": "moe_lens.SteeringTask", "prompts": rows}))
    up, down = Outcome(np.ones(2), {}), Outcome(np.zeros(2), {})
    controls = {kind: {"+": [up], "-": [down]} for kind in ("any layer", "layer-matched")}
    plans, steered = {"+": plan, "-": plan}, {"+": up, "-": down}
    SteeringReport(
        "t", "m", plans, ("a", "b"), up, steered, controls, None, {}, alpha=0.5, level=0.9, seed=0
    ).save(folder / "report")
    return folder


@pytest.mark.parametrize("name", first_of(["plan"], READERS))
def test_it_is_read_without_a_model_library(name: str, folder: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in ('transformers', 'transformer_lens', 'datasets', 'matplotlib'):\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script + READERS[name]], capture_output=True, text=True, cwd=folder
    )
    assert run.returncode == 0, run.stderr
