"""The explorer's page in a browser, which points, clicks and types: it says what the record holds."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lens import RouteRecord, SteeringPlan, collect_routing, explore, organisms
from moe_lens.detection.expert_scores import Evidence, ExpertScores, risk_difference
from moe_lens.plots import RoutingExplorer
from moe_lens.shape import MoEShape
from moe_lens.statistics.routes import PromptRouting
from moe_lens.statistics.vocabulary import top_tokens
from tests.browser import CHROMIUM, DRIVER, Browser

pytestmark = pytest.mark.skipif(
    DRIVER is None or CHROMIUM is None, reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
PLAN = SteeringPlan(deactivate=[(2, 1), (1, 1)])
CONTRAST = """
const channel = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
const light = (colour) => {
  const [r, g, b] = colour.match(/\\d+/g).map((part) => channel(Number(part)));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
};
return Math.min(...Array.from(document.querySelectorAll(".t"), (span) => {
  const { color, backgroundColor } = getComputedStyle(span), pair = [light(color), light(backgroundColor)];
  return Math.max(...pair) / Math.min(...pair);
}));
"""
"""The least contrast of a token's letters, as WCAG 2 defines it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(1000, 680) as made:
        yield made


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Open the page of an explorer; at the end, nothing may have gone wrong or been asked of a network."""

    def opened(page: RoutingExplorer) -> Browser:
        page.save(tmp_path / "page.html")
        browser.open(tmp_path / "page.html")
        browser.frame()
        return browser

    yield opened
    assert browser.errors() == []


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """An organism's prompt with scores and statistics of the whole."""
    model, conflicts = (
        organisms.load("specialised"),
        organisms.world("specialised").conflicts("detection")[:8],
    )
    stats = [
        collect_routing(model, texts, vocabulary=True, progress=False)
        for texts in ([c.open_book for c in conflicts], [c.closed_book for c in conflicts])
    ]
    found = risk_difference(*stats)
    q = torch.linspace(0, 1, found.delta.numel(), dtype=torch.float64).reshape(found.delta.shape)
    evidence = Evidence(found.delta - 0.125, found.delta + 0.25, q / 2, q, 0.9, 10, 10, 0, ("a",), ("t",))
    scores: ExpertScores = replace(found, evidence=evidence)
    return {"model": model, "prompt": conflicts[3].open_book, "stats": stats[0], "scores": scores}


def page_of(known: dict[str, Any], **options: Any) -> RoutingExplorer:
    return explore(known["model"], known["prompt"], scores=known["scores"], stats=known["stats"], **options)


def runs_of(page: RoutingExplorer) -> Any:
    """Of which weights, entropies and margins are known."""
    return page.runs


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("+", ""))


def chips(browser: Browser, run: int = 0) -> dict[int, float]:
    """Expert -> weight, of the buttons for the token's experts."""
    found = browser.texts(f'.experts[data-run="{run}"] .chip')
    return {int(name[1:]): number(weight) for name, weight in (text.split() for text in found)}


def colour(browser: Browser, run: int, pos: int) -> str:
    return browser.js("return document.getElementById(arguments[0]).style.background", f"t{run}-{pos}")


@pytest.mark.parametrize("pos", [0, 7, 22])
def test_a_token_that_is_pointed_at_shows_its_experts_weights_entropy_and_margin(
    show: Any, known: dict[str, Any], pos: int
) -> None:
    page = explore(known["model"], known["prompt"])
    browser, [run] = show(page), runs_of(page)
    for row in (0, 3):
        browser.choose("#layer", str(row))
        browser.hover(f"#t0-{pos}")
        assert browser.text(".token-name").split()[0] == run.tokens[pos]
        weights = dict(zip(run.indices[row, pos].tolist(), run.weights[row, pos].tolist(), strict=True))
        assert chips(browser) == pytest.approx(weights, abs=5.1e-4)
        entropy, margin = (number(text) for text in browser.texts("#facts b"))
        assert entropy == pytest.approx(float(run.entropy[row, pos]), abs=5.1e-4)
        assert margin == pytest.approx(float(run.margin[row, pos]), abs=5.1e-4)
    browser.choose("#layer", "-1") if browser.js(
        "return document.querySelector('#colour').value"
    ) != "expert" else None


