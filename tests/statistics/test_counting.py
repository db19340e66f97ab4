"""Counting as the model runs: what routers chose, on every family, and nothing after the last one."""

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers.models.olmoe import modeling_olmoe

from benchmarks.measuring import Waits
from moe_lens import HookedMoE, RoutedModel, attach, hook_names
from moe_lens.errors import DataError, HookError, MoELensError
from moe_lens.statistics import RoutingStats, collect_routing, collect_to_file, iterate_routing, route_prompt
from moe_lens.statistics.counting import RoutingCounter
from moe_lens.steering import SteeringPlan, steer_hooks
from moe_lens.text.batching import WINDOW, Limits
from tests.families import some_kinds
from tests.statistics.sums import Hooked
from tests.tiny_models import MOE_LAYERS, prompt, tiny_model, tokenizer, tokens

LENGTHS = (5, 9, 3, 7, 9, 2)
SEQUENCES = [tokens(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]


def by_hand(model: Any, sequences: list[Tensor]) -> dict[str, Tensor]:
    """Counts, weights and per-prompt counts from caches of single prompts, by loops."""
    layers, n_experts = model.moe_layers, model.n_experts
    counts = torch.zeros(len(sequences), len(layers), n_experts, dtype=torch.int64)
    weights = torch.zeros(len(layers), n_experts, dtype=torch.float64)
    for number, sequence in enumerate(sequences):
        _, cache = model.run_with_cache(sequence[None])
        for row, layer in enumerate(layers):
            chosen = cache["topk_indices", layer][0].tolist()
            given = cache["topk_weights", layer][0].tolist()
            for experts, shares in zip(chosen, given, strict=True):
                for expert, share in zip(experts, shares, strict=True):
                    counts[number, row, expert] += 1
                    weights[row, expert] += share
    return {"per_prompt": counts, "counts": counts.sum(0), "weights": weights}


@some_kinds
def test_counts_are_those_of_single_prompts(recipe: str) -> None:
    """Prompts of like length share a batch, padded on the right, and are given back in their order."""
    model = RoutedModel(tiny_model(recipe))
    try:
        expected = by_hand(model, SEQUENCES)
        choices: list[dict[str, Any]] = [{"batch_size": 2}, {"batch_tokens": 20}, {}]
        for options in choices:
            stats = collect_routing(model, SEQUENCES, per_prompt=True, progress=False, **options)
            assert torch.equal(stats.counts, expected["counts"])
            assert stats.per_prompt is not None
            assert torch.equal(stats.per_prompt.counts.long(), expected["per_prompt"])
            torch.testing.assert_close(stats.weight_sums, expected["weights"], rtol=1e-4, atol=1e-4)
            assert stats.per_prompt.n_tokens.tolist() == list(LENGTHS)
    finally:
        model.detach()


@some_kinds
def test_a_cache_says_the_same_of_every_sum(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe))
    try:
        _, cache = model.run_with_cache(SEQUENCES[1][None])
        whole: dict[str, Any] = {"per_prompt": True, "positions": True, "vocabulary": True}
        expected = RoutingStats.from_cache(cache, tokens=SEQUENCES[1][None], **whole).tensors()
        found = collect_routing(model, SEQUENCES[1], progress=False, **whole).tensors()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, equal_nan=True)
    finally:
        model.detach()


