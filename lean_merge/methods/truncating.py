"""Base class of joint methods that keep the leading singular directions of every task vector."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import replace

from lean_merge.methods.accuracy import accuracy_warnings
from lean_merge.methods.base import AnalysisCost, ExpertRecord, WeightContext
from lean_merge.methods.joint import JointMethod, P, product_bytes, with_core
from lean_merge.methods.leading import Leading, effort_of, leading_cost


class TruncatingMethod(JointMethod[P], abc.ABC):
    """A method that merges what is left of the task vectors once each is cut to a rank."""

    @abc.abstractmethod
    def rank(self, shape: tuple[int, int]) -> int:
        """Return how many directions of each task vector are kept at most."""

    def forms_exactly(self, shape: tuple[int, int]) -> bool:
        """Return whether everything is computed."""
        return effort_of(shape, roles=self.roles, rank=self.rank(shape)).exact

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of the singular triplets and of what joins them."""
        rank = self.rank(shape)
        cost = leading_cost(shape, roles=self.roles, rank=rank, item=item)
        return with_core(cost, shape, rank * self.models)

    def update_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of the merged task vector, in factors or whole."""
        return product_bytes(shape, self.rank(shape) * self.models)

    def warnings(self, records: Sequence[ExpertRecord]) -> list[str]:
        """Warn of sketches that did not become accurate."""
        return accuracy_warnings(records)

    def records(self, weight: WeightContext, found: Sequence[Leading]) -> tuple[ExpertRecord, ...]:
        """Return what the report says of every expert; `found` begins with the MLLM's directions.

        Parts that are joined no longer have norms of their own.
        """
        pairs = zip(found[1:], weight.squared_norms()[1:], self.parameters, strict=True)
        return tuple(
            replace(
                leading.record(leading.parts.sigma.numel(), square=square, factor=own.weight),
                update_norm=None,
            )
            for leading, square, own in pairs
        )