def test_the_mean_of_all_layers_is_the_mean(show: Any, known: dict[str, Any]) -> None:
    page = page_of(known)
    browser, [run] = show(page), runs_of(page)
    browser.click("#t0-5")
    assert browser.js("return document.querySelector('#layer').value") == "-1"
    rows = torch.arange(4)[:, None]
    expected = [run.entropy[:, 5].mean(), run.margin[:, 5].mean()]
    expected.append(known["scores"].delta[rows, run.indices[:, 5]].mean())
    shown = [number(text) for text in browser.texts("#facts b")]
    assert shown == pytest.approx([float(value) for value in expected], abs=5.1e-4)


def test_colours_follow_the_numbers_and_zero_has_the_colour_of_none(show: Any, known: dict[str, Any]) -> None:
    page = page_of(known)
    browser, [run] = show(page), runs_of(page)
    delta, rows = known["scores"].delta, torch.arange(4)[:, None, None]
    means = delta[rows, run.indices].mean((0, 2))
    limit = float(means.abs().max())
    assert [number(browser.text(f"#{end}")) for end in ("low", "high")] == pytest.approx(
        [-limit, limit], abs=5.1e-4
    )
    rgb = [[int(n) for n in re.findall(r"\d+", colour(browser, 0, pos))] for pos in range(len(run.tokens))]
    for value, (red, _, blue) in zip(means.tolist(), rgb, strict=True):
        if abs(value) > 0.1 * limit:
            assert (blue > red) == (value > 0)  # blue and orange
    browser.choose("#colour", "entropy")
    browser.choose("#layer", "2")
    order = torch.argsort(run.entropy[2])
    brightness = [sum(int(n) for n in re.findall(r"\d+", colour(browser, 0, pos))) for pos in order.tolist()]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) > 5


def test_the_most_frequent_experts_of_a_layer_have_colours_of_their_own(
    show: Any, known: dict[str, Any]
) -> None:
    page = explore(known["model"], known["prompt"])
    browser, [run] = show(page), runs_of(page)
    for row in range(4):
        browser.choose("#layer", str(row))
        top = run.indices[row].gather(-1, run.weights[row].argmax(-1, keepdim=True))[:, 0].tolist()
        by_expert: dict[int, set[str]] = {}
        for pos, expert in enumerate(top):
            by_expert.setdefault(expert, set()).add(colour(browser, 0, pos))
        assert all(len(colours) == 1 for colours in by_expert.values())
        counts = sorted((top.count(expert) for expert in by_expert), reverse=True)
        listed = [int(text[1:]) for text in browser.texts("#legend .key") if text.startswith("E")]
        assert [top.count(expert) for expert in listed] == counts[:7]
        assert len({*map(str, (by_expert[expert] for expert in listed))}) == len(listed)


def test_two_runs_stand_side_by_side_and_say_what_changed(show: Any, known: dict[str, Any]) -> None:
    page = page_of(known, plan=PLAN)
    browser, (trained, steered) = show(page), runs_of(page)
    assert browser.texts(".run h2") == ["as trained", "steered"]
    browser.choose("#layer", "2")
    for pos in (4, 12, 20):
        browser.click(f"#t1-{pos}")
        ours, theirs = (set(run.indices[2, pos].tolist()) for run in (trained, steered))
        assert set(chips(browser, 0)) == ours
        assert set(chips(browser, 1)) == theirs
        changed = browser.texts("#facts b")[-1]
        assert number(changed.removesuffix(" %")) == pytest.approx(100 * len(theirs - ours) / 2, abs=0.06)
        assert browser.texts('.experts[data-run="1"] .only b') == [
            f"E{e}" for e in chips(browser, 1) if e not in ours
        ]
        assert browser.js("return document.querySelectorAll('.t.pinned').length") == 2
    assert "keeps it out" in browser.text("#cell")


