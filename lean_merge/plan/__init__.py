"""A plan tells all that a merge will do, from a recipe and headers, before it does any of it.

`planning` has the steps. In their order, these modules carry them out:

    scope         which weights are merged: include and exclude
    parameters    with which method, and which parameters at each weight
    evidence      which of them decide from an analysis
    resources     what of the machine may be used
    formulas      what each allocation takes
    fitting       what stays in memory, what is analysed at a time, what is read
    runfacts      what must agree for a journal to be continued
"""

from lean_merge.plan.planning import Plan, Prediction, plan, plan_again

__all__ = ["Plan", "Prediction", "plan", "plan_again"]
