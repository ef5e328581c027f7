"""Make the page of a comparison, which shows what differs between models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lean_merge.page.frame import (
    PageContent,
    escaped,
    figure,
    filled,
    listed,
    rounded,
    size_text,
    verdict,
)

_VERDICTS = {
    "one origin": "The weights of equal shape point the same way: the two are of one origin.",
    "something in common": "More weights than chance allows point the same way, but the two lie "
    "far apart.",
    "unrelated": "The weights agree no more than those of unrelated models.",
    "not comparable": "No weight has the same shape in both, so that no distance can be told.",
}
_STEPS = {
    "one origin": "it was tuned from this base. Keep both; what forbids the merge lies elsewhere, "
    "in the differences that are marked below.",
    "something in common": "it may be a distant relative of this base. Look for a base that lies "
    "nearer, such as the generation that its model card names.",
    "unrelated": "it was not tuned from this base. Exchange one of the two.",
    "not comparable": "no weight of it has the base's shape. Take models of one family and size.",
}
"""What to do, by the verdict on a model and the base."""
_TOKENIZERS = (
    ("tokens", "tokens"),
    ("shared", "in common with the base"),
    ("moved", "of these with another id"),
)


def comparison_content(comparison: dict[str, Any]) -> PageContent:
    """Return the content of the page of comparison.json."""
    models = comparison["models"]
    table = filled("table.html", one="weight", filters="", hint="")
    return PageContent(
        heading="Models of different foundations",
        lead=listed("roles", [(escaped(_name(m["role"])), m["source"]) for m in models]),
        body=filled(
            "comparison.html",
            verdict=verdict(_advice(comparison)),
            reason=_reason(comparison),
            facts=_facts(comparison),
            pairs="".join(map(_pair, comparison["pairs"])),
            table=table,
        ),
        data=_data(comparison),
    )


def _advice(comparison: dict[str, Any]) -> list[str]:
    """Return what to do, in sentences, from what was found of each model and the base."""
    said = []
    for pair in comparison["pairs"]:
        roles = {pair["one"], pair["other"]}
        if "base" not in roles or len(roles) == 1:
            continue
        (role,) = roles - {"base"}
        said.append(f"The {_name(role)}: {_STEPS.get(pair['verdict'], _STEPS['not comparable'])}")
    said.append(
        "The base, the multimodal model and every expert must descend from one text model of one "
        "size. The model cards name it, mostly as base_model; docs/pairs.md shows how to find it."
    )
    return said


def _name(role: str) -> str:
    return "MLLM" if role == "mllm" else role


def _reason(comparison: dict[str, Any]) -> str:
    """Return why the models cannot be merged, if the comparison says so."""
    faults = [f"The {_name(m['role'])} {m['fault']}." for m in comparison["models"] if m["fault"]]
    said = "\n".join([*([comparison["reason"]] if comparison["reason"] else []), *faults])
    title = "<h2>These models cannot be merged</h2>"
    return f'<section class="note">{title}{escaped(said)}</section>' if said else ""


def _facts(comparison: dict[str, Any]) -> str:
    """Return the rows of all facts by kind, with a column for each role."""
    models = comparison["models"]
    head = "".join(f'<th scope="col">{escaped(_name(model["role"]))}</th>' for model in models)
    facts: dict[str, dict[str, list[Any]]] = {}
    for number, model in enumerate(models):
        for kind, stated in model["facts"].items():
            for words, value in stated.items():
                row = facts.setdefault(kind, {}).setdefault(words, [None] * len(models))
                row[number] = value
    rows = "".join(_rows(kind, facts[kind].items(), len(models)) for kind in facts)
    if comparison["tokenizers"]:
        rows += _rows("tokenizer", _token_counts(comparison), len(models))
    return f'<thead><tr><th scope="col">Fact</th>{head}</tr></thead><tbody>{rows}</tbody>'


def _rows(kind: str, facts: Any, models: int) -> str:
    """Return the rows of one kind of facts; those that differ from the base's are marked."""
    rows = [f'<tr class="kind"><th colspan="{models + 1}">{escaped(kind)}</th></tr>']
    for words, values in facts:
        ours = values[0]
        differs = [None not in (value, ours) and value != ours for value in values]
        cells = "".join(map(_cell, values, differs))
        rows.append(f'<tr><th scope="row">{_fact_name(words)}</th>{cells}</tr>')
    return "".join(rows)


def _fact_name(words: str) -> str:
    return f'<span class="name" title="{escaped(words)}">{escaped(words)}</span>'


def _cell(value: Any, differs: bool) -> str:
    said = escaped(("no", "yes")[value] if isinstance(value, bool) else value)
    return f'<td{" class=differs" if differs else ""} title="{said}">{said}</td>'


def _token_counts(comparison: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the counts of tokens by role; the base, which has no row, shares all with itself."""
    rows = {row["role"]: row for row in comparison["tokenizers"]}
    own = comparison["tokenizers"][0]["base_tokens"]
    base = {"tokens": own, "shared": own, "moved": 0}
    for key, words in _TOKENIZERS:
        yield words, [rows.get(m["role"], base).get(key) for m in comparison["models"]]


def _pair(pair: dict[str, Any]) -> str:
    names = f"{_name(pair['one'])} and {_name(pair['other'])}"
    title = escaped(names[:1].upper() + names[1:])
    facts = [
        ("of equal shape", pair["equal_shape"]),
        ("of other shapes", pair["unequal_shape"]),
        ("in one of them only", pair["only_in_one"]),
        ("cosine", figure(pair["cosine"])),
        ("if unrelated, below", figure(pair["cosine_unrelated"])),
        ("relative distance", figure(pair["distance"])),
        ("if unrelated, about", figure(pair["distance_unrelated"])),
    ]
    verdict = escaped(_VERDICTS.get(pair["verdict"], pair["verdict"]))
    return f"<h3>{title}</h3><p>{verdict}</p>{listed('tiles', facts)}"


def _data(comparison: dict[str, Any]) -> dict[str, Any]:
    weights = comparison["weights"]
    roles = [model["role"] for model in comparison["models"]]
    modules = list(dict.fromkeys(row["module"] for row in weights))
    measured = [[row["pairs"][n] or {} for row in weights] for n in range(len(comparison["pairs"]))]
    distances = [each.get("distance") or 0.0 for pair in measured for each in pair]
    return {
        "roles": list(map(_name, roles)),
        "modules": modules,
        "farthest": max([0.01, *distances]),
        "weights": {
            "name": [row["weight"] for row in weights],
            "layer": [row["layer"] for row in weights],
            "module": [modules.index(row["module"]) for row in weights],
            "shapes": [[size_text(row["shapes"].get(role)) for row in weights] for role in roles],
        },
        "pairs": [
            {
                "name": f"{_name(pair['one'])} and {_name(pair['other'])}",
                "cosine": [rounded(each.get("cosine")) for each in found],
                "distance": [rounded(each.get("distance")) for each in found],
            }
            for pair, found in zip(comparison["pairs"], measured, strict=True)
        ],
    }
