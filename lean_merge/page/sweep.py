"""Make the page of a sweep: results, selected weights and norms over its grid."""

from __future__ import annotations

from typing import Any

from lean_merge.page.counted import Score, measured_numbers
from lean_merge.page.frame import PageContent, filled, last_part, listed, rounded, verdict

_MEASURES = ("selected", "update_norm", "seconds", "bytes_own", "bytes_shared")
_MOST_SAID = 6


def sweep_content(sweep: dict[str, Any]) -> PageContent:
    """Return the content of the page of sweep.json."""
    results = [_results(record["result"]) for record in sweep["points"]]
    receiver = _results((sweep.get("receiver") or {}).get("result"))
    points = [_point(record, found) for record, found in zip(sweep["points"], results, strict=True)]
    names = sorted({name for found in results for name in found})
    axes = {axis: list(map(_value, values)) for axis, values in sweep["axes"].items() if values}
    table = filled("table.html", one="merge", filters="", hint="")
    heading, roles = _models(sweep.get("recipe"))
    return PageContent(
        heading=heading,
        lead=listed("roles", roles),
        body=filled(
            "sweep.html",
            verdict=verdict(
                [_lead(sweep, points, names), *_best(points, results, names, receiver)]
            ),
            table=table,
        ),
        data={
            "axes": axes,
            "results": names,
            "points": points,
            "receiver": {name: rounded(each.value, 12) for name, each in receiver.items()},
            "receiver_bounds": _bounds(receiver),
        },
    )


def _models(recipe: Any) -> tuple[str, list[tuple[str, str]]]:
    """Return the page's heading, and the models by their roles, as far as the sweep tells them."""
    if not isinstance(recipe, dict):
        return "Results over the grid", []
    receiver = str(recipe.get("mllm_model") or recipe["base_model"])
    experts = [str(each["model"]) for each in recipe["experts"]]
    roles = [("base", str(recipe["base_model"]))]
    roles += [("MLLM", receiver)] if recipe.get("mllm_model") else []
    for number, name in enumerate(experts, start=1):
        roles.append(("expert" if len(experts) == 1 else f"expert {number}", name))
    given = " + ".join(map(last_part, experts[:2])) + (" + …" if len(experts) > 2 else "")
    return f"{last_part(receiver)} ← {given}", roles


def _point(record: dict[str, Any], found: dict[str, Score]) -> dict[str, Any]:
    return {
        **{field: record[field] for field in ("name", "same_as", "error")},
        **{measure: rounded(record[measure]) for measure in _MEASURES},
        "parameters": {axis: _value(value) for axis, value in record["parameters"].items()},
        "results": {name: rounded(each.value, 12) for name, each in found.items()},
        "bounds": _bounds(found),
    }


def _results(result: Any) -> dict[str, Score]:
    """Return the measured numbers of a model, by name."""
    named = result if isinstance(result, dict) else {} if result is None else {"result": result}
    return measured_numbers(named)


def _bounds(found: dict[str, Score]) -> dict[str, list[float | None]]:
    return {
        name: [rounded(each.low), rounded(each.high)]
        for name, each in found.items()
        if each.low is not None
    }


def _value(value: Any) -> Any:
    """Return a value of an axis: a number, or words for anything else."""
    return value if type(value) in (int, float) else str(value)


def _best(
    points: list[dict[str, Any]],
    results: list[dict[str, Score]],
    names: list[str],
    receiver: dict[str, Score],
) -> list[str]:
    """Return a sentence for each measured number: where it is highest, and what the MLLM has."""
    said = []
    for name in names[:_MOST_SAID]:
        known = [(found[name], n) for n, found in enumerate(results) if name in found]
        best, place = max(known, key=lambda pair: pair[0].value)
        sentence = f"{name} is highest for {points[place]['name']}, {_number(best)}"
        before = receiver.get(name)
        if before is not None:
            sentence += f"; the receiving model itself has {_number(before)}"
            if best.may_equal(before):
                sentence += ", and the intervals overlap, so that this may be chance"
        said.append(sentence + ".")
    if len(names) > _MOST_SAID:
        said.append(f"{len(names) - _MOST_SAID} more numbers were measured; they are in the table.")
    if names:
        said.append(
            "Choose a merge that is high in what the expert should bring, and not below the "
            "receiving model in what must stay. The best of many merges looks better than it is: "
            "measure it again on other problems."
        )
    return said


def _number(measured: Score) -> str:
    if measured.low is None or measured.high is None:
        return f"{measured.value:.4g}"
    return f"{measured.value:.1%} [{measured.low:.1%}, {measured.high:.1%}]"


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
