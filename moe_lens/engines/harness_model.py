"""lm-evaluation-harness' Hugging Face model, around a model with hook points: what it reads, who is steered.

    lm = WrappedLM(model, batch_size=16)
    with steered_requests(lm, hooks):
        lm.loglikelihood(requests), lm.generate_until(requests)

A request is a context and, where its answers are scored rather than written, a continuation. So the phases of
`positions=` mean here what they mean in `answer_task`: "prompt" the context, "generated" what follows it.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from moe_lens.encoding import padded_rows, text_ids
from moe_lens.errors import DataError, HookError, warn
from moe_lens.evaluation.reading import Continuations, is_most_probable, log_probs
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.interventions.positions import PHASES
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.text.batching import Limits

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""Texts, tokens of the context, tokens of the continuation."""

AnyHFLM: Any = HFLM
"""The harness' registry hides the type of its classes."""

SEED: Final = 1234
"""lm-evaluation-harness' own, of few-shot examples and of sampled answers."""


class WrappedLM(AnyHFLM):
    """A `HookedMoE` or `RoutedModel` as the harness runs models; neither it nor its tokenizer changes.

    Texts become tokens as `model.to_tokens` makes them, so `model.prepend_bos` counts.

    Args:
        batch_size: requests in one forward.

    Raises:
        DataError: no tokenizer, or a model in training mode.
    """

    def __init__(self, model: Model, batch_size: int) -> None:
        check_hooked(model, error=DataError)
        network: Any = model.original_model  # type: ignore[attr-defined]
        if model.tokenizer is None:
            raise DataError("The harness needs a tokenizer, and this model has none: set model.tokenizer.")
        if network.training:
            raise DataError("The model is in training mode, in which scores are noisy; call model.eval().")
        self.moe = model
        with _left_as_it_is(network), quiet():
            tokenizer = copy.deepcopy(model.tokenizer)
            super().__init__(pretrained=network, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self._device = torch.device(model.cfg.device)
        self.placed = False
        self._known: dict[tuple[str, bool | None], list[int]] = {}  # every run asks for the same texts

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """A text's tokens, with the BOS that the model is set to; without special ones if False."""
        bos = getattr(self.tokenizer, "bos_token", None)
        own = bool(bos) and string.startswith(str(bos))  # a chat, which the template began
        given = False if add_special_tokens is False or own else getattr(self.moe, "prepend_bos", None)
        key = (string, given)
        if key not in self._known:
            self._known[key] = text_ids(self.tokenizer, string, given)
        ids = self._known[key]
        return ids[-left_truncate_len:] if left_truncate_len else list(ids)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and mask of several texts."""
        ids = [self.tok_encode(text) for text in strings]
        if left_truncate_len and (longest := max(map(len, ids))) > left_truncate_len:
            warn(
                f"A prompt of {longest} tokens is cut to its last {left_truncate_len}, since the answer "
                f"needs room in the model's {self.max_length}; ask for fewer (max_gen_toks)."
            )
            ids = [row[-left_truncate_len:] for row in ids]
        rows = [torch.tensor(row) for row in ids]
        tokens, mask = padded_rows(rows, self.tokenizer.pad_token_id, padding_side)
        return tokens, mask.long()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the harness has it, without a bar."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Refused: what comes of it is no number a prompt."""
        raise DataError("Perplexity is of a corpus, not of a prompt; use text_loss as a collateral measure.")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As the harness has it, without a bar; sampled answers are the same each time."""
        for request in requests:
            asked = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if asked >= self.max_length:
                raise DataError(
                    f"An answer of up to {asked} tokens leaves no room for the prompt in the model's "
                    f'{self.max_length}; ask for fewer: gen_kwargs={{"max_gen_toks": 32}}.'
                )
        if not any(request.args[1].get("do_sample") for request in requests):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Where hooks ask for phases, in batches in which the continuations begin in one column."""
        if not self.placed:
            found = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            if any(
                math.isnan(log_prob) for log_prob, _ in found
            ):  # the harness would take it for the largest
                raise DataError("The model's logits are NaN under these hooks; nothing can be measured.")
            return found
        longest = max(len(context) + len(continuation) - 1 for _, context, continuation in requests)
        if longest > self.max_length:
            raise DataError(
                f"A request of {longest} tokens exceeds the model's {self.max_length}, and would be cut; "
                "hooks with positions= need whole prompts."
            )
        after = Continuations.of(
            [torch.tensor(context) for _, context, _ in requests],
            [[continuation] for _, _, continuation in requests],
        )
        limits = Limits.of(self.batch_size, None, self.moe)
        model: Any = self.moe
        sums = [float(found[0].sum()) for found in after.values(model, (), limits, log_probs)]
        greedy = [bool(found[0].all()) for found in after.values(model, (), limits, is_most_probable)]
        return list(zip(sums, greedy, strict=True))


@contextmanager
def steered_requests(lm: WrappedLM, hooks: Hooks) -> Iterator[None]:
    """Within the context, requests run under these hooks, and under those that are set on the model already.

    Raises:
        HookError: positions that the harness' batches do not have.
    """
    with lm.moe.hooks(fwd_hooks=hook_list(hooks)):
        lm.placed = _check_places(lm.moe)
        try:
            yield
        finally:
            lm.placed = False


def check_generated(lm: WrappedLM, requests: Sequence[Any]) -> None:
    """Refuse hooks on what is "generated" where nothing is: all continuations are single tokens.

    Raises:
        HookError: so.
    """
    if "generated" not in _places(lm.moe):
        return
    texts = {request.args for request in requests}
    if all(len(lm._encode_pair(*pair)[1]) == 1 for pair in texts if pair[0]):
        raise HookError(
            'positions="generated" steers nothing here: each answer is one token, which the model is asked '
            "for and never reads. Leave positions out."
        )


def _check_places(model: Model) -> bool:
    """Whether some hook has positions; raises where these are no phase of a request."""
    places = _places(model)
    for place in places:
        if not isinstance(place, str) or place not in PHASES:
            raise HookError(
                f"positions={place!r}: the harness sorts prompts by length and pads them, so that columns, "
                "masks and spans would mean other tokens in each batch. Use 'prompt', 'generated' or no "
                "positions."
            )
    return len(places) > 0


def _places(model: Any) -> list[Any]:
    """The positions of all hooks that are set. Raises HookError for one plan a prompt."""
    found = []
    for point in model.hook_dict.values():
        for handle in point.fwd_hooks:
            hook = handle.user_hook
            own = (getattr(hook, name, None) is not None for name in ("n_columns", "n_prompts"))
            if len(getattr(hook, "plans", ())) > 1 or any(own):
                raise HookError(
                    f"{point.name}: the harness sorts prompts by length, so that a hook with a plan or a "
                    "route for each prompt would meet others; give what is the same for all."
                )
            if (place := getattr(hook, "positions", None)) is not None:
                found.append(place)
    return found


@contextmanager
def _left_as_it_is(network: nn.Module) -> Iterator[None]:
    """The harness ties weights of a model that it is given; folded or edited ones must not be."""
    own = vars(network).get("tie_weights")
    vars(network)["tie_weights"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if own is None:
            del vars(network)["tie_weights"]
        else:
            vars(network)["tie_weights"] = own


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness' warnings about models that it has not loaded itself."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
