"""Merge by several processes, which a launcher starts, such as torchrun; see docs/scale.md."""

from lean_merge.studies.ranks.job import joined

__all__ = ["joined"]
