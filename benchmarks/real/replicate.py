"""SteerMoE's faithfulness rows on a real checkpoint, from your own data: one command, resumable.

    python benchmarks/real/replicate.py olmoe --data DATA --out RESULTS

DATA is a folder of yours:
  detection.jsonl    rows with the columns context and question (SQuAD's); title or cluster, if rows of one
                     label belong together
  ranking.pkl        the file that the authors publish for this model and faithfulness; or ranking.csv.
                     Without it only your own detection is evaluated
  NAME.jsonl         one or more of faitheval_counterfactual, faitheval_unanswerable, faitheval_inconsistent,
                     cf_triviaqa, mquake, with the columns of `moe_lens.engines.BENCHMARKS`
  mctest.jsonl       the control: what a plan should leave as it is

Says first what the run will take; then each stage writes a file of RESULTS, and a run that is started again
goes on where the last one ended:
  settings.json      what was asked for, and digests of the data: another run is refused here
  scores.safetensors detection on your pairs
  agreement.json     your scores beside the published ranking
  plan-*.json        your selection and the published one, of the paper's size, and their opposites
  outcomes/          what each benchmark gives under each plan, a file each
  report-*.json      each selection on each benchmark beside random sets, with its verdict
  results.md         all of it in two tables

The size of the plans is the paper's, so that nothing is chosen on the benchmarks. Data must be apart from
each other: detection's documents in no benchmark.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from agreement import agreement
from checkpoints import CHECKPOINTS, Checkpoint, load
from expected import Cost, Size, benchmark_work, detection_work
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from moe_lens import (
    RoutedModel,
    SteeringPlan,
    SteeringReport,
    collect_routing,
    contrasts,
    detect,
    read_published_ranking,
)
from moe_lens.detection import ExpertScores
from moe_lens.engines import BENCHMARKS, harness_collateral, harness_task
from moe_lens.engines.harness_tasks import need_harness
from moe_lens.errors import DataError, MoELensError
from moe_lens.evaluation import Outcome, SteeringTask
from moe_lens.evaluation.evaluating import evaluated_by
from moe_lens.files import atomic_write
from moe_lens.steering import steer_hooks
from moe_lens.text import ContrastivePairs
from moe_lens.text.rows import jsonl_rows

TOWARD_DOCUMENT: Final = (
    "faitheval_counterfactual", "faitheval_unanswerable", "faitheval_inconsistent", "cf_triviaqa", "mquake",
)  # fmt: skip
CONTROL: Final = "mctest"
WORSE_BY: Final = 0.02
"""How much accuracy on the control a plan may cost."""


@dataclass
class Study:
    """A run: what was asked for, the user's data, and the files that exist already."""

    checkpoint: Checkpoint
    source: str
    data: Path
    out: Path
    device: str
    n_activate: int
    n_deactivate: int
    n_random: int
    limit: int | None
    batch_size: int
    seed: int

    # The data.

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the checkpoint; its chat template is used where it has one."""
        return AutoTokenizer.from_pretrained(self.source)

    @property
    def chat(self) -> bool:
        """Whether prompts are put into the model's chat template."""
        return self.tokenizer.chat_template is not None

    @cached_property
    def pairs(self) -> ContrastivePairs:
        """A question after its document against the question alone, as in the paper."""
        rows = [row for _, row in jsonl_rows(self._file("detection.jsonl"))]
        return contrasts.document_against_question(rows, chat=self.chat, cluster=cluster_of(rows))

    @cached_property
    def benchmarks(self) -> tuple[str, ...]:
        """Those that the user has data for."""
        found = tuple(name for name in TOWARD_DOCUMENT if (self.data / f"{name}.jsonl").is_file())
        if not found:
            raise DataError(f"{self.data} has no benchmark; put one of {', '.join(TOWARD_DOCUMENT)} there.")
        return found

    @property
    def has_control(self) -> bool:
        """Whether the control's data are there."""
        return (self.data / f"{CONTROL}.jsonl").is_file()

    @property
    def ranking(self) -> Path | None:
        """The published file."""
        files = [self.data / f"ranking{ending}" for ending in (".pkl", ".csv", ".csv.gz")]
        return next((file for file in files if file.is_file()), None)

    @property
    def sides(self) -> tuple[str, ...]:
        """Whose selections are evaluated."""
        return ("own",) if self.ranking is None else ("own", "published")

    def _file(self, name: str) -> Path:
        if not (self.data / name).is_file():
            raise DataError(f"{self.data} has no {name}; replicate.py --help says what goes there.")
        return self.data / name

    def rows_of(self, name: str) -> list[dict[str, Any]]:
        """The rows of a benchmark, up to the limit."""
        return [row for _, row in jsonl_rows(self._file(f"{name}.jsonl"))][: self.limit]

    # What it will take.

    def expected(self) -> Cost:
        """A whole run, from config, tokenizer and data alone."""
        texts = [
            " ".join(message.content for message in prompt.messages)
            if prompt.messages
            else str(prompt.content)
            for prompt in (*self.pairs.first, *self.pairs.second)
        ]
        work = detection_work(self.tokenizer, texts)
        n_plans = 1 + len(self.sides) * (2 + 4 * self.n_random) + 1  # unsteered; own has a bottom set
        for name in (*self.benchmarks, *((CONTROL,) if self.has_control else ())):
            documents = BENCHMARKS[name].documents(self.rows_of(name))
            work += benchmark_work(self.tokenizer, name, documents, self.batch_size) * n_plans
        size = Size.of(AutoConfig.from_pretrained(self.source))
        return Cost(size, work, self.batch_size, 4 if self.device == "cpu" else 2)

    # The stages.

    def settings(self) -> None:
        """Write what was asked for, or refuse a folder in which something else was."""
        digests = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            for file in sorted(self.data.iterdir())
            if file.is_file()
        }
        asked = {
            name: getattr(self, name)
            for name in ("source", "n_activate", "n_deactivate", "n_random", "limit", "seed", "chat")
        }
        packages = {name: version(name) for name in ("moe-lens", "torch", "transformers", "lm-eval")}
        now = {**asked, "data": digests, "versions": packages}
        file = self.out / "settings.json"
        if not file.exists():
            write_json(file, now)
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := sorted(name for name in now if before.get(name) != now[name]):
            raise DataError(
                f"{self.out} holds a run with other {', '.join(changed)}; give another --out, or take that "
                "folder away to start anew."
            )

    def scores(self, model: RoutedModel) -> ExpertScores:
        """Detection on the user's pairs."""
        file = self.out / "scores.safetensors"
        if not file.exists():
            detect(model, self.pairs, seed=self.seed).save(file)
        return ExpertScores.load(file)

    def plans(self, model: RoutedModel, scores: ExpertScores) -> dict[str, tuple[SteeringPlan, SteeringPlan]]:
        """Of each side the plan toward the document and its opposite, of the paper's size."""
        size: dict[str, Any] = {"n_activate": self.n_activate, "n_deactivate": self.n_deactivate}
        own = [SteeringPlan.from_scores(each, **size, on_excess="drop") for each in (scores, -scores)]
        found = {"own": (own[0], own[1])}
        if self.ranking is not None:
            ranking = read_published_ranking(self.ranking, shape=model.moe_shape)
            write_json(self.out / "agreement.json", agreement(scores, ranking, self.n_deactivate, self.seed))
            both = [ranking.plan(**size, opposite=opposite, on_excess="drop") for opposite in (False, True)]
            found["published"] = (both[0], both[1])
        for side, (toward, away) in found.items():
            toward.save(self.out / f"plan-{side}.json")
            away.save(self.out / f"plan-{side}-opposite.json")
        return found

    def task(self, name: str) -> SteeringTask:
        """A benchmark of the user's data, beside the control."""
        rows = self.rows_of(name)
        collateral = {}
        if self.has_control:
            collateral[CONTROL] = harness_collateral(
                f"moe_lens/{CONTROL}", "acc", WORSE_BY, data=self.rows_of(CONTROL), **self._harness
            )
        return harness_task(
            f"moe_lens/{name}", data=rows, clusters=cluster_of(rows), collateral=collateral, name=name,
            **self._harness,
        )  # fmt: skip

    @property
    def _harness(self) -> dict[str, Any]:
        return {
            "apply_chat_template": self.chat,
            "system_instruction": self.checkpoint.system if self.chat else None,
            "batch_size": self.batch_size,
        }

    def report(
        self, model: RoutedModel, side: str, plans: tuple[SteeringPlan, SteeringPlan], scores: ExpertScores,
        name: str,
    ) -> SteeringReport:  # fmt: skip
        """A selection on a benchmark, with its controls."""
        file = self.out / f"report-{side}-{name}.json"
        if not file.exists():
            evaluated_by(
                self.measure_all, model, plans[0], self.task(name), reverse=plans[1],
                scores=scores if side == "own" else None, n_random=self.n_random, alpha=0.05, level=0.95,
                seed=self.seed,
            ).save(file)  # fmt: skip
        return SteeringReport.load(file)

    def measure_all(self, model: Any, task: SteeringTask, plans: Sequence[SteeringPlan]) -> list[Outcome]:
        """Every plan on a task, and on the control; each number is kept in a file of its own."""
        return [self.outcome(model, task, plan) for plan in tqdm(plans, unit="plan", desc=task.name)]

    def outcome(self, model: Any, task: SteeringTask, plan: SteeringPlan) -> Outcome:
        """What `measure_outcome` gives, from files where they exist."""
        hooks, files = steer_hooks(plan), self.out / "outcomes"
        values = kept(
            files / f"{task.name}-{plan.digest[:16]}.json", lambda: task.values(model, hooks).tolist()
        )
        beside = {
            name: kept(files / f"{name}-{plan.digest[:16]}.json", lambda m=measure: m.value(model, hooks))
            for name, measure in task.collateral.items()
        }
        return Outcome(np.array(values), beside)


