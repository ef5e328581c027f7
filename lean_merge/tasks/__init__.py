"""The tasks of a plan, one for each tensor of the output, and their results."""

from lean_merge.tasks.results import (
    Fallback,
    Note,
    Stored,
    Truncated,
    WeightResult,
    Written,
    decision_fields,
    from_note,
    to_note,
)
from lean_merge.tasks.task import (
    CopyTask,
    WeightTask,
    formed_from,
    looks,
    needs_analysis,
    task_dtype,
)
from lean_merge.tasks.tiles import kind_of

__all__ = [
    "CopyTask",
    "Fallback",
    "Note",
    "Stored",
    "Truncated",
    "WeightResult",
    "WeightTask",
    "Written",
    "decision_fields",
    "formed_from",
    "from_note",
    "kind_of",
    "looks",
    "needs_analysis",
    "task_dtype",
    "to_note",
]
