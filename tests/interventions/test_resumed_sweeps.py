"""Sweeps that repeat nothing against sweeps of whole runs, and what of them somebody asks for."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens import hook_names, zero_ablate
from moe_lens.attribution import virtual_ablation
from moe_lens.errors import DataError
from moe_lens.interventions.patching import patch_expert_outputs, patch_router
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.registration import routing_layers
from moe_lens.model.routed_model import RoutedModel
from tests.families import broad, half_precision, some_kinds
from tests.tiny_models import EVERY_FAMILY, tiny_model, tokenizer, tokens

BATCH, N_POS = 2, 9
CLEAN, CORRUPTED = tokens(BATCH, N_POS, seed=1), tokens(BATCH, N_POS, seed=2)
CLOSE: Any = {"rtol": 0, "atol": 2e-5}
WHOLE_CACHES = (
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "deepseek_v2_grouped",
    "deepseek_v3",
    "gpt_oss",
)


def metric(logits: Tensor) -> Tensor:
    """Depends on all logits."""
    assert logits.shape[:2] == (BATCH, N_POS)
    return (logits.log_softmax(-1)[:, :, 7] * torch.arange(1.0, N_POS + 1)).mean().float()


def cached(model: Any, clean: Tensor = CLEAN) -> Any:
    return model.run_with_cache(clean, names_filter=lambda name: hook_names.parse(name) is not None)[1]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def both(sweep: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    found, whole = (sweep(*args, reuse=reuse, progress=False, **kwargs) for reuse in (True, False))
    torch.testing.assert_close(found, whole, **CLOSE)
    return found, whole


@some_kinds
def test_nothing_is_repeated_and_nothing_changes(with_outputs: Any, recipe: str) -> None:
    model = with_outputs(recipe)
    cache = cached(model)
    found, _ = both(partial(patch_router, point="route"), model, cache, CORRUPTED, metric)
    assert found.std() > 1e-4
    both(partial(patch_router, point="route", batch_size=5), model, cache, CORRUPTED, metric)
    for by in ("expert", "pos"):
        both(partial(patch_expert_outputs, by=by), model, cache, CORRUPTED, metric)
    ablated = [virtual_ablation(model, CORRUPTED[:, :5], reuse=r, progress=False) for r in (True, False)]
    torch.testing.assert_close(ablated[0].exact, ablated[1].exact, **CLOSE)


@pytest.mark.parametrize("recipe", ["olmoe", "jamba", *(pytest.param(f, marks=broad) for f in EVERY_FAMILY)])
def test_on_an_unchanged_model(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe), tokenizer())
    both(partial(patch_router, point="route"), model, cached(model), CORRUPTED, metric)


def count_rows(model: Any, layer: int) -> list[tuple[int, ...]]:
    """The shapes that the layer's block is given. (By its forward: a torch hook would stop the reuse.)"""
    shapes: list[tuple[int, ...]] = []
    block: Any = routing_layers(model)[layer].block
    own = block.forward

    def noting(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(hidden_states.shape))
        return own(hidden_states, *args, **kwargs)

    block.forward = noting
    return shapes


@pytest.mark.parametrize("recipe", WHOLE_CACHES)
def test_rows_join_at_their_layer_and_columns_before_the_patch_do_not_run(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe), tokenizer())
    cache, first = cached(model), model.moe_layers[0]
    shapes = count_rows(model, first)
    patch_router(model, cache, CORRUPTED, metric, point="route", positions=[-2, -1], progress=False)
    n_cells = 2 * len(model.moe_layers)
    assert shapes[0][:2] == (BATCH, N_POS)  # the recording; the last is the sweep, between them is the check
    assert shapes[-1][0] < n_cells * BATCH  # the cells of this layer alone, not those of later ones
    assert shapes[-1][1] == 2
    shapes.clear()
    last = model.moe_layers[-1]
    patch_router(model, cache, CORRUPTED, metric, point="route", layers=last, positions=4, progress=False)
    assert [shape[:2] for shape in shapes] == [
        (BATCH, N_POS)
    ] * 2  # recording and check: no resumed run is here


def test_with_padding(hooked: Any) -> None:
    model, mask = hooked("olmoe"), torch.ones(BATCH, N_POS, dtype=torch.long)
    mask[1, :3] = 0
    _, cache = model.run_with_cache(CLEAN, attention_mask=mask)
    both(partial(patch_router, attention_mask=mask), model, cache, CORRUPTED, metric)


