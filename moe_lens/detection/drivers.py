"""Experts that prefer a domain, and those of them that matter there: `driver_experts`.

effects = effects_by_expert(virtual_ablation(model, code_prompts))
found = driver_experts({"code": code, "prose": prose}, effects)       # RoutingStats by domain
found.both("code", share=0.1)                                         # (layer, expert)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.checks import chosen_layers, share, whole_number
from moe_lens.errors import DataError
from moe_lens.resampling import interval_of
from moe_lens.results import Result, columns
from moe_lens.shape import MoEShape
from moe_lens.statistics.sums import RoutingSums

if TYPE_CHECKING:
    import pandas

_LEAST_TOKENS: Final = 20


@dataclass(frozen=True, eq=False, repr=False)
class DriverExperts(Result):
    """How much each expert prefers a domain, and what it is worth; tensors are float64.

    Attributes:
        shape: the model and the layers of the rows.
        domains: their names.
        shares: [domain layer expert], p(d | e), the expert's rate in the domain over the sum of its rates;
            NaN for one never chosen.
        preference: [layer expert], 1 − H(p(· | e)) / ln n_domains, in [0, 1]: 0 for an expert as active in
            all domains, 1 for one that runs in one only.
        low, high: its interval over prompts; None without per_prompt counts, NaN for an expert that no prompt
            or a single one chose. That of one that runs in one domain only is [1, 1], however few prompts
            chose it: no resample can show others.
        effect: [layer expert], the causal effect of each expert, as it was given.
        eligible: [layer expert], whether it was chosen often enough to be ranked.
    """

    shape: MoEShape
    domains: tuple[str, ...]
    shares: Float[Tensor, "domain layer expert"]
    preference: Float[Tensor, "layer expert"]
    low: Float[Tensor, "layer expert"] | None
    high: Float[Tensor, "layer expert"] | None
    effect: Float[Tensor, "layer expert"]
    eligible: Bool[Tensor, "layer expert"]

    def domain_experts(self, domain: str, *, share: float = 0.1, layers: Any = None) -> list[tuple[int, int]]:
        """Experts of the first `share` of all by preference whose preferred domain this is, first ones first.

        Raises:
            DataError: an unknown domain, a share outside (0, 1), layers that are not there.
        """
        if domain not in self.domains:
            raise DataError(f"The domains are {', '.join(self.domains)}; got {domain!r}.")
        best = self.shares.nan_to_num(-1).argmax(0) == self.domains.index(domain)
        return [e for e in self._first(self.preference, share, layers) if best[self._cell(e)]]

    def drivers(self, *, share: float = 0.1, layers: Any = None) -> list[tuple[int, int]]:
        """The first `share` of all experts by the size of their effect, first ones first."""
        return self._first(self.effect.abs(), share, layers)

    def both(self, domain: str, *, share: float = 0.1, layers: Any = None) -> list[tuple[int, int]]:
        """Experts of the domain that are drivers too, in the order of their preference; may be none."""
        drivers = set(self.drivers(share=share, layers=layers))
        return [e for e in self.domain_experts(domain, share=share, layers=layers) if e in drivers]

    def _cell(self, expert: tuple[int, int]) -> tuple[int, int]:
        return self.shape.layers.index(expert[0]), expert[1]

    def _first(self, values: Tensor, part: float, layers: Any) -> list[tuple[int, int]]:
        among = chosen_layers(layers, self.shape.layers)
        number = max(1, round(share(part, "share") * len(among) * self.shape.n_experts))
        ranked = sorted(
            (
                (-float(values[row, expert]), layer, expert)
                for row, layer in enumerate(self.shape.layers)
                for expert in range(self.shape.n_experts)
                if layer in among and self.eligible[row, expert]
            ),
            key=lambda item: item[0],
        )
        return [(layer, expert) for _, layer, expert in ranked[:number]]

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert: layer, expert, preference, low, high, domain, effect, eligible."""
        import pandas

        table: dict[str, Any] = {**columns(preference=self.preference, low=self.low, high=self.high)}
        best = self.shares.nan_to_num(-1).argmax(0).flatten().tolist()
        table["domain"] = [self.domains[number] for number in best]
        table |= columns(effect=self.effect, eligible=self.eligible)
        return pandas.DataFrame({**self.shape.grid(), **table})

    def summary(self) -> str:
        """Mean preference, how preference and effect go together, and the model."""
        kept = self.eligible.flatten()
        preference, effect = self.preference.flatten()[kept], self.effect.flatten().abs()[kept]
        known = len(preference) > 1 and bool(preference.std() > 0) and bool(effect.std() > 0)
        r = float(np.corrcoef(preference.numpy(), effect.numpy())[0, 1]) if known else float("nan")
        return (
            f"{' / '.join(self.domains)}: mean preference {preference.mean():.3f}, correlation with |effect| "
            f"{r:+.2f}; {self.shape.words}"
        )


