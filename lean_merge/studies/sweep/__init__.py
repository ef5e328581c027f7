"""Merge one recipe with many different parameters, and put the results into a table."""

from lean_merge.studies.sweep.evaluation import Evaluation
from lean_merge.studies.sweep.grid import Grid, MethodGrid
from lean_merge.studies.sweep.run import PointEvent, SweepResult, sweep
from lean_merge.studies.sweep.table import CSV, TABLE, result_names, result_of

__all__ = [
    "CSV",
    "TABLE",
    "Evaluation",
    "Grid",
    "MethodGrid",
    "PointEvent",
    "SweepResult",
    "result_names",
    "result_of",
    "sweep",
]
