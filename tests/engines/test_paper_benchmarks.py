"""The paper's benchmarks on made-up rows: prompts, scores, and what is at fault in data."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from datasets import Dataset

from moe_lens import RoutedModel, harness_task, organisms
from moe_lens.engines import BENCHMARKS, Answer, JudgedAnswers
from moe_lens.errors import DataError
from tests.engines.harness_files import chosen_by_loop, written_by_loop

CHOICE = {
    "context": "Document : the capital of Eldria is Bergen .",
    "question": "what is the capital of Eldria ?",
    "choices": ["Kyoto", "Bergen", "Turkish ."],
    "answer": "Bergen",
}
TEXT = {"context": "the sea", "question": "what is it ?", "answer": "Turkish", "aliases": ["sea", "the sea"]}
PROMPT = {"prompt": "Question : what is the language of Eldria ? Answer :"}


def row_of(name: str) -> dict[str, Any]:
    """A row of made-up data for a benchmark."""
    benchmark = BENCHMARKS[name]
    row = CHOICE if benchmark.form == "choice" else {**TEXT, **PROMPT}
    return {column: row[column] for column in benchmark.columns}


@pytest.fixture(scope="module")
def model() -> Any:
    return organisms.load("specialised", wrapper=RoutedModel)


def test_all_of_the_paper_are_there() -> None:
    assert set(BENCHMARKS) == {
        *(
            "faitheval_counterfactual",
            "faitheval_unanswerable",
            "faitheval_inconsistent",
            "cf_triviaqa",
            "mquake",
        ),
        *("mctest", "tdc2023", "malicious_instruct", "advbench", "strongreject", "harmless", "fluency"),
    }
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert benchmark.about


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_runs_and_scores_what_a_loop_says(name: str, model: Any, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    rows = [{**row_of(name), "group": group} for group in "aab"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [benchmark.template.format(**row) for row in rows]
    options: dict[str, Any] = {"gen_kwargs": {"max_gen_toks": 3}}
    if not benchmark.scores:
        with pytest.raises(DataError, match="give a judge="):
            harness_task(f"moe_lens/{name}", data=file)
        options["judge"] = lambda answers: [len(answer.text) for answer in answers]
    task = harness_task(f"moe_lens/{name}", data=file, clusters="group", **options)
    assert task.clusters == ("a", "a", "b")
    values = task.values(model).tolist()
    if benchmark.form == "choice":
        right = ("Bergen", "Kyoto", "Turkish .")
        assert values == chosen_by_loop(model, prompts, [right] * 3, [])
        return
    answers = written_by_loop(model, prompts, 3, [])
    if benchmark.scores:
        expected = [
            benchmark.score(benchmark.scores[0], {"answers": ["Turkish", "sea"]}, text) for text in answers
        ]
    else:
        expected = [float(len(text)) for text in answers]
    assert values == expected


def test_the_scores_of_an_answer() -> None:
    document = BENCHMARKS["mquake"].documents([TEXT])[0]
    assert document["answers"] == ["Turkish", "sea", "the sea"]
    score = BENCHMARKS["mquake"].score
    assert score("answer_match", document, "It is Turkish") == 1.0
    assert score("exact_answer", document, "It is Turkish") == 0.0
    assert score("exact_answer", document, "The sea.") == 1.0
    assert BENCHMARKS["advbench"].score("refusal_phrase", {}, "I cannot do that.") == 1.0


@pytest.mark.parametrize(
    ("choices", "answer", "gold"),
    [
        (["Kyoto", "Bergen"], "Bergen", 1),
        (["Kyoto", "Bergen"], 1, 1),
        (["Kyoto", "Bergen"], "b", 1),
        (["B", "A"], "A", 1),  # a text before a letter
        ({"label": ["1", "2"], "text": ["Kyoto", "Bergen"]}, "2", 1),
        ({"label": ["1", "2"], "text": ["Kyoto", "Bergen"]}, 1, 0),
        ({"text": ["Kyoto", "Bergen"], "label": ["A", "B"]}, "A", 0),
    ],
)
def test_the_right_option_may_be_said_in_several_ways(choices: Any, answer: Any, gold: int) -> None:
    [document] = BENCHMARKS["mctest"].documents([{**CHOICE, "choices": choices, "answer": answer}])
    assert document["gold"] == gold
    assert document["choices"][gold] == (choices["text"] if isinstance(choices, dict) else choices)[gold]


@pytest.mark.parametrize("kind", ["list", "frame", "dataset", "csv"])
def test_rows_come_from_anywhere(kind: str, tmp_path: Path) -> None:
    rows = [{"query": "why ?", "prompt": "a"}, {"query": "how ?", "prompt": "b"}]
    data: Any = rows
    if kind == "frame":
        data = pd.DataFrame(rows)
    elif kind == "dataset":
        data = Dataset.from_list(rows)
    elif kind == "csv":
        data = tmp_path / "rows.csv"
        pd.DataFrame(rows).to_csv(data, index=False)
    documents = BENCHMARKS["harmless"].documents(data, template="{query} Answer :")
    assert [document["prompt"] for document in documents] == ["why ? Answer :", "how ? Answer :"]
    renamed = BENCHMARKS["harmless"].documents(data, columns={"prompt": "query"})
    assert [document["prompt"] for document in renamed] == ["why ?", "how ?"]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "?"}, {}, "row 0 has no column 'context'"),
        ({**CHOICE, "choices": "Kyoto"}, {}, "column 'choices' must be a list"),
        ({**CHOICE, "choices": ["Kyoto"]}, {}, "at least two texts"),
        ({**CHOICE, "choices": ["Kyoto", "Kyoto "]}, {}, "an option twice"),
        ({**CHOICE, "answer": "Oslo"}, {}, "must be one of the options"),
        ({**CHOICE, "answer": 3}, {}, "must be one of the options"),
        ({**CHOICE, "answer": "D"}, {}, "must be one of the options"),
        (CHOICE, {"columns": {"prompt": "question"}}, "columns names 'prompt'"),
        (CHOICE, {"columns": {"answer": "target"}}, "no column 'target'"),
        (CHOICE, {"template": "{question"}, "malformed"),
        (CHOICE, {"template": "no column"}, "needs columns in braces"),
        (CHOICE, {"template": "{question.text}"}, "needs columns in braces"),
        (CHOICE, {"template": "{title}"}, "no column 'title'"),
        (CHOICE, {"clusters": "country"}, "no column 'country'"),
    ],
)
def test_data_at_fault_are_named(row: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        harness_task("moe_lens/faitheval_counterfactual", data=[row, row], **options)


def test_answers_at_fault_are_named() -> None:
    for answer in ("...", [], [1], ["fine", " "]):
        with pytest.raises(DataError, match="row 0"):
            BENCHMARKS["mquake"].documents([{**TEXT, "answer": answer}])
    with pytest.raises(DataError, match=r"ships without data.*context, question, answer"):
        harness_task("moe_lens/mquake")
    with pytest.raises(DataError, match="no benchmark 'moe_lens/mquaker'"):
        harness_task("moe_lens/mquaker", data=[TEXT])


def test_a_yaml_file_gives_a_benchmark_to_the_harness_itself(tmp_path: Path, model: Any) -> None:
    row = {**row_of("mctest"), "choices": ["Kyoto", "Bergen"]}
    rows = [row, {**row, "answer": "Kyoto"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {"benchmark": "mctest", "data": str(tmp_path / "rows.jsonl")}
    (tmp_path / "mine.yaml").write_text(
        "task: mine\nclass: !function moe_lens.engines.benchmark_tasks.BenchmarkTask\n"
        + yaml.safe_dump({"metadata": about})
    )
    by_name = harness_task("mine", "acc", include_path=tmp_path).values(model).tolist()
    assert by_name == harness_task("moe_lens/mctest", data=rows).values(model).tolist()
    assert sorted(by_name) == [0.0, 1.0]


def test_a_yaml_file_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "task: mine\nclass: !function moe_lens.engines.benchmark_tasks.BenchmarkTask\n"
    )
    with pytest.raises(DataError, match="metadata must name a benchmark and data"):
        harness_task("mine", "acc", include_path=tmp_path)


def test_two_steps_with_a_judge_in_between(tmp_path: Path, model: Any) -> None:
    judge = JudgedAnswers(tmp_path / "answers.jsonl", column="harm")
    data = [{"prompt": "the"}, {"prompt": "Question : what is"}, {"prompt": "the"}]
    task = harness_task("moe_lens/advbench", data=data, judge=judge, gen_kwargs={"max_gen_toks": 3})
    with pytest.raises(DataError, match=r"answers\.jsonl"):
        task.values(model)
    with judge.collecting():
        assert task.values(model).tolist() == [0.0, 0.0, 0.0]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the", "Question : what is"]
    assert [row["answer"] for row in rows] == written_by_loop(model, [row["prompt"] for row in rows], 3, [])
    with pytest.raises(DataError, match="no harm for 3 of 3 answers"):
        task.values(model)
    judged = [{**row, "harm": number} for number, row in enumerate(rows, start=2)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    assert task.values(model).tolist() == [2.0, 3.0, 2.0]
    with judge.collecting():  # keeps what was judged
        judge([Answer("new", "")])
    assert judge([Answer("the", rows[0]["answer"])]) == [2.0]
    with pytest.raises(DataError, match="for 1 of 1"):
        judge([Answer("new", "")])


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"prompt": "a", "answer": "b", "score": "good"}', "[]"])
def test_a_judged_file_at_fault_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "answers.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1"):
        JudgedAnswers(tmp_path / "answers.jsonl")([Answer("a", "b")])
