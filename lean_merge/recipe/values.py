"""Values that differ between weights, as a recipe holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ANY = "*"
"""The filter that every weight matches."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """A parameter's value for the weights whose name `filter` matches."""

    filter: str
    value: Any
