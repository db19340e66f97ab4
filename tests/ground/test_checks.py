"""whole_number takes integers of every library and nothing else; an error shows what was given, cut short."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.checks import chosen_layers, short, whole_number
from moe_lens.errors import DataError, PlanError


@pytest.mark.parametrize("kind", [int, np.int8, np.uint16, np.int64, torch.tensor, np.array])
def test_integers_of_every_library_come_out_as_int(kind: Any) -> None:
    number = whole_number(kind(7), "n")
    assert number == 7
    assert type(number) is int


@given(value=st.integers(-50, 50), least=st.integers(-5, 20), width=st.none() | st.integers(0, 20))
def test_the_bounds_are_inclusive(value: int, least: int, width: int | None) -> None:
    most = None if width is None else least + width
    if value >= max(least, 0) and (most is None or value <= most):
        assert whole_number(value, "n", least, most) == value
    else:
        with pytest.raises(DataError, match="n must be a whole number"):
            whole_number(value, "n", least, most)


@pytest.mark.parametrize(
    "wrong",
    [
        True, False, 1.0, 2.5, "3", None, [1], -1, float("nan"), np.float64(2), np.bool_(True),
        torch.tensor([1, 2]), torch.tensor(1.0), torch.tensor(True), torch.tensor([True]), object,
    ],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match="whole number from 0 on"):
        whole_number(wrong, "n")


def test_the_error_names_argument_bounds_value_and_remedy() -> None:
    with pytest.raises(DataError) as error:
        whole_number(0, "batch_size", least=1)
    assert str(error.value) == "batch_size must be a whole number from 1 on; got 0."
    with pytest.raises(PlanError) as error:
        whole_number(9, "n", least=1, most=8, error=PlanError, remedy="Eight experts are enough.")
    assert str(error.value) == "n must be a whole number from 1 to 8; got 9. Eight experts are enough."


def test_a_long_value_is_cut() -> None:
    with pytest.raises(DataError) as error:
        whole_number("x" * 1000, "n")
    assert len(str(error.value)) < 140
    assert short("x" * 1000).endswith("...")
    assert short([1, 2]) == "[1, 2]"


@pytest.mark.parametrize("n_layers", range(1, 14))
def test_thirds_by_name_are_all_layers_once_in_order(n_layers: int) -> None:
    among = list(range(1, 2 * n_layers, 2))
    parts: list[list[int]] = []
    for name in ("early", "middle", "late"):
        if n_layers < 3 and name != "middle":
            with pytest.raises(DataError, match=f"no third to be called '{name}'"):
                chosen_layers(name, among)
        else:
            parts.append(chosen_layers(name, among))
    assert [layer for part in parts for layer in part] == among
    if n_layers >= 3:
        assert len(parts[0]) == len(parts[2]) == n_layers // 3
    with pytest.raises(DataError, match="early, middle, late; got 'lat'"):
        chosen_layers("lat", among)
