"""Every example in a docstring runs and prints what it says; every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import moe_lens
from moe_lens.results import Result

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(moe_lens.__path__, "moe_lens.")
    if "weights" not in module.name
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write a file
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=dict(vars(module))):
        runner.run(test, clear_globs=False)
        for result in (value for value in test.globs.values() if isinstance(value, Result)):
            assert re.fullmatch(rf"{type(result).__name__}\(.+\)", repr(result))  # one line
            assert len(repr(result)) <= 160
            assert "<table" in result._repr_html_() or not hasattr(result, "to_dataframe")
    assert runner.summarize().failed == 0


@pytest.mark.parametrize(
    "name", [name for name in moe_lens.__all__ if not inspect.ismodule(getattr(moe_lens, name))]
)
def test_public_names_open_with_an_example(name: str) -> None:
    documentation = inspect.getdoc(getattr(moe_lens, name)) or ""
    if name.endswith("Error"):
        assert documentation
    else:
        first_example, arguments = documentation.find(">>>"), documentation.find("Args:")
        assert first_example > 0
        assert arguments == -1 or first_example < arguments
