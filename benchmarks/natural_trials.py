"""Does steering arise without a router signal? python benchmarks/natural_trials.py NAME --seed 41 --out DIR

Trains one trial of Branch-Train-Mix (arXiv 2403.07816; FlexOlmo, arXiv 2507.07024) and measures it on the
development split. A dense seed model is trained on everything, copies of it on one register's sequences each.
The feed-forward layers of the copies become the experts of one mixture, whose router is trained by language
modelling and load balancing alone. Register labels decide which sequences a branch sees, and nothing else.

Resumable: seed models, branches and mixtures are folders of --out, named by what made them, the measures of a
trial are one JSON file, and none is made twice. `--final` judges on the test split, as the demo does, and is
for a frozen recipe. Without NAME, it prints the table of what --out holds. Log: docs/explanation/natural.md.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch

from moe_lens import RoutedModel, SteeringPlan, evaluate_steering, steer_hooks
from moe_lens.detection import ExpertScores
from moe_lens.evaluation import CLOSED_BOOK, LOSS, SteeringReport, answer_task, opposite_plan
from moe_lens.files import atomic_write
from moe_lens.organisms import document_task, words
from moe_lens.organisms.branching import (
    BASE,
    BRANCHES,
    COMMON,
    EVERYTHING,
    RECIPE,
    SLOW,
    TWO,
    WORLD,
    Branches,
    SeedModel,
    Stage,
    branch,
    mixture,
)
from moe_lens.organisms.branching import BranchTrainMix as Trial
from moe_lens.organisms.demo import compare_sizes, detect_document_experts, run_on
from moe_lens.organisms.worlds import document, question

SIDES: Final = ("+", "-")
N_RANDOM: Final = 8

APART: Final = Branches(SeedModel(800, ties=1.0), steps=400)
ROUTER: Final = Stage(300, ("router",), 5e-3)
TRIALS: Final[dict[str, Trial]] = {
    # batch 1
    "router-only": Trial(APART, (ROUTER,)),
    "then-common": Trial(APART, (ROUTER, COMMON)),
    # batch 2
    "domain": Trial(APART, (ROUTER,), domain_router=1.0),
    "top-1": Trial(APART, (ROUTER,), top_k=1),
    # batch 3
    "two-branches": Trial(TWO, (replace(ROUTER, steps=150), COMMON), experts=(3, 3, 0), domain_router=1.0),
    # batch 4, the frozen recipe
    "question-start": RECIPE,
    # batch 5: what the start is needed for
    "domain-start": Trial(TWO, SLOW, experts=(3, 3, 0), domain_router=2.0),
    # not run yet
    "random-start": Trial(TWO, SLOW, experts=(3, 3, 0)),
    "thawed": Trial(
        TWO, (*SLOW, Stage(300, EVERYTHING, 3e-4)), experts=(3, 3, 0), domain_router=2.0, on_question=True
    ),
    "loss-free": Trial(
        TWO, SLOW, experts=(3, 3, 0), balancing=1e-3, loss_free=True, domain_router=2.0, on_question=True
    ),
    "dropout": Trial(TWO, SLOW, experts=(3, 3, 0), dropout=0.2, domain_router=2.0, on_question=True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=list(TRIALS), help="a trial; none: print the table")
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--out", type=Path, default=Path("natural"), help="checkpoints and measures")
    parser.add_argument(
        "--final", action="store_true", help="judge on the test split, with 20 random sets of each kind"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as in training: the same bits wherever it runs
    if options.name:
        run(options.name, TRIALS[options.name], options.seed, options.out, final=options.final)
    print(table(read(options.out)))


def run(
    name: str, trial: Trial, seed: int, out: Path, *, final: bool = False, n_random: int | None = None
) -> dict[str, Any]:
    """Train and measure, whichever has not been done; the measures."""
    file = out / f"{name}-{seed}{'-final' if final else ''}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    mixed = mixture(trial, seed, out)
    about = {"name": name, "seed": seed, "trial": asdict(trial), "folder": mixed.name}
    about |= tested(mixed, n_random or 20) if final else developed(mixed, trial, n_random or N_RANDOM)
    about["branch_rates"] = [
        document_rate(branch(trial.branches, register, seed, out)) for register in BRANCHES[:2]
    ]
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def developed(folder: Path, trial: Trial, n_random: int) -> dict[str, Any]:
    """What the development split says: the demo's steps, and steering by the experts' branches."""
    model = RoutedModel.from_pretrained(folder)
    scores = detect_document_experts(model, WORLD)
    plan = SteeringPlan.from_scores(scores, n_deactivate=compare_sizes(model, WORLD, scores).best_size())
    report = evaluate_steering(
        model,
        plan,
        document_task(WORLD, "development"),
        reverse=opposite_plan(scores, plan),
        scores=scores,
        n_random=n_random,
        progress=False,
    )
    return {
        "split": "development",
        **measures(report, scores),
        "by_branch": by_branch(model, trial),
        "cued_rates": cued_rates(model),
    }


def tested(folder: Path, n_random: int) -> dict[str, Any]:
    """What the demo says, on the test split."""
    demo = run_on(RoutedModel.from_pretrained(folder), WORLD, folder.name, n_random=n_random, progress=False)
    return {"split": "test", **measures(demo.report, demo.scores)}


def measures(report: SteeringReport, scores: ExpertScores) -> dict[str, Any]:
    """A report as numbers; triples are unsteered, toward the document, toward memory."""
    outcomes = [report.unsteered, *(report.steered[side] for side in SIDES)]
    return {
        "size": len(report.plans["+"]),
        "rates": [outcome.rate for outcome in outcomes],
        "gap": report.gap,
        "gap_interval": list(report.gap_interval),
        "p_matched": report.p_matched,
        "p_any": report.p_any,
        "verdict": report.verdict,
        "closed_book": [outcome.collateral[CLOSED_BOOK] for outcome in outcomes],
        "loss": [outcome.collateral[LOSS] for outcome in outcomes],
        "largest_difference": float(scores.delta.abs().max()),
    }


def by_branch(model: RoutedModel, trial: Trial) -> dict[str, list[float]]:
    """Without any expert of the memory branch ("+") or the document branch: document rate, closed-book, loss.

    Detection has no part in it: it says whether answers follow routes at all.
    """
    found = {}
    ends = [sum(trial.experts[:which]) for which in range(4)]
    for which, side in enumerate(SIDES):
        gone = product(range(BASE.n_layers), range(ends[which], ends[which + 1]))
        hooks = steer_hooks(SteeringPlan(deactivate=tuple(gone)))
        task = document_task(WORLD, "development")
        harms = [task.collateral[name].value(model, hooks) for name in (CLOSED_BOOK, LOSS)]
        found[side] = [float(task.values(model, hooks).mean()), *harms]
    return found


def cued_rates(model: RoutedModel) -> list[float]:
    """Document rate on the development conflicts with clear headers: "report report", "rumor rumor"."""
    conflicts, rates = WORLD.conflicts("development"), []
    for word in (words.TRUSTED[0], words.DOUBTFUL[-1]):
        triples = [(each.entity, each.attribute, each.document_answer) for each in conflicts]
        task = answer_task(
            [f"{document((word, word), each)} {question(*each[:2])}" for each in triples],
            [each.document_answer for each in conflicts],
            clusters=[each.entity for each in conflicts],
        )
        rates.append(float(task.values(model).mean()))
    return rates


def document_rate(folder: Path) -> float:
    """Share of the development conflicts that a model answers with the document's value."""
    return float(document_task(WORLD, "development").values(RoutedModel.from_pretrained(folder)).mean())


