"""An analysis: what its folder holds, how it is opened again, and what its numbers say."""

from lean_merge.analysis.document import ANALYSIS, build_analysis
from lean_merge.analysis.opening import Analysis, open_analysis
from lean_merge.analysis.thresholds import Survey, survey

__all__ = [
    "ANALYSIS",
    "Analysis",
    "Survey",
    "build_analysis",
    "open_analysis",
    "survey",
]
