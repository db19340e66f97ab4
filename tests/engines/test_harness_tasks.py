"""`harness_task` against loops of one forward a prompt, and against the harness' own `simple_evaluate`."""

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from datasets import config as datasets_config
from datasets import disable_progress_bars
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from moe_lens import (
    HookedMoE,
    RoutedModel,
    RouteRecord,
    SteeringPlan,
    TextSpan,
    attach,
    evaluate_steering,
    follow_dense,
    harness_task,
    organisms,
    record_dense,
    replay_hooks,
    route_around,
    steer_hooks,
    steered,
)
from moe_lens.engines import Answer, harness_collateral
from moe_lens.errors import DataError, HookError, MoELensError
from tests.engines.harness_files import chosen_by_loop, log_prob_by_loop, write_tasks, written_by_loop

CONFLICTS = organisms.world("label-free").conflicts("test")[:36:4]
PROMPTS = [conflict.open_book for conflict in CONFLICTS]
LONG = [(f"{c.document_answer} .", f"{c.memory_answer} .", c.memory_answer) for c in CONFLICTS]
SHORT = [(c.document_answer, c.memory_answer) for c in CONFLICTS]
PLAN = SteeringPlan(deactivate=[(0, 5), (1, 1), (3, 5), (3, 4)])  # halfway to the document
HEAVY = SteeringPlan(deactivate=[(layer, expert) for layer in range(4) for expert in range(5)])
WRAPPERS = [HookedMoE, RoutedModel]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets_config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    disable_progress_bars()
    return write_tasks(tmp_path_factory.mktemp("tasks"), CONFLICTS)


