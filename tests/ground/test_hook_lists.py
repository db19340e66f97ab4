"""hooks=: None for none; whoever passes a plan is told what to pass, in every function that takes hooks."""

import os
import subprocess
import sys
from typing import Any

import pytest

from moe_lens import RoutedModel
from moe_lens.errors import HookError
from moe_lens.hook_names import hook_list
from tests.fetched import ROOT
from tests.tiny_models import prompt, tiny_model, tokenizer


@pytest.mark.broad
def test_none_is_no_hooks_and_a_plan_is_refused_with_the_remedy() -> None:
    """In a process of its own: here types are checked, and a plan would not come so far."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ground.unchecked_hooks"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_wrappers_take_none_too() -> None:
    model = RoutedModel(tiny_model(), tokenizer())
    assert model.run_with_hooks(prompt(3), fwd_hooks=None).equal(model(prompt(3)))
    with pytest.raises(HookError, match=r"steer_hooks\(plan\)"):
        model.run_with_hooks(prompt(3), fwd_hooks="blocks")


def test_what_is_no_list_of_pairs_is_refused() -> None:
    some: Any = [("a", print), (str.isupper, len), ["b", repr]]
    assert hook_list(iter(some)) == [tuple(pair) for pair in some]
    for wrong in (3, "ab", [1], [("a",)], [("a", None)], [(1, print)], object()):
        with pytest.raises(HookError, match="pairs"):
            hook_list(wrong)
