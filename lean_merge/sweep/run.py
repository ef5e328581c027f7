"""A sweep: one analysis, one merge for each point of a grid, and a table of what came of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lean_merge.api import merge
from lean_merge.engine.run import run
from lean_merge.errors import LeanMergeError, OutputError, RecipeError
from lean_merge.output.opening import checked_place
from lean_merge.output.storage import explain, lock_folder, make_folder
from lean_merge.parameters import build_method
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.recipe import MergeRecipe
from lean_merge.resources import Resources
from lean_merge.sweep.decisions import Decisions, DigestSink, Made, equal_shards
from lean_merge.sweep.evaluation import Evaluation, measure
from lean_merge.sweep.grid import AXES, Grid, Point, written
from lean_merge.sweep.table import (
    CSV,
    TABLE,
    TABLE_VERSION,
    Record,
    check_same_recipe,
    common_recipe,
    new_record,
    read_table,
    write_table,
)
from lean_merge.version import __version__

LOGS = "evaluations"


@dataclass(frozen=True, slots=True)
class PointEvent:
    """Point `number` of `total` is done; `record` is its row of the table."""

    number: int
    total: int
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep: its folder, and the table, which docs/sweep.md explains."""

    path: Path
    table: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every point was made, and measured where that was asked for."""
        return all(point["error"] is None for point in self.table["points"])


def sweep(
    recipe: MergeRecipe,
    grid: Grid,
    out: str | Path,
    *,
    evaluate: Evaluation | str | None = None,
    resources: Resources | None = None,
    overwrite: bool = False,
    on_event: Callable[[PointEvent], None] | None = None,
) -> SweepResult:
    """Merge at every point of a grid.

    Each point has a folder of its own in `out`, named after its values, with what the recipe's
    `output` says. Points with equal decisions are made once; weight files that are equal are hard
    links. A point that fails does not keep the others from being made. Run again, a sweep goes on
    where it stopped, and points of the same recipe that another grid had stay in the table.

    Parameters
    ----------
    recipe
        What all points share; the grid's values go over its own, and over those of single experts.
    grid
        The values.
    out
        Folder of the table and of the points.
    evaluate
        A command that measures each result; see `Evaluation`.
    resources
        Device, memory and threads.
    overwrite
        Replace what the points' folders hold, each once the new is complete.
    on_event
        Called after each point.

    Raises
    ------
    LeanMergeError
        For what concerns all points; what concerns one is in the table, under `error`.
    """
    evaluation = Evaluation(evaluate) if isinstance(evaluate, str) else evaluate
    points = list(grid.points())
    _check(recipe, grid, points, evaluation, resources)
    place = checked_place(Path(out), _folders(recipe))
    with _taken(place):
        earlier = _earlier(place, recipe)
        work = _Sweep(recipe, place, earlier, evaluation, resources, overwrite)
        table = work.table(grid, points)
        write_table(place, table)
        for number, point in enumerate(points):
            table["points"][number] = record = work.carry_out(point)
            write_table(place, table)
            if on_event is not None:
                on_event(PointEvent(number + 1, len(points), record))
    return SweepResult(place, table)


def _check(
    recipe: MergeRecipe,
    grid: Grid,
    points: list[Point],
    evaluation: Evaluation | None,
    resources: Resources | None,
) -> None:
    """Raise for what would go wrong at every point, or is a slip in the grid."""
    if evaluation is not None:
        evaluation.check(grid.axes)
        if recipe.output == "none":
            raise RecipeError(
                "With output none there is nothing to evaluate; give output checkpoint or lora."
            )
    for point in points:
        build_method(point.recipe(recipe))
    for stages in grid.axes.get("stages", (None,)):
        first = next(p for p in points if p.parameters.get("stages") == stages)
        make_plan(first.recipe(recipe), resources)


def _folders(recipe: MergeRecipe) -> list[Path]:
    """Where the inputs are, as far as they are no hub ids."""
    models = [recipe.base_model, recipe.mllm_model, *(each.model for each in recipe.experts)]
    return [path for path in map(Path, models) if path.exists()]


@contextmanager
def _taken(place: Path) -> Iterator[None]:
    """The sweep's folder, made and held. Raises OutputError, BudgetError."""
    lock = None
    try:
        try:
            if not place.exists():
                make_folder(place)
            lock = lock_folder(place)
        except OSError as error:
            raise explain(place, error) from error
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _earlier(place: Path, recipe: MergeRecipe) -> dict[str, Record]:
    """The points of an earlier sweep into the same folder, by name.

    Raises OutputError if it was of another recipe, or the folder is another's.
    """
    table = read_table(place)
    if table is None:
        leftovers = {f"{name}.partial" for name in (TABLE, CSV)}
        if {each.name for each in place.iterdir()} - leftovers:
            raise OutputError(
                f"{place}: is not empty and holds no sweep; choose another folder, or empty it."
            )
        return {}
    check_same_recipe(place, table, recipe)
    return {point["name"]: point for point in table["points"]}


