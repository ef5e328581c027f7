"""Merge from a recipe to a sealed output, for the command line and for Python alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lean_merge import memory
from lean_merge.checkpoints.identity import check_unchanged
from lean_merge.checkpoints.jsonfile import read_object
from lean_merge.engine import CREW, Event, early_look, run
from lean_merge.errors import RecipeError
from lean_merge.linalg.settings import Computing
from lean_merge.outputs import (
    REPORT,
    Outcome,
    RecordedEvidence,
    evidence_kind,
    output_of,
)
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.plan.resources import Resources
from lean_merge.plan.runfacts import run_facts
from lean_merge.recipe import MergeRecipe
from lean_merge.report import build_report
from lean_merge.store import OutputFolder, find_complete

_MAX_REPORT = 1 << 30
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge, with its folder (None if nothing was written) and its report.

    `reused` is how many tensors an interrupted run had written; `was_complete` tells that the
    output was there already and nothing was done.
    """

    path: Path | None
    report: dict[str, Any]
    reused: int = 0
    was_complete: bool = False


def merge(
    work: MergeRecipe | Plan,
    out: str | Path | None = None,
    *,
    analysis: str | Path | RecordedEvidence | None = None,
    resources: Resources | None = None,
    overwrite: bool = False,
    resume: bool = True,
    on_event: OnEvent | None = None,
) -> MergeResult:
    """Merge, and write the kind of output that the recipe names.

    That is a checkpoint that `from_pretrained` loads, an adapter that PEFT loads, or with `none`
    the report alone, into `out` if there is one.

    If `out` holds the unfinished output of the same merge, that is continued; if it holds the
    complete one, nothing is done, unless it is to be overwritten or not to be resumed.

    Parameters
    ----------
    work
        A recipe, or a plan of one.
    out
        The output folder. Until the last rename it is visibly unfinished.
    analysis
        An analysis of the same inputs, or its folder, to decide from. It is given with a recipe; a
        plan has its own. Weights for which it lacks something are analysed again, and the report
        says how many and why.
    resources
        Device, memory and threads. They are given with a recipe; a plan has its own.
    overwrite
        Whether to replace what `out` holds, once the new output is complete.
    resume
        Whether to use the bytes of an interrupted run; else they are removed, and all is made anew.
    on_event
        A function that is called after each tensor is written, and before a threshold is found
        after each weight that is analysed for it.

    Raises
    ------
    LeanMergeError
        The error is of one of its subclasses. Nothing that existed is lost.
    """
    if isinstance(work, Plan) and (resources is not None or analysis is not None):
        raise RecipeError("A plan has its resources and analysis; give others when it is made.")
    check_has_folder(work.recipe if isinstance(work, Plan) else work, out)
    with memory.PeakSampler() as sampler:
        plan = work if isinstance(work, Plan) else _planned(work, resources, analysis)
        if out is None:
            return MergeResult(None, _without_folder(plan, sampler, on_event or _ignore))
        done = carry_out(
            plan, Path(out), sampler, overwrite=overwrite, resume=resume, on_event=on_event
        )
    report = done.report
    if report is None:
        report = read_report(done.path)
    return MergeResult(done.path, report, done.reused, was_complete=done.report is None)


@dataclass(frozen=True, slots=True)
class Made:
    """A complete output: its folder, how many tensors an earlier run made, and the report.

    The report is None if the output was complete already and nothing was done.
    """

    path: Path
    reused: int
    report: dict[str, Any] | None = None


def carry_out(
    plan: Plan,
    out: Path,
    sampler: memory.PeakSampler,
    *,
    overwrite: bool = False,
    resume: bool = True,
    on_event: OnEvent | None = None,
) -> Made:
    """Make the plan's output in the folder `out`, whichever kind it is.

    `sampler` is open, and was so when the plan was made. The other parameters, and what is raised,
    are those of `merge`.
    """
    how: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "on_event": on_event}
    if (crew := CREW.get()) is not None and not crew.at_work:
        return crew.together(plan, out, partial(carry_out, plan, out, sampler, **how))
    facts = run_facts(plan, out)
    if resume:
        complete = find_complete(
            out, plan.shards, inputs=plan.inputs, run=facts, overwrite=overwrite
        )
        if complete is not None:
            return Made(complete, len(plan.tasks))
    seen = early_look(plan, refuse=plan.output.refuses_strangers)
    with OutputFolder.create(
        out,
        plan.shards,
        inputs=plan.inputs,
        overwrite=overwrite,
        run=facts,
        resume=resume,
        disk=plan.prediction.disk,
    ) as folder:
        reused = len(folder.finished) or len(folder.blocks.groups)
        if not plan.is_settled:
            plan = _settled(plan, folder, on_event)
        result = run(plan, plan.output.sink(folder), on_event or _ignore)
        with result.timed("write"), Computing():
            plan.output.lay_out(folder, plan.weights)
        written = sum(shard.size for shard in folder.shards)
        report = build_report(plan, result, seen, bytes_written=written, sampler=sampler)
        plan.output.end(folder, Outcome(facts, report, result.weights))
        check_unchanged(plan.opened)
        folder.seal()
    return Made(folder.final, reused, report)


def _settled(plan: Plan, folder: OutputFolder, on_event: OnEvent | None) -> Plan:
    """Analyse inside the unfinished output, and return the plan with the thresholds found.

    The analysis is deleted when the output is sealed; until then, a merge that was interrupted
    uses it again.
    """
    resources = Resources(
        plan.device, plan.memory, plan.vram or None, plan.threads, plan.arrivals.disk
    )
    with memory.PeakSampler() as sampler:
        looking = make_plan(plan.recipe, resources, output=evidence_kind(), like=plan)
        made = carry_out(looking, folder.own_analysis(), sampler, on_event=on_event)
    own = evidence_kind().open(made.path, own=True)
    found = make_plan(plan.recipe, resources, analysis=own, like=plan)
    assert found.evidence is not None
    folder.note_analysis(found.evidence.identity)
    return found


def _without_folder(plan: Plan, sampler: memory.PeakSampler, on_event: OnEvent) -> dict[str, Any]:
    """Run a plan that needs no folder, and return its report."""
    if not plan.is_settled:
        raise RecipeError(
            "threshold: auto keeps its evidence on the disk; give a folder with --out, or "
            "an analysis with --analysis."
        )
    check_unchanged(plan.opened)
    seen = early_look(plan)
    result = run(plan, plan.output.sink(None), on_event)
    return build_report(plan, result, seen, bytes_written=0, sampler=sampler)


def _planned(
    recipe: MergeRecipe,
    resources: Resources | None,
    analysis: str | Path | RecordedEvidence | None,
) -> Plan:
    opened = evidence_kind().open(Path(analysis)) if isinstance(analysis, (str, Path)) else analysis
    return make_plan(recipe, resources, analysis=opened)


def _ignore(event: Event) -> None:
    del event


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report of a complete output. Raises CheckpointError."""
    return read_object(
        folder / REPORT,
        limit=_MAX_REPORT,
        what="the report",
        mend="merge again with --overwrite --no-resume",
    )


def check_has_folder(recipe: MergeRecipe, out: str | Path | None) -> None:
    """Raise RecipeError if the recipe's output needs a folder and there is none."""
    if out is None and output_of(recipe.output).needs_folder:
        raise RecipeError(
            f"Output {recipe.output} needs a folder; give one with --out, or --output none."
        )
