"""The command `moe-lens`: a thin shell over the library.

moe-lens demo                                   the whole ladder of organisms
moe-lens demo --model specialised --out figures --seed 1
moe-lens models                                 the table of supported models
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch

from moe_lens import demo, organisms, plots
from moe_lens.errors import MoELensError
from moe_lens.files import atomic_write
from moe_lens.model_table import markdown_table, with_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after an error that the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except MoELensError as error:
        print(f"moe-lens: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-lens", description="Mechanistic interpretability of Mixture-of-Experts language models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "demo",
        help="measure, detect and steer a small trained model, beside its controls",
        description="On each organism (a small trained model that ships with the package): find the experts "
        "that run more often with a document than without, choose the plan's size on development questions, "
        "steer toward the document and toward memory on test questions, and hold the effect against random "
        "experts. Prints a table and writes figures.",
    )
    command.add_argument(
        "--model", action="append", metavar="NAME", help="an organism; repeat for several (default: all)"
    )
    command.add_argument(
        "--out", type=Path, default=Path("moe-lens-demo"), help="folder (default: %(default)s)"
    )
    command.add_argument("--seed", type=_seed, default=0, help="of random sets and bootstrap (default: 0)")
    command.set_defaults(run=_demo)
    command = commands.add_parser(
        "models",
        help="print the table of supported models",
        description="Print, as Markdown, every Hugging Face architecture that moe_lens supports: its router, "
        "the routing rule, where k comes from, special cases, and what is refused.",
    )
    command.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="write the table into this file instead, between its marks",
    )
    command.set_defaults(run=_models)
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _demo(options: argparse.Namespace) -> None:
    mpl.use("Agg")  # files only, no window
    torch.set_num_threads(1)  # for models this small, threads mostly wait for each other
    names = options.model or organisms.names()
    for name in names:
        organisms.path(name)  # a wrong name fails before the first minute of work
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoELensError(f"{options.out} cannot be made a folder ({error}); give another --out.") from error
    results = [demo.run_demo(name, seed=options.seed) for name in names]
    text = f"{demo.table(results)}\n\n{demo.LEGEND}\n"
    print(f"\n{text}")
    (options.out / "table.md").write_text(text, encoding="utf-8")
    written = [options.out / "table.md"]
    for result in results:
        labels = {"+": "deactivated toward the document", "−": "deactivated toward memory"}
        plans = {labels[direction]: plan for direction, plan in result.plans.items()}
        written.append(options.out / f"experts-{result.name}.png")
        plots.save(plots.expert_heat_map(result.scores, plans), written[-1])
    written.append(options.out / "rates.png")
    plots.save(plots.steering_rates(results), written[-1])
    print("wrote " + ", ".join(str(path) for path in written))


def _models(options: argparse.Namespace) -> None:
    if options.readme is None:
        print(markdown_table(), end="")
        return
    try:
        text = options.readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoELensError(f"{options.readme} cannot be read ({error}); give another --readme.") from error
    new = with_table(text)
    with atomic_write(options.readme) as temporary:
        temporary.write_text(new, encoding="utf-8")