def test_where_the_texts_part_nothing_is_compared(show: Any) -> None:
    shape = MoEShape("m", (0,), 4, 1)
    first, second = (
        PromptRouting(shape, texts, torch.tensor([[[n]] * len(texts)])[0][None], torch.ones(1, len(texts), 1))
        for n, texts in ((1, ("a", " b", " c", " d")), (2, ("a", " b", " x")))
    )
    browser = show(explore(first, against=second))
    browser.choose("#layer", "0")
    browser.click("#t0-1")
    assert browser.texts("#facts b")[-1] == "100.0 %"
    browser.click("#t0-2")
    assert browser.texts("#facts b")[-1] == "–"
    assert colour(browser, 0, 2) == ""
    browser.click("#t0-3")
    assert chips(browser, 0) == {1: 1.0}
    assert browser.js("return document.querySelectorAll('.experts[data-run=\"1\"]').length") == 0
    browser.hover("#t1-1")
    assert "token 1, other run" in browser.text(".token-name")
    browser.hover("h1")  # back to the token that was clicked, which the other run does not have
    assert "token 3, this run" in browser.text(".token-name")


def test_a_click_in_the_grid_opens_the_card_of_that_expert(show: Any, known: dict[str, Any]) -> None:
    page = page_of(known)
    browser, [run] = show(page), runs_of(page)
    scores, stats, (row, expert) = known["scores"], known["stats"], (3, 4)
    width = browser.js("return document.querySelector('.grid canvas').getBoundingClientRect().width")
    step = min((width - 30) / 8, 64)
    place = (30 + (expert + 0.5) * step, 26 * (3 - row) + 13)
    browser.hover(".grid canvas", place)
    ran = (run.indices[row] == expert).any(-1)
    assert browser.text("#cell").startswith(
        f"L{row} E{expert} · ran at {int(ran.sum())} of {len(run.tokens)} tokens"
    )
    browser.click(".grid canvas", place)
    assert browser.text("#card h2") == f"Layer {row}, expert {expert}"
    assert f"{int(ran.sum())} of {len(run.tokens)}" in browser.text("#card [data-run]")
    weights = torch.where(run.indices[row] == expert, run.weights[row], 0.0).sum(-1)
    heaviest = weights.argsort(descending=True, stable=True)[: int(ran.sum())][:14].tolist()
    assert browser.js(
        "return Array.from(document.querySelectorAll('#card [data-at]'), e => +e.dataset.at)"
    ) == (heaviest)
    shown = list(zip(heaviest, browser.texts("#card .chip[data-at]"), strict=True))
    for at, text in shown:
        assert text.startswith(run.tokens[at])
        assert number(text.split()[-1]) == pytest.approx(float(weights[at]), abs=0.0051)
    assert number(re.findall(r"ran at ([\d.]+) %", browser.text("#card-rate"))[0]) == pytest.approx(
        100 * float(stats.rates[row, expert]), abs=0.051
    )
    expected = top_tokens(stats, row, expert, n=12, tokenizer=known["model"].tokenizer)
    assert [text.rpartition(" ×")[0] for text in browser.texts("#top-tokens .chip")] == expected[
        "text"
    ].tolist()
    shown = [number(text) for text in re.findall(r"[+−]?\d\.\d+", browser.text("#card-score"))]
    parts = (scores.delta, scores.low, scores.high, scores.q)
    assert shown == pytest.approx([float(part[row, expert]) for part in parts], abs=5.1e-4)
    assert "90 % interval" in browser.text("#card-score")


