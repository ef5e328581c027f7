"""The table of methods that comes with the package, from which help starts without torch.

`methods.json` holds what the methods themselves say. A test compares the two and, with
LEAN_MERGE_WRITE_DOCS=1, writes the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("methods.json")
EXAMPLE_SHAPE = (4096, 4096)
"""The shape of the weight for which the table says what methods need."""
_METHODS = Path(__file__).parents[1] / "methods"


def registering() -> set[str]:
    """Return the names of the modules that register a method, which are those of the methods."""
    files = _METHODS.glob("*.py")
    return {file.stem for file in files if "\n@register\n" in file.read_text(encoding="utf-8")}


@cache
def methods_list() -> list[dict[str, Any]]:
    """Return what every method does and needs, and its parameters with their defaults.

    If the table lacks a method, or has one that is gone, the methods themselves are asked.
    """
    table: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    if {method["name"] for method in table} == registering():
        return table
    from lean_merge.cli.asking import told_methods

    return told_methods()


def default_of(method: str, parameter: str) -> str:
    """Return the default of a method's parameter as people write it."""
    (found,) = [each for each in methods_list() if each["name"] == method]
    (value,) = [p["default"] for p in found["parameters"] if p["name"] == parameter]
    return as_written(value)


def as_written(default: Any) -> str:
    """Return a default as people write it: `select,rescale` for a list, 32 for 32.0."""
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def by_name() -> Mapping[str, dict[str, Any]]:
    """Return the methods of the table by their names."""
    return {each["name"]: each for each in methods_list()}