@dataclass
class _Sweep:
    recipe: MergeRecipe
    place: Path
    earlier: Mapping[str, Record]
    evaluation: Evaluation | None
    resources: Resources | None
    overwrite: bool
    made: list[Made] = field(default_factory=list)
    """Complete outputs of this grid, in the order in which they were made."""
    first: dict[str, Record] = field(default_factory=dict)
    """The first point of every set of decisions, by their digest."""

    def table(self, grid: Grid, points: list[Point]) -> dict[str, Any]:
        """The whole table, with what is known of this grid's points, and then of others."""
        names = {point.name for point in points}
        others = [record for name, record in self.earlier.items() if name not in names]
        axes: dict[str, list[Any]] = {axis: list(grid.axes.get(axis, ())) for axis in AXES}
        for record in others:
            for axis, value in record["parameters"].items():
                if value not in axes[axis]:
                    axes[axis].append(value)
        evaluation = self.evaluation
        return {
            "version": TABLE_VERSION,
            "lean_merge": __version__,
            "analysis": None,
            "recipe": common_recipe(self.recipe),
            "output": self.recipe.output,
            "axes": axes,
            "evaluate": None
            if evaluation is None
            else {
                "command": evaluation.command,
                "shell": evaluation.shell,
                "timeout": evaluation.timeout,
            },
            "points": [
                *(self.earlier.get(p.name) or new_record(p.name, p.parameters) for p in points),
                *others,
            ],
        }

    def carry_out(self, point: Point) -> Record:
        """Make one point and measure it; whatever goes wrong is noted in its record."""
        record = new_record(point.name, point.parameters)
        try:
            self._make(point, record)
            own = record["path"] is not None and record["same_as"] is None
            if own and self.evaluation is not None:
                self._measure(point, record, self.evaluation)
        except LeanMergeError as error:
            record["error"] = str(error)
        except Exception as error:
            # Hours of other points must not be lost by what nobody foresaw.
            record["error"] = f"{type(error).__name__}: {error}"
        return record

    def _plan(self, recipe: MergeRecipe) -> Plan:
        return make_plan(recipe, self.resources)

    def _make(self, point: Point, record: Record) -> None:
        start = time.monotonic()
        recipe = point.recipe(self.recipe)
        sink = DigestSink()
        plan = self._plan(replace(recipe, output="none"))
        decided = Decisions.of(sink, run(plan, sink, lambda event: None))
        record |= {
            "selected": decided.selected,
            "update_norm": decided.update_norm,
            "digest": decided.digest,
        }
        twin = self.first.get(decided.digest)
        if twin is not None:
            record |= {"same_as": twin["name"], "bytes_own": 0, "bytes_shared": 0}
            record |= {key: twin[key] for key in ("path", "result", "evaluation", "error")}
            record["seconds"] = self._known(record).get("seconds")
        elif recipe.output == "lora" and not any(map(any, decided.digests.values())):
            # An adapter without any update is none that PEFT would load.
            record |= {"bytes_own": 0, "bytes_shared": 0}
        else:
            self._merge(point, recipe, decided, record)
        if record["seconds"] is None:
            record["seconds"] = round(time.monotonic() - start, 3)
        self.first.setdefault(decided.digest, record)

    def _merge(self, point: Point, recipe: MergeRecipe, decided: Decisions, record: Record) -> None:
        plan = self._plan(recipe)
        folder = self.place / point.name
        equal = equal_shards(plan, decided, self.made)
        result = merge(plan, folder, overwrite=self.overwrite, equal=equal)
        if result.was_complete and (known := self._known(record)):
            record |= {key: known[key] for key in ("seconds", "result", "evaluation")}
        sizes = result.report["bytes"]
        files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        record |= {
            "path": point.name,
            "bytes_own": files - sizes["shared"],
            "bytes_shared": sizes["shared"],
        }
        self.made.append(Made(folder, decided.digests))

    def _known(self, record: Record) -> Record:
        """What an earlier sweep noted of the point, if its decisions were these; else nothing."""
        before = self.earlier.get(record["name"], {})
        return before if before.get("digest") == record["digest"] else {}

    def _measure(self, point: Point, record: Record, evaluation: Evaluation) -> None:
        asked = {"command": evaluation.command, "shell": evaluation.shell}
        known = record["evaluation"] or {}
        if record["result"] is not None and {key: known.get(key) for key in asked} == asked:
            return
        record |= {"result": None, "evaluation": None}
        measured = measure(evaluation, self._facts(point, record["path"]), logs=self.place / LOGS)
        record["result"] = measured.result
        record["evaluation"] = asked | {"seconds": round(measured.seconds, 3)}
        if measured.error is not None:
            record["error"] = f"evaluation: {measured.error}"

    def _facts(self, point: Point, path: str) -> dict[str, str]:
        """What the command is told of a point, as text."""
        return {
            "path": str(self.place / path),
            "name": point.name,
            "output": self.recipe.output,
            "mllm": _absolute(self.recipe.mllm_model),
            "base": _absolute(self.recipe.base_model),
            **{axis: written(value) for axis, value in point.values},
        }


def _absolute(model: str) -> str:
    """A folder's whole path; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model
