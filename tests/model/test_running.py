"""What hooks know of the forward that they are in, however a generation is cut, and of one in another."""

import copy
import itertools
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, hook_names, steer_hooks, steered, zero_ablate
from moe_lens.errors import HookError
from moe_lens.interventions.positions import checked_positions, selected
from moe_lens.interventions.replay import replay_hooks
from moe_lens.statistics.routes import RouteRecord
from tests.families import recipes, some_kinds
from tests.tiny_models import EVERY_FAMILY, tiny_model, tokenizer, tokens

N_PROMPT = 23
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefill in chunks": {"prefill_chunk_size": 8},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "prompt lookup without cache": {"prompt_lookup_num_tokens": 4, "use_cache": False},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beams and samples": {"num_beams": 4, "num_return_sequences": 2},
}


def hf_generate(model: Any) -> Callable[..., Any]:
    return model.hf_model.generate


class Columns:
    """Notes, forward by forward, the columns that run and those that positions select, of the first row."""

    def __init__(self, model: Any, positions: Any):
        self.entry = (hook_names.router_logits(model.moe_layers[0]), self)
        self.positions = checked_positions(positions)
        self.forwards: list[tuple[list[int], list[int]]] = []

    def __call__(self, value: Tensor, hook: Any) -> None:
        chosen = selected(self.positions, hook.state, *value.shape[:2])[0]
        columns = hook.state.columns(value.shape[1])
        self.forwards.append((columns.tolist(), columns[chosen].tolist()))


def generated(model: RoutedModel, positions: Any, **kwargs: Any) -> list[tuple[list[int], list[int]]]:
    note = Columns(model, positions)
    given = tokens(1, N_PROMPT).repeat(1, 1)
    with model.hooks([note.entry]), torch.no_grad():
        options = {"do_sample": False, "max_new_tokens": 6, **kwargs}
        hf_generate(model)(given, attention_mask=torch.ones_like(given), eos_token_id=None, **options)
    assert note.forwards
    return note.forwards


@pytest.mark.parametrize("way", WAYS)
@recipes(("olmoe", "deepseek_v3", "gpt_oss"), EVERY_FAMILY)
def test_the_prompt_is_what_generate_was_given(recipe: str, way: str) -> None:
    if "static" in way and recipe in ("jamba", "lfm2_moe", "granitemoehybrid", "nemotron_h", "qwen3_next"):
        pytest.skip("no static cache in transformers")
    model = RoutedModel(tiny_model(recipe), tokenizer())
    expected: dict[Any, Callable[[int], bool]] = {
        "prompt": lambda column: column < N_PROMPT,
        "generated": lambda column: column >= N_PROMPT,
        -1: lambda column: column == N_PROMPT - 1,
        5: lambda column: column == 5,
        None: lambda column: True,
    }
    try:
        runs = {positions: generated(model, positions, **WAYS[way]) for positions in expected}
    except (ValueError, NotImplementedError, AttributeError, TypeError, KeyError) as refusal:
        plain, given = tiny_model(recipe), tokens(1, N_PROMPT)
        with pytest.raises(type(refusal)), torch.no_grad():  # transformers' own
            plain.generate(given, max_new_tokens=6, eos_token_id=None, **WAYS[way])
        pytest.skip(f"transformers refuses: {refusal}")
    for positions, forwards in runs.items():
        for columns, chosen in forwards:
            assert chosen == [column for column in columns if expected[positions](column)], positions
        assert {column for columns, _ in forwards for column in columns} >= set(range(N_PROMPT + 4))


