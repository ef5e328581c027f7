"""Methods whose update is a sum of task vectors with coefficients that the parameters give."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from lean_merge.methods.base import Decision, ExpertRecord, Method, Passes, WeightContext
from lean_merge.methods.updates import Combined

P = TypeVar("P")


class LinearMethod(Method[P], abc.ABC):
    """A method that adds multiples of task vectors on every in-scope weight, without a pass."""

    reason: ClassVar[str] = "every in-scope weight is merged"

    @abc.abstractmethod
    def coefficients(self) -> tuple[float, ...]:
        """Return the coefficient of each task vector in the update, the MLLM's first."""

    def foreseen(self) -> tuple[float, ...]:
        """Return the coefficients themselves, with which the update is known before it is made."""
        return self.coefficients()

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """Tell for each task vector, the MLLM's first, whether its coefficient is not zero."""
        return tuple(coefficient != 0.0 for coefficient in self.coefficients())

    def analyze(self, weight: WeightContext) -> Passes:
        """Decide at once, without a pass."""
        coefficients = self.coefficients()
        records = tuple(
            ExpertRecord(
                selected=True, reason=self.reason, update_norm=None if coefficient else 0.0
            )
            for coefficient in coefficients[1:]
        )
        return Decision(records, Combined(coefficients) if any(coefficients) else None)
        yield  # makes this a generator, as the protocol wants


class LinearRule(LinearMethod[Any]):
    """The coefficients that stand in for a method for matrices at norms, biases and embeddings.

    Parameters
    ----------
    method
        The method for matrices.
    coefficients
        Those of the task vectors, the MLLM's first.
    rule
        What they make of the task vectors, as "the experts' task vectors are added, times scale".
    """

    reason: ClassVar[str] = "it is no matrix of a layer, so it is merged linearly"

    def __init__(self, method: Method[Any], coefficients: Sequence[float], rule: str) -> None:
        super().__init__(method.parameters)
        self.rule = rule
        self._coefficients = tuple(coefficients)

    def coefficients(self) -> tuple[float, ...]:
        """Return the given coefficients."""
        return self._coefficients


def added(method: Method[Any]) -> LinearRule:
    """Return W_mllm + sum_k scale_k dM_k, for a method that adds something of each expert's."""
    scales = (own.scale for own in method.parameters)
    return LinearRule(method, (0.0, *scales), "the experts' task vectors are added, times scale")


def averaged(method: Method[Any], weights: Sequence[float]) -> LinearRule:
    """Return W_0 + scale * the mean of all models' weighed task vectors, the MLLM's first."""
    share = method.common.scale / method.models
    coefficients = (share * weights[0] - 1.0, *(share * weight for weight in weights[1:]))
    return LinearRule(method, coefficients, "the mean of all task vectors is taken, times scale")