@pytest.mark.parametrize("wrapper", ["routed", "bridge"])
def test_a_forward_ends_at_the_last_router(
    wrapper: str, hooked: Hooked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hooked("olmoe") if wrapper == "bridge" else RoutedModel(tiny_model("olmoe"))
    ran: list[str] = []
    for part in ("OlmoeExperts", "OlmoeForCausalLM"):
        cls = getattr(modeling_olmoe, part)

        def counted(self: Any, *args: Any, _forward: Any = cls.forward, _part: str = part, **kw: Any) -> Any:
            output = _forward(self, *args, **kw)
            ran.append(_part)
            return output

        monkeypatch.setattr(cls, "forward", counted)
    n_layers = len(MOE_LAYERS["olmoe"])
    collect_routing(model, tokens(), progress=False)
    assert ran == ["OlmoeExperts"] * (n_layers - 1)
    ran.clear()
    collect_routing(model, tokens(), progress=False, hooks=steer_hooks(SteeringPlan(deactivate=[(0, 1)])))
    assert ran == ["OlmoeExperts"] * (n_layers - 1)
    ran.clear()
    collect_routing(model, tokens(), progress=False, outputs=True)
    assert set(ran) == {"OlmoeExperts"}
    ran.clear()
    model(tokens())
    assert ran[-1] == "OlmoeForCausalLM"  # the spy sees it


def test_a_hook_behind_the_last_router_still_fires() -> None:
    model = RoutedModel(tiny_model("olmoe"))
    last = max(MOE_LAYERS["olmoe"])
    seen: list[torch.Size] = []
    record: Any = (f"blocks.{last}.hook_resid_post", lambda value, hook: seen.append(value.shape))
    collect_routing(model, tokens(2, 4), hooks=[record], progress=False)
    assert [shape[:2] for shape in seen] == [(2, 4)]
    fired: list[int] = []
    head: Any = model.hf_model.lm_head
    handle = head.register_forward_hook(lambda *_: fired.append(1))
    collect_routing(model, tokens(), progress=False)
    handle.remove()
    assert fired == [1]
    model.add_hook(f"blocks.{last}.hook_resid_post", lambda value, hook: fired.append(2), is_permanent=True)
    collect_routing(model, tokens(), progress=False)
    assert fired == [1, 2]


def test_another_forward_inside_is_not_counted() -> None:
    model = RoutedModel(tiny_model("olmoe"))
    plain = collect_routing(model, tokens(2, 5), progress=False)

    def run_again(value: Tensor, hook: Any) -> None:
        with model.hooks([]):
            model.hf_model(tokens(3, 4, 7))

    name = "blocks.0.hook_resid_pre"
    again = collect_routing(model, tokens(2, 5), hooks=[(name, _once(run_again))], progress=False)
    assert torch.equal(again.counts, plain.counts)
    assert again.n_tokens == plain.n_tokens


def _once(function: Any) -> Any:
    ran: list[bool] = []

    def hook(value: Tensor, hook: Any) -> None:
        if not ran:
            ran.append(True)
            function(value, hook)

    return hook


def test_training_mode_is_refused() -> None:
    model = RoutedModel(tiny_model("olmoe").train())
    with pytest.raises(HookError, match="training mode"):
        collect_routing(model, tokens(), progress=False)
    model.eval()
    assert collect_routing(model, tokens(), progress=False).n_tokens == tokens().numel()


def test_after_an_error_nothing_is_left_watching() -> None:
    model = RoutedModel(tiny_model("olmoe"))

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect_routing(model, tokens(), hooks=[("blocks.0.hook_resid_pre", fail)], progress=False)
    with pytest.raises(DataError):
        collect_routing(model, [[4, 5], [10**9]], progress=False)
    assert not any(points.is_observed for points in vars(model)["_running"].points)


@pytest.mark.broad
@pytest.mark.parametrize("order", ["compiled first", "counted first"])
def test_a_compiled_model_is_counted(order: str) -> None:
    hf = tiny_model("olmoe")
    model = RoutedModel(hf)
    expected = collect_routing(model, SEQUENCES, progress=False)
    torch._dynamo.reset()
    hf.compile(backend="eager")
    if order == "compiled first":
        hf(input_ids=SEQUENCES[0][None])
    counted = collect_routing(model, SEQUENCES, progress=False)
    assert torch.equal(counted.counts, expected.counts)
    steered = steer_hooks(SteeringPlan(deactivate=[(1, 2)]))
    assert int(collect_routing(model, SEQUENCES, hooks=steered, progress=False).counts[1, 2]) == 0
    torch.testing.assert_close(hf(input_ids=tokens()).logits, tiny_model("olmoe")(input_ids=tokens()).logits)


@some_kinds
def test_counting_adds_no_wait_to_a_forward(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RoutedModel(tiny_model(recipe))
    original, seen = RoutingCounter.see, []

    def watched(self: RoutingCounter, *args: Any, **kwargs: Any) -> None:
        with Waits() as waits:
            original(self, *args, **kwargs)
        seen.append(dict(waits.counts))

    monkeypatch.setattr(RoutingCounter, "see", watched)
    try:
        collect_routing(model, SEQUENCES, per_prompt=True, progress=False)
    finally:
        model.detach()
    assert seen
    assert all(not waits for waits in seen)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    batch_size=st.one_of(st.none(), st.integers(1, 9)),
    batch_tokens=st.one_of(st.none(), st.integers(1, 90)),
)
def test_batches_hold_every_prompt_once_within_their_limits(
    lengths: list[int], batch_size: int | None, batch_tokens: int | None
) -> None:
    limits = Limits.of(batch_size, batch_tokens)
    batches = limits.batches(lengths)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert batch_size is None or len(batch) <= batch_size
        assert batch_tokens is None or len(batch) * longest <= batch_tokens or len(batch) == 1
    ordered = [lengths[number] for batch in batches for number in batch]
    assert ordered == sorted(lengths)
    windows = list(limits.windows(lengths, int))
    assert [length for window in windows for length in window] == lengths
    assert batch_size is None or all(len(window) <= WINDOW * batch_size for window in windows)


@pytest.mark.parametrize("name", ["batch_size", "batch_tokens"])
@pytest.mark.parametrize("bad", [0, -3, 2.5, "many", True])
def test_limits_must_be_whole_numbers(name: str, bad: Any) -> None:
    with pytest.raises(DataError, match=name):
        Limits.of(**{"batch_size": None, "batch_tokens": None, name: bad})


def test_memory_does_not_grow_with_the_prompts() -> None:
    """Of a stream, one window of prompts is alive at a time."""
    model, read = RoutedModel(tiny_model("olmoe")), []

    def stream() -> Any:
        for number in range(WINDOW * 3):
            read.append(number)
            yield tokens(1, 2 + number % 3, number)[0]

    parts = iterate_routing(model, stream(), batch_size=1, progress=False)
    for number, _ in enumerate(parts):
        assert len(read) <= WINDOW * (number // WINDOW + 1)


def expert_norms(model: Any, sequence: Tensor) -> dict[str, Tensor]:
    """The fields of ExpertOutputs by a loop over a cache."""
    model.set_use_expert_out(True)
    _, cache = model.run_with_cache(sequence[None])
    model.set_use_expert_out(False)
    size = (len(model.moe_layers), model.n_experts)
    found = {
        name: torch.zeros(size, dtype=torch.float64)
        for name in ("chosen", "norm_sums", "weighted_norm_sums", "max_norm", "max_abs")
    }
    for row, layer in enumerate(model.moe_layers):
        outputs, weights = cache["expert_out", layer][0], cache["topk_weights", layer][0]
        for pos, experts in enumerate(cache["topk_indices", layer][0].tolist()):
            for slot, expert in enumerate(experts):
                vector = outputs[pos, slot].double()
                norm, cell = float((vector**2).sum().sqrt()), (row, expert)
                found["chosen"][cell] += 1
                found["norm_sums"][cell] += norm
                found["weighted_norm_sums"][cell] += norm * float(weights[pos, slot])
                found["max_norm"][cell] = max(float(found["max_norm"][cell]), norm)
                found["max_abs"][cell] = max(float(found["max_abs"][cell]), float(vector.abs().max()))
    return found


@some_kinds
def test_outputs_are_summed_up_as_by_a_loop(recipe: str, tmp_path: Any) -> None:
    model = RoutedModel(tiny_model(recipe))
    try:
        parts = [expert_norms(model, sequence) for sequence in SEQUENCES]
        stats = collect_routing(model, SEQUENCES, batch_size=2, outputs=True, progress=False)
        assert not model.use_expert_out
        assert stats.outputs is not None
        for name, tensor in vars(stats.outputs).items():
            stacked = torch.stack([part[name] for part in parts])
            expected = stacked.amax(0) if name.startswith("max") else stacked.sum(0)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-5)
        assert stats.n_tokens * model.top_k == int(stats.outputs.chosen.sum(-1)[0])
        stats.save(tmp_path / "stats")
        loaded = RoutingStats.load(tmp_path / "stats")
        assert loaded.outputs is not None
        assert torch.equal(loaded.outputs.max_abs, stats.outputs.max_abs)
        double = (stats + loaded).outputs
        assert double is not None
        assert torch.equal(double.max_norm, stats.outputs.max_norm)
        assert torch.equal(double.norm_sums, 2 * stats.outputs.norm_sums)
    finally:
        model.detach()


@some_kinds
def test_outputs_seen_without_hooks_are_those_that_hooks_see(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe))
    try:
        unchanged: Any = [(hook_names.expert_out(model.moe_layers[0]), lambda value, hook: value.clone())]
        alone = collect_routing(model, SEQUENCES[:2], batch_size=1, outputs=True, progress=False).outputs
        model.set_use_expert_out(True)
        stats = collect_routing(
            model, SEQUENCES[:2], batch_size=1, outputs=True, hooks=unchanged, progress=False
        )
        assert alone is not None
        for name, tensor in vars(stats.outputs).items():
            torch.testing.assert_close(tensor, getattr(alone, name), rtol=1e-5, atol=1e-6)
    finally:
        model.detach()


