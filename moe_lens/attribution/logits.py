"""Which expert wrote the answer: each expert's share of a logit, along the direct path.

    found = expert_logit_attribution(model, prompts, " Paris")      # or answer and wrong token
    found.by_expert()                           # [layer batch expert]; found.parts has the rest of the logit
    expert_logit_lens(model, prompts, layer=3)  # [batch pos k d_vocab]: what each expert writes in all logits

Direct logit attribution (Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593) counts what a part adds to
the residual stream and what the final norm, at the scale that it had, and the unembedding make of that. What
later layers make of it is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.attribution.direct_paths import DirectPath, direct_path, logit_cap, wide
from moe_lens.attribution.equal_lengths import equal_length_batches, positions, side_by_side
from moe_lens.checks import as_index
from moe_lens.errors import DataError, MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.registration import forward_state, moe_shape
from moe_lens.shape import MoEShape
from moe_lens.text.batching import Prompts

_TOLERANCE: Final = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the parts' sizes; half precision: 0.1


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What experts and the rest of a model wrote into one logit (or difference of logits) of each prompt.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import expert_logit_attribution
    >>> model = organisms.load("specialised")
    >>> found = expert_logit_attribution(model, ["Question : what is", "Document : the"], "the")
    >>> found.by_expert().shape, found.rest.shape            # [layer batch expert], [batch]
    (torch.Size([4, 2, 8]), torch.Size([2]))
    >>> bool((found.total - found.logit).abs().max() < 1e-4)
    True

    Everything is in logits (nats) and float32 at least, on the CPU.

    Attributes:
        shape: the model; its MoE layers are the axis "layer".
        experts: share of each chosen expert, its weight included.
        indices: which experts they are, int64.
        parts: share of everything else; `part_names` says what: "embed", "blocks.3.attn" (attention or
            another mixer), "blocks.3.mlp" (of a MoE block: what it adds beside its routed experts; else the
            dense MLP), "ln_final.bias", "unembed.bias"..., under TransformerLens' names for them. Measured
            for themselves, not as a difference.
        logit: what the model returned; before the soft cap where it has one.
        soft_cap: c of c · tanh(logit / c), which Gemma 4 puts over its logits; None elsewhere.
    """

    shape: MoEShape
    experts: Float[Tensor, "layer batch k"]
    indices: Int[Tensor, "layer batch k"]
    parts: Float[Tensor, "part batch"]
    part_names: tuple[str, ...]
    logit: Float[Tensor, "batch"]
    soft_cap: float | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers."""
        return self.shape.layers

    @property
    def rest(self) -> Float[Tensor, "batch"]:
        """The share of everything but routed experts."""
        return self.parts.sum(0)

    @property
    def total(self) -> Float[Tensor, "batch"]:
        """The sum of all shares; the logit up to `error`."""
        return self.experts.sum((0, 2)) + self.rest

    @property
    def error(self) -> Float[Tensor, "batch"]:
        """logit − total: what rounding in the model's dtype has left over."""
        return self.logit - self.total

    def by_expert(self) -> Float[Tensor, "layer batch expert"]:
        """Share of every expert, 0 where it was not chosen."""
        shares = torch.zeros(*self.experts.shape[:2], self.shape.n_experts, dtype=self.experts.dtype)
        return shares.scatter_add(-1, self.indices, self.experts)

    def __repr__(self) -> str:
        of = "logit before the soft cap" if self.soft_cap else "logit"
        lines = [
            f"LogitAttribution({self.shape.model}, {len(self.logit)} prompts; means over prompts)",
            f"  {of} {float(self.logit.mean()):+.3f} = experts {float(self.experts.sum((0, 2)).mean()):+.3f} "
            f"+ rest {float(self.rest.mean()):+.3f} + error, at most {float(self.error.abs().max()):.1g}",
        ]
        means = self.by_expert().mean(1)
        for place in means.abs().flatten().topk(min(5, means.numel())).indices.tolist():
            layer, expert = divmod(place, self.shape.n_experts)
            lines.append(f"  layer {self.layers[layer]} expert {expert}: {float(means[layer, expert]):+.3f}")
        return "\n".join(lines)


