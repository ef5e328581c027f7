"""An analysis from recipe to sealed folder: the engine without a merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lean_merge import memory
from lean_merge.analysis import ANALYSIS, Analysis, build_analysis, open_analysis
from lean_merge.api import RECIPE, check_unchanged
from lean_merge.engine.evidence import EvidenceSink
from lean_merge.engine.run import Event, run
from lean_merge.identity import run_facts
from lean_merge.output import FactorStore, OutputFolder, find_complete, write_factors
from lean_merge.plan import Plan, plan_analysis
from lean_merge.recipe import MergeRecipe
from lean_merge.rendering import REPORT, add_page
from lean_merge.report import to_json
from lean_merge.resources import Resources


@dataclass(frozen=True, slots=True)
class AnalysisResult:
    """A finished analysis: its folder, and what it holds.

    `was_complete` tells that it was there already and nothing was done; `page` is its report, None
    where plotly is not installed.
    """

    path: Path
    analysis: Analysis
    was_complete: bool = False
    page: Path | None = None


def analyze(
    work: MergeRecipe | Plan,
    out: str | Path,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    resume: bool = True,
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
        Take a complete analysis of the same for done.
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
                return _shown(complete, was_complete=True)
        with OutputFolder.create(
            final, (), inputs=plan.inputs, overwrite=overwrite, run=facts, resume=resume
        ) as folder:
            with FactorStore(folder.path) as store:
                sink = EvidenceSink(store)
                result = run(plan, sink, on_event or (lambda event: None))
                with result.timed("write"):
                    tensors = [t for entry in sink.entries.values() for t in entry.tensors]
                    shard = write_factors(folder, store, tensors)
            sampler.sample()
            check_unchanged(plan, final, facts)
            document = build_analysis(
                plan,
                result,
                {name: entry.evidence for name, entry in sink.entries.items()},
                facts=facts,
                bytes_written=shard.size,
                peak=sampler.peak,
                baseline=baseline,
            )
            folder.write_file(RECIPE, plan.recipe.to_yaml().encode())
            folder.write_file(ANALYSIS, to_json(document))
            folder.seal()
    return _shown(folder.final, was_complete=False)


def _shown(folder: Path, *, was_complete: bool) -> AnalysisResult:
    """A complete analysis with its report, which may be missing or of another version's making."""
    analysis = open_analysis(folder)
    page = add_page(REPORT, folder, analysis.document)
    return AnalysisResult(folder, analysis, was_complete=was_complete, page=page)


def analysis_facts(plan: Plan, out: Path) -> dict[str, object]:
    """The `run` of an analysis's journal: no merge of the same recipe is mistaken for it."""
    return {**run_facts(plan, out), "kind": "an analysis"}
