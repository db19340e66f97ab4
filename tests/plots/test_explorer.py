"""What an explorer's page holds: the record's numbers, bit for bit, and text that stays text."""

import base64
import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import DataError, PlanError, RouteRecord, SteeringPlan, explore, organisms
from moe_lens.detection.expert_scores import risk_difference
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.plots.explorer_data import packed
from moe_lens.shape import UNKNOWN_MODEL, MoEShape
from moe_lens.statistics.collection import collect_routing, route_prompt
from moe_lens.statistics.generation import collect_generation
from moe_lens.statistics.routes import PromptRouting
from moe_lens.steering.hooks import steer_hooks
from tests.families import recipes
from tests.text.test_spans import model_with
from tests.tiny_models import EVERY_FAMILY, prompt, tiny_model, tokenizer

SHAPE = MoEShape("m", (1, 3), 6, 2)
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--",
    "\u2028",
    "\ud83d",
    "&lt;",
    '"',
    "{{data}}",
    "{{title}}",
)


def unpacked(part: dict[str, Any]) -> np.ndarray:
    """The other way than `packed`: by numpy, and bfloat16 by placing its bits."""
    data = base64.b64decode(part["data"])
    if part["dtype"] == "bf2":
        words = np.frombuffer(data, "<u2").astype("<u4") * 2**16
        return words.view("<f4").reshape(part["shape"])
    return np.frombuffer(data, "<" + part["dtype"]).reshape(part["shape"])


def routing(
    tokens: tuple[str, ...] = ("a", " b", " c"), seed: int = 0, shape: MoEShape = SHAPE
) -> PromptRouting:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(shape.layers), len(tokens), shape.n_experts, generator=generator)
    weights, indices = logits.softmax(-1).topk(shape.top_k)
    return PromptRouting(shape, tokens, indices, weights)


def record(tokens: list[list[int]] | None, seed: int = 0, weights: bool = True) -> RouteRecord:
    n_rows, n_columns = (2, 3) if tokens is None else (len(tokens), len(tokens[0]))
    logits = torch.randn(2, n_rows, n_columns, 6, generator=torch.Generator().manual_seed(seed))
    values, indices = logits.softmax(-1).topk(2)
    ids = None if tokens is None else torch.tensor(tokens)
    return RouteRecord(SHAPE, indices, values.bfloat16() if weights else None, ids)


