"""Many edited runs of the same prompts in one forward, which repeats nothing that they share.

    runs = EditedRuns(model, tokens, attention_mask, cells, rows_of, hooks_for, reuse=True)
    values = runs.sweep(size, measure, ...)    # measure(logits [row pos d_vocab], cells) -> a value a cell

A cell is one edited run: `cell.layer` is the block of its edit, `cell.start` the first column. Where runs can
be resumed (`resuming`), a forward computes each from there on. What it gives is compared with whole runs of
some cells, once; where it differs, only blocks are skipped, or nothing.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.hook_names import HookList
from moe_lens.model.registration import running_of
from moe_lens.model.resuming import Recorded, is_bare, record
from moe_lens.model.wrapper import Model

MOST_TOKENS: Final = {"cpu": 2**13, "cuda": 2**16}
"""The most tokens of one forward, by device; more are no faster, even if memory allows them."""

_CLOSE: Final = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far resumed logits may be from those of a whole run, as a share of the largest; by dtype."""

_CLOSE_IN_HALF: Final = 5e-2
"""The same in half precision, where the rows of a forward change a sum's rounding more."""


class EditedRuns:
    """Runs of the same prompts, each with an edit of its own.

    Attributes:
        skips: what a forward leaves out now: "columns" (and blocks), "blocks", or "nothing".
    """

    def __init__(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None,
        cells: Sequence[Any],
        rows_of: Callable[[Sequence[Any]], Int[Tensor, "row"]],
        hooks_for: Callable[[Sequence[Any], int], HookList],
        *,
        reuse: bool,
        hooks: HookList | None = None,
    ):
        self.model, self.tokens, self.attention_mask = model, tokens, attention_mask
        self.cells = cells
        self.rows_of, self.hooks_for, self.hooks = rows_of, hooks_for, hooks or []
        self._recorded: Recorded | None = None
        if reuse and not self.hooks and not model.training and is_bare(model):
            self._record()
            self._check()

    @property
    def skips(self) -> str:
        if self._recorded is None:
            return "nothing"
        return "blocks" if self._recorded.keys_values is None else "columns"

    def together(self, fit: int) -> int:
        """How many cells a forward stacks, of those that fit: fewer where late ones are shorter."""
        if self.skips == "columns":
            most = MOST_TOKENS.get(self.tokens.device.type, 2**13) // 2
            n_tokens = len(self.rows_of(self.cells)) * self.tokens.shape[1]
            fit = min(fit, math.ceil(len(self.cells) / max(1, n_tokens // most)))
        return min(fit, len(self.cells))

    def sweep(
        self,
        size: int,
        measure: Callable[[Tensor, Sequence[Any]], Sequence[float]],
        *,
        shrinks: bool,
        bar: Any,
    ) -> list[float]:
        """A value a cell, in the cells' order.

        Args:
            size: cells a forward.
            measure: gives the values of some cells from their logits, the rows of each one after the other.
            shrinks: halve the size where memory runs out.
            bar: a progress bar that counts cells.
        """
        cells = self.cells
        values, order, done = [math.nan] * len(cells), self._order(cells), 0
        while done < len(cells):
            numbers = sorted(order[done : done + size], key=lambda number: cells[number].layer)
            some, measured = [cells[number] for number in numbers], None
            try:
                measured = measure(self.logits(some), some)
            except RuntimeError as error:
                if not shrinks or size == 1 or not should_reduce_batch_size(error):
                    raise
            if measured is None:  # out of memory; only out here is what the error held free
                clear_device_cache(garbage_collection=True)
                size //= 2
                continue
            for number, value in zip(numbers, measured, strict=True):
                values[number] = value
            done += len(numbers)
            bar.update(len(numbers))
        return values

    def _order(self, cells: Sequence[Any]) -> list[int]:
        """The cells' numbers in the order in which to run them: those that share most stand together."""
        keys = {
            "columns": lambda number: (-cells[number].start, cells[number].layer),
            "blocks": lambda number: cells[number].layer,
            "nothing": lambda number: 0,
        }
        return sorted(range(len(cells)), key=keys[self.skips])

    @torch.no_grad()
    def logits(self, cells: Sequence[Any]) -> Float[Tensor, "row pos d_vocab"]:
        """The logits of some cells, which must be in ascending order of layers where blocks are skipped."""
        if self._recorded is not None:
            try:
                return self._resumed(self._recorded, cells)
            except Exception as error:
                if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
                    raise
                self._recorded = None  # if the cells are at fault, whole runs say so
        return self._whole(cells)

    @torch.no_grad()
    def _check(self) -> None:
        """Skip less until some of the cells have the logits of whole runs."""
        while self._recorded is not None:
            try:
                if self._agrees(self._recorded):
                    return
            except Exception:  # of whatever a block lacks; if the cells are at fault, whole runs say so
                pass
            self._skip_less()

    def _record(self) -> None:
        dtype = self.model.cfg.dtype
        device = torch.device(self.tokens.device)
        # a flip of a close choice of experts may follow from rounding in half precision; blocks keep bits
        columns = dtype in _CLOSE and not torch.is_autocast_enabled(device.type)
        for with_columns in (True, False) if columns else (False,):
            try:
                self._recorded = record(self.model, self.tokens, self.attention_mask, columns=with_columns)
            except Exception:  # a cache of another kind, no memory, anything: whole runs need no record
                continue
            if self._recorded is not None:
                return

    def _skip_less(self) -> None:
        if self._recorded is not None and self._recorded.keys_values is not None:
            self._recorded.keys_values = None
        else:
            self._recorded = None

    def _resumed(self, recorded: Recorded, cells: Sequence[Any]) -> Tensor:
        start = min(cell.start for cell in cells) if recorded.keys_values is not None else 0
        layers = [cell.layer for cell in cells for _ in range(len(self.rows_of([cell])))]
        with self.model.hooks(self.hooks_for(cells, start)):
            return recorded.resume(self.rows_of(cells), layers, start)

    def _whole(self, cells: Sequence[Any]) -> Tensor:
        rows, kwargs = self.rows_of(cells), {}
        if self.attention_mask is not None:
            kwargs["attention_mask"] = self.attention_mask[rows]
        edits = self.hooks_for(cells, 0)
        of_prompts = running_of(self.model).of_prompts(rows, len(self.tokens))
        with of_prompts, self.model.hooks([*self.hooks, *edits]):
            return self.model(self.tokens[rows], **kwargs)

    def _agrees(self, recorded: Recorded) -> bool:
        """Whether cells of the lowest, a middle and the highest layer have the logits of whole runs.

        Stacked, so that rows join at several blocks; and the highest by itself, which skips most.
        """
        layers = sorted({cell.layer for cell in self.cells})
        some = []
        for layer in dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])):
            there = sorted((cell for cell in self.cells if cell.layer == layer), key=lambda cell: cell.start)
            some.append(there[-1] if layer in (layers[0], layers[-1]) else there[len(there) // 2])
        whole, stacked = self._whole(some), self._resumed(recorded, some)
        highest = self._resumed(recorded, some[-1:])
        largest = float(whole[torch.isfinite(whole)].abs().max())
        close = partial(
            torch.allclose, rtol=0, atol=_CLOSE.get(whole.dtype, _CLOSE_IN_HALF) * largest, equal_nan=True
        )
        if not close(stacked, whole) or not close(highest, whole[-len(highest) :]):
            return False
        return whole.dtype in _CLOSE or torch.equal(highest, self._whole(some[-1:]))
