"""Which tokens of the vocabulary an expert runs for: counts, specialisation against a null, top tokens.

stats = collect_routing(model, prompts, vocabulary=True)
special = vocabulary_specialisation(stats)                        # KL in nats, expected KL, p-values
top_tokens(stats, layer=3, expert=7, tokenizer=model.tokenizer)   # the tokens that expert 7 runs for
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.results import Result
from moe_lens.shape import MoEShape
from moe_lens.statistics.counts import TokenCounts
from moe_lens.statistics.sums import RoutingSums
from moe_lens.text.pieces import token_texts

if TYPE_CHECKING:
    import pandas

_TIES: Final = 1e-9
"""Divergences closer than this (nats) are ties: sums in another order."""


@dataclass(frozen=True, eq=False, repr=False)
class VocabularySpecialisation(Result):
    """How far each expert's tokens are from all counted tokens; every tensor is [layer expert], float64.

    Attributes:
        shape: the model; rows are `shape.layers`.
        divergence: KL(tokens of the expert ‖ all tokens), nats, ≥ 0; NaN for an expert never chosen.
        expected: mean KL under the null, nats: how large it is for an expert that any A tokens go to.
        p: right-tailed p-value of the null, in (0, 1]; NaN for an expert never chosen.
        null, n_draws, seed: what a repetition needs.
    """

    shape: MoEShape
    divergence: Float[Tensor, "layer expert"]
    expected: Float[Tensor, "layer expert"]
    p: Float[Tensor, "layer expert"]
    null: str
    n_draws: int
    seed: int

    @property
    def excess(self) -> Float[Tensor, "layer expert"]:
        """divergence − expected, nats: what is left after the bias of small numbers; may be negative."""
        return self.divergence - self.expected

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert: layer, expert, divergence, expected, excess, p."""
        import pandas

        names = ("divergence", "expected", "excess", "p")
        columns = {name: getattr(self, name).flatten().numpy() for name in names}
        return pandas.DataFrame({**self.shape.grid(), **columns})

    def summary(self) -> str:
        """How many experts are specialised, the null, and the model."""
        return (
            f"{int((self.p <= 0.05).sum())} of {self.p.numel()} experts with p ≤ 0.05; mean excess "
            f"{self.excess.nanmean():.2f} nats; {self.null} null, {self.n_draws} draws; {self.shape.words}"
        )


def vocabulary_specialisation(
    stats: RoutingSums, *, null: str = "multinomial", n_draws: int = 200, seed: int = 0
) -> VocabularySpecialisation:
    """Kullback–Leibler divergence of each expert's tokens from all tokens, against a multinomial null.

    With A tokens that chose the expert, x_v of them token v, and q_v the share of token v among all N counted
    tokens: KL = Σ_v (x_v / A) ln(x_v / (A q_v)). Few tokens make it large without any specialisation (by
    about (V − 1) / 2A), so it is held against the null that the A tokens are a multinomial sample of q:
    p = (1 + draws with KL at least as large) / (1 + n_draws). A chi-square law for 2A·KL would not do: most
    tokens of a vocabulary are expected less than once. Each draw is one stream of tokens whose first A are
    the sample for every expert with A tokens, so all experts together cost a sort of max A numbers a draw.

    The null is descriptive. Tokens of one prompt are not independent, so a small p does not show that new
    text would give a large KL. And the expert's own tokens are part of the pool, which makes the multinomial
    null conservative: the KL of an expert that chooses at random is smaller by a share of about A/N. With
    null="permutation" the A tokens are drawn without replacement, which is exact. Vocabulary specialisation
    in OLMoE: arXiv 2409.02060, section 5.4.

    >>> from moe_lens import collect_routing, organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").facts("detection")[:20]
    >>> prompts = [fact.question for fact in facts]
    >>> stats = collect_routing(model, prompts, vocabulary=True, progress=False)
    >>> vocabulary_specialisation(stats).p.shape
    torch.Size([4, 8])

    Args:
        stats: from `collect_routing(..., vocabulary=True)`.
        null: "multinomial", or "permutation" (without replacement).
        n_draws: how often the null is drawn; p is at least 1 / (1 + n_draws).
        seed: of the draws; the same seed gives the same numbers.

    Raises:
        DataError: statistics without a vocabulary, or bad settings.
    """
    table = _table(stats)
    draws, seed = whole_number(n_draws, "n_draws", least=1), whole_number(seed, "seed")
    if null not in ("multinomial", "permutation"):
        raise DataError(f"null must be 'multinomial' or 'permutation'; got {null!r}.")
    totals = table.totals.numpy()
    counts = stats.counts.flatten().numpy()
    divergence = _divergences(table, counts, totals)
    sizes, which = np.unique(counts, return_inverse=True)
    by_size = _null(totals, np.maximum(sizes, 1), draws, seed, null == "multinomial")
    drawn = by_size[:, which]  # [draw layer·expert]
    exceeded = (drawn >= divergence - _TIES).sum(0)
    never = counts == 0

    def by_layer(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.where(never, np.nan, values)).reshape(stats.counts.shape)

    p = (1 + exceeded) / (1 + draws)
    return VocabularySpecialisation(
        stats.shape, by_layer(divergence), by_layer(drawn.mean(0)), by_layer(p), null, draws, seed
    )


