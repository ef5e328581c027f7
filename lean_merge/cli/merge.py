"""The commands merge, plan and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from lean_merge.cli.app import COMMAND, EXIT_DIFFERENT, app, echo
from lean_merge.cli.helping import MERGING, OUTPUT, RUN
from lean_merge.cli.options import (
    Cuda,
    Debug,
    Device,
    FromAnalysis,
    Json,
    Memory,
    NoResume,
    Quiet,
    Threads,
    Vram,
    option,
    refuse_ignored,
    resources_of,
    shares_options_of_work,
    work_of,
)
from lean_merge.cli.progress import LINE
from lean_merge.errors import RecipeError

if TYPE_CHECKING:
    from lean_merge.engine import EarlyLook
    from lean_merge.plan import Plan
    from lean_merge.plan.resources import Resources
    from lean_merge.recipe import MergeRecipe


@app.command("merge", rich_help_panel=MERGING)
@shares_options_of_work
def merge_command(
    work: dict[str, Any],
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            metavar="DIR",
            help="The folder that the output is written to. --output none can do without one.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        option(
            OUTPUT,
            "--overwrite",
            help="Replace the model in the folder, once the new one is complete.",
        ),
    ] = False,
    analysis: FromAnalysis = None,
    no_resume: NoResume = False,
    dry_run: Annotated[
        bool,
        option(
            RUN, "--dry-run", help="Print the plan and write nothing, as `lean-merge plan` does."
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge models into a checkpoint that from_pretrained loads, or an adapter that PEFT loads.

    A merge that was interrupted goes on where it stopped when the same command is given again. If
    the output is complete already, there is nothing to do.
    """
    if out is None and work["recipe"] is None and work["output"] != "none" and not dry_run:
        raise RecipeError("Missing --out, the output folder; or give --output none.")
    _refuse_without_folder(out, overwrite=overwrite, no_resume=no_resume)
    recipe, resources = work_of(**work)
    from lean_merge.cli import describe
    from lean_merge.cli.progress import progress
    from lean_merge.cli.warnings import Warnings
    from lean_merge.merge import check_has_folder, merge

    if dry_run:
        plan = _planned(recipe, resources, analysis, quiet=quiet)
        _show_plan(plan, out, overwrite=overwrite, resume=not no_resume, json_=as_json, quiet=quiet)
        return
    check_has_folder(recipe, out)
    plan = _planned(recipe, resources, analysis, quiet=quiet)
    told = Warnings(quiet or as_json)
    told.tell(describe.warnings_of(plan))
    with progress(plan, quiet, told.warn) as shown:
        result = merge(
            plan,
            out,
            overwrite=overwrite,
            resume=not no_resume,
            on_event=shown,
        )
    if not (quiet or as_json) and result.was_complete:
        echo(f"{result.path} is complete already; there is nothing to do.", err=True)
    elif not (quiet or as_json) and result.reused:
        echo(f"{result.reused} of {len(plan.tasks)} tensors were on the disk already.", err=True)
    if as_json:
        echo(json.dumps(result.report))
    elif not quiet:
        told.tell(result.report["warnings"])
        echo(describe.result_text(result.path, result.report, plan))


def _refuse_without_folder(out: Path | None, **options: bool) -> None:
    if out is None:
        refuse_ignored(options, options, "no output folder")


def _planned(
    recipe: MergeRecipe, resources: Resources, analysis: Path | None, *, quiet: bool
) -> Plan:
    """Read the headers of all models and plan the merge."""
    from lean_merge.checkpoints import downloads_shown
    from lean_merge.outputs.recorded import open_analysis
    from lean_merge.plan import plan

    LINE.begin("reading the headers of all models", ticks=False)
    with downloads_shown(not quiet):
        opened = open_analysis(analysis.expanduser()) if analysis else None
        return plan(recipe, resources, analysis=opened)


@app.command("plan", rich_help_panel=MERGING)
@shares_options_of_work
def plan_command(
    work: dict[str, Any],
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            metavar="DIR",
            help="Check that a merge could write to this folder. Nothing is written.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        option(OUTPUT, "--overwrite", help="Check as `merge --overwrite` would, which replaces."),
    ] = False,
    analysis: FromAnalysis = None,
    no_resume: NoResume = False,
    look: Annotated[
        bool,
        option(
            RUN,
            "--look",
            help="Read a few rows of every model too, as a merge does first: say whether the "
            "models belong together, and what rounding will keep.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what a merge would do, and what memory and disk it takes, from headers alone."""
    _refuse_without_folder(out, overwrite=overwrite, no_resume=no_resume)
    plan = _planned(*work_of(**work), analysis, quiet=quiet)
    seen = None
    if look:
        from lean_merge.engine import early_look

        LINE.begin("looking at a few rows of every model")
        seen = early_look(plan, refuse=False)
    _show_plan(
        plan,
        out,
        overwrite=overwrite,
        resume=not no_resume,
        json_=as_json,
        quiet=quiet,
        seen=seen,
    )


def _show_plan(
    plan: Plan,
    out: Path | None,
    *,
    overwrite: bool,
    resume: bool,
    json_: bool,
    quiet: bool,
    seen: EarlyLook | None = None,
) -> None:
    """Check the output folder, if there is one, and print the plan."""
    from lean_merge.cli import describe
    from lean_merge.cli.nextsteps import after_plan, next_lines
    from lean_merge.plan.runfacts import run_facts
    from lean_merge.store.beforehand import check_output

    if out is not None:
        check_output(
            out,
            plan.shards,
            inputs=plan.inputs,
            overwrite=overwrite,
            run=run_facts(plan, out),
            resume=resume,
            disk=plan.prediction.disk,
        )
    LINE.rest()
    if json_ and not quiet:
        echo(json.dumps(describe.plan_dict(plan, seen)))
    elif not quiet:
        steps = after_plan(COMMAND[1:], has_out=out is not None)
        echo("\n".join([describe.plan_text(plan, seen), *next_lines(steps)]))


@app.command("verify", rich_help_panel=MERGING)
def verify_command(
    out: Annotated[
        Path,
        Argument(metavar="DIR", help="The folder of a complete output.", rich_help_panel=OUTPUT),
    ],
    full: Annotated[
        bool, option(RUN, "--full", help="Merge all weights again, instead of a sample.")
    ] = False,
    seed: Annotated[
        int | None,
        option(
            RUN,
            metavar="NUMBER",
            help="The seed by which the sample is drawn. By default it differs each time.",
        ),
    ] = None,
    without_inputs: Annotated[
        bool,
        option(
            RUN,
            "--without-inputs",
            help="Do not read the merged models, and compare with the output's journal alone.",
        ),
    ] = False,
    device: Device = "auto",
    cuda: Cuda = False,
    memory: Memory = None,
    vram: Vram = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Read an output again, all of it, and say what differs from what was written.

    Every file is compared with the journal, and every tensor out of scope with the MLLM's. A sample
    of the others, a twentieth but at least 8, is merged again. The exit code is 3 if anything
    differs.
    """
    if without_inputs:
        given = {"full": full, "seed": seed, "memory": memory, "vram": vram, "cuda": cuda}
        refuse_ignored(given, given, "--without-inputs, which merges nothing again")
    resources = resources_of(device, memory, vram, threads, cuda=cuda)
    from lean_merge.cli import describe
    from lean_merge.verify import verify

    result = verify(out, full=full, seed=seed, with_inputs=not without_inputs, resources=resources)
    if as_json:
        echo(json.dumps(describe.verification_dict(result)))
    elif not (quiet and result.ok):
        echo(describe.verification_text(result))
    return 0 if result.ok else EXIT_DIFFERENT
