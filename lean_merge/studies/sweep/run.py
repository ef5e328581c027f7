"""Carry out a sweep: one analysis, one merge for each point of a grid, and a table of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lean_merge.engine import CREW, Event
from lean_merge.errors import LeanMergeError, RecipeError
from lean_merge.merge import merge
from lean_merge.outputs import output_of
from lean_merge.outputs.checkpoint import CheckpointOutput
from lean_merge.outputs.recorded import Analysis
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.plan.resources import Resources
from lean_merge.plan.runfacts import seen_from
from lean_merge.recipe import MergeRecipe
from lean_merge.store import checked_place
from lean_merge.studies.pages import add_page
from lean_merge.studies.sweep.decisions import Decisions, decide
from lean_merge.studies.sweep.evaluation import Evaluation, measure
from lean_merge.studies.sweep.grid import AXES, Grid, MethodGrid, Point, written
from lean_merge.studies.sweep.links import EqualFiles
from lean_merge.studies.sweep.start import (
    analysis_for,
    check,
    earlier_points,
    folders,
    gathers,
    held,
    is_made,
)
from lean_merge.studies.sweep.table import (
    TABLE_VERSION,
    PointRow,
    common_recipe,
    new_record,
    read_table,
    write_table,
)
from lean_merge.version import __version__

LOGS = "evaluations"


@dataclass(frozen=True, slots=True)
class PointEvent:
    """The news that point `number` of `total` is done; `record` is its row of the table."""

    number: int
    total: int
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep: its folder, its table, which docs/sweep.md explains, and its page.

    `page` is None where plotly is not installed.
    """

    path: Path
    table: dict[str, Any]
    page: Path | None = None

    @property
    def ok(self) -> bool:
        """Return whether every point was made, and measured if that was asked for."""
        return all(point["error"] is None for point in self.table["points"])


def sweep(
    recipe: MergeRecipe,
    grid: Grid | MethodGrid,
    out: str | Path,
    *,
    analysis: str | Path | Analysis | None = None,
    evaluate: Evaluation | str | None = None,
    resources: Resources | None = None,
    overwrite: bool = False,
    on_event: Callable[[PointEvent | Event], None] | None = None,
) -> SweepResult:
    """Merge at every point of a grid, from one analysis.

    Each point has a folder of its own in `out`, which is named after its values and holds what the
    recipe's `output` says. Points with equal decisions are made once, and weight files that are
    equal become hard links. A point that fails does not keep the others from being made. A sweep
    that is run again goes on where it stopped, and points of the same recipe that another grid had
    stay in the table. Where plotly is installed, the table is a page with plots too.

    Parameters
    ----------
    recipe
        The recipe that all points share. The grid's values replace its own, and its experts' own.
    grid
        The values to try, or the methods with values of their own. Where methods are swept and the
        outputs are checkpoints, the model that receives is measured too.
    out
        The folder of the table and of the points.
    analysis
        An analysis of the same inputs, or its folder. By default it is the one in `out`, which is
        made where it is missing.
    evaluate
        A command that measures each result; see `Evaluation`.
    resources
        Device, memory and threads.
    overwrite
        Whether to replace other content of the points' folders and of the sweep's own analysis,
        each once the new one is complete.
    on_event
        A function that is called after each weight of an analysis that is made, and after each
        point.

    Raises
    ------
    LeanMergeError
        An error concerns all points; an error of a single point is in the table, under `error`.
    """
    if CREW.get() is not None:
        raise RecipeError(
            "A sweep is made by one process; start it without torchrun, or make its points one by "
            "one by merge."
        )
    evaluation = Evaluation(evaluate) if isinstance(evaluate, str) else evaluate
    points = list(grid.points())
    plan = check(recipe, grid, points, evaluation, resources)
    place = checked_place(Path(out), folders(recipe))
    with held(place):
        earlier = earlier_points(place, recipe)
        work = _Sweep(recipe, place, earlier, evaluation, resources, overwrite, plan)
        work.known_receiver = (read_table(place) or {}).get("receiver")
        table = work.table(grid, points)
        # From here on the folder is known to be that of a sweep, even if the sweep fails.
        write_table(place, table)
        work.analysis = analysis_for(
            recipe,
            plan,
            grid,
            place,
            analysis,
            resources=resources,
            overwrite=overwrite,
            on_event=on_event,
        )
        if work.analysis is not None:
            table["analysis"] = seen_from(place, work.analysis.path)
        for number, point in enumerate(points):
            table["points"][number] = record = work.carry_out(point)
            write_table(place, table)
            if on_event is not None:
                on_event(PointEvent(number + 1, len(points), record))
        if isinstance(grid, MethodGrid) and evaluation is not None:
            table["receiver"] = work.receiver(plan, evaluation)
            write_table(place, table)
        # In the stored form, an unknown norm is null.
        page = add_page("sweep", place, read_table(place) or table)
    return SweepResult(place, table, page)


