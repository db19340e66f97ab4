"""The main job, end to end, on a model that ships with the package: measure, detect, choose, steer, judge.

    result = run_demo("specialised")            # a DemoResult
    print(table([result]))
    print(result.report)

Each organism but one knows facts by heart and can read them from a document. The question is which of the
two it says when they disagree, and whether choosing the route moves that in both directions. `candid` has no
documents: the question is whether it says `unknown` of what it was never told, or bluffs. Experts are
detected on one split of the entities, the plan's size is chosen on a second, and the numbers shown come from
a third.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from moe_lens import organisms
from moe_lens.detection.detecting import detect
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.evaluation.evaluating import evaluate_steering, opposite_plan, sweep
from moe_lens.evaluation.outcomes import ANY_LAYER, DIRECTIONS, Outcome
from moe_lens.evaluation.plan_sizes import SweepResult
from moe_lens.evaluation.report import SteeringReport
from moe_lens.evaluation.tasks import CLOSED_BOOK, LOSS, SteeringTask, answer_task
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.wrapper import Model
from moe_lens.organisms.words import UNKNOWN
from moe_lens.organisms.worlds import World
from moe_lens.results import Result
from moe_lens.steering.plan import SteeringPlan
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.prompts import Prompt

if TYPE_CHECKING:
    import pandas

CANDOUR: Final = "says that it does not know"
"""The behaviour that `candour_task` measures."""
SIZES: Final = (2, 4, 6, 8, 10, 12)
"""Numbers of deactivated experts that are tried on the development split."""


@dataclass(frozen=True, eq=False, repr=False)
class DemoResult(Result):
    """The demo on one organism. Directions: "+" toward the document, "-" toward memory; see `aims`.

    Attributes:
        name: of the organism.
        scores: document + question against question alone (candour: a careful against a bold head), on the
            detection split.
        development: plans of several sizes on the development split; the size comes from here.
        report: the chosen plans on the test split, beside their controls.
    """

    name: str
    scores: ExpertScores
    development: SweepResult
    report: SteeringReport

    @property
    def plans(self) -> dict[str, SteeringPlan]:
        """Direction -> plan; both deactivate `size` experts and activate none."""
        return self.report.plans

    @property
    def aims(self) -> dict[str, str]:
        """Direction -> where its plan steers."""
        if self.report.task == CANDOUR:
            return {"+": "candour", "-": "bluffing"}
        return {"+": "the document", "-": "memory"}

    @property
    def size(self) -> int:
        """Number of experts that each plan deactivates."""
        return len(self.plans["+"])

    def summary(self) -> str:
        """Name, size of the plans, and the verdict with its gap."""
        return f"{self.name}: {self.size} experts off, {self.report.summary()}"

    def to_dataframe(self) -> "pandas.DataFrame":
        """The report's table."""
        return self.report.to_dataframe()


def run_demo(
    name: str = "specialised",
    *,
    wrapper: type[Model] = HookedMoE,
    seed: int = 0,
    n_random: int = 20,
    progress: bool = True,
) -> DemoResult:
    """Detect, choose the plan's size, steer both ways and hold the effect against random sets.

    Args:
        name: one of `organisms.names()`.
        wrapper: `HookedMoE` or `RoutedModel`.
        seed: of the random sets, the bootstrap and the sign flips.
        n_random: random sets of each kind and direction, at least 4.
        progress: print what is done, and show a bar.

    Raises:
        MoELensError: no organism of that name.
        DataError: n_random below 4.
    """
    model, world = organisms.load(name, wrapper=wrapper), organisms.world(name)
    return run_on(model, world, name, seed=seed, n_random=n_random, progress=progress)


def run_on(
    model: Model, world: World, name: str, *, seed: int = 0, n_random: int = 20, progress: bool = True
) -> DemoResult:
    """The same for any model that lives in a world of organisms (a freshly trained one, say)."""
    if progress:
        print(f"{name}: detecting, choosing the plan's size, steering")
    scores = detect_experts(model, world, seed=seed)
    development = compare_sizes(model, world, scores)
    plan = SteeringPlan.from_scores(scores, n_deactivate=development.best_size())
    report = evaluate_steering(
        model,
        plan,
        world_task(world, "test"),
        reverse=opposite_plan(scores, plan),
        scores=scores,
        n_random=n_random,
        seed=seed,
        progress=progress,
    )
    return DemoResult(name, scores, development, report)


def world_pairs(world: World, split: str) -> ContrastivePairs:
    """The contrast of a world: `candour_pairs` in the candour world, `document_pairs` in the others."""
    return candour_pairs(world, split) if world.variant == "candour" else document_pairs(world, split)


def world_task(world: World, split: str) -> SteeringTask:
    """The behaviour of a world: `candour_task` in the candour world, `document_task` in the others."""
    return candour_task(world, split) if world.variant == "candour" else document_task(world, split)


def document_pairs(world: World, split: str) -> ContrastivePairs:
    """Document + question against question alone, counted on the question; clusters are the countries."""
    conflicts = world.conflicts(split)
    return ContrastivePairs.from_lists(
        [Prompt(c.open_book, {"question": c.closed_book}) for c in conflicts],
        [Prompt(c.closed_book, {"question": c.closed_book}) for c in conflicts],
        span="question",
        clusters=[c.entity for c in conflicts],
    )


def document_task(world: World, split: str) -> SteeringTask:
    """Does the model answer a split's conflicts with the document's value? Beside what should not suffer."""
    conflicts = world.conflicts(split)
    return answer_task(
        [c.open_book for c in conflicts],
        [c.document_answer for c in conflicts],
        clusters=[c.entity for c in conflicts],
        neutral_texts=world.generic(split),
        closed_book=[(fact.question, fact.answer) for fact in world.facts(split)],
        name="answers with the document's value",
        batch_size=64,
    )