def test_a_prompt_of_embeddings_is_one_too() -> None:
    model = RoutedModel(tiny_model("olmoe"), tokenizer())
    note = Columns(model, "prompt")
    embeddings: Any = model.hf_model.get_input_embeddings
    embedded = embeddings()(tokens(1, 5))
    with model.hooks([note.entry]), torch.no_grad():
        hf_generate(model)(inputs_embeds=embedded, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert [chosen for _, chosen in note.forwards] == [[0, 1, 2, 3, 4], [], []]


def test_a_generation_that_continues_from_a_cache_keeps_its_columns() -> None:
    model, given = RoutedModel(tiny_model("olmoe"), tokenizer()), tokens(1, 9)
    with torch.no_grad():
        past = model.hf_model(given[:, :6], use_cache=True).past_key_values
        note = Columns(model, "prompt")
        with model.hooks([note.entry]):
            hf_generate(model)(
                given, past_key_values=past, max_new_tokens=3, do_sample=False, eos_token_id=None
            )
    assert note.forwards == [([6, 7, 8], [6, 7, 8]), ([9], []), ([10], [])]


@pytest.mark.parametrize("wrapper", ["routed", "bridge"])
def test_assisted_decoding_keeps_the_prompt(wrapper: str) -> None:
    model = RoutedModel(tiny_model("olmoe"), tokenizer())
    draft = tiny_model("olmoe", num_hidden_layers=1)
    if wrapper == "routed":
        RoutedModel(draft)
    for columns, chosen in generated(model, "prompt", assistant_model=draft):
        assert chosen == [column for column in columns if column < N_PROMPT]


def test_a_model_that_drafts_for_itself_keeps_the_prompt() -> None:
    model = RoutedModel(tiny_model("olmoe"), tokenizer())
    for columns, chosen in generated(model, "prompt", assistant_model=model.hf_model):
        assert chosen == [column for column in columns if column < N_PROMPT]


def test_masks_and_rows_follow_beams_and_samples() -> None:
    """Two prompts, three beams each: each beam of a prompt is edited where its prompt is."""
    model, given = RoutedModel(tiny_model("deepseek_v3"), tokenizer()), tokens(2, 6)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2], mask[1, 4] = True, True
    seen: list[Tensor] = []

    def note(value: Tensor, hook: Any) -> None:
        seen.append(selected(mask, hook.state, *value.shape[:2]))

    with model.hooks([(hook_names.router_logits(model.moe_layers[0]), note)]), torch.no_grad():
        hf_generate(model)(given, num_beams=3, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert len(seen[0]) in (2, 6)
    assert torch.equal(seen[0], mask.repeat_interleave(len(seen[0]) // 2, 0))
    assert not seen[-1].any()


@some_kinds
def test_a_hook_that_runs_the_model_disturbs_nothing(recipe: str) -> None:
    model, given, other = RoutedModel(tiny_model(recipe), tokenizer()), tokens(2, 5), tokens(1, 3, seed=1)
    layer = model.moe_layers[-1]
    plan = SteeringPlan(activate=[(layer, 1)], deactivate=[(layer, 2)])
    inner: list[Tensor] = []

    def run_inside(value: Tensor, hook: Any) -> None:
        if hook.state.tokens is not None and hook.state.tokens.shape == given.shape:
            inner.append(model(other))

    hooks = [(hook_names.router_logits(model.moe_layers[0]), run_inside), *steer_hooks(plan)]
    hooks += [(hook_names.router_logits(layer), run_inside), *zero_ablate([(layer, 0)])]
    with torch.no_grad():
        without = [pair for pair in hooks if pair[1] is not run_inside]
        expected, expected_inner = (model.run_with_hooks(x, fwd_hooks=without) for x in (given, other))
        assert not torch.equal(expected, model(given))
        assert torch.equal(model.run_with_hooks(given, fwd_hooks=hooks), expected)
    assert len(inner) == 2
    assert all(torch.equal(logits, expected_inner) for logits in inner)


@pytest.mark.parametrize("build", [RoutedModel, HookedMoE.from_hf])
@some_kinds
def test_a_deep_copy_under_hooks_has_its_own(recipe: str, build: Callable[..., Any]) -> None:
    model, given = build(tiny_model(recipe), tokenizer()), tokens(2, 5)
    layer = model.moe_layers[-1]
    with torch.no_grad():
        model.run_with_cache(given)
        before = model(given)
        with model.hooks(steer_hooks(SteeringPlan([(layer, 1)], [(layer, 2)]))):
            expected = model(given)
            twin = copy.deepcopy(model)
            for parameter in twin.parameters():  # the copy is another model from here on
                parameter.mul_(1.0)
        assert torch.equal(model(given), before)
        assert torch.equal(twin(given), expected)
        _, cache = twin.run_with_cache(given)
        assert bool((cache["topk_indices", layer] == 1).any(-1).all())
        assert not bool((cache["topk_indices", layer] == 2).any())
        note = Columns(twin, "prompt")
        with twin.hooks([note.entry]):
            twin(given)
        assert note.forwards == [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])]
        twin.reset_hooks()
        assert torch.equal(twin(given), before)
        assert torch.equal(model(given), before)


@pytest.mark.parametrize("where", ["router_logits", "topk_weights", "resid_post"])
def test_an_exception_leaves_nothing_behind(where: str) -> None:
    model, given = RoutedModel(tiny_model("deepseek_v3"), tokenizer()), tokens(2, 5)
    layer = model.moe_layers[0]
    name = "blocks.0.hook_resid_post" if where == "resid_post" else f"blocks.{layer}.mlp.hook_{where}"

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with torch.no_grad():
        before = model(given)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model.run_with_hooks(given, fwd_hooks=[(name, fail)])
        assert torch.equal(model(given), before)
        note = Columns(model, "generated")
        with model.hooks([note.entry]):
            model(given)
    assert note.forwards == [([0, 1, 2, 3, 4], [])]


class Interrupts:
    """On a module, a KeyboardInterrupt at one of its calls; always_call hooks of torch do not hear of it."""

    def __init__(self, at: int = 0):
        self.left = at

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt


def chosen_columns(hf_model: Any) -> list[tuple[list[int], list[int]]]:
    """What "generated" selects in a forward of the decoder alone, which may be part of a running one."""
    routed, given = RoutedModel(hf_model), tokens(1, 4)
    note = Columns(routed, "generated")
    with routed.hooks([note.entry]), torch.no_grad():
        hf_model.model(input_ids=given)
    return note.forwards


@pytest.mark.parametrize("within", ["the context", "another context", "no context"])
@pytest.mark.parametrize("what", ["forward", "generation"])
def test_an_interrupt_leaves_nothing_behind(what: str, within: str) -> None:
    hf_model, given = tiny_model("olmoe"), tokens(1, 5)
    model = RoutedModel(hf_model)
    note = Columns(model, "generated")

    def run() -> None:
        if what == "forward":
            hf_model(given)
        else:
            hf_model.generate(given, max_new_tokens=5, do_sample=False, eos_token_id=None)

    def broken_off(hooks: Any = ()) -> None:
        handle = hf_model.lm_head.register_forward_pre_hook(Interrupts(2 if what == "generation" else 0))
        with pytest.raises(KeyboardInterrupt), model.hooks(hooks) if hooks else nullcontext():
            run()
        handle.remove()

    with torch.no_grad():
        if within == "the context":
            with model.hooks([note.entry]):
                broken_off()
                note.forwards.clear()
                hf_model.model(input_ids=given)
            assert note.forwards == [([0, 1, 2, 3, 4], [])]
        else:
            broken_off([note.entry] if within == "another context" else ())
        assert chosen_columns(hf_model) == [([0, 1, 2, 3], [])]
        broken_off([note.entry] if within == "another context" else ())

        def in_a_thread() -> Tensor:
            with torch.no_grad():
                return model.run_with_hooks(given, fwd_hooks=steer_hooks(SteeringPlan(deactivate=[(0, 0)])))

        if within == "another context":  # whose end forgets what was broken off in it
            [steered_there] = in_threads(in_a_thread)
            assert torch.equal(steered_there, in_a_thread())
        model.detach()
        assert not any(vars(part).get("forward") for part in hf_model.modules())


def test_a_hook_may_be_interrupted_in_a_forward_of_its_own() -> None:
    """The forward around it goes on, and is the one that later hooks are in."""
    hf_model, given, other = tiny_model("olmoe"), tokens(2, 5), tokens(1, 3, seed=1)
    model = RoutedModel(hf_model)
    first, note = model.moe_layers[0], Columns(model, "prompt")
    note.entry = (hook_names.router_logits(model.moe_layers[-1]), note)

    def interrupted(value: Tensor, hook: Any) -> None:
        if hook.state.tokens is not None and hook.state.tokens.shape == given.shape:
            handle = hf_model.lm_head.register_forward_pre_hook(Interrupts())
            with pytest.raises(KeyboardInterrupt):
                model(other)
            handle.remove()

    with torch.no_grad():
        model.run_with_hooks(given, fwd_hooks=[(hook_names.router_logits(first), interrupted), note.entry])
        assert note.forwards == [([*range(3)], [*range(3)]), ([*range(5)], [*range(5)])]
        assert chosen_columns(model.hf_model) == [([0, 1, 2, 3], [])]


def test_a_thread_that_ended_within_a_forward_is_not_waited_for() -> None:
    hf_model, given = tiny_model("olmoe"), tokens(2, 5)
    model = RoutedModel(hf_model)

    def leaves(*args: Any) -> None:
        raise SystemExit

    handle = hf_model.lm_head.register_forward_pre_hook(leaves)

    def run() -> None:
        with suppress(SystemExit):
            model.hf_model(given)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    handle.remove()
    with torch.no_grad(), model.hooks(steer_hooks(SteeringPlan(deactivate=[(0, 0)]))):
        steered_logits = model(given)
    assert not torch.equal(steered_logits, model(given))


def test_checkpointed_blocks_are_left_after_an_interrupt() -> None:
    model = RoutedModel(tiny_model("olmoe"))
    hf_model: Any = model.hf_model
    hf_model.gradient_checkpointing_enable()
    hf_model.train()
    before = [vars(block)["_gradient_checkpointing_func"] for block in hf_model.model.layers]
    for forget in (lambda: hf_model(tokens()), model.detach):
        handle = hf_model.lm_head.register_forward_pre_hook(Interrupts())
        with pytest.raises(KeyboardInterrupt):
            hf_model(tokens())
        handle.remove()
        forget()
        assert [vars(block)["_gradient_checkpointing_func"] for block in hf_model.model.layers] == before


def test_two_streams_side_by_side_have_their_own_prompts() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    note = Columns(model, "prompt")
    with model.hooks([note.entry]), torch.no_grad():
        options: Any = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False, "verbose": False}
        streams = [model.generate_stream(tokens(1, n), **options) for n in (4, 7)]
        for _ in range(3):
            for stream in streams:
                next(stream, None)
    for columns, chosen in note.forwards:
        assert chosen in ([column for column in columns if column < n] for n in (4, 7))
    assert sorted(chosen for _, chosen in note.forwards if chosen) == [[*range(4)], [*range(7)]]


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions give, or raise, each in a thread of its own; all begin together."""
    together, results = threading.Barrier(len(functions)), list[Any](functions)

    def run(number: int) -> None:
        together.wait()
        try:
            results[number] = functions[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("build", [RoutedModel, HookedMoE.from_hf])
@pytest.mark.parametrize("kind", ["plans", "hooks", "a plan and nothing"])
def test_two_threads_are_right_or_refused(kind: str, build: Callable[..., Any]) -> None:
    model = build(tiny_model("olmoe", num_hidden_layers=6), tokenizer())
    given, layer = tokens(2, 5), model.moe_layers[-1]
    lists: list[Any] = {
        "plans": [steer_hooks(SteeringPlan([(layer, e)], [(layer, e + 2)])) for e in (0, 1)],
        "hooks": [zero_ablate([(layer, e), (0, e)]) for e in (0, 1)],
        "a plan and nothing": [steer_hooks(SteeringPlan([(layer, 0)])), []],
    }[kind]
    expected = [model.run_with_hooks(given, fwd_hooks=hooks).detach() for hooks in lists]
    assert not torch.equal(*expected)

    def loop(number: int) -> Callable[[], tuple[int, int]]:
        def run() -> tuple[int, int]:
            right = refused = 0
            for _ in range(30):
                try:
                    with torch.no_grad():
                        logits = model.run_with_hooks(given, fwd_hooks=lists[number])
                except HookError:
                    refused += 1
                else:
                    assert torch.equal(logits, expected[number]), "a silently wrong result"
                    right += 1
            return right, refused

        return run

    for result in in_threads(loop(0), loop(1)):
        assert isinstance(result, tuple), result
        assert sum(result) == 30
    model.reset_hooks()
    assert torch.equal(model.run_with_hooks(given, fwd_hooks=lists[0]), expected[0])


def test_a_thread_that_starts_under_a_plan_runs_under_it() -> None:
    """As transformers' own recipe for streaming does."""
    hf_model, given = tiny_model("olmoe"), tokens(1, 5)
    model = RoutedModel(hf_model, tokenizer())
    options: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with steered(model, SteeringPlan(deactivate=[(0, 1), (1, 2)])):
        expected = hf_model.generate(given, **options)
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(hf_model.generate(given, **options)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], expected)
    assert not torch.equal(hf_model.generate(given, **options), expected)


