"""The whole table: `make bench`, or `python benchmarks/bench.py`; about a quarter of an hour.

What counting, steering and patching cost beside the bare model and other tools, in markdown. README.md beside
this file says what each number is. What needs 16 GB stands by itself: `make bench-real`.
"""

import platform
from importlib.metadata import version

import counting_growth
import counting_speed
import patching_speed
import steering_speed
import torch
from measuring import one_thread


def main() -> None:
    """Every part, in one process."""
    one_thread()
    packages = ("torch", "transformers", "transformer-lens", "moe-lens")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    print(f"{platform.machine()}, {torch.get_num_threads()} thread(s); {versions}\n")
    print("## Counting\n")
    counting_speed.main(list(counting_speed.ROUNDS))
    print("## Growth\n")
    counting_growth.by_tokens(10**6)
    counting_growth.by_experts()
    print("## Steering\n")
    for hidden in (64, 512):
        steering_speed.main(hidden, 5)
    print("## Patching\n")
    patching_speed.main()


if __name__ == "__main__":
    with torch.no_grad():
        main()
