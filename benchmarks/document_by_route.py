"""How much of a document's effect travels by the route, in every shipped organism.

    python benchmarks/document_by_route.py [FIGURE.png]

Metric: logit of the document's answer minus logit of the remembered one, at the last token; test split. Two
contrasts: a document before the question against the question alone (routes carried over on the question);
a trusted against a doubtful source word in front of the same document (every column). Shares of the total
effect with 95 % bootstrap intervals over countries. The control carries over the route of *another* corrupted
prompt, of the next country, in every column: what a foreign route does by itself. With a path, only the
figure is drawn: a source word's effect in the specialised organism, layer by layer.
"""

import sys

from moe_lens import mediation, organisms
from moe_lens.interventions import Mediation
from moe_lens.organisms import Conflict, words
from moe_lens.plots import mediation_curves, save
from moe_lens.resampling import bounds_of, cluster_weights


def pairs(name: str, contrast: str) -> tuple[list[Conflict], list[str], list[str]]:
    """Conflicts, clean and corrupted prompts."""
    world = organisms.world(name)
    conflicts = list(world.conflicts("test"))
    if contrast == "document":
        return conflicts, [c.open_book for c in conflicts], [c.closed_book for c in conflicts]
    n_words = 2 if world.variant == "majority" else 1
    clean, corrupted = (
        [_with_header(conflict, kind[:n_words]) for conflict in conflicts]
        for kind in (words.TRUSTED, words.DOUBTFUL)
    )
    return conflicts, clean, corrupted


def _with_header(conflict: Conflict, header: tuple[str, ...]) -> str:
    _, statement = conflict.open_book.split(" : ", 1)
    return " ".join(["Document", *header, ":", statement])


def measured(name: str, contrast: str, weights: bool) -> tuple[Mediation, Mediation, list[str]]:
    """The mediation, its control, and each pair's country."""
    model = organisms.load(name)
    conflicts, clean, corrupted = pairs(name, contrast)
    right = model.to_tokens([c.document_answer for c in conflicts], prepend_bos=False)[:, 0]
    wrong = model.to_tokens([c.memory_answer for c in conflicts], prepend_bos=False)[:, 0]

    def difference(logits):  # [batch pos d_vocab] -> [batch]
        last = logits[:, -1]
        return (last.gather(1, right[:, None]) - last.gather(1, wrong[:, None]))[:, 0]

    clusters = [conflict.entity for conflict in conflicts]
    align = "end" if contrast == "document" else "same"
    found = mediation(model, clean, corrupted, difference, weights=weights, align=align, batch_size=96)
    n_same = clusters.count(clusters[0])
    foreign = corrupted[n_same:] + corrupted[:n_same]
    return found, mediation(model, foreign, corrupted, difference, weights=weights, batch_size=96), clusters


def row(name: str, contrast: str, weights: bool) -> str:
    found, control, clusters = measured(name, contrast, weights)
    total = found.total_effect.numpy()
    drawn = cluster_weights(clusters, 2000, 0)
    foreign = control.route_effect.numpy()
    share = foreign.mean() / total.mean()
    low, high = bounds_of(share, (drawn @ foreign) / (drawn @ total), len(set(clusters)), 0.95)
    cells = [found.share(effect, clusters=clusters) for effect in ("route", "representation")]
    cells.append((share, float(low), float(high)))
    return " | ".join(
        [
            f"| {name}",
            contrast,
            "experts, weights" if weights else "experts",
            f"{found.corrupted.mean():+.2f} → {found.clean.mean():+.2f}",
            *(f"{share:+.2f} [{low:+.2f}, {high:+.2f}]" for share, low, high in cells),
        ]
    )


def main() -> None:
    if len(sys.argv) > 1:
        found, _, clusters = measured("specialised", "source word", weights=False)
        save(mediation_curves(found, clusters=clusters), sys.argv[1])
        return
    print("| organism | contrast | carried over | metric | route | representation | control: foreign route |")
    print("|---|---|---|---|---|---|---|")
    for contrast in ("document", "source word"):
        for name in organisms.names():
            if organisms.world(name).variant == "candour":  # no documents
                continue
            for weights in (False, True):
                print(row(name, contrast, weights), "|")


if __name__ == "__main__":
    main()
