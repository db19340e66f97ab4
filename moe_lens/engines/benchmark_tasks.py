"""The benchmarks of paper_benchmarks.py as task objects of lm-evaluation-harness.

    BenchmarkTask.of("moe_lens/advbench", "prompts.jsonl")

and, for the harness' own command, a YAML file:

    task: my_advbench
    class: !function moe_lens.engines.benchmark_tasks.BenchmarkTask
    metadata: {benchmark: advbench, data: prompts.jsonl}
"""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from moe_lens.engines.paper_benchmarks import Benchmark, benchmark_named
from moe_lens.errors import DataError


class BenchmarkTask(ConfigurableTask):
    """A benchmark with somebody's data.

    Args:
        config: "task" (a name) and "metadata", with "benchmark", "data" (a file or rows), and, if wanted,
            "columns", "template" and "clusters", as in `Benchmark.documents`. "generation_kwargs",
            "num_fewshot" and the like are the harness' own.

    Raises:
        DataError: no benchmark or data named, or data at fault.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        given = {key: value for key, value in (config or {}).items() if key != "class"}
        about = dict(given.pop("metadata", None) or {})
        if "benchmark" not in about or "data" not in about:
            raise DataError(
                f"{given.get('task')}: metadata must name a benchmark and data; it has {list(about)}."
            )
        benchmark = benchmark_named(str(about["benchmark"]))
        documents = benchmark.documents(
            about["data"],
            **{name: about[name] for name in ("columns", "template", "clusters") if name in about},
        )
        super().__init__(config={**_config(benchmark, documents), **given, "metadata": {"version": 1.0}})

    @classmethod
    def of(
        cls,
        name: str,
        data: Any,
        *,
        columns: Mapping[str, str] | None = None,
        template: str | None = None,
        clusters: str | None = None,
    ) -> "BenchmarkTask":
        """The benchmark of this name with this data."""
        about = {
            "benchmark": name,
            "data": data,
            "columns": columns,
            "template": template,
            "clusters": clusters,
        }
        return cls({"task": name, "metadata": about})


def _config(benchmark: Benchmark, documents: list[dict[str, Any]]) -> dict[str, Any]:
    dataset = Dataset.from_list(documents)
    shared = {
        "custom_dataset": lambda **_: {"test": dataset},
        "test_split": "test",
        "doc_to_text": "prompt",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": not benchmark.lower_is_better}
            for name in benchmark.scores
        ],
    }
    if benchmark.form == "choice":
        return {
            **shared,
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }

    def scores(document: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
        return {name: benchmark.score(name, document, answers[0]) for name in benchmark.scores}

    return {
        **shared,
        "output_type": "generate_until",
        "doc_to_target": lambda document: "",
        "process_results": scores,
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": benchmark.max_tokens},
    }
