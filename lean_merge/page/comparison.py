"""The page of a comparison: what differs between models that are not of one foundation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lean_merge.page.document import escaped, filled, page, write
from lean_merge.page.values import (
    check_version,
    items,
    mapping,
    mappings,
    number,
    short,
    text,
    whole,
)

SCRIPTS = ("plots.js", "table.js", "comparison.js")
_VERDICTS = {
    "one origin": "The weights of equal shape point the same way: the two are of one origin.",
    "something in common": "More weights than chance allows point the same way, and the two lie "
    "far apart all the same.",
    "unrelated": "The weights are to each other as unrelated ones would be.",
    "not comparable": "No weight has the same shape in both, so that no distance can be told.",
}


def comparison_page(comparison: dict[str, Any]) -> bytes:
    """A comparison of models as one HTML file that opens offline.

    Parameters
    ----------
    comparison
        What comparison.json holds.

    Raises
    ------
    OutputError
        Plotly is missing, or the comparison is of another version.
    """
    check_version(comparison, "comparison")
    body = filled(
        "comparison.html",
        roles=_roles(comparison),
        reason=_reason(comparison),
        facts=_facts(comparison),
        pairs=_pairs(comparison),
    )
    data = _data(comparison)
    return page(title="lean-merge comparison", body=body, data=data, scripts=SCRIPTS)


def write_comparison_page(comparison: dict[str, Any], path: Path) -> None:
    """Writes `comparison_page` to a file, replaced if it exists.

    Raises
    ------
    OutputError
        As `comparison_page`, or the file cannot be written.
    """
    write(path, comparison_page(comparison))


def _name(role: str | None) -> str:
    return "MLLM" if role == "mllm" else role or "role"


def _roles(comparison: Mapping[str, Any]) -> str:
    return "".join(
        f"<div><dt>{escaped(_name(text(model.get('role'))))}</dt>"
        f"<dd>{escaped(text(model.get('source')))}</dd></div>"
        for model in mappings(comparison.get("models"))
    )


def _reason(comparison: Mapping[str, Any]) -> str:
    reason = text(comparison.get("reason"))
    faults = [
        f"The {_name(text(model.get('role')))} {fault}."
        for model in mappings(comparison.get("models"))
        if (fault := text(model.get("fault")))
    ]
    if not reason and not faults:
        return ""
    inner = f"<p class='stated'>{escaped(reason)}</p>" if reason else ""
    inner += "".join(f"<p>{escaped(fault)}</p>" for fault in faults)
    return f'<section class="note warning"><h2>These models cannot be merged</h2>{inner}</section>'


def _facts(comparison: Mapping[str, Any]) -> str:
    """All facts by kind, a column for each role; what differs from the base stands out."""
    models = mappings(comparison.get("models"))
    base = mapping(models[0].get("facts")) if models else {}
    head = "".join(
        f'<th scope="col">{escaped(_name(text(model.get("role"))))}</th>' for model in models
    )
    rows = []
    kinds = dict.fromkeys(kind for model in models for kind in mapping(model.get("facts")))
    for kind in kinds:
        stated = [mapping(mapping(model.get("facts")).get(kind)) for model in models]
        ours = mapping(base.get(kind))
        rows.append(
            f'<tr class="kind"><th scope="rowgroup" colspan="{len(models) + 1}">'
            f"{escaped(kind)}</th></tr>"
        )
        for words in dict.fromkeys(word for each in stated for word in each):
            cells = "".join(_cell(each.get(words), ours.get(words)) for each in stated)
            name = f'<span class="name" title="{escaped(words)}">{escaped(words)}</span>'
            rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    rows += _tokenizers(comparison, models)
    return f'<thead><tr><th scope="col">Fact</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'


def _cell(value: Any, ours: Any) -> str:
    differs = value is not None and ours is not None and value != ours
    mark = ' class="differs"' if differs else ""
    said = ("no", "yes")[value] if isinstance(value, bool) else value
    return f'<td{mark} title="{escaped(said)}">{escaped(said)}</td>'


def _tokenizers(
    comparison: Mapping[str, Any], models: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Counts of tokens, a row each; the base is counted with the others."""
    rows = mappings(comparison.get("tokenizers"))
    by_role = {text(row.get("role")): row for row in rows}
    own = [by_role.get(text(model.get("role")), {}) for model in models]
    if not rows:
        return
    yield (f'<tr class="kind"><th scope="rowgroup" colspan="{len(models) + 1}">tokenizer</th></tr>')
    base = whole(rows[0].get("base_tokens"))
    for key, words in (
        ("tokens", "tokens"),
        ("shared", "in common with the base"),
        ("moved", "of these with another id"),
    ):
        wanted = 0 if key == "moved" else base
        found = [
            base if n == 0 and key == "tokens" else whole(row.get(key)) for n, row in enumerate(own)
        ]
        cells = "".join(_cell(each, wanted) for each in found)
        yield f'<tr><th scope="row">{words}</th>{cells}</tr>'


def _pairs(comparison: Mapping[str, Any]) -> str:
    """A card for each pair of roles."""
    cards = []
    for pair in mappings(comparison.get("pairs")):
        one, other = (_name(text(pair.get(key))) for key in ("one", "other"))
        verdict = text(pair.get("verdict")) or ""
        facts = [
            ("of equal shape", _count(pair.get("equal_shape"))),
            ("of other shapes", _count(pair.get("unequal_shape"))),
            ("in one of them only", _count(pair.get("only_in_one"))),
            ("cosine", _brief(pair.get("cosine"))),
            ("if unrelated, below", _brief(pair.get("cosine_unrelated"))),
            ("relative distance", _brief(pair.get("distance"))),
            ("if unrelated, about", _brief(pair.get("distance_unrelated"))),
        ]
        inner = "".join(f"<div><dt>{k}</dt><dd>{escaped(v)}</dd></div>" for k, v in facts)
        cards.append(
            f"<article><h3>{escaped(one)} and {escaped(other)}</h3>"
            f"<p>{escaped(_VERDICTS.get(verdict, verdict))}</p>"
            f'<dl class="cards">{inner}</dl></article>'
        )
    return "".join(cards)


def _count(value: Any) -> str:
    found = whole(value)
    return "—" if found is None else str(found)


def _brief(value: Any) -> str:
    found = number(value)
    return "—" if found is None else f"{found:.3g}"


def _data(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows = mappings(comparison.get("weights"))
    roles = [text(model.get("role")) or "" for model in mappings(comparison.get("models"))]
    pairs = mappings(comparison.get("pairs"))
    modules = list(dict.fromkeys(_module(row) for row in rows))
    return {
        "roles": [_name(role) for role in roles],
        "pairs": [
            f"{_name(text(pair.get('one')))} and {_name(text(pair.get('other')))}" for pair in pairs
        ],
        "modules": modules,
        "weights": [
            [
                text(row.get("weight")) or "",
                whole(row.get("layer")),
                modules.index(_module(row)),
                [_shape(mapping(row.get("shapes")).get(role)) for role in roles],
                [_measures(row, place) for place in range(len(pairs))],
            ]
            for row in rows
        ],
    }


def _module(row: Mapping[str, Any]) -> str:
    return text(row.get("module")) or "other"


def _shape(value: Any) -> str | None:
    sizes: Sequence[int] = [n for each in items(value) if (n := whole(each)) is not None]
    return "x".join(map(str, sizes)) or None


def _measures(row: Mapping[str, Any], place: int) -> list[float | None]:
    found = mappings(row.get("pairs"))
    pair = found[place] if place < len(found) else {}
    return [short(pair.get(key)) for key in ("cosine", "cosine_unrelated", "distance")]
