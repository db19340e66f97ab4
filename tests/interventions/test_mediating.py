"""mediation: models where the answer is known, brute force, and what is refused."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from moe_lens import HookedMoE, RoutedModel, RouteRecord, mediation, organisms, replay_hooks, zero_ablate
from moe_lens.errors import DataError
from moe_lens.interventions import shared_runs
from moe_lens.interventions.results import Mediation
from moe_lens.model.resuming import record
from moe_lens.resampling import FEW_UNITS
from tests.families import every_dtype_first_float32, first_of, recipes, some_kinds
from tests.tiny_models import (
    EVERY_FAMILY,
    SOME_KINDS,
    prompt,
    sparse_blocks,
    tiny_model,
    tokenizer,
    tokens,
)

Hooked = Callable[..., Any]


def last_logit(token: int = 7) -> Any:
    return lambda logits: logits[:, -1, token]


def route_alone_decides() -> Any:
    """Experts write constants (their biases) into dimensions that nothing else writes to and only the logits
    read; the router reads the token, whose own dimensions no logit reads. Top 1 of 2, one layer."""
    model = tiny_model("gpt_oss", num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1)
    n_half = model.config.hidden_size // 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif "bias" in name or "sinks" in name or "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        embedding = model.model.embed_tokens.weight
        embedding[:, n_half:] = 0
        embedding[:, :n_half] /= embedding.norm(dim=1, keepdim=True)  # so that the final norm's scale is one
        layer = model.model.layers[0]
        layer.mlp.experts.down_proj_bias[0, n_half:] = 1.0
        layer.mlp.experts.down_proj_bias[1, n_half:] = -1.0
        model.lm_head.weight[:, :n_half] = 0
        layer.mlp.router.weight[:, n_half:] = 0
    return HookedMoE.from_hf(model, tokenizer())


def test_where_the_route_alone_decides_it_carries_everything() -> None:
    model = route_alone_decides()
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.arange(4, 40)[:, None])
    chosen = cache["topk_indices", 0][:, 0, 0]
    first, second = (torch.arange(4, 40)[chosen == expert][:8] for expert in (0, 1))
    n = min(len(first), len(second))
    prefix = tokens(n, 3)
    clean, corrupted = (torch.cat([prefix, last[:n, None]], dim=1) for last in (first, second))
    found = mediation(model, clean, corrupted, last_logit())
    assert float(found.total_effect.abs().min()) > 0.1
    torch.testing.assert_close(found.route_effect, found.total_effect)
    torch.testing.assert_close(
        found.representation_effect, torch.zeros(n, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert found.share("route")[0] == pytest.approx(1)
    assert found.share("representation") == pytest.approx((0, 0, 0), abs=1e-6)


@pytest.mark.parametrize("weights", [False, True])
def test_where_the_route_is_irrelevant_it_carries_nothing(weights: bool) -> None:
    """All experts are the same and weights sum to 1: whoever runs, the output is the same."""
    hf_model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in hf_model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
    model = HookedMoE.from_hf(hf_model, tokenizer())
    found = mediation(model, tokens(6, 5), tokens(6, 5, seed=1), last_logit(), weights=weights)
    assert bool((found.total_effect.abs() > 1e-2).any())
    torch.testing.assert_close(found.route_effect, torch.zeros_like(found.total_effect), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.representation_effect, found.total_effect, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.clean_route_up_to[-1], found.corrupted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "weights"),
    first_of(
        [*((name, True) for name in SOME_KINDS), ("olmoe", False)],
        itertools.product(EVERY_FAMILY, (True, False)),
    ),
)
def test_every_entry_is_a_replay_by_hand(hooked: Hooked, recipe: str, weights: bool) -> None:
    model, metric = hooked(recipe), last_logit()
    clean, corrupted = tokens(2, 5), tokens(2, 5, seed=4)
    found = mediation(model, clean, corrupted, metric, weights=weights)
    records = {}
    with torch.no_grad():
        for name, given_ in (("clean", clean), ("corrupted", corrupted)):
            logits, cache = model.run_with_cache(given_)
            records[name] = RouteRecord.from_cache(cache, weights=weights)
            assert torch.equal(getattr(found, name), metric(logits).double())

        def on_route(given_: Tensor, record: str, layers: Any = None) -> Tensor:
            hooks = replay_hooks(records[record], layers=layers)
            return metric(model.run_with_hooks(given_, fwd_hooks=hooks)).double()

        assert torch.equal(found.with_clean_route, on_route(corrupted, "clean"))
        assert torch.equal(found.with_corrupted_route, on_route(clean, "corrupted"))
        last = model.moe_layers[-1]
        assert torch.equal(found.clean_route_in[-1], on_route(corrupted, "clean", [last]))
        assert torch.equal(found.corrupted_route_in[0], on_route(clean, "corrupted", [model.moe_layers[0]]))
        assert torch.equal(found.corrupted_route_up_to[-1], found.with_corrupted_route)
        assert torch.equal(found.clean_route_up_to[0], found.clean_route_in[0])
    torch.testing.assert_close(
        found.route_effect + found.representation_effect + found.interaction, found.total_effect
    )


def test_a_prompt_against_itself_has_no_effect_and_no_share(hooked: Hooked) -> None:
    found = mediation(hooked("olmoe"), tokens(3, 4), tokens(3, 4), last_logit())
    assert not bool(found.total_effect.any())
    assert not bool(found.clean_route_in.sub(found.corrupted).any())
    with pytest.raises(DataError, match="total effect is 0"):
        found.share("route")
    assert "share" not in str(found)


@recipes(["mixtral"], EVERY_FAMILY)
def test_batches_of_different_lengths_change_nothing(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    clean = [prompt(length, length) for length in (3, 6, 4, 2)]
    corrupted = [prompt(length, length + 9) for length in (3, 6, 4, 2)]
    together = mediation(model, clean, corrupted, last_logit(), batch_size=4)
    for size in (1, 3):
        apart = mediation(model, clean, corrupted, last_logit(), batch_size=size)
        for name in ("clean", "with_clean_route", "corrupted_route_in", "clean_route_up_to"):
            torch.testing.assert_close(getattr(apart, name), getattr(together, name), atol=1e-5, rtol=1e-4)


# What runs share


NAMES = (
    "clean", "corrupted", "with_clean_route", "with_corrupted_route", "clean_route_in", "corrupted_route_in",
    "clean_route_up_to", "corrupted_route_up_to",
)  # fmt: skip


@contextmanager
def counting_blocks(model: Any) -> Iterator[list[int]]:
    """The numbers of the MoE blocks that run. (By their forwards: a torch hook would stop the reuse.)"""
    ran: list[int] = []

    def noting(number: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(number)
        return own(*args, **kwargs)

    blocks: dict[int, Any] = dict(sparse_blocks(model.original_model))
    for number, block in blocks.items():
        block.forward = partial(noting, number, block.forward)
    try:
        yield ran
    finally:
        for block in blocks.values():
            del block.forward


@pytest.mark.broad
@some_kinds
@every_dtype_first_float32
@pytest.mark.parametrize("wrapper", ["bridge", "routed"])
def test_resumed_runs_are_whole_ones(hooked: Hooked, recipe: str, dtype: torch.dtype, wrapper: str) -> None:
    model = hooked(recipe, dtype) if wrapper == "bridge" else RoutedModel(tiny_model(recipe, dtype))
    clean = [tokens(1, length, seed=length)[0] for length in (5, 6, 5)]
    corrupted = [tokens(1, length, seed=length + 9)[0] for length in (5, 6, 5)]
    options: dict[str, Any] = {"weights": True, "progress": False, "batch_size": 2}
    found = mediation(model, clean, corrupted, last_logit(), **options)
    whole = mediation(model, clean, corrupted, last_logit(), reuse=False, **options)
    for name in NAMES:
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert bool((found.clean_route_in != found.corrupted).any())  # else the routes might be alike


def test_what_runs_share_is_run_once(hooked: Hooked) -> None:
    model = hooked("olmoe", num_hidden_layers=12)
    ran = {}
    for reuse in (True, False):
        with counting_blocks(model) as ran[reuse]:
            mediation(model, tokens(2, 4), tokens(2, 4, 5), last_logit(), reuse=reuse, progress=False)
    assert len(ran[False]) == 2 * 24 * 12
    assert len(ran[True]) < 0.7 * len(ran[False])
    alone, growing = sum(range(1, 13)), sum(range(1, 11))
    beside = 3 * 12  # plain run, its record, that of the whole route
    checks = (
        (12 - 6) + 6 + (12 - 1) + 1 + (12 - 5) + 5 + (12 - 1) + 1
    )  # whole instead of resumed ones, and those
    assert len(ran[True]) == 2 * (alone + growing + beside) + checks


def test_where_resumed_runs_differ_all_are_whole(hooked: Hooked) -> None:
    """The record of a plain run is spoiled: what goes on from it is not used."""
    model = hooked("olmoe")
    clean, corrupted = tokens(2, 4), tokens(2, 4, 5)
    expected = mediation(model, clean, corrupted, last_logit(), reuse=False, progress=False)

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        recorded = record(*args, **kwargs)
        assert recorded is not None
        for kept in recorded.inputs:
            kept.mul_(1.5)
        return recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_runs, "record", spoiled)
        found = mediation(model, clean, corrupted, last_logit(), progress=False)
        patch.setattr(shared_runs, "record", lambda *args, **kwargs: None)
        without = mediation(model, clean, corrupted, last_logit(), progress=False)
        patch.setattr(shared_runs, "record", lambda *args, **kwargs: 1 / 0)
        failing = mediation(model, clean, corrupted, last_logit(), progress=False)
    for name in NAMES:
        for made in (found, without, failing):
            assert torch.equal(getattr(made, name), getattr(expected, name))


@pytest.mark.parametrize("align", ["same", "end"])
@pytest.mark.parametrize("layers", [[3, 1], 2, slice(1, 3), range(2), torch.tensor([0])], ids=str)
def test_some_layers_are_the_mediator(hooked: Hooked, layers: Any, align: str) -> None:
    model, metric = hooked("olmoe", num_hidden_layers=4), last_logit()
    chosen = {"[3, 1]": (1, 3), "2": (2,), "slice(1, 3, None)": (1, 2), "range(0, 2)": (0, 1)}
    expected = chosen.get(str(layers), (0,))
    clean, corrupted = tokens(2, 5), tokens(2, 5, 4)
    if align == "end":
        clean, corrupted = torch.cat([clean, clean[:, :2]], 1), torch.cat([corrupted[:, 1:], clean[:, :2]], 1)
    found = mediation(model, clean, corrupted, metric, layers=layers, align=align, progress=False)
    assert found.layers == expected
    n_shared = 2 if align == "end" else 5
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        for route, got in [
            *(((layer,), found.clean_route_in[n]) for n, layer in enumerate(expected)),
            *((expected[: n + 1], found.clean_route_up_to[n]) for n in range(len(expected))),
            (expected, found.with_clean_route),
        ]:

            def end(value: Tensor, hook: Any) -> Tensor:
                value, layer = value.clone(), int(hook.name.split(".")[1])
                value[:, -n_shared:] = cache["topk_indices", layer][:, -n_shared:]
                return value

            hooks = [(f"blocks.{layer}.mlp.hook_topk_indices", end) for layer in route]
            by_hand = metric(model.run_with_hooks(corrupted, fwd_hooks=hooks)).double()
            torch.testing.assert_close(got, by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1], "all", 1.5, [0.0]], ids=str)
def test_layers_that_are_not_there_are_refused(hooked: Hooked, layers: Any) -> None:
    with pytest.raises(DataError, match="layers must"):
        mediation(hooked("olmoe"), tokens(2, 3), tokens(2, 3, 5), last_logit(), layers=layers)


def test_a_common_end_is_aligned_and_the_rest_is_free(hooked: Hooked) -> None:
    """The route of the shared end is replayed by hand, column by column from the right."""
    model, metric = hooked("olmoe"), last_logit()
    long, short = tokens(1, 7, seed=2), tokens(1, 7, seed=2)[:, 3:]
    found = mediation(model, long, short, metric, align="end")
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        _, of_long = model.run_with_cache(long)
        _, of_short = model.run_with_cache(short)
        hooks = [
            (f"blocks.{n}.mlp.hook_topk_indices", lambda value, hook, n=n: of_long["topk_indices", n][:, 3:])
            for n in model.moe_layers
        ]
        expected = metric(model.run_with_hooks(short, fwd_hooks=hooks))
        torch.testing.assert_close(found.with_clean_route, expected.double(), atol=1e-5, rtol=1e-4)

        def end(value: Tensor, hook: Any) -> Tensor:
            n = int(hook.name.split(".")[1])
            value = value.clone()
            value[:, 3:] = of_short["topk_indices", n]
            kept[hook.name] = value
            return value

        hooks = [(f"blocks.{n}.mlp.hook_topk_indices", end) for n in model.moe_layers]
        expected = metric(model.run_with_hooks(long, fwd_hooks=hooks))
    torch.testing.assert_close(found.with_corrupted_route, expected.double(), atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="align='end'"):
        mediation(model, long, short, metric)
    with pytest.raises(DataError, match="do not end with the same token"):
        mediation(model, [[5, 6]], [[4, 7, 8]], metric, align="end")


@pytest.mark.parametrize(
    ("metric", "match"),
    [
        (lambda logits: logits[:, -1], "must give one number"),
        (lambda logits: logits[:1, -1, 3].expand(2), "must give one number"),
        (lambda logits: logits[:, -1, 3] / 0, "NaN or infinite"),
        (lambda logits: logits[:, 0, 3], "NaN or infinite"),
    ],
)
def test_metrics_that_give_no_number_a_pair_are_refused(hooked: Hooked, metric: Any, match: str) -> None:
    clean, corrupted = (
        [tokens(1, 4)[0], tokens(1, 3)[0], tokens(1, 2)[0]],
        [
            tokens(1, 4, 1)[0],
            tokens(1, 3, 1)[0],
            tokens(1, 2, 1)[0],
        ],
    )
    with pytest.raises(DataError, match=match):
        mediation(hooked("olmoe"), clean, corrupted, metric, batch_size=2)


def test_what_does_not_pair_is_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")
    with pytest.raises(DataError, match="2 clean prompts need as many"):
        mediation(model, tokens(2, 3), tokens(3, 3), last_logit())
    with pytest.raises(DataError, match="'same' or 'end'"):
        mediation(model, tokens(2, 3), tokens(2, 3), last_logit(), align="start")
    found = mediation(model, tokens(2, 3), tokens(2, 3, 5), last_logit())
    for share in (
        lambda: found.share("all"),
        lambda: found.share("route", clusters=["a"]),
        lambda: found.share("route", level=1.0),
    ):
        with pytest.raises(DataError):
            share()
    one = mediation(model, tokens(1, 3), tokens(1, 3, 5), lambda logits: logits[0, -1, 3])
    assert one.total_effect.shape == (1,)
    with pytest.raises(DataError, match="at least two"):
        one.share("route")


def numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0.5, 3)), min_size=3, max_size=30), st.integers(0, 3))
def test_shares_are_ratios_of_means_with_a_bootstrap_of_pairs(pairs: Any, seed: int) -> None:
    route, total = (np.array(column) for column in zip(*pairs, strict=True))
    zeros = torch.zeros(len(pairs), dtype=torch.float64)
    layer = zeros[None]
    found = Mediation(
        (0,), numbers(total), zeros, numbers(route), zeros, numbers(route)[None], layer, layer, layer, False
    )
    share, low, high = found.share("route", seed=seed)
    assert share == pytest.approx(route.mean() / total.mean())
    assert low - 1e-9 <= share <= high + 1e-9 or len(set(zip(route, total, strict=True))) > 1
    generator = np.random.default_rng(seed + 100)
    drawn = generator.integers(len(pairs), size=(4000, len(pairs)))
    by_row = route[drawn].mean(1) / total[drawn].mean(1)
    n = len(pairs)  # 2.5 % of a normal distribution, less of few pairs' t distribution
    left_out = stats.norm.cdf(-stats.t.ppf(0.975, n - 1) * (n / (n - 1)) ** 0.5)
    least = max(left_out / 3 - 0.001, 0.0)
    reach = stats.t.ppf(0.975, n - 1) * by_row.std() * (n / (n - 1)) ** 0.5 if n < FEW_UNITS else 0.0
    # on each side, however coarse the values
    for tail, middle, end in ((by_row, share, low), (-by_row, -share, -high)):
        assert (tail < end - 1e-9).mean() < left_out + 0.02
        assert middle - end >= 0.8 * reach - 1e-9  # few pairs: at least the t interval
        assert middle - end <= max(1.25 * reach, middle - np.quantile(tail, least)) + 1e-9  # and not wider
    assert found.shares_by_layer(seed=seed)["restored"][0] == pytest.approx([share, low, high])


def test_clustered_pairs_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    route = numbers(np.repeat(generator.normal(0.5, 1, 6), 5))
    ones, zeros = torch.ones(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    layer = zeros[None]
    found = Mediation((0,), ones, zeros, route, zeros, layer, layer, layer, layer, False)
    _, low, high = found.share("route")
    _, wide_low, wide_high = found.share("route", clusters=[str(n // 5) for n in range(30)])
    assert wide_high - wide_low > 1.5 * (high - low)


def test_it_reads_well() -> None:
    model = organisms.load("planted")
    found = mediation(
        model, ["Document report : the"] * 2, ["Document rumor : the"] * 2, last_logit(30), weights=True
    )
    assert "experts and weights" in str(found)
    assert "total effect" in str(found)
    assert set(found.shares_by_layer(cumulative=True)) == {"restored", "lost"}


def test_hooks_are_the_hooks_around_it(hooked: Hooked) -> None:
    model, prompts = hooked("olmoe"), (tokens(2, 4), tokens(2, 4, 9))
    hooks = zero_ablate({0: [1, 2], 2: [3]})
    plain = mediation(model, *prompts, last_logit(), progress=False)
    found = mediation(model, *prompts, last_logit(), hooks=hooks, progress=False)
    with model.hooks(hooks):
        around = mediation(model, *prompts, last_logit(), progress=False)
    for name in ("clean", "corrupted", "with_clean_route", "clean_route_in", "corrupted_route_up_to"):
        assert torch.equal(getattr(found, name), getattr(around, name))
    assert not torch.equal(found.clean, plain.clean)  # else this test could not fail
    assert torch.equal(mediation(model, *prompts, last_logit(), progress=False).clean, plain.clean)


def test_it_shows_itself_in_a_line_and_a_table(hooked: Hooked) -> None:
    found = mediation(hooked("olmoe"), tokens(3, 4), tokens(3, 4, 9), last_logit(), progress=False)
    assert repr(found).startswith("Mediation(3 pairs, experts only: total effect ")
    table: Any = found.to_dataframe().set_index("effect")
    assert table["mean"]["total"] == pytest.approx(float((found.clean - found.corrupted).mean()))
    parts = table["mean"][["route", "representation", "interaction"]]
    assert parts.sum() == pytest.approx(table["mean"]["total"])
    assert tuple(table.loc["route", ["share", "low", "high"]]) == pytest.approx(found.share("route"))
    assert np.isnan(table["share"]["total"])
    assert "<td>representation</td>" in found._repr_html_()
    alone: Any = mediation(hooked("olmoe"), tokens(1, 4), tokens(1, 4, 9), last_logit(), progress=False)
    assert alone.to_dataframe()["share"].isna().all()
