"""What if each chosen expert had been routed around? The loss change, exact and by a linear estimate.

    found = virtual_ablation(model, prompts)
    found.exact, found.estimate                 # [layer batch pos k], nats
    found.correlation                           # how well the estimate predicts the exact change

For every layer, token and chosen expert: the next-best expert takes its place at that token, with the weights
that the router's rule gives it, and the rest of the model runs on. Each exact change takes a forward (many at
a time, as rows of a batch); the estimates take one forward and one backward for all.
"""

from typing import Any, Final

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.attribution.ablation_runs import AblationBatch, next_token_loss
from moe_lens.attribution.equal_lengths import equal_length_batches, side_by_side
from moe_lens.attribution.results import VirtualAblation
from moe_lens.checks import chosen_layers, chosen_positions, whole_number
from moe_lens.errors import DataError, HookError, MoELensError
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.metric import TokenMetric, check_metric
from moe_lens.model.registration import running_of
from moe_lens.model.wrapper import Model
from moe_lens.shape import MoEShape
from moe_lens.text.batching import Prompts

_BATCH: Final = 8
"""Prompts at a time for the estimate, where no batch size is given."""

_FIELDS: Final = ("exact", "estimate", "indices", "replacement", "loss")


def virtual_ablation(
    model: Model,
    prompts: Prompts,
    metric: TokenMetric | None = None,
    *,
    exact: bool | int = True,
    layers: Any = None,
    positions: Any = None,
    batch_size: int | Any | None = None,
    reuse: bool = True,
    hooks: Hooks = (),
    progress: bool = True,
) -> VirtualAblation:
    """The loss change if each chosen expert were routed around at its token, exact and by linear estimate.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import virtual_ablation
    >>> model = organisms.load("specialised")
    >>> found = virtual_ablation(model, ["Question : what is the", "Document : the"], progress=False)
    >>> found.exact.shape, bool((found.replacement != found.indices)[:, 0].all())
    (torch.Size([4, 2, 6, 2]), True)
    >>> found = virtual_ablation(
    ...     model, ["Question : what is the", "Document : the"], positions=-1, progress=False)
    >>> int(found.is_exact.sum()), found.changes.shape       # 4 layers × 2 last tokens × 2 experts
    (16, torch.Size([4, 2, 6, 2]))

    The estimate is the gradient of the loss at the layer's routed output, times the exact change of that
    output (first-order, as in attribution patching, arXiv 2310.10348): it knows what the token's output loses
    and gains, and takes everything after it to be linear. Where an expert writes most of the residual stream
    (the norm's scale follows it) or a prediction is almost certain (the loss is flat), it can be far off:
    look at `rank_correlation`, and at `correlation` with and without the first token, before trusting it.
    (The first token is often an attention sink, whose effects dwarf all others.)

    Args:
        model: a HookedMoE or RoutedModel. Hooks that are on it act, too (steered logits, for one), but at
            the ablated token the route is the one that follows from the router logits.
        prompts: strings, chats or tokens; see `moe_lens.text.Prompts`. They run in batches of equal length,
            so no prompt's numbers depend on another.
        metric: (logits [batch pos d_vocab], tokens [batch pos]) -> [batch], each number from its own row;
            by default the mean cross-entropy of a prompt's tokens after the first, in nats.
        exact: whether to run the exact changes: layers × tokens × k runs in all. A number: only those whose
            estimates are largest. Elsewhere there is the estimate; `is_exact` says which is which.
        layers: where the exact changes are run: layer numbers (one, several, a range or a slice). None: all.
        positions: likewise, of each prompt's tokens; negative ones count from its end.
        batch_size: how many of those at a time. By default as many as memory seems to allow, fewer if it
            runs out.
        reuse: repeat nothing below a run's layer and before its token, where that is sound; see
            `patch_router`.
        hooks: forward hooks to run under; they act like those that are on the model.
        progress: show a progress bar of the exact changes, which tells the time left.

    Raises:
        MoELensError: every expert runs for every token (k = number of experts), or group limits leave no
            other expert.
        HookError: no layer's experts depend on its router logits.
        DataError: a metric that does not give a finite number a prompt; prompts of one token without a metric
            of your own; no prompts, or an empty one; layers or positions not there or named twice.
    """
    if batch_size is not None:
        batch_size = whole_number(batch_size, "batch_size", least=1)
    batches = equal_length_batches(model, prompts, batch_size or _BATCH)
    numbers = _ablatable(model)
    n_exact = _n_exact(exact, layers, positions)
    where = chosen_layers(layers, numbers)
    metric = next_token_loss if metric is None else metric
    check_metric(metric, "logits [batch pos d_vocab] and tokens [batch pos]")
    shortest = batches[0][1].shape[1]
    if metric is next_token_loss and shortest < 2:
        raise DataError("A prompt of one token has no next token to predict; give longer ones, or a metric.")
    selected = [_selected(numbers, where, positions, tokens, model.top_k) for _, tokens in batches]
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {name: [] for name in _FIELDS}
    runs = [AblationBatch(model, numbers, tokens, metric, reuse) for _, tokens in batches]
    n_runs = sum(int(each.sum()) for each in selected)
    n_runs = n_runs if n_exact is None else min(n_runs, n_exact)
    bar = tqdm(total=n_runs, desc="routing around", unit="run", disable=not (progress and n_runs))
    n_prompts = sum(len(rows) for rows, _ in batches)
    with model.hooks(hook_list(hooks)), bar:
        for (rows, _), batch, cells in zip(batches, runs, selected, strict=True):
            with running_of(model).of_prompts(rows, n_prompts):
                batch.run_estimate()
                if n_exact is None:
                    batch.run_exact(cells, batch_size, bar)
            if not n_exact:
                batch.others.clear()  # k times as large as what is kept
        if n_exact:  # which are the largest is known when all prompts have been estimated
            selected = _largest(selected, [batch.estimate for batch in runs], n_runs)
            for (rows, _), batch, cells in zip(batches, runs, selected, strict=True):
                with running_of(model).of_prompts(rows, n_prompts):
                    batch.run_exact(cells, batch_size, bar)
        for (rows, _), batch in zip(batches, runs, strict=True):
            for name in _FIELDS:
                if (value := getattr(batch, name)) is not None:
                    pieces[name].append((rows, value))
    whole = {name: _assembled(name, pieces[name]) for name in _FIELDS}
    shape = model.moe_shape
    return VirtualAblation(
        MoEShape(shape.model, tuple(numbers), shape.n_experts, shape.top_k),
        whole["exact"],
        *(_present(whole[name]) for name in ("estimate", "indices", "replacement", "loss")),
    )


