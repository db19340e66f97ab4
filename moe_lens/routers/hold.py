"""`Hold`: the experts that steering puts in and keeps out, token by token, whatever their scores.

    hold = Hold.of_experts([3], [1], n_experts=8)       # bool [expert]: for every token
    hold.on(tokens).scores(choice)                      # there +inf for expert 3, -inf for expert 1
    later.after(earlier, possible)                      # two plans: the later one's word counts

A rule carries a hold from the hook that steers to the choice of experts. It names experts and tokens and
does not depend on what a logit is, so that no rounding, cast, bias or noise on the way undoes it. What does
undo it is a later hook about the steered experts themselves (`upon`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import HookError

Possible = Callable[[Bool[Tensor, "*batch expert"], Bool[Tensor, "*batch expert"]], Bool[Tensor, "*batch 1"]]
"""Whether a router can put the first experts in and keep the second ones out, token by token."""

_RTOL = 1e-5  # closer logits count as equal; half precision has its own rounding
_SHARE_UNTOUCHED = 0.25  # of a token's experts, where an edit counts as being about the others
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Hold:
    """Which experts are put in and kept out, and on which tokens.

    No operation here depends on the values of a tensor, so none waits for a device.

    Attributes:
        inside: true where an expert is put in.
        outside: true where it is kept out; no expert is both on one token.
        dtype: of the logits before they were steered, in which the tokens that are not steered are weighed.
        everywhere: whether every token is known to be steered.
        given: the logits as steering gave them, to notice later edits by (`upon`); None: nobody looks.
        scale: what undoes, in the choice, how steering scaled the other experts' probabilities.
        named, steps, ranks: of a hold that is the same for all tokens, or those of a row: its experts, what
            steering adds to the largest and the smallest score (± epsilon), what puts them in and keeps them
            out (± inf).
    """

    inside: Bool[Tensor, "*batch expert"]
    outside: Bool[Tensor, "*batch expert"]
    dtype: torch.dtype | None = None
    everywhere: bool = False
    given: Float[Tensor, "*batch expert"] | None = None
    scale: Float[Tensor, "*batch 1"] | None = None
    named: Bool[Tensor, "*batch expert"] | None = None
    steps: Float[Tensor, "*batch expert"] | None = None
    ranks: Float[Tensor, "*batch expert"] | None = None

    @classmethod
    def of_experts(
        cls,
        activate: Sequence[int],
        deactivate: Sequence[int],
        n_experts: int,
        device: torch.device | None = None,
    ) -> "Hold":
        """The same experts for every token; masks [expert]."""
        inside, outside = (
            torch.tensor([expert in named for expert in range(n_experts)], device=device)
            for named in (activate, deactivate)
        )
        return cls(inside, outside, everywhere=bool(activate or deactivate))

    def fixed(self, epsilon: float | Float[Tensor, "*batch 1"]) -> "Hold":
        """A hold of `of_experts` that knows its `named`, `steps` and `ranks`."""
        sign, named = self.inside.float() - self.outside.float(), self.inside | self.outside
        ranks = torch.where(named, sign * torch.inf, 0.0)
        return replace(self, named=named, steps=sign * epsilon, ranks=ranks)

    @property
    def tokens(self) -> Bool[Tensor, "*batch 1"]:
        """On which tokens any expert is held."""
        return (self.inside | self.outside).any(dim=-1, keepdim=True)

    @property
    def steers_all(self) -> bool:
        """Whether some expert is held on every token, whatever the logits."""
        return self.everywhere and self.given is None

    def like(self, logits: Float[Tensor, "*batch expert"]) -> "Hold":
        """The same with masks of the logits' shape, on their device."""
        return replace(
            self,
            inside=self.inside.to(logits.device).expand(logits.shape),
            outside=self.outside.to(logits.device).expand(logits.shape),
            named=None,
            steps=None,
            ranks=None,
        )

    def on(self, tokens: Bool[Tensor, "*batch"]) -> "Hold":
        """The same on these tokens only."""
        chosen = tokens.unsqueeze(-1).to(self.inside.device)
        return replace(
            self,
            inside=self.inside & chosen,
            outside=self.outside & chosen,
            everywhere=False,
            named=None,
            steps=None,
            ranks=None,
        )

    def scores(self, choice: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        """Selection scores with +inf for experts put in, -inf for those kept out."""
        if self.ranks is not None:
            return choice + self.ranks
        return choice.masked_fill(self.outside, -torch.inf).masked_fill(self.inside, torch.inf)

    def upon(self, logits: Float[Tensor, "*batch expert"]) -> "Hold":
        """What is still held once later hooks have made these logits of those that steering gave.

        An expert is set free on a token where its logit differs from what steering gave it by more than
        rounding, while at least a quarter of the token's experts keep theirs: an edit that is about this
        expert (a bias on it and a few others); or where it is -inf now, while any expert keeps its logit.
        Where nearly all logits differ, the edit is about none in particular (a uniform shift, noise, a dense
        vector, a temperature, another dtype), and nobody is set free. (Not quite all: a temperature leaves a
        logit of 0 as it is.)

        Raises:
            HookError: logits of other tokens than those that were steered.
        """
        if self.ranks is not None:  # the same for every token, or row
            return self
        self._check_shape(logits)
        if self.given is None:
            return self
        given = self.given.to(logits.device)
        untouched = _same(given, logits)
        changed = ~(untouched | _close(given, logits))
        finite = given.isfinite()
        n_untouched = (untouched & finite).sum(dim=-1, keepdim=True)
        about_some = n_untouched >= finite.sum(dim=-1, keepdim=True) * _SHARE_UNTOUCHED
        excluded = (logits == -torch.inf) & finite
        kept = ~(changed & (about_some | excluded) & (n_untouched > 0))
        return replace(self, inside=self.inside & kept, outside=self.outside & kept)

    def after(self, earlier: "Hold | None", possible: Possible) -> "Hold":
        """Two plans on one layer: this one, and on each token as much of the earlier one as is possible.

        For the experts that this one names, its word counts. Of the earlier one stays all that it holds of
        other experts if the router can obey both; else what it keeps out; else what it puts in; else
        nothing. On tokens where this one holds nothing, the earlier one stays whole.
        """
        if earlier is None:
            return self
        free = ~(self.inside | self.outside)
        old_in, old_out, none = earlier.inside & free, earlier.outside & free, torch.zeros_like(free)
        inside, outside = self.inside, self.outside
        for kept_in, kept_out in ((old_in, none), (none, old_out), (old_in, old_out)):  # the best comes last
            both_in, both_out = self.inside | kept_in, self.outside | kept_out
            stays = possible(both_in, both_out) | ~self.tokens
            inside, outside = torch.where(stays, both_in, inside), torch.where(stays, both_out, outside)
        scale = self.scale
        if earlier.scale is not None:
            scale = torch.where(earlier.tokens, earlier.scale, 1.0) * (1.0 if scale is None else scale)
        everywhere = self.everywhere or earlier.steers_all
        dtype = self.dtype if earlier.dtype is None else earlier.dtype
        return Hold(inside, outside, dtype, everywhere, self.given, scale)

    def at(self, tokens: Int[Tensor, "*part"]) -> "Hold":
        """The hold of some tokens, given by their numbers in the flattened batch."""
        part = {
            name: value.flatten(0, -2)[tokens.to(value.device)]
            for name in ("inside", "outside", "given", "scale")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **part)

    def spread(self, tokens: Int[Tensor, "*part"], batch: tuple[int, ...]) -> "Hold":
        """The hold of some tokens as one of a whole batch, which holds nobody on its other tokens."""

        def put(value: Tensor | None, default: float | bool) -> Tensor | None:
            if value is None:
                return None
            n_tokens, width = torch.Size(batch).numel(), value.shape[-1]
            whole = value.new_full((n_tokens, width), default)
            whole[tokens.reshape(-1).to(value.device)] = value.reshape(-1, width)
            return whole.reshape(*batch, width)

        inside, outside = cast(Tensor, put(self.inside, False)), cast(Tensor, put(self.outside, False))
        given, scale = put(self.given, torch.nan), put(self.scale, 1.0)
        return Hold(inside, outside, self.dtype, False, given, scale)

    def elsewhere(self, tokens: Bool[Tensor, "*batch"], before: "Hold | None") -> "Hold":
        """This one on these tokens, and on the others what was held before."""
        chosen = tokens.unsqueeze(-1).to(self.inside.device)

        def either(now: Tensor | None, then: Tensor | None, default: float) -> Tensor | None:
            if now is None and then is None:
                return None
            absent = torch.full_like(cast(Tensor, then if now is None else now), default)
            return torch.where(chosen, absent if now is None else now, absent if then is None else then)

        then = before or Hold(torch.zeros_like(self.inside), torch.zeros_like(self.outside))
        inside = torch.where(chosen, self.inside, then.inside)
        outside = torch.where(chosen, self.outside, then.outside)
        dtype = self.dtype if then.dtype is None else then.dtype
        given, scale = either(self.given, then.given, torch.nan), either(self.scale, then.scale, 1.0)
        return Hold(inside, outside, dtype, False, given, scale)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same experts on the same tokens."""
        return isinstance(other, Hold) and all(
            torch.equal(ours.cpu(), theirs.cpu())
            for ours, theirs in ((self.inside, other.inside), (self.outside, other.outside))
        )

    def __hash__(self) -> int:
        return hash((type(self), self.inside.shape))

    def __repr__(self) -> str:
        return f"Hold({' x '.join(map(str, self.inside.shape))})"

    def _check_shape(self, logits: Tensor) -> None:
        if self.inside.ndim > 1 and self.inside.shape != logits.shape:
            raise HookError(
                f"The rule holds experts on tokens of shape {tuple(self.inside.shape[:-1])}, and the logits "
                f"are {tuple(logits.shape)}. Steer and route the same tokens."
            )


def _same(given: Float[Tensor, "*batch expert"], logits: Float[Tensor, "*batch expert"]) -> Tensor:
    """Where logits are what they were, but for a cast to half precision, perhaps there and back."""
    same = logits == given
    for half in _HALF if logits.dtype not in _HALF else (logits.dtype,):
        same = same | (logits == given.to(half).to(logits.dtype))
    return same


def _close(given: Float[Tensor, "*batch expert"], logits: Float[Tensor, "*batch expert"]) -> Tensor:
    """Where logits differ by no more than the rounding of the coarser of the two dtypes."""
    tolerance = max(_RTOL, torch.finfo(logits.dtype).eps, torch.finfo(given.dtype).eps)
    wide = torch.float64 if torch.float64 in (given.dtype, logits.dtype) else torch.float32
    return torch.isclose(logits.to(wide), given.to(wide), rtol=tolerance, atol=tolerance)
