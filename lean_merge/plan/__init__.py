"""From a recipe and headers to everything that a merge will do, before it does any of it."""

from lean_merge.plan.planning import Plan, Prediction, plan, plan_again

__all__ = ["Plan", "Prediction", "plan", "plan_again"]