def top_tokens(
    stats: RoutingSums, layer: int, expert: int, n: int = 10, tokenizer: Any = None
) -> "pandas.DataFrame":
    """The tokens that go to an expert more often than others do, by log-likelihood ratio.

    The ratio (Dunning 1993) is that of the 2 × 2 table token / other tokens × expert chosen / not: it wants
    both a high lift and enough counts to believe it. Only tokens with lift > 1 are listed.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, "Question : what is", vocabulary=True, progress=False)
    >>> top_tokens(stats, 0, int(stats.counts[0].argmax()), tokenizer=model.tokenizer).columns.tolist()
    ['token', 'text', 'count', 'total', 'rate', 'lift', 'log_likelihood_ratio']

    Args:
        layer: number of the layer in the model.
        n: how many tokens at most.
        tokenizer: gives the column `text`, in which bytes that are no character by themselves are written out
            ("<0xE6>"); without one it is left out.

    Returns:
        One row per token: token id, count (chose the expert), total (counted at all), rate = count / total in
        [0, 1], lift = rate / the expert's activation rate, log-likelihood ratio (2 ln λ, ≥ 0).

    Raises:
        DataError: statistics without a vocabulary, a layer or an expert that does not exist, a bad n.
    """
    import pandas

    table, shape = _table(stats), stats.shape
    number = whole_number(expert, "expert", most=shape.n_experts - 1)
    limit = whole_number(n, "n", least=1)
    if layer not in shape.layers:
        raise DataError(f"layer must be one of {shape.layers}, which have experts; got {layer!r}.")
    chosen = table.of_expert(shape.layers.index(layer), number, shape.n_experts).numpy()
    tokens = np.flatnonzero(chosen)
    count, total = chosen[tokens].astype(float), table.totals.numpy()[tokens].astype(float)
    rate = max(int(chosen.sum()), 1) / stats.n_tokens
    frame = pandas.DataFrame({"token": tokens, "count": chosen[tokens], "total": total.astype(np.int64)})
    frame["rate"], frame["lift"] = count / total, count / total / rate
    frame["log_likelihood_ratio"] = _log_likelihood_ratio(count, total, chosen.sum(), stats.n_tokens)
    ranked = np.lexsort((tokens, -frame["log_likelihood_ratio"].to_numpy()))
    over = ranked[frame["lift"].to_numpy()[ranked] > 1][:limit]
    frame = frame.iloc[over].reset_index(drop=True)
    if tokenizer is not None:
        frame.insert(1, "text", [token_texts(tokenizer, [int(token)])[0] for token in frame["token"]])
    return frame


