"""At the door: what is refused there, and what is written into the engine's copy of a request."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moe_lens.engines.vllm.admitting as admitting
import moe_lens.engines.vllm.settings as settings
from moe_lens import HookError, MoEShape, SteeringPlan
from moe_lens.engines import plan_args, stats_args
from moe_lens.engines.vllm.settings import begin_session, checked_shape, is_set_up, leave_word
from moe_lens.engines.vllm.wishes import CANARY, read_wish

SHAPE = MoEShape("served", (0, 1, 2), 8, 2)
PLAN = SteeringPlan(deactivate=[(2, 5)])


class SamplingParams:
    def __init__(self, extra_args: Any = None) -> None:
        self.extra_args, self.skip_reading_prefix_cache, self.n = extra_args, None, 1


class PoolingParams:
    def __init__(self, extra_kwargs: Any = None) -> None:
        self.extra_kwargs = extra_kwargs


class Refused(Exception):
    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`front(params, salt, resumable)`: vLLM's front end with the plugin; gives the engine's request."""

    class InputProcessor:
        vllm_config = SimpleNamespace(instance_id="e")

        def process_inputs(
            self, request_id: str, prompt: Any, params: Any, salt: Any, resumable: bool
        ) -> Any:
            copied = SamplingParams(dict(params.extra_args or {})) if hasattr(params, "extra_args") else None
            return SimpleNamespace(
                prompt_token_ids=prompt, sampling_params=copied, cache_salt=salt, resumable=resumable
            )

    for name in ("MOE_LENS_PLANS", "MOE_LENS_DEFAULT_PLAN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOE_LENS_SESSION", str(tmp_path / "session"))
    names = SimpleNamespace(
        InputProcessor=InputProcessor, SamplingParams=SamplingParams, VLLMValidationError=Refused
    )
    monkeypatch.setattr(admitting, "private", lambda: names)
    admitting.wrap_front_end()
    return lambda params, salt=None, resumable=False: InputProcessor().process_inputs(
        "r", [5, 6, 7, 8], params, salt, resumable
    )


def test_a_request_that_says_nothing_passes_as_it_is(front: Any) -> None:
    request = front(SamplingParams({"kv": 1}), "mine")
    assert (request.sampling_params.extra_args, request.cache_salt) == ({"kv": 1}, "mine")
    assert front(SamplingParams()).sampling_params.skip_reading_prefix_cache is None


def test_nothing_is_promised_until_the_engine_has_left_word(front: Any) -> None:
    for extra in (plan_args(PLAN), stats_args("s"), {"moe_plan": CANARY}):
        with pytest.raises(Refused, match="left no word"):
            front(SamplingParams(extra))
    leave_word("e", None, "its model runner V2 is not wrapped")
    for extra in (plan_args(PLAN), stats_args("s"), {"moe_plan": CANARY}):
        with pytest.raises(Refused, match="V2"):
            front(SamplingParams(extra))


def test_a_plan_is_written_out_and_salts_the_cache(front: Any, monkeypatch: Any, tmp_path: Path) -> None:
    leave_word("e", SHAPE, None)
    PLAN.save(tmp_path / "plans" / "doc.json")
    monkeypatch.setenv("MOE_LENS_PLANS", str(tmp_path / "plans"))
    assert is_set_up()
    given = SamplingParams({"kv": 1, **plan_args("doc", strength=2.0)})
    request = front(given, "mine")
    extra = request.sampling_params.extra_args
    assert read_wish(extra) == read_wish(plan_args(PLAN, strength=2.0))  # no folder needed any more
    assert extra["kv"] == 1
    assert request.cache_salt == f"mine|moe_lens {read_wish(extra).salt}"
    assert given.extra_args == {"kv": 1, **plan_args("doc", strength=2.0)}  # the caller's own
    other = front(SamplingParams(plan_args("doc")), None)
    assert other.cache_salt not in (None, request.cache_salt)


def test_the_default_plan_is_for_those_who_name_none(front: Any, monkeypatch: Any, tmp_path: Path) -> None:
    leave_word("e", SHAPE, None)
    PLAN.save(tmp_path / "doc.json")
    monkeypatch.setenv("MOE_LENS_PLANS", str(tmp_path))
    monkeypatch.setenv("MOE_LENS_DEFAULT_PLAN", "doc")
    for params in (SamplingParams(), SamplingParams(stats_args("s"))):
        assert read_wish(front(params).sampling_params.extra_args).plan == PLAN
    off = front(SamplingParams(plan_args(None)))
    assert off.cache_salt is None
    with pytest.raises(Refused, match="pooling"):
        front(PoolingParams())


def test_what_is_counted_does_not_come_from_the_cache(front: Any) -> None:
    leave_word("e", SHAPE, None)
    request = front(SamplingParams(stats_args("s", 2, [(1, 4)])))
    assert request.sampling_params.skip_reading_prefix_cache is True
    assert request.cache_salt is None
    with pytest.raises(Refused, match="beyond the prompt's 4 tokens"):
        front(SamplingParams(stats_args("s", 2, [(1, 5)])))
    twice = SamplingParams(stats_args("s"))
    twice.n = 2
    with pytest.raises(Refused, match="2 times"):
        front(twice)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (SamplingParams({"moe_plan": CANARY}), f"{CANARY} served, 3 layers"),
        (SamplingParams(plan_args(SteeringPlan(deactivate=[(3, 0)]))), "layer 3 has no router"),
        (SamplingParams({"moe_plam": "x"}), "moe_plam"),
        (PoolingParams(plan_args(PLAN)), "pooling"),
    ],
)
def test_what_cannot_be_served_is_refused(front: Any, params: Any, says: str) -> None:
    leave_word("e", SHAPE, None)
    with pytest.raises(Refused, match=f"moe_lens: .*{says}"):
        front(params)


def test_sessions_whose_prompt_grows_are_not_steered(front: Any) -> None:
    leave_word("e", SHAPE, None)
    assert front(SamplingParams(plan_args(SteeringPlan())), resumable=True).cache_salt is None
    with pytest.raises(Refused, match="streaming"):
        front(SamplingParams(plan_args(PLAN)), resumable=True)


def test_word_is_left_for_one_engine_only(front: Any) -> None:
    leave_word("e", SHAPE, None)
    assert checked_shape("e") == SHAPE
    with pytest.raises(HookError, match="left no word"):
        checked_shape("another")


def test_a_session_is_begun_once_and_shared_with_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_LENS_SESSION", raising=False)
    kept = []
    monkeypatch.setattr(settings.atexit, "register", lambda *call, **_: kept.append(call))
    begin_session()
    first = settings.os.environ["MOE_LENS_SESSION"]
    begin_session()
    assert settings.os.environ["MOE_LENS_SESSION"] == first
    assert [call[1] for call in kept] == [first]
    Path(first).rmdir()


def test_beam_search_is_refused(front: Any) -> None:
    class Protocol:
        vllm_xargs: Any = None

        def to_beam_search_params(self) -> str:
            return "params"

    admitting._refuse_beams(Protocol)
    asked = Protocol()
    assert asked.to_beam_search_params() == "params"
    asked.vllm_xargs = {"moe_plan": "doc"}
    with pytest.raises(Refused, match="beam search"):
        asked.to_beam_search_params()
