"""Build the report of a run: the decision on each weight, the resources used, and warnings."""

from __future__ import annotations

import math
from collections import Counter
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
    earlier = plan.evidence.source.warnings if plan.evidence and plan.evidence.source else []
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
            *dict.fromkeys([*plan.coverage.warnings, *look.warnings, *earlier]),
            *plan.notes,
            *plan.output.warnings(result.weights),
            *plan.method.warnings([r for weight in result.weights for r in weight.experts]),
            *non_finite_warnings(result),
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
        "remote_code": list(remote_code(plan.mllm)),
        **measured,
        "weights": rows,
    }


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
            "travels_predicted": prediction.travels,
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
    kept = weight.stored.kept if isinstance(weight.stored, Written) else None
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
    """Tell how many weights were changed, and the update's length against two others.

    They are the weights', estimated from the early look, and the experts' task vectors'.
    """
    shapes = {part.canonical: part.shape for task in plan.weights for part in task.weight.slices}
    usual = sum(look.squares.values()) / len(look.squares) if look.squares else 0.0
    count, update, whole, tuned, along = 0, 0.0, 0.0, 0.0, 0.0
    for weight in result.weights:
        squared = _squared_update(weight)
        count += squared != 0
        if squared:
            mean = look.squares.get(kind_of(weight.canonical), usual)
            update, whole = update + squared, whole + mean * math.prod(shapes[weight.canonical])
            tuned += math.fsum(weight.squared_norms[1:])
            along += weight.stored.along if isinstance(weight.stored, Written) else math.nan
    return {
        "weights": count,
        "of": len(result.weights),
        "relative_update": math.sqrt(update / whole) if whole else None,
        "relative_to_experts": math.sqrt(update / tuned) if tuned > 0 else None,
        "kept": None if math.isnan(along) or not update else along / update,
    }


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


def non_finite_warnings(result: RunResult) -> list[str]:
    """Warn of NaN or Inf in copied tensors; they are normal in a mask, but not in a weight."""
    names = result.non_finite
    told = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return names and [
        f"{len(names)} of the tensors that are copied from the MLLM hold NaN or Inf ({told}); "
        "the output has them too"
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
