"""A recipe's values that differ between weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ANY = "*"
"""The filter that every weight matches."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """A parameter's value for the weights whose names match `filter`."""

    filter: str
    value: Any