def driver_experts(
    groups: Mapping[str, RoutingSums],
    effects: Any,
    *,
    least_tokens: int = _LEAST_TOKENS,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> DriverExperts:
    """Which experts prefer a domain, by the entropy of their use, and which of them have an effect there.

    >>> from moe_lens import collect_routing, driver_experts, organisms, virtual_ablation
    >>> from moe_lens.attribution import effects_by_expert
    >>> model, world = organisms.load("specialised"), organisms.world("specialised")
    >>> prompts = [[c.open_book, c.closed_book] for c in world.conflicts("detection")[:6]]
    >>> groups = {
    ...     name: collect_routing(model, list(texts), per_prompt=True, progress=False)
    ...     for name, texts in zip(("document", "memory"), zip(*prompts))
    ... }
    >>> ablation = virtual_ablation(model, [p[0] for p in prompts], exact=False, progress=False)
    >>> found = driver_experts(groups, effects_by_expert(ablation))
    >>> found.preference.shape, set(found.both("document")) <= set(found.drivers())
    (torch.Size([4, 8]), True)

    Preference is 1 − H(p(· | e)) / ln n, with p(d | e) = rate of e in domain d / sum of its rates, so that
    domains count alike whatever their lengths (entropy over domains: arXiv 2601.10159). It is too large for
    rarely chosen experts, which are left out of the rankings (`least_tokens`), and says nothing of effects:
    the paper finds that experts that prefer a domain and experts that matter are mostly different ones. Which
    domains use a layer's experts differently at all is what `domain_specialisation` tests.

    Args:
        groups: name -> RoutingStats, two domains or more of the same model; with per_prompt counts for
            intervals.
        effects: [layer expert], the effect of each expert on what matters in a domain: from
            `effects_by_expert`, or a tensor of any other measure.
        least_tokens: experts that fewer tokens of all domains chose are not ranked.
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples of each domain's prompts.
        seed: the same seed gives the same intervals.

    Raises:
        DataError: fewer than two domains, different models, effects of another shape or that are not finite.
    """
    if not isinstance(groups, Mapping) or len(groups) < 2:
        raise DataError("driver_experts needs a dictionary of at least two domains: name -> RoutingStats.")
    for name, stats in groups.items():
        if not isinstance(stats, RoutingSums):
            raise DataError(f"Domain {name!r} must be RoutingStats; got {type(stats).__name__}.")
        if differences := next(iter(groups.values())).shape.differences(stats.shape):
            raise DataError(f"Domain {name!r} is not comparable with the first: {'; '.join(differences)}.")
    share(level, "level")
    least = whole_number(least_tokens, "least_tokens")
    whole = next(iter(groups.values())).shape
    shape, effect = _effects(whole, effects)
    rows = [whole.layers.index(layer) for layer in shape.layers]
    rates = np.stack([(s.counts[rows].double() / s.n_tokens).numpy() for s in groups.values()])
    with np.errstate(invalid="ignore"):
        shares = rates / rates.sum(0)
    chosen = sum(stats.counts[rows] for stats in groups.values())
    low, high = _interval(groups, rows, level, n_resamples, seed)
    return DriverExperts(
        shape,
        tuple(str(name) for name in groups),
        torch.from_numpy(shares),
        torch.from_numpy(_preference(rates[None])[0]),
        low,
        high,
        effect,
        torch.as_tensor(chosen) >= max(least, 1),
    )


def _effects(whole: MoEShape, effects: Any) -> tuple[MoEShape, Float[Tensor, "layer expert"]]:
    """The effects, and the layers that they are about."""
    shape = getattr(effects, "shape", None)
    values = getattr(effects, "effect", None)
    if isinstance(shape, MoEShape) and isinstance(values, Tensor):
        if misfits := shape.misfits(whole):
            raise DataError(f"The effects are of another model than the routing: {'; '.join(misfits)}.")
        found = shape
    else:
        found, values = whole, torch.as_tensor(effects)
    values = values.detach().cpu().double()
    if tuple(values.shape) != (size := (len(found.layers), found.n_experts)):
        raise DataError(f"effects must be [layer expert], {size}; got {tuple(values.shape)}.")
    if not bool(torch.isfinite(values).all()):
        raise DataError("effects hold NaN or infinite values; experts cannot be ranked by them.")
    return MoEShape(whole.model, found.layers, whole.n_experts, whole.top_k), values


def _preference(rates: Float[np.ndarray, "draw domain *rest"]) -> Float[np.ndarray, "draw *rest"]:
    """1 − entropy of each expert's shares over ln n; NaN for an expert that no domain chose."""
    from scipy.special import entr

    with np.errstate(invalid="ignore"):
        shares = rates / rates.sum(1, keepdims=True)
    return np.clip(1 - entr(shares).sum(1) / np.log(rates.shape[1]), 0, 1)


def _interval(
    groups: Mapping[str, RoutingSums], rows: list[int], level: float, n_resamples: int, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of the preference; each domain's prompts are resampled by themselves."""
    tables = []
    for stats in groups.values():
        if stats.per_prompt is None or len(stats.per_prompt.n_tokens) < 2:
            return None, None
        tables.append((stats.per_prompt.counts[:, rows].double().numpy(), stats.per_prompt.n_tokens.numpy()))
    sizes, bounds = [len(n) for _, n in tables], []
    for row in range(len(rows)):  # layer by layer, for memory
        joint = np.zeros((sum(sizes), len(tables), tables[0][0].shape[-1]))
        tokens = np.zeros((sum(sizes), len(tables)))
        for number, (counts, n) in enumerate(tables):
            place = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
            joint[place, number], tokens[place, number] = counts[:, row], n
        bounds.append(
            interval_of(
                lambda c, n: _preference(c / n[..., None]),
                [joint, tokens],
                strata=np.repeat(np.arange(len(sizes)), sizes),
                informs=joint.sum(1) > 0,
                limits=(0.0, 1.0),
                level=level,
                n_resamples=n_resamples,
                seed=seed,
            )
        )
    low, high = (torch.from_numpy(np.stack(side)) for side in zip(*bounds, strict=True))
    return low, high