def expert_logit_attribution(
    model: HookedMoE,
    prompts: Prompts,
    answer_tokens: Any,
    wrong_tokens: Any = None,
    pos: Any = -1,
    *,
    batch_size: int = 8,
) -> LogitAttribution:
    """How much each chosen expert wrote directly into the logit of a token, at one position of each prompt.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import expert_logit_attribution
    >>> model = organisms.load("planted")
    >>> fact = organisms.world("planted").facts("test")[0]
    >>> found = expert_logit_attribution(model, fact.question, fact.answer)
    >>> found.experts.shape, found.part_names[:3]            # [layer batch k]
    (torch.Size([4, 1, 2]), ('embed', 'blocks.0.attn', 'blocks.0.mlp'))

    One forward and one backward pass a batch. The residual stream carries the change of one output to the
    logits; attention, routing and other experts are held fixed, and so are the scales of all norms. With what
    the rest of the model wrote, the shares add up to the logit.

    Args:
        model: a HookedMoE. Hooks that are on it count, but not those that edit the residual stream itself.
        prompts: strings, chats or tokens; see `collect_routing`. They run in batches of equal length.
        answer_tokens: token ids or strings of one token (mind a space before a word); one, or one a prompt.
        wrong_tokens: if given, the difference logit(answer) − logit(wrong) is attributed.
        pos: the position whose logits count, as a place among the prompt's tokens; one, or one a prompt.

    Raises:
        DataError: answers that are not single tokens, not as many as prompts; positions outside a prompt.
        MoELensError: the shares do not add up: the model has a part that is not seen, or a hook edits the
            residual stream.
    """
    batches = equal_length_batches(model, prompts, batch_size)
    n_prompts = sum(len(rows) for rows, _ in batches)
    lengths = _lengths(batches)
    places = positions(pos, lengths)
    answers = single_tokens(model, answer_tokens, n_prompts, "answer_tokens")
    wrong = None if wrong_tokens is None else single_tokens(model, wrong_tokens, n_prompts, "wrong_tokens")
    found: list[tuple[list[int], Tensor, Tensor, Tensor, Tensor]] = []
    names: tuple[str, ...] = ()
    for rows, tokens in batches:
        with forward_state(model).of_prompts(rows):
            path = direct_path(model, tokens)
        row, at = torch.arange(len(rows)), torch.tensor([places[each] for each in rows])
        logits = wide(path.logits[row, at])
        logit = logits[row, answers[rows]]
        if wrong is not None:
            logit = logit - logits[row, wrong[rows]]
        experts, parts = path.shares(logit)
        _check(model, path, logit.detach(), experts, parts)
        chosen = torch.stack([each[row, at].cpu() for each in path.indices.values()])
        found.append((rows, experts[:, row, at], chosen, parts, logit))
        names = tuple(part.name for part in path.parts)
    order = sorted(range(len(names)), key=lambda part: _place(names[part]))
    return LogitAttribution(
        moe_shape(model),
        side_by_side([(each[0], each[1]) for each in found], (1, None), torch.nan),
        side_by_side([(each[0], each[2]) for each in found], (1, None), -1),
        side_by_side([(each[0], each[3]) for each in found], (1, None), torch.nan)[order],
        tuple(names[part] for part in order),
        side_by_side([(each[0], each[4]) for each in found], (0, None), torch.nan),
        logit_cap(model),
    )


