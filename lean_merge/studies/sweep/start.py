"""Begin a sweep: check its grid, lock its folder, and find its analysis and table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lean_merge.engine import Event, early_look
from lean_merge.errors import CheckpointError, OutputError, RecipeError
from lean_merge.outputs import output_of
from lean_merge.outputs.analysis import AnalysisOutput
from lean_merge.outputs.gathered import evidence_method
from lean_merge.outputs.recorded import Analysis, open_analysis
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.plan.parameters import build_method
from lean_merge.plan.resources import Resources
from lean_merge.plan.runfacts import run_facts
from lean_merge.recipe import MergeRecipe
from lean_merge.store import find_complete
from lean_merge.store.storage import explain, hold_folder
from lean_merge.studies.analyze import analyze
from lean_merge.studies.sweep.evaluation import Evaluation
from lean_merge.studies.sweep.grid import METHOD, Grid, MethodGrid, Point, Value
from lean_merge.studies.sweep.table import CSV, TABLE, PointRow, check_same_recipe, read_table

ANALYSIS_FOLDER = "analysis"
"""The folder, inside that of the sweep, of the sweep's own analysis."""


def check(
    recipe: MergeRecipe,
    grid: Grid | MethodGrid,
    points: list[Point],
    evaluation: Evaluation | None,
    resources: Resources | None,
) -> Plan:
    """Refuse errors that concern all points, and likely slips; return the plan of one point."""
    if evaluation is not None:
        evaluation.check(grid.axes)
        if not output_of(recipe.output).needs_folder:
            raise RecipeError(
                "With output none there is nothing to evaluate; give output checkpoint or lora."
            )
    for point in points:
        build_method(point.recipe(recipe))
    kinds = {
        (each.parameters.get(METHOD), each.parameters.get("stages")): each
        for each in reversed(points)
    }
    plan = None
    for first in kinds.values():
        plan = make_plan(first.recipe(recipe), resources, like=plan)
    assert plan is not None
    early_look(plan)
    return plan


def gathers(recipe: MergeRecipe) -> bool:
    """Return whether the recipe's method decides from an analysis."""
    try:
        evidence_method(recipe)
    except RecipeError:
        return False
    return True


def analysis_for(
    recipe: MergeRecipe,
    plan: Plan,
    grid: Grid | MethodGrid,
    place: Path,
    given: str | Path | Analysis | None,
    *,
    resources: Resources | None,
    overwrite: bool,
    on_event: Callable[[Event], None] | None,
) -> Analysis | None:
    """Return the analysis that all points are decided from; None if the method needs none.

    It is the one that is `given`, or else the one in the sweep's folder, which is made if it is
    missing. It is made for the lowest temperature of the grid, at which most directions matter.
    `plan` is the plan of any point.

    Raises
    ------
    LeanMergeError
        The analysis is incomplete or of other models, or the models cannot be analysed.
    """
    recipes = [each.recipe(recipe) for each in grid.points()]
    able = next((each for each in recipes if gathers(each)), None)
    if able is None:
        if given is not None:
            evidence_method(recipe)
        return None
    if given is not None:
        analysis = open_analysis(given) if isinstance(given, (str, Path)) else given
        analysis.check_inputs(plan.roles)
        return analysis
    folder = place / ANALYSIS_FOLDER
    if not overwrite and (found := _opened(folder)) is not None:
        try:
            found.check_inputs(plan.roles)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} A sweep makes its own anew with --overwrite."
            ) from error
        return found
    temperatures = sorted(v for v in grid.axes.get("temperature", ()) if not isinstance(v, str))
    lowest: tuple[tuple[str, Value], ...] = ((METHOD, able.merge_method),)
    lowest += tuple(("temperature", value) for value in temperatures[:1])
    wanted = replace(Point(ANALYSIS_FOLDER, lowest).recipe(recipe), output="none")
    looking = make_plan(wanted, resources, output=AnalysisOutput, like=plan)
    # One that is damaged although it looks complete is replaced as well.
    overwrite = not is_made(looking, folder) or _opened(folder) is None
    return analyze(looking, folder, overwrite=overwrite, on_event=on_event).analysis


def is_made(plan: Plan, folder: Path) -> bool:
    """Tell if a folder of the sweep holds the complete output of a plan already."""
    facts = run_facts(plan, folder)
    return find_complete(folder, plan.shards, inputs=plan.inputs, run=facts) is not None


def _opened(folder: Path) -> Analysis | None:
    """Return the analysis in a folder; None if it is missing, unfinished or damaged."""
    try:
        return open_analysis(folder)
    except CheckpointError:
        return None


def folders(recipe: MergeRecipe) -> list[Path]:
    """Return the folders of the inputs; an input that is a hub id has none."""
    models = [recipe.base_model, recipe.receiver, *(each.model for each in recipe.experts)]
    models += [each.parent for each in recipe.experts if each.parent is not None]
    return [path for path in map(Path, models) if path.exists()]


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Make the sweep's folder and lock it. Raises OutputError or BudgetError if that fails."""
    lock = None
    try:
        try:
            lock, _ = hold_folder(place)
        except OSError as error:
            raise explain(place, error) from error
        yield
    finally:
        if lock is not None:
            lock.release()


def earlier_points(place: Path, recipe: MergeRecipe) -> dict[str, PointRow]:
    """Return the points of an earlier sweep into the same folder, by name.

    Raises
    ------
    OutputError
        The earlier sweep had another recipe, or the folder holds something else.
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
