"""Which models and dtypes a test runs on: decorators that give it `recipe`, `dtype`, or both.

    @one_of_each_kind                         # test_x[olmoe], test_x[mixtral], ...
    @every_dtype
    def test_x(hooked, recipe, dtype): ...

What goes beyond the first tier carries the mark `broad`: `make test` leaves it out, `make test-all` runs it.
So a promise is tested on every family in every dtype, and a newcomer does not wait for all of that.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.tiny_models import ALL_RECIPES, EVERY_FAMILY, FAMILIES, ONE_OF_EACH_KIND, SOME_KINDS

broad = pytest.mark.broad
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def first_of(first: Iterable[Any], beyond: Iterable[Any] = ()) -> list[Any]:
    """Parameters: those of the first tier, then those of `beyond` that are not among them, marked broad.

    A tuple is one value each for several arguments.
    """
    first = list(first)
    rest = [value if isinstance(value, tuple) else (value,) for value in beyond if value not in first]
    return first + [pytest.param(*values, marks=broad) for values in rest]


def recipes(first: Iterable[str], beyond: Iterable[str] = ()) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", first_of(first, beyond))


core_family = recipes(FAMILIES)
every_recipe = recipes(ALL_RECIPES)
every_family = recipes(EVERY_FAMILY)
one_of_each_kind = recipes(ONE_OF_EACH_KIND, EVERY_FAMILY)
some_kinds = recipes(SOME_KINDS, EVERY_FAMILY)

every_dtype = pytest.mark.parametrize(
    "dtype", first_of([torch.float32, torch.bfloat16], [torch.float16]), ids=str
)
every_dtype_first_float32 = pytest.mark.parametrize(
    "dtype", first_of([torch.float32], [torch.bfloat16, torch.float16]), ids=str
)
half_precision = pytest.mark.parametrize("dtype", first_of([torch.bfloat16], [torch.float16]), ids=str)


def in_every_dtype(**first: Iterable[str]) -> pytest.MarkDecorator:
    """Every family in every dtype. `first`: for a dtype, the recipes of the first tier; the rest is broad."""
    return pytest.mark.parametrize(
        ("recipe", "dtype"),
        [
            pytest.param(
                name, dtype, id=f"{name}-{label}", marks=() if name in first.get(label, ()) else broad
            )
            for label, dtype in DTYPES.items()
            for name in EVERY_FAMILY
        ],
    )


every_family_in_every_dtype = in_every_dtype(float32=ONE_OF_EACH_KIND, bfloat16=SOME_KINDS)
