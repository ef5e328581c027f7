"""Make a prior for DRIFT: stream two or three checkpoints, and keep their difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge import memory
from lean_merge.engine import Event
from lean_merge.errors import CoverageError, RecipeError
from lean_merge.merge import carry_out, read_report
from lean_merge.outputs.prior import prior_kind
from lean_merge.outputs.priorsettings import PriorSettings
from lean_merge.plan import Plan
from lean_merge.plan import plan as make_plan
from lean_merge.plan.resources import Resources
from lean_merge.recipe import Expert, MergeRecipe


@dataclass(frozen=True, slots=True)
class PriorResult:
    """A finished prior, with its folder and its report.

    `reused` is how many tensors an interrupted run had finished; `was_complete` tells that the
    prior was there already and nothing was done.
    """

    path: Path
    report: dict[str, Any]
    reused: int = 0
    was_complete: bool = False


def prior_recipe(
    mllm: str,
    experts: Sequence[str],
    *,
    base: str | None = None,
    weights: Sequence[float] = (),
    difference: str = "expert-mllm",
    **options: Any,
) -> MergeRecipe:
    """Return the merge whose updates are the differences of a prior.

    Parameters
    ----------
    mllm, experts, base
        Folders or hub ids. The base is for the difference "expert-base" alone.
    weights
        The factor of each expert's difference in their sum; by default 1 for each.
    difference
        "expert-mllm", for which the MLLM takes the base's part, or "expert-base".
    **options
        Fields of `MergeRecipe`: include, exclude, names, seed, shard_size, allow_partial,
        allow_text_mllm, force.

    Raises
    ------
    RecipeError
        The base is missing or given without need, the weights are not as many as the experts, or a
        value makes no sense.
    """
    settings = PriorSettings(difference)
    if settings.difference == "expert-base" and base is None:
        raise RecipeError("The difference expert-base needs the base; name it with --base.")
    if settings.difference != "expert-base" and base is not None:
        raise RecipeError(
            f"The difference {settings.difference} is taken from the MLLM, so --base has no part "
            "in it; leave it out, or give --difference expert-base."
        )
    if weights and len(weights) != len(experts):
        raise RecipeError(
            f"{len(weights)} weights were given for {len(experts)} experts; give --weight once for "
            "each --expert, in their order."
        )
    own: Sequence[Mapping[str, float]] = [{"weight": each} for each in weights] or [{}] * len(
        experts
    )
    return MergeRecipe(
        base_model=mllm if base is None else base,
        mllm_model=None if base is None else mllm,
        experts=tuple(
            Expert(model, tuple(each.items())) for model, each in zip(experts, own, strict=True)
        ),
        merge_method="task_arithmetic",
        parameters=(("exact", True),),
        **options,
    )


def plan_prior(
    recipe: MergeRecipe, settings: PriorSettings, resources: Resources | None = None
) -> Plan:
    """Plan a prior from headers alone.

    Raises
    ------
    RecipeError
        An expert is an adapter, which does not tell how it differs from the MLLM.
    LeanMergeError
        The errors are those of `plan`.
    """
    try:
        plan = make_plan(recipe, resources, output=prior_kind(settings))
    except CoverageError as error:
        raise _explained(error, settings) from error
    if settings.difference == "expert-mllm":
        for expert in plan.experts:
            if expert.adapter is not None:
                raise RecipeError(
                    f"{expert.source}: is an adapter, which tells how it differs from its own base "
                    "and not from the MLLM; give --difference expert-base with that base, or merge "
                    "it into its base first (PEFT's merge_and_unload)."
                )
    return plan


def make_prior(
    work: MergeRecipe | Plan,
    out: str | Path,
    settings: PriorSettings | None = None,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    resume: bool = True,
    on_event: Callable[[Event], None] | None = None,
) -> PriorResult:
    """Make the prior along which DRIFT pulls an MLLM's gradients (arXiv:2510.15050).

    The checkpoints are streamed as in a merge: names are matched by structure, memory has the same
    ceiling, and an interrupted run goes on where it stopped.

    Parameters
    ----------
    work
        A recipe of `prior_recipe`, or a plan of `plan_prior`, which has its settings and resources.
    out
        The folder, which is visibly unfinished until the last rename.
    settings
        Difference, rank and dtype, for a recipe; the difference must be that of the recipe.
    resources
        Device, memory and threads, for a recipe.
    overwrite
        Whether to replace what `out` holds, once the new prior is complete.
    resume
        Whether to use what an interrupted run left.
    on_event
        A function that is called after each tensor.

    Raises
    ------
    DataError
        The difference is zero everywhere, or a number is NaN or Inf.
    LeanMergeError
        The models do not fit together, or the folder cannot be written; nothing is lost.
    """
    with memory.PeakSampler() as sampler:
        if isinstance(work, Plan):
            plan = work
        else:
            plan = plan_prior(work, settings or PriorSettings(), resources)
        try:
            made = carry_out(
                plan, Path(out), sampler, overwrite=overwrite, resume=resume, on_event=on_event
            )
        except CoverageError as error:
            raise _explained(error, plan.output.settings) from error  # type: ignore[attr-defined]
    report = read_report(made.path) if made.report is None else made.report
    return PriorResult(made.path, report, made.reused, was_complete=made.report is None)


def _explained(error: CoverageError, settings: PriorSettings) -> CoverageError:
    """Say who takes the base's part, which the messages of a merge do not tell."""
    if settings.difference == "expert-base":
        return error
    return CoverageError(f"{error} (In W_expert - W_mllm, the MLLM takes the part of the base.)")
