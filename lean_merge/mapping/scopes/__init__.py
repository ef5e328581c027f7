"""Scopes that take in more than the matrices of layers, one module each.

The module of a scope is imported when a recipe asks for it. Its `weights_beside` finds the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

MATRICES = "matrices"
"""The scope of matrices alone, which has no module."""


def finder_of(scope: str) -> Callable[..., Any]:
    """Return the `weights_beside` of a scope, which finds weights that all roles have."""
    found: Callable[..., Any] = importlib.import_module(f"{__name__}.{scope}").weights_beside
    return found