def expert_logit_lens(
    model: HookedMoE, prompts: Prompts, layer: int, pos: Any = None, *, batch_size: int = 8
) -> Float[Tensor, "batch pos k d_vocab"]:
    """What each chosen expert of a layer wrote directly into every logit, its weight included.

    >>> from moe_lens import organisms
    >>> from moe_lens.attribution import expert_logit_lens
    >>> model = organisms.load("specialised")
    >>> lens = expert_logit_lens(model, "Question : what is", layer=3)
    >>> lens.shape == (1, 5, 2, model.cfg.d_vocab)           # [batch pos k d_vocab]
    True
    >>> words = [model.to_string(token) for token in lens[0, -1, 0].topk(3).indices]  # what it argues for

    The logit lens (nostalgebraist 2020) of one expert, along the path of `expert_logit_attribution`, which
    gives the same numbers for one token. Biases and the other parts are not in it.

    Args:
        layer: number of a MoE layer.
        pos: one position, or one a prompt, as in `expert_logit_attribution`: "pos" then has length 1. All
            positions if None; shorter prompts have NaN on the left.

    Returns: in the model's dtype, on the CPU; before the soft cap where the model has one.

    Raises:
        DataError: a layer without router; prompts and positions as in `expert_logit_attribution`.
    """
    batches = equal_length_batches(model, prompts, batch_size)
    if as_index(layer) not in model.moe_layers:
        raise DataError(f"layer {layer!r} has no router; the MoE layers are {model.moe_layers}.")
    places = None if pos is None else positions(pos, _lengths(batches))
    found = []
    for rows, tokens in batches:
        with forward_state(model).of_prompts(rows):
            path = direct_path(model, tokens)
        at = None if places is None else torch.tensor([places[each] for each in rows])
        found.append((rows, _lens(path, int(layer), at)))
    return side_by_side(found, (0, 1), torch.nan)


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


def single_tokens(model: HookedMoE, given: Any, n_prompts: int, name: str) -> Int[Tensor, "batch"]:
    """Token ids, one a prompt, from ids or strings; one is used for all prompts.

    Raises:
        DataError: not as many as prompts, a string that is no single token, an id outside the vocabulary.
    """
    if isinstance(given, Tensor) or hasattr(given, "tolist"):
        given = given.tolist()
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * n_prompts
    if len(each) != n_prompts:
        raise DataError(f"{name}: one, or one a prompt; got {len(each)} for {n_prompts} prompts.")
    return torch.tensor([_single_token(model, answer, name) for answer in each])


def _single_token(model: HookedMoE, answer: Any, name: str) -> int:
    if isinstance(answer, str):
        return _token_of_text(model, answer, name)
    token = as_index(answer)
    if token is None or token >= model.cfg.d_vocab:
        raise DataError(f"{name}: {answer!r} is no string and no token id (0 to {model.cfg.d_vocab - 1}).")
    return token


def _token_of_text(model: HookedMoE, answer: str, name: str) -> int:
    if model.tokenizer is None:
        raise DataError(f"{name}: {answer!r} is text and the model has no tokenizer; give token ids.")
    tokens = model.to_tokens(answer, prepend_bos=False)[0].tolist() if answer else []
    if len(tokens) != 1 or tokens[0] == getattr(model.tokenizer, "unk_token_id", None):
        pieces = [model.tokenizer.decode([token]) for token in tokens]
        raise DataError(
            f"{name}: {answer!r} is {len(tokens)} tokens, {pieces}, and must be a single one of the model's "
            "vocabulary. Mind the space before a word, or give token ids."
        )
    return int(tokens[0])


def _lengths(batches: Any) -> list[int]:
    """The number of tokens of each prompt."""
    by_row = {row: tokens.shape[1] for rows, tokens in batches for row in rows}
    return [by_row[row] for row in sorted(by_row)]


def _place(name: str) -> tuple[int, int]:
    """The order in which a forward comes to a part: embedding, blocks, final norm, unembedding."""
    kind, *rest = name.split(".")
    order = ("embed", "blocks", "ln_final", "unembed").index(kind)
    return order, int(rest[0]) if kind == "blocks" else 0


def _check(model: HookedMoE, path: DirectPath, logit: Tensor, experts: Tensor, parts: Tensor) -> None:
    error = (logit.to(parts.device) - experts.sum((0, 2, 3)) - parts.sum(0)).abs()
    size = experts.abs().sum((0, 2, 3)) + parts.abs().sum(0)
    dtype = next(iter(path.expert_out.values())).dtype  # some models return float32 logits whatever theirs
    if not bool((error <= _TOLERANCE.get(dtype, 0.1) * size.clamp(min=1e-6)).all()):
        raise MoELensError(
            f"{model.cfg.model_name}: experts, attention, embedding and biases do not add up to the logit "
            f"(off by {float(error.max()):.2g}). Either a hook edits the residual stream, which no part "
            "accounts for, or the model adds something that moe_lens does not see."
        )
