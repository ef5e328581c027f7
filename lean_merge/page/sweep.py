"""The page of a sweep: results, selected weights and norms over its grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lean_merge.page.document import escaped, filled, page, write
from lean_merge.page.values import check_version, items, mapping, mappings, number, short, text

SCRIPTS = ("plots.js", "table.js", "sweep.js")
_AXES = ("threshold", "stages", "scale", "temperature")
_MEASURES = ("selected", "update_norm", "seconds", "bytes_own", "bytes_shared")


def sweep_page(sweep: dict[str, Any]) -> bytes:
    """A sweep's table and plots as one HTML file that opens offline.

    Parameters
    ----------
    sweep
        What sweep.json holds.

    Raises
    ------
    OutputError
        Plotly is missing, or the sweep is of another version.
    """
    check_version(sweep, "sweep")
    data = _data(sweep)
    body = filled("sweep.html", lead=_lead(sweep, data))
    return page(title="lean-merge sweep", body=body, data=data, scripts=SCRIPTS)


def write_sweep_page(sweep: dict[str, Any], path: Path) -> None:
    """Writes `sweep_page` to a file, replaced if it exists.

    Raises
    ------
    OutputError
        As `sweep_page`, or the file cannot be written.
    """
    write(path, sweep_page(sweep))


def _data(sweep: Mapping[str, Any]) -> dict[str, Any]:
    points = mappings(sweep.get("points"))
    results = [_results(point) for point in points]
    axes = _axes(sweep, points)
    return {
        "axes": axes,
        "results": sorted({name for each in results for name in each}),
        "points": [
            {
                "name": text(point.get("name")) or text(point.get("path")) or "",
                "parameters": _fixed(axes)
                | {axis: _plain(value) for axis, value in mapping(point.get("parameters")).items()},
                **{measure: short(point.get(measure)) for measure in _MEASURES},
                "results": found,
                "same_as": text(point.get("same_as")),
                "error": text(point.get("error")),
            }
            for point, found in zip(points, results, strict=True)
        ],
    }


def _axes(
    sweep: Mapping[str, Any], points: list[Mapping[str, Any]]
) -> dict[str, list[str | float]]:
    """The values of every axis along which the points differ or could have."""
    stated = mapping(sweep.get("axes"))
    axes = {axis: [_plain(value) for value in items(stated.get(axis))] for axis in stated}
    for point in points:
        for axis, value in mapping(point.get("parameters")).items():
            known = axes.setdefault(axis, [])
            if _plain(value) not in known:
                known.append(_plain(value))
    order = {axis: place for place, axis in enumerate(_AXES)}
    return {axis: axes[axis] for axis in sorted(axes, key=lambda a: (order.get(a, 9), a))}


def _fixed(axes: Mapping[str, list[str | float]]) -> dict[str, str | float]:
    """The axes with one value, which a point need not repeat."""
    return {axis: values[0] for axis, values in axes.items() if len(values) == 1}


def _plain(value: Any) -> str | float:
    """A number, or the words for something else."""
    found = number(value)
    if found is not None:
        return found
    if isinstance(value, list):
        return ",".join(str(_plain(each)) for each in value)
    return text(value) or str(value)


def _results(point: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by name; one without a name is the `result`."""
    result = point.get("result")
    named = result if isinstance(result, dict) else {"result": result}
    return {
        text(name) or "": found
        for name, value in named.items()
        if (found := number(value)) is not None
    }


def _lead(sweep: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    points = data["points"]
    failed = sum(point["error"] is not None for point in points)
    same = sum(point["same_as"] is not None for point in points)
    facts = [f"{len(points)} merges from the analysis"]
    facts += [f"{same} of them equal to another"] if same else []
    facts += [f"{failed} failed"] if failed else []
    facts += [] if data["results"] else ["none was evaluated"]
    analysis = text(sweep.get("analysis"))
    facts[0] += f" in {analysis}" if analysis else ""
    return f"{escaped('; '.join(facts))}."
