"""analyze: what a merge would do, before any is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lean_merge import describe
from lean_merge.analysing import analyze
from lean_merge.checkpoints import downloads_shown
from lean_merge.cli.app import app, echo, progress
from lean_merge.cli.options import (
    Debug,
    Json,
    NoResume,
    Quiet,
    shares_options_of_work,
    work_of,
)
from lean_merge.plan import plan_analysis


@app.command("analyze")
@shares_options_of_work
def analyze_command(
    work: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder of the analysis.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder once the new is complete.")
    ] = False,
    no_resume: NoResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look at every weight, and say what each threshold would select; no weight is written.

    merge --analysis decides from what is kept, at any threshold, temperature, stages and scale.
    """
    recipe, resources = work_of(**work)
    with downloads_shown(not quiet):
        plan = plan_analysis(recipe, resources)
    if not (quiet or as_json):
        for line in describe.warnings_of(plan):
            echo(f"warning: {line}", err=True)
    with progress(plan, quiet) as on_event:
        result = analyze(plan, out, overwrite=overwrite, resume=not no_resume, on_event=on_event)
    document = result.analysis.document
    if as_json:
        echo(json.dumps(describe.analysis_dict(result.path, document)))
    elif not quiet:
        if result.was_complete:
            echo(f"{result.path} is complete already; nothing to do.", err=True)
        echo(describe.analysis_text(result.path, document))