def cluster_of(rows: list[dict[str, Any]]) -> str | None:
    """The column that says which rows belong together, if they have one."""
    return next((name for name in ("cluster", "title") if rows and all(name in row for row in rows)), None)


def kept(file: Path, compute: Callable[[], Any]) -> Any:
    """What a file holds; computed and written first where there is none."""
    if not file.exists():
        write_json(file, compute())
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def tokens_per_second(model: RoutedModel, pairs: ContrastivePairs) -> float:
    """Of reading, on the first prompts, after one that does not count."""
    collect_routing(model, pairs.first[:1], progress=False)
    start = time.perf_counter()
    stats = collect_routing(model, pairs.first[:16], progress=False)
    return stats.n_tokens / (time.perf_counter() - start)


def table(agreed: dict[str, Any] | None, reports: dict[tuple[str, str], SteeringReport]) -> str:
    """The results in Markdown."""
    lines = []
    if agreed is not None:
        lines += ["| own detection beside the published ranking | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in agreed.items()]
        lines.append("")
    lines += [
        "| benchmark | selection | unsteered | toward the document | away | two-way gap [95 %] "
        "| p matched | p any layer | control | verdict |",
        "|" + "---|" * 10,
    ]
    for (side, name), report in reports.items():
        outcomes = [report.unsteered, *(report.steered[direction] for direction in "+-")]
        rates = " | ".join(f"{outcome.rate:.3f}" for outcome in outcomes)
        control = " / ".join(f"{o.collateral[CONTROL]:.3f}" for o in outcomes if CONTROL in o.collateral)
        low, high = report.gap_interval
        lines.append(
            f"| {name} | {side} | {rates} | {report.gap:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"| {report.p_matched:.3f} | {report.p_any:.3f} | {control or '–'} "
            f"| {'exceeds controls' if report.verdict else 'not beyond controls'} |"
        )
    return "\n".join(lines) + "\n"


def run(study: Study) -> None:
    """All stages that have not been done."""
    model = load(study.source, study.device)
    speed = tokens_per_second(model, study.pairs)
    hours = study.expected().hours(speed)
    print(f"Measured: {speed:,.0f} tokens a second, so all of it takes about {hours:.2g} hours.", flush=True)
    scores = study.scores(model)
    plans = study.plans(model, scores)
    reports = {
        (side, name): study.report(model, side, plans[side], scores, name)
        for name in study.benchmarks
        for side in study.sides
    }
    agreed = None
    if (study.out / "agreement.json").exists():
        agreed = json.loads((study.out / "agreement.json").read_text(encoding="utf-8"))
    text = table(agreed, reports)
    (study.out / "results.md").write_text(text, encoding="utf-8")
    print(text)
    for report in reports.values():
        print(f"{report.task}: {report.explanation}")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", choices=list(CHECKPOINTS))
    parser.add_argument("--data", type=Path, required=True, help="folder with your data")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results; goes on where it ended"
    )
    parser.add_argument("--model", help="folder or name on the hub, instead of the checkpoint's name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--deactivate", type=int, help="experts, instead of the paper's number")
    parser.add_argument("--activate", type=int, help="experts, instead of the paper's number")
    parser.add_argument("--n-random", type=int, default=20, help="random sets of each kind and direction")
    parser.add_argument("--limit", type=int, help="the first so many rows of each benchmark")
    parser.add_argument("--batch-size", type=int, default=16, help="requests of the harness in one forward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--estimate", action="store_true", help="say what the run will take, and end")
    options = parser.parse_args(arguments)
    known = CHECKPOINTS[options.checkpoint]
    study = Study(
        known, options.model or known.name, options.data, options.out, options.device,
        known.n_activate if options.activate is None else options.activate,
        known.n_deactivate if options.deactivate is None else options.deactivate,
        options.n_random, options.limit, options.batch_size, options.seed,
    )  # fmt: skip
    try:
        need_harness()
        print(f"{study.source}: {study.expected().words()}", flush=True)
        if not options.estimate:
            study.settings()
            run(study)
    except (MoELensError, OSError) as error:  # OSError: no such checkpoint, says transformers
        print(f"replicate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
