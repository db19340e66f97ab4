"""The routing explorer: a text and its route, to be looked at token by token in a browser or a notebook.

    explore(model, "Question : what is the capital")                     # shows itself in a notebook
    explore(model, prompt, plan=plan, scores=scores).save("page.html")   # as trained beside steered
    explore(record, against=steered_record, tokenizer=tokenizer)

explorer_data.py puts together what the page holds; the page itself lies in the folder explorer_page.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Final

from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError
from moe_lens.files import atomic_write
from moe_lens.hook_names import Hooks
from moe_lens.plots.explorer_data import ExploredRun, explored, page_content
from moe_lens.results import Result
from moe_lens.statistics.routes import PromptRouting, RouteRecord
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.plan import SteeringPlan

_FOLDER: Final = Path(__file__).parent / "explorer_page"
_SCRIPTS: Final = ("numbers", "colours", "text", "map", "grid", "card", "main")
"""In the order in which they are read."""
_MOST_INLINE: Final = 30_000_000
"""Characters of a page that a notebook is given; a larger one would make its file unwieldy."""
_HEIGHT: Final = 680
"""Of the view in a notebook, in pixels."""


@dataclass(frozen=True, eq=False, repr=False)
class RoutingExplorer(Result):
    """A page about the route of a text, from `explore`: a notebook shows it, `save` writes it as one file.

    The page loads nothing from anywhere: text, numbers, style and scripts are in it.

    >>> from moe_lens import explore, organisms
    >>> page = explore(organisms.load("specialised"), "Question : what is")
    >>> page
    RoutingExplorer(5 tokens, 1 run; specialised, 4 layers × 8 experts, top 2)
    >>> page.save("page.html")

    Attributes:
        runs: one run, or two that are compared.
        content: what the page holds, as JSON has it.
    """

    runs: tuple[ExploredRun, ...]
    content: dict[str, Any]

    def summary(self) -> str:
        """Numbers of tokens and of runs, and the model."""
        n = " and ".join(str(n) for n in sorted({len(run.tokens) for run in self.runs}))
        tokens = "1 token" if n == "1" else f"{n} tokens"
        return f"{tokens}, {len(self.runs)} run{'s' * (len(self.runs) > 1)}; {self.runs[0].shape.words}"

    def html(self) -> str:
        """The page as HTML; it is ASCII, whatever the text is written in."""
        model = str(self.content["model"])
        title = escape(f"Routing of {model}" if model else "Routing").encode("ascii", "xmlcharrefreplace")
        # without "<" no token can end the script that the data stand in
        data = json.dumps(self.content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        return _page().replace("{{title}}", title.decode()).replace("{{data}}", data)

    def save(self, path: str | Path) -> None:
        """Write the page, atomically. Raises DataError where the file cannot be written."""
        page = self.html()
        with atomic_write(path) as temporary:
            temporary.write_text(page, encoding="ascii")

    def _repr_html_(self) -> str:
        """The page in a frame that cannot reach the notebook around it."""
        page, line = self.html(), escape(repr(self))
        if len(page) > _MOST_INLINE:
            size = f"{len(page) / 1e6:.0f} MB"
            return f"<p><code>{line}</code></p><p>{size} are too much for a notebook: save(path) it.</p>"
        style = f"width:100%;height:{_HEIGHT}px;border:1px solid #8884;border-radius:8px"
        about = f'title="{line}" sandbox="allow-scripts" style="{style}"'
        return f'<iframe {about} srcdoc="{escape(page)}"></iframe>'


def explore(
    routed: Any,
    prompt: Any = None,
    *,
    plan: Any = None,
    against: Any = None,
    hooks: Hooks = (),
    scores: Any = None,
    stats: Any = None,
    tokenizer: Any = None,
    row: int = 0,
    columns: Any = None,
    names: Sequence[str] | None = None,
) -> RoutingExplorer:
    """A page to look at the route of a text: its tokens, coloured, beside layers × experts.

    >>> from moe_lens import RouteRecord, SteeringPlan, explore, organisms
    >>> model = organisms.load("specialised")
    >>> page = explore(model, "Question : what is", plan=SteeringPlan(deactivate=[(2, 5)]))
    >>> page.save("steered.html")
    >>> record = RouteRecord.from_generation(model, "Question : what is", 4, weights=True)
    >>> explore(record, tokenizer=model.tokenizer)
    RoutingExplorer(8 tokens, 1 run; specialised, 4 layers × 8 experts, top 2)

    Tokens are coloured by the expert with the largest weight, that weight, router entropy, margin, the mean
    score of the experts that ran, the share of experts that ran in one run only, or the weight of one expert.
    Entropy and margin are known for a prompt that ran here, and for a `PromptRouting`.

    Args:
        routed: a HookedMoE or RoutedModel with a prompt, or a route: a `RouteRecord` (of a cache or of a
            generation) or a `PromptRouting`.
        prompt: for a model, as in `route_prompt`.
        plan: a `SteeringPlan`. For a model, the prompt runs a second time under it, and both runs stand side
            by side; for a route, the plan's experts are marked only.
        against: for a route, a `RouteRecord` or `PromptRouting` of another run of the same text. Where the
            texts part, the comparison ends.
        hooks: for a model, forward hooks under which every run stands.
        scores: `ExpertScores` of the same model, for colours and the experts' cards.
        stats: `RoutingStats` of the same model; with `vocabulary=True` cards show an expert's top tokens.
        tokenizer: writes the tokens of a record, and of `stats`; None: that of the model.
        row: which prompt of a record.
        columns: which positions of a route, a slice; None: all but padding, as far as the tokenizer tells it.
        names: what the page calls the run, or both runs.

    Raises:
        DataError: something that is no route, a prompt for a route or none for a model, things of different
            models, two runs whose texts begin differently, `route_prompt`'s reasons.
        PlanError: a plan that does not fit the model.
        HookError: `routed` is no model with hook points either.
    """
    for name, given, kind in (
        ("plan", plan, SteeringPlan), ("scores", scores, ExpertScores), ("stats", stats, RoutingStats),
    ):  # fmt: skip
        if given is not None and not isinstance(given, kind):
            raise DataError(f"{name} must be of the type {kind.__name__}; got {type(given).__name__}.")
    if isinstance(routed, PromptRouting | RouteRecord):
        results = _routes(routed, prompt, against, hooks)
    else:
        results = _runs_of_model(routed, prompt, plan, against, hooks, row, columns)
        tokenizer = routed.tokenizer if tokenizer is None else tokenizer
    both = ("this run", "other run")
    if plan is not None and against is None:
        both = ("without the plan", "under the plan") if hooks else ("as trained", "steered")
    called = _checked_names(names, len(results)) or both[: len(results)]
    runs = tuple(
        explored(result, name, tokenizer=tokenizer, row=row, columns=columns)
        for result, name in zip(results, called, strict=True)
    )
    content = page_content(runs, scores=scores, stats=stats, plan=plan, tokenizer=tokenizer)
    return RoutingExplorer(runs, content)


def _routes(
    routed: PromptRouting | RouteRecord, prompt: Any, against: Any, hooks: Hooks
) -> list[PromptRouting | RouteRecord]:
    if prompt is not None or hooks:
        raise DataError("A route has run already; give prompt= and hooks= with a model only.")
    if against is None:
        return [routed]
    if not isinstance(against, PromptRouting | RouteRecord):
        raise DataError(f"against must be a RouteRecord or PromptRouting; got {type(against).__name__}.")
    return [routed, against]


def _runs_of_model(
    model: Any,
    prompt: Any,
    plan: SteeringPlan | None,
    against: Any,
    hooks: Hooks,
    row: int,
    columns: Any,
) -> list[PromptRouting | RouteRecord]:
    if isinstance(model, Result):
        raise DataError(
            f"{type(model).__name__} holds no route of a text; give a RouteRecord (of a generation: "
            "RouteRecord.from_generation), a PromptRouting, or a model and a prompt."
        )
    from moe_lens.statistics.collection import route_prompt  # pages load without a model library
    from moe_lens.steering.hooks import steer_hooks

    if against is not None:
        raise DataError("against= goes with a route; a model takes plan=, or give route_prompt(...) twice.")
    if prompt is None and hasattr(model, "tokenizer"):
        raise DataError("explore(model, prompt) needs a prompt: a text, a chat, or token numbers.")
    if row != 0 or columns is not None:
        raise DataError("row= and columns= go with a record; a model runs one prompt, whole.")
    steered = [] if plan is None else [[*(hooks or ()), *steer_hooks(plan)]]
    return [route_prompt(model, prompt, hooks=each) for each in (hooks, *steered)]


def _checked_names(names: Sequence[str] | None, n_runs: int) -> list[str] | None:
    if names is None:
        return None
    given = [names] if isinstance(names, str) else list(names)
    if len(given) != n_runs or not all(isinstance(name, str) and name for name in given):
        raise DataError(f"names must be {n_runs} text{'s' * (n_runs > 1)}, one a run; got {names!r}.")
    return given


@cache
def _page() -> str:
    """The page with its style and scripts, without title and data."""
    script = "\n".join((_FOLDER / f"{name}.js").read_text(encoding="ascii") for name in _SCRIPTS)
    page = (_FOLDER / "page.html").read_text(encoding="ascii")
    style = (_FOLDER / "style.css").read_text(encoding="ascii")
    return page.replace("{{style}}", style).replace("{{script}}", script)