def read(out: Path) -> list[dict[str, Any]]:
    """All measures in a folder, by name, then seed."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*.json")]
    return sorted(found, key=lambda about: (about["name"], about["seed"], about["split"]))


def table(runs: Iterable[dict[str, Any]]) -> str:
    """A row a run, in Markdown."""
    rows = [["trial", "seed", "split", "branches", "off", "doc rate, + / −", "two-way gap [95 %]",
             "p matched / any", "verdict", "closed-book", "generic loss", "largest difference",
             "gap by branch", "doc rate, cued"]]  # fmt: skip
    rows += [row_of(about) for about in runs]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def row_of(about: dict[str, Any]) -> list[str]:
    """A run."""
    low, high = about["gap_interval"]
    branches = about.get("by_branch")
    return [
        about["name"],
        str(about["seed"]),
        about["split"],
        slashed(about["branch_rates"]),
        str(about["size"]),
        slashed(about["rates"]),
        f"{about['gap']:+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{about['p_matched']:.3f} / {about['p_any']:.3f}",
        "exceeds" if about["verdict"] else "not beyond",
        slashed(about["closed_book"]),
        slashed(about["loss"]),
        f"{about['largest_difference']:.2f}",
        f"{branches['+'][0] - branches['-'][0]:+.2f}" if branches else "–",
        slashed(about.get("cued_rates", ())),
    ]


def slashed(values: Iterable[float]) -> str:
    """Two decimals each."""
    return " / ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
