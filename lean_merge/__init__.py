"""Streaming IP-Merging: give a multimodal model the abilities of a text model, without training."""

from lean_merge.checkpoints import Checkpoint, open_checkpoint
from lean_merge.engine import Event
from lean_merge.errors import (
    BudgetError,
    CheckpointError,
    CoverageError,
    DataError,
    LeanMergeError,
    OutputError,
    RecipeError,
)
from lean_merge.merge import MergeResult, merge, stream
from lean_merge.outputs.recorded import Analysis, open_analysis
from lean_merge.plan import Plan, plan
from lean_merge.plan.resources import Resources
from lean_merge.recipe import Expert, MergeRecipe
from lean_merge.studies.analyze import AnalysisResult, analyze
from lean_merge.studies.sweep import Evaluation, Grid, MethodGrid, PointEvent, SweepResult, sweep
from lean_merge.verify import Verification, verify
from lean_merge.version import __version__

__all__ = [
    "Analysis",
    "AnalysisResult",
    "BudgetError",
    "Checkpoint",
    "CheckpointError",
    "CoverageError",
    "DataError",
    "Evaluation",
    "Event",
    "Expert",
    "Grid",
    "LeanMergeError",
    "MergeRecipe",
    "MergeResult",
    "MethodGrid",
    "OutputError",
    "Plan",
    "PointEvent",
    "RecipeError",
    "Resources",
    "SweepResult",
    "Verification",
    "__version__",
    "analyze",
    "merge",
    "open_analysis",
    "open_checkpoint",
    "plan",
    "stream",
    "sweep",
    "verify",
]
