"""Scopes that take in more than the matrices of layers, one module each.

The module of a scope is imported when a recipe asks for it. Its `shared_places` finds the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

MATRICES = "matrices"
"""The scope of matrices alone, which has no module."""


def places_beside(scope: str) -> Callable[..., Any]:
    """Return the `shared_places` of a scope, which finds weights that all roles have."""
    found: Callable[..., Any] = importlib.import_module(f"{__name__}.{scope}").shared_places
    return found
