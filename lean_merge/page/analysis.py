"""Make the page of an analysis: figures as text, and columns from which the scripts draw."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lean_merge.linalg.null import null_cdf
from lean_merge.page.frame import (
    PageContent,
    escaped,
    figure,
    filled,
    last_part,
    listed,
    rounded,
    size_text,
    verdict,
)
from lean_merge.sizes import format_size

BINS = 50
"""The number of bins, from 0 to 1, of the histogram of similarities."""
_MOST_SIGMAS = 64
_FIELDS = {
    "lambda": "lambda",
    "update": "update_norm",
    "relative": "update_relative",
    "rank": "effective_rank",
    "kept": "energy_kept",
    "unrelated": "null_99",
}
"""The columns of one expert with few digits, and the field that each shows."""
_MODULES = "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj".split()
"""The order in which known modules are shown."""

Weight = Mapping[str, Any]


def analysis_content(analysis: dict[str, Any]) -> PageContent:
    """Return the content of the page of analysis.json."""
    weights = analysis["weights"]
    names = [last_part(name) for name in analysis["experts"]]
    recipe = analysis["recipe"]
    given = " + ".join(names[:2] + ([f"{len(names) - 2} more"] if len(names) > 3 else names[2:]))
    roles = [("base", recipe["base_model"]), ("MLLM", recipe["mllm_model"])]
    for number, name in enumerate(analysis["experts"], start=1):
        roles.append(("expert" if len(names) == 1 else f"expert {number}", name))
    skipped = sum(weight["skipped"] is not None for weight in weights)
    counted = f"{len(weights)} matrices of attention and feed-forward layers were looked at"
    counted += f", of which {skipped} could not be analysed." if skipped else "."
    only = '<label>State <select id="only"></select></label>'
    hint = "⚠ marks weights whose leading singular values lie so close together that "
    hint += "v<sub>1</sub>, and with it s<sub>1</sub>, is ill-defined."
    return PageContent(
        heading=f"{last_part(recipe['mllm_model'])} ← {given}",
        lead=listed("roles", roles) + _LINKS,
        body=filled(
            "analysis.html",
            verdict=_verdict(analysis, names),
            warnings=_warnings(analysis["warnings"]),
            overview="".join(_overview(analysis, n, name) for n, name in enumerate(names)),
            counted=counted,
            table=filled("table.html", one="weight", filters=only, hint=hint),
            made=_made(analysis),
        ),
        data=_data(analysis, names),
    )


_LINKS = (
    '<nav aria-label="Sections"><a href="#threshold">Threshold</a><a href="#map">Layers</a>'
    '<a href="#spectra">Spectra</a><a href="#every">Weights</a><a href="#made">Details</a></nav>'
)


_COMMAND = "lean-merge merge lean_merge_recipe.yml --analysis . {options}--out ../merged"
_PLACE = "Run it in the folder of this page. It takes little more than copying the model."


def _verdict(analysis: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return what the analysis found, in sentences, and the command that merges accordingly."""
    sentences = []
    useful = False
    for number, name in enumerate(names):
        threshold = analysis["thresholds"][number]
        entries = [entry_of(weight, number) for weight in analysis["weights"]]
        similar = [s for each in entries if (s := each.get("similarity_first")) is not None]
        chance = threshold["null"]["quantile_99"]
        beyond = sum(s > chance for s in similar) if chance is not None else 0
        subject = f"{name} and the multimodal model agree" if len(names) > 1 else "The two agree"
        if not similar or not beyond:
            sentences.append(f"{subject} in no weight more than unrelated models would.")
            continue
        sentences.append(
            f"{subject} in {beyond} of {len(similar)} weights more than 99 % of unrelated models "
            f"do ({figure(chance)})."
        )
        sentences.append(_choice(threshold, entries))
        useful = useful or threshold["auto"] is not None
    if not useful:
        sentences.append(
            "No threshold can be recommended. Try another expert, or a method that selects no "
            "weights, such as TIES or Task Arithmetic at a small scale."
        )
        return verdict(sentences)
    return verdict(sentences, _COMMAND.format(options="--threshold auto "), _PLACE)