def test_copies_run_in_threads_of_their_own() -> None:
    models = [RoutedModel(tiny_model("deepseek_v3"), tokenizer())]
    models.append(copy.deepcopy(models[0]))
    given, layer = tokens(2, 5), models[0].moe_layers[-1]
    plans = [steer_hooks(SteeringPlan([(layer, e)])) for e in (0, 1)]
    expected = [models[0].run_with_hooks(given, fwd_hooks=plan) for plan in plans]

    def loop(number: int) -> Callable[[], bool]:
        def run() -> bool:
            return all(
                torch.equal(models[number].run_with_hooks(given, fwd_hooks=plans[number]), expected[number])
                for _ in range(20)
            )

        return run

    assert in_threads(loop(0), loop(1)) == [True, True]


def test_records_replay_in_chunks_and_beams() -> None:
    model, given = RoutedModel(tiny_model("olmoe"), tokenizer()), tokens(2, 12)
    with torch.no_grad():
        with model.hooks(steer_hooks(SteeringPlan(deactivate=[(0, 1), (2, 3)]))):
            _, cache = model.run_with_cache(given)
        record = RouteRecord.from_cache(cache)
        outputs = []
        for options in ({}, {"prefill_chunk_size": 5}):
            with model.hooks(replay_hooks(record, positions="prompt")):
                output = hf_generate(model)(
                    given, max_new_tokens=3, do_sample=False, eos_token_id=None, output_logits=True,
                    return_dict_in_generate=True, **options,
                )  # fmt: skip
            outputs.append(output)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)


