"""Orders in which families store the rows of a weight.

The modules of this folder are imported when a model's rows turn out not to be in the base's order:
`finding` then says where they are, and every other module which order that is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def order_finder() -> Callable[..., str | None]:
    """Return `finding.order_in_words`, once all modules that know orders are imported."""
    modules: dict[str, Any] = {
        each.name: importlib.import_module(f"{__name__}.{each.name}")
        for each in pkgutil.iter_modules(__path__)
    }
    finder: Callable[..., str | None] = modules["finding"].order_in_words
    return finder
