"""Make the page of a sweep: results, selected weights and norms over its grid."""

from __future__ import annotations

from typing import Any

from lean_merge.page.frame import PageContent, escaped, filled, rounded

_MEASURES = ("selected", "update_norm", "seconds", "bytes_own", "bytes_shared")


def sweep_content(sweep: dict[str, Any]) -> PageContent:
    """Return the content of the page of sweep.json."""
    points = [_point(record) for record in sweep["points"]]
    results = sorted({name for point in points for name in point["results"]})
    receiver = _results((sweep.get("receiver") or {}).get("result"))
    axes = {axis: list(map(_value, values)) for axis, values in sweep["axes"].items() if values}
    table = filled("table.html", one="merge", filters="", hint="")
    return PageContent(
        heading="Results over the grid",
        lead=f"<p>{escaped(_lead(sweep, points, results))}</p>",
        body=filled("sweep.html", table=table),
        data={"axes": axes, "results": results, "points": points, "receiver": receiver},
    )


def _point(record: dict[str, Any]) -> dict[str, Any]:
    return {
        **{field: record[field] for field in ("name", "same_as", "error")},
        **{measure: rounded(record[measure]) for measure in _MEASURES},
        "parameters": {axis: _value(value) for axis, value in record["parameters"].items()},
        "results": _results(record["result"]),
    }


def _results(result: Any) -> dict[str, float | None]:
    """Return the measured numbers of a model, by name."""
    named = result if isinstance(result, dict) else {} if result is None else {"result": result}
    return {name: rounded(value, 12) for name, value in named.items()}


def _value(value: Any) -> Any:
    """Return a value of an axis: a number, or words for anything else."""
    return value if type(value) in (int, float) else str(value)


def _lead(sweep: dict[str, Any], points: list[dict[str, Any]], results: list[str]) -> str:
    same = sum(point["same_as"] is not None for point in points)
    failed = sum(point["error"] is not None for point in points)
    analysis = sweep["analysis"]
    said = [
        f"There are {len(points)} merges{f' from the analysis in {analysis}' if analysis else ''}."
    ]
    said += [f"{same} of them are equal to another."] if same else []
    said += [f"{failed} failed."] if failed else []
    said += [] if results else ["None was evaluated."]
    return " ".join(said)
