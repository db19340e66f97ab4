"""Figures of patching, mediation and attribution: what they draw is what the results hold."""

import matplotlib

matplotlib.use("Agg")

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from moe_lens import expert_logit_attribution, mediation
from moe_lens.errors import DataError
from moe_lens.interventions.results import Mediation
from moe_lens.plots.interventions import attribution_bars, mediation_curves, patching_map
from tests.tiny_models import tokens

Hooked = Callable[..., Any]


@pytest.fixture(autouse=True)
def close_figures() -> Any:
    yield
    plt.close("all")


def test_a_patching_map_is_normalised_and_centred_on_zero() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0], [0.5, 1.0, 1.0]])
    ax = patching_map(values, corrupted=1.0, clean=3.0, layers=[1, 4], columns=["a", "b", "c"])
    [image] = ax.images
    np.testing.assert_allclose(np.asarray(image.get_array()), (values.numpy() - 1) / 2)
    low, high = image.get_clim()
    assert low == -high == -1.0
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "4"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    raw = patching_map(values, corrupted=1.0, columns="expert")
    np.testing.assert_allclose(np.asarray(raw.images[0].get_array()), values.numpy() - 1)
    assert raw.get_xlabel() == "expert"


def test_a_map_claims_no_layers_and_no_point_that_it_was_not_told() -> None:
    values = torch.rand(2, 3)
    ax = patching_map(values, corrupted=0.0)
    assert ax.get_ylabel() == "row (MoE layers in order)"
    assert ax.get_title() == "Patching from the clean run"
    ax = patching_map(values, corrupted=0.0, layers=[2, 3], what="expert outputs")
    assert ax.get_ylabel() == "layer"
    assert ax.get_title() == "Patching expert outputs from the clean run"


def test_a_map_of_some_layers_and_positions_has_their_numbers() -> None:
    ax = patching_map(torch.rand(2, 3), corrupted=0.0, layers=[3, 5], positions=[0, 7, 11])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3", "5"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "7", "11"]
    assert ax.get_xlabel() == "position"


def test_a_map_of_a_long_prompt_keeps_its_ticks_readable() -> None:
    ax = patching_map(torch.rand(2, 100), corrupted=0.0, columns=[str(n) for n in range(100)])
    assert len(ax.get_xticks()) <= 20
    assert [label.get_text() for label in ax.get_xticklabels()][:3] == ["0", "8", "16"]
    assert ax.get_xlabel() == "position of the token"


@pytest.mark.parametrize(
    "arguments",
    [{"layers": [1]}, {"columns": ["a", "b"]}, {"clean": 0.0}, {"positions": [1]}],
)
def test_maps_that_do_not_fit_are_refused(arguments: Any) -> None:
    with pytest.raises(DataError):
        patching_map(torch.rand(2, 3), corrupted=0.0, **arguments)


def test_a_share_that_may_be_anything_fills_the_axes() -> None:
    """Total effects of both signs: the interval is (−∞, ∞), which is no interval of no width."""
    total = torch.tensor([3.0, -1.0, 2.0, 1.0], dtype=torch.float64)
    zeros = torch.zeros_like(total)
    rows = torch.stack([total / 4, total / 2])
    found = Mediation((0, 2), total, zeros, total / 2, zeros, rows, rows, rows, rows, weights=False)
    assert np.isinf(found.share("route")[1:]).all()
    ax = mediation_curves(found)
    bottom, top = ax.get_ylim()
    for band in ax.collections:
        heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((bottom, top))
    assert "the share anything" in ax.get_title()
    sure = Mediation((0, 2), total.abs() + 9, zeros, total, zeros, rows, rows, rows, rows, weights=False)
    assert "anything" not in mediation_curves(sure).get_title()


def test_mediation_curves_show_shares_and_their_intervals(hooked: Hooked) -> None:
    found = mediation(hooked("qwen2_moe"), tokens(5, 4), tokens(5, 4, 3), lambda logits: logits[:, -1, 7])
    ax = mediation_curves(found)
    drawn = {str(line.get_label()): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(
        np.asarray(drawn["restored by the clean route, all layers up to it"], dtype=float),
        found.shares_by_layer(cumulative=True)["restored"][:, 0],
    )
    np.testing.assert_allclose(
        np.asarray(drawn["lost with the corrupted route, this layer alone"], dtype=float),
        found.shares_by_layer()["lost"][:, 0],
    )
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "2", "3"]
    assert len(ax.collections) == 4  # a band each


