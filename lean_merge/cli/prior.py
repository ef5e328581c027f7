"""The command prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from lean_merge.cli.app import app, echo
from lean_merge.cli.helping import METHOD, MODELS, OUTPUT, STUDYING
from lean_merge.cli.options import (
    AllowPartial,
    AllowTextMllm,
    Debug,
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
    option,
    resources_of,
)
from lean_merge.errors import RecipeError


@app.command("prior", rich_help_panel=STUDYING)
def prior_command(
    mllm: Annotated[
        str,
        option(MODELS, metavar="MODEL", help="The MLLM to be fine-tuned: a folder or a hub id."),
    ],
    expert: Annotated[
        list[str],
        option(
            MODELS,
            metavar="MODEL",
            help="An expert LLM that the fine-tuning is drawn to. It may be repeated.",
        ),
    ],
    out: Annotated[
        Path, option(OUTPUT, metavar="DIR", help="The folder that the prior is written to.")
    ],
    base: Annotated[
        str | None,
        option(MODELS, metavar="MODEL", help="The base LLM, for --difference expert-base alone."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        option(
            METHOD,
            metavar="NUMBER",
            help="The factor of an expert's difference in the sum; once for each expert.",
        ),
    ] = None,
    difference: Annotated[
        str,
        option(METHOD, metavar="WORD", help="The difference D: expert-mllm or expert-base."),
    ] = "expert-mllm",
    rank: Annotated[
        str,
        option(
            METHOD,
            metavar="RANK",
            help="A rank to which D is cut; auto, for the smallest that keeps 90% of its squared "
            "norm; or full.",
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        option(
            OUTPUT,
            metavar="DTYPE",
            help="The dtype of the numbers in the files: float32, bfloat16 or float8_e4m3fn.",
        ),
    ] = "bfloat16",
    include: Include = None,
    exclude: Exclude = None,
    shard_size: ShardSize = None,
    seed: Seed = None,
    allow_partial: AllowPartial = False,
    allow_text_mllm: AllowTextMllm = False,
    force: Force = False,
    overwrite: Annotated[
        bool,
        option(
            OUTPUT,
            "--overwrite",
            help="Replace the prior in the folder, once the new one is complete.",
        ),
    ] = False,
    no_resume: NoResume = False,
    memory: Memory = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Keep the difference between expert and MLLM, along which DRIFT pulls a fine-tuning.

    Models are streamed as in a merge, and the same command goes on where it was interrupted. The
    class Drift of lean_merge.drift reads the prior while the MLLM is trained.
    """
    from lean_merge.checkpoints import downloads_shown
    from lean_merge.cli import describe
    from lean_merge.cli.progress import progress
    from lean_merge.outputs.priorsettings import PriorSettings
    from lean_merge.studies.prior import make_prior, plan_prior, prior_recipe

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
        plan = plan_prior(recipe, settings, resources_of("cpu", memory, None, threads))
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
    from lean_merge.sizes import format_size

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
