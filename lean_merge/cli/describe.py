"""Describe plans, results and checkpoints, as text and as plain data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from lean_merge.checkpoints import open_checkpoint
from lean_merge.cli.listing import table_lines
from lean_merge.cli.nextsteps import after_analysis, after_merge, next_lines, program
from lean_merge.cli.rounding import advice, foreseen
from lean_merge.engine import EarlyLook
from lean_merge.mapping import language_layout
from lean_merge.outputs import REPORT
from lean_merge.outputs.document import ANALYSIS
from lean_merge.outputs.summary import summary_lines
from lean_merge.plan import Plan
from lean_merge.sizes import format_size
from lean_merge.studies.sweep import result_names, result_of
from lean_merge.verify import Verification


def warnings_of(plan: Plan) -> list[str]:
    """Return the warnings that a plan has before anything is read."""
    skipped = [f"left as the MLLM has it: {line}" for line in plan.coverage.left_out]
    return [*plan.coverage.warnings, *plan.notes, *skipped]


def plan_dict(plan: Plan, seen: EarlyLook | None = None) -> dict[str, Any]:
    """Return a plan as plain data, whose fields docs/formats.md explains.

    `seen` is the early look, if there was one.
    """
    look = {} if seen is None else {"warnings": list(seen.warnings), "kept": seen.kept}
    return {
        **({"look": look} if seen is not None else {}),
        "recipe": plan.recipe.to_dict(),
        "prefixes": dict(plan.coverage.prefixes),
        "natures": dict(plan.coverage.natures),
        "counts": {
            "in_scope": len(plan.weights),
            "copied": len(plan.copies),
            "filtered": len(plan.scope.filtered),
            "skipped": len(plan.coverage.left_out),
        },
        "device": plan.device,
        "threads": plan.threads,
        "memory_limit": plan.memory,
        "vram_limit": plan.vram,
        "predicted": dataclasses.asdict(plan.prediction),
        "shards": [{"file": shard.file_name, "bytes": shard.size} for shard in plan.shards],
        "warnings": warnings_of(plan),
        "weights": [
            {
                "name": task.weight.mllm.name,
                "base": task.weight.slices[0].base.name,
                "shape": list(task.weight.mllm.shape),
                "logical": [rows.canonical for rows in task.weight.slices],
                "resident_tiles": list(task.resident),
            }
            for task in plan.weights
        ],
        "copied": [task.tensor.name for task in plan.copies],
        "filtered": dict(plan.scope.filtered),
    }


def plan_text(plan: Plan, seen: EarlyLook | None = None) -> str:
    """Return a plan as text, with what the early look found if there was one."""
    predicted = plan.prediction
    described = plan.output.described(written=predicted.bytes_written, disk=predicted.disk)
    leaves = Counter(
        rows.canonical.rsplit(".", 1)[-1] for task in plan.weights for rows in task.weight.slices
    )
    copied = Counter(task.tensor.name.split(".", 1)[0] for task in plan.copies)
    reads = format_size(predicted.bytes_read)
    if predicted.most_read > predicted.bytes_read:
        reads = f"about {reads}, at most {format_size(predicted.most_read)}"
    lines = [
        f"method    {plan.recipe.merge_method}",
        *(
            f"{role:<9} {prefix}*, {plan.coverage.natures[role]}"
            for role, prefix in plan.coverage.prefixes.items()
        ),
        f"in scope  {len(plan.weights)} tensors: {_counted(leaves)}",
        f"copied    {len(plan.copies)} tensors: {_counted(copied)}",
        f"filtered  {_counted(Counter(plan.scope.filtered.values()))}",
        f"skipped   {len(plan.coverage.left_out)}",
        f"output    {described}",
        f"reads     {reads}",
        *([f"travels   {format_size(predicted.travels)}"] if predicted.travels else []),
        f"memory    {format_size(predicted.peak_memory)} of {format_size(plan.memory)} allowed",
        f"device    {plan.device}, {plan.threads} thread(s)",
    ]
    if predicted.peak_vram:
        lines.append(f"vram      {format_size(predicted.peak_vram)}")
    warnings = warnings_of(plan)
    if seen is not None:
        if seen.kept is not None:
            lines.append(f"rounding  at most about {seen.kept:.0%} of the update will be kept")
        warnings += [*seen.warnings, *filter(None, [advice(seen.kept, at_most=True)])]
    return "\n".join([*lines, *(f"warning: {line}" for line in dict.fromkeys(warnings))])


def result_text(path: Path | None, report: dict[str, Any], plan: Plan) -> str:
    """Return a text that sums up a finished merge, and says what to do next."""
    seconds, used = sum(report["seconds"].values()), report["memory"]
    lines = summary_lines(report)
    if report["analysis"] is not None:
        lines.append(
            f"{'analysis':<10} {report['analysis']['recalled']} weights were decided by it"
        )
    lines.append(f"{'time':<10} {_effort(seconds, report['bytes'], used)}")
    if path is not None:
        lines.append(f"{'files':<10} {path}; {REPORT} tells of every weight")
    return "\n".join([*lines, *next_lines(after_merge(path, plan))])


def _line(word: str, told: object) -> str:
    return f"{word:<10} {told}"


def _effort(seconds: float, counted: dict[str, Any], used: dict[str, Any]) -> str:
    return (
        f"{seconds:.1f} s, {format_size(counted['read'])} read, {format_size(counted['written'])} "
        f"written, {format_size(used['peak_anonymous'])} of memory at most"
    )


def analysis_dict(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Return what `analyze --json` prints, which is analysis.json without its weights."""
    return {"path": str(path)} | {k: v for k, v in document.items() if k != "weights"}


