"""Many runs of the same tokens in one forward, each with its own edit: their batches stacked as rows.

    runs = StackedRuns(model, tokens, attention_mask, metric, axis="position", batch_size=None)
    values = runs.sweep(cells, hooks_for)      # one number a cell, in the cells' order

Run i of a forward has the rows i * batch to (i + 1) * batch. Nothing in a causal language model mixes rows,
so a run gives what it would give alone, up to rounding in larger matrix products. Nor does an edit change
what is below its layer or before its position, so with reuse that is not computed again
(`model.edited_runs`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.checks import whole_number
from moe_lens.encoding import without_numpy
from moe_lens.errors import DataError
from moe_lens.hook_names import HookList, Hooks, hook_list
from moe_lens.model.edited_runs import MOST_TOKENS, EditedRuns
from moe_lens.model.hf_models import original_model
from moe_lens.model.metric import Metric, check_metric
from moe_lens.model.registration import routing_layers, running_of
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.text.batching import token_sequences
from moe_lens.text.token_rows import as_they_stand


class Cell(NamedTuple):
    """One run: an entry of the map that a sweep fills."""

    layer: int
    entry: int
    """The position or expert."""
    start: int = 0
    """The first position that the edit can change."""


class Places(NamedTuple):
    """The runs of one forward that edit one layer."""

    runs: Int[Tensor, "cell"]
    """Their numbers in the forward."""
    entries: Int[Tensor, "cell"]
    """Their positions or experts."""


def by_layer(cells: Sequence[Cell]) -> dict[int, Places]:
    """Layer -> which runs of a forward edit it.

    >>> by_layer([Cell(0, 5), Cell(1, 0), Cell(1, 2)])[1].runs
    tensor([1, 2])
    """
    edits: dict[int, list[tuple[int, int]]] = {}
    for run, cell in enumerate(cells):
        edits.setdefault(cell.layer, []).append((run, cell.entry))
    return {layer: Places(*torch.tensor(of_layer).unbind(1)) for layer, of_layer in edits.items()}


@dataclass(frozen=True, eq=False)
class StackedRuns:
    """What all runs of a sweep share.

    Attributes:
        tokens: of one run.
        attention_mask: of one run, 0 on padding; None without padding.
        metric: logits of one run -> a number.
        axis: "position" or "expert", for messages.
        batch_size: runs in one forward; None for as many as memory allows.
        hooks: forward hooks under which every run takes place.
        progress: show a progress bar, whose unit is a run.
        reuse: repeat nothing below an edit's layer and before its position.
    """

    model: Model
    tokens: Int[Tensor, "batch pos"]
    attention_mask: Tensor | None
    metric: Metric
    axis: str
    batch_size: int | None = None
    hooks: HookList = field(default_factory=list)
    progress: bool = False
    reuse: bool = True

    def sweep(
        self, cells: Sequence[Cell], hooks_for: Callable[[Sequence[Cell], int], HookList]
    ) -> list[float]:
        """The metric of every cell's run.

        Args:
            hooks_for: gives the hooks of a forward that stacks some cells and begins at a column.
        """
        if not cells:
            return []
        batch = torch.arange(len(self.tokens))
        runs = EditedRuns(
            self.model,
            self.tokens,
            self.attention_mask,
            cells,
            lambda some: batch.repeat(len(some)),
            hooks_for,
            reuse=self.reuse,
            hooks=self.hooks,
        )
        size = self.batch_size or runs.together(runs_that_fit(self.model, self.tokens))
        with tqdm(total=len(cells), desc="patching", unit="patch", disable=not self.progress) as bar:
            return runs.sweep(size, self._measured, shrinks=self.batch_size is None, bar=bar)

    @torch.no_grad()
    def unpatched(self, hooks: HookList) -> float:
        """The metric of a run without a patch, under `hooks`."""
        kwargs = {} if self.attention_mask is None else {"attention_mask": self.attention_mask}
        rows = torch.arange(len(self.tokens))
        with running_of(self.model).of_prompts(rows, len(rows)), self.model.hooks([*self.hooks, *hooks]):
            return self._measure(self.model(self.tokens, **kwargs), None)

    def _measured(self, logits: Float[Tensor, "row pos d_vocab"], cells: Sequence[Cell]) -> list[float]:
        by_run = logits.unflatten(0, (len(cells), -1)).unbind(0)
        return [self._measure(logits, cell) for logits, cell in zip(by_run, cells, strict=True)]

    def _measure(self, logits: Float[Tensor, "batch pos d_vocab"], cell: Cell | None) -> float:
        value = self.metric(logits)
        try:
            number = torch.as_tensor(value).detach()
        except (TypeError, ValueError, RuntimeError):
            number = torch.empty(0)
        if number.numel() != 1 or number.is_complex():
            got = f"a tensor of shape {tuple(number.shape)}" if isinstance(value, Tensor) else repr(value)
            raise DataError(
                "The metric must turn logits [batch pos d_vocab] into one real number; it gave "
                f"{got}. Average over the batch, for example: return (...).mean()."
            )
        measured = float(number)
        if math.isnan(measured):
            where = f"with the patch at layer {cell.layer}, {self.axis} {cell.entry}" if cell else "unpatched"
            raise DataError(
                f"The metric gave NaN on the corrupted run, {where}. Look for a logarithm of 0, a division "
                "by 0, or logits that are NaN."
            )
        return measured


def runs_that_fit(model: Model, tokens: Int[Tensor, "batch pos"]) -> int:
    """How many runs of these tokens one forward can hold, by a cautious estimate: at least 1."""
    free = 0.5 * available_memory(tokens.device)
    n_tokens = min(free / bytes_a_token(model, tokens.shape[1]), MOST_TOKENS.get(tokens.device.type, 2**13))
    return max(1, int(n_tokens / tokens.numel()))


def available_memory(device: torch.device) -> int:
    """Bytes that tensors on a device can still take."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def bytes_a_token(model: Model, n_pos: int) -> int:
    """Roughly what a token takes in a forward: logits, KV cache, and what one layer holds at a time."""
    cfg, moe = model.cfg, next(iter(routing_layers(model).values()))
    hf_model = original_model(model)
    dtype = next(hf_model.parameters()).dtype
    d_model, d_mlp = cfg.d_model, getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    n_run = model.n_experts if moe.row.experts.weights_on_input else model.top_k  # Llama 4 runs all experts
    experts = n_run * (3 * d_mlp + 4 * d_model)
    if "batched_mm" in hf_model.get_experts_implementation().values():
        experts += n_run * 3 * d_mlp * d_model  # it copies the weights of every chosen expert
    attention = 3 * (getattr(cfg, "n_heads", None) or 0) * n_pos
    numbers = 3 * cfg.d_vocab + 2 * cfg.n_layers * d_model + experts + attention + 12 * d_model
    return numbers * max(4, dtype.itemsize)