def test_layers_without_scores_and_weights_that_are_no_numbers_are_said(
    show: Any, known: dict[str, Any]
) -> None:
    routed = runs_of(explore(known["model"], known["prompt"]))[0]
    shape, weights = replace(routed.shape, layers=(2, 3, 8, 9)), routed.weights.clone()
    weights[:, 4] = float("nan")
    run = PromptRouting(shape, routed.tokens, routed.indices, weights)
    browser = show(explore(run, scores=known["scores"]))
    browser.choose("#layer", "2")  # the third: layer 8
    browser.click("#t0-4")
    assert browser.texts("#facts b") == ["–"]
    assert {text.split()[1] for text in browser.texts(".experts .chip")} == {"–"}
    assert browser.text("#legend") == "no numbers in this layer"
    browser.keys("/", *"L8 E1", "Enter")
    assert "The scores do not cover this layer." in browser.text("#card")
    browser.keys("Escape", "/", *"L3 E1", "Enter")
    delta = float(known["scores"].delta[3, 1])
    assert number(browser.text("#card-score b")) == pytest.approx(delta, abs=5.1e-4)


def test_a_text_of_one_token_in_one_layer_can_be_walked(show: Any) -> None:
    shape = MoEShape("m", (7,), 60, 2)
    browser = show(
        explore(PromptRouting(shape, ("a",), torch.tensor([[[59, 0]]]), torch.tensor([[[0.7, 0.3]]])))
    )
    assert browser.text("#about") == "1 token · 1 layer × 60 experts, 2 run for each token"
    browser.click("#t0-0")
    browser.keys("ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "End", "Enter")
    assert browser.text("#card h2") == "Layer 7, expert 59"


def test_the_text_can_be_coloured_by_one_expert(show: Any, known: dict[str, Any]) -> None:
    page = page_of(known)
    browser, [run] = show(page), runs_of(page)
    browser.click("#search")
    browser.keys(*"L2 E5", "Enter")
    browser.click("#colour-by")
    weights = torch.where(run.indices[2] == 5, run.weights[2], 0.0).sum(-1)
    assert number(browser.text("#high")) == pytest.approx(float(weights.max()), abs=5.1e-4)
    none = {colour(browser, 0, pos) for pos in (weights == 0).nonzero()[:, 0].tolist()}
    assert len(none) == 1
    assert colour(browser, 0, int(weights.argmax())) not in none
    underlined = browser.js("return Array.from(document.querySelectorAll('.t.ran'), e => +e.dataset.at)")
    assert underlined == (run.indices[2] == 5).any(-1).nonzero()[:, 0].tolist()
    browser.click("#card .icon")
    assert browser.js("return document.querySelector('#card').hidden")


def test_search_finds_text_across_tokens_and_names_what_is_not_there(show: Any) -> None:
    texts = ("The", " un", "bel", "iev", "able", " sea", "\n", " Sea")
    shape = MoEShape("m", (1, 3), 4, 1)
    browser = show(explore(PromptRouting(shape, texts, torch.zeros(2, 8, 1).long(), torch.ones(2, 8, 1))))
    hits = "return Array.from(document.querySelectorAll('.t.hit'), e => +e.dataset.at)"
    browser.keys("/", *"unbelievable")
    assert browser.js(hits) == [1, 2, 3, 4]
    browser.keys("Escape")
    assert browser.js(hits) == []
    browser.keys("/", *"sea", "Enter", "Enter")
    assert browser.js(hits) == [5, 7]
    assert browser.text("#found") == "2 of 2"
    assert browser.js("return document.querySelector('.t.pinned').dataset.at") == "7"
    for query, words in (("l2 e1", "no layer 2"), ("L3 E4", "no expert 4"), ("zebra", "nothing")):
        browser.keys("Escape", "/", *query)
        assert browser.text("#found") == words
    browser.keys("Escape", "/", *"layer 3 expert 2", "Enter")
    assert browser.text("#card h2") == "Layer 3, expert 2"


def test_keys_move_through_tokens_and_layers(show: Any, known: dict[str, Any]) -> None:
    browser = show(explore(known["model"], known["prompt"]))
    here = "return +document.querySelector('.t.pinned').dataset.at"
    browser.click("#t0-3")
    browser.keys("ArrowRight", "ArrowRight", "ArrowLeft")
    assert browser.js(here) == 4
    browser.keys("End", "ArrowRight")
    assert browser.js(here) == 22
    assert (
        browser.js("return document.querySelector('.tokens').getAttribute('aria-activedescendant')")
        == "t0-22"
    )
    assert browser.js("return document.querySelector('#t0-22').getAttribute('aria-selected')") == "true"
    browser.keys("Home", "ArrowLeft")
    assert browser.js(here) == 0
    layer = "return document.querySelector('#layer').value"
    browser.keys("ArrowUp", "ArrowUp", "ArrowUp")
    assert browser.js(layer) == "3"
    browser.keys("ArrowDown")
    assert browser.js(layer) == "2"
    assert browser.text("#live") == "layer 2"
    first = next(iter(chips(browser)))
    browser.keys("Enter")
    assert browser.text("#card h2") == f"Layer 2, expert {first}"
    browser.keys("Escape")
    assert browser.js("return document.querySelector('#card').hidden")
    browser.keys("Escape")
    assert browser.js("return document.querySelector('.t.pinned')") is None
    browser.keys("?")
    assert browser.js("return document.querySelector('#help').open")
    assert "router entropy (nats)" in browser.texts("#meanings dt")


def cell_in_focus(browser: Browser, run: int = 0) -> tuple[str, int, int]:
    """What a screen reader is told of the grid that has the focus: the cell's words, row and column."""
    script = (
        "const grid = document.querySelectorAll('.grid canvas')[arguments[0]];"
        "if (document.activeElement !== grid) return null;"
        "const cell = document.getElementById(grid.getAttribute('aria-activedescendant'));"
        "return [cell.textContent, +cell.getAttribute('aria-rowindex'), +cell.getAttribute('aria-colindex')]"
    )
    return tuple(browser.js(script, run))


def test_keys_reach_every_cell_of_the_grid_and_open_its_card(show: Any, known: dict[str, Any]) -> None:
    page = page_of(known)
    browser, [run] = show(page), runs_of(page)
    browser.choose("#layer", "2")
    browser.click("#t0-5")
    top = int(run.indices[2, 5, run.weights[2, 5].argmax()])
    while browser.js("return document.activeElement.tagName") != "CANVAS":  # past the token's experts
        browser.keys("Tab")
    words, row, column = cell_in_focus(browser)
    assert words.startswith(f"L2 E{top} · weight ")
    assert (row, column) == (2, top + 1)  # rows count from above, where layer 3 is
    assert browser.text("#cell") == words
    browser.keys("PageDown", "Home", "ArrowDown", "ArrowLeft")  # edges hold
    assert cell_in_focus(browser)[1:] == (4, 1)
    browser.keys("ArrowUp", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown", "ArrowLeft")
    assert cell_in_focus(browser)[1:] == (3, 2)
    browser.keys("End", "PageUp", "ArrowUp", "ArrowRight")
    assert cell_in_focus(browser)[1:] == (1, 8)
    browser.keys("PageDown", "Home")
    seen = []
    for step in ("ArrowRight", "ArrowLeft") * 2:  # like an ox that ploughs
        for _ in range(8):
            seen.append(cell_in_focus(browser)[0].split(" · ")[0])
            browser.keys(step)
        browser.keys("ArrowUp")
    assert sorted(seen) == sorted(f"L{layer} E{expert}" for layer in range(4) for expert in range(8))
    assert browser.js("return document.querySelector('.t.pinned').dataset.at") == "5"  # the token stays
    browser.keys("Enter")
    assert browser.text("#card h2") == "Layer 3, expert 0"
    cell_in_focus(browser)
    browser.keys("ArrowRight", " ")
    assert browser.text("#card h2") == "Layer 3, expert 1"
    selected = "return document.querySelector('.grid [role=gridcell]').getAttribute('aria-selected')"
    assert browser.js(selected) == "true"
    browser.keys("Tab")
    assert browser.js("return document.activeElement.getAttribute('aria-label')") == "Close the card"
    browser.keys("Enter")  # closes it, and the focus is where it was opened
    assert browser.js("return document.querySelector('#card').hidden")
    assert cell_in_focus(browser)[0].startswith("L3 E1")


def test_the_cell_that_keys_are_at_is_seen(show: Any, known: dict[str, Any]) -> None:
    """Its frame in the picture of the grid moves with it, and goes with the focus."""
    browser = show(page_of(known, plan=PLAN))
    frames = (  # columns of the first grid's picture in which the accent is found
        "const canvas = document.querySelector('.grid canvas'), copy = canvas.cloneNode();"
        "const pen = copy.getContext('2d', {willReadFrequently: true});"
        "pen.drawImage(canvas, 0, 0);"
        "const {data, width} = pen.getImageData(0, 0, copy.width, copy.height), found = new Set();"
        "for (let at = 0; at < data.length; at += 4)"
        " if (data[at] === 0 && data[at + 1] === 0x61 && data[at + 2] === 0x9a) found.add((at / 4) % width);"
        "return [Math.min(...found), Math.max(...found)]"
    )
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.frame()
    browser.js("document.querySelector('.grid canvas').focus()")
    places = []
    for _ in range(3):
        browser.keys("ArrowRight")
        places.append(browser.js(frames))
    assert places[0][1] < places[2][0]
    assert browser.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.keys("Tab")
    assert cell_in_focus(browser, 1)[0].startswith("L")
    assert browser.js(frames) == [None, None]  # infinite, as JSON has it
    browser.cdp("Emulation.setEmulatedMedia", features=[])


def test_buttons_keep_the_focus_when_what_they_stand_in_is_drawn_anew(
    show: Any, known: dict[str, Any]
) -> None:
    browser = show(explore(known["model"], known["prompt"]))
    focused = "return document.activeElement.textContent || document.activeElement.className"
    browser.click("#t0-5")
    browser.js("document.querySelector('.experts .chip').focus()")
    chip = browser.js(focused)
    browser.keys("Enter")
    assert browser.js(focused) == chip
    browser.js("document.querySelector('#legend button').focus()")
    key = browser.js(focused)
    browser.keys("Enter")
    assert browser.js(focused) == key
    browser.js("document.querySelector('#colour-by').focus()")
    browser.keys("Enter")  # the button goes away
    assert browser.js("return document.activeElement.classList.contains('tokens')")


def test_a_long_text_is_not_laid_out_anew_by_what_stands_beside_it(show: Any) -> None:
    """Its box does not depend on what is in it, so that nothing else on the page can ask for its size."""
    n = 700
    shape = MoEShape("m", (0, 1), 4, 1)
    texts = tuple(f" word{pos}" for pos in range(n))
    browser = show(explore(PromptRouting(shape, texts, torch.zeros(2, n, 1).long(), torch.ones(2, n, 1))))
    parts = "document.querySelectorAll('.tokens, .map figcaption')"
    contained = f"return Array.from({parts}, e => getComputedStyle(e).contain)"
    assert browser.js(contained) == ["strict", "strict"]
    room = (
        "const box = document.querySelector('.tokens'), map = document.querySelector('.map');"
        "return [box.clientHeight, box.scrollHeight, map.getBoundingClientRect().bottom, innerHeight]"
    )
    height, whole, bottom, window = browser.js(room)
    assert whole > height > 200  # it scrolls, and the map below it is in sight
    assert bottom <= window
    browser.click("#t0-3")
    browser.keys("End")
    seen = (
        "const box = document.querySelector('.tokens').getBoundingClientRect();"
        "const last = document.querySelector('#t0-699').getBoundingClientRect();"
        "return last.bottom <= box.bottom && last.top >= box.top"
    )
    assert browser.js(seen)


def test_hostile_text_is_shown_and_does_nothing(show: Any) -> None:
    texts = (
        "</script><script>document.title='x'</script>", " <b>b</b>", "\n", "\t", "\u202e", "\u0301", "",
        "\x00", "山(1/2)", "山(2/2)", "f(1/2)", "\ud83d", " نعم", "{{data}}",
        "👩🏽\u200d🚀", "a\u200db",
    )  # fmt: skip
    n = len(texts)
    browser = show(
        explore(
            PromptRouting(
                MoEShape("<i>m", (0,), 2, 1), texts, torch.zeros(1, n, 1).long(), torch.ones(1, n, 1)
            )
        )
    )
    assert browser.js("return document.title") == "Routing of <i>m"
    shown = [browser.text(f"#t0-{pos}") for pos in range(n)]
    expected = [
        *texts[:2], "↵\n", "⇥\t", "\\u202e", "◌\u0301", "∅", "\\u0000",
        "山", "", "f(1/2)", "\\ud83d", " نعم", "{{data}}",
        "👩🏽\u200d🚀", "a\\u200db",
    ]  # fmt: skip
    assert shown == expected
    parts = "return Array.from(document.querySelectorAll('.part'), e => [e.parentElement.id, e.dataset.part])"
    assert browser.js(parts) == [["t0-8", "1/2"], ["t0-9", "2/2"]]
    assert browser.js("return document.querySelectorAll('.tokens b, .tokens script').length") == 0
    for pos in (0, 1, 8, 12):
        browser.click(f"#t0-{pos}")
        assert browser.js("return document.querySelector('.t.pinned').dataset.at") == str(pos)


def test_a_record_without_weights_says_what_it_does_not_know(show: Any) -> None:
    shape = MoEShape("m", (0, 2), 300, 2)
    indices = torch.tensor([[[[299, 4], [4, 298]]], [[[1, 2], [3, 299]]]])
    browser = show(explore(RouteRecord(shape, indices)))
    options = browser.js("return Array.from(document.querySelectorAll('#colour option'), e => e.value)")
    assert options == ["expert", "picked"]
    browser.choose("#layer", "0")
    browser.click("#t0-0")
    assert browser.texts(".experts .chip") == ["E299", "E4"]
    browser.keys("Enter")
    assert browser.text("#card h2") == "Layer 0, expert 299"
    assert "does not hold its tokens" in browser.text("#notes")


def test_an_expert_that_was_chosen_twice_counts_once(show: Any) -> None:
    indices, weights = torch.tensor([[[1, 1], [1, 2]]]), torch.tensor([[[0.25, 0.5], [0.4, 0.6]]])
    browser = show(explore(PromptRouting(MoEShape("m", (5,), 4, 2), ("a", " b"), indices, weights)))
    browser.click("#t0-0")
    assert chips(browser) == {1: 0.75}
    browser.keys("Enter")
    assert "ran at 2 of 2 tokens (100.0 %), mean weight 0.575" in browser.text("#card [data-run]")


def test_the_view_in_a_notebook_works_in_its_frame(
    browser: Browser, known: dict[str, Any], tmp_path: Path
) -> None:
    page = explore(known["model"], known["prompt"])
    view = page._repr_html_()
    (tmp_path / "notebook.html").write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body>{view}", encoding="utf-8"
    )
    browser.open(tmp_path / "notebook.html")
    browser.into_frame("iframe")
    browser.js("document.querySelector('#t0-2').click()")
    assert browser.text(".token-name").split()[0] == page.runs[0].tokens[2]
    assert (
        browser.js("try { return parent.document.title } catch (error) { return error.name }")
        == "SecurityError"
    )


@pytest.mark.broad
@pytest.mark.parametrize(("scheme", "words"), [("light", "darker"), ("dark", "brighter")])
def test_both_schemes_keep_text_readable(show: Any, known: dict[str, Any], scheme: str, words: str) -> None:
    page = page_of(known, plan=PLAN)
    browser = show(page)
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.frame()
    for name in browser.js(
        "return Array.from(document.querySelectorAll('#colour option:not([disabled])'), e => e.value)"
    ):
        browser.choose("#colour", name)
        for row in range(4):
            browser.choose("#layer", str(row))
            assert browser.js(CONTRAST) >= 4.5, (scheme, name)
    browser.click("#t0-4")
    assert words in browser.text(".grid .caption")
    browser.cdp("Emulation.setEmulatedMedia", features=[])
