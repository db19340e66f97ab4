"""Where a judge plugs in: a function of answers, or a file that somebody judges between two runs.

task = harness_task("moe_lens/advbench", data="prompts.jsonl", judge=my_judge)

judge = JudgedAnswers("answers.jsonl")                 # two steps, with any judge in between
task = harness_task("moe_lens/advbench", data="prompts.jsonl", judge=judge)
with judge.collecting():
    evaluate_steering(model, plan, task, ...)          # writes what is to be judged
...                                                    # your judge adds "score" to each line
report = evaluate_steering(model, plan, task, ...)     # the same answers, with their scores
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lens.errors import DataError
from moe_lens.files import atomic_write
from moe_lens.text.rows import jsonl_rows, text_cell


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        prompt: what it read, as text.
        text: what it wrote.
        document: the benchmark's row, as the harness has it.
    """

    prompt: str
    text: str
    document: Mapping[str, Any] = field(default_factory=dict)


Judge = Callable[[Sequence[Answer]], Any]
"""From answers to one number each."""


class JudgedAnswers:
    """A judge that reads its scores from a JSONL file of answers, and collects those to be judged.

    >>> import json
    >>> from pathlib import Path
    >>> from moe_lens.engines import Answer, JudgedAnswers
    >>> judge, answers = JudgedAnswers("answers.jsonl"), [Answer("Why?", "Because.")]
    >>> with judge.collecting():
    ...     _ = judge(answers)
    >>> row = json.loads(Path("answers.jsonl").read_text())
    >>> row
    {'prompt': 'Why?', 'answer': 'Because.', 'score': None}
    >>> _ = Path("answers.jsonl").write_text(json.dumps({**row, "score": 0.5}))
    >>> judge(answers)
    [0.5]

    An answer that is there already is not written again, so the file may serve many plans and models. Answers
    are written greedily, hence the same in both runs; sampled ones are drawn with one seed.

    Args:
        path: of the file; it need not exist before the first `collecting`.
        column: of the scores.

    Raises:
        DataError: on use, a file that cannot be read, an answer that is not in it or has no score yet.
    """

    def __init__(self, path: str | Path, column: str = "score") -> None:
        self.path, self.column = Path(path), column
        self._collected: dict[tuple[str, str], Any] | None = None

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The scores, in the order of the answers; zeros while it is collecting."""
        if self._collected is not None:
            for answer in answers:
                self._collected.setdefault((answer.prompt, answer.text), None)
            return [0.0 for _ in answers]
        scores = {key: score for key, score in self._read().items() if score is not None}
        missing = [answer for answer in answers if (answer.prompt, answer.text) not in scores]
        if missing:
            raise DataError(
                f"{self.path} has no {self.column} for {len(missing)} of {len(answers)} answers, the first to"
                f" {missing[0].prompt[-60:]!r}. Collect them with `with judge.collecting():`, and judge them."
            )
        return [scores[answer.prompt, answer.text] for answer in answers]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the context, answers get 0 and are written to the file at the end; reports mean nothing."""
        self._collected = self._read() if self.path.exists() else {}
        try:
            yield
        finally:
            collected, self._collected = self._collected, None
            rows = [
                {"prompt": prompt, "answer": text, self.column: score}
                for (prompt, text), score in collected.items()
            ]
            with atomic_write(self.path) as temporary:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                temporary.write_text("".join(lines), encoding="utf-8")

    def _read(self) -> dict[tuple[str, str], float | None]:
        found: dict[tuple[str, str], float | None] = {}
        for where, row in jsonl_rows(self.path):
            score = row.get(self.column)
            if score is not None and not _is_number(score):
                raise DataError(f"{where}, column {self.column!r} must be a number; got {score!r}.")
            text = row.get("answer")
            if not isinstance(text, str):  # an empty answer is one
                raise DataError(f"{where}, column 'answer' must be text; got {text!r}.")
            found[text_cell(where, row, "prompt"), text] = None if score is None else float(score)
        return found


def _is_number(score: Any) -> bool:
    return isinstance(score, int | float) and math.isfinite(score)
