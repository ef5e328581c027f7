"""Compare models of different foundations, which cannot be merged.

A comparison shows what differs and how far apart the weights are, so that users see why the models
cannot be merged, and whether another pair could be.
"""

from lean_merge.studies.compare.document import COMPARISON, compare, differing
from lean_merge.studies.compare.folder import ComparisonResult, write_comparison

__all__ = ["COMPARISON", "ComparisonResult", "compare", "differing", "write_comparison"]
