"""What mkdocs calls while it builds the site (mkdocs.yml names this file).

Some pages stand elsewhere in the repository: notebooks, CONTRIBUTING.md, the changelog, model cards. Links
are written as they work in the repository; here they are turned to where the pages stand in the site, and
one that leads to no page is a warning, which `--strict` makes an error. `<!-- generated: ... -->` is replaced
by what generated.py writes.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from formulas import with_formulas
from generated import with_generated
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks.links")
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "tutorials/README.md": "tutorials/index.md",
}
"""Path in the repository -> page of the site; the README's own page is another text, docs/index.md."""
ELSEWHERE |= {f"tutorials/{path.name}": f"tutorials/{path.name}" for path in ROOT.glob("tutorials/*.ipynb")}
CARDS = "moe_lens/organisms/weights"
ELSEWHERE |= {
    f"{CARDS}/{path.parent.name}/README.md": f"organisms/{path.parent.name}.md"
    for path in ROOT.glob(f"{CARDS}/*/README.md")
}
SOURCES = {page: source for source, page in ELSEWHERE.items() if source != "README.md"}

_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_HREF = re.compile(r"(<a [^>]*?href=\")([^\"]+)(\")")


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere."""
    for page, source in SOURCES.items():
        if page == source:  # a notebook: mkdocs-jupyter reads it by its place in a folder
            files.append(File(page, str(ROOT), config.site_dir, config.use_directory_urls))
        else:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Write what is generated, and turn links."""
    here = page.file.src_uri

    def turned(target: str) -> str:
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    parts = _CODE.split(with_generated(markdown))
    parts[::2] = [_turned(part, _LINK, here, files, turned) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of notebooks, which mkdocs does not read, and set their formulas."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def turned(target: str) -> str:
        file = files.get_file_from_path(target)
        return file.url_relative_to(page.file) if file else target

    return _turned(with_formulas(html), _HREF, page.file.src_uri, files, turned)


def _turned(text: str, link: re.Pattern[str], here: str, files: Files, turned: Any) -> str:
    source = SOURCES.get(here, f"docs/{here}")

    def replaced(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = ELSEWHERE.get(repository, repository.removeprefix("docs/"))
        if files.get_file_from_path(page) is None:
            LOG.warning("%s links to %s, which is no page", source, target)
        return f"{before}{turned(page)}{mark}{anchor}{after}"

    return link.sub(replaced, text)
