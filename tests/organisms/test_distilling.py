"""Distillation: an interrupted run gives the bits of an uninterrupted one; the split model comes nearer."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens.errors import DataError
from moe_lens.organisms import distilling
from moe_lens.organisms.distilling import Distillation, batches, distill, losses, rate, set_top_k
from moe_lens.organisms.splitting import split
from tests.organisms.dense import llama, tokens

SETTINGS = Distillation(steps=6, batch_size=4, warmup=2, top_k=(2, 4))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def dense() -> Any:
    return llama(num_hidden_layers=2)


def fresh(dense: Any) -> Any:
    return split(dense, tokens(), n_experts=4, top_k=2, n_shared=16, progress=False)


def same(first: Any, second: Any) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    dense: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = fresh(dense), fresh(dense)
    distill(whole, dense, tokens(), SETTINGS, dtype=dtype, progress=False)
    settings: dict[str, Any] = {"dtype": dtype, "progress": False, "save_every": 2}
    calls: list[int] = []

    def killed(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(distilling, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(resumed, dense, tokens(), SETTINGS, checkpoint=tmp_path / "c.safetensors", **settings)
    assert not same(resumed, whole)
    resumed, counted = fresh(dense), []
    monkeypatch.setattr(distilling, "losses", lambda *a: counted.append(0) or losses(*a))
    distill(resumed, dense, tokens(), SETTINGS, checkpoint=tmp_path / "c.safetensors", **settings)
    assert len(counted) == 4  # steps 3 to 6: two were saved
    assert same(resumed, whole)
    again = fresh(dense)
    distill(again, dense, tokens(), SETTINGS, checkpoint=tmp_path / "c.safetensors", **settings)
    assert same(again, whole)  # all of it was saved


def test_it_brings_held_out_predictions_nearer_for_each_k(dense: Any) -> None:
    moe = fresh(dense)
    before = copy_of(moe)
    distill(moe, dense, tokens(200), replace(SETTINGS, steps=100, learning_rate=1e-2), progress=False)
    for k in (2, 4):
        set_top_k(moe, k)
        set_top_k(before, k)
        held_out = tokens(20, seed=1)
        with torch.no_grad():
            assert losses(moe, dense, held_out)[0] < 0.85 * losses(before, dense, held_out)[0]
    moved = {
        name
        for name, tensor in moe.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert moved == {
        f"model.layers.{layer}.mlp.{name}"
        for layer in range(2)
        for name in (
            "gate.weight",
            "experts.gate_up_proj",
            "experts.down_proj",
            *(f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
        )
    }


def copy_of(moe: Any) -> Any:
    copy = type(moe)(moe.config).eval()
    copy.load_state_dict(moe.state_dict())
    return copy


def test_losses_are_the_divergence_and_the_relative_error(dense: Any) -> None:
    moe, ids = fresh(dense), tokens(3, seed=2)
    with torch.no_grad():
        divergence, hidden = losses(moe, dense, ids)
        outputs = [m(input_ids=ids, output_hidden_states=True) for m in (dense, moe)]
    wanted, given = (torch.distributions.Categorical(logits=o.logits) for o in outputs)
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(wanted, given).mean())
    errors = [
        ((a - b).norm(dim=-1) / a.norm(dim=-1)) ** 2
        for a, b in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True)
    ]
    assert errors[0].max() == 0  # the embeddings are the same
    torch.testing.assert_close(hidden, torch.stack(errors[1:]).mean())


def test_every_sequence_comes_once_before_any_comes_again() -> None:
    settings = replace(SETTINGS, batch_size=3, top_k=(2, 2, 2, 4))
    plan = list(islice(batches(10, settings), 200))
    rows = [row for batch, _ in plan for row in batch]
    assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in range(0, 600, 10))
    ks = Counter(k for _, k in plan)
    assert 0.65 < ks[2] / 200 < 0.85


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    settings = replace(SETTINGS, steps=100, warmup=10)
    assert [rate(step, settings) for step in (0, 9, 49, 75, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]


def test_another_distillations_checkpoint_is_refused(dense: Any, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    moe = fresh(dense)
    distill(moe, dense, tokens(), SETTINGS, checkpoint=checkpoint, progress=False)
    for settings, ids in ((replace(SETTINGS, seed=1), tokens()), (SETTINGS, tokens(seed=5))):
        with pytest.raises(DataError, match="checkpoint of another distillation"):
            distill(moe, dense, ids, settings, checkpoint=checkpoint, progress=False)


def test_no_steps_and_no_batch_are_refused(dense: Any) -> None:
    for settings, n in ((replace(SETTINGS, steps=0), 40), (SETTINGS, 3)):
        with pytest.raises(DataError, match="at least one step and one batch"):
            distill(fresh(dense), dense, tokens(n), settings, progress=False)
