"""Updates of full rank as factors of a given rank, so that an adapter can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lean_merge.linalg import Pass, random_block
from lean_merge.linalg.krylov import BlockKrylov
from lean_merge.linalg.spectrum import exact_spectrum
from lean_merge.methods import (
    AnalysisCost,
    LowRank,
    Method,
    Passes,
    Survey,
    Update,
    WeightContext,
)
from lean_merge.tasks.tiles import LANES, STRIP_ELEMENTS, strip_rows, tile_rows

WHOLE_UP_TO = 1024
"""Updates with min(out, in) up to this are decomposed whole, which is exact."""
DEPTH = 4
"""So many passes over a larger update find its leading directions."""
_OVERSAMPLED = 8


@dataclass(frozen=True, slots=True)
class _CutPlan:
    """The way in which the update of a weight [out, in] is cut to a rank, and its cost."""

    shape: tuple[int, int]
    rank: int

    @property
    def block(self) -> int:
        """The number of columns of a Krylov block."""
        return self.rank + _OVERSAMPLED

    @property
    def is_whole(self) -> bool:
        """True if the update is decomposed as a whole matrix."""
        smaller = min(self.shape)
        return smaller <= WHOLE_UP_TO or DEPTH * self.block > smaller

    @property
    def passes(self) -> int:
        """The number of passes over the update's rows."""
        return 1 if self.is_whole else DEPTH

    def workspace(self, scratch: int) -> int:
        """The bytes that it takes beside partial sums, where rows take `scratch` blocks."""
        out_features, in_features = self.shape
        tile = min(out_features, tile_rows(in_features)) * in_features
        strip = min(out_features, strip_rows(in_features, STRIP_ELEMENTS)) * in_features
        formed = LANES * (tile + scratch * strip) * 4
        factors = 2 * (out_features + in_features) * self.rank * 4
        if self.is_whole:
            smaller = min(self.shape)
            # The matrix, then its Gram matrix, eigenvectors and LAPACK's workspace, and a chunk.
            solved = 5 * smaller**2 * 8 + 3 * min(2048, max(self.shape)) * smaller * 8
            return formed + factors + out_features * in_features * 4 + solved
        columns = DEPTH * self.block
        blocks = columns * (2 * in_features + out_features) * 4
        small = 10 * columns**2 * 8
        return formed + factors + blocks + small + 4 * max(self.shape) * self.block * 4


class Approximating(Method[Any]):
    """A method whose updates are the best approximations of one rank to those of another.

    Parameters
    ----------
    method
        The other method. Its updates that have factors stay as they are.
    rank
        The rank.
    """

    def __init__(self, method: Method[Any], rank: int) -> None:
        super().__init__(method.parameters)
        self._method, self._rank = method, rank
        # A method without passes decides on weights that no expert changes too.
        always = method.changes_by_itself or not method.cost((8, 8), item=4).passes
        vars(self).update(
            differences=method.differences,
            changes_by_itself=always,
            rule=method.rule,
        )

    @property
    def is_settled(self) -> bool:
        """Return whether the other method's parameters are all known."""
        return self._method.is_settled

    def forms_exactly(self, shape: tuple[int, int]) -> bool:
        """Return whether the other method's task vectors are formed in float32."""
        return self._method.forms_exactly(shape)

    def survey(self) -> Survey | None:
        """Return the other method's survey."""
        return self._method.survey()

    def analyze(self, weight: WeightContext) -> Passes:
        """Let the other method decide, and cut its update to the rank."""
        decision = yield from self._method.analyze(weight)
        update = decision.update
        if update is None or update.factors() is not None:
            return decision
        update = update.on_cpu()
        cut = approximate(weight, update, self._rank)
        experts = decision.experts
        if norms := update.norms(decision.squared_norms or weight.squared_norms()):
            pairs = zip(experts, norms, strict=True)
            experts = tuple(replace(record, update_norm=norm) for record, norm in pairs)
        return replace(decision, update=cut, experts=experts)

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Return the cost of the other method and of the passes over its update."""
        cost, sketch = self._method.cost(shape, item=item), _CutPlan(shape, self._rank)
        return replace(
            cost,
            workspace=cost.workspace + sketch.workspace(cost.scratch),
            widest=max(cost.widest, 0 if sketch.is_whole else sketch.block),
            passes=cost.passes + sketch.passes,
            usual_passes=cost.usual_passes + sketch.passes,
        )

    def largest_rank(self, shape: tuple[int, int]) -> int:
        """Return the rank, of which a small weight has fewer."""
        return min(self._rank, *shape)


def approximated(
    methods: Mapping[str, Method[Any]], shapes: Mapping[str, tuple[int, int]], rank: int
) -> dict[str, Method[Any]]:
    """Return methods of which every update has factors; `shapes` are those of the weights."""
    made: dict[int, Method[Any]] = {}
    found = {}
    for name, method in methods.items():
        found[name] = method
        if name in shapes and method.largest_rank(shapes[name]) is None:
            found[name] = made.setdefault(id(method), Approximating(method, rank))
    return found


def approximate(weight: WeightContext, update: Update, rank: int) -> LowRank:
    """Cut an update U [out, in] to its leading `rank` directions, by passes over its rows.

    A small one is decomposed whole. Of a larger one, the leading right directions V are sought in a
    block Krylov subspace (Musco and Musco 2015), and the result is (U V) V^T, whose error follows
    from ||U||_F.
    """
    assert weight.over_update is not None
    sketch = _CutPlan(weight.shape, min(rank, *weight.shape))
    if sketch.is_whole:
        dense = weight.over_update(update, Pass(dense=True)).dense
        assert dense is not None
        sigma, vectors = exact_spectrum(dense, sketch.rank)
        total, kept = float((sigma**2).sum()), float((sigma[: sketch.rank] ** 2).sum())
        left, right = dense @ vectors, vectors.T.contiguous()
    else:
        start = random_block(
            weight.shape[1], sketch.block, seed=weight.seed, name=weight.name, role="update"
        )
        krylov = BlockKrylov(start, dtype=torch.float32)
        total = 0.0
        for depth in range(DEPTH):
            wanted = krylov.next_pass()
            products = weight.over_update(
                update, wanted if depth else replace(wanted, reduce=_square)
            )
            if products.reduced is not None:
                total = float(products.reduced)
            krylov.absorb(products)
        found = krylov.settled(sketch.rank)
        left, right = found.images, found.vectors.T.contiguous()
        kept = float((found.sigma**2).sum())
    error = math.sqrt(max(0.0, total - kept) / total) if total else 0.0
    return LowRank(left, right, error)


def _square(rows: slice, numbers: Tensor) -> Tensor:
    del rows
    return numbers.double().square().sum()


__all__ = ["Approximating", "approximate", "approximated"]
