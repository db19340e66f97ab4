"""Figures show the numbers that they were given."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.cbook import is_math_text
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from moe_lens import organisms, plots
from moe_lens.detection.expert_scores import Evidence, ExpertScores, risk_difference
from moe_lens.errors import DataError, MoELensError
from moe_lens.evaluation.outcomes import ANY_LAYER, DIRECTIONS, LAYER_MATCHED, Limit, Outcome
from moe_lens.evaluation.plan_sizes import SweepPoint, SweepResult
from moe_lens.evaluation.report import SteeringReport
from moe_lens.evaluation.verdict import SIGNS
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.shape import MoEShape
from moe_lens.statistics.collection import collect_routing, route_prompt
from moe_lens.statistics.routes import PromptRouting
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import tokens

mpl.use("Agg")

PLANS = {
    "toward": SteeringPlan(deactivate=[(0, 1), (3, 5)], activate=[(2, 0)]),
    "away": SteeringPlan(deactivate=[(1, 7), (3, 4)]),
}


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def scores() -> ExpertScores:
    """Of an organism, with q-values made up here: layers 0 and 2 below 0.05."""
    conflicts = organisms.world("null").conflicts("detection")[::6]
    model = organisms.load("null")
    found = risk_difference(
        *(
            collect_routing(model, prompts, progress=False)
            for prompts in ([c.open_book for c in conflicts], [c.closed_book for c in conflicts])
        )
    )
    q = torch.full_like(found.delta, 0.5)
    q[0], q[2] = 0.01, 0.001
    q[found.delta == 0] = 1.0
    evidence = Evidence(found.delta - 0.1, found.delta + 0.1, q / 2, q, 0.95, 10, 10, 0, ("a",), ("t",))
    return replace(found, evidence=evidence)


@pytest.fixture(scope="module")
def stats(hooked: Callable[..., HookedMoE]) -> RoutingStats:
    """Of a model whose MoE layers are 0, 2 and 3."""
    return collect_routing(hooked("qwen2_moe"), tokens(6, 9), progress=False)


@pytest.fixture(scope="module")
def routing(hooked: Callable[..., HookedMoE]) -> PromptRouting:
    return route_prompt(hooked("qwen2_moe"), "w1 w2 w1 w9 w4")


def outcome(*values: float) -> Outcome:
    return Outcome(np.array(values, dtype=float), {"loss": 2.0})


def report(shift: float = 0.0) -> SteeringReport:
    """Three random sets of each kind and direction, of rates that all differ."""
    controls = {
        kind: {
            side: [outcome(0.1 + 0.2 * first + 0.1 * second + 0.01 * i + shift, 0.3) for i in range(3)]
            for second, side in enumerate(DIRECTIONS)
        }
        for first, kind in enumerate((LAYER_MATCHED, ANY_LAYER))
    }
    return SteeringReport(
        "follows", "some/model", {"+": PLANS["toward"], "-": PLANS["away"]}, ("a", "b"),
        outcome(0.5 + shift, 0.6), {"+": outcome(0.9 + shift, 1.0), "-": outcome(0.0, 0.1 + shift)},
        controls, None, {"loss": Limit(0.1, True)}, 0.05, 0.95, 0,
    )  # fmt: skip


def sweep_result(
    mode: str = "deactivate", n_random: int = 3, directions: tuple[str, ...] = DIRECTIONS
) -> SweepResult:
    points = tuple(
        SweepPoint(
            size, side, 0.5 + sign * size / 20, 0.4 + sign * size / 20, 0.65 + sign * size / 20, {},
            [0.4 + sign / 50 + size / 100 + i / 10 for i in range(n_random)],
        )
        for size in (2, 4, 8)
        for side, sign in zip(DIRECTIONS, (1, -1), strict=True)
        if side in directions
    )  # fmt: skip
    return SweepResult("follows", "some/model", mode, 0.55, {}, {}, points)


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def laid_out(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def points_of(ax: Axes) -> dict[str, np.ndarray]:
    """Label -> [point 2] of every scatter."""
    dots = [c for c in ax.collections if isinstance(c, PathCollection)]
    return {str(c.get_label()): np.asarray(c.get_offsets()) for c in dots}


def shown_values(ax: Axes) -> np.ndarray:
    """The values of a map, NaN where it has none."""
    return np.ma.filled(np.ma.asarray(ax.get_images()[0].get_array(), dtype=float), np.nan)


# every figure


_FIGURES: dict[str, tuple[Callable[..., Axes], tuple[str, str]]] = {
    "heat map": (lambda get, ax: plots.expert_heat_map(get("scores"), PLANS, ax=ax), ("expert", "layer")),
    "volcano": (lambda get, ax: plots.volcano(get("scores"), ax=ax), ("risk difference", "log10 q")),
    "layers": (
        lambda get, ax: plots.selected_by_layer(PLANS["toward"].made_for(get("scores").shape), ax=ax),
        ("layer", "8 experts (%)"),
    ),
    "coactivation": (lambda get, ax: plots.coactivation_matrix(get("stats"), 2, ax=ax), ("expert", "expert")),
    "balance": (lambda get, ax: plots.load_balance(get("stats").load_balance(), ax=ax), ("layer", "0 to 1")),
    "tokens": (lambda get, ax: plots.token_routing(get("routing"), ax=ax), ("token", "layer")),
    "sweep": (lambda get, ax: plots.sweep_curves(sweep_result(), ax=ax), ("experts deactivated", "follows")),
    "rates": (lambda get, ax: plots.steering_rates({"a": report()}, ax=ax), ("", "follows")),
}


@pytest.mark.parametrize("kind", _FIGURES)
def test_figures_have_title_and_labels_and_use_the_axes_they_are_given(
    kind: str, request: pytest.FixtureRequest
) -> None:
    draw, (x, y) = _FIGURES[kind]
    _, given = plt.subplots()
    ax = draw(request.getfixturevalue, given)
    assert ax is given
    assert len(plt.get_fignums()) == 1
    assert ax.get_title()
    assert x in ax.get_xlabel()
    assert y in ax.get_ylabel().replace("−", "").replace("₁₀", "10")
    ax.figure.canvas.draw()


@pytest.mark.parametrize("kind", _FIGURES)
def test_figures_make_a_new_figure_and_can_be_saved(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ax = _FIGURES[kind][0](request.getfixturevalue, None)
    assert len(plt.get_fignums()) == 1
    plots.save(ax, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert plt.get_fignums() == []


# scores


def test_heat_map_shows_every_score_on_a_scale_centred_on_zero(scores: ExpertScores) -> None:
    image = plots.expert_heat_map(scores).get_images()[0]
    assert np.array_equal(np.asarray(image.get_array()), scores.delta.numpy())
    low, high = image.get_clim()
    assert low == -high == -scores.delta.abs().max()


def test_heat_map_marks_exactly_the_experts_of_each_plan(scores: ExpertScores) -> None:
    ax = plots.expert_heat_map(scores, PLANS)
    layers = scores.shape.layers
    expected = {
        "toward: activated": PLANS["toward"].activate,
        "toward: deactivated": PLANS["toward"].deactivate,
        "away: deactivated": PLANS["away"].deactivate,
    }
    for line, (label, experts) in zip(ax.get_lines(), expected.items(), strict=True):
        marked = {(layers[int(y)], int(x)) for x, y in np.asarray(line.get_xydata())}
        assert marked == set(experts)
        assert line.get_label() == label
    assert legend(ax) == list(expected)
    assert len({str(line.get_marker()) for line in ax.get_lines()}) == len(expected)


def test_heat_map_marks_an_expert_that_a_plan_names_twice_as_deactivated(scores: ExpertScores) -> None:
    ax = plots.expert_heat_map(scores, {"a": SteeringPlan(activate=[(0, 1)], deactivate=[(0, 1)])})
    assert legend(ax) == ["a: deactivated"]
    assert plots.expert_heat_map(scores, {"none": SteeringPlan()}).get_legend() is None


def test_markers_of_two_plans_on_one_expert_show_both(scores: ExpertScores) -> None:
    """The later one is larger, hollow, and lies below."""
    plan = SteeringPlan(deactivate=[(0, 1)])
    small, large = plots.expert_heat_map(scores, {"one": plan, "two": plan.reversed()}).get_lines()
    assert small.get_markersize() < large.get_markersize()
    assert small.get_zorder() > large.get_zorder()
    assert large.get_markerfacecolor() == "none"


@pytest.mark.parametrize("expert", [(77, 0), (0, 300)])
def test_heat_map_refuses_a_plan_of_another_model(expert: tuple[int, int], scores: ExpertScores) -> None:
    with pytest.raises(MoELensError, match=str(max(expert))):
        plots.expert_heat_map(scores, {"other": SteeringPlan(deactivate=[expert])})


def test_volcano_has_every_expert_once_at_its_score_and_q(scores: ExpertScores) -> None:
    ax = plots.volcano(scores)
    groups = points_of(ax)
    found = np.concatenate(list(groups.values()))
    assert scores.q is not None
    expected = np.stack([scores.delta.numpy().ravel(), -np.log10(scores.q.numpy().ravel())], axis=1)
    order = [np.lexsort(points.T) for points in (found, expected)]
    assert np.allclose(found[order[0]], expected[order[1]])
    for label, points in groups.items():
        assert label.endswith(f": {len(points)} experts")
    colours = {
        str(c.get_label()).split(":")[0]: to_hex(np.asarray(c.get_facecolor())[0].tolist())
        for c in ax.collections
    }
    assert len(set(colours.values())) == 3
    for label, points in groups.items():
        if "q > 0.05" in label:
            assert (points[:, 1] < -np.log10(0.05)).all()
        else:
            assert (points[:, 1] >= -np.log10(0.05)).all()
            assert (points[:, 0] > 0).all() or "condition 2" in label
            assert (points[:, 0] < 0).all() or "condition 1" in label
    assert legend(ax) == list(groups)


@pytest.mark.parametrize(("q", "row_numbers"), [(0.05, (0, 2)), (0.005, (2,)), (0.0001, ())])
def test_volcano_names_the_largest_of_those_below_q(
    q: float, row_numbers: tuple[int, ...], scores: ExpertScores
) -> None:
    ax = plots.volcano(scores, q=q, n_labels=5)
    layers = scores.shape.layers
    assert scores.q is not None
    below = [(layers[r], e) for r in row_numbers for e in range(8) if scores.q[r, e] < 1]
    size = {place: abs(float(scores.delta[layers.index(place[0]), place[1]])) for place in below}
    named = [text.get_text() for text in ax.texts]
    expected = [f"L{layer} E{expert}" for layer, expert in sorted(below, key=lambda place: -size[place])[:5]]
    assert named == expected
    assert any(np.allclose(line.get_ydata(), -np.log10(q)) for line in ax.get_lines())


def test_names_in_a_volcano_do_not_stand_over_each_other(scores: ExpertScores) -> None:
    """Experts of equal q and nearly equal scores: most have no room for a name that is clearly theirs."""
    assert scores.evidence is not None
    q = torch.full_like(scores.evidence.q, 1e-4)
    near = scores.delta.sign() * (0.3 + 0.01 * scores.delta)
    ax = plots.volcano(replace(scores, delta=near, evidence=replace(scores.evidence, q=q)), n_labels=8)
    laid_out(ax)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) >= 3
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])


def many_scores() -> ExpertScores:
    """Of 22 layers × 64 experts, made up, many with the smallest q."""
    shape = MoEShape("big", tuple(range(2, 24)), 64, 6)
    counts = torch.full((22, 64), 12)
    stats = RoutingStats(shape, 128, counts, counts.double() / 8, counts.double())
    delta = 0.15 * torch.randn(22, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = (3 * torch.exp(-2 * (delta / 0.15) ** 2).clamp(min=0.002)).clamp(max=1)
    evidence = Evidence(delta - 0.1, delta + 0.1, q / 3, q, 0.95, 10, 10, 0, ("a",), ("t",))
    return ExpertScores(delta, stats, stats, evidence=evidence)


@pytest.mark.parametrize("n_labels", [8, 60])
def test_names_among_many_points_lie_on_none_and_a_line_leads_to_those_far_off(n_labels: int) -> None:
    found = many_scores()
    ax = plots.volcano(found, n_labels=n_labels)
    figure = laid_out(ax)
    assert found.q is not None
    values = np.stack([found.delta.numpy().ravel(), -np.log10(found.q.numpy().ravel())], axis=1)
    dots, radius = ax.transData.transform(values), 2.5 * figure.dpi / 72
    assert 3 <= len(ax.texts) < max(n_labels, 9)
    for text in ax.texts:
        assert isinstance(text, Annotation)
        box = Text.get_window_extent(text)  # without its line
        nearest = np.clip(dots, (box.x0, box.y0), (box.x1, box.y1))
        apart = np.linalg.norm(dots - nearest, axis=1)
        assert apart.min() > radius
        own = ax.transData.transform(text.xy)
        from_own = np.linalg.norm(own - np.clip(own, (box.x0, box.y0), (box.x1, box.y1)))
        assert (text.arrow_patch is not None) == (from_own > 10 * figure.dpi / 72)
        frame = ax.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1


def test_volcano_of_q_zero_is_finite_and_within_the_axes(scores: ExpertScores) -> None:
    assert scores.evidence is not None
    q = torch.zeros_like(scores.evidence.q)
    ax = plots.volcano(replace(scores, evidence=replace(scores.evidence, q=q)))
    assert np.isfinite(np.concatenate(list(points_of(ax).values()))).all()


def test_volcano_needs_q_values(scores: ExpertScores) -> None:
    with pytest.raises(DataError, match="q-values"):
        plots.volcano(replace(scores, evidence=None))


# plans


def test_selected_by_layer_shows_shares_of_both_kinds() -> None:
    shape = MoEShape("some/model", (1, 3, 4), 8, 2)
    plan = SteeringPlan(
        activate=[(1, 0), (4, 2), (4, 3)], deactivate=[(1, 5), (3, 1), (3, 2), (3, 7), (4, 3)], shape=shape
    )
    ax = plots.selected_by_layer(plan)
    bars = [c for c in ax.containers if isinstance(c, BarContainer)]
    heights = [[bar.get_height() for bar in container] for container in bars]
    assert heights == [[12.5, 0, 12.5], [-12.5, -37.5, -12.5]]  # (4, 3) stands in both: deactivation wins
    assert legend(ax) == ["activated: 2 experts", "deactivated: 5 experts"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "3", "4"]
    assert "some/model" in ax.get_title()
    assert len({to_hex(container[0].get_facecolor()) for container in bars}) == 2


def test_selected_by_layer_needs_a_shape() -> None:
    with pytest.raises(DataError, match="shape"):
        plots.selected_by_layer(PLANS["away"])


# routing statistics


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_coactivation_shows_the_lift_of_every_pair(layer: int, stats: RoutingStats) -> None:
    ax = plots.coactivation_matrix(stats, layer)
    shown = shown_values(ax)
    row, n = stats.shape.layers.index(layer), stats.shape.n_experts
    assert stats.co_routing is not None
    pairs, own = stats.coactivation.counts[row].tolist(), stats.counts[row].tolist()
    for i in range(n):
        for j in range(n):
            if i == j or not pairs[i][j]:
                assert np.isnan(shown[i, j])
            else:
                lift = pairs[i][j] * stats.n_tokens / (own[i] * own[j])
                assert shown[i, j] == pytest.approx(np.log2(lift))
    low, high = ax.get_images()[0].get_clim()
    assert low == -high == -np.nanmax(np.abs(shown))
    assert f"layer {layer}" in ax.get_title()
    assert any("grey: never together" in other.get_ylabel() for other in laid_out(ax).axes)


@pytest.mark.parametrize("layer", [1, 99, -1])
def test_coactivation_refuses_a_layer_without_router(layer: int, stats: RoutingStats) -> None:
    with pytest.raises(DataError, match=f"Layer {layer} has no router"):
        plots.coactivation_matrix(stats, layer)


def test_coactivation_where_one_expert_runs_alone(hooked: Callable[..., HookedMoE]) -> None:
    """k = 1: no two experts ever run together."""
    stats = collect_routing(hooked("qwen3_moe_k1"), tokens(2, 5), progress=False)
    ax = plots.coactivation_matrix(stats, stats.shape.layers[0])
    assert not np.isfinite(shown_values(ax)).any()
    ax.figure.canvas.draw()


def test_load_balance_shows_three_measures_by_layer(stats: RoutingStats) -> None:
    balance = stats.load_balance()
    ax = plots.load_balance(balance)
    drawn = {str(line.get_label()).split(" (")[0]: line for line in ax.get_lines()}
    expected = {
        "normalised entropy": balance.normalised_entropy,
        "Gini coefficient": balance.gini,
        "share of the busiest 10 %": balance.top_10,
    }
    assert set(drawn) == set(expected)
    for name, values in expected.items():
        assert np.array_equal(np.asarray(drawn[name].get_ydata()), values.numpy())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "2", "3"]
    assert len({to_hex(line.get_color()) for line in drawn.values()}) == 3
    assert any("0.14: even" in text for text in legend(ax))  # one expert of seven


# one prompt


def test_token_routing_colours_the_expert_with_most_weight(routing: PromptRouting) -> None:
    ax = plots.token_routing(routing)
    shown = np.asarray(ax.get_images()[0].get_array())
    texts = {tuple(int(x) for x in t.get_position()): t.get_text() for t in ax.texts}
    for row in range(len(routing.shape.layers)):
        for pos in range(len(routing.tokens)):
            chosen = zip(routing.weights[row, pos].tolist(), routing.indices[row, pos].tolist(), strict=True)
            experts = [expert for _, expert in sorted(chosen, key=lambda pair: -pair[0])]
            assert shown[row, pos] == experts[0]
            assert texts[pos, row] == " ".join(map(str, experts))
    assert [label.get_text() for label in ax.get_xticklabels()] == list(routing.tokens)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2", "3"]


def test_token_routing_gives_every_expert_a_colour_of_its_own(routing: PromptRouting) -> None:
    image = plots.token_routing(routing).get_images()[0]
    rgba = [image.to_rgba(np.array([expert])).tobytes() for expert in range(routing.shape.n_experts)]
    assert len(set(rgba)) == routing.shape.n_experts


def test_token_routing_of_some_layers(routing: PromptRouting) -> None:
    ax = plots.token_routing(routing, layers=[3, 0])
    shown = np.asarray(ax.get_images()[0].get_array())
    assert np.array_equal(shown, torch.stack([routing.top_expert(3), routing.top_expert(0)]).numpy())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3", "0"]
    with pytest.raises(DataError, match="Layer 1 has no router"):
        plots.token_routing(routing, layers=[1])


@pytest.mark.parametrize("token", ["$x", "a$b$c", "\n", "<|end_of|>", "_^{"])
def test_token_routing_shows_odd_tokens_as_they_are(token: str, routing: PromptRouting) -> None:
    odd = replace(routing, tokens=(token, *routing.tokens[1:]))
    ax = plots.token_routing(odd)
    ax.figure.canvas.draw()
    label = ax.get_xticklabels()[0]
    assert label.get_text().replace("\\$", "$") == token.replace("\n", "↵")
    assert not (label.get_parse_math() and is_math_text(label.get_text()))  # "$" is no formula


@pytest.mark.parametrize("n_tokens", [90, 600])
def test_token_routing_wraps_long_prompts(n_tokens: int) -> None:
    """Every token has its column once, with its experts over its label."""
    generator, shape = torch.Generator().manual_seed(0), MoEShape("m", (0, 1, 2, 3), 16, 2)
    indices = torch.rand(4, n_tokens, 16, generator=generator).topk(2).indices
    weights = torch.tensor([0.7, 0.3]).expand(4, n_tokens, 2)
    tokens_ = tuple(f"t{number}" for number in range(n_tokens))
    ax = plots.token_routing(PromptRouting(shape, tokens_, indices, weights))
    assert laid_out(ax).get_size_inches()[0] < 22
    shown = np.asarray(ax.get_images()[0].get_array().filled(np.nan))  # type: ignore[union-attr]
    texts = [(t.get_text(), *t.get_position()) for t in ax.texts if t.get_text().startswith("t")]
    last = [(t.get_text(), place, 0) for place, t in enumerate(ax.get_xticklabels())]
    assert sorted(name for name, *_ in texts + last) == sorted(tokens_)
    for name, x, y in texts + last:
        start, number = round(y + 0.7) if (name, x, y) in texts else 0, int(name[1:])
        column = shown[start : start + 4, round(x)]
        np.testing.assert_array_equal(column, indices[:, number, 0])
    assert int(np.isfinite(shown).sum()) == 4 * n_tokens


def test_token_routing_of_no_layers_is_refused(routing: PromptRouting) -> None:
    with pytest.raises(DataError, match="layer"):
        plots.token_routing(routing, layers=[])


# steering


def test_rates_show_both_directions_and_every_random_set() -> None:
    reports = {"first": report(), "second": report(0.05)}
    ax = plots.steering_rates(reports)
    groups = points_of(ax)
    for label, side in (("+ the plan", "+"), ("− its reverse", "-")):
        expected = [[i, one.steered[side].rate] for i, one in enumerate(reports.values())]
        assert np.allclose(groups[label], expected)
    for kind in (LAYER_MATCHED, ANY_LAYER):
        for side in DIRECTIONS:
            points = groups[f"3 random sets, {kind}, as {SIGNS[side]}"]
            expected_rates = [o.rate for one in reports.values() for o in one.controls[kind][side]]
            assert np.allclose(points[:, 1], expected_rates)
            assert points[:, 0].round().tolist() == [0, 0, 0, 1, 1, 1]
    captions = [label.get_text() for label in ax.get_xticklabels()]
    for (name, one), caption in zip(reports.items(), captions, strict=True):
        assert caption.startswith(f"{name}\n3 experts")
        assert f"gap {one.gap:.2f}" in caption


@pytest.mark.parametrize("n_reports", [1, 2, 3, 5])
def test_random_sets_stand_by_their_line_however_few_reports_there_are(n_reports: int) -> None:
    """In inches: no dot is further from its own line than half of what lies between two lines of three."""
    ax = plots.steering_rates({str(number): report() for number in range(n_reports)})
    figure = laid_out(ax)
    to_inches = ax.transData.transform(np.array([[0.0, 0.0], [0.36, 0.0], [1.0, 0.0]]))[:, 0] / figure.dpi
    line, furthest, neighbour = to_inches
    assert furthest - line < 0.75
    assert neighbour - line < 2.0
    low, high = ax.get_xlim()
    assert (low + high) / 2 == pytest.approx((n_reports - 1) / 2)
    found = ax.get_legend()
    assert found is not None
    for box in (found.get_window_extent(), ax.title.get_window_extent()):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_rates_that_are_no_shares_are_all_shown() -> None:
    """A measure of log-probabilities, say."""
    ax = plots.steering_rates({"a": report(-7.0)})
    low, high = ax.get_ylim()
    points = np.concatenate(list(points_of(ax).values()))
    assert low < points[:, 1].min() < points[:, 1].max() < high
    assert "mean over held-out" in ax.get_ylabel()
    assert "share of held-out" in plots.steering_rates({"a": report()}).get_ylabel()


@pytest.mark.parametrize(
    ("mode", "words"), [("deactivate", "deactivated"), ("activate", "activated"), ("both", "activated and")]
)
def test_sweep_curves_show_means_intervals_and_random_sets(mode: str, words: str) -> None:
    found = sweep_result(mode)
    ax = plots.sweep_curves(found)
    curves = [c for c in ax.containers if isinstance(c, ErrorbarContainer)]
    assert len(curves) == 2
    for curve, side in zip(curves, DIRECTIONS, strict=True):
        line, _, (bars,) = curve
        own = [point for point in found.points if point.direction == side]
        assert np.allclose(line.get_xydata(), [[point.size, point.mean] for point in own])
        ends = [segment[:, 1] for segment in bars.get_segments()]
        assert np.allclose(ends, [[point.low, point.high] for point in own])
        assert to_hex(line.get_color()) == plots.COLORS[side].lower()
        assert str(curve.get_label()).startswith(SIGNS[side])
    (band,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    outline = np.asarray(band.get_paths()[0].vertices)
    for size in (2, 4, 8):  # random sets of both directions together
        rates = [rate for point in found.points if point.size == size for rate in point.control_means]
        heights = outline[outline[:, 0] == size, 1]
        assert [heights.min(), heights.max()] == pytest.approx(np.quantile(rates, [0.05, 0.95]).tolist())
    level = [line for line in ax.get_lines() if line.get_label() == "unsteered"]
    assert np.allclose(level[0].get_ydata(), 0.55)
    assert ax.get_xticks().tolist() == [2, 4, 8]
    assert words in ax.get_xlabel()


def test_sweep_curves_of_one_direction_without_random_sets() -> None:
    ax = plots.sweep_curves(sweep_result(n_random=0, directions=("-",)))
    assert len([c for c in ax.containers if isinstance(c, ErrorbarContainer)]) == 1
    assert not [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert len(legend(ax)) == 2


def test_random_sets_that_all_agree_leave_a_line() -> None:
    found = sweep_result()
    points = tuple(replace(point, control_means=[0.25, 0.25]) for point in found.points)
    (band,) = [
        c
        for c in plots.sweep_curves(replace(found, points=points)).collections
        if isinstance(c, PolyCollection)
    ]
    assert np.ptp(np.asarray(band.get_paths()[0].vertices)[:, 1]) == 0
    assert np.asarray(band.get_linewidth()).min() >= 1
    assert to_hex(np.asarray(band.get_edgecolor())[0].tolist()) == plots.COLORS["random"]
    assert np.asarray(band.get_edgecolor())[0, 3] == 1


def test_sweep_curves_of_sizes_far_apart_keep_their_ticks_apart() -> None:
    found = sweep_result("deactivate", n_random=0, directions=("+",))
    points = tuple(replace(found.points[0], size=2**n) for n in range(10))
    ax = plots.sweep_curves(replace(found, points=points))
    assert ax.get_xscale() == "log"
    labels = [label for label in ax.get_xticklabels() if label.get_text()]
    assert [label.get_text() for label in labels] == [str(2**n) for n in range(10)]
    laid_out(ax)
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize("n_layers", [4, 30, 60])
def test_a_legend_stands_below_the_labels_of_the_axis_and_near_them(n_layers: int) -> None:
    delta = torch.linspace(-1, 1, n_layers * 8, dtype=torch.float64).reshape(n_layers, 8)
    shape = MoEShape("m", tuple(range(n_layers)), 8, 2)
    counts = torch.full((n_layers, 8), 2)
    stats = RoutingStats(shape, 8, counts, counts.double() / 8, counts.double())
    ax = plots.expert_heat_map(ExpertScores(delta, stats, stats), {"one": SteeringPlan(deactivate=[(0, 1)])})
    laid_out(ax)
    found = ax.get_legend()
    assert found is not None
    gap = ax.xaxis.label.get_window_extent().y0 - found.get_window_extent().y1
    assert 0 <= gap <= 0.8 * ax.figure.dpi  # inches


# files


@pytest.mark.parametrize("path", ["figure.xyz", "file/figure.png", "folder.png"])
def test_save_refuses_what_it_cannot_write(path: str, tmp_path: Path, stats: RoutingStats) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(MoELensError, match=path.split("/")[0]):
        plots.save(plots.load_balance(stats.load_balance()), tmp_path / path)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_save_makes_folders_and_writes_by_the_ending(
    ending: str, tmp_path: Path, stats: RoutingStats
) -> None:
    starts: dict[str, Any] = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    path = tmp_path / "new" / f"figure.{ending}"
    plots.save(plots.load_balance(stats.load_balance()), path)
    assert path.read_bytes().startswith(starts[ending])