def data_of(page: str) -> Any:
    """What a browser reads: the text of the data's script, up to the first thing that looks like its end."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)
    return json.loads(text)


@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_packing_rounds_no_number(numbers: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(numbers).to(dtype)
    part = packed(tensor[:, None])
    np.testing.assert_array_equal(unpacked(part)[:, 0], tensor.double().numpy())
    assert part["shape"] == [len(numbers), 1]


@pytest.mark.parametrize(("largest", "dtype"), [(255, "u1"), (256, "u2"), (65536, "u4")])
def test_whole_numbers_and_what_is_no_number_are_packed(largest: int, dtype: str) -> None:
    part = packed(torch.tensor([0, largest]))
    assert (part["dtype"], unpacked(part).tolist()) == (dtype, [0, largest])
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5])
    np.testing.assert_array_equal(unpacked(packed(odd)), odd.numpy())
    assert packed(odd)["dtype"] == "bf2"
    exact = torch.tensor([torch.nan, 0.1])
    np.testing.assert_array_equal(unpacked(packed(exact)), exact.numpy())


@recipes(["olmoe", "qwen2_moe", "deepseek_v3"], EVERY_FAMILY)
@pytest.mark.parametrize("kind", ["bridge", "routed"])
def test_a_models_page_holds_what_its_cache_holds(
    hooked: Callable[..., HookedMoE], recipe: str, kind: str
) -> None:
    model: Any = hooked(recipe) if kind == "bridge" else RoutedModel(tiny_model(recipe), tokenizer())
    plan = SteeringPlan(deactivate=[(model.moe_layers[-1], 1)])
    content = data_of(explore(model, prompt(6), plan=plan).html())
    assert [run["name"] for run in content["runs"]] == ["as trained", "steered"]
    assert content["layers"] == list(model.moe_layers)
    assert content["plan"] == {"activate": [], "deactivate": [[len(model.moe_layers) - 1, 1]]}
    for run, hooks in zip(content["runs"], ([], steer_hooks(plan)), strict=True):
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(prompt(6))
        for row, layer in enumerate(model.moe_layers):
            indices, weights = (cache[f"topk_{name}", layer][0] for name in ("indices", "weights"))
            assert unpacked(run["indices"])[row].tolist() == indices.tolist()
            np.testing.assert_array_equal(unpacked(run["weights"])[row], weights.float().numpy())
            p = cache["router_logits", layer][0].double().softmax(-1)
            np.testing.assert_allclose(unpacked(run["entropy"])[row], -(p * p.log()).sum(-1), rtol=1e-5)
    if recipe == "olmoe":  # chooses by its logits, so the margin is between neighbours in their order
        logits = torch.stack(
            [model.run_with_cache(prompt(6))[1]["router_logits", n][0] for n in model.moe_layers]
        )
        ordered = logits.sort(-1, descending=True).values
        expected = ordered[..., model.top_k - 1] - ordered[..., model.top_k]
        np.testing.assert_allclose(unpacked(content["runs"][0]["margin"]), expected, rtol=1e-5, atol=1e-7)


def test_scores_and_statistics_are_those_of_the_runs_layers() -> None:
    model = organisms.load("specialised")
    texts = ["Question : what is the capital", "Document : the"]
    first, second = (collect_routing(model, text, vocabulary=True, progress=False) for text in texts)
    scores = risk_difference(first, second)
    content = explore(model, texts[0], scores=scores, stats=first).content
    np.testing.assert_array_equal(unpacked(content["scores"]["delta"]), scores.delta)
    np.testing.assert_array_equal(unpacked(content["scores"]["rate_2"]), second.rates)
    np.testing.assert_array_equal(unpacked(content["stats"]["rate"]), first.rates)
    some = PromptRouting(
        MoEShape("specialised", (1, 2), 8, 2), ("a",), torch.tensor([[[0, 1]], [[2, 3]]]), torch.ones(2, 1, 2)
    )
    part = explore(some, scores=scores, stats=first).content
    np.testing.assert_array_equal(unpacked(part["scores"]["delta"]), scores.delta[1:3])
    top = part["stats"]["top"]
    assert set(unpacked(top["expert"]).tolist()) <= set(range(16))


def test_top_tokens_on_the_page_are_the_librarys() -> None:
    from moe_lens.statistics.vocabulary import top_tokens

    model = organisms.load("specialised")
    prompts = [c.open_book for c in organisms.world("specialised").conflicts("detection")[:12]]
    stats = collect_routing(model, prompts, vocabulary=True, progress=False)
    top = explore(model, prompts[0], stats=stats).content["stats"]["top"]
    columns = {name: unpacked(top[name]) for name in ("expert", "text", "count", "total", "lift")}
    for row, layer in enumerate(stats.shape.layers):
        for expert in range(8):
            own = columns["expert"] == row * 8 + expert
            expected = top_tokens(stats, layer, expert, n=12, tokenizer=model.tokenizer)
            assert [top["texts"][n] for n in columns["text"][own]] == expected["text"].tolist()
            for name in ("count", "total"):
                assert columns[name][own].tolist() == expected[name].tolist()
            np.testing.assert_allclose(columns["lift"][own], expected["lift"])


# text


def test_no_text_ends_the_script_or_is_read_as_markup(tmp_path: Path) -> None:
    shape = replace(SHAPE, model="</title><script>alert(2)</script>é")
    page = explore(routing(HOSTILE, shape=shape), names="</script>").html()
    assert page.isascii()
    assert len(re.findall(r"<script", page)) == len(re.findall("</script>", page)) == 2
    assert data_of(page)["runs"][0]["tokens"] == list(HOSTILE)
    assert "<title>Routing of &lt;/title&gt;" in page
    explore(routing(HOSTILE)).save(tmp_path / "page.html")
    assert data_of((tmp_path / "page.html").read_text("ascii"))["runs"][0]["tokens"] == list(HOSTILE)


def test_a_notebook_gets_the_page_in_a_sandbox() -> None:
    page = explore(routing(HOSTILE))
    shown = page._repr_html_()
    [source] = re.findall(r'<iframe [^>]*sandbox="allow-scripts"[^>]* srcdoc="([^"]*)"></iframe>', shown)
    assert html.unescape(source) == page.html()
    assert "allow-same-origin" not in shown
    assert repr(page) == "RoutingExplorer(8 tokens, 1 run; m, 2 layers × 6 experts, top 2)"


def test_a_page_that_is_too_large_for_a_notebook_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lens.plots.explorer._MOST_INLINE", 1000)
    assert "save(path)" in explore(routing())._repr_html_()
    assert "<iframe" not in explore(routing())._repr_html_()


def test_the_page_names_no_address() -> None:
    """Nothing to load, but the name of SVG's elements."""
    found = set(re.findall(r"""https?://[^"'\s]+""", explore(routing()).html()))
    assert found == {"http://www.w3.org/2000/svg"}