@pytest.fixture(scope="module", params=WRAPPERS, ids=lambda wrapper: wrapper.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return organisms.load("label-free", wrapper=request.param)


def task_of(folder: Path, name: str, metric: str | None = None, **options: Any) -> Any:
    return harness_task(name, metric, include_path=folder, batch_size=5, **options)


@pytest.mark.parametrize("steering", ["off", "plan", "around"])
def test_choices_equal_a_loop(model: Any, folder: Path, steering: str) -> None:
    hooks: Any = {"off": [], "plan": steer_hooks(PLAN), "around": route_around([(1, 2), (3, 3)])}[steering]
    for name, options in (("conflict_mc", SHORT), ("conflict_long", LONG)):
        values = task_of(folder, name, "acc").values(model, hooks).tolist()
        assert values == chosen_by_loop(model, PROMPTS, options, hooks)


def by_mask(phase: str, n_prompt: int, n_whole: int) -> Any:
    """The plan on a part of a single forward, of which all tokens are the prompt to a hook."""
    mask = torch.zeros(n_whole, dtype=torch.bool)
    mask[slice(0, n_prompt) if phase == "prompt" else slice(n_prompt, n_whole)] = True
    return steer_hooks(HEAVY, positions=mask)


def test_phases_of_scored_answers_equal_a_loop(model: Any, folder: Path) -> None:
    """Log-probabilities of three tokens, of which the model reads two."""
    task = task_of(folder, "conflict_log_prob").on(model)
    texts = [f"{c.document_answer} . the" for c in CONFLICTS]
    found = [task.values(model), task.values(model, steer_hooks(HEAVY))]
    for phase in ("prompt", "generated"):
        found.append(task.values(model, steer_hooks(HEAVY, positions=phase)))
        hooks = functools.partial(by_mask, phase)
        expected = [log_prob_by_loop(model, *each, hooks) for each in zip(PROMPTS, texts, strict=True)]
        np.testing.assert_allclose(found[-1], expected, atol=1e-4)
    for one, other in itertools.combinations(found, 2):  # so one taken for another would be noticed
        assert np.abs(one - other).min() > 1e-3


@pytest.mark.parametrize("phase", [None, "prompt", "generated"])
def test_written_answers_equal_a_loop(model: Any, folder: Path, phase: str | None) -> None:
    """Prompts of several lengths, padded on the left; the judge sees what was written."""
    seen: list[Answer] = []

    def judge(answers: Any) -> list[float]:
        seen.extend(answers)
        return [float(len(answer.text)) for answer in answers]

    prompts = [PROMPTS[0], PROMPTS[1].partition(" . ")[2], *PROMPTS[2:5], "Question : what is"]
    rows = [{"prompt": prompt} for prompt in prompts]
    task = harness_task(
        "moe_lens/fluency", data=rows, judge=judge, batch_size=4, gen_kwargs={"max_gen_toks": 3}
    )
    values = task.values(model, steer_hooks(HEAVY, positions=phase))
    loop_hooks: Any = steer_hooks(HEAVY) if phase is None else functools.partial(by_tokens, phase)
    expected = written_by_loop(model, prompts, 3, loop_hooks)
    assert [answer.text for answer in seen] == expected
    assert [answer.prompt for answer in seen] == prompts
    assert values.tolist() == [len(text) for text in expected]


def by_tokens(phase: str, n_prompt: int) -> Any:
    """A function of the position alone, for runs without a cache in which the text grows."""
    hooks = []
    for name, hook in steer_hooks(HEAVY):

        def edit(value: Any, point: Any, hook: Any = hook) -> Any:
            part = slice(0, n_prompt) if phase == "prompt" else slice(n_prompt, None)
            if value[:, part].shape[1]:
                value = value.clone()
                value[:, part] = hook(value[:, part], hook=point)
            return value

        hooks.append((name, lambda value, hook, edit=edit: edit(value, hook)))
    return hooks


def test_the_phases_of_written_answers_are_three_different_things(folder: Path) -> None:
    """So the test above would notice one taken for another."""
    model, seen = organisms.load("label-free", wrapper=RoutedModel), []

    def judge(answers: Any) -> list[float]:
        seen.append(tuple(answer.text for answer in answers))
        return [0.0] * len(answers)

    data = [{"prompt": prompt} for prompt in PROMPTS]
    task = harness_task("moe_lens/fluency", data=data, judge=judge, gen_kwargs={"max_gen_toks": 3}).on(model)
    for phase in (None, "prompt", "generated"):
        task.values(model, steer_hooks(HEAVY, positions=phase))
    task.values(model)
    assert len(set(seen)) == 4


@pytest.mark.parametrize("name", ["conflict_long", "conflict_gen"])
def test_values_are_those_that_the_harness_logs(folder: Path, name: str) -> None:
    """`simple_evaluate` on the Hugging Face model under `steered`, without moe_lens' part of it."""
    model = RoutedModel.from_pretrained(organisms.path("label-free"))
    metric = "exact_match" if name == "conflict_gen" else "acc"
    options = {"filter": "first"} if name == "conflict_gen" else {}
    ours = task_of(folder, name, metric, num_fewshot=1, **options).values(model, steer_hooks(PLAN))
    tokenizer, hf_model = model.tokenizer, model.detach()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=hf_model, tokenizer=tokenizer, batch_size=5)  # type: ignore[arg-type]
    with steered(hf_model, PLAN):
        evaluate: Any = lm_eval.simple_evaluate
        logged = evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0, num_fewshot=1)
    rows = [row for row in logged["samples"][name] if row["filter"] == options.get("filter", "none")]
    theirs = [float(row[metric]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    assert ours.tolist() == theirs
    assert 0 < ours.mean() < 1


def test_a_group_is_its_tasks_one_after_the_other(model: Any, folder: Path) -> None:
    both = task_of(folder, "conflict_both", "acc", clusters="entity", limit=6)
    parts = [task_of(folder, name, "acc", limit=6).values(model) for name in ("conflict_mc", "conflict_long")]
    assert both.values(model).tolist() == np.concatenate(parts).tolist()
    assert both.clusters[0] == f"conflict_mc {CONFLICTS[0].entity}"
    assert len(both.clusters) == 12


def test_a_file_of_a_task_is_one_too(model: Any, folder: Path) -> None:
    by_path = harness_task(folder / "conflict_mc.yaml", limit=4)
    assert by_path.values(model).tolist() == task_of(folder, "conflict_mc", limit=4).values(model).tolist()
    assert by_path.name == "conflict_mc"


def test_a_report_with_collateral(folder: Path) -> None:
    model = organisms.load("label-free", wrapper=RoutedModel)
    task = task_of(
        folder,
        "conflict_mc",
        clusters=lambda row: row["entity"],
        limit=4,
        collateral={
            "conflict_long": ("acc", 0.1),
            "refusals": harness_collateral(
                "moe_lens/harmless", None, 0.2, data=[{"prompt": "the"}], gen_kwargs={"max_gen_toks": 1}
            ),
        },
    )
    report = evaluate_steering(
        model, PLAN, task, reverse=SteeringPlan(deactivate=[(0, 1)]), n_random=1, alpha=0.3, progress=False
    )
    assert set(report.unsteered.collateral) == {"conflict_long", "refusals"}
    expected = np.mean(chosen_by_loop(model, PROMPTS[:4], LONG[:4], []))
    assert report.unsteered.collateral["conflict_long"] == expected
    assert report.limits["refusals"].larger_is_worse
    assert not report.limits["conflict_long"].larger_is_worse


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_texts_become_tokens_as_the_model_says(wrapper: Any, folder: Path, bos: bool) -> None:
    model = organisms.load("label-free", wrapper=wrapper)
    model.prepend_bos = bos
    seen: list[Any] = []
    handle = model.original_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    values = task_of(folder, "conflict_mc").values(model).tolist()
    handle.remove()
    assert values == chosen_by_loop(model, PROMPTS, SHORT, [])
    first = {int(row[0]) for tokens in seen for row in tokens}
    assert (first == {model.tokenizer.bos_token_id}) is bos


def test_an_attached_model_and_hooks_that_are_set_already(folder: Path) -> None:
    hf_model = RoutedModel.from_pretrained(organisms.path("label-free"))
    tokenizer, hf_model = hf_model.tokenizer, hf_model.detach()
    model = attach(hf_model, tokenizer)
    task = task_of(folder, "conflict_mc").on(model)
    with model.hooks(steer_hooks(PLAN)):
        assert task.values(model).tolist() == chosen_by_loop(model, PROMPTS, SHORT, [])
    with steered(hf_model, PLAN):
        within = task.values(model).tolist()
    assert within == task.values(model, steer_hooks(PLAN)).tolist()


def test_model_tokenizer_and_random_numbers_stay_as_they_are(folder: Path) -> None:
    model = organisms.load("label-free", wrapper=RoutedModel)
    model.tokenizer.pad_token = None
    model.tokenizer.padding_side = "right"
    hf_model: Any = model.hf_model
    embedding = hf_model.get_input_embeddings().weight
    hf_model.config.tie_word_embeddings = True  # and they are not: folded, or edited
    state = copy.deepcopy(model.hf_model.state_dict())
    torch.manual_seed(5)
    numpy_state: Any = np.random.get_state
    before = numpy_state()[1].tolist(), torch.get_rng_state()  # (beartype draws from Python's own)
    task = task_of(folder, "conflict_gen", "exact_match", filter="first", limit=4)
    task.values(model, steer_hooks(PLAN))
    sampled = harness_task(
        "moe_lens/fluency",
        data=[{"prompt": "the"}, {"prompt": "Question : what"}],
        judge=lambda answers: [float(len(answer.text)) for answer in answers],
        gen_kwargs={"do_sample": True, "temperature": 1.0, "max_gen_toks": 8},
    )
    assert sampled.values(model).tolist() == sampled.values(model).tolist()
    assert numpy_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert model.tokenizer.pad_token is None
    assert model.tokenizer.padding_side == "right"
    assert hf_model.get_input_embeddings().weight is embedding
    assert "tie_weights" not in vars(model.hf_model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.hf_model.state_dict().items())


def test_few_shot_examples_are_the_same_in_every_run_and_for_every_model(folder: Path) -> None:
    seen: list[list[str]] = []

    def judge(answers: Any) -> list[float]:
        seen.append([answer.prompt for answer in answers])
        return [0.0] * len(answers)

    task = task_of(folder, "conflict_gen", judge=judge, filter="all", num_fewshot=2, limit=3)
    for name in ("specialised", "null"):
        model = organisms.load(name, wrapper=RoutedModel)
        on_model = task.on(model)
        on_model.values(model)
        on_model.values(model, steer_hooks(PLAN))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert all(prompt.count("Question :") == 3 for prompt in seen[0])


REFUSED = {
    "columns": steer_hooks(PLAN, positions=[-1]),
    "a span": steer_hooks(PLAN, positions="last"),
    "a text": route_around([(1, 2)], positions=TextSpan("Question")),
    "a mask": steer_hooks(PLAN, positions=torch.ones(6, dtype=torch.bool)),
    "plans of rows": steer_hooks([PLAN, None]),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", ["conflict_mc", "conflict_gen"])
def test_hooks_that_would_mean_other_tokens_are_refused(
    model: Any, folder: Path, name: str, what: str
) -> None:
    options = {"metric": "exact_match", "filter": "all"} if name == "conflict_gen" else {}
    task = task_of(folder, name, limit=6, **options).on(model)
    with pytest.raises(HookError, match="the harness sorts prompts by length"):
        task.values(model, REFUSED[what])
    with model.hooks(REFUSED[what]), pytest.raises(HookError, match="the harness sorts prompts"):
        task.values(model)
    assert len(task.values(model)) == 6


def test_a_recorded_route_is_refused(model: Any, folder: Path) -> None:
    _, cache = model.run_with_cache(PROMPTS[:2])
    task = task_of(folder, "conflict_mc", limit=2)
    with pytest.raises(HookError, match="route for each prompt"):
        task.values(model, replay_hooks(RouteRecord.from_cache(cache)))


def test_dense_weights_of_several_prompts_are_refused_and_those_of_one_serve_all(
    model: Any, folder: Path
) -> None:
    task = task_of(folder, "conflict_mc", limit=6)
    several, one = (record_dense(model, PROMPTS[:n], progress=False) for n in (2, 1))
    with pytest.raises(HookError, match="route for each prompt"):
        task.values(model, follow_dense(several, positions=None))
    hooks = follow_dense(one, positions=None)
    assert task.values(model, hooks).tolist() == chosen_by_loop(model, PROMPTS[:6], SHORT[:6], hooks)


def test_steering_what_is_generated_where_nothing_is(model: Any, folder: Path) -> None:
    hooks = steer_hooks(PLAN, positions="generated")
    with pytest.raises(HookError, match="each answer is one token"):
        task_of(folder, "conflict_mc").values(model, hooks)
    prompt = steer_hooks(PLAN, positions="prompt")
    values = task_of(folder, "conflict_mc").values(model, prompt).tolist()
    assert values == chosen_by_loop(model, PROMPTS, SHORT, steer_hooks(PLAN))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("conflict_long", {"metric": "brier_score"}, "of all documents together.*are acc"),
        ("conflict_gen", {"metric": "bleu", "filter": "all"}, "of all documents together.*are exact_match"),
        ("conflict_text", {}, "none"),
        ("conflict_text", {"metric": "word_perplexity"}, "of all documents together"),
        ("conflict_mc", {"metric": "acc_norm"}, "no metric 'acc_norm'"),
        ("conflict_gen", {"metric": "exact_match"}, "filters all, first"),
        ("conflict_mc", {"filter": "first"}, "no filter 'first'; it has none"),
        ("conflict_mc", {"clusters": "country"}, "no column 'country'.*entity"),
        ("conflict_mc", {"judge": lambda answers: []}, "none written"),
        ("conflict_mc", {"data": "file.jsonl"}, "has its own"),
        ("conflict_mc", {"limit": 0}, "limit must be"),
        ("conflict_mc", {"limit": 1}, "at least two clusters"),
        ("conflict_mc", {"batch_size": 0}, "batch_size must be"),
        ("conflict_mc", {"collateral": {"conflict_long": ("acc", -0.1)}}, "worse_by must be"),
        ("nowhere.yaml", {}, "no file"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(folder: Path, name: str, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        harness_task(name, include_path=folder, **options)


@pytest.mark.broad  # reads the index of all the harness' tasks
def test_a_task_that_is_not_there_names_its_neighbours(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no task 'arc_eazy'.*arc_easy"):
        harness_task("arc_eazy", "acc")


def test_a_task_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs: {data_files: {test: /nowhere.jsonl}}\n"
    )
    with pytest.raises(DataError, match="cannot load lost"):
        harness_task("lost", "exact_match", include_path=tmp_path)


def test_a_judge_that_says_too_little_or_nonsense(folder: Path) -> None:
    model = organisms.load("null", wrapper=RoutedModel)
    options = {"filter": "all", "limit": 2}
    with pytest.raises(DataError, match="0 numbers for 2 answers"):
        task_of(folder, "conflict_gen", judge=lambda answers: [], **options).values(model)
    with pytest.raises(DataError, match="no finite number"):
        task_of(folder, "conflict_gen", judge=lambda answers: ["good"] * 2, **options).values(model)


@pytest.mark.parametrize("positions", [None, "prompt"])
def test_nan_is_no_score(folder: Path, positions: Any) -> None:
    model = organisms.load("null", wrapper=RoutedModel)
    name = model.moe_layers[0]
    blank = (f"blocks.{name}.hook_resid_post", lambda value, hook: value * torch.nan)
    hooks = [*steer_hooks(SteeringPlan(deactivate=[(0, 1)]), positions=positions), blank]
    with pytest.raises(MoELensError, match="NaN"):
        task_of(folder, "conflict_mc", limit=2).values(model, hooks)


def test_models_that_cannot_be_measured(folder: Path) -> None:
    task = task_of(folder, "conflict_mc", limit=2)
    model = organisms.load("null", wrapper=RoutedModel)
    model.train()
    with pytest.raises(DataError, match="training mode"):
        task.on(model)
    model.eval()
    model.tokenizer = None
    with pytest.raises(DataError, match="needs a tokenizer"):
        task.on(model)
