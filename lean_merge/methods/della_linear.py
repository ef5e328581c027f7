"""DELLA's random dropping, with a sum in the place of elected signs (arXiv:2406.11617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lean_merge.methods.della import Della, DellaParameters
from lean_merge.methods.registry import register


@dataclass(frozen=True, slots=True)
class DellaLinearParameters(DellaParameters):
    __doc__ = DellaParameters.__doc__

    normalize: bool = False
    least_weight: ClassVar[float] = -100


@register
class DellaLinear(Della):
    """W = W_0 + scale * the sum of the task vectors, of which random entries are dropped.

    Entries are dropped and enlarged as in `della`.
    """

    name: ClassVar[str] = "della_linear"
    evidence: ClassVar[str] = "published and here"
    parameters_type = DellaLinearParameters
    elects: ClassVar[bool] = False