def analysis_text(path: Path, document: dict[str, Any], dtype: str) -> str:
    """Return a text that sums up an analysis, and says what to do next."""
    looked = [row for row in document["weights"] if row["skipped"] is None]
    told = f"{len(looked)} weights in {path / ANALYSIS}"
    if skipped := len(document["weights"]) - len(looked):
        told += f"; {skipped} could not be analysed"
    lines = [_line("analysed", told)]
    for k, entry in enumerate(document["thresholds"]):
        chosen = sum(row["experts"][k]["selected"] for row in looked)
        counts = entry["counts"][::10]
        lines += [
            _line("expert", f"{entry['expert']}: the recipe's threshold selects {chosen}"),
            "  threshold  " + " ".join(f"{each['threshold']:>5.1f}" for each in counts),
            "  selected   " + " ".join(f"{each['selected']:>5}" for each in counts),
            _line("auto", entry["explanation"]),
        ]
    if (kept := foreseen(document, dtype)) is not None:
        lines.append(_line("rounding", f"{dtype} will keep about {kept:.0%} of the update"))
        lines += [_line("", told) for told in [advice(kept, at_most=False)] if told]
    seconds = sum(document["seconds"].values())
    lines.append(_line("time", _effort(seconds, document["bytes"], document["memory"])))
    return "\n".join([*lines, *next_lines(after_analysis(path, document))])


def inspect_dict(source: str) -> dict[str, Any]:
    """Return the facts that the headers of a checkpoint tell."""
    checkpoint = open_checkpoint(source)
    tensors = checkpoint.tensors.values()
    dtypes = Counter(spec.dtype for spec in tensors)
    return {
        "source": checkpoint.source,
        "model_type": (checkpoint.config or {}).get("model_type"),
        "files": [file.name for file in checkpoint.files],
        "bytes": sum(spec.nbytes for spec in tensors),
        "dtypes": dict(dtypes),
        "language_model": dict(language_layout(checkpoint)),
        "tensors": [
            {
                "name": spec.name,
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "file": spec.file.name,
            }
            for spec in tensors
        ],
    }


