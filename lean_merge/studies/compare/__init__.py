"""Models of different foundations: what differs, and how far apart their weights are.

Such models cannot be merged, and users want to know why, and whether another pair would do.
"""

from lean_merge.studies.compare.document import COMPARISON, compare, differing
from lean_merge.studies.compare.folder import ComparisonResult, write_comparison

__all__ = ["COMPARISON", "ComparisonResult", "compare", "differing", "write_comparison"]
