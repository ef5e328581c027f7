"""Models of different foundations: what differs, and how far apart their weights are.

They cannot be merged, and users want to know why, and whether another pair would do.
"""

from lean_merge.studies.comparison.compare import COMPARISON, compare, differing, open_roles

__all__ = ["COMPARISON", "compare", "differing", "open_roles"]
