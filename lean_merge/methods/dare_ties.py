"""DARE with the election of signs of TIES (arXiv:2311.03099)."""

from __future__ import annotations

from typing import ClassVar

from lean_merge.methods.dare_linear import DareLinear, DareParameters
from lean_merge.methods.registry import register


@register
class DareTies(DareLinear):
    """W = W_0 + scale * the mean, over the task vectors that agree in sign, of random entries.

    Entries are dropped and enlarged as in `dare_linear`, and signs are elected as in `ties`.
    """

    name: ClassVar[str] = "dare_ties"
    evidence: ClassVar[str] = "published and here"
    parameters_type = DareParameters
    elects: ClassVar[bool] = True
