"""Which models moe_lens supports, and what it refuses there: what the rows of `RULES` say of each model.

    for model in supported_models():
        print(model.architecture, model.router, model.rule)

`moe-lens models` prints it as Markdown, the table in docs/reference/supported-models.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from moe_lens.errors import DataError
from moe_lens.routers.table import PER_TOKEN, RULES, Family

MARKS: Final = ("<!-- supported models -->", "<!-- /supported models -->")

_CONDITIONS: Final = {
    "fold_ln": "`fold_ln`, if a shared expert is exactly as wide as the model",
    "fold_value_biases": "`fold_value_biases`, if there are value biases",
}


@dataclass(frozen=True)
class SupportedModel:
    """One Hugging Face architecture.

    Attributes:
        architecture: its class in transformers.
        router: the class of its routers (two where layers differ).
        rule: the class of the rule that they follow.
        top_k: the config field that says how many experts run for a token, or the number.
        special: what a user should know about it; may be empty.
        refused: what moe_lens refuses there, and why; may be empty.
        wrong_in_compatibility_mode: options of `enable_compatibility_mode` that can change what the model
            computes in TransformerLens 4.3, and are refused where they do: "fold_ln", where a shared expert
            is exactly as wide as the model (its down projection is scaled, too), and "fold_value_biases",
            where attention has value biases.
    """

    architecture: str
    router: str
    rule: str
    top_k: str = PER_TOKEN
    special: str = ""
    refused: str = ""
    wrong_in_compatibility_mode: tuple[str, ...] = ()


def supported_models() -> tuple[SupportedModel, ...]:
    """Every Hugging Face architecture that moe_lens supports, by name.

    >>> from moe_lens import supported_models
    >>> models = {model.architecture: model for model in supported_models()}
    >>> models["MixtralForCausalLM"].rule
    'SoftmaxTopK'

    These are the ones that have both a TransformerLens 4.3 adapter and a native router in transformers 5.23.
    What is not in the table is refused by name; `register_rule` adds routers of your own.
    """
    architectures = {name for family in RULES.values() for name in family.architectures}
    return tuple(_model(name) for name in sorted(architectures))


def _model(architecture: str) -> SupportedModel:
    """What the rows say of one architecture, put together where its layers have routers of two classes."""
    rows = {router: family for router, family in RULES.items() if architecture in family.architectures}
    families = list(rows.values())
    return SupportedModel(
        architecture,
        router=", ".join(rows),
        rule=", ".join(" or ".join(family.rule_names) for family in families),
        top_k=families[0].top_k,
        special=_joined(family.architectures[architecture] for family in families),
        refused=_joined(family.refused for family in families),
        wrong_in_compatibility_mode=_wrong(families),
    )


def _joined(sentences: Iterable[str]) -> str:
    return "; ".join(sentence for sentence in sentences if sentence)


def _wrong(families: Iterable[Family]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(o for family in families for o in family.wrong_in_compatibility_mode))


def markdown_table() -> str:
    """The table of supported models as Markdown: what stands in docs/reference/supported-models.md."""
    lines = ["| architecture | router | rule | k | special cases | refused |", "|---|---|---|---|---|---|"]
    for model in supported_models():
        refused = [model.refused] if model.refused else []
        if options := model.wrong_in_compatibility_mode:
            refused += [f"compatibility mode with {_CONDITIONS[option]}" for option in options]
        k = model.top_k if model.top_k.isdigit() else f"`{model.top_k}`"
        cells = (f"`{model.architecture}`", model.router, model.rule, k, model.special, "; ".join(refused))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """A page's text with the table written anew between its two marks.

    Raises:
        DataError: the text does not hold each mark once.
    """
    if any(text.count(mark) != 1 for mark in MARKS):
        raise DataError(f"The text must hold {' and '.join(MARKS)}, each once.")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{markdown_table()}{MARKS[1]}{after}"
