"""Every exception that the package raises on purpose.

    LeanMergeError
    |-- RecipeError        what was asked for makes no sense             exit 2
    |-- CheckpointError    a file that cannot be read as a checkpoint    exit 1
    |-- CoverageError      the roles do not share one foundation         exit 1
    |-- DataError          NaN, Inf or overflow in the numbers           exit 1
    |-- OutputError        the output folder cannot be written           exit 1
    `-- BudgetError        does not fit memory, device memory or disk    exit 4

A message is one or two sentences: the fact, naming file and tensor, then the mend.
"""

from __future__ import annotations


class LeanMergeError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class RecipeError(LeanMergeError):
    """The recipe or an argument makes no sense."""

    exit_code = 2


class CheckpointError(LeanMergeError):
    """A folder or file cannot be read as a checkpoint."""


class CoverageError(LeanMergeError):
    """In-scope weights of the base do not map to the MLLM or to an expert."""


class DataError(LeanMergeError):
    """The numbers of a tensor cannot be merged: NaN, Inf, or overflow of the output dtype."""


class OutputError(LeanMergeError):
    """The output folder cannot be written, or something that exists would be lost."""


class BudgetError(LeanMergeError):
    """The work does not fit the memory, device memory or disk that it was given."""

    exit_code = 4
