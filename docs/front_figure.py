"""The README's first figure: `python docs/front_figure.py` writes docs/front.png (about a minute)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

from moe_lens import HookedMoE, SteeringPlan, is_routing_point, organisms, steer_hooks
from moe_lens.evaluation import Outcome, SteeringReport
from moe_lens.organisms import run_demo
from moe_lens.resampling import clustered_interval

NAME = "specialised"


def votes(model: HookedMoE, prompt: str) -> Float[Tensor, "layer expert"]:
    """Routing weights at the prompt's last token, 0 where an expert does not run."""
    _, cache = model.run_with_cache(prompt, names_filter=is_routing_point)
    weights = torch.zeros(len(model.moe_layers), model.n_experts)
    for row, layer in enumerate(model.moe_layers):
        weights[row, cache["topk_indices", layer][0, -1]] = cache["topk_weights", layer][0, -1]
    return weights


def draw_votes(ax: Axes, weights: Tensor, plan: SteeringPlan, title: str) -> AxesImage:
    image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for layer, expert in plan.deactivate:
        ax.plot(expert, layer, "x", color="#d55e00", markersize=9, markeredgewidth=2.5)
    ax.set(title=title, xlabel="expert", ylabel="layer", xticks=range(weights.shape[1]))
    ax.set_yticks(range(len(weights)))
    ax.set_xticks([x - 0.5 for x in range(1, weights.shape[1])], minor=True)
    ax.set_yticks([y - 0.5 for y in range(1, len(weights))], minor=True)
    ax.grid(which="minor", color="#dddddd", linewidth=0.8)
    ax.tick_params(which="minor", length=0)
    return image


def draw_rates(ax: Axes, report: SteeringReport) -> None:
    """Rates with intervals over countries; one dot a random set of as many experts."""
    conditions = (
        ("-", "toward\nmemory", "#d55e00"),
        ("", "as\ntrained", "black"),
        ("+", "toward\ndocument", "#0072b2"),
    )
    for x, (direction, _, color) in enumerate(conditions):
        outcome = report.steered[direction] if direction else report.unsteered
        low, high = interval(outcome, report)
        ax.errorbar(
            x, outcome.rate, [[outcome.rate - low], [high - outcome.rate]], fmt="o", color=color, markersize=9
        )
        ax.text(x - 0.12, outcome.rate, f"{outcome.rate:.2f}", ha="right", va="center", color=color)
        sets = [o.rate for kind in report.controls.values() for o in kind[direction]] if direction else []
        label = f"random sets of {len(report.plans['+'])} experts" if direction == "-" else None
        jitter = [x + 0.2 + 0.02 * (number % 10) for number in range(len(sets))]
        ax.scatter(jitter, sets, s=9, color="#999999", label=label)
    ax.set(
        xticks=range(3),
        xticklabels=[label for _, label, _ in conditions],
        xlim=(-0.5, 2.6),
        ylim=(-0.06, 1.18),
        ylabel="answers from the document\n(share of prompts)",
        title=f"{len(report.unsteered.values)} held-out prompts",
    )
    ax.legend(loc="upper left", frameon=False, handletextpad=0.1)


def interval(outcome: Outcome, report: SteeringReport) -> tuple[float, float]:
    return clustered_interval(np.array(outcome.values), report.clusters, level=report.level, seed=report.seed)


def main() -> None:
    model, result = organisms.load(NAME), run_demo(NAME, progress=False)
    plan = result.plans["+"]
    conflict = organisms.world(NAME).conflicts("test")[8]

    def answer() -> str:
        said = model(conflict.open_book)[0, -1].argmax().reshape(1)
        return str(model.to_string(said)).strip()

    figure, axes = plt.subplots(
        1, 3, figsize=(14, 3.4), layout="constrained", gridspec_kw={"width_ratios": (1, 1.18, 0.9)}
    )
    draw_votes(
        axes[0], votes(model, conflict.open_book), SteeringPlan(), f"Route as trained: “{answer()}” (memory)"
    )
    with model.hooks(steer_hooks(plan)):
        title = f"{len(plan)} experts off (×): “{answer()}” (document)"
        image = draw_votes(axes[1], votes(model, conflict.open_book), plan, title)
    figure.colorbar(image, ax=axes[1], label="routing weight\n(0: does not run)")
    draw_rates(axes[2], result.report)
    figure.savefig(Path(__file__).parent / "front.png", dpi=110)


if __name__ == "__main__":
    main()
