"""Agreement of routes against sets token by token, from caches."""

from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, organisms, steer_hooks
from moe_lens.errors import DataError
from moe_lens.statistics import route_agreement
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokenizer

PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", "w3 w3 w7 w2 w1 w1 w4"]


def by_loop(a: Any, b: Any, prompts: Any, others: Any = None) -> dict[str, np.ndarray]:
    found: dict[str, list[list[float]]] = {"jaccard": [], "margin_same": [], "margin_differ": []}
    for layer in a.moe_layers:
        cells: dict[str, list[float]] = {name: [] for name in found}
        for prompt, other in zip(prompts, others or prompts, strict=True):
            one, two = a.run_with_cache(prompt)[1], b.run_with_cache(other)[1]
            logits = one["router_logits", layer][0]
            margins = a.routing_rule(layer).routing_margin(logits).tolist()
            pairs = zip(one["topk_indices", layer][0].tolist(), two["topk_indices", layer][0].tolist(),
                        margins, strict=True)  # fmt: skip
            for x, y, margin in pairs:
                cells["jaccard"].append(len(set(x) & set(y)) / len(set(x) | set(y)))
                cells["margin_same" if set(x) == set(y) else "margin_differ"].append(margin)
        for name, values in cells.items():
            found[name].append(values)
    return {name: np.array([np.mean(v) if v else np.nan for v in rows]) for name, rows in found.items()}


@some_kinds
def test_two_checkpoints_agree_as_a_loop_says(recipe: str) -> None:
    a, b = (RoutedModel(tiny_model(recipe, seed=seed), tokenizer()) for seed in (0, 1))
    found = route_agreement(a, b, PROMPTS, progress=False)
    expected = by_loop(a, b, PROMPTS)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name).numpy(), values, rtol=1e-4, atol=1e-6)
    assert found.low is not None
    assert found.high is not None
    assert bool(((found.low <= found.jaccard) & (found.jaccard <= found.high)).all())
    assert (found.n_tokens, found.n_prompts) == (6 + 3 + 8, 3)
    a.detach()
    b.detach()


def test_a_model_agrees_with_itself_on_the_bridge_too() -> None:
    bare = RoutedModel(tiny_model("olmoe"), tokenizer())
    bridge = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer=tokenizer())
    found = route_agreement(bare, bridge, iter(PROMPTS), progress=False)
    assert bool((found.jaccard == 1).all())
    assert bool(found.margin_differ.isnan().all())
    assert bool((found.chance < 1).any())


def test_other_prompts_are_compared_token_by_token_in_their_spans() -> None:
    model = organisms.load("specialised")
    conflicts = organisms.world("specialised").conflicts("detection")[:4]
    n = 3
    found = route_agreement(
        model,
        model,
        [c.open_book for c in conflicts],
        [c.closed_book for c in conflicts],
        span=slice(-n, None),
        progress=False,
    )
    per_layer = []
    for layer in model.moe_layers:
        values = []
        for c in conflicts:
            one, two = (
                model.run_with_cache(p)[1]["topk_indices", layer][0, -n:]
                for p in (c.open_book, c.closed_book)
            )
            values += [
                len(set(x) & set(y)) / len(set(x) | set(y))
                for x, y in zip(one.tolist(), two.tolist(), strict=True)
            ]
        per_layer.append(np.mean(values))
    np.testing.assert_allclose(found.jaccard.numpy(), per_layer)
    assert found.n_tokens == 4 * n


def test_hooks_act_on_their_own_run_only() -> None:
    model = organisms.load("specialised")
    hooks = steer_hooks(SteeringPlan(deactivate=[(2, e) for e in range(5)]))
    text = ["Question : what is the", "Document : the"]
    found = route_agreement(model, model, text, other_hooks=hooks, progress=False)
    assert found.jaccard[:2].tolist() == [1, 1]
    assert float(found.jaccard[2]) < 1
    both = route_agreement(model, model, text, hooks=hooks, other_hooks=hooks, progress=False)
    assert both.jaccard.tolist() == [1] * 4


def test_what_cannot_be_compared_is_refused() -> None:
    model, other = organisms.load("specialised"), RoutedModel(tiny_model("olmoe"), tokenizer())
    with pytest.raises(DataError, match="layers or numbers of experts differ"):
        route_agreement(model, other, ["the"], progress=False)
    with pytest.raises(DataError, match="counts 5 tokens in the first run and 2"):
        route_agreement(model, model, ["Question : what is"], ["the"], progress=False)
    with pytest.raises(DataError, match="1 prompts are compared with 2"):
        route_agreement(model, model, ["the"], ["the", "a"], progress=False)
    shifted = RoutedModel(tiny_model("olmoe", seed=1), None)
    words = RoutedModel(tiny_model("olmoe"), tokenizer())
    ids = torch.tensor([[5, 6, 7]])
    assert route_agreement(words, shifted, ids, progress=False).n_tokens == 3
    two = tokenizer()
    two.add_bos_token = False
    two.backend_tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    without = RoutedModel(tiny_model("olmoe"), two)
    with pytest.raises(DataError, match="Prompt 0 is other tokens to the second model"):
        route_agreement(words, without, ["w1 w2"], progress=False)
