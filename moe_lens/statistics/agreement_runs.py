"""Running two models, or one on two prompts, to compare their routes token by token: `route_agreement`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.observing import observing
from moe_lens.model.registration import moe_shape, routing_layers, running_of
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.routers.layouts import RouterOutput
from moe_lens.statistics.agreement import RouteAgreement
from moe_lens.statistics.units import of_all, with_interval
from moe_lens.text.batching import Limits, Prompts
from moe_lens.text.spans import Span, batches_by_length


def route_agreement(
    a: Model,
    b: Model,
    prompts: Prompts,
    other_prompts: Prompts | None = None,
    *,
    span: Span = None,
    other_span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    other_hooks: Hooks = (),
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> RouteAgreement:
    """Mean Jaccard index of the experts that two runs choose for the same tokens; margins where they differ.

    >>> from moe_lens import SteeringPlan, organisms, route_agreement, steer_hooks
    >>> model, prompts = organisms.load("specialised"), ["Question : what is", "Document : the"]
    >>> route_agreement(model, model, prompts, progress=False).jaccard.tolist()
    [1.0, 1.0, 1.0, 1.0]
    >>> plan = SteeringPlan(deactivate=[(1, expert) for expert in range(4)])
    >>> found = route_agreement(model, model, prompts, other_hooks=steer_hooks(plan), progress=False)
    >>> bool(found.jaccard[0] == 1), bool(found.jaccard[1] < 1)
    (True, True)

    Two checkpoints on the same texts; one model with and without hooks; or one model on two versions of its
    prompts, whose spans hold the same number of tokens, compared one by one. Jaccard indices between
    checkpoints: arXiv 2601.16905. Tuning moves the hidden states that a router reads, too; with routers
    swapped between checkpoints one sees which of the two it was.

    Args:
        a: a HookedMoE or RoutedModel, whose margins are measured.
        b: another, or the same, with the same MoE layers and number of experts; k may differ.
        prompts: as in `collect_routing`; each runs by itself.
        other_prompts: for `b`; None: the same, which must be the same tokens to both.
        span: which tokens of `prompts` count; see `moe_lens.text.Span`; None for all.
        other_span: of `other_prompts`; None: `span`.
        special_tokens: also count special tokens in spans that are strings.
        hooks: forward hooks to run `a` under.
        other_hooks: to run `b` under.
        level: confidence level of the interval.
        n_resamples: bootstrap resamples of the prompts.
        seed: of these, and of which tokens make `chance`.
        progress: show a progress bar.

    Raises:
        DataError: models of other layers or numbers of experts, texts that are other tokens to the second
            model, other numbers of prompts, or of counted tokens in one of them.
    """
    check_hooked(a)
    check_hooked(b)
    shapes = moe_shape(a), moe_shape(b)
    if shapes[0].layers != shapes[1].layers or shapes[0].n_experts != shapes[1].n_experts:
        raise DataError(
            f"Routes of {shapes[0].words} and of {shapes[1].words} cannot be compared: their layers or "
            "numbers of experts differ."
        )
    if isinstance(prompts, Iterator):
        prompts = list(prompts)  # both models read it
    ours = _counted(a, prompts, span, special_tokens)
    theirs = _counted(
        b,
        prompts if other_prompts is None else other_prompts,
        span if other_span is None else other_span,
        special_tokens,
    )
    _check_alike(ours, theirs, same_tokens=other_prompts is None)
    rng = np.random.default_rng([seed, 2])
    sums: list[dict[str, np.ndarray]] = []
    for row in tqdm(range(len(ours)), desc="comparing routes", unit="prompt", disable=not progress):
        first = _routes(a, row, ours, hooks)
        second = _routes(b, row, theirs, other_hooks)
        sums.append(_compared(first, second, rng))
    tables = {name: np.stack([each[name] for each in sums]) for name in sums[0]}
    jaccard, low, high = with_interval(
        _ratio,
        [tables["jaccard"], tables["n"]],
        informs=tables["n"] > 0,
        limits=(0.0, 1.0),
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )

    def mean(of: str, over: str) -> Tensor:
        return of_all(_ratio, [tables[of], tables[over]])

    return RouteAgreement(
        shapes[0],
        shapes[1].model,
        jaccard,
        low,
        high,
        mean("chance", "n_chance"),
        mean("n_same", "n"),
        mean("margin_same", "n_same"),
        mean("margin_differ", "n_differ"),
        int(tables["n"][:, 0].sum()),
        len(sums),
        level,
    )


@dataclass(frozen=True, eq=False)
class _Counted:
    tokens: Int[Tensor, "pos"]
    chosen: Bool[Tensor, "pos"]


@dataclass(frozen=True, eq=False)
class _Routes:
    chosen: Bool[Tensor, "layer token expert"]
    margins: Float[Tensor, "layer token"]


def _counted(model: Model, prompts: Prompts, span: Span, special_tokens: bool) -> list[_Counted]:
    """Tokens of each prompt in the order given, and which of them count."""
    found: dict[int, _Counted] = {}
    limits = Limits.of(1, None)
    for batch in batches_by_length(model, prompts, span, limits, special_tokens=special_tokens):
        for row, tokens, chosen in zip(batch.rows, batch.sequences, batch.chosen, strict=True):
            found[row] = _Counted(tokens, chosen)
    return [found[row] for row in sorted(found)]


def _check_alike(ours: list[_Counted], theirs: list[_Counted], same_tokens: bool) -> None:
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} prompts are compared with {len(theirs)}; give as many.")
    for row, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        if same_tokens and not torch.equal(one.tokens, two.tokens):
            raise DataError(
                f"Prompt {row} is other tokens to the second model, so that a token's routes cannot be "
                "compared; give tokens that both read alike."
            )
        if (n := int(one.chosen.sum())) != (m := int(two.chosen.sum())):
            raise DataError(
                f"Prompt {row} counts {n} tokens in the first run and {m} in the second; they are compared "
                "one by one, so choose spans of the same tokens."
            )


def _routes(model: Model, row: int, prompts: list[_Counted], hooks: Hooks) -> _Routes:
    """What was chosen for each counted token of one of the prompts, and by what margin."""
    prompt, seen = prompts[row], {}
    layers = routing_layers(model)

    def see(layer: int, decision: RouterOutput, is_own: Any) -> None:
        seen[layer] = decision

    with observing(model, see, hook_list(hooks)) as run:
        with running_of(model).of_prompts([row], len(prompts)):
            run(prompt.tokens[None].to(model.cfg.device), None)
        chosen, margins = [], []
        for layer, moe in layers.items():
            keep = prompt.chosen.to(seen[layer].indices.device)
            logits, indices = seen[layer].logits[keep], seen[layer].indices[keep]
            sets = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            chosen.append(sets.scatter(-1, indices.long(), True).cpu())
            margins.append(moe.rule.routing_margin(logits).double().cpu())
    return _Routes(torch.stack(chosen), torch.stack(margins))


def _compared(first: _Routes, second: _Routes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Sums over one prompt's tokens, [layer] each."""
    n_layers, n_tokens, _ = first.chosen.shape
    same = (first.chosen == second.chosen).all(-1)
    shift = int(rng.integers(1, n_tokens)) if n_tokens > 1 else 0
    shifted = _jaccard(first.chosen, second.chosen.roll(shift, dims=1)).sum(-1)
    parts = {
        "jaccard": _jaccard(first.chosen, second.chosen).sum(-1),
        "n": torch.full((n_layers,), n_tokens),
        "chance": shifted if shift else torch.zeros(n_layers),
        "n_chance": torch.full((n_layers,), n_tokens if shift else 0),
        "n_same": same.sum(-1),
        "n_differ": (~same).sum(-1),
        "margin_same": first.margins.where(same, 0.0).sum(-1),
        "margin_differ": first.margins.where(~same, 0.0).sum(-1),
    }
    return {name: part.double().numpy() for name, part in parts.items()}


def _ratio(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
    return sums / n


def _jaccard(
    one: Bool[Tensor, "layer token expert"], two: Bool[Tensor, "layer token expert"]
) -> Float[Tensor, "layer token"]:
    return (one & two).sum(-1).double() / (one | two).sum(-1)
