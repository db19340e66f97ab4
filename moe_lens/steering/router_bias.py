"""`RouterBias`: a number for each expert that is added to its router logit, learned or written by hand.

bias = learn_router_bias(model, objective, development)          # learning.py
model.run_with_hooks(prompt, fwd_hooks=bias_experts(bias))
plan = bias.to_plan(n_deactivate=4)                              # the strongest, as a plan
bias.save("bias.json"); RouterBias.load("bias.json")
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checks import as_index, whole_number
from moe_lens.detection.expert_scores import ExpertScore
from moe_lens.errors import DataError, PlanError
from moe_lens.files import FileKind
from moe_lens.results import Result
from moe_lens.shape import MoEShape, shape_from_json
from moe_lens.steering.choosing import HowMany, OnExcess, select
from moe_lens.steering.plan import SteeringPlan

if TYPE_CHECKING:
    import pandas

_KIND: Final = FileKind("moe_lens.RouterBias", 1, (1,), "a router bias")


class LearningStep(NamedTuple):
    """The objective without penalties, on both sets of prompts, before a step was made."""

    step: int
    training: float
    development: float


@dataclass(frozen=True, eq=False, repr=False)
class RouterBias(Result):
    """δ of every expert, in nats of router logit (rewiring experts, arXiv 2510.14853).

    >>> from moe_lens import MoEShape, RouterBias
    >>> bias = RouterBias.of({(0, 3): -0.5, (2, 1): 1.5}, MoEShape("m", (0, 2), n_experts=4, top_k=2))
    >>> bias
    RouterBias(2 of 8 experts in layers [0, 2], largest 1.5 nats; m, 2 layers × 4 experts, top 2)
    >>> bias.to_plan(n_activate=1).activate
    ((2, 1),)

    Attributes:
        shape: which model's layers these are.
        values: float32, [layer expert]; 0 for experts that are left alone.
        history: the steps of the learning; empty for a bias that was not learned.

    Raises:
        DataError: values of another shape, or not finite.
    """

    shape: MoEShape
    values: Float[Tensor, "layer expert"]
    history: tuple[LearningStep, ...] = ()

    def __post_init__(self) -> None:
        wanted = (len(self.shape.layers), self.shape.n_experts)
        if self.values.shape != wanted or not bool(self.values.isfinite().all()):
            raise DataError(
                f"A RouterBias needs a finite number for each expert [layer expert] of {self.shape.words}; "
                f"got shape {tuple(self.values.shape)}."
            )
        object.__setattr__(self, "values", self.values.detach().cpu().float())
        object.__setattr__(self, "history", tuple(LearningStep(*step) for step in self.history))

    @classmethod
    def of(cls, numbers: Mapping[Any, float], shape: MoEShape) -> "RouterBias":
        """Of a mapping {(layer, expert): δ}. Raises DataError for experts that the shape does not have."""
        values = torch.zeros(len(shape.layers), shape.n_experts)
        for key, number in numbers.items():
            layer, expert = (as_index(each) for each in key) if isinstance(key, tuple) else (None, None)
            if layer not in shape.layers or expert is None or expert >= shape.n_experts:
                raise DataError(f"{key!r} is no (layer, expert) of {shape.words}.")
            values[shape.layers.index(layer), expert] = number
        return cls(shape, values)

    @property
    def numbers(self) -> dict[tuple[int, int], float]:
        """(layer, expert) -> δ, of all experts whose δ is not 0."""
        return {
            (self.shape.layers[row], expert): float(self.values[row, expert])
            for row, expert in self.values.nonzero().tolist()
        }

    @property
    def mapping(self) -> dict[int, Float[Tensor, "expert"]]:
        """Layer -> δ of its experts, of all layers that have any: what `bias_experts` takes."""
        rows = {layer: self.values[row] for row, layer in enumerate(self.shape.layers)}
        return {layer: row for layer, row in rows.items() if bool(row.any())}

    def kept(self, n: int) -> "RouterBias":
        """The same with the n largest |δ| only; among equals, the lower layer and expert stays.

        Raises DataError for n below 0.
        """
        n = whole_number(n, "n")
        order = self.values.abs().flatten().argsort(descending=True, stable=True)
        values = self.values.clone()
        values.view(-1)[order[n:]] = 0
        return RouterBias(self.shape, values, self.history)

    def to_plan(
        self,
        n_activate: HowMany | None = None,
        n_deactivate: HowMany | None = None,
        *,
        epsilon: float = 0.01,
        strength: float | None = None,
        only_unmet: bool = False,
        on_excess: OnExcess = "raise",
    ) -> SteeringPlan:
        """The experts with the largest δ to activate and the smallest to deactivate.

        A bias nudges, a plan decides: what the plan does must be measured anew. With neither number, all
        experts of both signs that fit their layers, with a warning that names the others.

        Args:
            as in `SteeringPlan.from_scores`, with δ in the place of scores.

        Raises:
            PlanError: more experts asked for than have the sign, or than fit a layer.
        """
        if n_activate is None and n_deactivate is None:
            n_activate = n_deactivate = "all"
        ranked = sorted(self.numbers.items(), key=lambda item: (-abs(item[1]), item[0]))
        activate, deactivate = select(
            [ExpertScore(layer, expert, number) for (layer, expert), number in ranked],
            n_activate or 0,
            n_deactivate or 0,
            self.shape,
            on_excess=on_excess,
        )
        return SteeringPlan(activate, deactivate, epsilon, self.shape, strength, only_unmet)

    def summary(self) -> str:
        """How many experts, in which layers, the largest number, and the model."""
        layers = list(self.mapping)
        learned = ""
        if self.history:
            best = min(step.development for step in self.history)
            learned = f", development loss {self.history[0].development:.3g} → {best:.3g}"
        return (
            f"{len(self.numbers)} of {self.values.numel()} experts in layers {layers}, largest "
            f"{float(self.values.abs().max()):.3g} nats{learned}; {self.shape.words}"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an expert whose δ is not 0, the largest first: layer, expert, bias (nats)."""
        import pandas as pd

        rows = [(layer, expert, number) for (layer, expert), number in self.numbers.items()]
        rows.sort(key=lambda row: -abs(row[2]))
        return pd.DataFrame(rows, columns=["layer", "expert", "bias"])

    def save(self, path: str | Path) -> None:
        """Write the bias as JSON, atomically; equal biases give equal files."""
        content = {"shape": asdict(self.shape), "values": self.values.tolist()}
        _KIND.save_json(path, {**content, "history": [list(step) for step in self.history]})

    @classmethod
    def load(cls, path: str | Path) -> "RouterBias":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        content = _KIND.load_json(path)
        try:
            values = torch.tensor(content["values"], dtype=torch.float32)
            history = tuple(LearningStep(*step) for step in content["history"])
            return cls(shape_from_json(content["shape"]), values, history)
        except (KeyError, TypeError, ValueError, DataError, PlanError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error
