"""DRIFT: reasoning injected while an MLLM is fine-tuned (arXiv:2510.15050), in torch alone.

`DriftCallback`, for trainers, is the only part that needs transformers, once it is asked for.
"""

import importlib
from typing import Any

from lean_merge.drift.prior import Prior, PriorFactors, PriorMatrix, PriorPart, PriorWeight
from lean_merge.drift.pull import Drift

__all__ = [
    "Drift",
    "DriftCallback",
    "Prior",
    "PriorFactors",
    "PriorMatrix",
    "PriorPart",
    "PriorWeight",
]


def __getattr__(name: str) -> Any:
    if name == "DriftCallback":
        return importlib.import_module("lean_merge.drift.callback").DriftCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
