"""What stands in a dictionary that may have been edited: numbers, texts and lists, or None."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lean_merge.errors import OutputError, plain, shown


def number(value: Any) -> float | None:
    """A finite number, None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def short(value: Any, digits: int = 5) -> float | None:
    """A number as many digits as a page shows, which keeps the page small."""
    found = number(value)
    return None if found is None else float(f"{found:.{digits}g}")


def whole(value: Any) -> int | None:
    """An integer, None for all else."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() else None


def text(value: Any) -> str | None:
    """A text in which nothing steers a browser or terminal, None for all else."""
    return plain(value) if isinstance(value, str) else None


def texts(value: Any) -> list[str]:
    """The texts of a list."""
    return [found for each in items(value) if (found := text(each)) is not None]


def items(value: Any) -> list[Any]:
    """A list; empty for all else."""
    return value if isinstance(value, list) else []


def mapping(value: Any) -> Mapping[str, Any]:
    """A dictionary; empty for all else."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """A list's dictionaries; what is none becomes an empty one, so that places are kept."""
    return [mapping(each) for each in items(value)]


def check_version(data: Any, what: str, known: int = 1) -> None:
    """Raises OutputError unless `data` is a dictionary of the version that is known here."""
    version = mapping(data).get("version")
    if type(version) is not int or version != known:
        raise OutputError(
            f"The {what} is of version {shown(version)}, and this program shows version {known}; "
            "use the lean-merge that wrote it, or make it again."
        )