def test_experts_run_once_a_batch_where_they_were_seen_to_add_up() -> None:
    """The check that outputs add up costs a run of the experts, the first time and no more."""
    model = RoutedModel(tiny_model("olmoe"))
    calls = []
    hf_model: Any = model.original_model
    for layer in hf_model.model.layers:
        own = layer.mlp.experts.forward
        layer.mlp.experts.forward = lambda *args, own=own: (calls.append(len(args[0])), own(*args))[1]
    n_calls = []
    for _ in range(2):
        calls.clear()
        collect_routing(model, SEQUENCES, batch_size=3, outputs=True, progress=False)
        n_calls.append(len(calls))
    n_layers = len(model.moe_layers)
    assert n_calls == [(2 + 1) * n_layers, 2 * n_layers]


def test_a_block_without_its_experts_is_noticed_when_outputs_are_wanted() -> None:
    model = RoutedModel(tiny_model("olmoe"))
    hf_model: Any = model.original_model
    block = hf_model.model.layers[1].mlp
    whole = block.forward

    def fused(hidden_states: Tensor) -> Tensor:
        block.gate(hidden_states.flatten(0, 1))
        return hidden_states

    block.forward = fused
    with pytest.raises(HookError, match=r"Layer 1's block ran without calling its experts"):
        collect_routing(model, SEQUENCES[0], outputs=True, progress=False)
    block.forward = whole
    assert collect_routing(model, SEQUENCES[0], outputs=True, progress=False).outputs is not None


