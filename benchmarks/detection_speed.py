"""Speed of a detection's statistics: `python benchmarks/detection_speed.py [experts [pairs [resamples]]]`

Default: 6,144 experts × 1,000 pairs × 1,000 resamples and as many sign flips. Prints the seconds of each step
and the largest memory of the process; asserts nothing, since machines differ.
"""

import resource
import sys
import time

import numpy as np

from moe_lens.detection import PairedCounts, bootstrap_scores, interval, q_values, score, sign_flip_p


def made_up(n_experts: int, n_pairs: int) -> PairedCounts:
    """Overdispersed counts; every tenth expert fires more often under the first condition."""
    generator = np.random.default_rng(0)
    n_tokens = [generator.integers(5, 50, n_pairs), generator.integers(15, 150, n_pairs)]
    rates = generator.beta(0.5, 6, n_experts)
    sums = []
    for condition, tokens in enumerate(n_tokens):
        raised = rates * np.where((np.arange(n_experts) % 10 == 0) & (condition == 0), 1.3, 1.0)
        logits = np.log(raised / (1.001 - np.minimum(raised, 1)))
        noisy = 1 / (1 + np.exp(-logits - generator.normal(size=(n_pairs, n_experts))))
        sums.append(generator.binomial(tokens[:, None], noisy))
    return PairedCounts.of_pairs(sums[0], n_tokens[0], sums[1], n_tokens[1])


def main(n_experts: int = 6144, n_pairs: int = 1000, n_resamples: int = 1000) -> None:
    """Time each step for each score."""
    counts = made_up(n_experts, n_pairs)
    print(f"{n_experts} experts, {n_pairs} pairs, {n_resamples} resamples and sign flips; seconds")
    for name in ("risk_difference", "log_odds_ratio", "probability_difference", "paired_t"):
        steps = {
            "score": lambda name=name: score(name, counts),
            "interval": lambda name=name: interval(name, counts, n_resamples=n_resamples),
            "p": lambda name=name: sign_flip_p(name, counts, n_permutations=n_resamples),
            "resampled scores": lambda name=name: bootstrap_scores(name, counts, n_resamples),
        }
        seconds, results = {}, {}
        for step, run in steps.items():
            start = time.perf_counter()
            results[step] = run()
            seconds[step] = time.perf_counter() - start
        found = int((q_values(results["p"]) <= 0.05).sum())
        shown = ", ".join(f"{step} {value:.2f}" for step, value in seconds.items())
        print(f"{name:22} {shown}; {found} experts with q ≤ 0.05")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
