"""Routing while a model writes: the prompts' tokens (prefill) and the generated ones (decode), apart.

routing = collect_generation(model, prompts, max_new_tokens=32, hooks=steer_hooks(plan))
routing.prefill.rates, routing.decode.rates  # RoutingStats of either phase
routing.texts                                # what was written
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.private_names import supports_padding
from moe_lens.model.registration import moe_shape, routing_layers, running_of
from moe_lens.model.state import Pass
from moe_lens.model.wrapper import Model
from moe_lens.results import Result
from moe_lens.routers.rule import RoutingRule
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.batching import Prompts, how_many, padded_batches, padding


@dataclass(frozen=True, eq=False, repr=False)
class GenerationRouting(Result):
    """The routing of a generation, by phase.

    Attributes:
        prefill: over the prompts' own tokens; padding is not counted.
        decode: over the generated tokens that were routed: all before a prompt's end-of-sequence token, but
            not the last of max_new_tokens, which no step reads. None if there is not one.
        tokens: the generated tokens of each prompt, int64, up to and with the end-of-sequence token.
        texts: the same as text, without special tokens; None without a tokenizer.
    """

    prefill: RoutingStats
    decode: RoutingStats | None
    tokens: tuple[Int[Tensor, "_"], ...]
    texts: tuple[str, ...] | None

    def summary(self) -> str:
        """Numbers of prompts, of their tokens and of generated ones, and the model."""
        decoded = 0 if self.decode is None else self.decode.n_tokens
        return (
            f"{len(self.tokens)} prompts: {self.prefill.n_tokens} tokens of prompts, {decoded} generated; "
            f"{self.prefill.shape.words}"
        )


def collect_generation(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    hooks: Hooks = (),
    progress: bool = True,
) -> GenerationRouting:
    """Generate greedily, with the KV cache, and count the routing of prefill and decode apart.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the"]
    >>> routing = collect_generation(model, prompts, max_new_tokens=4, progress=False)
    >>> routing.prefill.n_tokens, len(routing.tokens)
    (9, 2)

    Args:
        model: a HookedMoE or RoutedModel.
        prompts: as in `collect_routing`.
        max_new_tokens: how many tokens at most follow each prompt.
        batch_size: prompts at a time.
        hooks: forward hooks to run under (`steer_hooks(plan)`); what they change is what is counted.
        progress: show a progress bar.

    Raises:
        DataError: no prompts, max_new_tokens below 1 or beyond the model's context, prompts of different
            lengths in one batch for a model that cannot generate with padding.
    """
    rules = {layer: moe.rule for layer, moe in routing_layers(model).items()}
    stops = stop_tokens(model)
    prefill: RoutingStats | None = None
    decode: RoutingStats | None = None
    written: list[Tensor] = []
    among = Pass(how_many(prompts))
    with tqdm(total=among.n_prompts, desc="generating", unit="prompt", disable=not progress) as bar:
        for tokens, mask in padded_batches(model, prompts, batch_size):
            rows = list(range(len(written), len(written) + len(tokens)))
            with running_of(model).of_prompts(rows, among):
                new, record = generate_recorded(model, tokens, mask, max_new_tokens, hooks)
            unended = before_end(new, stops)
            part = _count(model, [step[0] for step in record.values()], mask, rules, list(record))
            prefill = part if prefill is None else prefill + part
            routed = unended[:, : new.shape[1] - 1]
            if bool(routed.any()):
                later = [
                    torch.cat([step[:, -1:] for step in steps_of[1:]], dim=1) for steps_of in record.values()
                ]
                part = _count(model, later, routed, rules, list(record))
                decode = part if decode is None else decode + part
            lengths = (unended.sum(1) + 1).clamp(max=new.shape[1]).tolist()
            written += [row[:length] for row, length in zip(new.cpu(), lengths, strict=True)]
            bar.update(len(tokens))
    among.end(len(written))
    assert prefill is not None  # padded_batches refuses an empty list
    texts = None
    if model.tokenizer is not None:
        texts = tuple(model.tokenizer.decode(row, skip_special_tokens=True) for row in written)
    return GenerationRouting(prefill, decode, tuple(written), texts)


def generate_recorded(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    max_new_tokens: int,
    hooks: Hooks = (),
    points: Sequence[str] = hook_names.POINTS,
    **options: Any,
) -> tuple[Int[Tensor, "batch new"], dict[str, list[Tensor]]]:
    """The generated tokens, and of each routing point what it held at each step, prefill first.

    Greedy, unless the options for `model.generate` say otherwise.

    Raises:
        DataError: as in `collect_generation`.
    """
    steps = whole_number(max_new_tokens, "max_new_tokens", least=1)
    stops = stop_tokens(model)
    if tokens.shape[1] + steps > model.cfg.n_ctx:
        raise DataError(
            f"A prompt of {tokens.shape[1]} tokens and max_new_tokens={steps} exceed the model's context of "
            f"{model.cfg.n_ctx}; give fewer."
        )
    attention_mask: dict[str, Any] = padding(mask)
    if attention_mask and not supports_padding(model):
        raise DataError("This model cannot generate from prompts of different lengths; use batch_size=1.")
    record: dict[str, list[Tensor]] = {}

    def keep(value: Tensor, hook: Any) -> None:
        record.setdefault(hook.name, []).append(value.detach().clone())

    # Recorders come last: what they see is what the experts get.
    names = [hook_names.name(layer, point) for layer in routing_layers(model) for point in points]
    ends: Any = stops or None  # a list will do, whatever TransformerLens' annotation says
    with torch.no_grad(), model.hooks([*hook_list(hooks), *((name, keep) for name in names)]):
        output: Any = model.generate(
            tokens,
            max_new_tokens=steps,
            return_type="tokens",
            verbose=False,
            stop_at_eos=bool(stops),
            eos_token_id=ends,
            **{"do_sample": False, **options, **attention_mask},
        )
    return output[:, tokens.shape[1] :], {name: record[name] for name in names}


def _count(
    model: Model,
    values: list[Tensor],
    mask: Bool[Tensor, "batch pos"],
    rules: dict[int, RoutingRule],
    names: list[str],
) -> RoutingStats:
    stats = RoutingStats.from_cache(dict(zip(names, values, strict=True)), mask, rules=rules)
    return replace(stats, shape=moe_shape(model))


def before_end(new: Int[Tensor, "batch new"], stops: list[int]) -> Bool[Tensor, "batch new"]:
    """Which generated tokens come before the first end-of-sequence token of their prompt.

    The end itself is left out: the last prompt to end never routes it, the others of its batch do.
    """
    ended = torch.isin(new, torch.tensor(stops, dtype=new.dtype, device=new.device))
    return ended.long().cumsum(1) == 0


def stop_tokens(model: Model) -> list[int]:
    """What `model.generate` stops at: the config's end-of-sequence tokens, or the tokenizer's."""
    stops = getattr(model.cfg, "eos_token_id", None)
    if stops is None:
        stops = getattr(model.tokenizer, "eos_token_id", None)
    if stops is None:
        return []
    return [stops] if isinstance(stops, int) else list(stops)