def test_residual_hooks_of_another_thread_are_refused() -> None:
    model, given = RoutedModel(tiny_model("olmoe")), tokens(2, 5)
    before = model(given).detach()
    hooks = [("blocks.0.hook_resid_pre", lambda value, hook: value * 0.3)]
    expected = model.run_with_hooks(given, fwd_hooks=hooks).detach()

    def loop(hooks: Any, right: Tensor) -> Callable[[], int]:
        def run() -> int:
            n_right = 0
            for _ in range(30):
                try:
                    with torch.no_grad():
                        logits = model.run_with_hooks(given, fwd_hooks=hooks) if hooks else model(given)
                except HookError:
                    continue
                assert torch.equal(logits, right), "a silently wrong result"
                n_right += 1
            return n_right

        return run

    results = in_threads(loop(hooks, expected), loop([], before))
    assert all(isinstance(result, int) for result in results), results


def test_steered_blocks_side_by_side_leave_no_trace() -> None:
    hf_model, given = tiny_model("olmoe"), tokens(2, 5)
    before = hf_model(given).logits.detach()

    def loop() -> bool:
        for _ in range(10):
            try:
                with steered(hf_model, SteeringPlan([(1, 0)])), torch.no_grad():
                    hf_model(given)
            except HookError:
                continue
        return True

    assert in_threads(loop, loop) == [True, True]
    assert torch.equal(hf_model(given).logits, before)
    assert not any("forward" in vars(module) for module in hf_model.modules())
    assert "generate" not in vars(hf_model)


