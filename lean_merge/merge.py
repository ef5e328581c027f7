"""The merge from recipe to sealed output, for the command line and for Python alike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lean_merge import memory
from lean_merge.checkpoints import safetensors_dtype
from lean_merge.checkpoints.jsonfile import read_object, to_json
from lean_merge.engine.run import Event, RunResult, run, steps
from lean_merge.errors import RecipeError
from lean_merge.outputs.adapter import AdapterSink
from lean_merge.outputs.base import Sink
from lean_merge.outputs.peft import write_adapter
from lean_merge.outputs.recorded import Analysis, open_analysis
from lean_merge.outputs.sinks import BlockSink, CheckpointSink, TensorSink
from lean_merge.plan import DECODED_DTYPE, Plan, plan_stream
from lean_merge.plan import plan as make_plan
from lean_merge.plan.identity import check_unchanged, run_facts
from lean_merge.plan.resources import Resources
from lean_merge.recipe import MergeRecipe
from lean_merge.report import RECIPE, REPORT, adapter_summary, build_report, summary
from lean_merge.store import (
    OutputFolder,
    adapter_card,
    copy_side_files,
    find_complete,
    license_of,
    model_card,
)
from lean_merge.studies.analyze import analyze

_MAX_REPORT = 1 << 30


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: where it is, None if nothing was written, and its report.

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
    analysis: str | Path | Analysis | None = None,
    resources: Resources | None = None,
    overwrite: bool = False,
    resume: bool = True,
    on_event: Callable[[Event], None] | None = None,
) -> MergeResult:
    """Merge, and write what the recipe's `output` says.

    That is a checkpoint that `from_pretrained` loads, an adapter that PEFT loads, or with `none`
    the report alone, into `out` if there is one.

    Onto the unfinished output of the same merge it goes on where that stopped; onto the complete
    one there is nothing to do.

    Parameters
    ----------
    work
        A recipe, or a plan of one.
    out
        Output folder. Until the last rename it is visibly unfinished.
    analysis
        Of the same inputs, or its folder, to decide from; for a recipe, a plan has its own. What it
        lacks is looked at again, and the report says how much and why.
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
    if isinstance(work, Plan) and (resources is not None or analysis is not None):
        raise RecipeError("A plan has its resources and analysis; give others when it is made.")
    check_has_folder(work.recipe if isinstance(work, Plan) else work, out)
    with memory.PeakSampler() as sampler:
        baseline = sampler.peak
        plan = work if isinstance(work, Plan) else _planned(work, resources, analysis)
        if out is None:
            if not plan.is_settled:
                raise RecipeError(
                    "threshold: auto keeps its evidence on the disk; give a folder with --out, or "
                    "an analysis with --analysis."
                )
            return MergeResult(None, _merge(plan, None, sampler, baseline, on_event))
        folder_path = Path(out)
        facts = run_facts(plan, folder_path)
        if resume:
            complete = find_complete(folder_path, plan.shards, inputs=plan.inputs, run=facts)
            if complete is not None:
                report = read_report(complete)
                return MergeResult(complete, report, reused=len(plan.tasks), was_complete=True)
        with OutputFolder.create(
            folder_path,
            plan.shards,
            inputs=plan.inputs,
            overwrite=overwrite,
            run=facts,
            resume=resume,
            disk=plan.prediction.disk,
        ) as folder:
            reused = len(folder.finished) or len(folder.blocks.groups)
            if not plan.is_settled:
                plan = _settled(plan, folder)
            report = _merge(plan, folder, sampler, baseline, on_event)
            check_unchanged(plan, folder_path, facts)
            write_companions(plan, folder, report)
            folder.seal()
    return MergeResult(folder.final, report, reused=reused)


def _settled(plan: Plan, folder: OutputFolder) -> Plan:
    """The plan with the thresholds that an analysis finds, inside the unfinished output.

    It goes when that is sealed; a merge that was interrupted takes it up again.
    """
    resources = Resources(plan.device, plan.memory, plan.vram or None, plan.threads)
    own = analyze(plan.recipe, folder.own_analysis(), resources=resources, page=False)
    found = make_plan(plan.recipe, resources, analysis=replace(own.analysis, own=True))
    assert found.evidence is not None
    folder.note_analysis(found.evidence.identity)
    return found


