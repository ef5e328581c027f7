"""An analysis from recipe to sealed folder: the engine without a merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lean_merge import memory
from lean_merge.checkpoints.jsonfile import to_json
from lean_merge.engine.run import Event, run
from lean_merge.outputs.document import ANALYSIS, build_analysis
from lean_merge.outputs.evidence import EvidenceSink, gathered_evidence, gathered_factors
from lean_merge.outputs.factors import write_factors
from lean_merge.outputs.recorded import Analysis, open_analysis
from lean_merge.plan import Plan, plan_analysis
from lean_merge.plan.identity import check_unchanged, run_facts
from lean_merge.plan.resources import Resources
from lean_merge.recipe import MergeRecipe
from lean_merge.report import RECIPE
from lean_merge.store import OutputFolder, find_complete
from lean_merge.studies.pages import add_page


@dataclass(frozen=True, slots=True)
class AnalysisResult:
    """A finished analysis: its folder, and what it holds.

    `reused` is how many tensors an interrupted run had analysed; `was_complete` tells that it was
    there already and nothing was done; `page` is its report, None where plotly is not installed.
    """

    path: Path
    analysis: Analysis
    reused: int = 0
    was_complete: bool = False
    page: Path | None = None


def analyze(
    work: MergeRecipe | Plan,
    out: str | Path,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    resume: bool = True,
    page: bool = True,
    on_event: Callable[[Event], None] | None = None,
) -> AnalysisResult:
    """Look at every weight once, and keep what merges are decided from; no weight is written.

    Parameters
    ----------
    work
        A recipe, or a plan of `plan_analysis`. What the recipe says of rank, svd, nuclear,
        temperature and importance decides how much is gathered; threshold, scale and stages only
        what the report says.
    out
        Folder. Until the last rename it is visibly unfinished.
    resources
        Device, memory and threads, for a recipe; a plan has its own.
    overwrite
        Replace what `out` holds, once the new is complete.
    resume
        Use what an interrupted run left; else it is removed.
    page
        Make its report too, where plotly is installed.
    on_event
        Called after each weight.

    Raises
    ------
    LeanMergeError
        One of its subclasses; nothing that existed is lost.
    """
    final = Path(out)
    with memory.PeakSampler() as sampler:
        baseline = sampler.peak
        plan = work if isinstance(work, Plan) else plan_analysis(work, resources)
        facts = analysis_facts(plan, final)
        if resume:
            complete = find_complete(final, (), inputs=plan.inputs, run=facts)
            if complete is not None:
                return _opened(complete, page=page, was_complete=True)
        with OutputFolder.create(
            final,
            (),
            inputs=plan.inputs,
            overwrite=overwrite,
            run=facts,
            resume=resume,
            disk=plan.prediction.disk,
        ) as folder:
            reused = len(folder.blocks.groups)
            result = run(plan, EvidenceSink(folder), on_event or (lambda event: None))
            with result.timed("write"):
                shard = write_factors(folder, gathered_factors(folder, plan.weights))
            sampler.sample()
            check_unchanged(plan, final, facts)
            document = build_analysis(
                plan,
                result,
                gathered_evidence(folder, plan.weights),
                facts=facts,
                bytes_written=shard.size,
                peak=sampler.peak,
                baseline=baseline,
            )
            folder.write_file(RECIPE, plan.recipe.to_yaml().encode())
            folder.write_file(ANALYSIS, to_json(document))
            folder.seal()
    return _opened(folder.final, page=page, reused=reused)


def _opened(
    folder: Path, *, page: bool, reused: int = 0, was_complete: bool = False
) -> AnalysisResult:
    """A complete analysis; its report may be missing, or of another version's making."""
    analysis = open_analysis(folder)
    report = add_page("analysis", folder, analysis.document) if page else None
    return AnalysisResult(folder, analysis, reused, was_complete, report)


def analysis_facts(plan: Plan, out: Path) -> dict[str, object]:
    """The `run` of an analysis's journal: no merge of the same recipe is mistaken for it."""
    return {**run_facts(plan, out), "kind": "an analysis"}
