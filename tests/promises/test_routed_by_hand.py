"""On a RoutedModel, functions find what is found with Hugging Face's own forward, written out by hand.

The references run a second, unwrapped model of the same weights, one prompt at a time, without padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lens import (
    ContrastivePairs,
    RoutedModel,
    collect_generation,
    collect_routing,
    detect,
    expert_logit_attribution,
    gradient_attribution,
    mediation,
    patch_router,
    route_around,
    virtual_ablation,
    zero_ablate,
)
from moe_lens.evaluation import answers_with, continuation_log_probs, text_loss
from moe_lens.model.hf_models import original_model
from tests import oracle
from tests.families import core_family
from tests.tiny_models import WORDS, prompt, router_of, sparse_blocks, tiny_model, tokenizer

TEXTS = [prompt(length, seed=length) for length in (3, 6, 5)]
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
Route = dict[int, tuple[Tensor, Tensor, Tensor]]
"""Layer -> what its router gives: logits [pos expert], weights and indices [pos k]."""


def ids(text: str) -> Tensor:
    return torch.tensor([tokenizer()(text)["input_ids"]])


def routed(recipe: str) -> tuple[RoutedModel, Any]:
    """The model in its wrapper, and one of the same weights that nobody wraps."""
    return RoutedModel(tiny_model(recipe), tokenizer()), tiny_model(recipe)


@contextmanager
def routers_give(hf: Any, edit: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within the context, each router gives edit(layer, what it gives)."""
    handles = [
        router_of(block).register_forward_hook(lambda *args, layer=layer: edit(layer, args[2]))
        for layer, block in sparse_blocks(hf).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(hf: Any, tokens: Tensor, edit: Callable[[int, Any], Any] = lambda layer, given: given) -> Any:
    """Logits [pos d_vocab] of one prompt, and its route."""
    route: Route = {}

    def note(layer: int, given: Any) -> Any:
        route[layer] = edit(layer, given)
        return route[layer]

    with routers_give(hf, note):
        return hf(tokens).logits[0], route


def counted(hf: Any, tokens: Tensor, n_experts: int, steps: slice = slice(None)) -> Tensor:
    """How often each expert of each layer runs on some of the tokens [layer expert]."""
    _, route = run(hf, tokens)
    counts = torch.zeros(len(route), n_experts, dtype=torch.long)
    for row, (logits, _, indices) in enumerate(route.values()):
        for token, chosen in zip(logits[steps], indices[steps], strict=True):
            for expert in oracle.choose(token, len(chosen)):
                counts[row, expert] += 1
    return counts


def in_all(hf: Any, n_experts: int) -> Tensor:
    return torch.stack([counted(hf, ids(text), n_experts) for text in TEXTS]).sum(0)


@core_family
def test_counts(recipe: str) -> None:
    model, hf = routed(recipe)
    stats = collect_routing(model, TEXTS, batch_size=3, progress=False)
    assert torch.equal(stats.counts, in_all(hf, model.n_experts))
    assert stats.n_tokens == sum(len(text.split()) + 1 for text in TEXTS)
    rates = [counted(hf, ids(text), model.n_experts, slice(-1, None)) for text in TEXTS]
    pairs = ContrastivePairs.from_lists(TEXTS[:1] * 2, TEXTS[1:], span="last")
    scores = detect(model, pairs, n_resamples=10, n_permutations=10, progress=False)
    assert bool((scores.delta == rates[0] - (rates[1] + rates[2]) / 2).all())


@core_family
def test_generation(recipe: str) -> None:
    model, hf = routed(recipe)
    for each in (hf, original_model(model)):
        each.generation_config.eos_token_id = 2
    found = collect_generation(model, TEXTS, max_new_tokens=5, batch_size=3, progress=False)
    assert found.decode is not None
    decoded = torch.zeros_like(found.decode.counts)
    for text, written in zip(TEXTS, found.tokens, strict=True):
        whole = hf.generate(
            ids(text), attention_mask=torch.ones_like(ids(text)), max_new_tokens=5, do_sample=False
        )
        assert torch.equal(whole[0, ids(text).shape[1] :], written)
        steps = slice(ids(text).shape[1], whole.shape[1] - 1)
        decoded += counted(hf, whole, model.n_experts, steps)
    assert torch.equal(found.decode.counts, decoded)
    assert torch.equal(found.prefill.counts, in_all(hf, model.n_experts))


@core_family
def test_measures(recipe: str) -> None:
    model, hf = routed(recipe)
    logits = [run(hf, ids(text))[0] for text in TEXTS]
    best = [WORDS[max(int(each[-1].argmax()) - 4, 0)] for each in logits]
    says = answers_with(model, TEXTS, best, batch_size=3)
    assert says.tolist() == [int(each[-1].argmax()) >= 4 for each in logits]
    losses = [
        F.cross_entropy(each[:-1], ids(text)[0, 1:], reduction="sum")
        for each, text in zip(logits, TEXTS, strict=True)
    ]
    n_predicted = sum(len(each) - 1 for each in logits)
    assert text_loss(model, TEXTS, batch_size=3) == pytest.approx(float(sum(losses)) / n_predicted, rel=1e-5)
    found = continuation_log_probs(model, TEXTS, ["w1 w2", "w3", "w4 w5 w6"], batch_size=3)
    for mean, text, more in zip(found, TEXTS, ("w1 w2", "w3", "w4 w5 w6"), strict=True):
        n, whole = len(more.split()), ids(f"{text} {more}")
        log_probs = run(hf, whole)[0].log_softmax(-1)
        by_hand = [float(log_probs[-n - 1 + step, whole[0, -n + step]]) for step in range(n)]
        assert mean == pytest.approx(sum(by_hand) / n, abs=1e-5)


@core_family
def test_routes_carried_over(recipe: str) -> None:
    model, hf = routed(recipe)
    clean, corrupted = prompt(4, seed=1), prompt(4, seed=2)
    _, route = run(hf, ids(clean))
    found = mediation(
        model, [clean], [corrupted], lambda logits: logits[:, -1, 7], weights=True, progress=False
    )
    carried, _ = run(hf, ids(corrupted), lambda layer, given: (given[0], *route[layer][1:]))
    torch.testing.assert_close(found.with_clean_route[0].float(), carried[-1, 7], **CLOSE)
    _, cache = model.run_with_cache(clean)
    by_place = patch_router(
        model, cache, corrupted, lambda logits: logits[0, -1, 7], point="route", progress=False
    )
    for row, wanted in enumerate(model.moe_layers):
        for pos in range(5):

            def put(layer: int, given: Any, wanted: int = wanted, pos: int = pos) -> Any:
                logits, weights, indices = (tensor.clone() for tensor in given)
                if layer == wanted:
                    weights[pos], indices[pos] = route[layer][1][pos], route[layer][2][pos]
                return logits, weights, indices

            logits, _ = run(hf, ids(corrupted), put)
            torch.testing.assert_close(by_place[row, pos], logits[-1, 7], **CLOSE)


@core_family
def test_experts_taken_out(recipe: str) -> None:
    model, hf = routed(recipe)
    layer, text = model.moe_layers[-1], TEXTS[1]
    _, route = run(hf, ids(text))
    expert = int(route[layer][2][-1, 0])

    def without(number: int, given: Any) -> Any:
        logits, weights, indices = given
        return logits, weights * (indices != expert) if number == layer else weights, indices

    with torch.no_grad():
        ablated = model.run_with_hooks(text, fwd_hooks=zero_ablate([(layer, expert)]))
        around = model.run_with_hooks(text, fwd_hooks=route_around([(layer, expert)]))
    torch.testing.assert_close(ablated[0], run(hf, ids(text), without)[0], **CLOSE)
    by_hand, _ = run(hf, ids(text), lambda number, given: next_best(hf, given, expert, number == layer))
    torch.testing.assert_close(around[0], by_hand, **CLOSE)
    assert not torch.allclose(ablated, around, atol=1e-3)


def next_best(hf: Any, given: Any, expert: int, here: bool, places: Any = slice(None)) -> Any:
    """What a router gives without an expert, at some tokens: the next-best ones, weighed by themselves."""
    logits, weights, indices = (tensor.clone() for tensor in given)
    if here:
        for pos in torch.arange(len(logits))[places].reshape(-1).tolist():
            barred = logits[pos].clone()
            barred[expert] = -torch.inf
            chosen = oracle.choose(barred, indices.shape[1])
            indices[pos] = torch.tensor(chosen)
            weights[pos] = oracle.weigh(barred, chosen, oracle.renormalises(hf)).to(weights)
    return logits, weights, indices


@core_family
def test_virtual_ablation(recipe: str) -> None:
    model, hf = routed(recipe)
    tokens = ids(TEXTS[0])
    found = virtual_ablation(model, TEXTS[:1], progress=False)
    plain, route = run(hf, tokens)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:-1], tokens[0, 1:])

    exact = found.exact
    assert exact is not None
    for row, layer in enumerate(model.moe_layers):
        for pos in range(tokens.shape[1]):
            for slot, expert in enumerate(route[layer][2][pos].tolist()):
                assert int(found.indices[row, 0, pos, slot]) == expert

                def edit(number: int, given: Any, here: int = layer, of: int = expert, at: int = pos) -> Any:
                    return next_best(hf, given, of, number == here, at)

                change = loss(run(hf, tokens, edit)[0]) - loss(plain)
                torch.testing.assert_close(exact[row, 0, pos, slot], change, **CLOSE)


