"""What loads without a model library, and what `import moe_lens` leaves alone; each in a process of its own.

Plans, statistics, scores and reports are files that travel. They must load where vLLM lives, beside a version
of transformers that TransformerLens does not run with: so there, importing either raises in these tests.
"""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import moe_lens
from tests.families import first_of

ROOT = Path(moe_lens.__file__).parent.parent
HEAVY = {"torch", "numpy", "pandas", "scipy", "matplotlib", "safetensors", "transformers", "transformer_lens"}
WITHOUT_A_MODEL = (
    "SteeringPlan", "RoutingStats", "ExpertScores", "SteeringReport", "RouteRecord", "RoutingRule",
    "register_rule", "supported_models", "read_published_ranking", "risk_difference", "explore",
)  # fmt: skip

NO_MODEL_LIBRARY = """
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("transformers", "transformer_lens"):
                raise ImportError(f"{name} does not run here")

    sys.meta_path.insert(0, Refuse())
"""
RESULTS = """
    import torch
    from moe_lens import ExpertScores, RoutingStats, SteeringPlan, risk_difference

    def stats(seed):
        cache, generator = {}, torch.Generator().manual_seed(seed)
        for layer in (0, 2):
            logits = torch.randn(1, 40, 4, generator=generator)
            weights, indices = logits.softmax(-1).topk(2)
            points = {"router_logits": logits, "topk_weights": weights, "topk_indices": indices}
            cache |= {f"blocks.{layer}.mlp.hook_{name}": value for name, value in points.items()}
        return RoutingStats.from_cache(cache)

    first, second = stats(0), stats(1)
    scores = risk_difference(first, second)
    plan = SteeringPlan.from_scores(scores, n_activate=1, n_deactivate=1)
"""
USES = {
    "a plan": RESULTS + """
    plan.save("plan.json")
    assert SteeringPlan.load("plan.json") == plan
    plan.check_fits(first.shape)
    """,
    "statistics": RESULTS + """
    first.save("stats.safetensors")
    loaded = RoutingStats.load("stats.safetensors")
    assert torch.equal((loaded + second).counts, (first + second).counts)
    assert len(loaded.to_dataframe()) == 8
    assert loaded.load_balance() is not None
    repr(loaded)
    """,
    "scores": RESULTS + """
    scores.save("scores.safetensors")
    loaded = ExpertScores.load("scores.safetensors")
    assert torch.equal(loaded.delta, scores.delta)
    assert loaded.ranked() == scores.ranked()
    repr(loaded)
    """,
    "a report": RESULTS + """
    import numpy as np
    from moe_lens import SteeringReport
    from moe_lens.evaluation import Limit, Outcome

    toward, away = "+", "-"
    def outcome(rate):
        return Outcome(np.full(8, rate), {"loss": 1.0})
    sides = {toward: [outcome(0.5)] * 4, away: [outcome(0.5)] * 4}
    report = SteeringReport(
        task="task", model="m", plans={toward: plan, away: plan.reversed()}, clusters=tuple("aabbccdd"),
        unsteered=outcome(0.5), steered={toward: outcome(0.9), away: outcome(0.1)},
        controls={"layer-matched": sides, "any layer": sides}, bottom=outcome(0.5),
        limits={"loss": Limit(0.1, True)}, alpha=0.05, level=0.95, seed=0,
    )
    report.save("report.json")
    assert SteeringReport.load("report.json").gap == report.gap
    assert report.to_markdown() and str(report) and repr(report)
    """,
    "a published ranking": """
    import pandas as pd
    from moe_lens import read_published_ranking

    rows = [(layer, expert, expert + 1, 4 - expert) for layer in (0, 1) for expert in range(4)]
    table = pd.DataFrame(rows, columns=["layer", "expert", "a1", "a2"])
    table["d1"], table["d2"] = 5 - table["a1"], 5 - table["a2"]
    table["p1"], table["p2"] = table["a1"] / 5, table["a2"] / 5
    table["risk_diff"] = table["p1"] - table["p2"]
    table.assign(risk_diff_abs=table["risk_diff"].abs(), model="m", run="a").to_pickle("ranking.pkl")
    assert len(read_published_ranking("ranking.pkl").plan(1, 1)) == 2
    """,
    "a route": """
    import torch
    from moe_lens import RouteRecord, explore

    weights, indices = (logits := torch.randn(1, 2, 4)).softmax(-1).topk(2)
    points = {"router_logits": logits, "topk_weights": weights, "topk_indices": indices}
    record = RouteRecord.from_cache({f"blocks.1.mlp.hook_{name}": value for name, value in points.items()})
    record.save("route.safetensors")
    assert RouteRecord.load("route.safetensors").shape.layers == (1,)
    explore(record).save("route.html")
    """,
    "a rule": """
    import torch
    from moe_lens import RoutingRule, register_rule, supported_models
    from moe_lens.routers import SoftmaxTopK

    rule = SoftmaxTopK(n_experts=6, top_k=2, renormalize=True)
    indices = rule.select(torch.randn(5, 6))
    register_rule("AnotherRouter", lambda router: rule)
    assert isinstance(rule, RoutingRule) and indices.shape == (5, 2)
    assert len(supported_models()) > 20
    """,
    "the command's help": """
    from moe_lens.cli import main

    try:
        main(["--help"])
    except SystemExit as done:
        assert not done.code
    """,
    "the command plan": RESULTS + """
    from moe_lens.cli import main

    scores.save("scores.safetensors")
    assert not main(["plan", "scores.safetensors", "--deactivate", "1", "--out", "plan.json"])
    assert SteeringPlan.load("plan.json") == SteeringPlan.from_scores(scores, n_deactivate=1)
    """,
}  # fmt: skip


def run(code: str, folder: Path) -> str:
    """The last line that the code prints, run in a fresh process in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def loaded_after(code: str, folder: Path) -> set[str]:
    """Top-level packages in sys.modules after the code ran."""
    listed = "print(*{name.partition('.')[0] for name in sys.modules})"
    return set(run(f"{code}\nimport sys; {listed}", folder).split())


def test_import_moe_lens_loads_nothing_heavy(tmp_path: Path) -> None:
    assert not loaded_after("import moe_lens; moe_lens.__version__; dir(moe_lens)", tmp_path) & HEAVY
    assert "torch" in loaded_after("from moe_lens import SteeringPlan", tmp_path)  # so imports are seen


def test_results_need_neither_a_model_library_nor_tables_nor_figures(tmp_path: Path) -> None:
    loaded = loaded_after(f"from moe_lens import {', '.join(WITHOUT_A_MODEL)}", tmp_path)
    assert not loaded & {"transformers", "transformer_lens", "pandas", "scipy", "matplotlib"}


def test_results_load_where_model_libraries_do_not_run(tmp_path: Path) -> None:
    run(textwrap.dedent(NO_MODEL_LIBRARY) + f"from moe_lens import {', '.join(WITHOUT_A_MODEL)}", tmp_path)


@pytest.mark.parametrize("use", first_of(["a report"], USES))
def test_works_where_model_libraries_do_not_run(use: str, tmp_path: Path) -> None:
    run(textwrap.dedent(NO_MODEL_LIBRARY) + textwrap.dedent(USES[use]), tmp_path)


def test_a_model_library_is_refused_there(tmp_path: Path) -> None:
    """The guard of the tests above works."""
    with pytest.raises(AssertionError, match="does not run here"):
        run(textwrap.dedent(NO_MODEL_LIBRARY) + "from moe_lens import HookedMoE", tmp_path)
