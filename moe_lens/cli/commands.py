"""What each command of `moe-lens` does: files in, files out. parser.py has the arguments and the help.

The rooms are imported lazily, so that a command loads what it uses: plans and figures need no model library.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lens import detection, engines, evaluation, organisms, plots, statistics, steering, text
from moe_lens.cli.loading import Options, load_model, one_thread, weights_digest, wrapper_of
from moe_lens.errors import DataError, MoELensError
from moe_lens.files import atomic_write, check_writable, digest_of_file


def stats(options: Options) -> None:
    """Count the routing of a file of prompts into a file; goes on where it was interrupted."""
    _check_stats(options)
    if options.merge is not None:
        counted = engines.merge_distributed(options.merge, job=options.job)
    else:
        counted = _counted(options)
    if _speaks(options):
        print(f"{counted}\n{counted.load_balance().to_dataframe().round(3).to_string(index=False)}")
    if options.out is not None:
        counted.save(options.out)
        if _speaks(options):
            _wrote(options.out)


def _check_stats(options: Options) -> None:
    """Raise DataError for options of `stats` that do not go together, before anything runs."""
    given = [name for name in ("model", "prompts", "folder") if getattr(options, name) is not None]
    if options.merge is not None and given:
        raise DataError(f"--merge takes unit files alone; leave out {', '.join(given)}.")
    if options.merge is None and (options.model is None or options.prompts is None):
        raise DataError("stats needs MODEL and PROMPTS, or --merge FOLDER.")
    if options.merge is None and options.job is not None:
        raise DataError("--job says which job of --merge FOLDER is meant; give that, too.")
    if options.folder is None and options.out is None:
        raise DataError("stats needs --out FILE for its result (with --folder it may be left out).")
    _check_unit(options)
    if options.out is not None:
        check_writable(options.out)


def _counted(options: Options) -> Any:
    settings: dict[str, Any] = {
        "batch_size": options.batch_size,
        "batch_tokens": options.batch_tokens,
        "span": options.span or "all",
        "special_tokens": options.special_tokens,
        "per_prompt": options.per_prompt,
        "positions": options.positions,
        "vocabulary": options.vocabulary,
        "outputs": options.outputs,
    }
    prompts = text.read_prompts(options.prompts, column=options.column)
    shared = _shared(options)
    model = load_model(options)
    if shared:
        return engines.collect_distributed(model, prompts, **shared, **settings)
    about = (
        f"{weights_digest(model)} {model.moe_shape} {digest_of_file(options.prompts)} {options.column} "
        f"{model.prepend_bos}"
    )
    return statistics.collect_to_file(model, prompts, options.out, about=about, **settings)


def _check_unit(options: Options) -> None:
    if options.folder is None and options.unit is not None:
        raise DataError("--unit is about the files in --folder; give that, too.")


def _shared(options: Options) -> dict[str, Any]:
    """What functions that share their work through --folder are told of it; empty: one process does all.

    Called before the model is loaded, since each process gets a device of its own here.
    """
    _check_unit(options)
    if options.folder is None:
        return {}
    _own_device(options)
    return {"folder": options.folder, **({} if options.unit is None else {"unit": options.unit})}


def _speaks(options: Options) -> bool:
    """Whether this process prints: of those that a launcher started to share a folder, the first alone."""
    from moe_lens.engines.counting_together import is_first

    return options.folder is None or is_first()


def _own_device(options: Options) -> None:
    """Give each process of a launcher a GPU of its own, where no single one is named."""
    import torch

    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    is_free = options.device in (None, "cuda") and options.device_map is None
    if local is not None and is_free and torch.cuda.is_available():
        options.device = f"cuda:{int(local) % torch.cuda.device_count()}"


def detect(options: Options) -> None:
    """Score every expert on a file of pairs."""
    pairs = _pairs(options)
    if not options.top:
        raise DataError("--top must be at least 1.")
    check_writable(options.out)
    shared = _shared(options)
    scores = (engines.detect_distributed if shared else detection.detect)(
        load_model(options),
        pairs,
        **shared,
        score=options.score,
        span=options.span or "pairs",
        seed=options.seed,
        special_tokens=options.special_tokens,
        level=options.level,
        n_resamples=options.resamples,
        n_permutations=options.permutations,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
    )
    scores.save(options.out)
    written = [options.out]
    if options.table is not None:
        with atomic_write(options.table) as temporary:
            scores.to_dataframe().to_csv(temporary, index=False)
        written.append(options.table)
    if not _speaks(options):
        return
    print(f"{scores}\n{scores.to_dataframe().head(options.top).round(4).to_string(index=False)}")
    print(detection.selection_stability(scores, n=min(options.top, scores.delta.numel())))
    if len(set(pairs.templates)) > 1:
        agreement = detection.template_agreement(scores).round(2)
        print(f"rank correlation between templates:\n{agreement.to_string()}")
    _wrote(*written)


def plan(options: Options) -> None:
    """Choose a plan from scores or from a published ranking."""
    numbers = {"n_activate": options.activate, "n_deactivate": options.deactivate}
    common = {"epsilon": options.epsilon, "on_excess": options.on_excess}
    if options.q is None and not any(numbers.values()):
        raise DataError("The plan names no expert; ask for some with --activate, --deactivate or --q.")
    if options.steermoe:
        if options.q is not None:
            raise DataError("--q needs q-values, which published rankings do not have; give numbers only.")
        shape = None if options.model is None else load_model(options).moe_shape
        if options.moe_layers and shape is None:
            raise DataError("--moe-layers needs --model, whose MoE layers are meant.")
        layers = shape.layers if shape is not None and options.moe_layers else None
        ranking = steering.read_published_ranking(options.scores, shape=shape, layers=layers)
        if "all" in numbers.values():
            raise DataError("A published ranking needs numbers for --activate and --deactivate.")
        given = {name: number or 0 for name, number in numbers.items()}
        chosen = ranking.plan(**given, opposite=options.opposite, **common)
    else:
        scores = detection.ExpertScores.load(options.scores)
        scores = -scores if options.opposite else scores
        chosen = steering.SteeringPlan.from_scores(scores, **numbers, q=options.q, **common)
    if not len(chosen):
        raise DataError("The plan names no expert: none has such a q-value, and the sign that was asked for.")
    chosen.save(options.out)
    print(f"{len(chosen.activate)} experts activated, {len(chosen.deactivate)} deactivated")
    _wrote(options.out)


def steer(options: Options) -> None:
    """Continue a prompt with and without a plan."""
    import torch
    from tqdm.auto import tqdm

    if (options.prompt is None) == (options.prompts is None):
        raise DataError("Give the prompts either as --prompt TEXT (repeatable) or as --prompts FILE.")
    prompts = options.prompt or text.read_prompts(options.prompts, column=options.column)
    if not options.max_new_tokens:
        raise DataError("--max-new-tokens must be at least 1.")
    model, chosen = load_model(options), steering.SteeringPlan.load(options.plan)
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "verbose": False}
    rows = []
    for index, prompt in enumerate(tqdm(prompts, desc="generating", unit="prompt")):
        tokens, _ = next(iter(text.padded_batches(model, [prompt], 1)))
        texts = {}
        for name, hooks in (("unsteered", []), ("steered", steering.steer_hooks(chosen))):
            with model.hooks(fwd_hooks=hooks), torch.no_grad():
                output: Any = model.generate(tokens, return_type="tokens", **settings)
            texts[name] = model.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
        rows.append({"index": index, "prompt": model.tokenizer.decode(tokens[0]), **texts})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if options.out is None:
        print("\n".join(lines))
        return
    with atomic_write(options.out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _wrote(options.out)


def evaluate(options: Options) -> None:
    """Hold a plan against random experts."""
    load = steering.SteeringPlan.load
    reverse = None if options.reverse is None else load(options.reverse)
    scores = None if options.scores is None else detection.ExpertScores.load(options.scores)
    task, chosen, shared = _task(options), load(options.plan), _shared(options)
    report = (engines.evaluate_distributed if shared else evaluation.evaluate_steering)(
        load_model(options),
        chosen,
        task,
        **shared,
        reverse=reverse,
        scores=scores,
        n_random=options.n_random,
        seed=options.seed,
        alpha=options.alpha,
    )
    _finish(report, options)


def _task(options: Options) -> Any:
    """What TASK names: a file, or a benchmark of the harness."""
    settings = {name: getattr(options, name) for name in _OF_THE_HARNESS}
    if not options.harness:
        if given := [name for name, value in settings.items() if value is not None]:
            raise DataError(f"--{given[0].replace('_', '-')} is for benchmarks; give --harness, too.")
        return evaluation.load_task(options.task, measure=options.measure)
    if options.measure is not None:
        raise DataError("--measure is for a TASK in JSON; a benchmark has a --metric.")
    chat, n_tokens = bool(settings.pop("chat")), settings.pop("max_gen_toks")
    writing = None if n_tokens is None else {"max_gen_toks": n_tokens}
    return engines.harness_task(str(options.task), apply_chat_template=chat, gen_kwargs=writing, **settings)


_OF_THE_HARNESS = ("metric", "filter", "include_path", "data", "clusters", "limit", "chat", "max_gen_toks")


def sweep(options: Options) -> None:
    """Evaluate plans of several sizes."""
    scores = detection.ExpertScores.load(options.scores)
    task, shared = _task(options), _shared(options)
    result = (engines.sweep_distributed if shared else evaluation.sweep)(
        load_model(options),
        scores,
        task,
        **shared,
        sizes=options.sizes,
        n_random=options.n_random,
        seed=options.seed,
    )
    _finish(result, options)


def _finish(result: Any, options: Options) -> None:
    """Print a result, and save it where --out says so."""
    if _speaks(options):
        print(result)
    if options.out is not None:
        result.save(options.out)
        if _speaks(options):
            _wrote(options.out)


def plot(options: Options) -> None:
    """Draw a result."""
    _draw_into_files()
    plots.save(PLOTS[options.kind](options), options.out)
    _wrote(options.out)


def explore(options: Options) -> None:
    """Write a page about the route of a text."""
    check_writable(options.out)
    given: dict[str, Any] = {
        name: kind.load(path)
        for name, kind in (
            ("plan", steering.SteeringPlan),
            ("scores", detection.ExpertScores),
            ("stats", statistics.RoutingStats),
        )
        if (path := getattr(options, name)) is not None
    }
    page = plots.explore(load_model(options), options.prompt, **given)
    page.save(options.out)
    print(page)
    _wrote(options.out)


def demo(options: Options) -> None:
    """Run the main job on shipped models: print its tables and verdicts, write reports and figures."""
    from moe_lens.organisms import demo as organisms_demo

    _draw_into_files()
    one_thread()
    names = options.model or organisms.names()
    for name in names:
        organisms.path(name)  # a wrong name fails before the first minute of work
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoELensError(f"{options.out} cannot be made a folder ({error}); give another --out.") from error
    kind = wrapper_of(options)
    results = [organisms_demo.run_demo(name, wrapper=kind, seed=options.seed) for name in names]
    words = f"{organisms_demo.table(results)}\n\n{organisms_demo.LEGEND}\n"
    print(f"\n{words}")
    (options.out / "table.md").write_text(words, encoding="utf-8")
    written = [options.out / "table.md"]
    for result in results:
        named = {f"toward {result.aims[side]}": plan for side, plan in result.plans.items()}
        written.append(options.out / f"experts-{result.name}.png")
        plots.save(plots.expert_heat_map(result.scores, named), written[-1])
    for task in dict.fromkeys(result.report.task for result in results):  # a figure has one behaviour
        of_task = {result.name: result.report for result in results if result.report.task == task}
        file = "rates-candour.png" if task == organisms_demo.CANDOUR else "rates.png"
        written.append(options.out / file)
        plots.save(plots.steering_rates(of_task), written[-1])
    _wrote(*written)


def organism(options: Options) -> None:
    """Build an organism that does not ship, or go on with its build."""
    folder = organisms.build(options.name)
    print((folder / "README.md").read_text(encoding="utf-8"))
    print(f"{options.name} is in {folder}; give its name as MODEL, or to moe_lens.organisms.load.")


def models(options: Options) -> None:
    """Print the table of supported models, or write it into a README."""
    from moe_lens.routers.models import markdown_table, with_table

    if options.readme is None:
        print(markdown_table(), end="")
        return
    try:
        page = options.readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoELensError(f"{options.readme} cannot be read ({error}); give another --readme.") from error
    new = with_table(page)
    with atomic_write(options.readme) as temporary:
        temporary.write_text(new, encoding="utf-8")


def _pairs(options: Options) -> Any:
    """The file's pairs; where it has columns "cluster" and "template", they are that without being named."""
    from moe_lens.text.rows import csv_rows, ending, jsonl_rows

    is_csv = ending(options.pairs, "pairs", (".jsonl", ".csv")) == ".csv"
    rows = (csv_rows if is_csv else jsonl_rows)(options.pairs)
    columns = {name: getattr(options, name) for name in ("first", "second", "cluster", "template")}
    for name in ("cluster", "template"):
        if columns[name] is None and any(name in row for _, row in rows):
            columns[name] = name
    given = {name: column for name, column in columns.items() if column is not None}
    read = text.ContrastivePairs.from_csv if is_csv else text.ContrastivePairs.from_jsonl
    return read(options.pairs, **given)


