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
_ACCURACY = (
    (
        "omitted_share",
        0.025,
        "directions beyond the computed rank may carry up to {:.0%} of the update in {} weights; "
        "--rank N computes more, --svd exact all",
    ),
    (
        "lambda_doubt",
        0.05,
        "up to {:.0%} of a nuclear norm, and with it of lambda, may be rounding in {} weights "
        "whose task vectors are nearly of low rank; --svd exact computes it",
    ),
    (
        "angle_error",
        0.1,
        "directions that carry the update are known to a sine of {:.2f} only in {} weights; --svd "
        "exact computes them fully",
    ),
)
"""Fields of selected records, the values above which the report warns, and the warnings."""


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
            *plan.output.warnings(result.weights),
            *accuracy_warnings(result),
            *plan.method.warnings([r for weight in result.weights for r in weight.experts]),
            *non_finite_warnings(result),
            *(code_warnings(code) if plan.output.is_model else ()),
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


def accuracy_warnings(result: RunResult) -> list[str]:
    """Warn of weights whose sketches did not reach the accuracy that they aim at."""
    warnings, selected = [], [r for w in result.weights for r in w.experts if r.selected]
    for field, bar, text in _ACCURACY:
        high = [value for r in selected if (value := getattr(r, field) or 0.0) > bar]
        warnings += [text.format(max(high), len(high))] if high else []
    return warnings


def non_finite_warnings(result: RunResult) -> list[str]:
    """Warn of NaN or Inf in copied tensors; they are normal in a mask, but not in a weight."""
    names = result.non_finite
    return names and [
        f"{len(names)} of the tensors that are copied from the MLLM hold NaN or Inf "
        f"({_few(names)}); the output has them too"
    ]


def code_warnings(code: Sequence[str]) -> list[str]:
    """Warn that the MLLM brings code, which this program has not checked."""
    if not code:
        return []
    return [
        f"the MLLM brings code of its own ({_few(code)}); it was copied as data and not run, and "
        "is run by whoever loads the output with trust_remote_code=True"
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


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
