"""Counting many prompts into a file, so that an interrupted run continues where it stopped.

stats = collect_to_file(model, prompts, "stats.safetensors", about="...")      # interrupted
stats = collect_to_file(model, prompts, "stats.safetensors", about="...")      # counts the rest

Beside the result lies a partial file, `.stats.safetensors.<digest>.<batches done>.partial`, replaced whole
after each batch (less often where writing it would cost more than a twentieth of the time). The digest is of
everything that the counts depend on, so a run with other settings never continues this one.
"""

import hashlib
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from transformer_lens.model_bridge import TransformerBridge

from moe_lens.collection import RunningTotal, iterate_routing
from moe_lens.errors import DataError
from moe_lens.files import check_writable
from moe_lens.routing_stats import RoutingStats

SAVING_SHARE: Final = 0.05
"""Largest share of the time that is spent on writing partial files."""


def collect_to_file(
    model: TransformerBridge,
    prompts: Iterable[Any],
    path: str | Path,
    *,
    about: str,
    batch_size: int = 8,
    progress: bool = True,
    **settings: Any,
) -> RoutingStats:
    """`collect_routing`, saved to `path`; continues from the partial file of an interrupted run.

    The result is bit for bit that of an uninterrupted run: batches are the same, sums are added in the same
    order.

    Args:
        prompts: a list, or a generator that gives the same prompts again.
        about: whatever else the counts depend on (which model, which prompts); a change starts afresh.
        settings: of `iterate_routing`: span, special_tokens, per_prompt, positions, vocabulary.

    Raises:
        DataError: as `collect_routing`; what was counted before the error stays in the partial file.
    """
    path = Path(path)
    check_writable(path)
    digest = hashlib.sha256(f"{about} {batch_size} {sorted(settings.items())}".encode()).hexdigest()[:16]
    found, before = _newest_partial(path, digest)
    total = RunningTotal()
    if found is not None:
        total.add(found)
        before -= 1  # what was found counts as one batch below
    saved, cost = time.monotonic(), 0.0
    try:
        for stats in iterate_routing(
            model,
            prompts,
            batch_size=batch_size,
            progress=progress,
            skip=before + total.n_batches,
            **settings,
        ):
            total.add(stats)
            if cost <= SAVING_SHARE * (time.monotonic() - saved):
                cost = _save_partial(path, digest, total, before)
                saved = time.monotonic()
    except BaseException:  # also KeyboardInterrupt: what was counted is kept
        if total.n_batches:
            _save_partial(path, digest, total, before)
        raise
    result = total.stats()
    result.save(path)
    for _, old in _partials(path):
        old.unlink(missing_ok=True)
    return result


def _partials(path: Path, digest: str = "[0-9a-f]{16}") -> list[tuple[int, Path]]:
    """(number of batches, file) of the partial files of a result."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{digest}\.(\d+)\.partial")
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    return [(int(match.group(1)), file) for file in files if (match := name.fullmatch(file.name))]


def _newest_partial(path: Path, digest: str) -> tuple[RoutingStats | None, int]:
    """The counts so far and the number of batches in them; files that cannot be read are passed over."""
    for done, file in sorted(_partials(path, digest), reverse=True):
        try:
            return RoutingStats.load(file), done
        except DataError:
            continue
    return None, 0


def _save_partial(path: Path, digest: str, total: RunningTotal, before: int) -> float:
    """Write the counts, drop the older ones; the seconds that it took."""
    start = time.monotonic()
    new = path.parent / f".{path.name}.{digest}.{before + total.n_batches}.partial"
    total.stats().save(new)
    for _, old in _partials(path, digest):
        if old != new:
            old.unlink(missing_ok=True)
    return time.monotonic() - start
