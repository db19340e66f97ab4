"""What a run will take, before it starts: from the model's config, its tokenizer and the user's data.

    cost = expected(config, tokenizer, study_data, ...)
    print(cost.words())
    cost.hours_at(tokens_per_second)            # after the first forwards, by what was measured

Nothing here was measured on a large model: times assume a GPU that sustains `FLOPS` in a forward of bfloat16
and reads weights at `BANDWIDTH` while it writes, and may be off by a factor of three either way. The time per
token that `replicate.py` measures after loading replaces the first of the two.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from checkpoints import experts_of
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from moe_lens.engines import BENCHMARKS

FLOPS: Final = 40e12
BANDWIDTH: Final = 1e12
LOGIT_COPIES: Final = 3  # of a batch's logits in float32: as they come, cast, and their log-softmax


@dataclass(frozen=True)
class Size:
    """Parameters of a model: all, and those that a token passes through."""

    parameters: int
    active: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Size":
        """Counted on a model without memory, of the config alone."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        every = sum(parameter.numel() for parameter in model.parameters())
        experts = [(name, p) for name, p in model.named_parameters() if ".experts." in name and p.ndim >= 2]
        idle = sum(p.numel() * (1 - experts_of(config) / p.shape[0]) for _, p in experts)
        return cls(every, round(every - idle), config.get_text_config().vocab_size)


@dataclass(frozen=True)
class Work:
    """One pass over some prompts: tokens read, steps in which a batch writes a token, the longest prompt."""

    read: int
    written_steps: int
    longest: int

    def __mul__(self, times: int) -> "Work":
        return Work(self.read * times, self.written_steps * times, self.longest)

    def __add__(self, other: "Work") -> "Work":
        longest = max(self.longest, other.longest)
        return Work(self.read + other.read, self.written_steps + other.written_steps, longest)


@dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    size: Size
    work: Work
    batch_size: int
    bytes_each: int

    @property
    def gigabytes(self) -> float:
        """Weights, and the logits of the largest batch."""
        logits = LOGIT_COPIES * 4 * self.batch_size * self.work.longest * self.size.vocabulary
        return (self.size.parameters * self.bytes_each + logits) / 1e9

    def hours(self, tokens_per_second: float | None = None) -> float:
        """By the assumptions above, or at a measured speed of reading."""
        speed = tokens_per_second or FLOPS / (2 * self.size.active)
        step = self.size.parameters * self.bytes_each / BANDWIDTH  # a batch's tokens use nearly all experts
        return (self.work.read / speed + self.work.written_steps * step) / 3600

    def words(self) -> str:
        """In a line."""
        return (
            f"{self.size.parameters / 1e9:.2g} billion parameters, {self.size.active / 1e9:.2g} for a token; "
            f"{self.work.read / 1e6:.3g} million tokens to read, {self.work.written_steps:,} steps to write: "
            f"about {self.hours():.2g} hours and {self.gigabytes:.3g} GB, if a GPU sustains "
            f"{FLOPS / 1e12:.0f} TFLOP/s and reads {BANDWIDTH / 1e12:.0f} TB/s (estimated, not measured)"
        )


def detection_work(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> Work:
    """Each prompt is read once, to the last router."""
    lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    return Work(sum(lengths), 0, max(lengths))


def benchmark_work(
    tokenizer: PreTrainedTokenizerBase, name: str, documents: list[dict[str, Any]], batch_size: int
) -> Work:
    """One plan on one benchmark; options that share a forward are counted as if they did not."""
    benchmark = BENCHMARKS[name]
    lengths = [len(ids) for ids in tokenizer([document["prompt"] for document in documents]).input_ids]
    if benchmark.form == "choice":
        read = [n * len(document["choices"]) for n, document in zip(lengths, documents, strict=True)]
        return Work(sum(read), 0, max(lengths))
    batches = -(-len(documents) // batch_size)
    return Work(sum(lengths), batches * benchmark.max_tokens, max(lengths) + benchmark.max_tokens)
