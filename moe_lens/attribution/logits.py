"""Which expert wrote the answer: each expert's share of a logit, along the direct path.

    found = expert_logit_attribution(model, prompts, " Paris")      # or an answer and a wrong token
    found.by_expert()                           # [layer batch expert]; found.parts has the rest of the logit
    expert_logit_lens(model, prompts, layer=3)  # [batch pos k d_vocab]: what each expert writes

Direct logit attribution (Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593) counts what a part adds to
the residual stream, passed through the final norm, at the scale that it had, and the unembedding. What later
layers make of it is not counted.
"""

from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.attribution.direct_paths import DirectPath, direct_path, logit_cap, wide
from moe_lens.attribution.equal_lengths import equal_length_batches, positions, side_by_side
from moe_lens.attribution.results import LogitAttribution
from moe_lens.checks import as_index
from moe_lens.errors import DataError, MoELensError
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.registration import moe_shape, running_of
from moe_lens.model.wrapper import Model
from moe_lens.text.answers import single_tokens
from moe_lens.text.batching import Prompts

_TOLERANCE: Final = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the parts' sizes; half precision: 0.1
_BATCH_DIM: Final = {"experts": 1, "indices": 1, "parts": 1, "logit": 0}  # of what each batch gives


def expert_logit_attribution(
    model: Model,
    prompts: Prompts,
    answer_tokens: Any,
    wrong_tokens: Any = None,
    pos: Any = -1,
    *,
    batch_size: int = 8,
    hooks: Hooks = (),
    progress: bool = True,
) -> LogitAttribution:
    """How much each chosen expert wrote directly into the logit of a token, at one position of each prompt.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import expert_logit_attribution
    >>> model = organisms.load("planted")
    >>> fact = organisms.world("planted").facts("test")[0]
    >>> found = expert_logit_attribution(model, fact.question, fact.answer, progress=False)
    >>> found.experts.shape, found.part_names[:3]            # [layer batch k]
    (torch.Size([4, 1, 2]), ('embed', 'blocks.0.attn', 'blocks.0.mlp'))

    One forward and one backward pass a batch. The residual stream carries a change of one output to the
    logits; attention, routing and other experts are held fixed, and so are the scales of all norms. Together
    with what the rest of the model wrote, the shares add up to the logit.

    Args:
        model: a HookedMoE or RoutedModel. Hooks that are on it act, too, but may not edit the residual
            stream itself.
        prompts: strings, chats or tokens; see `moe_lens.text.Prompts`. They run in batches of equal length.
        answer_tokens: token ids or strings of one token (mind the space before a word); one, or one a prompt.
        wrong_tokens: if given, the difference logit(answer) − logit(wrong) is attributed.
        pos: the position whose logits count, as a place among the prompt's tokens; one, or one a prompt.
        batch_size: prompts a forward.
        hooks: forward hooks to run under (`steer_hooks(plan)`, for one); like those on the model they may not
            edit the residual stream.
        progress: show a progress bar.

    Raises:
        DataError: answers that are not single tokens, or not as many as prompts; positions outside a prompt.
        MoELensError: the shares do not add up: the model has a part that moe_lens does not see, or a hook
            edits the residual stream.
    """
    batches = equal_length_batches(model, prompts, batch_size)
    lengths = _lengths(batches)
    places = positions(pos, lengths)
    answers = single_tokens(model, answer_tokens, len(lengths), "answer_tokens")
    wrong = None if wrong_tokens is None else single_tokens(model, wrong_tokens, len(lengths), "wrong_tokens")
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {name: [] for name in _BATCH_DIM}
    names: tuple[str, ...] = ()
    bar = tqdm(total=len(lengths), desc="logit attribution", unit="prompt", disable=not progress)
    with torch.inference_mode(False), torch.enable_grad(), model.hooks(hook_list(hooks)), bar:
        for rows, tokens in batches:
            with running_of(model).of_prompts(rows, len(lengths)):
                path = direct_path(model, tokens)
            row, at = torch.arange(len(rows)), torch.tensor([places[prompt] for prompt in rows])
            logits = wide(path.logits[row, at])
            logit = logits[row, answers[rows]]
            if wrong is not None:
                logit = logit - logits[row, wrong[rows]]
            experts, parts = path.shares(logit)
            _check(model, path, logit.detach(), experts, parts)
            pieces["experts"].append((rows, experts[:, row, at]))
            pieces["indices"].append((rows, torch.stack([i[row, at].cpu() for i in path.indices.values()])))
            pieces["parts"].append((rows, parts))
            pieces["logit"].append((rows, logit))
            names = tuple(part.name for part in path.parts)
            bar.update(len(rows))
    whole = {name: side_by_side(pieces[name], (dim, None), 0) for name, dim in _BATCH_DIM.items()}
    order = sorted(range(len(names)), key=lambda part: _place(names[part]))
    return LogitAttribution(
        shape=moe_shape(model),
        experts=whole["experts"],
        indices=whole["indices"],
        parts=whole["parts"][order],
        part_names=tuple(names[part] for part in order),
        logit=whole["logit"],
        soft_cap=logit_cap(model),
        is_difference=wrong is not None,
    )


