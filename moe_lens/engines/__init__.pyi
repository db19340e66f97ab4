from .harness_tasks import harness_collateral as harness_collateral
from .harness_tasks import harness_task as harness_task
from .judging import Answer as Answer
from .judging import JudgedAnswers as JudgedAnswers
from .paper_benchmarks import BENCHMARKS as BENCHMARKS
from .paper_benchmarks import Benchmark as Benchmark
