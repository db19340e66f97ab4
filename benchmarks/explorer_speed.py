"""What the explorer's page costs a browser, for one run and for two side by side:
`python -m benchmarks.explorer_speed [n_layers n_experts n_tokens]` (default: 48 128 2000)

Chromium without a screen is driven as a reader would: the page is opened, the pointer goes over tokens, map
and grid, keys are pressed. Given is the CPU time of the page's main thread in milliseconds
(`Performance.getMetrics` in thread ticks), so that what else the machine does counts little, and how much of
it scripts, style and layout take: medians of 20, and the largest. "nothing" is what the measuring itself
takes, which is in every line. A frame at 60 a second lasts 16.7 ms. Needs Chromium and its driver (Debian:
chromium-driver).
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_lens import explore
from moe_lens.plots import RoutingExplorer
from moe_lens.shape import MoEShape
from moe_lens.statistics.routes import PromptRouting
from tests.browser import Browser

TOP_K = 8
REPEATS = 20
WIDTH, HEIGHT = 1400, 900
PARTS = {
    "all": "TaskDuration",
    "script": "ScriptDuration",
    "style": "RecalcStyleDuration",
    "layout": "LayoutDuration",
}


def routing(shape: MoEShape, tokens: tuple[str, ...], seed: int) -> PromptRouting:
    """A random route with everything that a page can show of it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(shape.layers), len(tokens), shape.n_experts, generator=generator)
    weights, indices = logits.softmax(-1).topk(shape.top_k)
    entropy, margin = torch.rand(2, *indices.shape[:2], generator=generator)
    return PromptRouting(shape, tokens, indices, weights, entropy, margin)


def pages(n_layers: int, n_experts: int, n_tokens: int) -> dict[str, RoutingExplorer]:
    """One run, and two of which the second differs in every token."""
    shape = MoEShape("random", tuple(range(n_layers)), n_experts, TOP_K)
    draw = random.Random(0)
    tokens = tuple(" " + "".join(draw.choices("etaoinshr", k=draw.randint(1, 8))) for _ in range(n_tokens))
    first, second = (routing(shape, tokens, seed) for seed in (0, 1))
    return {"one run": explore(first), "two runs": explore(first, against=second)}


class Page:
    """A page in a browser, whose costs are read."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def spent(self) -> dict[str, float]:
        """Milliseconds of CPU since the page was opened."""
        found = {m["name"]: m["value"] for m in self.browser.cdp("Performance.getMetrics")["metrics"]}
        return {part: 1000 * found[name] for part, name in PARTS.items()}

    def cost(self, act: Callable[[int], Any]) -> dict[str, list[float]]:
        """Milliseconds of each of REPEATS acts, until what they change is drawn."""
        costs: dict[str, list[float]] = {part: [] for part in PARTS}
        for number in range(REPEATS):
            before = self.spent()
            act(number)
            self.browser.frame()
            for part, spent in self.spent().items():
                costs[part].append(spent - before[part])
        return costs

    def move(self, x: float, y: float) -> None:
        """The pointer, as the browser itself would see it come."""
        self.browser.cdp("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def box(self, selector: str) -> list[float]:
        """Left, top, width and height in the window."""
        asked = "document.querySelector(arguments[0]).getBoundingClientRect()"
        return self.browser.js(f"const r = {asked}; return [r.x, r.y, r.width, r.height]", selector)


def over(page: Page, selector: str) -> Callable[[int], None]:
    """A pointer that wanders over an element, never twice to one place."""
    x, y, width, height = page.box(selector)
    height = min(height, HEIGHT - y)
    draw = random.Random(0)
    places = [
        (x + width * draw.uniform(0.1, 0.9), y + height * draw.uniform(0.1, 0.9)) for _ in range(REPEATS)
    ]
    return lambda number: page.move(*places[number])


def measured(browser: Browser, path: Path) -> dict[str, dict[str, list[float]]]:
    """Name of an act -> milliseconds."""
    page = Page(browser)
    browser.cdp("Performance.enable", timeDomain="threadTicks")
    browser.open(path)
    browser.frame()
    costs = {"load": {part: [spent] for part, spent in page.spent().items()}}
    costs["nothing"] = page.cost(lambda _: None)
    costs["pointer over tokens"] = page.cost(over(page, ".tokens"))
    costs["pointer over the map"] = page.cost(over(page, ".map canvas"))
    costs["pointer over the grid"] = page.cost(over(page, ".grid canvas"))
    browser.click("#t0-3")
    costs["grid, a token kept"] = page.cost(over(page, ".grid canvas"))
    costs["key: next token"] = page.cost(lambda _: browser.keys("ArrowRight"))
    costs["key: next layer"] = page.cost(
        lambda number: browser.keys("ArrowUp" if number % 2 else "ArrowDown")
    )
    return costs


def main() -> None:
    sizes = [int(text) for text in sys.argv[1:]] or [48, 128, 2000]
    with tempfile.TemporaryDirectory() as folder:
        for name, explored in pages(*sizes).items():
            path = Path(folder) / "page.html"
            explored.save(path)
            with Browser(WIDTH, HEIGHT) as browser:
                costs = measured(browser, path)
            print(f"{name}: {explored.summary()}; {path.stat().st_size / 1e6:.1f} MB")
            for act, parts in costs.items():
                words = ", ".join(f"{part} {statistics.median(spent):.1f}" for part, spent in parts.items())
                print(f"  {act:24} {words}, at most {max(parts['all']):.1f} ms")


if __name__ == "__main__":
    main()
