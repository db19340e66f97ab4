"""How evenly tokens are shared out among experts, and how differently between groups of prompts.

balance = load_balance(stats)                                     # or stats.load_balance()
balance.gini, balance.to_dataframe()                              # [layer], one row per layer
domains = domain_specialisation({"code": code, "prose": prose})   # RoutingStats by name
domains.divergence                                                # [layer], nats
domains.evidence.low, domains.evidence.q                          # [layer]; with per_prompt=True
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.results import Result
from moe_lens.shape import MoEShape
from moe_lens.statistics.domain_evidence import DomainEvidence, Group, clustered, domain_evidence
from moe_lens.statistics.sums import RoutingSums

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class LoadBalance(Result):
    """How evenly a layer's choices fall on its experts; every tensor is [layer], float64.

    With s_i = expert i's share of the layer's choices (counts / their sum) and E experts:

    Attributes:
        shape: the model; rows are `shape.layers`.
        normalised_entropy: −Σ s_i ln s_i / ln E, in [0, 1], 1 where all experts run equally often (Shannon
            1948). With k experts a token it is at least ln k / ln E. A single expert counts as balanced: 1.
        gini: Σ_i (2i − E − 1) s_(i) / E with shares in ascending order, in [0, 1), 0 where equal (Gini 1912).
        max_over_mean: E · max_i s_i, in [1, E / k]: the load that expert capacity must hold (Switch
            Transformer, arXiv 2101.03961, section 2.2).
        top_1, top_5, top_10: share of the busiest 1, 5 and 10 % of the experts, in (0, 1]; of ⌈1 % of E⌉
            experts and so on, so at least of one.
    """

    shape: MoEShape
    normalised_entropy: Float[Tensor, "layer"]
    gini: Float[Tensor, "layer"]
    max_over_mean: Float[Tensor, "layer"]
    top_1: Float[Tensor, "layer"]
    top_5: Float[Tensor, "layer"]
    top_10: Float[Tensor, "layer"]

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per layer: layer, normalised_entropy, gini, max_over_mean, top_1, top_5, top_10."""
        import pandas

        columns = {name: tensor.tolist() for name, tensor in vars(self).items() if name != "shape"}
        return pandas.DataFrame({"layer": self.shape.layers, **columns})

    def summary(self) -> str:
        """Means over layers of two of the measures, and the model."""
        return (
            f"mean over layers: Gini {self.gini.mean():.2f}, normalised entropy "
            f"{self.normalised_entropy.mean():.2f}; {self.shape.words}"
        )


