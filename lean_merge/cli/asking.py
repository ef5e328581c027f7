"""Ask the methods themselves what they do and need, for which torch is imported."""

from __future__ import annotations

import inspect
from typing import Any

from lean_merge.cli.methodtable import EXAMPLE_SHAPE
from lean_merge.methods import Method, all_methods


def told_methods() -> list[dict[str, Any]]:
    """Return what every method does and needs, and its parameters with their defaults."""
    return [_method_facts(name, method) for name, method in sorted(all_methods().items())]


def _method_facts(name: str, method: type[Method[Any]]) -> dict[str, Any]:
    made = method([method.parameters_type()])
    cost, survey = made.cost(EXAMPLE_SHAPE, item=2), made.survey()
    surveyed = 0 if survey is None else survey.passes
    return {
        "name": name,
        "summary": inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " "),
        "needs": {
            "passes": cost.usual_passes + surveyed,
            "most_passes": cost.passes + surveyed,
            "memory": cost.workspace,
        },
        "adapter": "exact" if made.largest_rank(EXAMPLE_SHAPE) is not None else "cut",
        "evidence": method.evidence,
        "reference": method.reference,
        "parameters": [
            {
                "name": field.name,
                "default": list(field.default)
                if isinstance(field.default, tuple)
                else field.default,
                "per_expert": bool(field.metadata.get("per_expert")),
            }
            for field in method.parameter_fields()
        ],
        "help": inspect.cleandoc(method.parameters_type.__doc__ or ""),
    }
