"""`python -m moe_lens.engines.harness`: the scores of its model, and what its results file says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_lens import RoutedModel, SteeringPlan, UnsupportedRouterError, organisms, steer_hooks
from moe_lens.engines.harness import SteeredLM
from moe_lens.errors import PlanError
from moe_lens.shape import MoEShape
from tests.engines.harness_files import chosen_by_loop, write_tasks
from tests.notebooks import ROOT

CONFLICTS = organisms.world("specialised").conflicts("test")[:31]
PROMPTS = [conflict.open_book for conflict in CONFLICTS]
SHORT = [(c.document_answer, c.memory_answer) for c in CONFLICTS]
PLAN = SteeringPlan(deactivate=[(0, 5), (1, 1), (3, 5), (3, 4)])  # halfway to the document
FOLDER = organisms.path("specialised")


def score_by_loop(plan: SteeringPlan) -> float:
    model = organisms.load("specialised", wrapper=RoutedModel)
    return sum(chosen_by_loop(model, PROMPTS, SHORT, steer_hooks(plan))) / len(PROMPTS)


def run(folder: Path, model_args: str, *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29617"]
    command = [
        *([sys.executable] if processes == 1 else [sys.executable, *launcher]),
        *("-m", "moe_lens.engines.harness", "run", "--model", "moe_lens", "--device", "cpu"),
        *("--model_args", f"pretrained={FOLDER},{model_args}", "--tasks", "conflict_mc"),
        *("--include_path", str(folder), "--output_path", str(folder / "results"), "--batch_size", "4"),
    ]
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **home, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=600)


def results_in(folder: Path) -> dict[str, Any]:
    [file] = (folder / "results").rglob("results_*.json")
    content = json.loads(file.read_text())
    file.unlink()
    return content


@pytest.mark.broad
def test_the_command_gives_the_scores_of_a_loop_in_one_process_and_in_two(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path, CONFLICTS)
    PLAN.save(folder / "plan.json")
    expected = score_by_loop(PLAN)
    assert expected != score_by_loop(SteeringPlan())
    for processes in (1, 2):
        done = run(folder, f"plan={folder / 'plan.json'}", processes=processes)
        assert done.returncode == 0, done.stderr
        content = results_in(folder)
        assert content["results"]["conflict_mc"]["acc,none"] == expected
        assert content["n-samples"]["conflict_mc"] == {"original": 31, "effective": 31}
        said = content["config"]["moe_lens"]
        assert said["plan_digest"] == said["steered_digest"] == PLAN.digest
        assert said["random"] is None
    done = run(folder, f"plan={folder / 'plan.json'},random=3,layer_matched=True")
    content = results_in(folder)
    model = organisms.load("specialised", wrapper=RoutedModel)
    control = PLAN.random_like(seed=3, layer_matched=True, model=model)
    assert content["results"]["conflict_mc"]["acc,none"] == score_by_loop(control)
    assert content["config"]["moe_lens"]["steered_digest"] == control.digest
    assert content["config"]["moe_lens"]["random"] == 3


@pytest.mark.broad
def test_the_command_ends_with_a_sentence_where_the_plan_is_for_another_model(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path, CONFLICTS[:2])
    PLAN.made_for(MoEShape("other", (0, 1, 2, 3), 16, 2)).save(folder / "plan.json")
    done = run(folder, f"plan={folder / 'plan.json'}")
    assert done.returncode == 1
    said = "moe_lens: The plan was made for another model (plan / model): model 'other' / 'specialised'"
    assert f"{said}; n_experts 16 / 8" in done.stderr
    assert "Traceback" not in done.stderr


def model_with(tmp_path: Path, plan: SteeringPlan, **arguments: Any) -> SteeredLM:
    plan.save(tmp_path / "plan.json")
    return SteeredLM(str(FOLDER), plan=str(tmp_path / "plan.json"), device="cpu", **arguments)


def test_the_model_says_what_was_steered(tmp_path: Path) -> None:
    said = model_with(tmp_path, PLAN, strength=2.0).get_model_info()["moe_lens"]
    assert said["plan_digest"] == said["steered_digest"] == SteeringPlan.load(tmp_path / "plan.json").digest
    assert said["strength"] == 2.0
    assert [tuple(expert) for expert in said["steered"]["deactivate"]] == list(PLAN.deactivate)
    json.dumps(said)


def test_a_checkpoint_under_another_name_is_the_same_if_the_shape_is(tmp_path: Path) -> None:
    shape = organisms.load("specialised").moe_shape
    renamed = PLAN.made_for(MoEShape("elsewhere", shape.layers, shape.n_experts, shape.top_k))
    with pytest.warns(UserWarning, match="made for elsewhere"):
        lm = model_with(tmp_path, renamed)
    assert lm.steering["plan_digest"] == renamed.digest
    assert lm.steering["steered_digest"] == PLAN.made_for(shape).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"random": 1}, "give plan=FILE"),
        ({"strength": 1.0}, "give plan=FILE"),
        ({"plan": "none.json"}, "cannot be read as a steering plan"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_loads(arguments: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SteeredLM("/nowhere", device="cpu", **arguments)


def test_layer_matched_is_about_a_random_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="give its seed"):
        model_with(tmp_path, PLAN, layer_matched=True)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(tmp_path / "dense")
    PLAN.save(tmp_path / "plan.json")
    with pytest.raises(UnsupportedRouterError):
        SteeredLM(str(tmp_path / "dense"), plan=str(tmp_path / "plan.json"), device="cpu")