def inspect_text(facts: dict[str, Any]) -> str:
    """Return the facts of `inspect_dict` as text."""
    layout = ", ".join(f"{p}* ({n} layers)" for p, n in facts["language_model"].items())
    size = f"{format_size(facts['bytes'])} in {len(facts['files'])} file(s)"
    kind = facts["model_type"] or "no config"
    count = len(facts["tensors"])
    lines = [
        f"{facts['source']}: {kind}, {count} tensors, {size}, {_counted(facts['dtypes'])}",
        f"language model: {layout or 'none found'}",
    ]
    for tensor in facts["tensors"]:
        lines.append(f"{tensor['dtype']:<8} {tensor['shape']!s:<18} {tensor['name']}")
    return "\n".join(lines)


def verification_dict(result: Verification) -> dict[str, Any]:
    """Return what `verify --json` prints; docs/formats.md explains the fields."""
    return {
        "path": str(result.path),
        "ok": result.ok,
        "differences": [
            {"file": each.file, "tensor": each.tensor, "fault": each.fault}
            for each in result.differences
        ],
        "counts": {
            "files": result.files,
            "tensors": result.tensors,
            "copied": result.copied,
            "recomputed": len(result.recomputed),
            "in_scope": result.in_scope,
        },
        "recomputed": list(result.recomputed),
        "seed": result.seed,
        "exact": result.exact,
        "notes": list(result.notes),
        "repair": result.repair,
    }


def verification_text(result: Verification) -> str:
    """Return a text that says what a verification found, and what to do next."""
    lines = [
        _line("read", f"{result.files} files of {result.path}"),
        _line("bytes", f"{result.tensors} tensors have the bytes that were written"),
        _line("copied", f"{result.copied} tensors out of scope were compared with the MLLM's"),
        _line(
            "merged",
            f"{len(result.recomputed)} of {result.in_scope} weights in scope were merged again and "
            f"compared (--seed {result.seed})",
        ),
        *(_line("note", note) for note in result.notes),
        *(_line("different", each) for each in result.differences),
    ]
    if result.ok:
        steps = [("push", program("push", result.path, "org/name"))]
        return "\n".join([*lines, _line("result", "nothing differs"), *next_lines(steps)])
    repair = result.repair or "the command that made it, with --overwrite"
    told = _line("result", "the output is damaged")
    return "\n".join([*lines, told, *next_lines([("repair", repair)])])


def sweep_text(table: dict[str, Any]) -> str:
    """Return the table of a sweep, with a row for each point."""
    axes = [axis for axis, values in table["axes"].items() if values]
    names = result_names(table)
    head = [*axes, "selected", "update", "own", "shared", "seconds"]
    rows = [[*head, *(name or "result" for name in names), ""]]
    for point in table["points"]:
        own, shared = point["bytes_own"], point["bytes_shared"]
        update, seconds = point["update_norm"], point["seconds"]
        cells = [
            *(_cell(point["parameters"].get(axis)) for axis in axes),
            _cell(point["selected"]),
            "-" if update is None else f"{update:.4g}",
            "-" if own is None else format_size(own),
            "-" if shared is None else format_size(shared),
            "-" if seconds is None else f"{seconds:.1f}",
            *(_cell(result_of(point, name)) for name in names),
        ]
        rows.append([*cells, _remark(point)])
    if (receiver := table["receiver"]) is not None:
        blank = ["-"] * len(head)
        results = [_cell(result_of(receiver, name)) for name in names]
        rows.append([*blank, *results, receiver["error"] or "the model that receives, as it is"])
    return "\n".join(table_lines(rows))


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _remark(point: dict[str, Any]) -> str:
    if point["error"] is not None:
        return f"failed: {point['error']}"
    if point["same_as"] is not None:
        return f"as {point['same_as']}"
    unchanged = point["path"] is None and point["selected"] is not None
    return "no update: the MLLM as it is" if unchanged else ""


def _counted(counts: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
