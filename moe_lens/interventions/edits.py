"""What the hooks of all interventions share: a layer, positions, and how one point is edited there.

    class Halve(RoutingEdit):
        point = hook_names.TOPK_WEIGHTS
        def edit(self, value, hook):                # [batch pos k] -> [batch pos k]
            return value / 2
    hooks = [Halve(layer=0, positions="generated").entry]

and how experts are named: pairs (layer, expert), a mapping layer -> experts, or experts with `layers=`.
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
from moe_lens.model.points import RoutingPoint
from moe_lens.shape import MoEShape

Experts = Any
"""Pairs [(layer, expert), ...]; a mapping {layer: expert or experts}; or, with layers=, experts."""


@dataclass(frozen=True, eq=False)
class RoutingEdit(ABC):
    """A hook function that edits one point of one layer at some positions, and nothing elsewhere.

    Tokens that are not selected keep their values bit for bit. Values without the batch dimension
    (`remove_batch_dim=True`) work, too.

    Attributes:
        point: short name of the hook point, from `moe_lens.hook_names`; a subclass sets it.
        layer: number of the layer.
        positions: at which tokens, see `moe_lens.interventions.Positions`.
    """

    point: ClassVar[str]

    layer: int
    positions: Positions

    @abstractmethod
    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        """The edited value for all tokens [batch pos ...]; the caller keeps it to the positions.

        So it does with a rule that the edit gives to `hook.rule`.
        """

    @property
    def n_columns(self) -> int | None:
        """How many columns, of the prompt and what follows, the edit has values for; None: any number."""
        return None

    @property
    def n_prompts(self) -> int | None:
        """How many prompts the edit has values of their own for; None: it does the same to each."""
        return None

    def highest_expert(self) -> int:
        """The highest expert number that the edit names; -1 if it names none."""
        return -1

    @property
    def entry(self) -> tuple[str, "RoutingEdit"]:
        """(name of its point, itself): an entry of a hook list."""
        return hook_names.name(self.layer, self.point), self

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        """What TransformerLens calls: the edited value, or None if no position is in this forward."""
        if not isinstance(hook, RoutingPoint) or hook_names.parse(str(hook.name)) != (self.layer, self.point):
            raise HookError(
                f"{type(self).__name__} is for {self.entry[0]} of a HookedMoE and was put on "
                f"{getattr(hook, 'name', hook)}; use the hook list as its builder returns it."
            )
        n_dims = 4 if self.point == hook_names.EXPERT_OUT else 3
        whole = value.unsqueeze(0) if value.ndim == n_dims - 1 else value
        chosen = selected(self.positions, hook.state, *whole.shape[:2]).to(value.device)
        if not bool(chosen.any()):
            return None
        self._check_columns(chosen, hook)
        before = hook.rule if self.point == hook_names.ROUTER_LOGITS else None
        edited = self.edit_at(whole, chosen, hook)
        if before is not None and hook.rule is not before:
            hook.rule = hook.rule.only_on(chosen, before)
        chosen = chosen.reshape(*chosen.shape, *[1] * (n_dims - 2))
        return torch.where(chosen, edited, whole).reshape(value.shape)

    def edit_at(self, value: Tensor, chosen: Bool[Tensor, "batch pos"], hook: RoutingPoint) -> Tensor:
        """`edit`, for edits that must know which tokens count."""
        return self.edit(value, hook)

    def _check_columns(self, chosen: Bool[Tensor, "batch pos"], hook: RoutingPoint) -> None:
        """Refuse columns that the values lack, and values of longer prompts, whose first columns are others.

        A generation, and a forward on top of a cache, may still come to the later columns.
        """
        state, n_columns = hook.state, self.n_columns
        if n_columns is None:
            return
        columns = state.columns(chosen.shape[1]).to(chosen.device)
        if bool(chosen[:, columns >= n_columns].any()):
            raise HookError(
                f"{self.entry[0]}: the given route has {n_columns} columns, and column "
                f'{int(columns[-1])} is running. Give a longer one, or positions= within it ("prompt").'
            )
        goes_on = state.generating or state.offset
        if self.positions is None and not goes_on and n_columns > 1 and 0 < state.n_prompt < n_columns:
            raise HookError(
                f"{self.entry[0]}: the given route has {n_columns} columns, and this run has "
                f"{state.n_prompt}. Give one of these prompts, or say with positions= which of the run's "
                'columns follow it ("prompt" for all).'
            )

    def check_fits(self, shape: MoEShape) -> None:
        """Called by the hook point before the hook is added."""
        if self.highest_expert() >= shape.n_experts:
            raise HookError(
                f"{self.entry[0]}: there is no expert {self.highest_expert()} in layer {self.layer}; "
                f"{shape.model} has experts 0 to {shape.n_experts - 1}."
            )


def columns_of(
    values: Shaped[Tensor, "rows columns *rest"], like: Tensor, hook: RoutingPoint
) -> Shaped[Tensor, "batch pos *rest"]:
    """The part of `values` that belongs to the tokens of this forward; a single row or column serves all.

    Columns that `values` lacks are filled with its last one; `n_columns` keeps them from being used.

    Raises:
        HookError: another number of rows than this forward has.
    """
    n_rows, n_pos = like.shape[:2]
    rows = hook.state.by_prompt(values, n_rows)
    if rows is None:
        raise HookError(
            f"{hook.name}: the given route is that of {len(values)} prompts, and "
            f"{hook.state.of_how_many(n_rows)} are running; give one of as many prompts, or of one."
        )
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
        DataError: no experts, or none of these three forms.
    """
    if layers is not None:
        numbers, of_layers = numbers_of(experts, "experts"), numbers_of(layers, "layers")
        pairs = [(layer, expert) for layer in of_layers for expert in numbers]
    elif isinstance(experts, Mapping):
        pairs = [
            (layer, expert)
            for key, numbers in experts.items()
            for layer in numbers_of(key, "layers")
            for expert in numbers_of(numbers, "experts")
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
    try:
        pairs = [(as_index(layer), as_index(expert)) for layer, expert in experts]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    numbers = [(layer, expert) for layer, expert in pairs if layer is not None and expert is not None]
    if len(numbers) < len(pairs):
        raise DataError(
            "Experts must be pairs (layer, expert), a mapping {layer: experts}, or experts with layers=...; "
            f"layers and experts are numbers from 0 on; got {experts!r}."
        )
    return numbers
