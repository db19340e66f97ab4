"""`Wish`: what one request wants of moe_lens, read from the arguments that it carries.

    wish = read_wish(params.extra_args, folder="/plans")     # {"moe_plan": "doc", "moe_strength": 2.0}
    wish.salt                                                # differs between what computes different values
    read_wish(wish.arguments()) == wish                      # how it travels to the workers

Every key begins with "moe_", and an unknown one is refused: a slip of the pen must not run unsteered.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, Final, SupportsFloat

from moe_lens.checks import as_index, short
from moe_lens.errors import DataError, PlanError
from moe_lens.files import digest_of
from moe_lens.steering.plan import SteeringPlan, plan_from_json

PREFIX: Final = "moe_"
PLAN, STRENGTH, POSITIONS = "moe_plan", "moe_strength", "moe_positions"
STATS, PROMPT, SPAN = "moe_stats", "moe_prompt", "moe_span"
_KEYS: Final = (PLAN, STRENGTH, POSITIONS, STATS, PROMPT, SPAN)
PHASES: Final = ("prompt", "generated")
OFF: Final = "off"
"""As a plan: none, also on a server that has a default one."""
FIRM: Final = "inf"
"""As a strength: the paper's transform, also of a plan whose own is another. (JSON has no infinity.)"""
CANARY: Final = "__moe_lens_canary__"
"""As a plan: refused by whoever knows moe_lens, taken for nothing by whoever does not."""

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Wish:
    """What a request wants.

    Attributes:
        plan: which experts to steer; None: none.
        strength: λ of the soft form z ± λ·std(z); None for the paper's transform.
        positions: "prompt", "generated", or None for both.
        stats: name of the statistics that count it; None: it is not counted.
        prompt: number of the prompt in these statistics.
        span: ranges of positions of the prompt that count; None: all.
    """

    plan: SteeringPlan | None = None
    strength: float | None = None
    positions: str | None = None
    stats: str | None = None
    prompt: int = 0
    span: Ranges | None = None

    @property
    def steers(self) -> bool:
        """Whether any expert is named."""
        return self.plan is not None and len(self.plan) > 0

    @property
    def salt(self) -> str:
        """Says how it changes what is computed, for the prefix cache and for tables; empty if it does not."""
        if self.plan is None or not self.steers:
            return ""
        return digest_of({"plan": self.plan.digest, "strength": self.strength, "positions": self.positions})

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of a request, the plan as JSON text; a request without a plan says so."""
        plan = OFF if self.plan is None else json.dumps(self.plan.to_json(), separators=(",", ":"))
        span = None if self.span is None else [position for part in self.span for position in part]
        values = (plan, self.strength, self.positions, self.stats, self.prompt, span)
        given = dict(zip(_KEYS, values, strict=True))
        if self.stats is None:
            del given[PROMPT]
        return {key: value for key, value in given.items() if value is not None}


def has_wishes(extra: Mapping[str, Any] | None) -> bool:
    """Whether a request's arguments name any of moe_lens'."""
    return any(str(key).startswith(PREFIX) for key in extra or {})


def read_wish(
    extra: Mapping[str, Any] | None, folder: str | Path | None = None, default: str | None = None
) -> Wish:
    """The wish in a request's arguments.

    >>> from moe_lens import SteeringPlan
    >>> wish = read_wish(plan_args(SteeringPlan(deactivate=[(2, 5)]), strength=2.0))
    >>> wish.plan, wish.strength, wish.stats
    (SteeringPlan(activates 0, deactivates 1 experts in layers [2], epsilon 0.01), 2.0, None)

    Args:
        extra: as in `SamplingParams(extra_args=...)`; keys that do not begin with "moe_" are somebody else's.
        folder: where a plan NAME.json is looked for, when `moe_plan` is a name.
        default: the plan of requests that say nothing of one, like `moe_plan`.

    Raises:
        PlanError, DataError: an unknown key, a plan that cannot be read, or values of another kind.
    """
    given = {str(key): value for key, value in (extra or {}).items() if str(key).startswith(PREFIX)}
    if unknown := sorted(set(given) - set(_KEYS)):
        raise DataError(f"{unknown[0]!r} is no argument of moe_lens; those are {', '.join(_KEYS)}.")
    text = given.get(PLAN, default)
    plan = None if text is None or text == OFF else _plan(text, None if folder is None else str(folder))
    strength, positions = _strength(given.get(STRENGTH)), given.get(POSITIONS)
    if plan is None and (STRENGTH in given or POSITIONS in given):
        raise PlanError(f"{STRENGTH} and {POSITIONS} are about a plan, and there is none; give {PLAN}.")
    if positions is not None and positions not in PHASES:
        raise DataError(
            f"{POSITIONS} must be 'prompt' or 'generated'; got {short(positions)}. Other positions are "
            "steered in a RoutedModel only."
        )
    if plan is not None:
        plan, strength = _as_strong(plan, strength, given.get(STRENGTH) is not None)
    return Wish(plan, strength, positions, *_counting(given))


def _counting(given: Mapping[str, Any]) -> tuple[str | None, int, Ranges | None]:
    stats, prompt, span = given.get(STATS), as_index(given.get(PROMPT, 0)), given.get(SPAN)
    if stats is None and (PROMPT in given or SPAN in given):
        raise DataError(f"{PROMPT} and {SPAN} are about statistics; give {STATS}, their name.")
    if stats is not None and (not isinstance(stats, str) or not stats):
        raise DataError(f"{STATS} must be a name, such as the condition's; got {short(stats)}.")
    if prompt is None:
        raise DataError(f"{PROMPT} must be a number from 0 on; got {short(given[PROMPT])}.")
    return stats, prompt, None if span is None else _ranges(span)


def _ranges(span: Any) -> Ranges:
    ends = [as_index(end) for end in span] if isinstance(span, list | tuple) else [None]
    known = [end for end in ends if end is not None]
    in_order = all(first < second for first, second in pairwise(known))
    if len(known) < len(ends) or not ends or len(ends) % 2 or not in_order:
        raise DataError(
            f"{SPAN} must be [first, end, first, end, ...], ranges of the prompt's positions in ascending "
            f"order that do not touch; got {short(span)}."
        )
    return tuple(zip(known[::2], known[1::2], strict=True))


def _as_strong(
    plan: SteeringPlan, strength: float | None, is_given: bool
) -> tuple[SteeringPlan, float | None]:
    """The plan, and the strength that is given, else its own; a plan that is not softened has none."""
    strength = strength if is_given else plan.strength
    if strength is None:
        return (plan if plan.strength is None else replace(plan, strength=None, only_unmet=False)), None
    if plan.only_unmet:
        raise PlanError(
            "The plan has only_unmet=True, and in vLLM a soft plan moves its experts on every token. Give "
            "one without it, or use a RoutedModel."
        )
    return plan, strength


def _strength(given: Any) -> float | None:
    if given is None or given == FIRM:
        return None
    if isinstance(given, bool) or not isinstance(given, Real) or not float(given) >= 0:
        raise PlanError(f"{STRENGTH} must be a number from 0 on, or {FIRM!r}; got {short(given)}.")
    return None if math.isinf(float(given)) else float(given)


@lru_cache(maxsize=1024)
def _of_text(text: str) -> SteeringPlan:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{PLAN} begins with a brace and is no JSON: {error}.") from error
    return plan_from_json(content)


def _plan(given: Any, folder: str | None) -> SteeringPlan:
    if not isinstance(given, str):
        raise PlanError(
            f"{PLAN} must be the name of a plan, or the text of the file that plan.save writes; got "
            f"{short(given)}."
        )
    if given.lstrip().startswith("{"):
        return _of_text(given)
    names = [] if folder is None else sorted(path.stem for path in Path(folder).glob("*.json"))
    if given not in names:  # never a path: the name comes from outside
        where = "no folder of plans is set (MOE_LENS_PLANS)" if folder is None else f"there are {names}"
        raise PlanError(f"There is no plan {short(given)}: {where}. Give one of these, or the plan's JSON.")
    return SteeringPlan.load(Path(str(folder)) / f"{given}.json")


def plan_args(
    plan: SteeringPlan | str | None,
    *,
    strength: SupportsFloat | None = None,
    positions: str | None = None,
) -> dict[str, Any]:
    """What a request carries to be steered: `SamplingParams(extra_args=...)`, or `vllm_xargs` over HTTP.

    >>> from moe_lens import SteeringPlan
    >>> plan_args("doc")
    {'moe_plan': 'doc'}
    >>> sorted(plan_args(SteeringPlan(deactivate=[(2, 5)]), positions="generated"))
    ['moe_plan', 'moe_positions']

    Join it with `stats_args` by `{**plan_args(...), **stats_args(...)}`.

    Args:
        plan: a plan, which travels as JSON; the name of a file NAME.json in the server's folder of plans; or
            None, not to be steered even where the server has a default plan.
        strength: λ ≥ 0 of the soft form z ± λ·std(z), as in `steer_hooks`; `math.inf` (travels as "inf") for
            the paper's transform; None for that of the plan, which is the paper's where the plan has none.
        positions: "prompt" or "generated" tokens only; None for both.

    Raises:
        PlanError, DataError: not such values.
    """
    if plan is not None and not isinstance(plan, SteeringPlan | str):
        raise PlanError(f"plan_args needs a SteeringPlan, a name or None; got {type(plan).__name__}.")
    text = json.dumps(plan.to_json(), separators=(",", ":")) if isinstance(plan, SteeringPlan) else plan
    asked = strength if strength is None or isinstance(strength, Real) else float(strength)
    value = FIRM if asked is not None and _strength(asked) is None else _strength(asked)
    given = {PLAN: OFF if text is None else text, STRENGTH: value, POSITIONS: positions}
    given = {key: value for key, value in given.items() if value is not None}
    read_wish(given if not isinstance(plan, str) else {**given, PLAN: _ANY_PLAN})
    return given


_ANY_PLAN: Final = json.dumps(SteeringPlan(deactivate=[(0, 0)]).to_json())
"""Stands for a plan that only the server knows."""


def stats_args(
    name: str, prompt: int = 0, span: list[tuple[int, int]] | Ranges | None = None
) -> dict[str, Any]:
    """What a request carries to be counted, in routing statistics of this name.

    >>> stats_args("with document", prompt=3, span=[(2, 5), (7, 9)])
    {'moe_stats': 'with document', 'moe_prompt': 3, 'moe_span': [2, 5, 7, 9]}

    Args:
        name: of the statistics, for example the condition.
        prompt: its number, from 0 on: the row in `per_prompt`. Requests with the same number add up.
        span: ranges (first, end) of the prompt's positions that count, ascending; None: all of them.

    Raises:
        DataError: not such values.
    """
    flat = None if span is None else [position for part in span for position in part]
    given = {STATS: name, PROMPT: prompt, **({} if flat is None else {SPAN: flat})}
    read_wish(given)
    return given
