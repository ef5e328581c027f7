"""A plan tells all that a merge will do, from a recipe and headers, before it does any of it.

`planning` has the steps. In their order, these modules carry them out:

    scope         choose the weights that are merged, by `include` and `exclude`
    parameters    give each weight its method and the method's parameters
    evidence      replace methods by those that decide from an analysis
    resources     find what of the machine may be used
    formulas      count the bytes of each allocation
    fitting       choose what stays in memory and what is analysed at the same time
    runfacts      collect the facts that must agree for a journal to be continued
"""

from lean_merge.plan.planning import Plan, Prediction, plan, plan_again

__all__ = ["Plan", "Prediction", "plan", "plan_again"]