@pytest.mark.parametrize("build", [RoutedModel, HookedMoE.from_hf, lambda hf_model: hf_model])
def test_contexts_end_in_any_order(build: Callable[..., Any]) -> None:
    """Each takes its own hooks away. Without a wrapper, the first one makes it and the last one detaches."""
    model, given = build(tiny_model("olmoe")), tokens(2, 5)
    plans = [SteeringPlan(deactivate=[(layer, 0), (layer, 1)]) for layer in (0, 1, 2)]

    def logits(*which: int) -> Tensor:
        with ExitStack() as stack:
            for number in which:
                stack.enter_context(steered(model, plans[number]))
            return as_tensor(model(given))

    with torch.no_grad():
        plain, expected = as_tensor(model(given)), {n: logits(n) for n in (0, 1, 2)}
        expected |= {both: logits(*both) for both in ((0, 1), (0, 2), (1, 2))}
        for first, second, last in itertools.permutations(range(3)):
            contexts = [steered(model, plan) for plan in plans]
            for context in contexts:
                context.__enter__()
            contexts[first].__exit__(None, None, None)
            assert torch.equal(as_tensor(model(given)), expected[min(second, last), max(second, last)])
            contexts[second].__exit__(None, None, None)
            assert torch.equal(as_tensor(model(given)), expected[last])
            contexts[last].__exit__(None, None, None)
            assert torch.equal(as_tensor(model(given)), plain)
    assert getattr(model, "context_level", 0) == 0


