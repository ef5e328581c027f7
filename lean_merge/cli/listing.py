"""List the methods, and say what one does, needs and takes, without importing torch."""

from __future__ import annotations

from typing import Any

from lean_merge.cli.methodtable import EXAMPLE_SHAPE, as_written
from lean_merge.sizes import format_size


def methods_text(methods: list[dict[str, Any]]) -> str:
    """Return the methods of `methods_list` as a table."""
    head = ["method", "passes", "memory", "adapter", "evidence", "reference", "what it does"]
    rows = [
        [
            each["name"],
            str(each["needs"]["passes"]),
            format_size(each["needs"]["memory"]),
            each["adapter"],
            each["evidence"],
            each["reference"],
            each["summary"],
        ]
        for each in methods
    ]
    size = "x".join(map(str, EXAMPLE_SHAPE))
    return "\n".join(
        [
            *table_lines([head, *rows]),
            "",
            "Passes over the rows before the result is written, and the method's own memory, are",
            f"for a bf16 weight of {size} and one expert, at the defaults. An adapter is exact, or",
            "cut to a rank by --lora-rank. lean-merge methods NAME lists a method's parameters.",
        ]
    )


def method_text(method: dict[str, Any]) -> str:
    """Return one method of `methods_list` with its parameters, as text."""
    rows = [["parameter", "default", ""]]
    for parameter in method["parameters"]:
        apart = "may differ by expert" if parameter["per_expert"] else ""
        rows.append([parameter["name"], as_written(parameter["default"]), apart])
    told = [f"{method['name']}  ({method['reference']})", method["summary"], "", *table_lines(rows)]
    return "\n".join([*told, "", method["help"]])


def table_lines(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines; all cells but the last are padded to their column's width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]
