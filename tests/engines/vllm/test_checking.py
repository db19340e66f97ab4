"""The check at start: an engine that carries plans out passes, and one that loses them is found out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_lens.engines.vllm.checking as checking
import moe_lens.engines.vllm.seam as seam
from moe_lens import HookError, PlanError, SteeringPlan
from moe_lens.engines.vllm.settings import checked_shape
from moe_lens.engines.vllm.worker import _forget, _report, _stats
from tests.engines.vllm.fakes import LAYERS, SHAPE, state, tables


class Core:
    """An engine with one worker, that runs one token of each request at a time."""

    def __init__(self, refused: str | None = None) -> None:
        self.tables = tables(n_plans=4)
        runner = SimpleNamespace(moe_lens=self.tables)
        self.worker: Any = SimpleNamespace(model_runner=runner, moe_lens_refused=refused)
        model = SimpleNamespace(max_model_len=32, get_vocab_size=lambda: 50)
        self.vllm_config: Any = SimpleNamespace(model_config=model, instance_id="e")
        self.requests: dict[str, Any] = {}
        self.at: dict[str, int] = {}
        self.scheduler = SimpleNamespace(has_requests=lambda: bool(self.at))
        self.batch_queue = None

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        return request, 0

    def add_request(self, request: Any, wave: int) -> None:
        name = request.request_id
        self.requests[name] = state(len(request.prompt_token_ids), request.sampling_params.extra_args)
        self.at[name] = 0

    def step_fn(self) -> None:
        batch = [(name, 1, position) for name, position in self.at.items()]
        self.tables.place(batch, self.requests)
        rows = torch.randn(len(batch), 8)
        for layer in self.tables.layers.values():
            layer.run(rows)
        self.tables.count()
        ends = {name: self.requests[name].num_prompt_tokens + 2 for name in self.at}  # the third is not run
        self.at = {name: position + 1 for name, position in self.at.items() if position + 1 < ends[name]}

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        verbs: Any = {"moe_lens_report": _report, "moe_lens_stats": _stats, "moe_lens_forget": _forget}
        return [verbs[method](self.worker, *args)]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    names = SimpleNamespace(SamplingParams=SimpleNamespace, EngineCoreRequest=SimpleNamespace)
    monkeypatch.setattr(checking, "private", lambda: names)
    monkeypatch.setenv("MOE_LENS_SESSION", str(tmp_path))
    for name in ("MOE_LENS_PLANS", "MOE_LENS_DEFAULT_PLAN"):
        monkeypatch.delenv(name, raising=False)


def test_an_engine_that_carries_plans_out_passes() -> None:
    core = Core()
    checking._check_and_tell(core)
    assert checked_shape("e") == SHAPE
    assert core.tables.counts.names() == []


@pytest.mark.parametrize("lost", [1, 4])
def test_a_layer_that_loses_the_plan_is_found(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    core, inner, steered = Core(), seam._steered, seam.steered_rows
    running: list[Any] = []

    def noting(layer: Any, logits: Any) -> Any:
        running[:] = [layer]
        return inner(layer, logits)

    def in_all_but_one(logits: Any, *tables: Any) -> Any:
        return logits if running[0] is core.tables.layers[lost] else steered(logits, *tables)

    monkeypatch.setattr(seam, "steered_rows", in_all_but_one)
    monkeypatch.setattr("tests.engines.vllm.fakes._steered", noting)
    checking._check_and_tell(core)
    with pytest.raises(HookError, match=rf"layer {lost} .*loses plans"):
        checked_shape("e")


def test_tokens_that_do_not_pass_by_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    monkeypatch.setattr(core.tables, "count", lambda: None)
    checking._check_and_tell(core)
    with pytest.raises(HookError, match="check at start failed"):
        checked_shape("e")


def test_a_refused_engine_starts_unless_plans_are_set_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    checking._check_and_tell(Core("its runner is V2"))
    with pytest.raises(HookError, match="V2"):
        checked_shape("e")
    monkeypatch.setenv("MOE_LENS_PLANS", str(tmp_path))
    with pytest.raises(HookError, match=r"MOE_LENS_PLANS.*V2"):
        checking._check_and_tell(Core("its runner is V2"))
    checking._check_and_tell(Core())
    assert checked_shape("e") == SHAPE


def test_a_default_plan_that_does_not_fit_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    SteeringPlan(deactivate=[(LAYERS[0], 1)]).save(tmp_path / "good.json")
    SteeringPlan(deactivate=[(77, 1)]).save(tmp_path / "bad.json")
    monkeypatch.setenv("MOE_LENS_PLANS", str(tmp_path))
    monkeypatch.setenv("MOE_LENS_DEFAULT_PLAN", "good")
    checking._check_and_tell(Core())
    for name in ("bad", "nobody"):
        monkeypatch.setenv("MOE_LENS_DEFAULT_PLAN", name)
        with pytest.raises(PlanError):
            checking._check_and_tell(Core())