def top_tokens_of_all(stats: RoutingSums, n: int = 10) -> dict[str, np.ndarray]:
    """`top_tokens` of every expert at once, without texts: columns of one table, expert after expert.

    Returns: row (of the layer), expert, token, count, total as int64 and lift as float64, each [entry]; of
    one expert at most n entries, largest log-likelihood ratio first.

    Raises:
        DataError: as in `top_tokens`.
    """
    table, n_experts = _table(stats), stats.shape.n_experts
    limit = whole_number(n, "n", least=1)
    experts, tokens = table.experts.numpy(), table.tokens.numpy()
    count, total = table.counts.numpy().astype(np.int64), table.totals.numpy()[tokens]
    chosen = stats.counts.flatten().numpy()[experts]
    lift = count / total / (chosen / stats.n_tokens)
    ratio = _log_likelihood_ratio(count.astype(float), total.astype(float), chosen, stats.n_tokens)
    order = np.lexsort((tokens, -ratio, experts))
    order = order[lift[order] > 1]
    sizes = np.bincount(experts[order], minlength=stats.counts.numel())
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = order[place < limit]
    row, expert = np.divmod(experts[kept], n_experts)
    columns = {
        "row": row,
        "expert": expert,
        "token": tokens[kept],
        "count": count[kept],
        "total": total[kept],
    }
    return {**columns, "lift": lift[kept]}


def _table(stats: Any) -> TokenCounts:
    if not isinstance(getattr(stats, "vocabulary", None), TokenCounts):
        raise DataError("These statistics hold no counts by token; collect them with vocabulary=True.")
    return stats.vocabulary


def _divergences(
    table: TokenCounts, counts: Int[np.ndarray, "expert"], totals: Int[np.ndarray, "vocab"]
) -> Float[np.ndarray, "expert"]:
    """KL of every expert of every layer, [layer·expert], from Σ x ln x, Σ x ln total and A."""
    from scipy.special import xlogy

    experts, tokens = table.experts.numpy(), table.tokens.numpy()
    times, total = table.counts.numpy().astype(float), totals[tokens]
    sums = np.bincount(experts, weights=xlogy(times, times / total), minlength=len(counts))
    chosen = np.maximum(counts, 1)
    return np.maximum(sums / chosen - np.log(chosen / totals.sum()), 0.0)


def _null(
    totals: Int[np.ndarray, "vocab"],
    sizes: Int[np.ndarray, "size"],
    n_draws: int,
    seed: int,
    replacement: bool,
) -> Float[np.ndarray, "draw size"]:
    """KL of samples of these sizes from the tokens of `totals`, with or without replacement.

    Along a stream of tokens the sum Σ x ln(x / total) grows by c ln c − (c − 1) ln(c − 1) − ln total when a
    token is met for the c-th time, so a running sum gives the divergence at every length at once.
    """
    from scipy.special import xlogy

    generator = np.random.default_rng(seed)
    longest, n_tokens = int(sizes.max()), int(totals.sum())
    pool = np.repeat(np.arange(len(totals)), totals)
    log_totals = np.log(np.maximum(totals, 1))
    times = np.arange(longest + 1, dtype=float)
    growth = np.diff(xlogy(times, times))  # [c - 1]
    divergences = np.empty((n_draws, len(sizes)))
    for draw in range(n_draws):
        drawn = (
            generator.integers(n_tokens, size=longest)
            if replacement
            else generator.permutation(n_tokens)[:longest]
        )
        stream = pool[drawn]  # its first A tokens are a sample of A
        order = np.argsort(stream, kind="stable")
        ordered = stream[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        met_before = np.empty(longest, dtype=np.int64)
        met_before[order] = np.arange(longest) - np.repeat(starts, np.diff(starts, append=longest))
        running = np.cumsum(growth[met_before] - log_totals[stream])
        divergences[draw] = running[sizes - 1] / sizes - np.log(sizes / n_tokens)
    return np.maximum(divergences, 0.0)


def _log_likelihood_ratio(
    count: Float[np.ndarray, "token"], total: Float[np.ndarray, "token"], chosen: Any, n_tokens: int
) -> Float[np.ndarray, "token"]:
    """2 Σ observed ln(observed / expected) over the cells of the 2 × 2 table."""
    from scipy.special import xlogy

    ratio = np.zeros_like(count)
    for seen, column in ((count, total), (chosen - count, n_tokens - total)):
        for observed, share in ((seen, chosen / n_tokens), (column - seen, 1 - chosen / n_tokens)):
            expected = column * share
            ratio += 2 * xlogy(
                observed, np.divide(observed, expected, out=np.ones_like(count), where=expected > 0)
            )
    return np.maximum(ratio, 0.0)
