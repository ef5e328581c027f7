"""Merge methods, one file each, found by the names they register."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from lean_merge.methods.base import (
    FAR,
    AnalysisCost,
    Decision,
    ExpertRecord,
    Method,
    Passes,
    Survey,
    WeightContext,
    per_expert,
)
from lean_merge.methods.evidence import EvidenceMethod, Gathering, Recalling, Watching
from lean_merge.methods.facts import (
    Compared,
    Evidence,
    Factors,
    FactorsInMemory,
    Facts,
    Portrait,
    RoleFacts,
)
from lean_merge.methods.registry import canonical_name, register, registered
from lean_merge.methods.updates import Combined, Dense, LowRank, Update

__all__ = [
    "FAR",
    "AnalysisCost",
    "Combined",
    "Compared",
    "Decision",
    "Dense",
    "Evidence",
    "EvidenceMethod",
    "ExpertRecord",
    "Factors",
    "FactorsInMemory",
    "Facts",
    "Gathering",
    "LowRank",
    "Method",
    "Passes",
    "Portrait",
    "Recalling",
    "RoleFacts",
    "Survey",
    "Update",
    "Watching",
    "WeightContext",
    "all_methods",
    "canonical_name",
    "per_expert",
    "register",
]


def all_methods() -> Mapping[str, type[Method[Any]]]:
    """Import every module of this folder, and return all methods by their canonical names."""
    _import_all()
    return registered()


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
