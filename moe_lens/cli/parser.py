"""The command `moe-lens`: its arguments and its help. commands.py has what each command does.

moe-lens demo                                   the whole ladder of organisms
moe-lens models                                 the table of supported models
moe-lens organism build NAME                    make a model of real language that does not ship (resumable)
moe-lens stats MODEL PROMPTS --out F            routing statistics (resumable; --folder: many processes)
moe-lens detect MODEL PAIRS --out F             which experts follow a contrast, and how sure that is
moe-lens plan SCORES --deactivate N --out F     a steering plan
moe-lens steer MODEL PLAN --prompt TEXT         generate, unsteered and steered
moe-lens evaluate MODEL PLAN TASK               is the effect larger than that of random experts?
moe-lens sweep MODEL SCORES TASK                the effect of plans of several sizes
moe-lens plot KIND FILE --out F                 a figure of any of these files
moe-lens explore MODEL --prompt TEXT --out F    a page to look at the route of a text, token by token

Help needs no model library, and neither does a command that runs no model: so commands.py is imported when a
command runs, and choices that other rooms know are looked up when they are needed.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moe_lens
from moe_lens.cli.arguments import (
    Choices,
    add_loading,
    add_model_and,
    add_random,
    add_sharing,
    add_spans,
    add_wrapper,
    built_names,
    new_command,
    score_names,
    several,
    whole,
    whole_or_all,
)
from moe_lens.errors import MoELensError

_WORKFLOW = """\
From prompts to a result:

  moe-lens stats specialised prompts.txt --out stats.safetensors
  moe-lens detect specialised pairs.jsonl --out scores.safetensors --table scores.csv
  moe-lens plan scores.safetensors --deactivate 8 --out plan.json
  moe-lens plan scores.safetensors --deactivate 8 --opposite --out opposite.json
  moe-lens steer specialised plan.json --prompt "Question : what is the capital of Eldria ? Answer :"
  moe-lens evaluate specialised plan.json task.json --reverse opposite.json --out report.json
  moe-lens plot volcano scores.safetensors --out volcano.png

MODEL is the name of a shipped model (specialised, planted, null, ...), a folder, or a name on the Hugging
Face hub. `moe-lens COMMAND --help` explains each command and its files.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 after an error that the user can mend, 130 if interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "stats" and not (options.out or options.folder or options.merge):
        parser.error("stats: one of --out, --folder and --merge is required")
    try:
        with _sigterm_interrupts():
            getattr(_commands(), options.command)(options)
    except MoELensError as error:
        print(f"moe-lens: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moe-lens: interrupted", file=sys.stderr)
        return 130
    return 0


def _commands() -> Any:
    from moe_lens.cli import commands

    return commands


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that `stats` keeps what it has counted."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-lens",
        description="Mechanistic interpretability of Mixture-of-Experts language models.",
        epilog=_WORKFLOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moe-lens {moe_lens.__version__}")
    adders = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    steps = (_stats, _detect, _plan, _steer, _evaluate, _sweep, _plot, _explore)
    for add in (_demo, _models, _organism, *steps):
        add(adders)
    return parser


def _demo(adder: Any) -> None:
    command = new_command(
        adder,
        "demo",
        "measure, detect and steer a small trained model, beside its controls",
        """On each organism (a small trained model that ships with the package): find the experts that run
        more often with a document than without, choose the plan's size on development questions, steer toward
        the document and toward memory on test questions, and hold the effect against random experts. Prints
        a table and writes figures.""",
    )
    command.add_argument(
        "--model", action="append", metavar="NAME", help="an organism; repeat for several (default: all)"
    )
    command.add_argument(
        "--out", type=Path, default=Path("moe-lens-demo"), help="folder (default: %(default)s)"
    )
    command.add_argument("--seed", type=whole, default=0, help="of random sets and bootstrap (default: 0)")
    add_wrapper(command)


def _models(adder: Any) -> None:
    command = new_command(
        adder,
        "models",
        "print the table of supported models",
        """Print, as Markdown, every Hugging Face architecture that moe_lens supports: its router, the routing
        rule, where k comes from, special cases, and what is refused.""",
    )
    command.add_argument(
        "--readme", type=Path, metavar="FILE", help="write the table into this file, between its marks"
    )


def _organism(adder: Any) -> None:
    command = new_command(
        adder,
        "organism",
        "build a model that does not ship",
        """Build an organism in the cache folder (MOE_LENS_CACHE, or the platform's folder for caches):
        smollm2-split, the dense model SmolLM2-135M-Instruct split into 30 layers of 8 experts and distilled.
        It takes about an hour on two cores. If the command is interrupted, the same command continues where
        it stopped. Needs the package gguf. Its routes are an artefact of the split, not learned
        specialisation.""",
    )
    command.add_argument("action", choices=("build",), metavar="build", help="what to do")
    command.add_argument("name", choices=Choices(built_names), metavar="NAME", help="which: %(choices)s")


