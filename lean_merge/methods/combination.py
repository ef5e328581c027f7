"""Methods whose update is a sum of task vectors with coefficients that the parameters give."""

from __future__ import annotations

import abc
from typing import TypeVar

from lean_merge.methods.base import Decision, ExpertRecord, Method, Passes, WeightContext
from lean_merge.methods.updates import Combined

P = TypeVar("P")


class LinearMethod(Method[P], abc.ABC):
    """A method that adds multiples of task vectors on every in-scope weight, without a pass."""

    @abc.abstractmethod
    def coefficients(self) -> tuple[float, ...]:
        """Return the coefficient of each task vector in the update, the MLLM's first."""

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell for each task vector, the MLLM's first, whether its coefficient is not zero."""
        return tuple(coefficient != 0.0 for coefficient in self.coefficients())

    def analyze(self, weight: WeightContext) -> Passes:
        """Decide at once, without a pass."""
        coefficients = self.coefficients()
        records = tuple(
            ExpertRecord(
                selected=True,
                reason="every in-scope weight is merged",
                update_norm=None if coefficient else 0.0,
            )
            for coefficient in coefficients[1:]
        )
        return Decision(records, Combined(coefficients) if any(coefficients) else None)
        yield  # makes this a generator, as the protocol wants
