"""Runs of the same prompts on one layer's route after the other, which repeat nothing that they share.

    runs = SharedRuns(model, batches, hooks_for, numbers, reuse=True)
    for route, logits in runs.on_routes((0, 1, 2)):        # (0,), (1,), (2,), (0, 1), (0, 1, 2)
        ...                                                # [batch pos d_vocab] of each batch, on the CPU

A route fixes the experts of some layers. On that of a single layer, all blocks below do what they do in the
plain run. On that of all layers up to l, the blocks up to l do what they do where all are fixed, and those
above are free. So a run goes on from one of these two (`model.resuming`), at the block where they part.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.hook_names import HookList
from moe_lens.model.registration import running_of
from moe_lens.model.resuming import Recorded, is_bare, record
from moe_lens.model.state import Pass
from moe_lens.model.wrapper import Model

Route = tuple[int, ...]

HooksFor = Callable[[Sequence[int]], HookList]
"""From layers to the hooks that fix their experts."""

_CLOSE: Final = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far resumed logits may be from a whole run's, as a share of the largest; elsewhere they are equal."""


class _Run(NamedTuple):
    """A run on a route: it parts with the recorded run at a block, from where on these layers are fixed."""

    route: Route
    block: int
    fixed: Route


class SharedRuns:
    """Batches of prompts, which have these numbers, all run on the same routes.

    Attributes:
        reuse: whether runs go on from recorded ones; False where blocks cannot be found, under hooks, and
            once such a run differed from a whole one.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Int[Tensor, "batch pos"]],
        hooks_for: Sequence[HooksFor],
        numbers: Sequence[Sequence[int]],
        *,
        reuse: bool,
        check: bool = True,
    ):
        self.model, self.batches, self.hooks_for, self.numbers = model, batches, hooks_for, numbers
        self.among = Pass(sum(map(len, numbers)), rows_too=True)
        self.check = check
        self.reuse = reuse and not model.training and is_bare(model)

    @torch.no_grad()
    def on_routes(self, layers: Route) -> Iterator[tuple[Route, list[Float[Tensor, "batch pos d_vocab"]]]]:
        """Each layer alone, then the first two, the first three, and so on; with the logits of each batch."""
        yield from self._on((), [_Run((layer,), layer, (layer,)) for layer in layers])
        if len(layers) > 1:
            growing = [_Run(layers[:n], layers[n], ()) for n in range(2, len(layers))]
            yield from self._on(layers, growing)

    def _on(self, shared: Route, runs: Sequence[_Run]) -> Iterator[tuple[Route, list[Tensor]]]:
        """These runs, from those on a shared route; that one last, unless it is the plain one."""
        recorded = self._recorded(shared)
        whole = self._compared(recorded[0], runs) if recorded and self.check else {}
        if not self.reuse:
            recorded = []
        for run in runs:
            first = whole[run] if run in whole else self._logits(recorded, 0, run)
            yield run.route, [first, *(self._logits(recorded, n, run) for n in range(1, len(self.batches)))]
        if shared:
            known = [one.logits.cpu() for one in recorded]
            yield shared, known or [self._whole(number, shared) for number in range(len(self.batches))]

    def _recorded(self, route: Route) -> list[Recorded]:
        """A run of each batch from which others can go on; none where that is not possible."""
        found: list[Recorded] = []
        for tokens, hooks_for in zip(self.batches, self.hooks_for, strict=True) if self.reuse else ():
            try:
                with self.model.hooks(hooks_for(route) if route else []):
                    one = record(self.model, tokens, None, columns=False)
            except Exception:  # no memory, blocks of another kind, anything: whole runs need no record
                one = None
            if one is None:
                self.reuse = False
                return []
            found.append(one)
        return found

    def _logits(self, recorded: Sequence[Recorded], number: int, run: _Run) -> Tensor:
        if recorded:
            try:
                return self._resumed(recorded[number], self.hooks_for[number], run).cpu()
            except Exception:  # if the route is at fault, whole runs say so
                pass
        return self._whole(number, run.route)

    def _resumed(self, recorded: Recorded, hooks_for: HooksFor, run: _Run) -> Tensor:
        n_rows = len(recorded.tokens)
        with self.model.hooks(hooks_for(run.fixed) if run.fixed else []):
            return recorded.resume(torch.arange(n_rows), [run.block] * n_rows)

    def _whole(self, number: int, route: Route) -> Tensor:
        hooks = self.hooks_for[number](route)
        with running_of(self.model).of_prompts(self.numbers[number], self.among):
            return self.model.run_with_hooks(self.batches[number], fwd_hooks=hooks).cpu()

    def _compared(self, recorded: Recorded, runs: Sequence[_Run]) -> dict[_Run, Tensor]:
        """Whole runs of the first batch, from a block in the middle and the highest; their logits.

        Nothing is reused any more where resumed ones differ.
        """
        found = {}
        for run in {runs[len(runs) // 2], runs[-1]} if runs else ():
            whole = found[run] = self._whole(0, run.route)
            try:
                resumed = self._resumed(recorded, self.hooks_for[0], run).cpu()
            except Exception:  # of whatever a block lacks
                self.reuse = False
                break
            apart, largest = (each.nan_to_num(0, 0, 0).abs().max() for each in (resumed - whole, whole))
            close = bool(apart <= _CLOSE.get(whole.dtype, 0.0) * largest)
            self.reuse = self.reuse and close and torch.equal(whole.isnan(), resumed.isnan())
        return found
