"""The site: what its builder writes; every page has its place; built, every link of it leads somewhere."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import moe_lens
from tests.notebooks import ROOT, TUTORIALS

BUILDER = ROOT / "docs" / "builder"
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BUILDER))


def leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [leaf for entry in entries for leaf in leaves(entry)]


def test_every_page_has_one_place_in_the_navigation(builder: None) -> None:
    elsewhere = set(importlib.import_module("hooks").SOURCES)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} | elsewhere
    placed = leaves(CONFIG["nav"])
    assert sorted(placed) == sorted(pages)
    assert {f"tutorials/{path.name}" for path in TUTORIALS} <= set(placed)


def test_every_room_has_a_page_that_says_its_sentence() -> None:
    for stub in sorted((ROOT / "moe_lens").glob("*/__init__.pyi")):
        room = stub.parent.name
        if room != "cli":
            text = (ROOT / "docs" / "reference" / f"{room}.md").read_text(encoding="utf-8")
            said = (importlib.import_module(f"moe_lens.{room}").__doc__ or "").strip().split("\n\n")[0]
            assert (
                text == f"# moe_lens.{room}\n\n{' '.join(said.split())}\n\n<!-- generated: room {room} -->\n"
            )


@pytest.mark.parametrize("name", ["formulas", "examples"])
def test_what_the_builder_says_of_itself(name: str, builder: None) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert (found.failed, found.attempted > 0) == (0, True)


def test_examples_in_sections_and_after_text_are_fenced_where_they_stand(builder: None) -> None:
    fenced = importlib.import_module("examples").fenced
    text = "First.\n\n>>> f(\n...     1\n... )\n2\n\nArgs:\n    x: a number.\n\n        >>> g(x)\n        3\n"
    assert fenced(text) == (
        "First.\n\n```pycon\n>>> f(\n...     1\n... )\n2\n```\n\nArgs:\n    x: a number.\n\n"
        "        ```pycon\n        >>> g(x)\n        3\n        ```\n"
    )
    assert fenced("no example, a >> b >>> c") == "no example, a >> b >>> c"


def test_generated_parts_name_every_command_and_every_public_name(builder: None) -> None:
    written = importlib.import_module("generated").with_generated
    commands = written("<!-- generated: command line -->")
    assert commands.count("```text") == commands.count("## moe-lens") + 1 >= 11
    assert "--permutations" in commands
    assert "usage: moe-lens detect" in commands
    names = written("before\n<!-- generated: names -->\nafter")
    for name in moe_lens.__all__:
        assert f"[`{name}`](" in names or name in ("contrasts", "hook_names", "errors", "organisms")
    for room in ("statistics", "text"):
        for name in importlib.import_module(f"moe_lens.{room}").__all__:
            assert f"::: moe_lens.{room}.{name}" in written(f"<!-- generated: room {room} -->")
    with pytest.raises(KeyError):
        written("<!-- generated: nonsense -->")


@pytest.mark.broad
def test_the_built_site_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert len(pages) > 50
    ids = {path: set(re.findall(r"\bid=\"([^\"]+)\"", text)) for path, text in pages.items()}
    for path, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*?\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*?\bhref=\"([^\"]+)\"", text)
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], path
        assert "&gt;&gt;&gt;" not in "".join(re.findall(r"<blockquote>.*?</blockquote>", text, re.DOTALL)), (
            path
        )
        assert "<!-- generated" not in text
        if path.name == "404.html":
            continue  # its links are absolute
        for href in re.findall(r"<a [^>]*?\bhref=\"([^\"]+)\"", text):
            parts = urlsplit(unescape(href))
            if parts.scheme:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{path}: {href}"
            if parts.fragment and there in ids:
                assert unquote(parts.fragment) in ids[there], f"{path}: {href}"
    for stub in (ROOT / "moe_lens").glob("*/__init__.pyi"):
        room = stub.parent.name
        if room != "cli":
            shown = ids[(tmp_path / "reference" / room / "index.html").resolve()]
            names = importlib.import_module(f"moe_lens.{room}").__all__
            assert {f"moe_lens.{room}.{name}" for name in names} <= shown
