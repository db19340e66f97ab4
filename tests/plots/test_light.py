"""Figures and text load without a model library: a report's figure can be drawn where no model can run."""

import subprocess
import sys
from pathlib import Path

import pytest

import moe_lens

ROOT = Path(moe_lens.__file__).parent.parent
FORBIDDEN = {
    "plots": ("transformers", "transformer_lens", "scipy", "pandas"),
    "text": ("transformers", "transformer_lens", "scipy", "pandas", "matplotlib"),
}
USES = {
    "plots": """
from moe_lens import plots
from moe_lens.plots import {names}
import torch
ax = plots.patching_map(torch.tensor([[0.5, 1.0]]), corrupted=0.0, clean=2.0)
plots.save(ax, "figure.png")
""",
    "text": """
from moe_lens.text import {names}
rows = [{{"context": "Rain falls.", "question": "What falls?"}}]
pairs = contrasts.document_against_question(rows)
pairs.save_jsonl("pairs.jsonl")
assert ContrastivePairs.from_file("pairs.jsonl") == pairs[:3] == pairs
""",
}


@pytest.mark.broad
@pytest.mark.parametrize("room", USES)
def test_a_room_loads_where_model_libraries_do_not_run(room: str, tmp_path: Path) -> None:
    names = ", ".join(getattr(moe_lens, room).__all__)
    refused = f"import sys\nfor name in {FORBIDDEN[room]}:\n    sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", refused + USES[room].format(names=names)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