def test_outputs_of_other_counts_are_refused() -> None:
    model = RoutedModel(tiny_model("olmoe"))
    one = collect_routing(model, SEQUENCES[0], outputs=True, progress=False)
    other = collect_routing(model, SEQUENCES[1], outputs=True, progress=False)
    with pytest.raises(DataError, match="does not belong"):
        RoutingStats(one.shape, one.n_tokens, **{**vars_of(one), "outputs": other.outputs})
    plain = collect_routing(model, SEQUENCES[0], progress=False)
    with pytest.raises(DataError, match="outputs=True"):
        plain._have("outputs")


def vars_of(stats: RoutingStats) -> dict[str, Any]:
    return {name: value for name, value in vars(stats).items() if name not in ("shape", "n_tokens")}


def test_counting_a_bridge_and_the_model_itself_is_the_same(hooked: Hooked) -> None:
    on_bridge = collect_routing(hooked("olmoe"), SEQUENCES, progress=False)
    alone = collect_routing(attach(tiny_model("olmoe")), SEQUENCES, progress=False)
    for name, tensor in on_bridge.tensors().items():
        torch.testing.assert_close(tensor, alone.tensors()[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", ["routed", "bridge"])
def test_a_plan_a_prompt_stays_with_its_prompt(hooked: Hooked, wrapped: str) -> None:
    """Batches are formed by length; which plan is whose follows the order given."""
    model = hooked("olmoe") if wrapped == "bridge" else RoutedModel(tiny_model("olmoe"))
    plans = [SteeringPlan([(n % 3, n)], [(1, (n + 1) % 6)]) if n % 3 else None for n in range(6)]
    stats = collect_routing(
        model, SEQUENCES, batch_size=2, per_prompt=True, hooks=steer_hooks(plans), progress=False
    )
    assert stats.per_prompt is not None
    for number, (sequence, plan) in enumerate(zip(SEQUENCES, plans, strict=True)):
        hooks = [] if plan is None else steer_hooks(plan)
        alone = collect_routing(model, sequence, hooks=hooks, progress=False)
        assert torch.equal(stats.per_prompt.counts[number].long(), alone.counts)


def test_what_hooks_made_of_the_route_is_counted() -> None:
    """Logits, indices and weights edited at once: each is counted as the last hook left it."""
    model = RoutedModel(tiny_model("olmoe"))
    hooks: Any = [
        (hook_names.router_logits(0), lambda value, hook: value.roll(1, -1)),
        (hook_names.topk_indices(1), lambda value, hook: value.flip(-1)),
        (hook_names.topk_weights(1), lambda value, hook: value * 3),
    ]
    with model.hooks(hooks):
        _, cache = model.run_with_cache(tokens(2, 5))
    expected = RoutingStats.from_cache(cache)
    found = collect_routing(model, tokens(2, 5), hooks=hooks, progress=False)
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name])