# records


def test_a_generation_shows_its_texts_and_its_route() -> None:
    model = organisms.load("specialised")
    made = RouteRecord.from_generation(model, "Question : what is", 4, weights=True)
    run = explore(made, tokenizer=model.tokenizer).content["runs"][0]
    assert made.tokens is not None
    assert "".join(run["tokens"]) == model.tokenizer.decode(made.tokens[0]).replace(" ", "")
    np.testing.assert_array_equal(unpacked(run["indices"]), made.indices[:, 0])


def test_padding_of_a_batch_is_left_out_where_it_can_be_told() -> None:
    made = tokenizer()  # pads with 0, begins with 1, ends with 2
    batch = record([[0, 0, 1, 5, 6], [1, 4, 5, 6, 7]])
    page = explore(batch, tokenizer=made)
    assert page.runs[0].tokens == ("<bos>", *(made.decode([n]) for n in (5, 6)))
    assert torch.equal(page.runs[0].indices, batch.indices[:, 0, 2:])
    assert page.content["notes"] == ["2 columns of padding are left out."]
    other = explore(batch, row=1, tokenizer=made)
    assert len(other.runs[0].tokens) == 5
    assert other.content["notes"] == []


@pytest.mark.parametrize(
    ("pad", "ids", "kept", "says"),
    [
        (2, [2, 2, 1, 5], (2, 4), "left out"),  # pads with the EOS, which begins no text
        (2, [1, 5, 2, 2], (0, 4), "columns="),  # an end and padding, or not
        (2, [1, 5, 6, 2], (0, 4), None),  # an end
        (1, [1, 1, 1, 5], (0, 4), "columns="),  # pads with the BOS: one of them may be the text's own
        (1, [1, 5, 6, 7], (0, 4), None),
        (0, [0, 0, 0, 0], (0, 4), "columns="),
    ],
)
def test_columns_in_doubt_are_shown_and_named(
    pad: int, ids: list[int], kept: tuple[int, int], says: str | None
) -> None:
    made = tokenizer()
    made.pad_token_id = pad
    page = explore(record([ids]), tokenizer=made)
    assert page.runs[0].tokens == tuple(made.decode([n]) for n in ids[slice(*kept)])
    notes = " ".join(page.content["notes"])
    assert (says in notes) if says else notes == ""


def test_one_token_is_a_text() -> None:
    page = explore(routing(("a",)))
    assert repr(page).startswith("RoutingExplorer(1 token, 1 run;")
    assert unpacked(page.content["runs"][0]["indices"]).shape == (2, 1, 2)


def test_columns_of_a_record_can_be_named_and_keep_their_numbers() -> None:
    batch = record([[0, 0, 1, 5, 6]])
    page = explore(batch, columns=slice(-2, None), tokenizer=tokenizer())
    assert (page.runs[0].first, len(page.runs[0].tokens)) == (3, 2)
    assert torch.equal(page.runs[0].indices, batch.indices[:, 0, 3:])
    part = explore(routing(), columns=slice(1, 2))
    assert (part.runs[0].first, part.runs[0].tokens) == (1, (" b",))


def test_without_tokenizer_or_tokens_numbers_stand_for_texts() -> None:
    assert explore(record([[4, 9]])).runs[0].tokens == ("[4]", "[9]")
    page = explore(record(None), row=1)
    assert page.runs[0].tokens == ("0", "1", "2")
    assert "does not hold its tokens" in page.content["notes"][-1]


def test_pieces_of_a_character_bear_it() -> None:
    model = model_with("bytes")
    assert explore(model, "é山").runs[0].tokens[-3:] == ("山(1/3)", "山(2/3)", "山(3/3)")


# two runs