def expert_logit_lens(
    model: Model,
    prompts: Prompts,
    layer: int,
    pos: Any = None,
    *,
    batch_size: int = 8,
    hooks: Hooks = (),
    progress: bool = True,
) -> Float[Tensor, "batch pos k d_vocab"]:
    """What each chosen expert of a layer wrote directly into every logit, its weight included.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import expert_logit_lens
    >>> model = organisms.load("specialised")
    >>> lens = expert_logit_lens(model, "Question : what is", layer=3, progress=False)
    >>> lens.shape == (1, 5, 2, model.cfg.d_vocab)           # [batch pos k d_vocab]
    True
    >>> words = [model.to_string(token) for token in lens[0, -1, 0].topk(3).indices]  # what it argues for

    The logit lens (nostalgebraist 2020) of one expert, along the path of `expert_logit_attribution`, which
    gives the same numbers for one token. Biases and the other parts are not included.

    Args:
        model: a HookedMoE or RoutedModel. Hooks that are on it act, too.
        prompts: strings, chats or tokens; see `moe_lens.text.Prompts`. They run in batches of equal length.
        layer: number of a MoE layer.
        pos: one position, or one a prompt, as in `expert_logit_attribution`: "pos" then has length 1. All
            positions if None; shorter prompts have NaN on the left.
        batch_size: prompts a forward.
        hooks: forward hooks to run under, as in `expert_logit_attribution`.
        progress: show a progress bar.

    Returns: in the model's dtype, on the CPU; before the soft cap if the model has one.

    Raises:
        DataError: a layer without router; prompts and positions as in `expert_logit_attribution`.
    """
    batches = equal_length_batches(model, prompts, batch_size)
    if as_index(layer) not in model.moe_layers:
        raise DataError(f"layer {layer!r} has no router; the MoE layers are {model.moe_layers}.")
    places = None if pos is None else positions(pos, _lengths(batches))
    n_prompts, pieces = len(_lengths(batches)), []
    bar = tqdm(total=n_prompts, desc="logit lens", unit="prompt", disable=not progress)
    with torch.inference_mode(False), torch.enable_grad(), model.hooks(hook_list(hooks)), bar:
        for rows, tokens in batches:
            with running_of(model).of_prompts(rows, n_prompts):
                path = direct_path(model, tokens)
            at = None if places is None else torch.tensor([places[prompt] for prompt in rows])
            pieces.append((rows, _lens(path, int(layer), at)))
            bar.update(len(rows))
    return side_by_side(pieces, (0, 1), torch.nan)


def _lens(path: DirectPath, layer: int, at: Tensor | None) -> Tensor:
    """The frozen graph's Jacobian times each expert's output: the derivative of a vjp, which is linear."""
    logits, outputs = path.logits, path.expert_out[layer]
    values = outputs.detach()
    rows = torch.arange(len(logits))
    if at is not None:
        logits, keep = logits[rows, at][:, None], torch.zeros(values.shape[:2], device=values.device)
        keep[rows, at] = 1
        values = values * keep[..., None, None].to(values.dtype)
    weights = torch.zeros_like(logits, requires_grad=True)
    (pulled_back,) = torch.autograd.grad(logits, outputs, weights, create_graph=True)
    columns = []
    for slot in range(values.shape[2]):
        only = torch.zeros_like(values)
        only[:, :, slot] = values[:, :, slot]
        columns.append(torch.autograd.grad(pulled_back, weights, only, retain_graph=True)[0])
    return torch.stack(columns, dim=2)


def _lengths(batches: Any) -> list[int]:
    """The number of tokens of each prompt."""
    by_row = {row: tokens.shape[1] for rows, tokens in batches for row in rows}
    return [by_row[row] for row in sorted(by_row)]


def _place(name: str) -> tuple[int, int]:
    """Where a forward comes to a part: embedding, blocks, final norm, unembedding."""
    kind, *rest = name.split(".")
    order = ("embed", "blocks", "ln_final", "unembed").index(kind)
    return order, int(rest[0]) if kind == "blocks" else 0


def _check(model: Model, path: DirectPath, logit: Tensor, experts: Tensor, parts: Tensor) -> None:
    error = (logit.to(parts.device) - experts.sum((0, 2, 3)) - parts.sum(0)).abs()
    size = experts.abs().sum((0, 2, 3)) + parts.abs().sum(0)
    dtype = next(iter(path.expert_out.values())).dtype  # some models always return float32 logits
    if not bool((error <= _TOLERANCE.get(dtype, 0.1) * size.clamp(min=1e-6)).all()):
        raise MoELensError(
            f"{model.cfg.model_name}: experts, attention, embedding and biases do not add up to the logit "
            f"(off by {float(error.max()):.2g}). Either a hook edits the residual stream, which no part "
            "accounts for (take it off), or the model adds something that moe_lens does not see."
        )