@half_precision
def test_in_half_precision_skipped_layers_keep_every_bit(hooked: Any, dtype: torch.dtype) -> None:
    model = hooked("qwen2_moe", dtype)
    cache = cached(model)
    found, whole = (
        patch_router(model, cache, CORRUPTED, metric, batch_size=1, reuse=reuse, progress=False)
        for reuse in (True, False)
    )
    assert torch.equal(found, whole)


def test_hooks_see_whole_runs(hooked: Any) -> None:
    model, seen = hooked("olmoe"), []
    cache = cached(model)
    count = ("blocks.2.hook_resid_pre", lambda value, hook: seen.append(tuple(value.shape[:2])))
    plain = patch_router(model, cache, CORRUPTED, metric, progress=False)
    with model.hooks([count]):
        patch_router(model, cache, CORRUPTED, metric, progress=False)
    patch_router(model, cache, CORRUPTED, metric, hooks=[count], progress=False)
    assert seen == [(3 * N_POS * BATCH, N_POS)] * 2
    found, _ = both(patch_router, model, cache, CORRUPTED, metric, hooks=zero_ablate({0: [1, 4]}))
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("wrap", [RoutedModel, HookedMoE.from_hf])
def test_somebodys_own_torch_hook_sees_whole_runs(wrap: Any) -> None:
    """It counts columns from the first token, wherever a patch begins."""
    model, widths = wrap(tiny_model("olmoe")), set()

    def louder(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        widths.add(hidden.shape[1])
        hidden = hidden.clone()
        hidden[:, 0] *= 3
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block = model.original_model.model.layers[1]
    handle = getattr(block, "original_component", block).register_forward_hook(louder)
    both(patch_router, model, cached(model), CORRUPTED, metric)
    assert widths == {N_POS}
    handle.remove()


def test_a_model_whose_blocks_share_more_is_run_whole() -> None:
    """A block that adds what the first block read: the residual stream alone does not resume it."""
    hf_model = tiny_model("olmoe")
    kept: dict[str, Tensor] = {}
    blocks = hf_model.model.layers
    first, third = blocks[0].forward, blocks[2].forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        output = first(*args, **kwargs)
        kept["first"] = output[..., :1]
        return output

    blocks[0].forward = keep
    blocks[2].forward = lambda *args, **kwargs: third(*args, **kwargs) + kept["first"]
    model = RoutedModel(hf_model, tokenizer())
    cache = cached(model)
    for size in (1, 4):
        both(partial(patch_router, point="route", batch_size=size), model, cache, CORRUPTED, metric)


def test_the_model_is_left_as_it_was() -> None:
    model = RoutedModel(tiny_model("olmoe"), tokenizer())
    cache, before = cached(model), model(CORRUPTED)
    hf: Any = model.hf_model
    forwards = [vars(block).get("forward") for block in hf.model.layers]

    def fails(logits: Tensor) -> Tensor:
        raise ZeroDivisionError

    patch_router(model, cache, CORRUPTED, metric, progress=False)
    with pytest.raises(ZeroDivisionError):
        patch_router(model, cache, CORRUPTED, fails, progress=False)
    assert [vars(block).get("forward") for block in hf.model.layers] == forwards
    assert torch.equal(model(CORRUPTED), before)


# Layers and positions


@pytest.mark.parametrize(
    ("layers", "positions", "rows", "columns"),
    [
        ([3, 0], [0, -1], [2, 0], [0, 8]),
        (slice(1, None), range(2, 5), [1, 2], [2, 3, 4]),
        (2, -1, [1], [8]),
        (torch.tensor([0, 3]), np.array([8, 1]), [0, 2], [8, 1]),
        (None, slice(-3, None), [0, 1, 2], [6, 7, 8]),
    ],
)
def test_a_part_of_a_sweep_is_that_part(
    with_outputs: Any, layers: Any, positions: Any, rows: list[int], columns: list[int]
) -> None:
    model = with_outputs("qwen2_moe")  # MoE layers 0, 2, 3
    cache = cached(model)
    for sweep in (patch_router, partial(patch_expert_outputs, by="pos")):
        whole = sweep(model, cache, CORRUPTED, metric, reuse=False)
        part = sweep(model, cache, CORRUPTED, metric, layers=layers, positions=positions)
        torch.testing.assert_close(part, whole[rows][:, columns], **CLOSE)
    found = virtual_ablation(model, CORRUPTED, layers=layers, positions=positions, progress=False)
    every = virtual_ablation(model, CORRUPTED, reuse=False, progress=False)
    expected = torch.zeros_like(found.is_exact)
    expected[torch.tensor(rows)[:, None], :, torch.tensor(columns)] = True
    assert torch.equal(found.is_exact, expected)
    assert every.exact is not None
    torch.testing.assert_close(found.changes[expected], every.exact[expected], **CLOSE)
    torch.testing.assert_close(found.changes[~expected], every.estimate[~expected])


def test_an_expert_is_patched_at_the_positions_that_are_named(with_outputs: Any) -> None:
    model = with_outputs("mixtral")
    cache = cached(model)
    found = patch_expert_outputs(model, cache, CORRUPTED, metric, layers=1, positions=[4, 6])
    indices, clean = cache["topk_indices", 1], cache["expert_out", 1]
    for expert in range(model.n_experts):

        def put(outputs: Tensor, hook: Any, expert: int = expert) -> Tensor:
            for row, pos, slot in (hook.chosen == expert).nonzero().tolist():
                if pos in (4, 6) and expert in indices[row, pos]:
                    outputs[row, pos, slot] = clean[row, pos, indices[row, pos].tolist().index(expert)]
            return outputs

        by_hand = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(hook_names.expert_out(1), put)]))
        torch.testing.assert_close(found[0, expert], by_hand, **CLOSE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": [1]},
        {"layers": []},
        {"layers": [0, 0]},
        {"layers": "0"},
        {"layers": [True]},
        {"layers": slice(9, 9)},
    ]
    + [{"positions": p} for p in ([9], [-10], [0, -9], [], [1.5], "1", [True])],
)
def test_what_is_not_there_is_refused(hooked: Any, wrong: dict[str, Any]) -> None:
    model: HookedMoE = hooked("qwen2_moe")
    with pytest.raises(DataError, match=next(iter(wrong))):
        patch_router(model, cached(model), CORRUPTED, metric, **wrong)
    with pytest.raises(DataError, match=next(iter(wrong))):
        virtual_ablation(model, CORRUPTED, **wrong)


