"""Figures show the numbers that they were given."""

from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection

from moe_lens import plots
from moe_lens.demo import DemoResult

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_heat_map_shows_every_score_on_a_scale_centred_on_zero(planted_demo: DemoResult) -> None:
    image = plots.expert_heat_map(planted_demo.scores).get_images()[0]
    assert np.array_equal(np.asarray(image.get_array()), planted_demo.scores.delta.numpy())
    low, high = image.get_clim()
    assert low == -high == -planted_demo.scores.delta.abs().max()


def test_heat_map_marks_exactly_the_experts_of_each_plan(planted_demo: DemoResult) -> None:
    ax = plots.expert_heat_map(planted_demo.scores, planted_demo.plans)
    layers = planted_demo.scores.shape.layers
    for line, (label, plan) in zip(ax.get_lines(), planted_demo.plans.items(), strict=True):
        marked = {(layers[int(y)], int(x)) for x, y in np.asarray(line.get_xydata())}
        assert marked == set(plan.deactivate)
        assert line.get_label() == label


def test_rates_show_both_directions_and_every_random_set(planted_demo: DemoResult) -> None:
    ax = plots.steering_rates([planted_demo])
    dots = [c for c in ax.collections if isinstance(c, PathCollection)]
    heights = {str(c.get_label()): np.asarray(c.get_offsets())[:, 1].tolist() for c in dots}
    assert heights["+ toward the document"] == [planted_demo.steered["+"].document_rate]
    assert heights["− toward memory"] == [planted_demo.steered["−"].document_rate]
    assert sorted(heights["20 random sets, any layers"]) == sorted(planted_demo.random_rates)
    for direction, outcomes in planted_demo.layer_matched.items():
        rates = [outcome.document_rate for outcome in outcomes]
        assert sorted(heights[f"20 random sets, layers as {direction}"]) == sorted(rates)


@pytest.mark.parametrize("draw", ["heat map", "rates"])
def test_figures_have_title_and_axis_labels_and_use_the_axes_they_are_given(
    draw: str, planted_demo: DemoResult
) -> None:
    _, given = plt.subplots()
    ax = (
        plots.expert_heat_map(planted_demo.scores, ax=given)
        if draw == "heat map"
        else plots.steering_rates([planted_demo], ax=given)
    )
    assert ax is given
    assert ax.get_title()
    assert ax.get_ylabel()


def test_save_writes_and_closes(planted_demo: DemoResult, tmp_path) -> None:
    plots.save(plots.steering_rates([planted_demo]), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert plt.get_fignums() == []
