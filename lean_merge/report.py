"""Build the report of a run: the decision on each weight, the resources used, and warnings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lean_merge.checkpoints.sidefiles import remote_code
from lean_merge.engine import EarlyLook, RunResult
from lean_merge.memory import PeakSampler
from lean_merge.methods import Recalling
from lean_merge.plan import Plan
from lean_merge.tasks import Truncated, WeightResult, Written, decision_fields, kind_of
from lean_merge.version import __version__

REPORT_VERSION = 1
OMITTED_WARNING = 0.025
"""The report warns above this modelled share of an update beyond the computed rank."""
ANGLE_WARNING = 0.1
"""The report warns above this sine of the angle error of directions that carry an update."""
DOUBT_WARNING = 0.05
"""The report warns above this share of a nuclear norm that may be rounding."""
CUT_WARNING = 0.05
"""The report warns above this share of an update's norm that an adapter's rank cuts off."""
KEPT_WARNING = 0.9
"""The report warns below this share of an update that survives rounding."""


def build_report(
    plan: Plan,
    result: RunResult,
    look: EarlyLook,
    *,
    bytes_written: int,
    sampler: PeakSampler,
) -> dict[str, Any]:
    """Return the content of `lean_merge_report.json`; docs/formats.md explains every field."""
    rows = [row for weight in result.weights for row in weight_rows(plan, weight)]
    merged = {weight.name for weight in result.weights if weight.merged}
    code = remote_code(plan.mllm)
    sampler.sample()
    measured = measures(plan, result, bytes_written=bytes_written, sampler=sampler)
    return {
        "version": REPORT_VERSION,
        "lean_merge": __version__,
        "recipe": plan.recipe.to_dict(),
        "parameters": [
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in own.items()
            }
            for own in map(asdict, plan.method.parameters)
        ],
        "counts": {
            "merged": len(merged),
            "unchanged": len(plan.weights) - len(merged),
            "copied": len(plan.copies),
            "filtered": len(plan.scope.filtered),
            "skipped": len(plan.coverage.left_out),
            "tensors": len(plan.tasks),
            "logical_weights": len(result.weights),
        },
        "changed": total_change(plan, result, look),
        "warnings": [
            *dict.fromkeys([*plan.coverage.warnings, *look.warnings, *_analysis_warnings(plan)]),
            *plan.notes,
            *kept_warnings(result),
            *accuracy_warnings(result),
            *plan.method.warnings([r for weight in result.weights for r in weight.experts]),
            *non_finite_warnings(result),
            *(code_warnings(code) if plan.output.is_model else ()),
            *adapter_warnings(result),
            *fallback_warnings(result),
        ],
        "fallbacks": [
            {"weight": weight.canonical, **asdict(weight.fallback)}
            for weight in result.weights
            if weight.fallback is not None
        ],
        "analysis": _from_analysis(plan),
        "skipped": list(plan.coverage.left_out),
        "filtered": dict(plan.scope.filtered),
        "remote_code": list(code),
        **measured,
        "weights": rows,
    }


def _analysis_warnings(plan: Plan) -> list[str]:
    """Return the warnings of the analysis that a merge was decided from."""
    source = None if plan.evidence is None else plan.evidence.source
    return [] if source is None else source.warnings


def _from_analysis(plan: Plan) -> dict[str, Any] | None:
    """Return the entry on the analysis that a merge was decided from, if there is one."""
    if plan.evidence is None or plan.evidence.source is None:
        return None
    return {
        **plan.evidence.identity,
        "explanations": [each.explanation for each in plan.evidence.thresholds],
        "recalled": sum(
            isinstance(method, Recalling) for task in plan.weights for method in task.methods
        ),
        "anew": dict(plan.evidence.anew),
    }


def measures(
    plan: Plan, result: RunResult, *, bytes_written: int, sampler: PeakSampler
) -> dict[str, Any]:
    """Return the time, memory and bytes that a run took, beside those predicted."""
    prediction, peak = plan.prediction, sampler.peak
    return {
        "seconds": {phase: round(s, 3) for phase, s in result.seconds.items()},
        "bytes": {
            "read": result.bytes_read,
            "read_predicted": prediction.bytes_read,
            "read_most": prediction.most_read,
            "looked": prediction.looked,
            "written": bytes_written,
            "written_predicted": prediction.bytes_written,
            "written_predicted_exactly": prediction.exact_writes,
        },
        "memory": {
            "limit": plan.memory,
            "predicted_anonymous": prediction.peak_memory,
            "peak_anonymous": peak.anonymous,
            "peak_file_backed": peak.file_backed,
            "start_anonymous": sampler.start.anonymous,
            "predicted_vram": prediction.peak_vram,
            "peak_vram": result.peak_vram,
            "peak_vram_used": result.peak_vram_used,
            "pinned": result.pinned,
        },
        "device": plan.device,
        "threads": plan.threads,
        "workers": plan.workers,
    }


def weight_rows(plan: Plan, weight: WeightResult) -> list[dict[str, Any]]:
    """Return one row for each expert of a logical weight."""
    kept = update_kept(weight)
    cut = weight.stored if isinstance(weight.stored, Truncated) else None
    rows = []
    for expert, (record, square) in enumerate(
        zip(weight.experts, weight.squared_norms[1:], strict=True)
    ):
        rows.append(
            {
                "name": weight.name,
                "weight": weight.canonical,
                "expert": plan.recipe.experts[expert].model,
                **decision_fields(record, rank="rank"),
                "directions": record.directions,
                "energy_kept": record.energy_kept,
                "factor": record.factor,
                "gap": record.gap,
                "update_norm": record.update_norm,
                "update_kept": kept,
                "lora_rank": cut.rank if cut else None,
                "lora_error": cut.error if cut else None,
                "mllm_task_vector_norm": _root(weight.squared_norms[0]),
                "expert_task_vector_norm": _root(square),
                "passes": weight.passes,
            }
        )
    return rows


def total_change(plan: Plan, result: RunResult, look: EarlyLook) -> dict[str, Any]:
    """Tell how many weights were changed, and the norm of all updates over that of these weights.

    The weights' norms are estimated from the rows of the early look.
    """
    shapes = {part.canonical: part.shape for task in plan.weights for part in task.weight.slices}
    usual = sum(look.squares.values()) / len(look.squares) if look.squares else 0.0
    count, update, whole = 0, 0.0, 0.0
    for weight in result.weights:
        squared = _squared_update(weight)
        count += squared != 0
        if squared:
            mean = look.squares.get(kind_of(weight.canonical), usual)
            update, whole = update + squared, whole + mean * math.prod(shapes[weight.canonical])
    relative = math.sqrt(update / whole) if whole else None
    return {"weights": count, "of": len(result.weights), "relative_update": relative}


def _squared_update(weight: WeightResult) -> float | None:
    """Return ||update||_F^2, or None if it was not computed.

    If no rows were written, the updates of several experts are taken for orthogonal.
    """
    if not weight.merged:
        return 0.0
    if isinstance(weight.stored, Written):
        return weight.stored.squared
    norms = [math.nan if e.update_norm is None else e.update_norm for e in weight.experts]
    squared = math.fsum(norm**2 for norm in norms)
    return None if math.isnan(squared) else squared


def update_kept(weight: WeightResult) -> float | None:
    """Return the share of an update that rounding kept: <stored change, update> / ||update||^2.

    It is None for a zero update, of which nothing can be lost, and where no sum was stored.
    """
    if not isinstance(weight.stored, Written) or not _squared_update(weight):
        return None
    return weight.stored.along / weight.stored.squared


def kept_warnings(result: RunResult) -> list[str]:
    """Warn if rounding to the output dtype lost a large part of an update."""
    kept = [share for weight in result.weights if (share := update_kept(weight)) is not None]
    ways_out = "--rounding stochastic or --out-dtype float32 keep it"
    if kept and all(share < 0.01 for share in kept):
        return [f"nothing of any update survives rounding to the output dtype; {ways_out}"]
    low = [share for share in kept if share < KEPT_WARNING]
    if not low:
        return []
    return [
        f"rounding to the output dtype keeps less than {KEPT_WARNING:.0%} of the update in "
        f"{len(low)} of {len(kept)} weights (worst {min(low):.0%}); {ways_out}"
    ]


def accuracy_warnings(result: RunResult) -> list[str]:
    """Warn of weights whose sketches did not reach the accuracy that they aim at."""
    selected = [r for weight in result.weights for r in weight.experts if r.selected]
    shares = [s for r in selected if (s := r.omitted_share or 0.0) > OMITTED_WARNING]
    doubts = [d for r in selected if (d := r.lambda_doubt or 0.0) > DOUBT_WARNING]
    angles = [a for r in selected if (a := r.angle_error or 0.0) > ANGLE_WARNING]
    warnings = []
    if shares:
        warnings.append(
            f"directions beyond the computed rank may carry up to {max(shares):.0%} of the update "
            f"in {len(shares)} weights; --rank N computes more, --svd exact all"
        )
    if doubts:
        warnings.append(
            f"up to {max(doubts):.0%} of a nuclear norm, and with it of lambda, may be rounding in "
            f"{len(doubts)} weights whose task vectors are nearly of low rank; --svd exact "
            "computes it"
        )
    if angles:
        warnings.append(
            f"directions that carry the update are known to a sine of {max(angles):.2f} only in "
            f"{len(angles)} weights; --svd exact computes them fully"
        )
    return warnings


def non_finite_warnings(result: RunResult) -> list[str]:
    """Warn of NaN or Inf in copied tensors; they are normal in a mask, but not in a weight."""
    names = result.non_finite
    if not names:
        return []
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return [
        f"{len(names)} of the tensors that are copied from the MLLM hold NaN or Inf ({shown}); "
        "the output has them too"
    ]


def code_warnings(code: Sequence[str]) -> list[str]:
    """Warn that the MLLM brings code, which this program has not checked."""
    if not code:
        return []
    shown = ", ".join(code[:4]) + (", ..." if len(code) > 4 else "")
    return [
        f"the MLLM brings code of its own ({shown}); it was copied as data and not run, and is "
        "run by who loads the output with trust_remote_code=True"
    ]


def adapter_warnings(result: RunResult) -> list[str]:
    """Warn if a rank that was asked for cuts off a large part of an update."""
    cuts = [w.stored.error for w in result.weights if isinstance(w.stored, Truncated)]
    large = [error for error in cuts if error > CUT_WARNING]
    if not large:
        return []
    return [
        f"the adapter's rank cuts off up to {max(large):.0%} of the update's norm in {len(large)} "
        f"of {len(cuts)} weights; a larger --lora-rank keeps more"
    ]


def fallback_warnings(result: RunResult) -> list[str]:
    """Warn if the device ran out of memory, and say what was done."""
    places = Counter(weight.fallback.place for weight in result.weights if weight.fallback)
    if not places:
        return []
    done = ", ".join(f"{count} on {place}" for place, count in sorted(places.items()))
    return [
        f"the device ran out of memory: of {len(result.weights)} weights, {done}; a smaller --vram "
        "plans for less, and what else uses the device may be closed"
    ]


def _root(square: float) -> float | None:
    return None if math.isnan(square) else math.sqrt(square)
