"""The commands analyze and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from lean_merge.cli.app import SPEAKS, app, echo
from lean_merge.cli.helping import OUTPUT, STUDYING
from lean_merge.cli.options import (
    Debug,
    Json,
    NoResume,
    Quiet,
    option,
    refuse_ignored,
    shares_options_of_work,
    work_of,
)
from lean_merge.cli.progress import LINE
from lean_merge.errors import CoverageError, LeanMergeError, OutputError

if TYPE_CHECKING:
    from lean_merge.plan.resources import Resources
    from lean_merge.recipe import MergeRecipe


@app.command("analyze", rich_help_panel=STUDYING)
@shares_options_of_work
def analyze_command(
    work: dict[str, Any],
    out: Annotated[
        Path, option(OUTPUT, metavar="DIR", help="The folder that the analysis is written to.")
    ],
    overwrite: Annotated[
        bool,
        option(
            OUTPUT,
            "--overwrite",
            help="Replace the analysis in the folder, once the new one is complete.",
        ),
    ] = False,
    no_resume: NoResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look at every weight once, and say what each threshold would merge. No model is written.

    A merge or a sweep that is given the analysis decides from it, at any threshold, temperature,
    stages and scale, without looking again. Models that do not share one base are compared
    instead, and the exit code is 1.
    """
    ignored = ("output", "lora_rank", "lora_uniform_rank", "shard_size")
    refuse_ignored(work, ignored, "analyze, which writes no model")
    recipe, resources = work_of(**work)
    from lean_merge.checkpoints import downloads_shown
    from lean_merge.cli import describe
    from lean_merge.cli.progress import progress
    from lean_merge.cli.rounding import dtype_of
    from lean_merge.cli.warnings import Warnings
    from lean_merge.outputs.analysis import AnalysisOutput
    from lean_merge.page import INSTALL_PLOTLY
    from lean_merge.plan import plan as make_plan
    from lean_merge.studies.analyze import analyze

    try:
        LINE.begin("reading the headers of all models", ticks=False)
        with downloads_shown(not quiet):
            plan = make_plan(recipe, resources, output=AnalysisOutput)
    except CoverageError as error:
        if SPEAKS.get():
            _compare(recipe, resources, out, error, as_json=as_json, quiet=quiet)
        raise
    told = Warnings(quiet or as_json)
    told.tell(describe.warnings_of(plan))
    with progress(plan, quiet, told.warn) as shown:
        result = analyze(
            plan,
            out,
            overwrite=overwrite,
            resume=not no_resume,
            on_event=shown,
        )
    document = result.analysis.document
    if as_json:
        echo(json.dumps(describe.analysis_dict(result.path, document)))
    elif not quiet:
        if result.was_complete:
            echo(f"{result.path} is complete already; there is nothing to do.", err=True)
        told.tell(document["warnings"])
        page = result.page or f"there is none, for it needs plotly; {INSTALL_PLOTLY}"
        echo(f"report: {page}")
        echo(describe.analysis_text(result.path, document, dtype_of(plan)))


def _compare(
    recipe: MergeRecipe,
    resources: Resources,
    out: Path,
    error: CoverageError,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what differs between models that do not share one foundation, and keep the comparison.

    It never replaces anything but a comparison: --overwrite asks for an analysis.
    """
    from lean_merge.studies.compare import COMPARISON, compare, differing, write_comparison

    if not quiet:
        echo("The models are not of one foundation, so they are compared.", err=True)
    place = None
    try:
        try:
            result = write_comparison(recipe, out, resources=resources, reason=str(error))
            found, place = result.comparison, result.page or result.path / COMPARISON
        except OutputError as other:
            echo(f"warning: the comparison is not kept: {other}", err=True)
            found = compare(recipe, resources, reason=str(error))
    except LeanMergeError as other:
        # Why the comparison cannot be made matters less than why it is needed.
        echo(f"warning: the models could not be compared: {other}", err=True)
        return
    if as_json:
        echo(json.dumps(found))
    elif not quiet:
        echo("\n".join(differing(found)))
        if place is not None:
            echo(f"comparison: {place}")


@app.command("report", rich_help_panel=STUDYING)
def report_command(
    folder: Annotated[
        Path,
        Argument(
            metavar="DIR",
            help="The folder of an analysis, a sweep or a comparison.",
            rich_help_panel=OUTPUT,
        ),
    ],
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            metavar="FILE",
            help="The HTML file, which is replaced if it exists. By default it lies in DIR.",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the page of an analysis, a sweep or a comparison again, as one HTML file."""
    from lean_merge.studies.pages import render

    page = render(folder, out)
    if not quiet:
        echo(str(page))
