"""The command prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lean_merge.checkpoints import downloads_shown
from lean_merge.cli import describe
from lean_merge.cli.app import app, echo, progress
from lean_merge.cli.options import (
    AllowPartial,
    AllowTextMllm,
    Debug,
    Device,
    Exclude,
    Force,
    Include,
    Json,
    Memory,
    NoResume,
    Quiet,
    Seed,
    ShardSize,
    Threads,
    Vram,
    resources_of,
)
from lean_merge.errors import RecipeError
from lean_merge.outputs.priorsettings import AUTO_SHARE, PriorSettings
from lean_merge.sizes import format_size
from lean_merge.studies.prior import make_prior, plan_prior, prior_recipe


@app.command("prior")
def prior_command(
    mllm: Annotated[str, typer.Option(help="The MLLM that is fine-tuned: a folder or hub id.")],
    expert: Annotated[
        list[str], typer.Option(help="An expert LLM that draws it; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the prior.")],
    base: Annotated[
        str | None, typer.Option(help="The base LLM, for --difference expert-base.")
    ] = None,
    difference: Annotated[
        str, typer.Option(help="What D is: expert-mllm or expert-base.")
    ] = "expert-mllm",
    weight: Annotated[
        list[float] | None,
        typer.Option(help="The factor of an expert's difference; once for each expert."),
    ] = None,
    rank: Annotated[
        str,
        typer.Option(help=f"A rank; auto, which keeps {AUTO_SHARE:.0%} of D's energy; or full."),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Store it as float32, bfloat16 or float8_e4m3fn.")
    ] = "bfloat16",
    include: Include = None,
    exclude: Exclude = None,
    shard_size: ShardSize = None,
    seed: Seed = None,
    allow_partial: AllowPartial = False,
    allow_text_mllm: AllowTextMllm = False,
    force: Force = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder once the new one is complete.")
    ] = False,
    no_resume: NoResume = False,
    device: Device = "auto",
    memory: Memory = None,
    vram: Vram = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Keep the difference between expert and MLLM, along which DRIFT pulls a fine-tuning.

    Models are streamed as in a merge, and an interrupted run goes on where it stopped.
    """
    wanted: dict[str, Any] = {
        "include": include,
        "exclude": exclude,
        "shard_size": shard_size,
        "seed": seed,
        "allow_partial": allow_partial or None,
        "allow_text_mllm": allow_text_mllm or None,
        "force": force or None,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    settings = PriorSettings(difference, _rank(rank), dtype)
    recipe = prior_recipe(
        mllm, expert, base=base, weights=weight or (), difference=difference, **given
    )
    with downloads_shown(not quiet):
        plan = plan_prior(recipe, settings, resources_of(device, memory, vram, threads))
    if not (quiet or as_json):
        for line in describe.warnings_of(plan):
            echo(f"warning: {line}", err=True)
    with progress(plan, quiet) as on_event:
        result = make_prior(plan, out, overwrite=overwrite, resume=not no_resume, on_event=on_event)
    if as_json:
        echo(json.dumps(result.report))
    elif not quiet:
        if result.was_complete:
            echo(f"{result.path} is complete already; there is nothing to do.", err=True)
        echo(_text(result.path, result.report))


def _rank(text: str) -> int | str:
    if text in ("auto", "full"):
        return text
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"--rank must be auto, full or a whole number, not {text!r}.") from None


def _text(path: Path, report: dict[str, Any]) -> str:
    """Return a text that says what a prior holds."""
    facts = report["prior"]
    ranks = f", ranks {facts['least_rank']} to {facts['largest_rank']}"
    lines = [
        f"{path}: {facts['weights']} weights{ranks if facts['largest_rank'] else ''}, "
        f"{facts['kept']:.1%} of D's energy kept (least {facts['least_kept']:.1%}), "
        f"{format_size(report['bytes']['written'])}",
        f"D is {facts['relative']:.2%} of the weights' norm" if facts["relative"] else "",
        f"{sum(report['seconds'].values()):.1f} s, {format_size(report['bytes']['read'])} read, "
        f"peak memory {format_size(report['memory']['peak_anonymous'])}",
        *(f"warning: {line}" for line in report["warnings"]),
    ]
    return "\n".join(line for line in lines if line)
