"""Sum up a merge in at most ten lines, from its report.

The lines hold nothing that memory, threads or the time of day could change, so that equal merges
have equal summaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lean_merge.outputs.card import public_name

SUMMARY = "lean_merge_summary.txt"
"""The file of a merge that sums it up."""


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of the summary: a word, and what there is to say of it."""
    return [f"{word:<10} {told}" for word, told in _told(report)]


def _told(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, counts, changed = report["recipe"], report["counts"], report["changed"]
    experts = [public_name(expert["model"]) for expert in recipe["experts"]]
    receiver = recipe.get("mllm_model", recipe["base_model"])
    yield "merged", f"{', '.join(experts)} into {public_name(receiver)}"
    yield "method", f"{recipe['merge_method']}, with {public_name(recipe['base_model'])} as base"
    weights = f"{changed['weights']} of {changed['of']} in scope were changed"
    if counts["copied"]:
        weights += f"; {counts['copied']} other tensors are the receiver's own"
    if counts["skipped"]:
        weights += f"; {counts['skipped']} had no counterpart in every model"
    yield "weights", weights
    if (thresholds := thresholds_told(report)) is not None:
        yield "threshold", thresholds
    if changed["relative_update"] is not None:
        length = f"{changed['relative_update']:.2%} of the length of the weights that it changes"
        if changed.get("relative_to_experts") is not None:
            length += f", and {changed['relative_to_experts']:.1%} of the experts' task vectors'"
        yield "update", length
    elif not changed["weights"]:
        reasons = dict.fromkeys(row["reason"] for row in report["weights"] if not row["selected"])
        yield "update", "; ".join(reasons) or "every update is zero"
    if changed.get("kept") is not None:
        yield "rounding", f"{changed['kept']:.0%} of the update is kept in the output's numbers"
    ranks = [row["lora_rank"] for row in report["weights"] if row["lora_rank"] is not None]
    if ranks:
        worst = max(row["lora_error"] or 0.0 for row in report["weights"])
        yield "adapter", f"ranks up to {max(ranks)}; they lose {worst:.2%} of an update at most"


def thresholds_told(report: Mapping[str, Any]) -> str | None:
    """Return the thresholds that decided, found or given; None if the method has none."""
    if not report["parameters"] or "threshold" not in report["parameters"][0]:
        return None
    analysis = report["analysis"] or {}
    given = [own["threshold"] for own in report["parameters"]]
    found = analysis.get("thresholds")
    values = found if found else given
    told = ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
    return f"{told}, found by auto" if found else told
