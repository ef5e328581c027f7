"""The command sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lean_merge.cli.app import EXIT_FAILED, app, echo
from lean_merge.cli.helping import GRID, METHOD, OUTPUT, STUDYING
from lean_merge.cli.options import (
    Debug,
    Json,
    Quiet,
    option,
    refuse_ignored,
    shares_options_of_work,
    work_of,
)
from lean_merge.errors import RecipeError

if TYPE_CHECKING:
    from lean_merge.engine import Event
    from lean_merge.studies.sweep import Grid, MethodGrid, PointEvent


@app.command("sweep", rich_help_panel=STUDYING)
@shares_options_of_work
def sweep_command(
    work: dict[str, Any],
    out: Annotated[
        Path,
        option(OUTPUT, metavar="DIR", help="The folder of the table and of all merged models."),
    ],
    thresholds: Annotated[
        str | None,
        option(
            GRID,
            metavar="VALUES",
            help="The thresholds to try: a list such as 0.3,0.5,auto, or start:stop:step with both "
            "ends, such as 0.1:0.9:0.1.",
        ),
    ] = None,
    stages: Annotated[
        list[str] | None,
        option(
            GRID,
            metavar="STAGES",
            help="The sets of stages to try, such as 'select;select,rescale'. May be repeated.",
        ),
    ] = None,
    scales: Annotated[
        str | None,
        option(GRID, metavar="VALUES", help="The scales to try, written as thresholds are."),
    ] = None,
    temperatures: Annotated[
        str | None,
        option(GRID, metavar="VALUES", help="The temperatures to try, written as thresholds are."),
    ] = None,
    tried: Annotated[
        list[str] | None,
        option(
            GRID,
            "--try",
            metavar="METHOD ...",
            help="A method to try, with values of its parameters: 'ties scale=0.5:1.5:0.5 "
            "density=0.1,0.2'. Repeat it to compare methods. It takes the place of the options "
            "above.",
        ),
    ] = None,
    analysis: Annotated[
        Path | None,
        option(
            METHOD,
            metavar="DIR",
            help="An analysis of the same models to decide from. By default one is made in the "
            "output folder.",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        option(
            GRID,
            metavar="COMMAND",
            help="Measure each merged model by this command, in which {path}, {name}, {mllm}, "
            "{threshold} and so on are replaced. The last JSON value that it prints is kept.",
        ),
    ] = None,
    evaluate_shell: Annotated[
        bool, option(GRID, "--evaluate-shell", help="Let the shell run COMMAND.")
    ] = False,
    evaluate_timeout: Annotated[
        float | None,
        option(GRID, metavar="SECONDS", help="End COMMAND after this many seconds."),
    ] = None,
    overwrite: Annotated[
        bool, option(OUTPUT, "--overwrite", help="Replace results of other inputs.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Merge with many settings or by several methods, measure each result, and print a table.

    Settings that give the same weights are merged once, and equal files are hard links. The same
    command goes on where it stopped. The exit code is 1 if any model could not be made or measured.
    """
    from lean_merge.checkpoints import downloads_shown
    from lean_merge.cli import describe
    from lean_merge.page import INSTALL_PLOTLY
    from lean_merge.studies.sweep import Evaluation, Grid, MethodGrid, PointEvent, sweep

    swept = {"threshold": thresholds, "scale": scales, "temperature": temperatures}
    for name, values in swept.items():
        if values is not None:
            refuse_ignored(work, [name], f"--{name}s, which says what is tried")
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
