"""`Tables`: the tensors through which a worker steers and records, and which requests they stand for.

They are made once, when the model is loaded, and changed in place from then on: compiled code and CUDA graphs
keep the addresses that they saw first. Before a forward, `place` says which plan each row has; in it, the
layers read that and write what they did (`seam.py`); after it, `count` adds up what was asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.engines.vllm.request_counts import Key, Recorded, RequestCounts
from moe_lens.engines.vllm.wishes import Wish, read_wish
from moe_lens.errors import MoELensError
from moe_lens.shape import MoEShape
from moe_lens.steering.plan import SteeringPlan


@dataclass(eq=False)
class _Request:
    """One that is running."""

    wish: Wish
    salt: str
    n_prompt: int
    counted: int = 0
    """Positions up to here are counted: after a preemption they run again."""


@dataclass(eq=False)
class _Counted:
    """The rows of the batch that is running which count."""

    keys: list[Key] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)


class Tables:
    """The tables of one worker.

    Args:
        layers: of the model, by number.
        shape: of the model.
        n_plans: how many requests run at once at most, each of which may have a plan of its own.
        n_rows: tokens of a batch at most.
    """

    def __init__(
        self, layers: dict[int, Any], shape: MoEShape, n_plans: int, n_rows: int, device: torch.device
    ) -> None:
        self.shape, self.layers, self.counts = shape, layers, RequestCounts(shape)
        self.requests: dict[str, _Request] = {}
        self.states: dict[str, Any] = {}  # where the runner keeps none of its own (V2)
        self.slots: dict[str, int] = {}  # what is in the tables: salt -> row of them; row 0 steers nobody
        self.n_slots = n_plans + 1
        self._counted = _Counted()
        self._clear = True
        with torch.inference_mode(False):
            self.slot = torch.zeros(n_rows, dtype=torch.int64, device=device)
            self.epsilon = torch.full((self.n_slots, 1), 0.01, device=device)
            self.strength = torch.full((self.n_slots, 1), torch.inf, device=device)
            for layer in layers.values():
                self._give(layer, n_rows, device)

    def _give(self, layer: Any, n_rows: int, device: torch.device) -> None:
        n_experts, top_k = self.shape.n_experts, self.shape.top_k
        own = {
            "sign": torch.zeros(self.n_slots, n_experts, dtype=torch.int8, device=device),
            "logits": torch.zeros(n_rows, n_experts, dtype=torch.float32, device=device),
            "indices": torch.zeros(n_rows, top_k, dtype=torch.int32, device=device),
            "weights": torch.zeros(n_rows, top_k, dtype=torch.float32, device=device),
        }
        for name, tensor in own.items():
            layer.register_buffer(f"moe_lens_{name}", tensor, persistent=False)
        for name in ("slot", "epsilon", "strength"):
            layer.register_buffer(f"moe_lens_{name}", getattr(self, name), persistent=False)
        # The router knows no layer; a weak tie is enough, the layer owns both.
        layer.router.moe_lens_records = (layer.moe_lens_indices, layer.moe_lens_weights)

    def forget(self, finished: Iterable[str]) -> None:
        """These requests are over."""
        for gone in finished:
            self.requests.pop(gone, None)
            self.states.pop(gone, None)

    def place(self, batch: list[tuple[str, int, int]], states: Mapping[str, Any]) -> None:
        """A batch is about to run.

        Args:
            batch: of each request (in the order of its rows) id, number of tokens, and position of the first.
            states: id -> vLLM's state of the request.
        """
        self._counted = _Counted()
        known = [self._known(name, states) for name, _, _ in batch]
        needed = {request.salt for request in known if request.salt}
        rows = np.zeros(len(self.slot), dtype=np.int64)
        first = 0
        for request, (_, n_tokens, start) in zip(known, batch, strict=True):
            positions = np.arange(start, start + n_tokens)
            if request.salt:
                phase = request.wish.positions
                in_phase = (positions < request.n_prompt) == (phase == "prompt") if phase else True
                rows[first : first + n_tokens] = np.where(in_phase, self._slot_of(request, needed), 0)
            if request.wish.stats is not None:
                self._note(request, positions, first)
            first += n_tokens
        if rows.any() or not self._clear:
            self.slot.copy_(torch.from_numpy(rows))
        self._clear = not rows.any()

    def clear(self) -> None:
        """A forward that stands for no request is about to run."""
        self._counted = _Counted()
        self.slot.zero_()
        self._clear = True

    def count(self) -> None:
        """The batch has run: add up its rows that count."""
        counted, self._counted = self._counted, _Counted()
        if not counted.keys:
            return
        group = np.repeat(np.arange(len(counted.keys)), [len(rows) for rows in counted.rows])
        rows = torch.from_numpy(np.concatenate(counted.rows))
        recorded = {
            number: Recorded(layer.moe_lens_logits, layer.moe_lens_indices, layer.moe_lens_weights)
            for number, layer in self.layers.items()
        }
        self.counts.add(counted.keys, rows, torch.from_numpy(group), recorded)

    def _known(self, name: str, states: Any) -> _Request:
        request = self.requests.get(name)
        if request is None:
            state = states[name]
            wish = read_wish(getattr(state.sampling_params, "extra_args", None))
            if wish.plan is not None:
                check_fits(wish.plan, self.shape)
            request = self.requests[name] = _Request(wish, wish.salt, state.num_prompt_tokens)
        return request

    def _note(self, request: _Request, positions: np.ndarray, first_row: int) -> None:
        span = request.wish.span or ((0, request.n_prompt),)
        keep = np.any([(positions >= first) & (positions < end) for first, end in span], axis=0)
        keep &= positions >= request.counted
        request.counted = max(request.counted, int(positions[-1]) + 1)
        if keep.any():
            self._counted.keys.append((str(request.wish.stats), request.wish.prompt))
            self._counted.rows.append(first_row + np.flatnonzero(keep))

    def _slot_of(self, request: _Request, needed: set[str]) -> int:
        """The row of the tables with this plan; where there is none, one is written."""
        if (slot := self.slots.get(request.salt)) is not None:
            return slot
        taken = set(self.slots.values())
        slot = next((number for number in range(1, self.n_slots) if number not in taken), None)
        if slot is None:
            idle = next((salt for salt in self.slots if salt not in needed), None)
            if idle is None:
                raise MoELensError(f"More than {self.n_slots - 1} plans in one batch.")
            slot = self.slots.pop(idle)
        self.slots[request.salt] = slot
        self._write(slot, request.wish)
        return slot

    def _write(self, slot: int, wish: Wish) -> None:
        assert wish.plan is not None
        for number, layer in self.layers.items():
            activate, deactivate = wish.plan.in_layer(number)
            sign = torch.zeros(self.shape.n_experts, dtype=torch.int8)
            sign[activate], sign[deactivate] = 1, -1
            layer.moe_lens_sign[slot].copy_(sign)
        self.epsilon[slot].fill_(wish.plan.epsilon)
        self.strength[slot].fill_(torch.inf if wish.strength is None else wish.strength)


def check_fits(plan: SteeringPlan, shape: MoEShape) -> None:
    """Check a plan against the model that an engine serves, whatever the name it is served under.

    Raises:
        PlanError: as in `SteeringPlan.check_fits`.
    """
    name = shape.model if plan.shape is None else plan.shape.model
    plan.check_fits(MoEShape(name, shape.layers, shape.n_experts, shape.top_k))


def shape_of_layers(layers: dict[int, Any], model: str) -> MoEShape:
    """The shape of a model with these layers, named as moe_lens names it: the last part of its path."""
    router = next(iter(layers.values())).router
    name = str(model).rstrip("/").rsplit("/", 1)[-1]
    return MoEShape(name, tuple(layers), router.global_num_experts, router.top_k)


def on_device(layers: dict[int, Any]) -> Tensor:
    """A tensor of the model, for its device."""
    return next(next(iter(layers.values())).parameters())
