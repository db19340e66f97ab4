"""Noisy routes: the hash against one written in whole numbers, the same noise however prompts are run."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from moe_lens import (
    HookedMoE,
    RoutedModel,
    SteeringPlan,
    average_routes,
    bias_experts,
    is_routing_point,
    noisy_routes,
    organisms,
    route_uncertainty,
    steer_hooks,
)
from moe_lens.errors import DataError
from moe_lens.interventions.noise import noise_at
from moe_lens.interventions.uncertainty import RouteUncertainty
from moe_lens.resampling import spawned_seeds
from tests.families import some_kinds
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]
M = 2**64


def mixed(z: int) -> int:
    """splitmix64, in whole numbers."""
    z = (z + 0x9E3779B97F4A7C15) % M
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % M
    return z ^ (z >> 31)


def uniform(seed: int, layer: int, row: int, place: int, expert: int) -> float:
    state = 0
    for part in (*((seed >> s) % 2**63 for s in (0, 63, 126)), layer, row, place, expert):
        state = mixed(state ^ part)
    return ((state >> 40) + 0.5) / 2**24


def gumbel(*key: int) -> float:
    return -math.log(-math.log(uniform(*key)))


@pytest.mark.parametrize("seed", [0, 5, *spawned_seeds(3, 2)])
def test_the_noise_is_the_hash_written_in_whole_numbers(seed: int) -> None:
    rows, places = torch.tensor([0, 9]), torch.tensor([[0, 1, 2], [100, 7, 5]])
    found = noise_at(seed, 3, rows, places, 4)
    for i, row in enumerate((0, 9)):
        for j in range(3):
            for expert in range(4):
                expected = gumbel(seed, 3, row, int(places[i, j]), expert)
                assert float(found[i, j, expert]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("distribution", "mean", "variance"), [("gumbel", 0.57722, math.pi**2 / 6), ("normal", 0.0, 1.0)]
)
def test_its_distribution(distribution: Any, mean: float, variance: float) -> None:
    rows, places = torch.arange(60), torch.arange(50).expand(60, 50)
    noise = noise_at(7, 0, rows, places, 30, distribution).double()
    assert float(noise.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / noise.numel()))
    assert float(noise.var()) == pytest.approx(variance, rel=0.03)
    other = noise_at(8, 0, rows, places, 30, distribution).double()
    together = np.corrcoef([noise.numpy().ravel(), other.numpy().ravel()])[0, 1]
    assert abs(together) < 4 / math.sqrt(noise.numel())


def test_gumbel_noise_draws_from_the_routers_softmax() -> None:
    """Of many tokens with the same logits, each expert comes first as often as its probability says."""
    z = torch.tensor([1.0, 0.0, -1.0, 0.5])
    noise = noise_at(1, 0, torch.arange(100), torch.arange(200).expand(100, 200), 4)
    first = (z + noise).argmax(-1).flatten()
    shares = torch.bincount(first, minlength=4).double() / len(first)
    torch.testing.assert_close(shares, z.double().softmax(-1), atol=0.015, rtol=0)


def routed(model: Any, given: Any, hooks: Any, **kwargs: Any) -> dict[int, Tensor]:
    with torch.no_grad(), model.hooks(list(hooks)):
        _, cache = model.run_with_cache(given, names_filter=is_routing_point, **kwargs)
    return {n: cache["router_logits", n] for n in model.moe_layers}


@some_kinds
def test_logits_get_temperature_times_the_noise_of_their_layer(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    last = model.moe_layers[-1]
    plain = routed(model, tokens(2, 5), ())
    one = routed(model, tokens(2, 5), noisy_routes({last: 0.7}, seed=4, positions=[1, 3]))
    for row in range(2):
        for pos in range(5):
            expected = plain[last][row, pos].double()
            if pos in (1, 3):
                noise = [gumbel(4, last, row, pos, e) for e in range(model.n_experts)]
                expected = expected + 0.7 * torch.tensor(noise, dtype=torch.float64)
            torch.testing.assert_close(one[last][row, pos].double(), expected, rtol=1e-5, atol=1e-5)
    everywhere = routed(model, tokens(2, 5), noisy_routes(0.7, seed=4))
    by_name = routed(model, tokens(2, 5), noisy_routes(0.7, seed=4, layers=model.moe_layers))
    assert all(torch.equal(everywhere[n], by_name[n]) for n in everywhere)
    assert not torch.equal(everywhere[last], plain[last])
    still = routed(model, tokens(2, 5), noisy_routes(0, seed=4))
    assert all(torch.equal(still[n], plain[n]) for n in plain)


def test_float64_logits_keep_their_digits() -> None:
    hf_model = tiny_model("olmoe").double()
    hf_model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    model = RoutedModel(hf_model, tokenizer())
    plain = routed(model, tokens(1, 4), ())[0]
    noise = noise_at(4, 0, torch.zeros(1).long(), torch.arange(4)[None], 6).double()
    for hooks, moved in (
        (noisy_routes(0.7, seed=4), 0.7 * noise),
        (bias_experts({0: torch.ones(6)}, scale="std"), plain.std(-1, correction=0, keepdim=True)),
    ):
        found = routed(model, tokens(1, 4), hooks)[0]
        assert found.dtype == plain.dtype == torch.float64
        torch.testing.assert_close(found, plain + moved, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_noise(wrapper: Any, side: str) -> None:
    hf_model = tiny_model("olmoe")
    make = wrapper.from_hf if wrapper is HookedMoE else wrapper
    model = make(hf_model, tokenizer(side))
    given, hooks = tokens(1, 6), noisy_routes(1.0, seed=2)
    alone = routed(model, given, hooks)
    pad = torch.zeros(1, 3, dtype=torch.int64)
    padded = torch.cat([pad, given] if side == "left" else [given, pad], dim=1)
    mask = (padded != 0).long()
    beside = routed(model, padded, hooks, attention_mask=mask)
    own = mask[0].bool()
    for n in alone:
        torch.testing.assert_close(beside[n][0, own], alone[n][0], rtol=1e-4, atol=1e-4)


def test_a_generation_has_the_noise_of_its_columns_with_a_cache_and_without() -> None:
    model: Any = RoutedModel(tiny_model("mixtral"), tokenizer())
    hf_model = model.original_model
    given = model.to_tokens([prompt(6, 1), prompt(3, 2)])
    options = {
        "attention_mask": (given != 0).long(), "max_new_tokens": 6, "do_sample": False,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    with model.hooks(noisy_routes(1.0, seed=5)):
        written = hf_model.generate(given, **options)
        assert torch.equal(written, hf_model.generate(given, **options, use_cache=False))
        assert torch.equal(written, hf_model.generate(given, **options, prefill_chunk_size=2))
        logits = model(written, attention_mask=(written != 0).long())
    assert torch.equal(logits[:, given.shape[1] - 1 : -1].argmax(-1), written[:, given.shape[1] :])
    assert not torch.equal(written, hf_model.generate(given, **options))
    model.detach()


@pytest.mark.broad
def test_averages_and_uncertainty_are_those_of_runs_one_by_one(hooked: Hooked) -> None:
    model = hooked("olmoe")
    texts = [prompt(5, 1), prompt(3, 2), prompt(8, 3), prompt(5, 4)]
    plan = steer_hooks(SteeringPlan(deactivate=[(0, 2)]))
    numbered = list(enumerate(model.to_tokens(text)[0] for text in texts))

    def alone(hooks: Any, row: int, given: Tensor) -> Tensor:
        from moe_lens.model.registration import running_of

        with torch.no_grad(), running_of(model).of_prompts([row], len(numbered)):
            return model.run_with_hooks(given[None], fwd_hooks=list(hooks))[0, -1].double().softmax(-1)

    seeds = spawned_seeds(6, 5)
    per_route = torch.stack(
        [
            torch.stack([alone([*plan, *noisy_routes(1.5, s)], row, given) for row, given in numbered])
            for s in seeds
        ]
    )  # [route prompt vocab]
    mean = per_route.mean(0)
    options: dict[str, Any] = {"temperature": 1.5, "seed": 6, "hooks": plan, "progress": False}
    for batch_size in (1, 3):
        got = average_routes(model, texts, 5, batch_size=batch_size, **options)
        torch.testing.assert_close(got.exp().double(), mean, rtol=1e-3, atol=1e-6)
        found = route_uncertainty(model, texts, 5, batch_size=batch_size, **options)
        assert np.array_equal(found.predictions, per_route.argmax(-1).T.numpy())
        assert np.array_equal(found.averaged, mean.argmax(-1).numpy())
        plain = torch.stack([alone(plan, row, given) for row, given in numbered])
        assert np.array_equal(found.plain, plain.argmax(-1).numpy())
        for p, ours in ((mean, found.averaged_entropy), (plain, found.entropy)):
            np.testing.assert_allclose(
                ours, [-sum(x * math.log(x) for x in row.tolist() if x) for row in p], rtol=1e-4
            )
        # information: the mean divergence of the routes from their mean
        divergence = (per_route * (per_route.log() - mean.log())).sum(-1).mean(0)
        np.testing.assert_allclose(found.information, divergence.numpy(), rtol=1e-2, atol=1e-6)
        for row, guesses in zip(found.predictions.tolist(), found.disagreement, strict=True):
            most = max(row.count(token) for token in row)
            assert guesses == pytest.approx(1 - most / 5)
    more = route_uncertainty(model, texts, 7, **options)
    assert np.array_equal(more.predictions[:, :5], found.predictions)
    assert found.predictions.std() > 0


def test_without_noise_all_routes_agree() -> None:
    model = organisms.load("specialised")
    found = route_uncertainty(model, ["Question : what is", "the"], 3, temperature=0.0, progress=False)
    assert found.disagreement.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found.information, 0.0, atol=1e-9)
    assert np.array_equal(found.plain, found.averaged)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: noisy_routes(-0.1), "temperature"),
        (lambda: noisy_routes(math.inf), "temperature"),
        (lambda: noisy_routes(True), "temperature"),
        (lambda: noisy_routes({}), "mapping"),
        (lambda: noisy_routes({0: 0.1}, layers=0), "mapping"),
        (lambda: noisy_routes(0.1, -1), "seed"),
        (lambda: noisy_routes(0.1, distribution="cauchy"), "distribution"),  # type: ignore[arg-type]
        (lambda: average_routes(organisms.load("null"), ["the"], 0), "n must be"),
        (lambda: route_uncertainty(organisms.load("null"), ["the"], 1), "disagree"),
        (lambda: average_routes(organisms.load("null"), [], 2, progress=False), "empty"),
        (
            lambda: RouteUncertainty(
                np.zeros((2, 3), int),
                np.zeros(1, int),
                np.zeros(1, int),
                np.zeros(2),
                np.zeros(2),
                np.zeros(2),
                0.5,
                0,
            ),
            "",
        ),
    ],
)
def test_refused(make: Any, match: str) -> None:
    with pytest.raises((DataError, TypeCheckError), match=match):
        make()
