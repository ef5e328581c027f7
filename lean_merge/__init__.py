"""Merge models in a stream: give a multimodal model the abilities of a text model, untrained.

Names are imported when they are first asked for, so that what computes nothing, such as the help
of the command line, starts without torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from lean_merge.merge import MergeResult, merge
    from lean_merge.outputs.priorsettings import PriorSettings
    from lean_merge.outputs.recorded import Analysis, open_analysis
    from lean_merge.plan import Plan, plan
    from lean_merge.plan.resources import Resources
    from lean_merge.recipe import Expert, MergeRecipe
    from lean_merge.studies.analyze import AnalysisResult, analyze
    from lean_merge.studies.prior import PriorResult, make_prior, prior_recipe
    from lean_merge.studies.stream import stream
    from lean_merge.studies.sweep import (
        Evaluation,
        Grid,
        MethodGrid,
        PointEvent,
        SweepResult,
        sweep,
    )
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
    "PriorResult",
    "PriorSettings",
    "RecipeError",
    "Resources",
    "SweepResult",
    "Verification",
    "__version__",
    "analyze",
    "make_prior",
    "merge",
    "open_analysis",
    "open_checkpoint",
    "plan",
    "prior_recipe",
    "stream",
    "sweep",
    "verify",
]

_HOMES = {
    "checkpoints": ("Checkpoint", "open_checkpoint"),
    "engine": ("Event",),
    "errors": (
        "BudgetError",
        "CheckpointError",
        "CoverageError",
        "DataError",
        "LeanMergeError",
        "OutputError",
        "RecipeError",
    ),
    "merge": ("MergeResult", "merge"),
    "outputs.recorded": ("Analysis", "open_analysis"),
    "outputs.priorsettings": ("PriorSettings",),
    "plan": ("Plan", "plan"),
    "plan.resources": ("Resources",),
    "recipe": ("Expert", "MergeRecipe"),
    "studies.analyze": ("AnalysisResult", "analyze"),
    "studies.prior": ("PriorResult", "make_prior", "prior_recipe"),
    "studies.stream": ("stream",),
    "studies.sweep": ("Evaluation", "Grid", "MethodGrid", "PointEvent", "SweepResult", "sweep"),
    "verify": ("Verification", "verify"),
    "version": ("__version__",),
}
"""The public names of each module."""
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:

    class _Package(ModuleType):
        """A package in which a public name is never a submodule of that name.

        The import of a submodule makes it an attribute of its package. But `lean_merge.merge`,
        `lean_merge.plan` and `lean_merge.verify` are functions, whatever was imported before.
        """

        def __setattr__(self, name: str, value: Any) -> None:
            if not (isinstance(value, ModuleType) and name in _HOME_OF):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first asked for."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
