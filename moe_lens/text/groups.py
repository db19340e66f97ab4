"""Two groups of prompts that make no pairs: two corpora, or right against wrong answers.

    groups = ContrastiveGroups.from_lists(code, prose)                    # of any sizes
    groups = ContrastiveGroups.from_outcomes(answered, is_right, clusters=questions)
    scores = detect(model, groups)                                        # two-sample intervals and tests

Prompts that depend on each other share a cluster, within a group and across both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_lens.checks import short
from moe_lens.errors import DataError
from moe_lens.results import Result
from moe_lens.text.pair_rows import (
    check_labels,
    check_one_span,
    checked_labels,
    checked_prompts,
    digest_of_prompt,
    drawn_clusters,
    picked,
)
from moe_lens.text.prompts import Prompt, to_json
from moe_lens.text.spans import Span

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class ContrastiveGroups(Result):
    """Prompts of a first and of a second group, which are different prompts and need not be as many.

    >>> ContrastiveGroups.from_lists(["def f(x):", "x += 1"], ["It rains.", "She left.", "They came."])
    ContrastiveGroups(2 and 3 prompts, 5 clusters, span 'all')

    What differs between the groups beside the behaviour (length, subject, wording) is found, too; where the
    same matter can be written under both conditions, `ContrastivePairs` tell more with fewer prompts.

    Attributes:
        first: the prompts of the first group.
        second: those of the second.
        span: which tokens count, see `moe_lens.text.Span`; not a list (give the prompts named parts instead).
        clusters_1: one label a prompt of the first group. Prompts with the same label, of whichever group,
            are not independent (answers to one question, pieces of one file) and are resampled together. By
            default every prompt is independent, except of its own duplicates.
        clusters_2: one label a prompt of the second group.

    Raises:
        DataError: a group without prompts, a span that is a list, or labels that are no text.
    """

    first: tuple[Prompt, ...]
    second: tuple[Prompt, ...]
    span: Span = "all"
    clusters_1: tuple[str, ...] = ()
    clusters_2: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, labelled in (("first", "clusters_1"), ("second", "clusters_2")):
            prompts = checked_prompts(name, getattr(self, name), "prompt")
            if not prompts:
                raise DataError(f"The {name} group has no prompts; give at least one.")
            labels = getattr(self, labelled) or tuple(digest_of_prompt(prompt) for prompt in prompts)
            check_labels(labelled, labels, len(prompts), "prompts")
            object.__setattr__(self, name, prompts)
            object.__setattr__(self, labelled, labels)
        check_one_span(self.span)

    @classmethod
    def from_lists(
        cls,
        first: Iterable[Any],
        second: Iterable[Any],
        *,
        span: Span = "all",
        clusters: Sequence[Iterable[Any]] | None = None,
    ) -> "ContrastiveGroups":
        """From two lists of prompts: strings, chats (lists of messages) or `Prompt`s.

        Args:
            first: the prompts of the first group.
            second: those of the second, as many or not.
            span: which tokens count, see `moe_lens.text.Span`.
            clusters: the labels of the first group, and those of the second; None: prompts are independent.

        Raises:
            DataError: a prompt that is none, with the name of its list and its number; or as in the class.
        """
        if clusters is not None and (isinstance(clusters, str) or len(clusters) != 2):
            raise DataError(f"clusters must be two lists of labels, one a group; got {short(clusters)}.")
        one, two = (None, None) if clusters is None else clusters
        return cls(
            checked_prompts("first", first, "prompt"),
            checked_prompts("second", second, "prompt"),
            span,
            checked_labels("clusters of the first group", one, "prompt"),
            checked_labels("clusters of the second group", two, "prompt"),
        )

    @classmethod
    def from_outcomes(
        cls,
        prompts: Iterable[Any],
        outcomes: Iterable[Any],
        *,
        first: Any = True,
        span: Span = "all",
        clusters: Iterable[Any] | None = None,
    ) -> "ContrastiveGroups":
        """Prompts by what came of them: those with the outcome `first` against those with the other one.

        >>> outcomes = ["right", "wrong", "right"]
        >>> groups = ContrastiveGroups.from_outcomes(["a b", "c d", "e f"], outcomes, first="right")
        >>> [prompt.content for prompt in groups.first]
        ['a b', 'e f']

        Args:
            prompts: strings, chats or `Prompt`s: questions with the answers that the model gave, say.
            outcomes: one a prompt, of two kinds: bools, 0 and 1, or two labels.
            first: the outcome of the first group.
            span: which tokens count, see `moe_lens.text.Span`.
            clusters: one label a prompt (its question, where several answers to one were drawn); None:
                prompts are independent.

        Raises:
            DataError: unequal numbers, outcomes that are not of two kinds, one of them `first`; or as in the
                class.
        """
        texts, results = checked_prompts("prompts", prompts, "prompt"), list(outcomes)
        labels = checked_labels("clusters", clusters, "prompt") or tuple(
            digest_of_prompt(text) for text in texts
        )
        if not len(texts) == len(results) == len(labels):
            raise DataError(
                f"Every prompt needs one outcome (and one cluster label): {len(texts)} prompts, "
                f"{len(results)} outcomes, {len(labels)} labels."
            )
        kinds = list(dict.fromkeys(results))
        if len(kinds) != 2 or first not in kinds:
            raise DataError(
                f"outcomes must be of two kinds, one of them first={first!r}; got {short(kinds)}. Give "
                "`first` if they are labels, and leave prompts without an outcome out."
            )
        is_first = [bool(result == first) for result in results]
        (one, labels_1), (two, labels_2) = (
            picked([i for i, given in enumerate(is_first) if given is side], texts, labels)
            for side in (True, False)
        )
        return cls(one, two, span, labels_1, labels_2)

    def swapped(self) -> "ContrastiveGroups":
        """The opposite contrast: both groups change places."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            clusters_1=self.clusters_2,
            clusters_2=self.clusters_1,
        )

    def split(self, fraction: float, seed: int) -> tuple["ContrastiveGroups", "ContrastiveGroups"]:
        """Two disjoint parts; the first gets this share of the clusters, drawn at random.

        >>> groups = ContrastiveGroups.from_lists("a b c d".split(), "e f g h".split())
        >>> [len(part.first) + len(part.second) for part in groups.split(0.5, seed=0)]
        [4, 4]

        Args:
            fraction: in (0, 1); both parts get at least one cluster.
            seed: the same clusters and the same seed give the same parts, in whatever order they stand.

        Raises:
            DataError: a fraction outside (0, 1), fewer than two clusters, or a part without prompts of one of
                the groups.
        """
        chosen = drawn_clusters((*self.clusters_1, *self.clusters_2), fraction, seed)
        return self._part(chosen, True), self._part(chosen, False)

    def _part(self, chosen: set[str], inside: bool) -> "ContrastiveGroups":
        """The prompts whose clusters are among those chosen, or are not."""
        (first, clusters_1), (second, clusters_2) = (
            picked([i for i, label in enumerate(labels) if (label in chosen) is inside], prompts, labels)
            for prompts, labels in ((self.first, self.clusters_1), (self.second, self.clusters_2))
        )
        return ContrastiveGroups(first, second, self.span, clusters_1, clusters_2)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a prompt: group (1 or 2), prompt, cluster."""
        import pandas

        return pandas.DataFrame(
            [
                {"group": number, "prompt": to_json(prompt), "cluster": label}
                for number, prompts, labels in (
                    (1, self.first, self.clusters_1),
                    (2, self.second, self.clusters_2),
                )
                for prompt, label in zip(prompts, labels, strict=True)
            ]
        )

    def summary(self) -> str:
        """Numbers of prompts and clusters, and the span."""
        n_clusters = len({*self.clusters_1, *self.clusters_2})
        return (
            f"{len(self.first)} and {len(self.second)} prompts, {n_clusters} "
            f"cluster{'s' * (n_clusters > 1)}, span {self.span!r}"
        )