def load_balance(stats: RoutingSums) -> LoadBalance:
    """How evenly each layer's choices fall on its experts (`LoadBalance` has the formulas).

    >>> from moe_lens import collect_routing, organisms
    >>> stats = collect_routing(organisms.load("specialised"), "Question : what is", progress=False)
    >>> load_balance(stats).gini.shape
    torch.Size([4])

    Raises:
        DataError: not RoutingStats.
    """
    _check_counted("load_balance", stats)
    shares = _shares(stats).sort(dim=-1).values  # [layer expert], ascending
    n_experts = shares.shape[-1]
    ranks = torch.arange(1, n_experts + 1, dtype=torch.float64)
    largest = torch.log(torch.tensor(float(n_experts), dtype=torch.float64))
    entropy = (
        torch.special.entr(shares).sum(-1) / largest if n_experts > 1 else torch.ones(len(shares)).double()
    )
    gini = ((2 * ranks - n_experts - 1) * shares).sum(-1) / n_experts
    top = [shares[:, n_experts + (-percent * n_experts // 100) :].sum(-1) for percent in (1, 5, 10)]
    return LoadBalance(
        stats.shape,
        entropy.clamp(0, 1),
        gini.clamp(min=0),
        n_experts * shares[:, -1],
        *(share.clamp(max=1) for share in top),
    )


@dataclass(frozen=True, eq=False, repr=False)
class DomainSpecialisation(Result):
    """How differently the groups of prompts use a layer's experts, in nats, float64.

    Attributes:
        shape: the model; rows are `shape.layers`.
        names: the groups, in the order given.
        weights: [group], of the groups in the mixture; they sum to 1.
        contributions: [layer expert], each expert's part of the divergence, ≥ 0.
        pairwise: [layer group group], the divergence of each pair of groups alone, equally weighted.
        evidence: bias, intervals, p- and q-values of the divergence; None for statistics without per_prompt
            counts of two units or more in each group.
    """

    shape: MoEShape
    names: tuple[str, ...]
    weights: Float[Tensor, "group"]
    contributions: Float[Tensor, "layer expert"]
    pairwise: Float[Tensor, "layer group group"]
    evidence: DomainEvidence | None = None

    @property
    def divergence(self) -> Float[Tensor, "layer"]:
        """Generalised Jensen–Shannon divergence of all groups, in [0, ln n_groups]."""
        return self.contributions.sum(-1)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert: layer, expert, contribution (nats), and share_of_layer (NaN if that is 0)."""
        import pandas

        share = self.contributions / self.divergence[:, None]
        return pandas.DataFrame(
            {
                **self.shape.grid(),
                "contribution": self.contributions.flatten().numpy(),
                "share_of_layer": share.flatten().numpy(),
            }
        )

    def summary(self) -> str:
        """The groups, the mean divergence over layers, how many layers differ, and the model."""
        sure = (
            "no intervals"
            if self.evidence is None
            else f"q ≤ 0.05 in {int((self.evidence.q <= 0.05).sum())} of {len(self.divergence)} layers"
        )
        return (
            f"{' / '.join(self.names)}: divergence {self.divergence.mean():.3f} nats, mean over layers; "
            f"{sure}; {self.shape.words}"
        )


def domain_specialisation(
    groups: Mapping[str, RoutingSums],
    *,
    weights: str = "equal",
    clusters: Mapping[str, Sequence[Any]] | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> DomainSpecialisation:
    """Generalised Jensen–Shannon divergence between the expert distributions of named groups of prompts.

    With s_g the shares of a layer's choices in group g (rates / k) and m = Σ_g w_g s_g:
    JS = Σ_g w_g KL(s_g ‖ m) = Σ_i Σ_g w_g s_gi ln(s_gi / m_i) (Lin 1991, "Divergence measures based on the
    Shannon entropy", section IV), 0 where all groups use the experts alike, ln n_groups where none shares an
    expert with another. What OLMoE calls domain specialisation (arXiv 2409.02060, section 5.3). Few tokens
    make it too large, by about (n_groups − 1)(E − 1) / (2 n) nats of n independent choices in all; and tokens
    of a prompt are not independent, so that the bias is that of fewer.

    >>> from moe_lens import collect_routing, organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").conflicts("detection")
    >>> prompts = {"with": [c.open_book for c in facts], "without": [c.closed_book for c in facts]}
    >>> groups = {
    ...     name: collect_routing(model, texts, per_prompt=True, progress=False)
    ...     for name, texts in prompts.items()
    ... }
    >>> found = domain_specialisation(groups)
    >>> found.divergence.shape, found.evidence.q.shape
    (torch.Size([4]), torch.Size([4]))

    Groups of statistics with per_prompt counts get `evidence`, prompts (or clusters) being the units:

    - `corrected` is 2 JS − the mean over bootstrap resamples of each group's units (Efron & Tibshirani 1993,
      section 10.2), and the interval is `corrected` ± t × their standard deviation × √(n / (n − 1)), n the
      units of the smallest group and t of n − 1 degrees of freedom, cut at 0. Where the test does not reject
      at 1 − level, `low` is 0: near 0 a divergence is no smooth function, on which bootstraps rely.
    - `p`: units change their groups at random, as many in each as before, and the statistic is the divergence
      over what chance would make of it, ½ Σ_i (1 / m_i) Σ_g w_g (1 − w_g) V_gi, with V_gi the squared
      standard error of s_gi over the units of group g. Exact where units are exchangeable; the division makes
      it hold approximately where groups differ in lengths or in how much their units vary. p = (1 + b) /
      (1 + n_permutations), b the permutations at least as large.

    Intervals are about each layer's divergence. Which experts differ between two groups, and how surely, is
    what `compare_routing(one, two, paired=False)` says. domain_evidence.py says how well both hold.

    Args:
        groups: name -> RoutingStats, two or more of the same model.
        weights: "equal", so that a group counts as much whatever its number of tokens, or "tokens", which
            the evidence takes for given.
        clusters: name -> one label per prompt; prompts of a group with one label are one unit. None: each
            prompt by itself.
        level: confidence level of the intervals, in (0, 1).
        n_resamples: bootstrap resamples, for bias and intervals.
        n_permutations: for the p-values.
        seed: of both; the same seed gives the same numbers.

    Raises:
        DataError: fewer than two groups, different models, unknown weights, bad settings, or clusters that do
            not fit: no per_prompt counts, another number of labels, a label in two groups, or fewer than two.
    """
    if not isinstance(groups, Mapping) or len(groups) < 2:
        raise DataError(
            "domain_specialisation needs a dictionary of at least two groups: name -> RoutingStats."
        )
    for name, stats in groups.items():
        _check_counted(f"domain_specialisation, group {name!r},", stats)
    (first, *others), names = groups.values(), tuple(str(name) for name in groups)
    for name, other in zip(names[1:], others, strict=True):
        if differences := first.shape.differences(other.shape):
            raise DataError(f"Groups {names[0]!r} and {name!r} are not comparable: {'; '.join(differences)}.")
    if weights not in ("equal", "tokens"):
        raise DataError(f"weights must be 'equal' or 'tokens'; got {weights!r}.")
    sizes = [1 if weights == "equal" else stats.n_tokens for stats in groups.values()]
    w = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    shares = torch.stack([_shares(stats) for stats in groups.values()])  # [group layer expert]
    units = _units(groups, clusters)
    settings: dict[str, Any] = {"level": level, "n_resamples": n_resamples, "n_permutations": n_permutations}
    evidence = domain_evidence(units, w.numpy(), first.shape, **settings, seed=seed) if units else None
    return DomainSpecialisation(first.shape, names, w, _divergences(shares, w), _pairwise(shares), evidence)


def _units(groups: Mapping[str, RoutingSums], clusters: Mapping[str, Sequence[Any]] | None) -> list[Group]:
    """Counts of each group's units; none where statistics hold no counts per prompt, or of one unit only."""
    if clusters is not None and (not isinstance(clusters, Mapping) or set(clusters) != set(groups)):
        raise DataError(f"clusters must be a dictionary with the names of the groups, {list(groups)}.")
    found, whose = [], {}
    for name, stats in groups.items():
        prompts = stats.per_prompt
        if prompts is None:
            if clusters is None:
                return []
            raise DataError(f"Group {name!r} has clusters but no counts per prompt; collect per_prompt=True.")
        labels = [
            str(label) for label in (range(len(prompts.n_tokens)) if clusters is None else clusters[name])
        ]
        if len(labels) != len(prompts.n_tokens):
            raise DataError(f"Group {name!r} has {len(prompts.n_tokens)} prompts and {len(labels)} clusters.")
        for label in labels if clusters is not None else ():
            if whose.setdefault(label, name) != name:
                raise DataError(
                    f"Cluster {label!r} is in the groups {whose[label]!r} and {name!r}, which are resampled "
                    "apart; compare two such groups by compare_routing."
                )
        choices = prompts.n_tokens.numpy() * stats.shape.top_k
        found.append(clustered(prompts.counts.numpy(), choices, labels))
        if len(found[-1][1]) < 2 and clusters is not None:
            raise DataError(f"Group {name!r} has one cluster only; evidence needs two, and 20 are few.")
    return found if min(len(choices) for _, choices in found) > 1 else []


def _divergences(
    shares: Float[Tensor, "group layer expert"], weights: Float[Tensor, "group"]
) -> Float[Tensor, "layer expert"]:
    """Each expert's part of the divergence: Σ_g w_g s_g ln s_g − m ln m."""
    mixture = (weights[:, None, None] * shares).sum(0)
    inside = (weights[:, None, None] * torch.special.entr(shares)).sum(0)
    return (torch.special.entr(mixture) - inside).clamp(min=0)


def _pairwise(shares: Float[Tensor, "group layer expert"]) -> Float[Tensor, "layer group group"]:
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    number, n_layers, _ = shares.shape
    table = torch.zeros(n_layers, number, number, dtype=torch.float64)
    for a in range(number):
        for b in range(a + 1, number):
            table[:, a, b] = table[:, b, a] = _divergences(shares[[a, b]], half).sum(-1)
    return table


def _shares(stats: RoutingSums) -> Float[Tensor, "layer expert"]:
    return stats.counts.double() / stats.counts.sum(-1, keepdim=True)


def _check_counted(who: str, stats: Any) -> None:
    if not isinstance(stats, RoutingSums):
        raise DataError(f"{who} needs RoutingStats; got {type(stats).__name__}.")