def _stats(adder: Any) -> None:
    command = new_command(
        adder,
        "stats",
        "routing statistics over many prompts",
        """Count which experts run, layer by layer, and print how evenly they are used. PROMPTS is a .txt file
        (one prompt a line), a .jsonl file (each line a string, a list of messages, a list of token numbers,
        or an object with "prompt" or "messages") or a .csv file with a column "prompt". If the command is
        interrupted, the same command continues where it stopped. Python reads the result with
        RoutingStats.load(FILE). With --folder, any number of processes share the work (torchrun, srun,
        ...).""",
    )
    add_model_and(command, "prompts", "file of prompts", needed=False)
    command.add_argument("--column", metavar="NAME", help="field or column of the prompts")
    add_spans(command)
    for name, text in (
        ("per-prompt", "keep the counts of each prompt (what detection with uncertainty needs)"),
        ("positions", "keep the counts of each position"),
        ("vocabulary", "keep the counts of each token of the vocabulary"),
        ("outputs", "sum up how large what each expert gives is"),
    ):
        command.add_argument(f"--{name}", action="store_true", help=text)
    add_sharing(command)
    command.add_argument(
        "--merge",
        type=Path,
        metavar="F",
        help="take the result from the unit files of this folder; without MODEL and PROMPTS",
    )
    command.add_argument("--job", metavar="J", help="with --merge: which one, where F holds several")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="result, safetensors (with --folder it may be left out)"
    )


def _detect(adder: Any) -> None:
    command = new_command(
        adder,
        "detect",
        "which experts follow a contrast, with intervals and q-values",
        """Score every expert on contrastive pairs, with a confidence interval (paired bootstrap), a p-value
        (sign flips) and a q-value (Benjamini–Hochberg over all experts). PAIRS is a .jsonl or .csv file
        with the fields "first" and "second" (a prompt under each condition: text, or a list of messages)
        and, if wanted, "cluster" (pairs with the same label are one unit) and "template". Positive scores
        go with "first". Prints the top experts, how stable the selection is under resampling, and how well
        the templates agree.""",
    )
    add_model_and(command, "pairs", "file of pairs")
    for name in ("first", "second", "cluster", "template"):
        command.add_argument(
            f"--{name}", metavar="NAME", help=f"field or column of that meaning (default: {name})"
        )
    command.add_argument(
        "--score",
        choices=Choices(score_names),
        metavar="SCORE",
        default="risk_difference",
        help="%(choices)s (default: %(default)s)",
    )
    add_spans(command)
    command.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    command.add_argument("--resamples", type=whole, default=1000, help="of the bootstrap (default: 1000)")
    command.add_argument("--permutations", type=whole, default=1000, help="sign flips (default: 1000)")
    command.add_argument("--seed", type=whole, default=0, help="of both (default: 0)")
    command.add_argument("--top", type=whole, default=10, help="how many experts to print (default: 10)")
    add_sharing(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="result, safetensors")
    command.add_argument("--table", type=Path, metavar="FILE", help="all experts, as .csv")


