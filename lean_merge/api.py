"""The merge from recipe to sealed output, for the command line and for Python alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge import memory
from lean_merge.engine.run import Event, run
from lean_merge.errors import RecipeError
from lean_merge.output import OutputFolder, copy_side_files, license_of, model_card
from lean_merge.plan import Plan, Resources
from lean_merge.plan import plan as make_plan
from lean_merge.recipe import MergeRecipe
from lean_merge.report import REPORT, build_report, summary, to_json

RECIPE = "lean_merge_recipe.yml"


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge: where it is, and its report."""

    path: Path
    report: dict[str, Any]


def merge(
    work: MergeRecipe | Plan,
    out: str | Path,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> MergeResult:
    """Merge, and write a checkpoint that `from_pretrained` loads.

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
        with OutputFolder.create(
            Path(out), plan.shards, inputs=plan.inputs, overwrite=overwrite
        ) as folder:
            result = run(plan, folder, on_event or (lambda event: None))
            headers = sum(len(shard.header) for shard in plan.shards)
            sampler.sample()
            report = build_report(
                plan,
                result,
                bytes_written=folder.bytes_written + headers,
                peak=sampler.peak,
                baseline=baseline,
            )
            write_companions(plan, folder, report)
            folder.seal()
    return MergeResult(path=folder.final, report=report)


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