@pytest.mark.parametrize("prompt", [None, 1])
def test_attribution_bars_add_up_to_the_logit(hooked: Hooked, prompt: int | None) -> None:
    found = expert_logit_attribution(hooked("qwen2_moe"), tokens(3, 4), 9)
    ax = attribution_bars(found, prompt=prompt, n_experts=3)
    widths = [float(bar.get_width()) for bar in ax.patches]  # type: ignore[attr-defined]
    logit = found.logit.mean() if prompt is None else found.logit[prompt]
    assert sum(widths) == pytest.approx(float(logit), abs=1e-4)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[3:5] == ["other experts", "embedding"]
    layer, expert = (int(word) for word in labels[0].replace("layer ", "").split(", expert "))
    shares = found.by_expert()[found.layers.index(layer), :, expert]
    assert widths[0] == pytest.approx(float(shares.mean() if prompt is None else shares[prompt]), abs=1e-6)
    low, high = ax.get_xlim()
    assert low == -high


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_bars_leave_out_what_the_model_lacks(hooked: Hooked, family: str) -> None:
    """Kinds of parts that are all 0 have no bar, and no other kind is left out."""
    found = expert_logit_attribution(hooked(family), tokens(2, 3), 9)
    ax = attribution_bars(found, n_experts=2)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    dense = [part for name, part in zip(found.part_names, found.parts, strict=True) if name.endswith("mlp")]
    lacks = not any(bool((part != 0).any()) for part in dense)
    assert ("dense and shared experts" in labels) == (not lacks) == (family == "qwen2_moe")
    assert [*labels[3:5]] == ["embedding", "attention"]


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen3_next", ["attention", "mixers", "dense and shared experts"]),
        ("granitemoehybrid", ["attention", "mixers", "dense and shared experts"]),
        ("nemotron_h", ["mixers"]),
    ],
)
def test_parts_of_hybrid_models_are_called_what_they_are(
    hooked: Hooked, family: str, kinds: list[str]
) -> None:
    ax = attribution_bars(expert_logit_attribution(hooked(family), tokens(2, 3), 9), n_experts=1)
    assert [label.get_text() for label in ax.get_yticklabels()][2:] == ["embedding", *kinds]


def test_the_numbers_of_bars_have_a_true_minus_and_one_prompt_is_no_mean(hooked: Hooked) -> None:
    found = expert_logit_attribution(hooked("olmoe"), tokens(1, 4), 9)
    ax = attribution_bars(found)
    assert ax.get_title().endswith("(one prompt)")
    written = [text.get_text() for text in ax.texts]
    values = [bar.get_width() for bar in ax.patches]  # type: ignore[attr-defined]
    assert any(value < 0 for value in values)
    for text, value in zip(written, values, strict=True):
        assert text[0] == ("+" if value >= 0 else "−")
        assert float(text[1:]) == pytest.approx(abs(value), abs=0.005001)


def test_only_experts_that_ran_have_a_bar(hooked: Hooked) -> None:
    """Of one prompt top_k a layer, however many are asked for."""
    model = hooked("olmoe")
    found = expert_logit_attribution(model, tokens(3, 4), 9)
    labels = [label.get_text() for label in attribution_bars(found, prompt=1, n_experts=99).get_yticklabels()]
    experts = [label for label in labels if label.startswith("layer ")]
    ran = found.indices[:, 1]
    assert set(experts) == {
        f"layer {layer}, expert {expert}"
        for layer, of_layer in zip(found.layers, ran.tolist(), strict=True)
        for expert in of_layer
    }


def test_a_difference_of_logits_is_called_that(hooked: Hooked) -> None:
    ax = attribution_bars(expert_logit_attribution(hooked("olmoe"), tokens(2, 3), 9, wrong_tokens=10))
    assert ax.get_xlabel() == "part of the logit difference (nats)"
    assert ax.get_title().startswith("Who wrote the logit difference ")
    ax = attribution_bars(expert_logit_attribution(hooked("olmoe"), tokens(2, 3), 9))
    assert ax.get_xlabel() == "part of the logit (nats)"


def test_bars_of_what_is_not_there_are_refused(hooked: Hooked) -> None:
    found = expert_logit_attribution(hooked("olmoe"), tokens(2, 3), 9)
    with pytest.raises(DataError, match="2 prompts"):
        attribution_bars(found, prompt=2)
    with pytest.raises(DataError, match="n_experts"):
        attribution_bars(found, n_experts=0)
