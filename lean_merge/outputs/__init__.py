"""The kinds of output that a merge can make, one file each, found by the names they register."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from lean_merge.errors import RecipeError, shown
from lean_merge.outputs.base import (
    DECODED_DTYPE,
    RECIPE,
    REPORT,
    Comparison,
    Outcome,
    Output,
    ReadRows,
    Request,
    Sink,
    register_kind,
    registered_kinds,
)
from lean_merge.outputs.gathered import RecordedEvidence

__all__ = [
    "DECODED_DTYPE",
    "RECIPE",
    "REPORT",
    "Comparison",
    "Outcome",
    "Output",
    "ReadRows",
    "RecordedEvidence",
    "Request",
    "Sink",
    "all_outputs",
    "evidence_kind",
    "output_of",
    "register_kind",
    "stream_kind",
]


def all_outputs() -> Mapping[str, type[Output]]:
    """Return every kind by its name; importing this folder's modules registers them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return registered_kinds()


def output_of(name: str) -> type[Output]:
    """Return the kind that a recipe calls `name`.

    Raises
    ------
    RecipeError
        There is no such kind, or a recipe may not ask for it.
    """
    kinds = {each: kind for each, kind in all_outputs().items() if kind.in_recipes}
    if name not in kinds:
        raise RecipeError(f"output must be one of {', '.join(sorted(kinds))}, not {shown(name)}.")
    return kinds[name]


def evidence_kind() -> type[Output]:
    """Return the kind that gathers evidence, from which thresholds are found."""
    return all_outputs()["analysis"]


def stream_kind() -> type[Output]:
    """Return the kind that makes whole tensors in memory."""
    return all_outputs()["stream"]
