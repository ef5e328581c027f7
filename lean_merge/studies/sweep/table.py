"""Write the table of a sweep after every point, and read it when the sweep is continued."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.jsonfile import read_object, to_json
from lean_merge.errors import CheckpointError, OutputError
from lean_merge.recipe import MergeRecipe
from lean_merge.store.storage import explain, sync_folder, write_new
from lean_merge.studies.sweep.grid import AXES

TABLE, CSV = "sweep.json", "sweep.csv"
TABLE_VERSION = 1
_MAX_TABLE = 64 << 20
_PARTIAL = ".partial"

PointRow = dict[str, Any]


def new_record(name: str, parameters: Mapping[str, Any]) -> PointRow:
    """Return the row of a point that is not made yet; docs/sweep.md explains every field."""
    return {
        "name": name,
        "path": None,
        "parameters": dict(parameters),
        "selected": None,
        "update_norm": None,
        "bytes_own": None,
        "bytes_shared": None,
        "seconds": None,
        "same_as": None,
        "digest": None,
        "result": None,
        "evaluation": None,
        "error": None,
    }


def common_recipe(recipe: MergeRecipe) -> dict[str, Any]:
    """Return the recipe that all points share, without the parameters that sweeps vary."""
    plain = recipe.to_dict()
    for owner in (plain, *plain["experts"]):
        own = {n: v for n, v in owner.pop("parameters", {}).items() if n not in AXES}
        if own:
            owner["parameters"] = own
    return plain


def read_table(out: Path) -> dict[str, Any] | None:
    """Return the table that an earlier sweep left in `out`; None if there is none.

    Raises
    ------
    CheckpointError
        The table is damaged.
    """
    file = out / TABLE
    if not file.exists():
        return None
    mend = "choose another folder, or move it away"
    table = read_object(file, limit=_MAX_TABLE, what="the table of a sweep", mend=mend)
    points = table.get("points")
    if table.get("version") != TABLE_VERSION or not isinstance(points, list):
        raise CheckpointError(f"{file}: is not a table of this version; {mend}.")
    for point in points:
        if not _is_record(point):
            raise CheckpointError(f"{file}: has a point that lacks something; {mend}.")
    receiver = table.setdefault("receiver", None)
    if receiver is not None and not (isinstance(receiver, dict) and _is_measured(receiver)):
        raise CheckpointError(f"{file}: has a receiver that lacks something; {mend}.")
    return table


def _is_record(point: Any) -> bool:
    if not isinstance(point, dict) or point.keys() != new_record("", {}).keys():
        return False
    texts = all(isinstance(point[key], (str, type(None))) for key in ("path", "same_as", "digest"))
    return (
        texts
        and isinstance(point["name"], str)
        and _is_measured(point)
        and isinstance(point["parameters"], dict)
        and all(type(value) in (str, int, float, bool) for value in point["parameters"].values())
    )


def _is_measured(record: PointRow) -> bool:
    result = record.get("result")
    values = result.values() if isinstance(result, dict) else [] if result is None else [result]
    plain = isinstance(record.get("evaluation"), (dict, type(None)))
    return plain and all(type(value) in (int, float) for value in values)


def write_table(out: Path, table: Mapping[str, Any]) -> None:
    """Replace sweep.json and sweep.csv, each by one rename.

    Raises
    ------
    OutputError, BudgetError
        A file cannot be written, or the disk is full.
    """
    for name, data in ((TABLE, to_json(dict(table))), (CSV, [to_csv(table)])):
        file = out / name
        try:
            write_new(out / f"{name}{_PARTIAL}", data)
            os.replace(out / f"{name}{_PARTIAL}", file)
            sync_folder(out)
        except OSError as error:
            raise explain(file, error) from error


def result_names(table: Mapping[str, Any]) -> list[str]:
    """Return the names of all results, as they occur; a bare number has the name ""."""
    names: dict[str, None] = {}
    for point in table["points"]:
        result = point["result"]
        if result is not None:
            names |= dict.fromkeys(result if isinstance(result, dict) else [""])
    return list(names)


def result_of(point: PointRow, name: str) -> Any:
    """Return a point's result under a name; None if it has none."""
    result = point["result"]
    if isinstance(result, dict):
        return result.get(name)
    return result if name == "" else None


def to_csv(table: Mapping[str, Any]) -> bytes:
    """Return the table as CSV: a row for each point, a column for each parameter and result."""
    axes = [axis for axis, values in table["axes"].items() if values]
    names = result_names(table)
    plain = ("selected", "update_norm", "bytes_own", "bytes_shared", "seconds", "same_as", "error")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *axes, *plain, *(f"result.{n}" if n else "result" for n in names)])
    for point in table["points"]:
        writer.writerow(
            [
                point["name"],
                *(point["parameters"].get(axis) for axis in axes),
                *(point[field] for field in plain),
                *(result_of(point, name) for name in names),
            ]
        )
    return text.getvalue().encode("utf-8", "backslashreplace")


def check_same_recipe(out: Path, table: Mapping[str, Any], recipe: MergeRecipe) -> None:
    """Raise OutputError if a table is of another recipe; swept parameters may differ."""
    then, now = table.get("recipe"), common_recipe(recipe)
    if then == now:
        return
    then = then if isinstance(then, dict) else {}
    key = next(key for key in [*now, *then] if then.get(key) != now.get(key))
    raise OutputError(
        f"{out}: holds a sweep of another recipe ({key} was {then.get(key)!r}, is "
        f"{now.get(key)!r}); choose another folder."
    )