def _plan(adder: Any) -> None:
    command = new_command(
        adder,
        "plan",
        "choose the experts to steer",
        """Write a steering plan: activate the experts with the most positive scores, deactivate those with
        the most negative ones. SCORES comes from `moe-lens detect`, or, with --steermoe, is a ranking that
        the SteerMoE authors published (a pickled DataFrame, read without running its code).""",
    )
    command.add_argument("scores", type=Path, metavar="SCORES", help="file of scores")
    for verb in ("activate", "deactivate"):
        command.add_argument(
            f"--{verb}", type=whole_or_all, metavar="N", help=f'how many experts to {verb}, or "all"'
        )
    command.add_argument(
        "--q", type=float, help="only experts with a q-value up to this; without any N, all that fit a layer"
    )
    command.add_argument(
        "--opposite",
        "--reverse",
        action="store_true",
        help="for the opposite contrast (--reverse in version 0.1)",
    )
    command.add_argument("--epsilon", type=float, default=0.01, help="of the transform (default: 0.01)")
    command.add_argument(
        "--on-excess", choices=("raise", "drop"), default="raise", help="experts that do not fit a layer"
    )
    command.add_argument("--steermoe", action="store_true", help="SCORES is a published ranking")
    command.add_argument("--model", help="with --steermoe: the model that the plan is for")
    add_loading(command)
    command.add_argument(
        "--moe-layers", action="store_true", help="with --steermoe: its layer n is the model's n-th MoE layer"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the plan, JSON")


def _steer(adder: Any) -> None:
    command = new_command(
        adder,
        "steer",
        "generate with a plan, beside the unsteered text",
        """Generate greedily from each prompt, unsteered and under the plan, as JSON lines with the fields
        index, prompt, unsteered, steered.""",
    )
    add_model_and(command, "plan", "steering plan, from `moe-lens plan`")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for several")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="file of prompts, as in `stats`")
    command.add_argument("--column", metavar="NAME", help="field or column of the prompts")
    command.add_argument("--max-new-tokens", type=whole, default=20, help="a prompt (default: 20)")
    command.add_argument("--out", type=Path, metavar="FILE", help="JSON lines (default: print them)")


def _evaluate(adder: Any) -> None:
    command = new_command(
        adder,
        "evaluate",
        "is the effect of a plan larger than that of random experts?",
        """Measure a behaviour on held-out prompts under the plan, under the plan for the opposite direction,
        and under random sets of as many experts (any layer, and layer by layer), and say in words whether
        the two-way gap exceeds these controls. TASK is a JSON file; `moe_lens.load_task` documents
        it.""",
    )
    add_model_and(command, "plan", "steering plan")
    _task(command)
    command.add_argument("--reverse", type=Path, metavar="PLAN", help="plan for the opposite direction")
    command.add_argument(
        "--scores", type=Path, metavar="FILE", help="scores that the plan came from: for reverse and bottom-k"
    )
    add_random(command)
    command.add_argument("--alpha", type=float, default=0.05, help="error rate (default: 0.05)")
    add_sharing(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="the report, JSON")


def _task(command: Any) -> None:
    command.add_argument("task", type=Path, metavar="TASK", help="what to measure, JSON (or see --harness)")
    command.add_argument(
        "--measure",
        metavar="HOW",
        help="of answers: sum, mean, first_difference or whole_answer (default: what the task says)",
    )
    harness = command.add_argument_group("benchmarks of lm-evaluation-harness")
    harness.add_argument(
        "--harness",
        action="store_true",
        help="TASK is a task or group of the harness, a task's .yaml, or moe_lens/BENCHMARK",
    )
    for name, metavar, text in (
        ("metric", "NAME", "which of its metrics (default: its only one)"),
        ("filter", "NAME", "which of its filters, where it has several"),
        ("include-path", "FOLDER", "tasks of your own"),
        ("data", "FILE", "of a benchmark of moe_lens: .jsonl or .csv"),
        ("clusters", "COLUMN", "documents with the same label are not independent"),
    ):
        harness.add_argument(f"--{name}", metavar=metavar, help=text)
    harness.add_argument("--limit", type=whole, metavar="N", help="the first N documents only")
    harness.add_argument("--max-gen-toks", type=whole, metavar="N", help="tokens of a written answer")
    harness.add_argument(
        "--chat", action="store_true", default=None, help="put each prompt into the tokenizer's chat template"
    )


def _sweep(adder: Any) -> None:
    command = new_command(
        adder,
        "sweep",
        "the effect of plans of several sizes, both directions",
        """Deactivate 2, 4, ... experts in either direction, and as many random ones, and measure the task
        under each. Choose a size on development prompts and evaluate it on others.""",
    )
    add_model_and(command, "scores", "file of scores, from `moe-lens detect`")
    _task(command)
    command.add_argument("--sizes", type=several, default=(2, 4, 8), help="such as 2,4,8 (the default)")
    add_random(command)
    add_sharing(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="the sweep, JSON")


def _plot(adder: Any) -> None:
    command = new_command(
        adder,
        "plot",
        "draw a figure from a file",
        """heatmap and volcano take scores, layers a plan, coactivation and balance routing statistics,
        sweep a sweep, tokens no file but --model and --prompt.""",
    )
    command.add_argument(
        "kind", choices=Choices(lambda: _commands().PLOTS), metavar="KIND", help="which figure: %(choices)s"
    )
    command.add_argument("file", type=Path, nargs="?", metavar="FILE", help="what to draw")
    command.add_argument(
        "--plan", type=Path, action="append", metavar="FILE", help="heatmap: mark its experts; tokens: steer"
    )
    command.add_argument("--layer", type=whole, help="coactivation: which layer (default: the first)")
    command.add_argument("--prompt", metavar="TEXT", help="tokens: the prompt")
    command.add_argument("--model", help="tokens: the model")
    add_loading(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg")


def _explore(adder: Any) -> None:
    command = new_command(
        adder,
        "explore",
        "a page to look at the route of a text",
        """Write one HTML file that shows, in any browser and without a network, which experts each token of a
        text went to: the text in colours, beside layers × experts. With --plan the text runs a second time
        under the plan, and both runs stand side by side.""",
    )
    command.add_argument("model", metavar="MODEL", help="shipped or built model, folder, or name on the hub")
    add_loading(command)
    command.add_argument("--prompt", required=True, metavar="TEXT", help="the text")
    command.add_argument("--plan", type=Path, metavar="FILE", help="steering plan, from `moe-lens plan`")
    command.add_argument(
        "--scores", type=Path, metavar="FILE", help="scores of the experts, from `moe-lens detect`"
    )
    command.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="rates of the experts, from `moe-lens stats`; with the top "
        "tokens of each, if that ran with --vocabulary",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, .html")