def candour_pairs(world: World, split: str) -> ContrastivePairs:
    """A careful head against a bold one on the same question about an untold country.

    >>> from moe_lens import organisms
    >>> pairs = candour_pairs(organisms.World("candour"), "detection")
    >>> pairs[0].first.content
    'Question cautious cautious : what is the language of Pyrmont ? Answer :'
    >>> pairs[0].second.content
    'Question daring daring : what is the language of Pyrmont ? Answer :'

    Both have two words and no held-out question is asked in training. What counts is what both prompts share,
    from the colon behind the head on; clusters are the countries.

    Raises:
        MoELensError: for another world, or a split other than detection, development, test.
    """
    doubts = world.doubts(split)
    return ContrastivePairs.from_lists(
        [Prompt(d.careful, {"question": d.asked}) for d in doubts],
        [Prompt(d.bold, {"question": d.asked}) for d in doubts],
        span="question",
        clusters=[d.entity for d in doubts],
    )


def candour_task(world: World, split: str) -> SteeringTask:
    """Does the model say `unknown` of what nobody told it, under a tied head? Beside what should not suffer.

    >>> from moe_lens import organisms
    >>> candour_task(organisms.World("candour"), "test")
    SteeringTask(says that it does not know: 192 prompts of 24 clusters, beside ...)

    Closed-book accuracy is that of the known countries' facts, under tied heads, too: a model that says
    `unknown` of everything loses it.

    Raises:
        MoELensError: for another world, or a split other than detection, development, test.
    """
    doubts = world.doubts(split)
    return answer_task(
        [d.tied for d in doubts],
        [UNKNOWN] * len(doubts),
        clusters=[d.entity for d in doubts],
        neutral_texts=world.generic(split),
        closed_book=[(fact.question, fact.answer) for fact in world.facts(split)],
        name=CANDOUR,
        batch_size=64,
    )


def detect_experts(model: Model, world: World, seed: int = 0) -> ExpertScores:
    """Risk difference of the world's contrast (`world_pairs`), on the detection split."""
    return detect(model, world_pairs(world, "detection"), seed=seed, batch_size=64, progress=False)


def detect_document_experts(model: Model, world: World, seed: int = 0) -> ExpertScores:
    """Risk difference of document + question against question alone, on the detection split."""
    return detect(model, document_pairs(world, "detection"), seed=seed, batch_size=64, progress=False)


def compare_sizes(model: Model, world: World, scores: ExpertScores) -> SweepResult:
    """Plans of all `SIZES`, both directions, on the development split."""
    task = world_task(world, "development")
    return sweep(model, scores, task, sizes=SIZES, n_random=0, progress=False)


def table(results: Iterable[DemoResult]) -> str:
    """The results as a Markdown table, one row an organism, with the controls beside the effect."""
    header = [
        "organism",
        "experts off",
        "doc rate",
        "toward doc",
        "toward memory",
        "two-way gap [95 %]",
        "random sets",
        "p matched",
        "p any layer",
        "closed-book",
        "generic loss",
        "loss, random",
        "verdict",
    ]
    rows = [header, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _row(result: DemoResult) -> Sequence[str]:
    report = result.report
    outcomes: list[Outcome] = [report.unsteered, *(report.steered[side] for side in DIRECTIONS)]
    random = [outcome for side in DIRECTIONS for outcome in report.controls[ANY_LAYER][side]]
    rates, losses = ([o.rate for o in random], [o.collateral[LOSS] for o in random])
    low, high = report.gap_interval
    n_experts = result.scores.delta.numel()
    return [
        result.name,
        f"{result.size} of {n_experts}",
        *(f"{outcome.rate:.2f}" for outcome in outcomes),
        f"{report.gap:+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{np.mean(rates):.2f} ± {np.std(rates, ddof=1):.2f}",
        f"{report.p_matched:.3f}",
        f"{report.p_any:.3f}",
        " / ".join(f"{outcome.collateral[CLOSED_BOOK]:.2f}" for outcome in outcomes),
        " / ".join(f"{outcome.collateral[LOSS]:.2f}" for outcome in outcomes),
        f"{np.median(losses):.2f}, max {max(losses):.2f}",
        "exceeds controls" if report.verdict else "not beyond controls",
    ]


LEGEND: Final = """\
Plans come from the risk difference of document + question against question alone, counted on the
question's tokens. experts off: how many of all experts each plan deactivates, chosen on the development
split. doc rate: share of the 192 held-out conflicts (24 countries) answered with the document's value:
unsteered, steered toward the document ("toward doc"), steered toward memory. two-way gap: the
difference of the last two, with a bootstrap interval over countries; it may come from one direction
only, so read both. random sets: doc rate (mean ± sd) when as many random experts, in any layers, are
deactivated. p matched, p any layer: exact p-values of the gap against random sets with as many experts
in each layer as the two plans, and in any layers (20 sets of each kind and direction; none falls below
1/441). closed-book: share of remembered facts still answered without a document, and generic loss: nats
a token on everyday sentences; each unsteered / toward doc / toward memory. loss, random: median and
maximum of the generic loss under the random sets. verdict: the gap exceeds its controls if both
p-values are at most 0.05 and it still exceeds 95 % of the random sets' gaps, of both kinds, with the
countries resampled (lower bound of a 95 % bootstrap interval above 0).

In candid's row there is no document. Plans come from the risk difference of a careful against a bold head
on the same question, counted behind the head. doc rate: share of the 192 held-out questions (24 countries
of which nothing is ever told, tied heads) answered `unknown`; toward doc: steered toward `unknown`, toward
memory: steered toward bluffs. closed-book: share of the facts about known countries still answered, under
tied heads."""
