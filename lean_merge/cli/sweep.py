"""The command sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lean_merge.checkpoints import downloads_shown
from lean_merge.cli import describe
from lean_merge.cli.app import EXIT_FAILED, app, echo
from lean_merge.cli.options import Debug, Json, Quiet, shares_options_of_work, work_of
from lean_merge.engine import Event
from lean_merge.errors import RecipeError
from lean_merge.page import INSTALL_PLOTLY
from lean_merge.studies.sweep import Evaluation, Grid, MethodGrid, PointEvent, sweep


@app.command("sweep")
@shares_options_of_work
def sweep_command(
    work: dict[str, Any],
    out: Annotated[Path, typer.Option(help="The folder of the table and of all results.")],
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="Thresholds as 0.3,0.5,auto or as start:stop:step with both ends: 0.1:0.9:0.1."
        ),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option(help="Sets of stages as 'select;select,rescale'; may be repeated."),
    ] = None,
    scales: Annotated[str | None, typer.Option(help="Scales, written as thresholds are.")] = None,
    temperatures: Annotated[
        str | None, typer.Option(help="Temperatures, written as thresholds are.")
    ] = None,
    tried: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="METHOD ...",
            help="A method and values of its parameters, instead of the above: "
            "'ties scale=0.5:1.5:0.5 density=0.1,0.2'; may be repeated.",
        ),
    ] = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            help="The folder of an analysis of these models; by default, one is made in OUT."
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Measure each result by this command, in which {path}, {name}, {mllm}, "
            "{threshold} and so on are replaced; the last JSON value that it prints is kept.",
        ),
    ] = None,
    evaluate_shell: Annotated[
        bool, typer.Option("--evaluate-shell", help="Let the shell run COMMAND.")
    ] = False,
    evaluate_timeout: Annotated[
        float | None, typer.Option(help="The seconds after which COMMAND is ended.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other inputs.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Merge at every point of a grid, or by several methods; measure, and print a table.

    Points that come out the same are made once, and equal files are hard links. The same command
    goes on where it stopped. The exit code is 1 if any point could not be made or measured.
    """
    grid: Grid | MethodGrid
    if tried:
        if thresholds or stages or scales or temperatures:
            raise RecipeError("--try has its own values; write --thresholds and the like in it.")
        grid = MethodGrid.parse(tried)
    else:
        grid = Grid(
            thresholds=thresholds or (),
            stages=stages or (),
            scales=scales or (),
            temperatures=temperatures or (),
        )
    evaluation = None
    if evaluate is not None:
        evaluation = Evaluation(evaluate, evaluate_shell, evaluate_timeout)
    recipe, resources = work_of(**work)

    def on_event(event: PointEvent | Event) -> None:
        if isinstance(event, PointEvent) and not (quiet or as_json):
            echo(f"{event.number} of {event.total}: {event.record['name']}", err=True)

    with downloads_shown(not quiet):
        result = sweep(
            recipe,
            grid,
            out,
            analysis=analysis,
            evaluate=evaluation,
            resources=resources,
            overwrite=overwrite,
            on_event=on_event,
        )
    if as_json:
        echo(json.dumps(result.table))
    elif not (quiet and result.ok):
        echo(describe.sweep_text(result.table))
        page = result.page
        echo(f"The plots are in {page}." if page else f"Plots need {INSTALL_PLOTLY}.", err=True)
    return 0 if result.ok else EXIT_FAILED
