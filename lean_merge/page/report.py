"""The report of an analysis: what stands in it as text, and where the scripts draw."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lean_merge.page.columns import expert_names, expert_of, last, page_data, similarity
from lean_merge.page.document import escaped, filled, page, write
from lean_merge.page.values import check_version, items, mapping, mappings, number, text, texts
from lean_merge.sizes import format_size

SCRIPTS = ("plots.js", "table.js", "report.js")
_RADIOS = 4
"""More experts than this are chosen from a list."""


def report_page(analysis: dict[str, Any]) -> bytes:
    """The report of an analysis as one HTML file that opens offline.

    Parameters
    ----------
    analysis
        What analysis.json holds; docs/analysis.md explains the page.

    Raises
    ------
    OutputError
        Plotly is missing, or the analysis is of another version.
    """
    check_version(analysis, "analysis")
    data = page_data(analysis)
    return page(title=_title(analysis), body=_body(analysis), data=data, scripts=SCRIPTS)


def write_report(analysis: dict[str, Any], path: Path) -> None:
    """Writes `report_page` to a file, replaced if it exists.

    Raises
    ------
    OutputError
        As `report_page`, or the file cannot be written.
    """
    write(path, report_page(analysis))


def _title(analysis: Mapping[str, Any]) -> str:
    recipe = mapping(analysis.get("recipe"))
    names = list(map(last, expert_names(analysis)))
    more = [f"{len(names) - 2} more"] if len(names) > 3 else []
    given = " + ".join([*names[:2], *more] if more else names)
    return f"{last(text(recipe.get('mllm_model')) or 'MLLM')} ← {given or 'no expert'}"


def _body(analysis: Mapping[str, Any]) -> str:
    names = expert_names(analysis)
    return filled(
        "report.html",
        header=_header(analysis, names),
        warnings=_warnings(texts(analysis.get("warnings"))),
        overview=_overview(analysis, names),
        chooser=_chooser(names),
        explanations=_explanations(analysis, len(names)),
        details=_details(analysis),
        footer=f"lean-merge {escaped(text(analysis.get('lean_merge')))} · analysis.json holds all "
        "numbers of this page · nothing here was fetched from anywhere",
    )


def _header(analysis: Mapping[str, Any], names: Sequence[str]) -> str:
    recipe = mapping(analysis.get("recipe"))
    roles = [
        ("base", "base", text(recipe.get("base_model"))),
        ("mllm", "MLLM", text(recipe.get("mllm_model"))),
        *(
            ("expert", "expert" if len(names) == 1 else f"expert {n}", name)
            for n, name in enumerate(names, start=1)
        ),
    ]
    rows = "".join(
        f'<div class="{kind}"><dt>{escaped(role)}</dt><dd>{escaped(source)}</dd></div>'
        for kind, role, source in roles
    )
    links = "".join(
        f'<a href="#{anchor}">{words}</a>'
        for anchor, words in (
            ("threshold", "Threshold"),
            ("map", "Layers"),
            ("spectra", "Spectra"),
            ("weights", "Weights"),
            ("details", "Details"),
        )
    )
    return (
        f'<header class="page"><p class="kicker">lean-merge · analysis</p>'
        f"<h1>{escaped(_title(analysis))}</h1>"
        f'<dl class="roles">{rows}</dl>'
        f'<nav aria-label="Sections">{links}</nav></header>'
        "<noscript><p class='note warning'>The plots and the table need JavaScript, which this "
        "browser has switched off.</p></noscript>"
    )


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    shown = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return (
        '<section class="note warning" aria-labelledby="warnings"><h2 id="warnings">'
        f"{len(lines)} warning{'s' if len(lines) > 1 else ''}</h2><ul>{shown}</ul></section>"
    )


def _overview(analysis: Mapping[str, Any], names: Sequence[str]) -> str:
    """For each expert the figures that decide."""
    weights = mappings(analysis.get("weights"))
    skipped = sum(each.get("skipped") is not None for each in weights)
    thresholds = [*mappings(analysis.get("thresholds")), *[{}] * len(names)]
    rows = []
    for expert, name in enumerate(names):
        entries = [expert_of(weight, expert) for weight in weights]
        similar = [s for each in entries if (s := similarity(each, "first")) is not None]
        chosen = [each for each in entries if each.get("selected") is True]
        null = number(mapping(thresholds[expert].get("null")).get("quantile_99"))
        squares = [(number(each.get("update_norm")) or 0.0) ** 2 for each in chosen]
        middle = statistics.median(similar) if similar else None
        rows.append(
            [
                f'<span class="name" title="{escaped(name)}">{escaped(last(name))}</span>',
                f"{len(chosen)} of {len(weights)}",
                _plain(thresholds[expert].get("in_force"), "varies"),
                _plain(thresholds[expert].get("auto"), "none"),
                _plain(middle),
                _plain(max(similar, default=None)),
                _plain(null),
                _plain(sum(squares) ** 0.5 if chosen else None),
            ]
        )
    head = [
        "Expert",
        "Selected",
        "Threshold",
        "Auto threshold",
        "Median s<sub>1</sub>",
        "Largest s<sub>1</sub>",
        "99 % of unrelated",
        "Norm of the update",
    ]
    if len(rows) == 1:
        pairs = zip(head[1:], rows[0][1:], strict=True)
        inner = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in pairs)
        facts = f'<dl class="cards">{inner}</dl>'
    else:
        top = "".join(f'<th scope="col">{each}</th>' for each in head)
        lines = "".join(
            f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{c}</td>" for c in row[1:])}</tr>'
            for row in rows
        )
        facts = (
            '<div class="scroll" tabindex="0" role="region" aria-label="Overview by expert">'
            f'<table class="plain">'
            f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
        )
    left = f", of which {skipped} could not be analysed" if skipped else ""
    return (
        f'<section aria-labelledby="overview"><h2 id="overview">Overview</h2>{facts}'
        f'<p class="hint">{len(weights)} matrices of attention and feed-forward layers were '
        f"looked at{left}. s<sub>1</sub> is |cos| of the angle between the leading right singular "
        "vectors of the two task vectors; a weight is selected where it reaches the threshold."
        "</p></section>"
    )


def _plain(value: Any, otherwise: str = "—") -> str:
    found = number(value)
    return otherwise if found is None else f"{found:.3g}"


def _chooser(names: Sequence[str]) -> str:
    """Which expert the rest of the page is about; nothing where there is one."""
    if len(names) < 2:
        return ""
    if len(names) > _RADIOS:
        options = "".join(
            f'<option value="{n}">{escaped(last(name))}</option>' for n, name in enumerate(names)
        )
        choice = f'<label>Expert <select id="expert">{options}</select></label>'
        return f'<div class="chooser">{choice}</div>'
    inner = "".join(
        f'<label><input type="radio" name="expert" value="{n}"{" checked" if n == 0 else ""}>'
        f'<span title="{escaped(name)}">{escaped(last(name))}</span></label>'
        for n, name in enumerate(names)
    )
    return f'<fieldset class="chooser segments"><legend>Expert</legend>{inner}</fieldset>'


def _explanations(analysis: Mapping[str, Any], experts: int) -> str:
    """What is said of each expert's thresholds; the scripts show one."""
    return "".join(
        f'<p class="explanation" data-expert="{n}"{" hidden" if n else ""}>{escaped(said)}</p>'
        for n, entry in enumerate(mappings(analysis.get("thresholds"))[:experts])
        if (said := text(entry.get("explanation")))
    )


