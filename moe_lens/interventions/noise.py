"""Noisy routes: `noisy_routes`, hooks that add random numbers to the router logits, the same ones every time.

    model.run_with_hooks(prompt, fwd_hooks=noisy_routes(0.5, seed=3))

The numbers are a function of (seed, layer, prompt, token of the prompt, expert), not of a generator's
state: a prompt gets the same noise alone and in a batch, padded on either side, with its prefill cut into
parts, with a KV cache and without, on every device.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Final, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import numbers_of, whole_number
from moe_lens.errors import DataError, HookError
from moe_lens.hook_names import HookList
from moe_lens.interventions.edits import RoutingEdit
from moe_lens.interventions.positions import Positions, checked_positions
from moe_lens.model.points import RoutingPoint
from moe_lens.model.state import ForwardState

Distribution = Literal["gumbel", "normal"]

_STEP: Final = -7046029254386353131  # 0x9E3779B97F4A7C15, of splitmix64, as int64
_MIX: Final = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS: Final = 24
"""Of a uniform number; float32 holds as many, and neither 0 nor 1 comes out."""


@dataclass(frozen=True, eq=False)
class NoiseEdit(RoutingEdit):
    """Adds noise to the router logits of one layer."""

    point: ClassVar[str] = hook_names.ROUTER_LOGITS

    temperature: float
    seed: int
    distribution: Distribution = "gumbel"

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        if not self.temperature:
            return value
        n_rows, n_pos, n_experts = value.shape
        rows, places = rows_and_places(hook.state, n_rows, n_pos)
        noise = noise_at(self.seed, self.layer, rows, places, n_experts, self.distribution)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return (wide + self.temperature * noise.to(wide)).to(value.dtype)


@dataclass(frozen=True, eq=False)
class NoiseEverywhere:
    """The noise of whichever layer it stands on."""

    positions: Positions
    temperature: float
    seed: int
    distribution: Distribution

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        layer = hook_names.layer_of(str(hook.name))
        return NoiseEdit(layer, self.positions, self.temperature, self.seed, self.distribution)(value, hook)


def noisy_routes(
    temperature: Any,
    seed: int = 0,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    distribution: Distribution = "gumbel",
) -> HookList:
    """Route tokens by noisy logits z + temperature · noise: one route out of many (RoE, arXiv 2509.17238).

    >>> from moe_lens import noisy_routes, organisms
    >>> model = organisms.load("specialised")
    >>> noisy = noisy_routes(0.5, seed=3)
    >>> logits = model.run_with_hooks("Question : what", fwd_hooks=noisy)
    >>> again = model.run_with_hooks("Question : what", fwd_hooks=noisy)
    >>> bool((again == logits).all())
    True

    With Gumbel noise at temperature 1 the top-k of the noisy logits are k draws without replacement from the
    router's softmax (Gumbel-top-k; Kool et al. 2019), at lower temperatures from one as much sharper. Choice
    and weights both follow from the noisy logits, by the rule of the layer: the paper's text, read without
    code, speaks of noise on the logits and does not set the weights apart. Routers with a correction bias add
    it to the noisy scores; where experts come from a table by token id, only their weights are noisy.

    Every prompt, token, layer and expert has noise of its own. A prompt is told from others by its number in
    the call (its row in a forward); beams and samples are rows, too.

    Args:
        temperature: from 0 on, in nats of logit; 0 leaves the route as it is. A number, or a mapping {layer:
            number}, as the paper tunes one a layer.
        seed: from 0 on; another seed, another route.
        layers: at which layers; None: all (of a mapping, its own).
        positions: at which tokens; see `moe_lens.interventions.Positions`.
        distribution: "gumbel" (standard, location 0), or "normal" (mean 0, variance 1).

    Raises:
        DataError: a temperature, seed, layer or distribution of another kind.
    """
    where, seed = checked_positions(positions), whole_number(seed, "seed")
    if distribution not in get_args(Distribution):
        raise DataError(f"distribution must be one of {get_args(Distribution)}; got {distribution!r}.")
    if isinstance(temperature, Mapping):
        if layers is not None or not temperature:
            raise DataError(
                "noisy_routes: a mapping {layer: temperature} names its layers; leave layers out."
            )
        by_layer = {whole_number(layer, "layer"): _checked(number) for layer, number in temperature.items()}
    elif layers is None:
        return [(_is_router, NoiseEverywhere(where, _checked(temperature), seed, distribution))]
    else:
        by_layer = dict.fromkeys(numbers_of(layers, "layers"), _checked(temperature))
    edits = [NoiseEdit(layer, where, heat, seed, distribution) for layer, heat in sorted(by_layer.items())]
    return [edit.entry for edit in edits]


def noise_at(
    seed: int,
    layer: int,
    rows: Int[Tensor, "batch"],
    places: Int[Tensor, "batch pos"],
    n_experts: int,
    distribution: Distribution = "gumbel",
) -> Float[Tensor, "batch pos expert"]:
    """The noise of these tokens, float32: a hash of (seed, layer, row, place, expert) by splitmix64.

    >>> rows, places = torch.tensor([4]), torch.tensor([[7, 8]])
    >>> both = noise_at(0, 2, rows, places, n_experts=3)
    >>> torch.equal(both[:, 1:], noise_at(0, 2, rows, places[:, 1:], n_experts=3))
    True
    """
    state = torch.zeros((), dtype=torch.int64)
    whole = torch.tensor([(seed >> shift) & 0x7FFFFFFFFFFFFFFF for shift in (0, 63, 126)])
    experts = torch.arange(n_experts)
    for part in (*whole, torch.tensor(layer), rows[:, None, None], places[:, :, None], experts):
        state = _mixed(state ^ part.cpu())
    uniform = ((_shifted(state, 64 - _BITS)).double() + 0.5) / 2**_BITS
    if distribution == "normal":
        return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).float()
    return (-torch.log(-torch.log(uniform))).float()


def rows_and_places(
    state: ForwardState, n_rows: int, n_pos: int
) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch pos"]]:
    """Which prompt each row is, and which of its own tokens each column, padding not counted."""
    rows = torch.arange(n_rows) if state.rows is None else state.rows.cpu()
    if len(rows) != n_rows:
        raise HookError(f"{n_rows} rows run, and it is known of {len(rows)} which prompts they are.")
    columns, mask = state.columns(n_pos).expand(n_rows, n_pos), state.attention_mask
    if mask is not None and mask.ndim == 2 and len(mask) != n_rows:
        mask = state.by_prompt(mask, n_rows)  # beams and samples share their prompt's
    if mask is None or mask.ndim != 2:
        return rows, columns
    first = mask.cpu().long().argmax(dim=1, keepdim=True)  # padding on the left comes before it
    return rows, (columns - first).clamp(min=0)


def _is_router(name: str) -> bool:
    parsed = hook_names.parse(name)
    return parsed is not None and parsed[1] == hook_names.ROUTER_LOGITS and ".mlp." in name


def _checked(temperature: Any) -> float:
    is_number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not is_number or not 0 <= float(temperature) < math.inf:
        raise DataError(f"temperature must be a finite number from 0 on; got {temperature!r}.")
    return float(temperature)


def _mixed(state: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """splitmix64's step and finaliser; int64 products wrap around."""
    z = state + _STEP
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, 31)


def _shifted(z: Int[Tensor, "*any"], n: int) -> Int[Tensor, "*any"]:
    """A logical shift to the right."""
    return (z >> n) & ((1 << (64 - n)) - 1)
