"""What a hook can ask about the forward that it is in: `hook.state`.

    state.offset, state.n_prompt               # columns before these tokens; columns of the prompt
    state.columns(n_pos), state.own_tokens(), state.by_prompt(values, n_rows)
    state.places(n_rows, n_pos), state.lengths(n_rows)     # of tokens in their own prompts, whatever padding

Hooks inside a block see no more than [batch pos ...]; to tell the prompt from what the model has written,
and column 5 of a prompt from column 0 of a cached step, they ask here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor

from moe_lens.encoding import prompts_among
from moe_lens.errors import HookError

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function, outside of compiled code: `torch.compiler.disable` with the type that it had."""
    return cast(Function, torch.compiler.disable(function))


@dataclass(frozen=True, eq=False)
class Bound:
    """A method of an object's class, in a pickle: it comes back as that, whatever stands in its place."""

    owner: Any
    name: str

    @staticmethod
    def of(function: Any) -> Any:
        """The function itself where it is no such method."""
        if not inspect.ismethod(function) or not hasattr(type(function.__self__), function.__name__):
            return function
        return Bound(function.__self__, function.__name__)

    def __reduce__(self) -> Any:
        return _bind, (self.owner, self.name)


def _bind(owner: Any, name: str) -> Any:
    return getattr(type(owner), name).__get__(owner)


@dataclass(eq=False)
class Generation:
    """One call of `generate`.

    Attributes:
        texts: the strings or chats that it was given; None where it was given tokens.
        n_prompt: columns of the prompt; None until its first forward tells.
        n_prompts: how many prompts, of which beams and samples are copies; None where that is not known.
        attention_mask: [prompt n_prompt], 0 on padding; None without one.
        unplaced: as in `ForwardState`.
        depth: how deep in other forwards it runs.
    """

    texts: list[Any] | None = None
    n_prompt: int | None = None
    n_prompts: int | None = None
    attention_mask: Tensor | None = None
    unplaced: str | None = None
    depth: int = 0


@dataclass(eq=False)
class Pass:
    """All prompts that a function runs, some at a time.

    Attributes:
        n_prompts: how many there are; None while a generator still gives them.
        rows_too: whether hooks of the function itself have values for the rows of a forward instead.
        longest: the most values one a prompt that a hook had, while that was not known.
    """

    n_prompts: int | None = None
    rows_too: bool = False
    longest: int = 0

    def fits(self, n_values: int, highest: int) -> bool:
        """Whether so many values, one a prompt, are for this pass, of whose prompts `highest` runs."""
        if self.n_prompts is not None:
            return n_values == self.n_prompts
        self.longest = max(self.longest, n_values)
        return highest < n_values

    def end(self, n_prompts: int) -> None:
        """All prompts have run. Raises HookError where a hook had values for more."""
        if self.longest > n_prompts:
            raise HookError(
                f"A hook has {self.longest} plans, masks or other values, one a prompt, and {n_prompts} "
                "prompts ran. Give as many, or one for all."
            )