def _details(analysis: Mapping[str, Any]) -> str:
    seconds = mapping(analysis.get("seconds"))
    total = sum(number(each) or 0.0 for each in seconds.values())
    moved = mapping(analysis.get("bytes"))
    memory = number(mapping(analysis.get("memory")).get("peak_anonymous"))
    facts = [
        ("time", f"{total:.1f} s" if seconds else None),
        ("read", _size(moved.get("read"))),
        ("peak memory", _size(memory)),
        ("program", f"lean-merge {text(analysis.get('lean_merge')) or ''}".strip()),
        *(
            (name.replace("_", " "), _word(value))
            for name, value in mapping(analysis.get("gathered")).items()
        ),
    ]
    rows = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in facts
        if value
    )
    blocks = [("Recipe", "recipe"), ("Environment", "environment"), ("Inputs", "inputs")]
    stored = "".join(
        f"<details><summary>{title}</summary><pre>{escaped(_pretty(analysis[key]))}</pre></details>"
        for title, key in blocks
        if mapping(analysis.get(key)) or items(analysis.get(key))
    )
    return (
        '<section aria-labelledby="details"><h2 id="details">How it was made</h2>'
        f'<dl class="facts">{rows}</dl>{stored}</section>'
    )


def _size(value: Any) -> str | None:
    found = number(value)
    return None if found is None or found < 0 else format_size(int(found))


def _word(value: Any) -> str | None:
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return None if value is None else str(value)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