def test_contexts_of_two_wrappers_keep_their_hooks() -> None:
    hf_model, given = tiny_model("olmoe"), tokens(2, 5)
    one, other = RoutedModel(hf_model), RoutedModel(hf_model)
    plans = [steer_hooks(SteeringPlan(deactivate=[(layer, 0), (layer, 1)])) for layer in (0, 1)]
    with torch.no_grad():
        expected = one.run_with_hooks(given, fwd_hooks=plans[0])
        with one.hooks(plans[0]):
            with other.hooks(plans[1]):
                assert not torch.equal(one(given), expected)
            assert torch.equal(one(given), expected)


def test_training_is_allowed_until_the_context_that_allows_it_ends() -> None:
    model, given = RoutedModel(tiny_model("olmoe")), tokens(2, 5)
    hooks = steer_hooks(SteeringPlan(deactivate=[(0, 0)]))
    model.train()
    allows = [model.hooks(hooks, training=training) for training in (True, False, True)]
    for context in allows:
        context.__enter__()
    for context in allows[:2]:
        context.__exit__(None, None, None)
        model(given)
    allows[2].__exit__(None, None, None)
    with pytest.raises(HookError, match="training mode"):
        model.run_with_hooks(given, fwd_hooks=hooks)


def as_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def test_a_wrapper_without_points_says_so() -> None:
    hf_model = tiny_model("olmoe")
    with steered(hf_model, SteeringPlan([(1, 0)])):
        kept = RoutedModel(hf_model)
    kept.add_hook("blocks.0.hook_resid_pre", lambda value, hook: value * 0)
    assert not torch.equal(kept(tokens(1, 3)), tiny_model("olmoe")(tokens(1, 3)).logits)
    other = RoutedModel(hf_model)
    kept.detach()
    for use in (lambda: other(tokens(1, 3)), lambda: other.add_hook("blocks.0.hook_resid_pre", print)):
        with pytest.raises(HookError, match="no hook points any more"):
            use()