@dataclass
class _Sweep:
    recipe: MergeRecipe
    place: Path
    earlier: Mapping[str, PointRow]
    evaluation: Evaluation | None
    resources: Resources | None
    overwrite: bool
    like: Plan
    """The plan of any point, whose models are opened and mapped once for all."""
    analysis: Analysis | None = None
    files: EqualFiles = field(default_factory=EqualFiles)
    known_receiver: PointRow | None = None
    """What an earlier sweep measured of the model that receives."""
    first: dict[str, PointRow] = field(default_factory=dict)
    """The record of the first point with a set of decisions, by their digest."""

    def table(self, grid: Grid | MethodGrid, points: list[Point]) -> dict[str, Any]:
        """Return the whole table: the rows of this grid's points, and then those of others."""
        names = {point.name for point in points}
        others = [record for name, record in self.earlier.items() if name not in names]
        axes: dict[str, list[Any]] = {axis: list(values) for axis, values in grid.axes.items()}
        axes = {**{axis: [] for axis in AXES}, **axes}
        for record in others:
            for axis, value in record["parameters"].items():
                if value not in axes.setdefault(axis, []):
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
            "receiver": self.known_receiver,
        }

    def carry_out(self, point: Point) -> PointRow:
        """Make one point and measure it; any error is noted in its record."""
        record = new_record(point.name, point.parameters)
        try:
            self._make(point, record)
            own = record["path"] is not None and record["same_as"] is None
            if own and self.evaluation is not None:
                self._measure(record, self.evaluation, self._facts(point, record["path"]))
        except LeanMergeError as error:
            record["error"] = str(error)
        except Exception as error:
            # An unforeseen error must not lose hours of work on other points.
            record["error"] = f"{type(error).__name__}: {error}"
        return record

    def receiver(self, plan: Plan, evaluation: Evaluation) -> PointRow | None:
        """Measure the model that receives as it is; None for other outputs than whole models."""
        if self.recipe.output != CheckpointOutput.name:
            return None
        record = dict.fromkeys(("result", "evaluation", "error")) | (self.known_receiver or {})
        record |= {"error": None}
        facts = self._facts(Point("receiver", ()), str(plan.mllm.path))
        self._measure(record, evaluation, facts)
        return record

    def _plan(self, recipe: MergeRecipe) -> Plan:
        analysis = self.analysis if gathers(recipe) else None
        return make_plan(recipe, self.resources, analysis=analysis, like=self.like)

    def _make(self, point: Point, record: PointRow) -> None:
        start = time.monotonic()
        recipe = point.recipe(self.recipe)
        decided = decide(self._plan(replace(recipe, output="none")))
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
        elif decided.changes_nothing and not output_of(recipe.output).may_be_empty:
            # PEFT would not load an adapter without any update.
            record |= {"bytes_own": 0, "bytes_shared": 0}
        else:
            self._merge(point, recipe, decided, record)
        if record["seconds"] is None:
            record["seconds"] = round(time.monotonic() - start, 3)
        self.first.setdefault(decided.digest, record)

    def _merge(
        self, point: Point, recipe: MergeRecipe, decided: Decisions, record: PointRow
    ) -> None:
        folder = self.place / point.name
        plan = self._plan(recipe)
        overwrite = self.overwrite and not is_made(plan, folder)
        result = merge(plan, folder, overwrite=overwrite)
        if result.was_complete and (known := self._known(record)):
            record |= {key: known[key] for key in ("seconds", "result", "evaluation")}
        shared = self.files.add(folder, decided.digests)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        record |= {"path": point.name, "bytes_own": size - shared, "bytes_shared": shared}

    def _known(self, record: PointRow) -> PointRow:
        """Return an earlier sweep's row of the point if its decisions were the same; else {}."""
        before = self.earlier.get(record["name"], {})
        return before if before.get("digest") == record["digest"] else {}

    def _measure(self, record: PointRow, evaluation: Evaluation, facts: Mapping[str, str]) -> None:
        asked = {"command": evaluation.command, "shell": evaluation.shell}
        known = record["evaluation"] or {}
        if record["result"] is not None and {key: known.get(key) for key in asked} == asked:
            return
        record |= {"result": None, "evaluation": None}
        measured = measure(evaluation, facts, logs=self.place / LOGS)
        record["result"] = measured.result
        record["evaluation"] = asked | {"seconds": round(measured.seconds, 3)}
        if measured.error is not None:
            record["error"] = f"evaluation: {measured.error}"

    def _facts(self, point: Point, path: str) -> dict[str, str]:
        """Return the facts of a point for the evaluation, as text."""
        return {
            "path": str(self.place / path),
            "name": point.name,
            "output": self.recipe.output,
            "mllm": _absolute(self.recipe.receiver),
            "base": _absolute(self.recipe.base_model),
            **{axis: written(value) for axis, value in point.values},
        }


def _absolute(model: str) -> str:
    """Return the absolute path of a folder; a hub id stays as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model
