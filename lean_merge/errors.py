"""Every exception that the package raises on purpose.

    LeanMergeError
    |-- RecipeError        what was asked for makes no sense             exit 2
    |-- CheckpointError    a file that cannot be read as a checkpoint    exit 1
    |-- CoverageError      the roles do not share one foundation         exit 1
    |-- DataError          NaN, Inf or overflow in the numbers           exit 1
    |-- OutputError        the output folder cannot be written           exit 1
    `-- BudgetError        does not fit memory, device memory or disk    exit 4

A message is one or two sentences. It tells what is wrong, naming file and tensor, and what to do.
"""

from __future__ import annotations

import unicodedata
from typing import Any


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


def shown(value: Any) -> str:
    """Return `value` as a literal that is safe and short enough for a message.

    Control characters are escaped, so that bad input cannot disturb a terminal, and long texts,
    huge numbers and nested lists are cut short.
    """
    if isinstance(value, str):
        literal = repr(value[:120])
        whole = len(value) <= 120 and len(literal) <= 122
        return literal if whole else _cut(literal, repr(value[-10:]))
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 256 else f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} items"
    if isinstance(value, (list, tuple)) and all(map(_is_word, value)):
        return f"[{', '.join(map(shown, value))}]"
    return f"a {type(value).__name__}"


def is_plain(text: str) -> bool:
    """Return whether a terminal, JSON and YAML show `text` as it is.

    Control characters, lone surrogates, line separators and characters that turn the reading
    direction are not plain. Joiners, which some scripts and emoji need, are.
    """
    if text.isascii():
        return text.isprintable()
    return not any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} or c in _TURNS for c in text)


def plain(text: str) -> str:
    """Return `text` with all characters escaped that are not plain, except line ends."""
    if is_plain(text):
        return text
    return "".join(
        c if c == "\n" or is_plain(c) else c.encode("unicode_escape").decode() for c in text
    )


_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))


def _cut(literal: str, end: str) -> str:
    return f"{literal[:100]}...{end[1:]}"