def _choice(threshold: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence that compares the recipe's threshold with the one that was found."""
    auto, given = threshold["auto"], threshold["in_force"]
    chosen = sum(bool(each.get("selected")) for each in entries)
    said = (
        "The recipe's thresholds select" if given is None else f"The recipe's {given:.2f} selects"
    )
    said += f" {chosen}"
    if auto is None:
        return f"{said}, and no threshold was found that does better than chance."
    compared = "first" if threshold["select_by"] != "max" else "max"
    values = [each.get(f"similarity_{compared}") for each in entries]
    found = sum(value is not None and value >= auto for value in values)
    if auto == given:
        return f"{said}, and it is the threshold that was found."
    return f"{said}; the threshold that was found, {auto:.2f}, selects {found}."


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    title = f"<h2>{len(lines)} warning{'s' if len(lines) > 1 else ''}</h2>"
    return f'<section class="note">{title}{"<br>".join(map(escaped, lines))}</section>'


def _overview(analysis: Mapping[str, Any], number: int, name: str) -> str:
    """Return one expert's most important figures, and the explanation of its threshold."""
    threshold = analysis["thresholds"][number]
    entries = [entry_of(weight, number) for weight in analysis["weights"]]
    similar = [s for each in entries if (s := each.get("similarity_first")) is not None]
    chosen = [each for each in entries if each.get("selected")]
    norm = math.hypot(*(each["update_norm"] or 0.0 for each in chosen)) if chosen else None
    tiles: list[tuple[str, Any] | tuple[str, Any, str]] = [
        ("Selected", f"{len(chosen)} of {len(entries)}", f"tile-selected-{number}"),
        ("Threshold", figure(threshold["in_force"], "varies"), f"tile-threshold-{number}"),
        ("Auto threshold", figure(threshold["auto"], "none")),
        ("Median s<sub>1</sub>, of 1", figure(statistics.median(similar) if similar else None)),
        ("Largest s<sub>1</sub>, of 1", figure(max(similar, default=None))),
        ("99 % of unrelated", figure(threshold["null"]["quantile_99"])),
        ("Norm of the update", figure(norm), f"tile-norm-{number}"),
        ("Update / ‖λ ΔM‖", _share(chosen), f"tile-share-{number}"),
    ]
    title = f"<h3>{escaped(name)}</h3>" if len(analysis["experts"]) > 1 else ""
    said = f'<p class="hint">{escaped(threshold["explanation"])}</p>'
    return title + listed("tiles", tiles) + said


def _share(chosen: Sequence[Mapping[str, Any]]) -> str:
    """Return the updates' norm as a share of the rescaled task vectors of the same weights."""
    pairs = [(each["update_norm"], each["update_relative"]) for each in chosen]
    whole = math.hypot(*(norm / share for norm, share in pairs if norm and share))
    return (
        f"{100 * math.hypot(*(norm or 0.0 for norm, _ in pairs)) / whole:.3g} %" if whole else "—"
    )


def _made(analysis: Mapping[str, Any]) -> str:
    """Return how the analysis was made: time, memory, and what was asked for."""
    tiles: list[tuple[str, Any] | tuple[str, Any, str]] = [
        ("time", f"{sum(analysis['seconds'].values()):.1f} s"),
        ("read", format_size(analysis["bytes"]["read"])),
        ("peak memory", format_size(analysis["memory"]["peak_anonymous"])),
    ]
    stored = "".join(
        f"<details><summary>{title}</summary><pre>"
        f"{escaped(json.dumps(analysis[key], indent=2, ensure_ascii=False))}</pre></details>"
        for title, key in (
            ("Recipe", "recipe"),
            ("Gathered", "gathered"),
            ("Environment", "environment"),
            ("Inputs", "inputs"),
        )
    )
    return listed("tiles", tiles) + stored


def entry_of(weight: Weight, expert: int) -> Mapping[str, Any]:
    """Return a weight's entry of an expert; it is empty if the weight was not analysed."""
    entry: Mapping[str, Any] = {} if weight["skipped"] is not None else weight["experts"][expert]
    return entry


def module_of(weight: Weight) -> str:
    """Return the kind of a weight: its module, with a mixture's experts taken together."""
    module: str = weight["module"]
    inside = "experts" in weight["weight"].split(".") and module != "experts"
    return f"experts.{module}" if inside else module


def _module_order(module: str) -> tuple[bool, int, str]:
    leaf = module.rpartition(".")[2]
    place = _MODULES.index(leaf) if leaf in _MODULES else len(_MODULES)
    return leaf != module, place, module


def _data(analysis: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return all data that the scripts draw.

    Similarities keep all their digits, so that a threshold selects here what it selects in a merge.
    """
    weights = analysis["weights"]
    modules = sorted({module_of(weight) for weight in weights}, key=_module_order)
    places = {module: place for place, module in enumerate(modules)}
    thresholds = analysis["thresholds"]
    return {
        "experts": names,
        "modules": modules,
        "weights": {
            "name": [weight["weight"] for weight in weights],
            "layer": [_layer(weight) for weight in weights],
            "module": [places[module_of(weight)] for weight in weights],
            "shape": [size_text(weight["shape"]) for weight in weights],
        },
        "columns": [_columns(weights, n, thresholds[n]) for n in range(len(names))],
        "spectra": _spectra(weights, places, len(names)),
    }


def _layer(weight: Weight) -> int | None:
    return None if weight["layer"] is None else int(weight["layer"])


def _columns(
    weights: Sequence[Weight], expert: int, threshold: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one expert's columns for the table and the plots, in the order of the weights."""
    rows = [entry_of(weight, expert) for weight in weights]
    pairs = list(zip(rows, weights, strict=True))
    widths = [
        weight["shape"][1] for row, weight in pairs if row.get("similarity_first") is not None
    ]
    return {
        "threshold": {
            "in_force": threshold["in_force"],
            "select_by": "max" if threshold["select_by"] == "max" else "first",
            "auto": threshold["auto"],
            "unrelated": rounded(threshold["null"]["quantile_99"]),
            "counts": [[each["threshold"], each["selected"]] for each in threshold["counts"]],
        },
        "first": [row.get("similarity_first") for row in rows],
        "max": [row.get("similarity_max") for row in rows],
        **{name: [rounded(row.get(field)) for row in rows] for name, field in _FIELDS.items()},
        "gap": [bool(row) and bool(row["gap"] or weight["mllm"]["gap"]) for row, weight in pairs],
        "selected": [bool(row.get("selected")) for row in rows],
        "reason": [row.get("reason") or weight["skipped"] or "" for row, weight in pairs],
        "expected": expected_counts(widths),
    }


def expected_counts(widths: Sequence[int]) -> list[float | None]:
    """Return how many weights of these `widths` lie in each bin of |cos| for unrelated models."""
    counts = [0.0] * BINS
    for width in sorted(set(widths)):
        below = [null_cdf(edge / BINS, width) for edge in range(BINS + 1)]
        for place in range(BINS):
            counts[place] += widths.count(width) * (below[place + 1] - below[place])
    return [rounded(count) for count in counts]


def _spectra(
    weights: Sequence[Weight], places: Mapping[str, int], experts: int
) -> list[dict[str, Any]]:
    """Return singular values by module and layer; the layer None stands for all layers."""
    groups: dict[tuple[int, int | None], list[Weight]] = defaultdict(list)
    for weight in weights:
        module, layer = places[module_of(weight)], _layer(weight)
        groups[module, None].append(weight)
        if layer is not None:
            groups[module, layer].append(weight)
    found = []
    for module, layer in sorted(groups, key=lambda key: (key[0], -1 if key[1] is None else key[1])):
        group = [weight for weight in groups[module, layer] if weight["skipped"] is None]
        roles = [[weight["mllm"] for weight in group]]
        roles += [[weight["experts"][n] for weight in group] for n in range(experts)]
        curves = list(map(_curve, roles))
        found.append({"module": module, "layer": layer, "weights": len(group), "curves": curves})
    return found


def _curve(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return each rank's median singular value, and the range that holds four fifths of them.

    The curve ends where half of the weights have no more values.
    """
    rows = [row for entry in entries if (row := entry["sigma"][:_MOST_SIGMAS])]
    length = sorted(map(len, rows))[len(rows) // 2] if rows else 0
    ranks = [sorted(row[rank] for row in rows if rank < len(row)) for rank in range(length)]
    return {
        "mid": [rounded(statistics.median(values), 4) for values in ranks],
        "low": [rounded(values[(len(values) - 1) // 10], 4) for values in ranks],
        "high": [rounded(values[-1 - (len(values) - 1) // 10], 4) for values in ranks],
    }
