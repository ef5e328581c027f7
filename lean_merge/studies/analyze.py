"""Analyse the models of a recipe, and write the analysis and its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lean_merge import memory
from lean_merge.engine import CREW, Event
from lean_merge.merge import carry_out
from lean_merge.outputs.analysis import AnalysisOutput
from lean_merge.outputs.recorded import Analysis, open_analysis
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.plan.resources import Resources
from lean_merge.recipe import MergeRecipe
from lean_merge.studies.pages import add_page


@dataclass(frozen=True, slots=True)
class AnalysisResult:
    """A finished analysis: its folder, and what it holds.

    `reused` is how many tensors an interrupted run had analysed. `was_complete` tells that the
    analysis was there already, so that nothing was done. `page` is None where plotly is not
    installed.
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
    """Analyse every weight once, and keep the evidence from which merges are decided.

    Parameters
    ----------
    work
        A recipe, or a plan whose output is `AnalysisOutput`. What the recipe says of rank, svd,
        nuclear, temperature and importance decides how much is gathered; threshold, scale and
        stages decide only what the analysis says of selected weights.
    out
        The folder, which is visibly unfinished until the last rename.
    resources
        Device, memory and threads, for a recipe; a plan has its own.
    overwrite
        Replace what `out` holds, once the analysis is complete.
    resume
        Use what an interrupted run left, instead of removing it.
    page
        Write the page beside it too, where plotly is installed.
    on_event
        A function that is called after each weight.

    Raises
    ------
    LeanMergeError
        The models cannot be analysed, or the folder cannot be written; nothing that existed is
        lost.
    """
    with memory.PeakSampler() as sampler:
        plan = work if isinstance(work, Plan) else make_plan(work, resources, output=AnalysisOutput)
        made = carry_out(
            plan, Path(out), sampler, overwrite=overwrite, resume=resume, on_event=on_event
        )
    analysis = open_analysis(made.path)
    leads = (crew := CREW.get()) is None or crew.leads
    file = add_page("analysis", made.path, analysis.document) if page and leads else None
    complete = made.report is None
    return AnalysisResult(made.path, analysis, 0 if complete else made.reused, complete, file)