@dataclass(eq=False)
class ForwardState:
    """One forward.

    Attributes:
        tokens: its input, int64 [batch pos]; None where it was given embeddings.
        attention_mask: [batch total], 0 on padding; None without one. In a generation with a static cache,
            whose forwards get masks of another form, [batch n_prompt], as `generate` was given it.
        unplaced: why columns tell no places of tokens in their prompts (`model.unplaced`); None: they do.
        padding_unknown: whether it has a mask of another form, and nobody knows what that hides.
        offset: how many columns are in the KV cache already; 0 in a plain forward.
        n_prompt: how many columns, cached ones included, are the prompt's. In a generation, those that
            `generate` was given, however its prefill is cut. Elsewhere all columns of a forward without
            cache; with one, the cached columns.
        texts: the strings or chats that the forward or the generation was given; None where it was given
            tokens.
        generating: whether it is a step of a generation.
        n_prompts: of how many prompts the rows are copies (beams, samples); None: each row is one.
        rows: which prompt each row of the batch is, int64 [batch], where a function runs some of its prompts,
            or some of them several times; None: row by row.
        among: the prompts of which `rows` are some.
        memory: what hooks found out about this forward and need not find out again in the next layer.
        bridge: the wrapper around the model (HookedMoE, RoutedModel); None for a bare model.
        ran: the blocks that began to run in it, where hooks watch for that.
        steered: what plans alone decided, (layer, weights [token k]), which is looked at once, at the end.
    """

    tokens: Tensor | None = None
    attention_mask: Tensor | None = None
    unplaced: str | None = None
    padding_unknown: bool = False
    offset: int = 0
    n_prompt: int = 0
    texts: list[Any] | None = None
    generating: int = 0
    n_prompts: int | None = None
    rows: Tensor | None = None
    among: Pass | None = None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    bridge: Any = field(default=None, repr=False)
    steered: list[tuple[str, Tensor]] = field(default_factory=list, repr=False)
    ran: set[str] = field(default_factory=set, repr=False)
    in_decoder: bool = False
    of_decoder: bool = False
    frame: Any = field(default=None, repr=False)  # of the module's call, while it runs (`model.frames`)

    def columns(self, n_pos: int) -> Tensor:
        """The columns [pos] of the `n_pos` tokens that are running."""
        return torch.arange(self.offset, self.offset + n_pos)

    def own_tokens(self) -> Tensor | None:
        """Bool [batch pos] for the columns that are running, False on padding; None without a mask.

        Raises HookError where `padding_unknown`.
        """
        self._check_padding()
        mask = self.attention_mask
        if mask is None:
            return None
        stop = mask.shape[1] if self.tokens is None else self.offset + self.tokens.shape[1]
        return _up_to(stop, mask)[:, self.offset :]

    def places(self, n_rows: int, n_pos: int) -> Tensor:
        """The place of each of the `n_pos` tokens that are running in its own prompt and what follows it.

        int64 [batch pos] on the CPU, from 0 on; -1 on padding. Raises HookError where `padding_unknown`.
        """
        own = self._own(n_rows, self.offset + n_pos)
        if own is None:
            return self.columns(n_pos).expand(n_rows, n_pos)
        return (own.long().cumsum(1) - 1).masked_fill(~own, -1)[:, self.offset :]

    def check_placed(self, positions: Any) -> None:
        """Raise HookError where positions cannot be found, since columns tell no places (`unplaced`)."""
        if self.unplaced is not None:
            raise HookError(f"positions={positions!r} cannot be found in this run: {self.unplaced}.")

    def note_own(self, own: Tensor) -> None:
        """Note which tokens are not padding, bool [batch pos], where no mask says so."""
        self.memory["mask"] = own

    def lengths(self, n_rows: int) -> Tensor:
        """How many tokens each row's prompt has, without padding: int64 [batch] on the CPU."""
        own = self._own(n_rows, self.n_prompt)
        return torch.full((n_rows,), self.n_prompt) if own is None else own.sum(1)

    def _own(self, n_rows: int, stop: int) -> Tensor | None:
        """Which of the first columns are not padding, on the CPU; None without a mask."""
        if "mask" not in self.memory:  # a look at another device, once a forward
            self._check_padding()
            self.memory["mask"] = None if self.attention_mask is None else self.attention_mask.cpu()
        mask = self.memory["mask"]
        if mask is None:
            return None
        if len(mask) not in (1, n_rows):
            raise HookError(f"The attention mask has {len(mask)} rows, and {n_rows} run; give a bool mask.")
        return _up_to(stop, mask).expand(n_rows, -1)

    def _check_padding(self) -> None:
        if self.padding_unknown:
            raise HookError(
                "The attention mask of this forward is not [batch total], so that its padding and the places "
                "of tokens in their own prompts are unknown. Pass a mask [batch total], 0 on padding, or say "
                "where by a bool mask [batch pos] over the columns (positions=mask)."
            )

    def by_prompt(self, values: Tensor, n_rows: int) -> Tensor | None:
        """Those of `values` [prompt ...] that belong to the rows [batch ...]; None if they do not fit.

        Beams and returned sequences of one prompt stand next to each other and share its value.
        """
        if len(values) == 1:
            return values.expand(n_rows, *(-1,) * (values.ndim - 1))
        if self.rows is not None:
            among = self.among or Pass()
            if len(self.rows) == n_rows and among.fits(len(values), int(self.rows.max())):
                return values[self.rows.to(values.device)]
            return values if among.rows_too and len(values) == n_rows else None
        if len(values) != self.of_how_many(n_rows):
            return None
        return values if len(values) == n_rows else copied(values, n_rows)

    def of_how_many(self, n_rows: int) -> int:
        """How many prompts the rows of this forward are of; beams and samples are copies of one."""
        return n_rows if self.n_prompts is None else self.n_prompts


def copied(values: Tensor, n_rows: int) -> Tensor | None:
    """One of `values` [prompt ...] for each of that prompt's copies [batch ...]; None if they do not fit."""
    n_copies, rest = divmod(n_rows, len(values))
    return None if rest else values.repeat_interleave(n_copies, dim=0)


def _up_to(stop: int, mask: Tensor) -> Tensor:
    """The first columns of a mask, bool [batch stop]; what is beyond it the model has written."""
    beyond = mask.new_ones(len(mask), max(stop - mask.shape[1], 0))
    return torch.cat([mask, beyond], dim=1)[:, :stop].bool()


NAN_LOGITS: Final = (
    "the router logits hold NaN or +inf, or the chosen experts' probabilities are all 0. Check the hooks on "
    "this layer's router and, in half precision, the model's own activations"
)


def check_weights(where: str, weights: Tensor, because: str) -> None:
    """Raise HookError where routing weights [... k] of a layer are NaN or infinite."""
    bad = ~torch.isfinite(weights).all(dim=-1)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise HookError(
            f"{where}: the routing weights are NaN or infinite on {int(bad.sum())} token(s), first at "
            f"[batch, pos] {first}: {because}."
        )


def as_prompts(given: Any) -> list[Any] | None:
    """A string, a chat or a `Prompt`, or several, as a list; None for anything else."""
    return as_texts(given) or prompts_among(given)


def as_texts(given: Any) -> list[str] | None:
    """A string or strings as a list; None for anything else."""
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    return None