def _n_exact(exact: Any, layers: Any, positions: Any) -> int | None:
    """How many exact changes to run at most; None: all that are selected."""
    if exact is True:
        return None
    if exact is not False:
        return whole_number(exact, "exact", least=1, remedy="True: all; False: estimates only.")
    if layers is not None or positions is not None:
        raise DataError("layers and positions say where exact changes are run, and exact=False runs none.")
    return 0


def _selected(
    numbers: list[int], where: list[int], positions: Any, tokens: Tensor, k: int
) -> Bool[Tensor, "layer batch pos k"]:
    """The cells of these layers and positions."""
    selected = torch.zeros(len(numbers), *tokens.shape, k, dtype=torch.bool)
    rows = torch.tensor([numbers.index(layer) for layer in where])
    columns = torch.tensor(chosen_positions(positions, tokens.shape[1]))
    selected[rows[:, None], :, columns] = True
    return selected


def _largest(selected: list[Tensor], estimates: list[Tensor], n_cells: int) -> list[Tensor]:
    """Of the selected cells of all batches those with the largest estimates."""
    sizes = [
        estimate.abs().masked_fill(~cells, -1).flatten()
        for cells, estimate in zip(selected, estimates, strict=True)
    ]
    kept = torch.zeros(sum(map(len, sizes)), dtype=torch.bool)
    kept[torch.cat(sizes).topk(n_cells).indices] = True
    parts = kept.split([len(size) for size in sizes])
    return [part.reshape(cells.shape) for part, cells in zip(parts, selected, strict=True)]


def _ablatable(model: Model) -> list[int]:
    """The layers whose tokens have a next-best expert."""
    layers = []
    for layer in model.moe_layers:
        rule = model.routing_rule(layer)
        if not rule.chooses_by_logits:
            continue
        reasons = (rule.cannot_steer([], [expert]) for expert in range(rule.n_experts))
        if (reason := next((reason for reason in reasons if reason is not None), None)) is not None:
            raise MoELensError(
                f"Layer {layer} of {model.moe_shape.model} has no expert to take another's place: {reason}. "
                "zero_ablate, which removes an expert's output, needs none."
            )
        layers.append(layer)
    if not layers:
        raise HookError(
            f"{model.moe_shape.model}: the experts of all layers come from tables by token id, so none can "
            "be routed around."
        )
    return layers


def _assembled(name: str, pieces: list[tuple[list[int], Tensor]]) -> Tensor | None:
    if not pieces:
        return None
    if name == "loss":
        return side_by_side(pieces, (0, None), torch.nan)
    return side_by_side(pieces, (1, 2), -1 if name in ("indices", "replacement") else torch.nan)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
