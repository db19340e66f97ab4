"""MoEShape: what it refuses, and how it tells two models apart."""

import pytest

from moe_lens.errors import DataError, MoELensError
from moe_lens.shape import MoEShape


def test_k_experts_cannot_be_deactivated() -> None:
    assert MoEShape("m", (0, 1), n_experts=64, top_k=8).max_deactivated == 56
    assert MoEShape("m", (0,), n_experts=4, top_k=4).max_deactivated == 0


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (-1, 0)])
def test_layers_are_ascending_and_at_least_one(layers: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="layers") as error:
        MoEShape("m", layers, n_experts=4, top_k=2)
    assert str(layers) in str(error.value)


@pytest.mark.parametrize("top_k", [0, -1, 5])
def test_top_k_lies_between_one_and_the_number_of_experts(top_k: int) -> None:
    with pytest.raises(MoELensError, match=rf"n_experts=4; got {top_k}"):
        MoEShape("m", (0,), n_experts=4, top_k=top_k)


def test_equal_shapes_do_not_differ() -> None:
    shape = MoEShape("m", (0, 2), n_experts=4, top_k=2)
    assert shape.differences(MoEShape("m", (0, 2), n_experts=4, top_k=2)) == []
    assert hash(shape) == hash(MoEShape("m", (0, 2), n_experts=4, top_k=2))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (MoEShape("n", (0, 2), 4, 2), ["model 'm' / 'n'"]),
        (MoEShape("m", (0, 1), 4, 2), ["layers (0, 2) / (0, 1)"]),
        (MoEShape("m", (0, 2), 8, 2), ["n_experts 4 / 8"]),
        (MoEShape("n", (0, 2), 4, 1), ["model 'm' / 'n'", "top_k 2 / 1"]),
    ],
)
def test_what_differs_is_said_in_words(other: MoEShape, words: list[str]) -> None:
    assert MoEShape("m", (0, 2), 4, 2).differences(other) == words


def test_the_grid_names_every_expert_once_layer_by_layer() -> None:
    grid = MoEShape("m", (0, 2, 7), n_experts=3, top_k=1).grid()
    pairs = list(zip(grid["layer"].tolist(), grid["expert"].tolist(), strict=True))
    assert pairs == [(layer, expert) for layer in (0, 2, 7) for expert in range(3)]
    assert list(grid) == ["layer", "expert"]
    assert {str(column.dtype) for column in grid.values()} == {"int64"}


def test_a_shape_in_words() -> None:
    assert MoEShape("m", tuple(range(48)), 128, 8).words == "m, 48 layers × 128 experts, top 8"