def test_runs_are_compared_as_far_as_their_texts_agree() -> None:
    first, second = routing(("a", " b", " c", " d")), routing(("a", " b", " x"), seed=1)
    page = explore(first, against=second, names=("one", "two"))
    assert page.content["n_shared"] == 2
    assert [run["name"] for run in page.content["runs"]] == ["one", "two"]
    assert repr(page).startswith("RoutingExplorer(3 and 4 tokens, 2 runs;")
    unknown = explore(first, against=replace(second, shape=replace(SHAPE, model=UNKNOWN_MODEL)))
    assert unknown.content["n_shared"] == 2


OTHER = replace(SHAPE, model="another")
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "another text": (lambda: explore(routing(), against=routing(("z", " b"))), DataError, "no token"),
    "another model": (lambda: explore(routing(), against=routing(shape=OTHER)), DataError, "different model"),
    "other layers": (
        lambda: explore(routing(), against=routing(shape=replace(SHAPE, layers=(1, 4)))), DataError, "layers",
    ),
    "other k": (
        lambda: explore(routing(), against=routing(shape=replace(SHAPE, top_k=3))), DataError, "top_k",
    ),
    "scores": (lambda: explore(routing(), scores=routing()), DataError, "scores must be .* ExpertScores"),
    "stats": (lambda: explore(routing(), stats="x"), DataError, "stats must be .* RoutingStats"),
    "plan": (lambda: explore(routing(), plan=[(0, 1)]), DataError, "plan must be .* SteeringPlan"),
    "no route": (lambda: explore(routing(), against="x"), DataError, "against"),
    "a prompt for a route": (lambda: explore(routing(), "text"), DataError, "prompt="),
    "hooks for a route": (lambda: explore(routing(), hooks=[("x", print)]), DataError, "hooks="),
    "no token": (lambda: explore(routing(())), DataError, "no token"),
    "a record of no token": (
        lambda: explore(RouteRecord(SHAPE, torch.zeros(2, 1, 0, 2).long())), DataError, "no routes",
    ),
    "row": (lambda: explore(record([[4, 5]]), row=1), DataError, "row"),
    "row of a prompt": (lambda: explore(routing(), row=1), DataError, "row"),
    "columns": (lambda: explore(routing(), columns=slice(3, None)), DataError, "none of 3"),
    "step": (lambda: explore(routing(), columns=slice(0, 3, 2)), DataError, "consecutive"),
    "no slice": (lambda: explore(routing(), columns=[1]), DataError, "slice"),
    "odd slice": (lambda: explore(routing(), columns=slice("a", "b")), DataError, "whole numbers"),
    "names": (lambda: explore(routing(), names=("a", "b")), DataError, "names"),
    "a plan": (lambda: explore(routing(), plan=SteeringPlan(deactivate=[(0, 1)])), PlanError, "layer 0"),
    "too many columns left": (
        lambda: explore(record([[4, 5]]), against=record([[4, 5]]), columns=slice(5, 9)),
        DataError,
        "none of 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_shown_is_refused(case: str) -> None:
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()


def test_what_does_not_go_with_a_model_is_refused(hooked: Callable[..., HookedMoE]) -> None:
    model = hooked("olmoe")
    with pytest.raises(DataError, match="needs a prompt"):
        explore(model)
    with pytest.raises(DataError, match="against="):
        explore(model, prompt(3), against=routing())
    with pytest.raises(DataError, match="row="):
        explore(model, prompt(3), row=1)
    with pytest.raises(DataError, match="one prompt"):
        explore(model, [prompt(3), prompt(4)])
    with pytest.raises(DataError, match="from_generation"):
        explore(collect_generation(model, [prompt(3)], 2, progress=False))
    stats = collect_routing(organisms.load("specialised"), "Question :", progress=False)
    with pytest.raises(DataError, match="The statistics and the run are of different models"):
        explore(model, prompt(3), stats=stats)
    with pytest.raises(DataError, match="The scores and the run"):
        explore(model, prompt(3), scores=risk_difference(stats, stats))


def test_hooks_hold_in_both_runs(hooked: Callable[..., HookedMoE]) -> None:
    model = hooked("olmoe")
    below = steer_hooks(SteeringPlan(deactivate=[(0, 2)]))
    page = explore(model, prompt(9), hooks=below, plan=SteeringPlan(deactivate=[(1, 4)]))
    for run, experts in zip(page.runs, ([(0, 2)], [(0, 2), (1, 4)]), strict=True):
        assert all(not bool((run.indices[layer] == expert).any()) for layer, expert in experts)
    plain: Tensor = route_prompt(model, prompt(9)).indices
    assert bool((plain[1] == 4).any())
    assert bool((plain[0] == 2).any())
