"""The picture of the routing explorer: `python -m docs.explorer_picture` writes docs/explorer.png.

It needs Chromium and its driver (Debian: chromium-driver), as the tests of the page do.
"""

import tempfile
from pathlib import Path

from moe_lens import ContrastivePairs, SteeringPlan, collect_routing, detect, explore, organisms
from moe_lens.plots import RoutingExplorer
from tests.browser import Browser

NAME = "specialised"
WIDTH, HEIGHT = 1180, 860


def page() -> RoutingExplorer:
    """A question whose document contradicts memory, as trained and with eight experts kept out."""
    model, world = organisms.load(NAME), organisms.world(NAME)
    conflicts = world.conflicts("detection")
    pairs = ContrastivePairs.from_lists(
        [conflict.open_book for conflict in conflicts],
        [conflict.closed_book for conflict in conflicts],
        span="last",
        clusters=[conflict.entity for conflict in conflicts],
    )
    scores = detect(model, pairs, progress=False)
    plan = SteeringPlan.from_scores(scores, n_deactivate=8)
    texts = [conflict.open_book for conflict in conflicts]
    stats = collect_routing(model, texts, vocabulary=True, progress=False)
    prompt = world.conflicts("test")[8].open_book
    return explore(model, prompt, plan=plan, scores=scores, stats=stats)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Browser(WIDTH, HEIGHT) as browser:
        path = Path(folder) / "page.html"
        page().save(path)
        browser.open(path)
        browser.choose("#layer", "2")
        browser.click("#t0-22")  # the last token, at which the answer is decided
        browser.click('.experts[data-run="1"] .chip')
        browser.js("document.activeElement.blur(); document.querySelector('#side').scrollTop = 0")
        browser.frame()
        browser.picture(Path(__file__).parent / "explorer.png")


if __name__ == "__main__":
    main()
