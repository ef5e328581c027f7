"""Base class of methods whose task vectors have weights, the MLLM's among them."""

from __future__ import annotations

import abc
from typing import Protocol, TypeVar

from lean_merge.methods.base import Method


class WeighedParameters(Protocol):
    """Parameters that give every expert's task vector a weight, and the MLLM's one of its own."""

    @property
    def weight(self) -> float: ...

    @property
    def mllm_weight(self) -> float: ...


W = TypeVar("W", bound=WeighedParameters)


class WeighedMethod(Method[W], abc.ABC):
    """A method that treats the task vectors of all models alike, each times its weight."""

    @property
    def roles(self) -> int:
        """Return the number of task vectors, with the MLLM's, which is zero where there is none."""
        return len(self.parameters) + 1

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weight of each task vector, the MLLM's first; 0 where there is no MLLM."""
        of_mllm = self.common.mllm_weight if self.has_mllm else 0.0
        return of_mllm, *(own.weight for own in self.parameters)