def _planned(
    recipe: MergeRecipe, resources: Resources | None, analysis: str | Path | Analysis | None
) -> Plan:
    opened = open_analysis(analysis) if isinstance(analysis, (str, Path)) else analysis
    return make_plan(recipe, resources, analysis=opened)


def _merge(
    plan: Plan,
    folder: OutputFolder | None,
    sampler: memory.PeakSampler,
    baseline: memory.Usage,
    on_event: Callable[[Event], None] | None,
) -> dict[str, Any]:
    """Run the plan into the sink of its output; the report."""
    result = _carry_out(plan, folder, on_event or (lambda event: None))
    sampler.sample()
    return build_report(
        plan,
        result,
        bytes_written=0 if folder is None else sum(shard.size for shard in folder.shards),
        peak=sampler.peak,
        baseline=baseline,
    )


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a complete output. Raises CheckpointError."""
    return read_object(
        folder / REPORT,
        limit=_MAX_REPORT,
        what="the report",
        mend="merge again with --overwrite --no-resume",
    )


def check_has_folder(recipe: MergeRecipe, out: str | Path | None) -> None:
    """Raises RecipeError if the recipe's output needs a folder and there is none."""
    if out is None and recipe.output != "none":
        raise RecipeError(
            f"Output {recipe.output} needs a folder; give one with --out, or --output none."
        )


def stream(
    recipe: MergeRecipe, *, resources: Resources | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Merge in memory: the name and the finished tensor of everything that the MLLM holds.

    They come under the MLLM's own names, in the order of its files, each as it is made. A tensor is
    on the CPU, in memory of its own, and the caller's from then on: `resources.memory` covers what
    the engine holds beside it, one tensor in the making included. Nothing is written. Leaving the
    loop early, or closing the iterator, ends the merge.

    Parameters
    ----------
    recipe
        With output `checkpoint`, whose tensors these are, byte for byte.
    resources
        Device, memory and threads.

    Raises
    ------
    LeanMergeError
        What headers tell at once, the rest when the tensor's turn comes.
    """
    return _tensors(plan_stream(recipe, resources))


def _tensors(plan: Plan) -> Generator[tuple[str, Tensor], None, None]:
    sink = TensorSink()
    with closing(steps(plan, sink, RunResult())) as events:
        for event in events:
            yield event.name, sink.take()


def _carry_out(
    plan: Plan, folder: OutputFolder | None, on_event: Callable[[Event], None]
) -> RunResult:
    """The plan into the sink of its output."""
    if folder is None:
        return run(plan, Sink(), on_event)
    if plan.recipe.output == "none":
        return run(plan, BlockSink(folder), on_event)
    if plan.recipe.output == "checkpoint":
        return run(plan, CheckpointSink(plan.shards, folder), on_event)
    sink = AdapterSink(plan, folder)
    result = run(plan, sink, on_event)
    with result.timed("write"):
        write_adapter(
            folder,
            sink.modules(),
            dtype=plan.adapter_dtype,
            base_model=plan.recipe.mllm_model,
        )
    return result


def write_companions(plan: Plan, folder: OutputFolder, report: dict[str, Any]) -> None:
    """Recipe, report and card; beside a checkpoint the MLLM's side files too."""
    recipe = plan.recipe
    about: dict[str, Any] = {
        "recipe_yaml": recipe.to_yaml(),
        "base": recipe.base_model,
        "mllm": recipe.mllm_model,
        "experts": [expert.model for expert in recipe.experts],
        "license_fields": license_of(plan.mllm.path),
    }
    if recipe.output == "checkpoint":
        dtype = None if recipe.out_dtype == "auto" else recipe.out_dtype
        decoded = safetensors_dtype(DECODED_DTYPE) if plan.mllm.scales else None
        copy_side_files(plan.mllm.path, folder, out_dtype=dtype, decoded=decoded)
        card = model_card(**about, summary=summary(report))
        folder.write_file("README.md", card.encode())
    elif recipe.output == "lora":
        card = adapter_card(**about, summary=adapter_summary(report))
        folder.write_file("README.md", card.encode())
    folder.write_file(RECIPE, recipe.to_yaml().encode())
    folder.write_file(REPORT, to_json(report))
