"""What the scripts of a report draw: an analysis in columns, and its spectra by groups."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lean_merge.page.nulllaw import expected
from lean_merge.page.values import items, mapping, mappings, number, short, text, texts, whole

BINS = 50
_MAX_SIGMA = 64
_NUMBERS = {
    "lambda": "lambda",
    "update": "update_norm",
    "relative": "update_relative",
    "rank": "effective_rank",
    "kept": "energy_kept",
    "null": "null_99",
    "angle": "angle_error",
}
"""Columns of one expert, shown with few digits, by the field that each shows."""

Weight = Mapping[str, Any]


def page_data(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the scripts need, as plain data.

    Similarities keep all their digits, so that a threshold selects here what it selects in a merge.
    """
    weights = mappings(analysis.get("weights"))
    names = expert_names(analysis)
    modules = sorted({module_of(each) for each in weights}, key=_module_order)
    place = {module: number for number, module in enumerate(modules)}
    thresholds = [*mappings(analysis.get("thresholds")), *[{}] * len(names)]
    stated = mapping(analysis.get("gathered")).get("select_by")
    return {
        "experts": [last(name) for name in names],
        "modules": modules,
        "weights": {
            "name": [text(each.get("weight")) or text(each.get("name")) or "" for each in weights],
            "layer": [whole(each.get("layer")) for each in weights],
            "module": [place[module_of(each)] for each in weights],
            "shape": ["x".join(str(n) for n in _shape(each)) for each in weights],
        },
        "columns": [
            _expert_columns(weights, number, {"select_by": stated, **thresholds[number]})
            for number in range(len(names))
        ],
        "spectra": spectra(weights, modules, len(names)),
    }


def expert_names(analysis: Mapping[str, Any]) -> list[str]:
    """The experts as they were named."""
    names = texts(analysis.get("experts"))
    most = max((len(items(w.get("experts"))) for w in mappings(analysis.get("weights"))), default=0)
    return names + [f"expert {n + 1}" for n in range(len(names), most)]


def last(source: str) -> str:
    """The end of a path or hub id, as one calls it."""
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2] or source


def module_of(weight: Weight) -> str:
    """The kind of a weight: its module, with the experts of a mixture taken together."""
    module = text(weight.get("module")) or (text(weight.get("weight")) or "other").split(".")[-1]
    parts = (text(weight.get("weight")) or "").split(".")
    return f"experts.{module}" if "experts" in parts and module != "experts" else module


def expert_of(weight: Weight, expert: int) -> Mapping[str, Any]:
    """What a weight says of an expert; empty where it says nothing."""
    found = mappings(weight.get("experts"))
    return found[expert] if expert < len(found) else {}


def similarity(entry: Mapping[str, Any], select_by: str) -> float | None:
    """What is compared with the threshold."""
    return number(entry.get("similarity_max" if select_by == "max" else "similarity_first"))


def _module_order(module: str) -> tuple[int, str]:
    known = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj"]
    known += ["gate_up_proj", "down_proj"]
    leaf = module.rpartition(".")[2]
    order = known.index(leaf) if leaf in known else len(known)
    return order + 100 * (leaf != module), module


def _shape(weight: Weight) -> list[int]:
    return [n for each in items(weight.get("shape")) if (n := whole(each)) is not None]


def _expert_columns(
    weights: Sequence[Weight], expert: int, threshold: Mapping[str, Any]
) -> dict[str, Any]:
    rows = [expert_of(weight, expert) for weight in weights]
    reasons = [
        text(row.get("reason")) or text(weight.get("skipped")) or ""
        for row, weight in zip(rows, weights, strict=True)
    ]
    listed = sorted(set(reasons))
    place = {reason: number for number, reason in enumerate(listed)}
    first = [similarity(row, "first") for row in rows]
    found = [
        (shape[1], s)
        for weight, s in zip(weights, first, strict=True)
        if s is not None and len(shape := _shape(weight)) == 2
    ]
    edges = [n / BINS for n in range(BINS + 1)]
    return {
        "threshold": _threshold(threshold),
        "first": first,
        "max": [similarity(row, "max") for row in rows],
        **{name: [short(row.get(field)) for row in rows] for name, field in _NUMBERS.items()},
        "gap": [
            bool(row.get("gap") is True or mapping(weight.get("mllm")).get("gap") is True)
            for row, weight in zip(rows, weights, strict=True)
        ],
        "selected": [row.get("selected") is True for row in rows],
        "able": [_able(weight, row) for row, weight in zip(rows, weights, strict=True)],
        "reasons": listed,
        "reason": [place[reason] for reason in reasons],
        "expected": [short(n) for n in expected(edges, [width for width, _ in found])],
    }


def _able(weight: Weight, row: Mapping[str, Any]) -> bool:
    """Whether any threshold would select a weight."""
    return weight.get("skipped") is None and number(row.get("similarity_first")) is not None


def _threshold(entry: Mapping[str, Any]) -> dict[str, Any]:
    counts = [
        (number(each.get("threshold")), whole(each.get("selected")))
        for each in mappings(entry.get("counts"))
    ]
    return {
        "in_force": number(entry.get("in_force")),
        "select_by": "max" if entry.get("select_by") == "max" else "first",
        "auto": number(entry.get("auto")),
        "null": short(mapping(entry.get("null")).get("quantile_99")),
        "counts": [list(pair) for pair in counts if None not in pair],
    }


def spectra(weights: Sequence[Weight], modules: Sequence[str], experts: int) -> dict[str, Any]:
    """Singular values by module and layer, and by module over all layers.

    A group of several weights is drawn by the median at each place, and by the range in which four
    fifths of them lie.
    """
    groups: dict[tuple[int, int | None], list[Weight]] = defaultdict(list)
    place = {module: number for number, module in enumerate(modules)}
    for weight in weights:
        module, layer = place[module_of(weight)], whole(weight.get("layer"))
        groups[module, None].append(weight)
        if layer is not None:
            groups[module, layer].append(weight)
    layers = sorted({layer for _, layer in groups if layer is not None})
    return {
        "layers": layers,
        "groups": [
            [module, layer, len(found), _curve([mapping(w.get("mllm")) for w in found])]
            + [_curve([expert_of(w, number) for w in found]) for number in range(experts)]
            for (module, layer), found in sorted(
                groups.items(), key=lambda each: (each[0][0], each[0][1] is not None, each[0])
            )
        ],
    }


def _curve(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values at each place, of those weights that have as many."""
    rows = [
        [s for each in items(entry.get("sigma"))[:_MAX_SIGMA] if (s := number(each)) is not None]
        for entry in entries
    ]
    rows = [row for row in rows if row]
    length = sorted(map(len, rows))[len(rows) // 2] if rows else 0
    places = [sorted(row[at] for row in rows if at < len(row)) for at in range(length)]
    curve: dict[str, Any] = {"mid": [short(statistics.median(each), 4) for each in places]}
    if len(rows) > 1:
        curve["low"] = [short(each[(len(each) - 1) // 10], 4) for each in places]
        curve["high"] = [short(each[-1 - (len(each) - 1) // 10], 4) for each in places]
    return curve
