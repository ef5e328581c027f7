"""From a recipe and headers to everything that a merge will do, before it does any of it."""

from lean_merge.plan.planning import (
    ANALYSIS,
    DECODED_DTYPE,
    Plan,
    Prediction,
    plan,
    plan_again,
    plan_analysis,
    plan_stream,
)

__all__ = [
    "ANALYSIS",
    "DECODED_DTYPE",
    "Plan",
    "Prediction",
    "plan",
    "plan_again",
    "plan_analysis",
    "plan_stream",
]
