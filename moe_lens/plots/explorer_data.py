"""What the routing explorer shows, as numbers: runs of a text, scores and statistics, packed for a page.

    run = explored(record, "as trained", tokenizer=tokenizer)        # of a RouteRecord or PromptRouting
    content = page_content([run, other], scores=scores, stats=stats, plan=plan)        # JSON-like

No number is rounded: bfloat16 travels as bfloat16, float32 as float32, scores and rates as float64.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from moe_lens.checks import whole_number
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError
from moe_lens.shape import UNKNOWN_MODEL, MoEShape
from moe_lens.statistics.routes import PromptRouting, RouteRecord
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.statistics.vocabulary import top_tokens_of_all
from moe_lens.steering.plan import SteeringPlan
from moe_lens.text.pieces import token_texts

TOP_TOKENS: Final = 12
"""How many of an expert's top tokens a page holds."""


@dataclass(frozen=True, eq=False)
class ExploredRun:
    """The route of one text.

    Attributes:
        name: what the page calls the run.
        tokens: the text of each token; its number or its position where that is not known.
        first: the position of the first token in what was recorded.
        weights, entropy, margin: None where they were not recorded.
        notes: what a reader must know of this run.
    """

    name: str
    shape: MoEShape
    tokens: tuple[str, ...]
    indices: Integer[Tensor, "layer pos k"]
    weights: Float[Tensor, "layer pos k"] | None
    entropy: Float[Tensor, "layer pos"] | None = None
    margin: Float[Tensor, "layer pos"] | None = None
    first: int = 0
    notes: tuple[str, ...] = ()


def explored(
    result: PromptRouting | RouteRecord,
    name: str,
    *,
    tokenizer: Any = None,
    row: int = 0,
    columns: Any = None,
) -> ExploredRun:
    """The part of a result that is looked at: of a record one row, without its padding.

    Args:
        tokenizer: gives a record's tokens their texts.
        row: which prompt of a record.
        columns: which positions; None: all but padding.

    Raises:
        DataError: a route without tokens, no such row, no position, a step other than 1, a tokenizer that
            does not know a token.
    """
    if not result.indices.shape[-2]:
        raise DataError(f"The run {name!r} has no token to show; give a prompt of at least one.")
    if isinstance(result, RouteRecord):
        return _of_record(result, name, tokenizer, row, columns)
    whole_number(row, "row", most=0, remedy="A PromptRouting is of one prompt.")
    shown = _between(columns, len(result.tokens))
    entropy, margin = (None if part is None else part[:, shown] for part in (result.entropy, result.margin))
    tokens, indices, weights = result.tokens[shown], result.indices[:, shown], result.weights[:, shown]
    return ExploredRun(name, result.shape, tokens, indices, weights, entropy, margin, first=shown.start)


def _of_record(record: RouteRecord, name: str, tokenizer: Any, row: int, columns: Any) -> ExploredRun:
    _, n_rows, n_columns, _ = record.indices.shape
    place = whole_number(row, "row", most=n_rows - 1, remedy=f"The record is of {n_rows} prompts.")
    shown, notes = _between(columns, n_columns), []
    ids = None if record.tokens is None else record.tokens[place].tolist()
    if columns is None:
        shown, notes = _without_padding(ids, n_columns, n_rows, tokenizer)
    if ids is None:
        texts = [str(position) for position in range(shown.start, shown.stop)]
        notes.append("The record does not hold its tokens; their positions are shown.")
    elif tokenizer is None:
        texts = [f"[{token}]" for token in ids[shown]]
        notes.append("Token numbers are shown; give explore the tokenizer for texts.")
    else:
        texts = _texts(tokenizer, ids[shown])
    weights = None if record.weights is None else record.weights[:, place, shown].detach().cpu()
    # positions count from where the prompt begins
    first = shown.start if columns is not None or ids is None else 0
    return ExploredRun(
        name, record.shape, tuple(texts), record.indices[:, place, shown], weights, first=first,
        notes=tuple(notes),
    )  # fmt: skip


def _between(columns: Any, n: int) -> slice:
    if columns is None:
        return slice(0, n)
    if not isinstance(columns, slice) or columns.step not in (None, 1):
        raise DataError(f"columns must be a slice of consecutive positions; got {columns!r}.")
    try:
        start, stop, _ = columns.indices(n)
    except TypeError as error:
        raise DataError(f"columns must be a slice of whole numbers; got {columns!r}.") from error
    if start >= stop:
        raise DataError(f"columns={columns!r} selects none of {n} positions.")
    return slice(start, stop)


