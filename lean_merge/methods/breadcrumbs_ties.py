"""Model Breadcrumbs with the election of signs of TIES (arXiv:2312.06795)."""

from __future__ import annotations

from typing import ClassVar

from lean_merge.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTiesParameters
from lean_merge.methods.registry import register


@register
class BreadcrumbsTies(Breadcrumbs):
    """W = W_0 + scale * the mean, over the task vectors that agree in sign, of middle entries.

    Of every task vector the entries are kept that `breadcrumbs` keeps, and signs are elected as in
    `ties`.
    """

    name: ClassVar[str] = "breadcrumbs_ties"
    evidence: ClassVar[str] = "published and here"
    parameters_type = BreadcrumbsTiesParameters
    elects: ClassVar[bool] = True
