"""positions=: in the prompt and while writing, cached or not, padded or not, by column, mask and span."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import HookedMoE, RoutedModel, TextSpan, hook_names, organisms, route_around, span_mask
from moe_lens.errors import DataError, HookError
from moe_lens.interventions.edits import RoutingEdit
from moe_lens.interventions.positions import checked_positions, selected
from moe_lens.model.state import ForwardState
from tests.families import some_kinds
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]


class Note(RoutingEdit):
    """Notes where it would act, step by step, and changes nothing."""

    point = hook_names.ROUTER_LOGITS

    def __init__(self, model: Any, positions: Any):
        super().__init__(model.moe_layers[0], checked_positions(positions))
        object.__setattr__(self, "seen", [])

    def __call__(self, value: Tensor, hook: Any) -> None:
        where = selected(self.positions, hook.state, *value.shape[:2])
        vars(self)["seen"].append(where.long().tolist())

    def edit(self, value: Tensor, hook: Any) -> Tensor:
        return value

    @property
    def steps(self) -> list[Any]:
        return vars(self)["seen"]


def noted(model: Any, positions: Any, forward: Callable[[], Any]) -> list[Any]:
    note = Note(model, positions)
    with model.hooks([note.entry]), torch.no_grad():
        forward()
    return note.steps


def in_forward(model: Any, positions: Any, given: Any = None, **kwargs: Any) -> Any:
    [where] = noted(model, positions, lambda: model(tokens(1, 5) if given is None else given, **kwargs))
    return where


WRITE = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [1, 1, 1, 1, 1]),
        ("prompt", [1, 1, 1, 1, 1]),
        ("generated", [0, 0, 0, 0, 0]),
        (2, [0, 0, 1, 0, 0]),
        (-1, [0, 0, 0, 0, 1]),
        ([0, -2], [1, 0, 0, 1, 0]),
        (torch.tensor([1, 3]), [0, 1, 0, 1, 0]),
        (range(2), [1, 1, 0, 0, 0]),
        ([True, False, True, False, False], [1, 0, 1, 0, 0]),
        (slice(1, 3), [0, 1, 1, 0, 0]),
        (lambda own: own == own[2], None),
        ("last", [0, 0, 0, 0, 1]),
        ("all", [1, 1, 1, 1, 1]),
    ],
)
def test_in_a_plain_forward(hooked: Hooked, positions: Any, expected: Any) -> None:
    if expected is None:
        own = tokens(1, 5)[0]
        expected = (own == own[2]).long().tolist()
    assert in_forward(hooked("olmoe"), positions) == [expected]


def test_masks_choose_by_prompt(hooked: Hooked) -> None:
    model, mask = hooked("olmoe"), torch.eye(3, 4, dtype=torch.bool)
    assert in_forward(model, mask, tokens(3, 4)) == mask.long().tolist()
    assert in_forward(model, mask[:1], tokens(3, 4)) == [mask[0].long().tolist()] * 3
    for wrong in (mask[:2], mask[:, :3], torch.ones(5, dtype=torch.bool)):
        with pytest.raises(HookError, match="3 prompts of 4 columns"):
            in_forward(model, wrong, tokens(3, 4))


def test_texts_are_found_in_the_strings_that_run() -> None:
    model = organisms.load("planted")
    texts = ["Question : what is the capital of Eldria ? Answer :", "the capital"]
    for span in ("capital", TextSpan("capital"), "last", "all", slice(1, 3)):
        expected = span_mask(model, texts, span).long().tolist()
        assert in_forward(model, span, texts) == expected
    assert in_forward(model, "capital", texts[0]) == span_mask(model, texts[:1], "capital").long().tolist()
    writing = noted(model, "capital", lambda: model.generate(texts, **WRITE))
    assert writing[0] == span_mask(model, texts, "capital", padding_side="left").long().tolist()
    assert writing[1:] == [[[0], [0]]] * 2
    with pytest.raises(HookError, match="given as tokens"):
        in_forward(model, "capital", model.to_tokens(texts[0]))
    with pytest.raises(HookError, match="does not occur"):
        in_forward(model, "Kyoto", texts[0])
    with pytest.raises(HookError, match="span_mask"):
        in_forward(model, "question", texts[0])


@some_kinds
@pytest.mark.parametrize("cached", [True, False])
def test_while_writing(hooked: Hooked, recipe: str, cached: bool) -> None:
    """The prompt has 4 columns; three tokens are written and two of them read. With and without a cache."""
    model = hooked(recipe)

    def columns(positions: Any) -> list[Any]:
        steps = noted(
            model, positions, lambda: model.generate(tokens(1, 4), use_past_kv_cache=cached, **WRITE)
        )
        return [step[0] for step in steps]

    lengths = [len(step) for step in columns(None)]
    assert lengths == [4, 1, 1] or (lengths == [4, 5, 6] and not cached)

    def expected(whole: list[int]) -> list[list[int]]:
        stops = (4, 5, 6)
        return [whole[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]

    assert columns("prompt") == expected([1, 1, 1, 1, 0, 0])
    assert columns("generated") == expected([0, 0, 0, 0, 1, 1])
    assert columns([0, -1, 5]) == expected([1, 0, 0, 1, 0, 1])
    assert columns(torch.tensor([False, True, False, False])) == expected([0, 1, 0, 0, 0, 0])


def test_while_writing_with_transformers_own_generate_and_stream(hooked: Hooked) -> None:
    model = hooked("mixtral")
    settings_ = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    steps = noted(model, "generated", lambda: model.hf_generate(tokens(1, 4), **settings_))
    assert steps == [[[0, 0, 0, 0]], [[1]], [[1]]]
    streamed = noted(model, -1, lambda: list(model.generate_stream(tokens(1, 4), **WRITE)))
    assert streamed[0] == [[0, 0, 0, 1]]
    assert all(step == [[0]] for step in streamed[1:])
    assert in_forward(model, "generated") == [[0, 0, 0, 0, 0]]  # and afterwards forwards are prompts again


def test_streams_side_by_side_each_know_their_prompt(hooked: Hooked) -> None:
    model = hooked("mixtral")
    note = Note(model, "prompt")
    with model.hooks([note.entry]), torch.no_grad():
        first = model.generate_stream(tokens(1, 4), max_tokens_per_yield=1, **WRITE)
        second = model.generate_stream(tokens(1, 6), max_tokens_per_yield=1, **WRITE)
        next(first)
        next(second)
        model(tokens(1, 3))
        first.close()
        second.close()
        model(tokens(1, 5))
    assert note.steps[0] == [[1] * 4]
    assert [1] * 6 in [step[0] for step in note.steps]
    assert note.steps[-2:] == [[[1] * 3], [[1] * 5]]


@pytest.mark.parametrize("nested", ["forward", "generation"])
def test_a_run_within_a_hook_leaves_the_outer_one_its_prompt(hooked: Hooked, nested: str) -> None:
    model = hooked("olmoe")
    inner: list[int] = []

    def within(value: Tensor, hook: Any) -> None:
        if hook.state.bridge is model and not inner:
            inner.append(1)
            if nested == "forward":
                model(tokens(1, 2))
            else:
                model.generate(tokens(1, 2), **WRITE)

    last = model.moe_layers[-1]
    seen: list[tuple[int, int]] = []
    look = (
        hook_names.router_logits(last),
        lambda value, hook: seen.append((hook.state.offset, hook.state.n_prompt)),
    )
    with model.hooks([(hook_names.router_logits(0), within), look]), torch.no_grad():
        model.generate(tokens(1, 5), **WRITE)
    outer = [each for each in seen if each[1] == 5]
    assert len(outer) == 3
    if (
        nested == "forward"
    ):  # TransformerLens forgets the outer KV cache when generate is called within generate
        assert outer == [(0, 5), (5, 5), (6, 5)]
    assert all(each[1] == 2 for each in seen if each not in outer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_are_places_in_each_prompt_whatever_padding(hooked: Hooked, side: str) -> None:
    """As in a slice, and as in the prompt by itself."""
    model, texts = hooked("olmoe"), [prompt(2), prompt(5, 1)]  # 3 and 6 tokens
    for position in (0, 1, 2, -1, -2, -3, [0, -1], [1, 2]):
        found = in_forward(model, position, texts, padding_side=side)
        for row, text, n_own in zip(found, texts, (3, 6), strict=True):
            own = row[-n_own:] if side == "left" else row[:n_own]
            assert [own] == in_forward(model, position, text)
            assert sum(row) == sum(own)
    for outside in (3, -4):
        with pytest.raises(HookError, match=r"this prompt has 3 tokens \(row 0 of the batch\)"):
            in_forward(model, outside, texts, padding_side=side)


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
@pytest.mark.parametrize("static", [False, True])
def test_numbers_go_on_where_padded_prompts_are_written_on(wrapper: Any, static: bool) -> None:
    """Position 4 of 3 own tokens is the second generated one, of 5 own tokens the last of the prompt."""
    own = tokenizer()
    model: Any = wrapper.from_hf(tiny_model(), own) if wrapper is HookedMoE else wrapper(tiny_model(), own)
    given: Any = own([prompt(3), prompt(5, 1)], padding=True, padding_side="left", return_tensors="pt")
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    lengths = given["attention_mask"].sum(1).tolist()
    options = {"cache_implementation": "static"} if static else {}
    if static and wrapper is HookedMoE:
        pytest.skip("a bridge refuses static caches")
    steps = noted(
        model,
        [0, 4, -1],
        lambda: model.original_model.generate(
            **given, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options
        ),
    )
    for row, n_own in enumerate(lengths):
        whole = [column for step in steps for column in step[row]]
        before = max(lengths) - n_own
        assert whole[:before] == [0] * before
        assert whole[before:] == [int(at in (0, 4, n_own - 1)) for at in range(len(whole) - before)]


def test_spans_choose_by_prompt_in_a_padded_batch(hooked: Hooked) -> None:
    model = hooked("olmoe")
    texts = [prompt(2), prompt(5, 1)]
    assert in_forward(model, "last", texts) == [[0, 0, 0, 0, 0, 1]] * 2
    assert in_forward(model, slice(0, 2), texts) == [[0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert in_forward(model, slice(0, 2), texts, padding_side="right") == [[1, 1, 0, 0, 0, 0]] * 2


def test_a_forward_on_top_of_a_cache_counts_as_written(hooked: Hooked) -> None:
    model = hooked("olmoe")
    _, cache = model(tokens(1, 4), return_type="logits_and_cache", use_cache=True)
    more = noted(model, "generated", lambda: model(tokens(1, 2), past_key_values=cache))
    assert more == [[[1, 1]]]


@pytest.mark.parametrize(
    "wrong", [[], 1.5, [0.5], {"a": 1}, [[0, 1], [2, 3]], torch.zeros(1, 2, 3, dtype=torch.bool), object()]
)
def test_what_is_no_positions_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match="positions must be"):
        checked_positions(wrong)


@pytest.mark.parametrize("outside", [5, -6, [0, 9]])
def test_positions_outside_the_prompt_are_refused(hooked: Hooked, outside: Any) -> None:
    with pytest.raises(HookError, match="this prompt has 5 tokens"):
        in_forward(hooked("olmoe"), outside)


@settings(deadline=None)
@given(
    n_prompt=st.integers(1, 6),
    written=st.integers(0, 4),
    named=st.sets(st.integers(-6, 9), min_size=1),
)
def test_step_by_step_is_all_at_once(n_prompt: int, written: int, named: set[int]) -> None:
    """Cached steps select, together, what one forward over the whole text selects."""
    columns = checked_positions(sorted(each for each in named if each >= -n_prompt) or [0])
    whole = ForwardState(offset=0, n_prompt=n_prompt, generating=1)
    together = selected(columns, whole, 1, n_prompt + written)
    steps = [selected(columns, whole, 1, n_prompt)]
    for step in range(written):
        state = ForwardState(offset=n_prompt + step, n_prompt=n_prompt, generating=1)
        steps.append(selected(columns, state, 1, 1))
    assert torch.equal(torch.cat(steps, dim=1), together)


def test_a_model_that_lost_its_points_knows_no_state() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    state = ForwardState()
    with pytest.raises(HookError, match="this run has none"):
        selected("last", ForwardState(n_prompt=3), 1, 3)
    assert selected("generated", state, 1, 2).all()
    assert model(tokens(1, 3)).shape[1] == 3


def test_what_a_forward_remembers_is_of_that_very_span(hooked: Any) -> None:
    """A new span may get the address of one that is gone; the forward must not take it for that one."""
    model = hooked("olmoe")
    wrong: list[int] = []

    def ask(value: Any, hook: Any) -> None:
        for number in range(200):
            chosen = selected(OneColumn(number % 4), hook.state, 1, 4)
            if chosen[0].nonzero().flatten().tolist() != [number % 4]:
                wrong.append(number)

    model.run_with_hooks(tokens(1, 4), fwd_hooks=[(hook_names.router_logits(0), ask)])
    assert wrong == []


class OneColumn:
    """A span that is a function, of one column."""

    def __init__(self, column: int) -> None:
        self.column = column

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.arange(len(tokens)) == self.column


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:Some rows of these tokens begin or end")
def test_a_function_sees_what_runs_though_it_looks_padded(wrapper: Any, side: str) -> None:
    """Without a mask the model reads padding as text, and columns count from its first one."""
    own = tokenizer()
    model = wrapper.from_hf(tiny_model(), own) if wrapper is HookedMoE else wrapper(tiny_model(), own)
    given = own(["w1 w2 w3 w4", "w2 w5"], padding=True, padding_side=side, return_tensors="pt")["input_ids"]
    mask = torch.tensor([[0, 0, 0, 1, 0]] * 2).bool()
    runs = [
        model.run_with_hooks(given, fwd_hooks=route_around([(0, 1), (1, 2), (2, 0)], positions=positions))
        for positions in (OneColumn(3), mask, None)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=str,
)
def test_a_span_holds_on_every_copy_of_its_prompt(wrapper: Any, options: dict[str, Any]) -> None:
    """Beams and returned sequences, against the mask that names the same tokens."""
    own = tokenizer()
    model = wrapper.from_hf(tiny_model(), own) if wrapper is HookedMoE else wrapper(tiny_model(), own)
    texts = ["w1 w2 w3 w4", "w2 w5"]
    generate = getattr(model, "hf_generate", model.generate)
    mask = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()  # w2, with padding on the left
    written = []
    for positions in ("w2", mask, None):
        torch.manual_seed(0)
        with model.hooks(fwd_hooks=route_around([(0, 1), (1, 2), (2, 0)], positions=positions)):
            written.append(generate(texts, max_new_tokens=8, return_type="tokens", **options))
    assert torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
def test_a_part_of_a_chat_is_found(wrapper: Any) -> None:
    own = tokenizer()
    own.chat_template = "<bos> {% for m in messages %}{{ m.content }} {% endfor %}"
    model = wrapper.from_hf(tiny_model(), own) if wrapper is HookedMoE else wrapper(tiny_model(), own)
    chats = [
        [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}],
        [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w2"}],
    ]
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    runs = [
        model.run_with_hooks(chats, fwd_hooks=route_around([(0, 1), (1, 2)], positions=positions))
        for positions in ("answer", mask, None)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
