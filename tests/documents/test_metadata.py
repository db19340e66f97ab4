"""What is said of the package in several files is the same in all of them."""

import re
import tomllib
from importlib import import_module
from typing import Any

import yaml

import moe_lens
from tests.notebooks import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_version_is_said_once_and_cited_as_it_is() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "moe_lens/__init__.py"
    assert read_yaml("CITATION.cff")["version"] == moe_lens.__version__
    versions = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE
    )
    assert versions[0] == moe_lens.__version__
    assert versions == sorted(versions, key=lambda version: [*map(int, version.split("."))], reverse=True)
    assert len(versions) == CHANGELOG.count("\n## ")


def test_the_changelog_leads_from_every_old_module_to_a_room() -> None:
    rows = re.findall(r"^  \| `(moe_lens\.\w+)` \| (.+) \|$", CHANGELOG, re.MULTILINE)
    modules = [name for _, cell in rows for name in re.findall(r"`(\w+)`", cell) if name != "replay_hooks"]
    # 71 modules, of which four are in the ground, and the folder organisms
    assert len(modules) == len(set(modules)) == 71 - 4 + 1
    assert len(rows) == 12
    for room, _ in rows:
        assert import_module(room).__all__
    assert hasattr(import_module("moe_lens.interventions"), "replay_hooks")


def test_pre_commit_runs_the_tested_ruff() -> None:
    ruff, local = read_yaml(".pre-commit-config.yaml")["repos"]
    assert ruff["rev"] == f"v{CONSTRAINTS['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert [hook["id"] for hook in local["hooks"]] == ["pyright"]


def test_the_source_distribution_holds_what_is_there() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name.lstrip("/")).exists() for name in included)
    assert {"/CHANGELOG.md", "/CITATION.cff", "/moe_lens", "/tests"} <= set(included)


def test_it_says_that_it_is_typed_and_where_the_method_is_from() -> None:
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert (ROOT / "moe_lens" / "py.typed").exists()
    urls = [reference["url"] for reference in read_yaml("CITATION.cff")["references"]]
    assert PROJECT["project"]["urls"]["Paper on SteerMoE, the method"] in urls