# Virtual ablation: exact where it is asked for


def test_the_largest_estimates_are_run(hooked: Any) -> None:
    model = hooked("olmoe")
    found: Any = virtual_ablation(model, CORRUPTED, exact=7, progress=False)
    assert int(found.is_exact.sum()) == 7
    sizes = found.estimate.abs()
    assert sizes[found.is_exact].min() >= sizes[~found.is_exact].max()
    every: Any = virtual_ablation(model, CORRUPTED, progress=False)
    torch.testing.assert_close(found.exact[found.is_exact], every.exact[found.is_exact], **CLOSE)
    assert "exact on 7 of" in repr(found)
    assert found.to_dataframe()["n_exact"].sum() == 7
    refused: list[dict[str, Any]] = [{"exact": 0}, {"exact": False, "layers": [0]}]
    for wrong in refused:
        with pytest.raises(DataError):
            virtual_ablation(model, CORRUPTED, **wrong)


def test_the_summary_says_where_the_largest_is_and_correlates_by_rank(hooked: Any) -> None:
    from scipy.stats import pearsonr, spearmanr

    found: Any = virtual_ablation(hooked("olmoe"), [CORRUPTED[0], CORRUPTED[1, :6]], progress=False)
    layer, prompt, pos, expert, change, is_exact = found.largest
    assert is_exact
    assert abs(change) == pytest.approx(float(found.exact[found.is_exact].abs().max()))
    column = pos + (3 if prompt == 1 else 0)
    slot = found.indices[layer, prompt, column].tolist().index(expert)
    assert float(found.exact[layer, prompt, column, slot]) == change
    known = found.is_exact
    assert found.rank_correlation == pytest.approx(spearmanr(found.estimate[known], found.exact[known])[0])
    known = known.clone()
    known[:, 0, 0] = known[:, 1, 3] = False
    for ranks, formula in ((True, spearmanr), (False, pearsonr)):
        expected: Any = formula(found.estimate[known].double(), found.exact[known].double())[0]
        assert found.correlate(ranks=ranks, without=[0]) == pytest.approx(float(expected))
    assert f"layer {layer}, prompt {prompt}, pos {pos}" in repr(found)
