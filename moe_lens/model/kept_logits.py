"""Logits of the columns that somebody reads, and of no others.

    with reading_logits(model, hooks) as read:
        logits = read(tokens, columns, mask, rows, n_prompts)       # [batch column d_vocab]

A vocabulary of 50,000 tokens costs as much as several blocks, and its logits more memory than anything else
in a forward. Hugging Face's forwards take `logits_to_keep`, and cut the residual stream just before the
unembedding. Where a model does not take it, or somebody's hook waits on the unembedding or behind it and
would see less than it expects, all logits are computed and these picked.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.private_names import foreign_hooks, has_hooks
from moe_lens.model.registration import running_of
from moe_lens.model.state import Generation, Pass

_IN_A_LIST: Final = re.compile(r"\.\d+(\.|$)")
"""In the path of a module: it stands in a list of blocks, before the unembedding."""


@dataclass(frozen=True, eq=False)
class LogitReader:
    """Runs a model for the logits of some columns.

    Attributes:
        model: a HookedMoE, a RoutedModel or any TransformerBridge.
        keeps: whether only those are computed.
        is_bare: whether no hook waits on any point, and nobody's own on a module. Then padding belongs on
            the right, where nothing that is read sees it, so that every family computes what it does for one
            prompt, and needs no mask.
    """

    model: Any
    keeps: bool
    is_bare: bool

    @property
    def padding_side(self) -> str:
        """Where padding belongs: "left" under hooks, as everywhere, and else "right"."""
        return "right" if self.is_bare else "left"

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        columns: Int[Tensor, "column"],
        mask: Bool[Tensor, "batch pos"],
        rows: Sequence[int],
        n_prompts: Pass | int,
        n_prompt: int | None = None,
    ) -> Float[Tensor, "batch column d_vocab"]:
        """Logits of a forward.

        Args:
            tokens: padded on `padding_side`.
            columns: those that are read, ascending.
            mask: True on the prompts' own tokens.
            rows: which prompt each row is, for hooks with something a prompt (a plan, a mask).
            n_prompts: how many prompts there are in all; or their `Pass`.
            n_prompt: how many columns are the prompt's; hooks take the others for what the model has written.
                None: all.
        """
        n_pos, n_read = tokens.shape[1], len(columns)
        kept: dict[str, Any] = {"use_cache": False}
        if self.keeps and n_read < n_pos:
            at_the_end = int(columns[0]) == n_pos - n_read
            kept["logits_to_keep"] = n_read if at_the_end else columns.to(tokens.device)
        if self.is_bare:
            logits = self.model.original_model(input_ids=tokens, **kept).logits
        else:
            state = running_of(self.model)
            with ExitStack() as stack:
                stack.enter_context(state.of_prompts(rows, n_prompts))
                if n_prompt is not None and n_prompt < n_pos:
                    stack.enter_context(state.generation(Generation(n_prompt=n_prompt)))
                logits = self.model(tokens, attention_mask=mask.long(), **kept)
        if logits.shape[1] == n_read:
            return logits
        n_virtual = logits.shape[1] - n_pos  # what prompt tuning puts before the tokens
        return logits[:, columns.to(logits.device) + n_virtual]


@contextmanager
def reading_logits(model: Any, hooks: Hooks = ()) -> Iterator[LogitReader]:
    """Within the context, the reader that it gives runs the model under these hooks, without gradients."""
    with torch.no_grad(), model.hooks(fwd_hooks=hook_list(hooks)):
        hooked = [name for name, point in model.hook_dict.items() if has_hooks(point)]
        foreign = [name for name, module in model.original_model.named_modules() if foreign_hooks(module)]
        keeps = _takes_columns(model) and not _are_seen(hooked, foreign)
        yield LogitReader(model, keeps, is_bare=not hooked and not foreign)


def _takes_columns(model: Any) -> bool:
    """Whether the forward of the Hugging Face model (inside adapters, too) has `logits_to_keep`.

    It would count columns that prompt tuning puts before the tokens.
    """
    inside = model.original_model
    if getattr(getattr(inside, "active_peft_config", None), "is_prompt_learning", False):
        return False
    if hasattr(inside, "get_base_model"):
        inside = inside.get_base_model()
    return "logits_to_keep" in inspect.signature(inside.forward).parameters


def _are_seen(hooked: list[str], foreign: list[str]) -> bool:
    """Whether hooks on these points and modules wait where logits are, or may be: outside of the blocks."""
    in_blocks = all(name.startswith("blocks.") for name in hooked)
    return not in_blocks or any(not _IN_A_LIST.search(name) for name in foreign)