@core_family
def test_shares_of_a_logit(recipe: str) -> None:
    """They add up to Hugging Face's logit; an expert of the last layer by hand, through the final norm."""
    model, hf = routed(recipe)
    tokens, answer = ids(TEXTS[2]), 9
    found = expert_logit_attribution(model, TEXTS[2], answer, progress=False)
    before: list[Tensor] = []
    handle = hf.model.norm.register_forward_pre_hook(lambda module, args: before.append(args[0][0, -1]))
    inputs: list[Tensor] = []
    block = sparse_blocks(hf)[model.moe_layers[-1]]
    second = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0, -1]))
    logits, route = run(hf, tokens)
    handle.remove()
    second.remove()
    torch.testing.assert_close(found.experts.sum() + found.parts.sum(), logits[-1, answer], **CLOSE)
    scale = (before[0].double().square().mean() + hf.model.norm.variance_epsilon).sqrt()
    direction = hf.lm_head.weight[answer].double() * hf.model.norm.weight.double() / scale
    last = model.moe_layers[-1]
    for slot, expert in enumerate(route[last][2][-1].tolist()):
        written = route[last][1][-1, slot] * oracle.expert_output(block, inputs[0].double(), expert)
        share = float((written @ direction).detach())
        assert float(found.experts[-1, 0, slot]) == pytest.approx(share, rel=1e-4, abs=1e-5)


@core_family
def test_gradient_times_router_logits(recipe: str) -> None:
    """By hand: the weights of Hugging Face's router, made from logits that carry a gradient."""
    model, hf = routed(recipe)
    found = gradient_attribution(model, TEXTS[1], lambda logits: logits[0, -1, 7])
    leaves: dict[int, Tensor] = {}

    def weighed(layer: int, given: Any) -> Any:
        logits, _, indices = given
        leaves[layer] = logits  # what earlier layers do to it counts, too
        weights = leaves[layer].softmax(-1).gather(-1, indices)
        if oracle.renormalises(hf):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, indices

    with routers_give(hf, weighed):
        value = hf(ids(TEXTS[1])).logits[0, -1, 7]
    grads = torch.autograd.grad(value, list(leaves.values()))
    for row, (logits, grad) in enumerate(zip(leaves.values(), grads, strict=True)):
        torch.testing.assert_close(found.router_logits[row, 0], (grad * logits).detach(), **CLOSE)
