"""The commands merge, plan and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lean_merge.checkpoints import downloads_shown
from lean_merge.cli import describe
from lean_merge.cli.app import EXIT_DIFFERENT, app, echo, progress
from lean_merge.cli.options import (
    Debug,
    Device,
    FromAnalysis,
    Json,
    Memory,
    NoResume,
    Quiet,
    Threads,
    Vram,
    resources_of,
    shares_options_of_work,
    work_of,
)
from lean_merge.errors import RecipeError
from lean_merge.merge import check_has_folder
from lean_merge.merge import merge as merge_api
from lean_merge.outputs import output_of
from lean_merge.outputs.recorded import open_analysis
from lean_merge.plan import plan as make_plan
from lean_merge.plan.runfacts import run_facts
from lean_merge.store import check_output
from lean_merge.verify import verify


@app.command("merge")
@shares_options_of_work
def merge_command(
    work: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="The output folder, which --output none does not need.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output once the new one is complete.")
    ] = False,
    analysis: FromAnalysis = None,
    no_resume: NoResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge, and write a checkpoint that from_pretrained loads, or an adapter that PEFT loads.

    A merge that was interrupted goes on where it stopped. If the output is complete already, there
    is nothing to do.
    """
    wanted = work["output"]
    needs_folder = wanted is None or output_of(wanted).needs_folder
    if out is None and work["recipe"] is None and needs_folder:
        raise RecipeError("Missing --out, the output folder; or give --output none.")
    recipe, resources = work_of(**work)
    check_has_folder(recipe, out)
    with downloads_shown(not quiet):
        plan = make_plan(recipe, resources, analysis=open_analysis(analysis) if analysis else None)
    if not (quiet or as_json):
        for line in describe.warnings_of(plan):
            echo(f"warning: {line}", err=True)
    with progress(plan, quiet) as on_event:
        result = merge_api(plan, out, overwrite=overwrite, resume=not no_resume, on_event=on_event)
    if not (quiet or as_json) and result.was_complete:
        echo(f"{result.path} is complete already; there is nothing to do.", err=True)
    elif not (quiet or as_json) and result.reused:
        echo(f"{result.reused} of {len(plan.tasks)} tensors were on the disk already.", err=True)
    if as_json:
        echo(json.dumps(result.report))
    elif not quiet:
        echo(describe.result_text(result.path, result.report))


@app.command("plan")
@shares_options_of_work
def plan_command(
    work: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="Check that this folder could be written, but leave it.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Allow that the folder is not empty.")
    ] = False,
    analysis: FromAnalysis = None,
    no_resume: NoResume = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what would be merged and copied, and what it would take, from headers alone."""
    with downloads_shown(not quiet):
        plan = make_plan(*work_of(**work), analysis=open_analysis(analysis) if analysis else None)
    if out is not None:
        check_output(
            out,
            plan.shards,
            inputs=plan.inputs,
            overwrite=overwrite,
            run=run_facts(plan, out),
            resume=not no_resume,
            disk=plan.prediction.disk,
        )
    if quiet:
        return
    echo(json.dumps(describe.plan_dict(plan)) if as_json else describe.plan_text(plan))


@app.command("verify")
def verify_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a complete output.")],
    full: Annotated[
        bool, typer.Option("--full", help="Merge all weights again, instead of a sample.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="The seed of the sample; by default it differs each time.")
    ] = None,
    without_inputs: Annotated[
        bool, typer.Option("--without-inputs", help="Compare with the journal alone.")
    ] = False,
    device: Device = "auto",
    memory: Memory = None,
    vram: Vram = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Read all of an output again, and say what differs. The exit code is 3 if anything does.

    Every file is compared with the journal, tensors out of scope with the MLLM's, and a sample of
    the others is merged again: a twentieth, but at least 8.
    """
    result = verify(
        out,
        full=full,
        seed=seed,
        with_inputs=not without_inputs,
        resources=resources_of(device, memory, vram, threads),
    )
    if as_json:
        echo(json.dumps(describe.verification_dict(result)))
    elif not (quiet and result.ok):
        echo(describe.verification_text(result))
    return 0 if result.ok else EXIT_DIFFERENT