def checked_runs(
    model: Any,
    tokens: Any,
    attention_mask: Any,
    metric: Any,
    axis: str,
    batch_size: Any,
    hooks: Hooks,
    progress: bool,
    reuse: Any = True,
) -> StackedRuns:
    """A user's arguments, checked; strings become tokens.

    Raises:
        DataError: prompts of unequal lengths, a mask of another shape, a metric that cannot be called, a
            batch_size below 1, or as in `token_sequences`.
        MoELensError: not a model with hook points.
    """
    check_hooked(model)
    check_metric(metric)
    size = batch_size
    if size is not None:
        size = whole_number(size, "batch_size", least=1, remedy="It is a number of patches; None: what fits.")
    tokens = without_numpy(tokens)
    if attention_mask is not None:  # then tokens run as they stand, column by column: it says what is padding
        if isinstance(tokens, Tensor) and tokens.ndim in (1, 2):
            tokens = as_they_stand(tokens if tokens.ndim == 2 else tokens[None])
        elif isinstance(tokens, list | tuple) and all(isinstance(row, Tensor) for row in tokens):
            tokens = as_they_stand(tokens)
    sequences = list(token_sequences(model, tokens))
    lengths = [len(sequence) for sequence in sequences]
    if len(set(lengths)) > 1:
        raise DataError(
            f"The corrupted prompts have {lengths} tokens; patching by position needs equal lengths. Give "
            "prompts that correspond token by token, or padded tokens [batch pos] with an attention_mask."
        )
    stacked = torch.stack(sequences).to(model.cfg.device)
    mask = _checked_mask(attention_mask, stacked)
    return StackedRuns(model, stacked, mask, metric, axis, size, hook_list(hooks), progress, bool(reuse))


def _checked_mask(given: Any, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    if given is None:
        return None
    try:
        mask = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"attention_mask must be a tensor of 1 and 0; got {given!r}.") from error
    if mask.shape != tokens.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise DataError(
            f"attention_mask must hold 1 (a token) and 0 (padding) in the shape {tuple(tokens.shape)} of the "
            f"corrupted tokens; got shape {tuple(mask.shape)}."
        )
    return mask.long().to(tokens.device)