@pytest.mark.parametrize("wrap", [RoutedModel, HookedMoE.from_hf])
@pytest.mark.parametrize("how", ["given", "on the model"])
def test_a_hook_that_names_columns_finds_the_prompts_ends_there(wrap: Any, how: str) -> None:
    """Under anybody's hook padding is on the left, as elsewhere: the last column holds last tokens."""
    model = wrap(tiny_model("olmoe"))
    point = "blocks.0.hook_resid_pre" if wrap is RoutedModel else "blocks.0.attn.hook_out"

    def silence(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, -1] = 0
        return value

    with model.hooks([(point, silence)]):
        expected = [collect_routing(model, sequence, progress=False).counts for sequence in SEQUENCES]
    if how == "given":
        found = collect_routing(model, SEQUENCES, hooks=[(point, silence)], progress=False)
    else:
        with model.hooks([(point, silence)]):
            found = collect_routing(model, SEQUENCES, progress=False)
    assert torch.equal(found.counts, torch.stack(expected).sum(0))
    assert not torch.equal(found.counts, collect_routing(model, SEQUENCES, progress=False).counts)


def test_one_batch_of_nan_is_refused_by_its_layer_and_takes_nothing_with_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_layers, path = len(MOE_LAYERS["olmoe"]), tmp_path / "stats"
    original, ran, fails = modeling_olmoe.OlmoeTopKRouter.forward, [], [3 * n_layers + 2]

    def forward(self: Any, hidden: Tensor) -> Any:
        ran.append(1)
        logits, *others = original(self, hidden)
        if len(ran) in fails:  # layer 1 of the fourth batch
            logits = logits.index_fill(0, torch.tensor([1]), torch.nan)
        return logits, *others

    monkeypatch.setattr(modeling_olmoe.OlmoeTopKRouter, "forward", forward)
    model = RoutedModel(tiny_model("olmoe"))
    options: dict[str, Any] = {"batch_size": 1, "progress": False}
    ran.clear()
    with pytest.raises(DataError, match=r"Layer 1: .*NaN"):
        collect_to_file(model, SEQUENCES, path, about="test", **options)
    fails.clear()
    ran.clear()
    found = collect_to_file(model, SEQUENCES, path, about="test", **options)
    assert len(ran) == 3 * n_layers  # the three batches before it were kept
    expected = collect_routing(model, SEQUENCES, **options)
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, expected.tensors()[name])


