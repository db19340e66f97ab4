"""What one thread runs, and what is known of a forward from its arguments and from what runs around it.

thread = Thread()
forward = forward_of(kwargs, thread, wrapper, needs_state)      # a forward that begins with these
"""

from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from moe_lens.model.state import ForwardState, Generation, Pass, as_prompts, copied
from moe_lens.model.watching import padding_mask


@dataclass(eq=False)
class Thread:
    """What one thread runs."""

    forwards: list[ForwardState] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    given: tuple[int, list[Any] | None] | None = None  # at which depth of forwards, and which texts
    rows: tuple[int, tuple[Tensor, Pass]] | None = None  # at which depth, and which rows of which prompts
    disturbed: bool = False  # another thread changed the hooks of a forward that runs here

    @property
    def is_idle(self) -> bool:
        """Whether nothing need be remembered of it."""
        nothing = self.given is None and self.rows is None
        return nothing and not self.forwards and not self.generations


def forward_of(kwargs: dict[str, Any], thread: Thread, wrapper: Any, needs_state: bool) -> ForwardState:
    """What is known of a forward that begins with these arguments."""
    depth, generation = len(thread.forwards), generation_in(thread)
    tokens = kwargs.get("input_ids")
    inputs = tokens if tokens is not None else kwargs.get("inputs_embeds")
    n_pos = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim > 1 else 0
    n_rows = len(inputs) if isinstance(inputs, Tensor) else 0
    first = generation is not None and generation.n_prompt is None
    offset = _cached(kwargs) if needs_state or first else 0  # with some caches a look at a tensor
    found, texts = (
        noted[1] if noted is not None and noted[0] == depth else None for noted in (thread.rows, thread.given)
    )
    rows, among = cast(Any, found) or (None, None)
    forward = ForwardState(
        tokens=tokens if isinstance(tokens, Tensor) else None,
        attention_mask=(mask := padding_mask(kwargs.get("attention_mask"))),
        padding_unknown=mask is None and generation is None and _hides(kwargs.get("attention_mask"), n_rows),
        offset=offset,
        n_prompt=offset or n_pos,
        texts=cast(Any, texts),
        rows=rows,
        among=among,
        bridge=wrapper,
    )
    if generation is not None:
        if generation.n_prompt is None:
            generation.n_prompt = offset + n_pos
        forward.n_prompt, forward.texts = generation.n_prompt, generation.texts
        forward.n_prompts, forward.generating = generation.n_prompts, 1
        forward.unplaced = generation.unplaced
        if forward.attention_mask is None and generation.attention_mask is not None:
            forward.attention_mask = copied(generation.attention_mask, n_rows)
    return forward


def _hides(mask: Any, n_rows: int) -> bool:
    """Whether a mask of another form than [batch total] may hide padding.

    Models that build one a kind of attention give their decoder a dictionary of them; a single row of these
    is taken as not padded.
    """
    return mask is not None and (isinstance(mask, Tensor) or n_rows > 1)


def generation_in(thread: Thread) -> Generation | None:
    """The generation whose step the next forward is."""
    running = [one for one in thread.generations if one.depth == len(thread.forwards)]
    return running[-1] if running else None


def generation_of(given: Any) -> Generation:
    """A call of `generate` that was given this."""
    texts = as_prompts(given)
    return Generation(texts, n_prompts=None if texts is None else len(texts))


def inherit(generation: Generation, thread: Thread) -> None:
    """A `generate` within another one (the wrapper's around the model's, a draft's) has the same prompt."""
    outer, generation.depth = generation_in(thread), len(thread.forwards)
    if outer is not None and outer is not generation:
        generation.texts = generation.texts or outer.texts
        if outer.n_prompt is not None:
            generation.n_prompt = outer.n_prompt
        else:
            outer.n_prompt = generation.n_prompt
        generation.n_prompts = outer.n_prompts or generation.n_prompts
        generation.unplaced = generation.unplaced or outer.unplaced
    elif generation.texts is None and thread.given is not None and thread.given[0] == generation.depth:
        generation.texts = thread.given[1]


def _cached(kwargs: dict[str, Any]) -> int:
    """How many columns the KV cache holds before this forward."""
    past: Any = kwargs.get("past_key_values")
    if past is not None:
        return int(past.get_seq_length())
    position = kwargs.get("cache_position")
    return int(position.flatten()[0]) if isinstance(position, Tensor) and position.numel() else 0
