"""The merge from recipe to sealed output, for the command line and for Python alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge import memory
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.engine.run import Event, run
from lean_merge.engine.sinks import CheckpointSink
from lean_merge.errors import CheckpointError, RecipeError
from lean_merge.identity import inputs, run_facts
from lean_merge.output import (
    OutputFolder,
    changed_input,
    copy_side_files,
    find_complete,
    license_of,
    model_card,
)
from lean_merge.plan import Plan, Resources
from lean_merge.plan import plan as make_plan
from lean_merge.recipe import MergeRecipe
from lean_merge.report import REPORT, build_report, summary, to_json

RECIPE = "lean_merge_recipe.yml"
_MAX_REPORT = 1 << 30


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: where it is, and its report.

    `reused` is how many tensors an interrupted run had written; `was_complete` tells that the
    output was there already and nothing was done.
    """

    path: Path
    report: dict[str, Any]
    reused: int = 0
    was_complete: bool = False


def merge(
    work: MergeRecipe | Plan,
    out: str | Path,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    resume: bool = True,
    on_event: Callable[[Event], None] | None = None,
) -> MergeResult:
    """Merge, and write a checkpoint that `from_pretrained` loads.

    Onto the unfinished output of the same merge it goes on where that stopped; onto the complete
    one there is nothing to do.

    Parameters
    ----------
    work
        A recipe, or a plan of one.
    out
        Output folder. Until the last rename it is visibly unfinished.
    resources
        Device, memory and threads, for a recipe; a plan has its own.
    overwrite
        Replace what `out` holds, once the new is complete.
    resume
        Use what an interrupted run left; else it is removed, and all is written anew.
    on_event
        Called after each tensor is written.

    Raises
    ------
    LeanMergeError
        One of its subclasses; nothing that existed is lost.
    """
    if isinstance(work, Plan) and resources is not None:
        raise RecipeError("A plan has its resources; give others when it is made.")
    with memory.PeakSampler() as sampler:
        baseline = sampler.peak
        plan = work if isinstance(work, Plan) else make_plan(work, resources)
        facts = run_facts(plan, Path(out))
        if resume:
            complete = find_complete(Path(out), plan.shards, inputs=plan.inputs, run=facts)
            if complete is not None:
                report = read_report(complete)
                return MergeResult(complete, report, reused=len(plan.tasks), was_complete=True)
        with OutputFolder.create(
            Path(out),
            plan.shards,
            inputs=plan.inputs,
            overwrite=overwrite,
            run=facts,
            resume=resume,
        ) as folder:
            reused = len(folder.finished)
            sink = CheckpointSink(plan, folder)
            result = run(plan, sink, on_event or (lambda event: None))
            check_unchanged(plan, Path(out), facts)
            sampler.sample()
            report = build_report(
                plan,
                result,
                bytes_written=sum(shard.size for shard in folder.shards),
                peak=sampler.peak,
                baseline=baseline,
            )
            write_companions(plan, folder, report)
            folder.seal()
    return MergeResult(folder.final, report, reused=reused)


def check_unchanged(plan: Plan, out: Path, facts: dict[str, Any]) -> None:
    """Raise CheckpointError if an input is not what it was when the merge began."""
    now = inputs(plan, out)
    if now != facts["inputs"]:
        change = changed_input(facts["inputs"], now)
        raise CheckpointError(
            f"{out}: is not sealed, because {change}, while it was read; merge again with "
            "--no-resume once nothing changes it any more."
        )


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a complete output. Raises CheckpointError."""
    return read_object(
        folder / REPORT,
        limit=_MAX_REPORT,
        what="the report",
        mend="merge again with --overwrite --no-resume",
    )


def write_companions(plan: Plan, folder: OutputFolder, report: dict[str, Any]) -> None:
    """Side files of the MLLM, recipe, report and model card."""
    recipe = plan.recipe
    dtype = None if recipe.out_dtype == "auto" else recipe.out_dtype
    copy_side_files(plan.mllm.path, folder, out_dtype=dtype)
    card = model_card(
        recipe_yaml=recipe.to_yaml(),
        base=recipe.base_model,
        mllm=recipe.mllm_model,
        experts=[expert.model for expert in recipe.experts],
        license_fields=license_of(plan.mllm.path),
        summary=summary(report),
    )
    folder.write_file("README.md", card.encode())
    folder.write_file(RECIPE, recipe.to_yaml().encode())
    folder.write_file(REPORT, to_json(report))
