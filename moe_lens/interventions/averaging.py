"""Predictions averaged over noisy routes (RoE), and how far the routes part.

log_probs = average_routes(model, prompts, n=8, temperature=0.5)      # [prompt vocab]
found = route_uncertainty(model, prompts, n=8)                        # a RouteUncertainty
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.hook_names import HookList, Hooks, hook_list
from moe_lens.interventions.noise import noisy_routes
from moe_lens.interventions.positions import Positions
from moe_lens.interventions.uncertainty import RouteUncertainty
from moe_lens.model.kept_logits import reading_logits
from moe_lens.model.state import Pass
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.resampling import spawned_seeds
from moe_lens.text.batching import Prompts, chunks_to_pad, how_many, pad_sequences, token_sequences


def average_routes(
    model: Model,
    prompts: Prompts,
    n: int = 8,
    *,
    temperature: Any = 0.5,
    seed: int = 0,
    positions: Positions = None,
    batch_size: int = 8,
    hooks: Hooks = (),
    progress: bool = True,
) -> Float[Tensor, "prompt vocab"]:
    """Log of the mean of n next-token distributions, each along another noisy route (RoE, arXiv 2509.17238).

    >>> from moe_lens import average_routes, organisms
    >>> model = organisms.load("specialised")
    >>> log_probs = average_routes(model, ["Question : what is", "the"], n=4, progress=False)
    >>> log_probs.shape[0], round(float(log_probs.exp().sum()), 3)
    (2, 2.0)

    Probabilities are averaged, in float64, not logits. To write with averaged routes, append the most
    probable token to each prompt and call again: every route then runs over its own noisy past (the paper
    shares one cache among the routes, which is faster and another approximation).

    Args:
        model: a HookedMoE or RoutedModel.
        prompts: strings, chats or tokens; see `moe_lens.text.Prompts`.
        n: routes, from 1 on.
        temperature: of the noise, as in `noisy_routes`. (The default is ours; the paper tunes one a layer.)
        seed: of the routes: the same seed gives the same ones, and a larger n only adds to them.
        positions: at which tokens routes are noisy; see `moe_lens.interventions.Positions`.
        batch_size: prompts a forward.
        hooks: forward hooks to run under; noise is added after those on the router logits.
        progress: show a progress bar.

    Returns: nats, float32, on the CPU.

    Raises:
        DataError: no prompts, n below 1, a temperature of another kind, or logits that are NaN.
    """
    routes = _routes(n, temperature, seed, positions)
    means = []
    for _, along in _by_batch(model, prompts, hooks, routes, batch_size, progress, plain=False):
        means.append(torch.stack(list(along)).mean(dim=0).log().float())
    return torch.cat(means)


def route_uncertainty(
    model: Model,
    prompts: Prompts,
    n: int = 8,
    *,
    temperature: Any = 0.5,
    seed: int = 0,
    positions: Positions = None,
    batch_size: int = 8,
    hooks: Hooks = (),
    progress: bool = True,
) -> RouteUncertainty:
    """How far the next tokens that n noisy routes predict part, beside the model's own softmax entropy.

    >>> from moe_lens import organisms, route_uncertainty
    >>> model = organisms.load("specialised")
    >>> found = route_uncertainty(model, ["Question : what is", "the"], n=4, progress=False)
    >>> bool((found.disagreement <= 0.75).all()), found.entropy.shape
    (True, (2,))

    Whether that tells wrong answers from right ones, `predict_errors` says.

    Args:
        as in `average_routes`; n from 2 on.

    Raises:
        DataError: n below 2, or as in `average_routes`.
    """
    whole_number(n, "n", least=2, remedy="A single route has nobody to disagree with.")
    routes = _routes(n, temperature, seed, positions)
    columns: dict[str, list[Any]] = {name: [] for name in RouteUncertainty.__dataclass_fields__}
    for plain, along in _by_batch(model, prompts, hooks, routes, batch_size, progress):
        mean, predictions, entropies = torch.zeros(()), [], []
        for number, p in enumerate(along):
            mean = mean + (p - mean) / (number + 1)
            predictions.append(p.argmax(-1))
            entropies.append(_entropy(p))
        columns["predictions"].append(torch.stack(predictions, dim=1))
        columns["averaged"].append(mean.argmax(-1))
        columns["averaged_entropy"].append(_entropy(mean))
        columns["mean_entropy"].append(torch.stack(entropies).mean(dim=0))
        columns["plain"].append(plain.argmax(-1))
        columns["entropy"].append(_entropy(plain))
    whole = {name: torch.cat(parts).numpy() for name, parts in columns.items() if parts}
    heat = dict(temperature) if isinstance(temperature, Mapping) else float(temperature)
    return RouteUncertainty(**whole, temperature=heat, seed=seed)


def next_token_probabilities(
    model: Model, sequences: Sequence[Tensor], hooks: Hooks, rows: Sequence[int], among: Pass | int
) -> Float[Tensor, "prompt vocab"]:
    """The distribution after each sequence, float64, on the CPU; `rows` are the prompts' numbers.

    Args:
        among: how many prompts there are in all, of which these are some; or their `Pass`.
    """
    with reading_logits(model, hooks) as read:
        tokens, mask = pad_sequences(model, sequences, read.padding_side)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        last = lengths - 1 if read.padding_side == "right" else torch.full_like(lengths, tokens.shape[1] - 1)
        columns, place = last.unique(return_inverse=True)
        logits = read(tokens, columns, mask, list(rows), among)
    chosen = logits[torch.arange(len(sequences)), place.to(logits.device)].double().cpu()
    if not bool(chosen.amax(-1).isfinite().all()):  # -inf for some of the vocabulary is a mask
        raise DataError("The model's logits are NaN or infinite under these hooks; nothing can be averaged.")
    return chosen.softmax(dim=-1)


def _routes(n: Any, temperature: Any, seed: Any, positions: Positions) -> list[HookList]:
    """One hook list a route."""
    n, seed = whole_number(n, "n", least=1), whole_number(seed, "seed")
    return [noisy_routes(temperature, one, positions=positions) for one in spawned_seeds(seed, n)]


def _by_batch(
    model: Model,
    prompts: Prompts,
    hooks: Hooks,
    routes: Sequence[HookList],
    batch_size: int,
    progress: bool,
    plain: bool = True,
) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
    """Batch by batch, the model's own distributions [batch vocab], and those along each route in turn."""
    check_hooked(model)
    given, among, done = hook_list(hooks), Pass(how_many(prompts)), 0
    numbered = enumerate(token_sequences(model, prompts))
    with tqdm(desc="noisy routes", unit="run", disable=not progress) as bar:
        for chunk in chunks_to_pad(model, numbered, batch_size, lambda item: len(item[1])):
            rows, sequences = [number for number, _ in chunk], [tokens for _, tokens in chunk]

            def run(more: Hooks, rows: list[int] = rows, sequences: list[Tensor] = sequences) -> Tensor:
                found = next_token_probabilities(model, sequences, [*given, *(more or ())], rows, among)
                bar.update()
                return found

            own = run(()) if plain else torch.zeros(0)
            yield own, (run(route) for route in routes)
            done += len(rows)
        among.end(done)


def _entropy(p: Float[Tensor, "prompt vocab"]) -> Float[Tensor, "prompt"]:
    """In nats; 0 · log 0 is 0."""
    return -torch.special.xlogy(p, p).sum(dim=-1)
