"""What all hooks of the interventions share: a layer, the positions, and how one point is edited there.

    class Halve(RoutingEdit):
        point = hook_names.TOPK_WEIGHTS
        def edit(self, value, hook):                # [batch pos k] -> [batch pos k]
            return value / 2
    hooks = [Halve(layer=0, positions="generated").entry]

and how experts are named: pairs (layer, expert), a mapping layer -> experts, or experts and `layers=`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import as_index, numbers_of
from moe_lens.errors import DataError, HookError
from moe_lens.interventions.positions import Positions, selected
from moe_lens.model.router_points import RoutingPoint
from moe_lens.shape import MoEShape

Experts = Any
"""Pairs [(layer, expert), ...]; a mapping {layer: expert or experts}; or, with layers=, experts."""


@dataclass(frozen=True, eq=False)
class RoutingEdit(ABC):
    """A hook function that edits one point of one layer at some positions, and nothing elsewhere.

    What is not selected keeps its value bit for bit. Without the batch dimension (`remove_batch_dim=True`) it
    works too.
    """

    point: ClassVar[str]

    layer: int
    positions: Positions

    @abstractmethod
    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        """The edited value for all tokens [batch pos ...]; the positions are seen to."""

    @property
    def n_columns(self) -> int | None:
        """How many columns of a prompt and what follows it has values for; None: any number."""
        return None

    def highest_expert(self) -> int:
        """The highest number of an expert that it names; -1 if none."""
        return -1

    @property
    def entry(self) -> tuple[str, "RoutingEdit"]:
        """(name of its point, itself): an entry of a hook list."""
        return hook_names.name(self.layer, self.point), self

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        """What TransformerLens calls."""
        if not isinstance(hook, RoutingPoint) or hook_names.parse(str(hook.name)) != (self.layer, self.point):
            raise HookError(
                f"{type(self).__name__} is for {self.entry[0]} of a HookedMoE and was put on "
                f"{getattr(hook, 'name', hook)}; use the hook list as its builder gives it."
            )
        n_dims = 4 if self.point == hook_names.EXPERT_OUT else 3
        whole = value.unsqueeze(0) if value.ndim == n_dims - 1 else value
        chosen = selected(self.positions, hook.state, *whole.shape[:2]).to(value.device)
        if not bool(chosen.any()):
            return None
        self._check_columns(chosen, hook)
        chosen = chosen.reshape(*chosen.shape, *[1] * (n_dims - 2))
        return torch.where(chosen, self.edit(whole, hook), whole).reshape(value.shape)

    def _check_columns(self, chosen: Bool[Tensor, "batch pos"], hook: RoutingPoint) -> None:
        columns = hook.state.columns(chosen.shape[1]).to(chosen.device)
        if self.n_columns is not None and bool(chosen[:, columns >= self.n_columns].any()):
            raise HookError(
                f"{self.entry[0]}: the route given has {self.n_columns} columns, and column "
                f'{int(columns[-1])} is running. Give a longer one, or positions= within it ("prompt").'
            )

    def check_fits(self, shape: MoEShape) -> None:
        """Asked by the hook point before the hook is added."""
        if self.highest_expert() >= shape.n_experts:
            raise HookError(
                f"{self.entry[0]}: expert {self.highest_expert()} of layer {self.layer} is named; "
                f"{shape.model} has experts 0 to {shape.n_experts - 1}."
            )


def columns_of(
    values: Shaped[Tensor, "rows columns *rest"], like: Tensor, hook: RoutingPoint
) -> Shaped[Tensor, "batch pos *rest"]:
    """Those of `values` that belong to the tokens that are running; one row or one column serves all.

    Columns that `values` does not have are filled with its last; `n_columns` keeps them from being used.

    Raises:
        HookError: another number of rows than are running.
    """
    n_rows, n_pos = like.shape[:2]
    rows = hook.state.by_prompt(values, n_rows)
    if rows is None:
        raise HookError(f"{hook.name}: a route of {len(values)} prompts was given, and {n_rows} are running.")
    columns = hook.state.columns(n_pos).clamp(max=values.shape[1] - 1)
    return rows.to(like.device)[:, columns.to(like.device)]


def experts_by_layer(experts: Experts, layers: int | Iterable[int] | None = None) -> dict[int, list[int]]:
    """Layer -> its experts, each once, layers ascending.

    >>> experts_by_layer([(1, 3), (0, 2), (1, 5)])
    {0: [2], 1: [3, 5]}
    >>> experts_by_layer({0: 2, 1: [3, 5]}) == experts_by_layer([(0, 2), (1, 3), (1, 5)])
    True
    >>> experts_by_layer([2, 3], layers=[0, 1])
    {0: [2, 3], 1: [2, 3]}

    Raises:
        DataError: none at all, or not one of these three forms.
    """
    if layers is not None:
        numbers, of_layers = numbers_of(experts, "experts"), numbers_of(layers, "layers")
        pairs = [(layer, expert) for layer in of_layers for expert in numbers]
    elif isinstance(experts, Mapping):
        pairs = [
            (layer, expert)
            for key, found in experts.items()
            for layer in numbers_of(key, "layers")
            for expert in numbers_of(found, "experts")
        ]
    else:
        pairs = _pairs(experts)
    if not pairs:
        raise DataError("No experts are named; give at least one (layer, expert).")
    grouped: dict[int, list[int]] = {layer: [] for layer, _ in sorted(pairs)}
    for layer, expert in pairs:
        if expert not in grouped[layer]:
            grouped[layer].append(expert)
    return grouped


def _pairs(experts: Any) -> list[tuple[int, int]]:
    pairs: list[tuple[int | None, int | None]] = []
    try:
        for layer, expert in experts:
            pairs.append((as_index(layer), as_index(expert)))
    except (TypeError, ValueError):
        pairs = [*pairs, (None, None)]
    found = [(layer, expert) for layer, expert in pairs if layer is not None and expert is not None]
    if len(found) < len(pairs):
        raise DataError(
            "Experts must be pairs (layer, expert), a mapping {layer: experts}, or experts with layers=...; "
            f"layers and experts are numbers from 0 on; got {experts!r}."
        )
    return found