@pytest.mark.parametrize("run", [collect_routing, route_prompt, lambda m, p: list(iterate_routing(m, p))])
def test_other_models_are_refused_with_the_remedy(run: Any) -> None:
    for other in (tiny_model("olmoe"), None, "allenai/OLMoE-1B-7B-0125"):
        with pytest.raises((MoELensError, TypeCheckError), match=r"attach|type-check|Type-check"):
            run(other, SEQUENCES[0])


def test_other_threads_and_copies_are_not_counted() -> None:
    model = RoutedModel(tiny_model("olmoe"))
    expected = collect_routing(model, SEQUENCES, progress=False)
    errors: list[BaseException] = []

    def in_thread() -> None:
        try:
            model.hf_model(tokens(3, 4, 7))
        except BaseException as error:
            errors.append(error)

    def meanwhile(value: Tensor, hook: Any) -> None:
        copy.deepcopy(model).hf_model(tokens(3, 4, 7))

    def stream() -> Any:
        for sequence in SEQUENCES:
            thread = threading.Thread(target=in_thread)
            thread.start()
            thread.join()
            twin = copy.deepcopy(model)
            assert collect_routing(twin, sequence, progress=False).n_tokens == len(sequence)
            yield sequence

    found = collect_routing(model, stream(), progress=False)
    assert torch.equal(found.counts, expected.counts)
    hooked = collect_routing(
        model, SEQUENCES, hooks=[("blocks.0.hook_resid_pre", meanwhile)], batch_size=3, progress=False
    )
    assert torch.equal(hooked.counts, expected.counts)
    assert not errors


def test_a_thread_that_runs_the_model_within_a_forward_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = RoutedModel(tiny_model("olmoe"))
    expected = collect_routing(model, SEQUENCES, progress=False)
    original = RoutingCounter.see

    def see(self: RoutingCounter, *args: Any, **kwargs: Any) -> None:
        thread = threading.Thread(target=lambda: model.hf_model(tokens(2, 3)))
        thread.start()
        thread.join()
        original(self, *args, **kwargs)

    monkeypatch.setattr(RoutingCounter, "see", see)
    assert torch.equal(collect_routing(model, SEQUENCES, progress=False).counts, expected.counts)


def test_padding_that_is_the_end_of_text_is_never_counted() -> None:
    own = tokenizer()
    own.pad_token = own.eos_token
    model = RoutedModel(tiny_model("olmoe"), own)
    texts = [prompt(length, seed) for seed, length in enumerate((4, 9, 2))]
    singles = [collect_routing(model, text, progress=False) for text in texts]
    together = collect_routing(model, texts, progress=False)
    assert together.n_tokens == sum(single.n_tokens for single in singles)
    assert torch.equal(together.counts, torch.stack([single.counts for single in singles]).sum(0))


def test_somebodys_own_torch_hook_on_a_block_finds_the_last_token_last() -> None:
    def turn(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, -1] *= -3
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for model in (RoutedModel(tiny_model("olmoe")), HookedMoE.from_hf(tiny_model("olmoe"))):
        plain = collect_routing(model, SEQUENCES, progress=False)
        hf_model: Any = model.original_model
        hf_model.model.layers[0].register_forward_hook(turn)
        together = collect_routing(model, SEQUENCES, progress=False)
        alone = collect_routing(model, SEQUENCES, batch_size=1, progress=False)
        assert torch.equal(together.counts, alone.counts)
        assert not torch.equal(together.counts, plain.counts)


def test_tokens_that_an_adapter_adds_are_never_taken_for_the_prompts_own() -> None:
    tuned: Any = get_peft_model(
        tiny_model("olmoe"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    with pytest.raises(DataError, match="tokens were routed, and the batch has"):
        collect_routing(RoutedModel(tuned, tokenizer()), SEQUENCES, progress=False)
