"""Which tokens of a forward a hook function was given, when it was called on a part of the logits.

def first_row(logits, hook):
    logits = logits.clone()
    logits[:1] = steer(logits[:1], hook)             # steers and holds in row 0 only
    return logits
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.errors import HookError


def tokens_of(
    part: Float[Tensor, "*part expert"], batch: tuple[int, ...], values: Tensor | None
) -> Int[Tensor, "*part"]:
    """The numbers, in the flattened batch, of the tokens whose logits these are.

    A view of all logits is found by where it lies in memory, a copy by its values.

    Args:
        part: logits of some tokens, all experts.
        batch: (rows, positions) of the forward.
        values: the logits as the hook point had them [*batch expert]; None: not at hand.

    Raises:
        HookError: the tokens cannot be told.
    """
    tokens = _by_place(part, batch)
    if values is not None and (tokens is None or not torch.equal(_of_tokens(values, tokens), part)):
        found = _by_value(part, values)  # a copy in another order can lie like a view
        tokens = tokens if found is None else found
    if tokens is None:
        raise HookError(
            f"A plan was called on logits of shape {tuple(part.shape)}, in a run of [batch pos] = "
            f"{list(batch)}, and which tokens these are cannot be told from their memory or their values. "
            "Name them: steer_hooks(plan, positions=...), or a plan a prompt, steer_hooks([plan, None, ...])."
        )
    return tokens


def _by_place(part: Tensor, batch: tuple[int, ...]) -> Tensor | None:
    width, n_tokens = part.shape[-1], torch.Size(batch).numel()
    if part.untyped_storage().nbytes() != n_tokens * width * part.element_size():
        return None
    strides = [
        0 if size == 1 else step for size, step in zip(part.shape[:-1], part.stride()[:-1], strict=True)
    ]
    within = 0 if width == 1 else part.stride(-1) - 1  # the experts of a token lie side by side
    if within or any(step % width for step in (*strides, part.storage_offset())):
        return None
    numbers = torch.arange(n_tokens, device=part.device)
    return numbers.as_strided(
        part.shape[:-1], [step // width for step in strides], part.storage_offset() // width
    )


def _of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    return values.flatten(0, -2)[tokens.to(values.device)]


def _by_value(part: Tensor, values: Tensor) -> Tensor | None:
    rows, whole = part.detach().flatten(0, -2), values.detach().flatten(0, -2).to(part)
    ids = torch.unique(torch.cat([whole, rows]), dim=0, return_inverse=True)[1]
    of_whole, of_rows = ids[: len(whole)], ids[len(whole) :]
    n_like = torch.bincount(of_whole, minlength=int(ids.max()) + 1)
    if not bool((n_like[of_rows] == 1).all()):
        return None
    number = torch.zeros_like(n_like).scatter(0, of_whole, torch.arange(len(whole), device=ids.device))
    return number[of_rows].reshape(part.shape[:-1])


def plans_by_row(n_plans: int, state: Any, n_rows: int, device: torch.device) -> Int[Tensor, " batch"] | None:
    """Which of the plans is each row's, one plan a prompt; None where it is row by row.

    Raises:
        HookError: another number of prompts runs.
    """
    key = ("plans", n_plans, n_rows, device)
    if key not in state.memory:  # the same in every layer
        in_turn = torch.arange(n_plans)
        rows = state.by_prompt(in_turn, n_rows)
        if rows is None:
            raise HookError(
                f"{n_plans} plans were given, one a prompt, and {state.of_how_many(n_rows)} prompts run. "
                "Give as many plans (None for a prompt that is not steered), or one for all."
            )
        state.memory[key] = None if rows is in_turn else rows.to(device)
    return state.memory[key]
