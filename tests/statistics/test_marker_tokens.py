"""nPMI against a loop over tokens, its known values, and bad markers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens import organisms
from moe_lens.errors import DataError
from moe_lens.statistics import collect_by_prompt, collect_routing, npmi
from tests.statistics.test_vocabulary import random_stats, stats_of


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n_tokens=st.integers(3, 60))
def test_it_is_the_formula_over_tokens(seed: int, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, (n_tokens,), generator=generator)
    layers = [torch.rand(n_tokens, 5, generator=generator).topk(2).indices for _ in range(2)]
    markers = sorted(set(ids.tolist()))[:2]
    found = npmi(stats_of(layers, ids, 5), markers)
    assert found.low is None
    for row, marker in enumerate(markers):
        for layer in range(2):
            for expert in range(5):
                chose = [expert in experts for experts in layers[layer].tolist()]
                is_x = [token == marker for token in ids.tolist()]
                both = [a and b for a, b in zip(chose, is_x, strict=True)]
                p_e, p_xe = np.mean(chose), np.mean(both)
                value = float(found.by_token[row, layer, expert])
                if p_e == 0:
                    assert np.isnan(value)
                elif p_xe in (0, 1):
                    assert value == (-1 if p_xe == 0 else 0)
                else:
                    p_e_given_x = sum(both) / sum(is_x)
                    assert value == pytest.approx(np.log2(p_e_given_x / p_e) / -np.log2(p_xe))
                    assert -1 <= value <= 1 + 1e-12
    assert torch.allclose(found.values, found.by_token.mean(0), equal_nan=True)


def test_it_is_one_where_marker_and_expert_come_only_together() -> None:
    ids = torch.tensor([7, 1, 2, 7, 3])
    layer = torch.tensor([[0], [1], [2], [0], [1]])
    found = npmi(stats_of([layer], ids, 4), [7])
    assert found.values[0, :3].tolist() == pytest.approx([1.0, -1.0, -1.0])
    assert bool(found.values[0, 3].isnan())
    assert found.top(1) == [(0, 0)]
    with pytest.raises(DataError, match="only 3 experts can be chosen"):
        found.top(4)


def test_units_give_the_same_numbers_with_an_interval() -> None:
    model = organisms.load("specialised")
    prompts = [c.open_book for c in organisms.world("specialised").conflicts("detection")[:12]]
    units = collect_by_prompt(model, prompts, vocabulary=True, progress=False)
    whole = collect_routing(model, prompts, vocabulary=True, progress=False)
    by_unit, at_once = (npmi(s, ["Document", "?"], tokenizer=model.tokenizer) for s in (units, whole))
    assert torch.allclose(by_unit.values, at_once.values, equal_nan=True)
    assert by_unit.low is not None
    assert by_unit.high is not None
    known = ~by_unit.low.isnan()
    assert bool((by_unit.low <= by_unit.high)[known].all())
    assert bool(known.any())
    assert by_unit.n_units == 12


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one marker"),
        ([1, 1], "each once"),
        ("Document", "a list of ids or texts"),
        ([999], "Token 999 comes nowhere"),
        ([-1], "ids from 0 on"),
        (["Document"], "pass tokenizer=model.tokenizer"),
    ],
)
def test_bad_markers_are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        npmi(random_stats(0), tokens)


def test_texts_that_are_no_single_known_token_are_refused() -> None:
    tokenizer = organisms.load("null").tokenizer
    with pytest.raises(DataError, match="is 2 tokens; name single ones"):
        npmi(random_stats(0), ["Document :"], tokenizer=tokenizer)
    with pytest.raises(DataError, match="does not know the marker 'xylophone'"):
        npmi(random_stats(0), ["xylophone"], tokenizer=tokenizer)
    stats = collect_routing(organisms.load("null"), "the", progress=False)
    with pytest.raises(DataError, match="collect them with vocabulary=True"):
        npmi(stats, [1])