def _draw_into_files() -> None:
    import matplotlib as mpl

    mpl.use("Agg")  # no window


def _file(options: Options) -> Path:
    if options.file is None:
        raise DataError(f"plot {options.kind} needs a FILE to draw.")
    return options.file


def _scores(options: Options) -> Any:
    return detection.ExpertScores.load(_file(options))


def _stats(options: Options) -> Any:
    return statistics.RoutingStats.load(_file(options))


def _heat_map(options: Options) -> Any:
    named = {path.stem: steering.SteeringPlan.load(path) for path in options.plan or []}
    return plots.expert_heat_map(_scores(options), named)


def _tokens(options: Options) -> Any:
    if options.prompt is None or options.model is None:
        raise DataError("plot tokens needs --model MODEL and --prompt TEXT.")
    plans = [steering.SteeringPlan.load(path) for path in options.plan or []]
    hooks = [hook for plan in plans for hook in steering.steer_hooks(plan)]
    return plots.token_routing(statistics.route_prompt(load_model(options), options.prompt, hooks=hooks))


def _coactivation(options: Options) -> Any:
    counted = _stats(options)
    layer = counted.shape.layers[0] if options.layer is None else options.layer
    return plots.coactivation_matrix(counted, layer)


PLOTS: dict[str, Callable[[Options], Any]] = {
    "heatmap": _heat_map,
    "volcano": lambda options: plots.volcano(_scores(options)),
    "layers": lambda options: plots.selected_by_layer(steering.SteeringPlan.load(_file(options))),
    "coactivation": _coactivation,
    "balance": lambda options: plots.load_balance(_stats(options).load_balance()),
    "tokens": _tokens,
    "sweep": lambda options: plots.sweep_curves(evaluation.SweepResult.load(_file(options))),
}
"""Kind of figure -> how it is drawn."""


def _wrote(*paths: Path) -> None:
    print("wrote " + ", ".join(str(path) for path in paths))
