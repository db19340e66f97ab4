"""The two tiers: what each command runs, and that the second contains the first."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import families
from tests.notebooks import ROOT
from tests.tiny_models import EVERY_FAMILY, ONE_OF_EACH_KIND, SOME_KINDS

CASES: list[int] = []


def command(target: str) -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.findall(rf"^{target}: .*\n\t(.*)$", makefile, re.MULTILINE)[0]


def test_make_test_leaves_out_what_is_broad_and_ci_runs_everything() -> None:
    assert command("test") == '$(PYTEST) -m "not broad"'
    assert command("test-all") == "$(PYTEST) --examples=10"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^make (\S+)$", script, re.MULTILINE) == ["chromium", "lint", "docs", "test-all"]


def test_promises_run_on_every_family_in_every_dtype() -> None:
    parameters = families.every_family_in_every_dtype.mark.args[1]
    in_first = {(name, torch.float32) for name in ONE_OF_EACH_KIND}
    in_first |= {(name, torch.bfloat16) for name in SOME_KINDS}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert {case.values for case in parameters} == {
        (name, dtype) for name in EVERY_FAMILY for dtype in dtypes
    }
    assert {case.values for case in parameters if not case.marks} == in_first


@pytest.mark.parametrize("kinds", [ONE_OF_EACH_KIND, SOME_KINDS])
def test_a_few_kinds_are_widened_to_every_family(kinds: tuple[str, ...]) -> None:
    decorator = families.one_of_each_kind if kinds == ONE_OF_EACH_KIND else families.some_kinds
    first = [case for case in decorator.mark.args[1] if isinstance(case, str)]
    rest = [case for case in decorator.mark.args[1] if not isinstance(case, str)]
    assert first == list(kinds)
    assert set(kinds) <= set(ONE_OF_EACH_KIND)
    assert sorted(first + [case.values[0] for case in rest]) == sorted(EVERY_FAMILY)
    assert all(case.marks == (families.broad,) for case in rest)


@given(st.integers())
def test_some_property(number: int) -> None:
    CASES.append(number)


def test_a_property_is_tried_on_as_many_examples_as_asked(request: pytest.FixtureRequest) -> None:
    """Runs after the one above, whatever order pytest chose: it is in the same file."""
    if CASES:
        assert len(CASES) == 100 * request.config.option.examples
