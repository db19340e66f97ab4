"""Running the tutorials afresh, and what then differs from the outputs that are committed.

python -m tests.notebooks [PATH ...]     # run tutorials again and write their outputs (`make tutorials`)
"""

import base64
import io
import os
import re
import sys
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import numpy as np
from nbclient import NotebookClient

from moe_lens.errors import MoELensError
from moe_lens.organisms.built import BUILT, built_path

ROOT = Path(__file__).parent.parent
TUTORIALS = tuple(sorted((ROOT / "tutorials").glob("*.ipynb")))
DECIMAL = re.compile(r"([-+]?\d+\.\d+(?:e[-+]?\d+)?)")


def not_built(notebook: Any) -> str | None:
    """Why the notebook cannot run here: it loads a model that has not been built. None if it can."""
    code = "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for name in BUILT:
        if f'organisms.load("{name}"' in code:
            try:
                built_path(name)
            except MoELensError as error:
                return str(error)
    return None


def executed(notebook: Any, folder: Path = ROOT / "tutorials") -> Any:
    """A copy of the notebook's cells, run from clean in a kernel of its own.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    cells = [
        nbformat.v4.new_code_cell(cell.source, id=cell.id)
        if cell.cell_type == "code"
        else nbformat.v4.new_markdown_cell(cell.source, id=cell.id)
        for cell in notebook.cells
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    fresh = nbformat.v4.new_notebook(cells=cells, metadata=dict(metadata))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(fresh, timeout=600, resources=resources, record_timing=False).execute()
    fresh.metadata = nbformat.from_dict(metadata)  # the kernel adds the version of Python that ran
    return fresh


def shown(cell: Any) -> list[tuple[str, str]]:
    """What a reader sees under a cell: (kind, text or base64 image), consecutive prints as one."""
    found: list[tuple[str, str]] = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            if found and found[-1][0] == output.name:
                found[-1] = (output.name, found[-1][1] + output.text)
            else:
                found.append((output.name, output.text))
        elif output.output_type == "error":
            found.append(("error", f"{output.ename}: {output.evalue}"))
        else:
            found += [
                (kind, output.data[kind]) for kind in ("text/plain", "image/png") if kind in output.data
            ]
    return found


def differences(committed: Any, fresh: Any) -> list[str]:
    """What a fresh run shows otherwise; decimal numbers and figures may differ by rounding."""
    found = []
    for number, (old, new) in enumerate(zip_longest(committed.cells, fresh.cells)):
        if old is None or new is None or old.cell_type != new.cell_type or old.source != new.source:
            found.append(f"cell {number} is another cell")
            continue
        first_line = old.source.split("\n")[0]
        for before, after in zip_longest(shown(old), shown(new), fillvalue=("nothing", "")):
            if before[0] != after[0]:
                found.append(f"cell {number} ({first_line}): {before[0]} is committed, {after[0]} came")
            elif before[0] == "image/png":
                if (change := _change(before[1], after[1])) > 0.005:
                    found.append(f"cell {number} ({first_line}): the figure changed by {change:.3f}")
            elif not same_text(before[1], after[1]):
                found.append(f"cell {number} ({first_line}): committed\n{before[1]}\nbut now\n{after[1]}")
    return found


def same_text(committed: str, fresh: str) -> bool:
    """Equal up to spaces, and up to 2 % or two units of the last printed digit in decimal numbers."""
    # a table's columns and rules widen with a minus sign
    plain = (re.sub("-{3,}", "---", re.sub(r"\s+", " ", text)) for text in (committed, fresh))
    first, second = map(DECIMAL.split, plain)
    if len(first) != len(second):
        return False
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if index % 2 == 0:  # the text between two numbers
            if a.strip() != b.strip():
                return False
        else:
            unit = max(_last_digit(a), _last_digit(b))
            if abs(float(a) - float(b)) > max(2.001 * unit, 0.02 * max(abs(float(a)), abs(float(b)))):
                return False
    return True


def _last_digit(number: str) -> float:
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def _change(committed: str, fresh: str) -> float:
    """Mean absolute difference of two figures, in [0, 1]; 1 for those of clearly different sizes."""
    old, new = (
        matplotlib.image.imread(io.BytesIO(base64.b64decode(png)), format="png")[..., :3]
        for png in (committed, fresh)
    )
    height, width = np.minimum(old.shape[:2], new.shape[:2])
    if max(np.abs(np.subtract(old.shape[:2], new.shape[:2])) / (height, width)) > 0.03:
        return 1.0
    return float(np.abs(old[:height, :width] - new[:height, :width]).mean())


def main(paths: Iterable[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for path in [Path(path) for path in paths] or TUTORIALS:
        notebook = nbformat.read(path, as_version=4)
        if reason := not_built(notebook):
            print(f"{path.name}: left as it is. {reason}")
            continue
        fresh = executed(notebook)
        for difference in differences(notebook, fresh):
            print(f"{path.name}: {difference}")
        nbformat.write(fresh, path)
        print(f"{path.name}: written")


if __name__ == "__main__":
    main(sys.argv[1:])