def _without_padding(
    ids: list[int] | None, n_columns: int, n_rows: int, tokenizer: Any
) -> tuple[slice, list[str]]:
    """The columns between padding, and what to say of those left out or in doubt.

    A token that pads may also open or end texts. A text may begin with the BOS and end with the EOS, so only
    what can be nothing else is left out.
    """
    doubt = "Columns of padding, if there are any, are shown like tokens; name the prompt's own by columns=."
    pad, bos, eos = (
        getattr(tokenizer, f"{name}_token_id", None) if tokenizer is not None else None
        for name in ("pad", "bos", "eos")
    )
    if ids is None or pad is None:
        return slice(0, n_columns), [doubt] if n_rows > 1 else []
    places = [place for place, token in enumerate(ids) if token != pad]
    if not places:
        return slice(0, n_columns), [doubt]
    start, stop = places[0], places[-1] + 1
    notes = []
    if (pad == bos and start > 1) or (pad in (bos, eos) and n_columns - stop > 1):
        notes.append(doubt)
    start = 0 if pad == bos else start
    stop = n_columns if pad in (bos, eos) else stop
    if left_out := n_columns - (stop - start):
        notes.append(f"{left_out} columns of padding are left out.")
    return slice(start, stop), notes


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    try:
        return token_texts(tokenizer, ids)
    except (TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
        raise DataError(f"The tokenizer cannot write the tokens of this record: {error!r}.") from error


def page_content(
    runs: Sequence[ExploredRun],
    *,
    scores: ExpertScores | None = None,
    stats: RoutingStats | None = None,
    plan: SteeringPlan | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Everything that the page shows, for JSON; tensors as base64.

    Raises:
        DataError: things that are not about the same model; two runs whose texts begin differently.
        PlanError: a plan that does not fit the model.
    """
    shape = runs[0].shape
    for run in runs[1:]:
        check_about(f"The run {run.name!r}", run.shape, shape)
        if run.shape.layers != shape.layers:
            raise DataError(f"The runs have different layers: {shape.layers} and {run.shape.layers}.")
    for what, given in (("The scores", scores), ("The statistics", stats)):
        if given is not None:
            check_about(what, given.shape, shape)
    if plan is not None:
        plan.check_fits(shape)
    return {
        "model": "" if shape.model == UNKNOWN_MODEL else shape.model,
        "layers": list(shape.layers),
        "n_experts": shape.n_experts,
        "top_k": shape.top_k,
        "runs": [_run_content(run) for run in runs],
        "n_shared": _n_shared(runs),
        "notes": list(dict.fromkeys(note for run in runs for note in run.notes)),
        "scores": None if scores is None else _scores_content(scores, shape),
        "stats": None if stats is None else _stats_content(stats, shape, tokenizer),
        "plan": None if plan is None else _plan_content(plan, shape),
    }


def check_about(what: str, shape: MoEShape, of_run: MoEShape) -> None:
    """Raise DataError unless something is about the model of a run, as far as both know it."""
    unknown = UNKNOWN_MODEL in (shape.model, of_run.model)
    layers = shape.layers if set(shape.layers) & set(of_run.layers) else of_run.layers
    same = MoEShape(of_run.model if unknown else shape.model, layers, shape.n_experts, shape.top_k)
    differences = same.differences(MoEShape(of_run.model, layers, of_run.n_experts, of_run.top_k))
    if not set(shape.layers) & set(of_run.layers):
        differences.append(f"layers {shape.layers} / {of_run.layers}")
    if differences:
        raise DataError(f"{what} and the run are of different models: {'; '.join(differences)}.")


def _n_shared(runs: Sequence[ExploredRun]) -> int:
    """How many tokens, from the first on, all runs have in common: only these are compared."""
    if len(runs) == 1:
        return len(runs[0].tokens)
    n = 0
    for texts in zip(*(run.tokens for run in runs), strict=False):
        if len(set(texts)) > 1:
            break
        n += 1
    if not n or len({run.first for run in runs}) > 1:
        raise DataError(
            f"The runs begin with {runs[0].tokens[0]!r} at position {runs[0].first} and with "
            f"{runs[1].tokens[0]!r} at {runs[1].first}, so no token can be compared; give runs of one text "
            "(and the tokenizer=)."
        )
    return n


def _run_content(run: ExploredRun) -> dict[str, Any]:
    parts = {"indices": run.indices, "weights": run.weights, "entropy": run.entropy, "margin": run.margin}
    tensors = {name: None if part is None else packed(part) for name, part in parts.items()}
    return {"name": run.name, "tokens": list(run.tokens), "first": run.first, **tensors}


def packed(tensor: Tensor) -> dict[str, Any]:
    """A tensor as base64 of little-endian numbers, in the smallest dtype that holds every one of them."""
    values = tensor.detach().cpu()
    if not values.is_floating_point():
        largest = int(values.max()) if values.numel() else 0
        dtype = "u1" if largest < 2**8 else "u2" if largest < 2**16 else "u4"
        numbers = values.numpy().astype(f"<{dtype}")
    elif values.dtype == torch.float64:
        dtype, numbers = "f8", values.numpy().astype("<f8")
    elif torch.equal(values.bfloat16().float().nan_to_num(0.5), values.float().nan_to_num(0.5)):
        dtype, numbers = "bf2", values.bfloat16().contiguous().view(torch.int16).numpy().astype("<i2")
    else:
        dtype, numbers = "f4", values.float().numpy().astype("<f4")
    data = base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()
    return {"dtype": dtype, "shape": list(values.shape), "data": data}


def _by_layer(values: Float[Tensor, "layer expert"], shape: MoEShape, of_run: MoEShape) -> dict[str, Any]:
    """Numbers of every expert of the run's layers; NaN in layers that have none."""
    table = torch.full((len(of_run.layers), of_run.n_experts), torch.nan, dtype=torch.float64)
    for row, layer in enumerate(of_run.layers):
        if layer in shape.layers:
            table[row] = values[shape.layers.index(layer)].double()
    return packed(table)


def _scores_content(scores: ExpertScores, of_run: MoEShape) -> dict[str, Any]:
    tensors = {"delta": scores.delta, **(scores.evidence.tensors() if scores.evidence else {})}
    rates = {"rate_1": scores.stats_1.rates, "rate_2": scores.stats_2.rates}
    return {
        "name": scores.score,
        "label": scores.label,
        "level": scores.evidence.level if scores.evidence else None,
        "n_tokens": [scores.stats_1.n_tokens, scores.stats_2.n_tokens],
        **{name: _by_layer(values, scores.shape, of_run) for name, values in {**tensors, **rates}.items()},
    }


def _stats_content(stats: RoutingStats, of_run: MoEShape, tokenizer: Any) -> dict[str, Any]:
    content = {
        "n_tokens": stats.n_tokens,
        "rate": _by_layer(stats.rates, stats.shape, of_run),
        "weight": _by_layer(stats.mean_weight_when_chosen, stats.shape, of_run),
        "top": None,
    }
    if stats.vocabulary is None:
        return content
    content["top"] = _top_tokens(stats, of_run, tokenizer)
    return content


def _top_tokens(stats: RoutingStats, of_run: MoEShape, tokenizer: Any) -> dict[str, Any]:
    """One entry a token and expert, by expert; an expert is row × n_experts + its number, a text a place."""
    table = top_tokens_of_all(stats, TOP_TOKENS)
    rows = {layer: row for row, layer in enumerate(of_run.layers)}
    row = np.array([rows.get(layer, -1) for layer in stats.shape.layers])[table["row"]]
    ids, text = np.unique(table["token"], return_inverse=True)
    columns = {**table, "expert": row * of_run.n_experts + table["expert"], "text": text}
    kept = {
        name: packed(torch.from_numpy(columns[name][row >= 0]))
        for name in ("expert", "text", "count", "total", "lift")
    }
    if tokenizer is None:
        return {"texts": [f"[{token}]" for token in ids], **kept}
    return {"texts": [_texts(tokenizer, [int(token)])[0] for token in ids], **kept}


def _plan_content(plan: SteeringPlan, of_run: MoEShape) -> dict[str, list[list[int]]]:
    """(row, expert) of what the plan names; deactivation wins, as it does when the plan is carried out."""
    off = sorted(set(plan.deactivate))
    on = sorted(set(plan.activate) - set(off))
    rows = {layer: row for row, layer in enumerate(of_run.layers)}
    return {
        name: [[rows[layer], expert] for layer, expert in experts]
        for name, experts in (("activate", on), ("deactivate", off))
    }
