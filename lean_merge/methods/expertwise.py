"""Decisions whose update adds a part of low rank of each expert's task vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lean_merge.methods.base import Decision
from lean_merge.methods.leading import Leading
from lean_merge.methods.updates import LowRank


def add_parts(
    found: Sequence[Leading],
    counts: Sequence[int],
    factors: Sequence[float],
    squares: Sequence[float],
) -> Decision:
    """Add, for each expert, its factor times the sum of its first singular triplets.

    Parameters
    ----------
    found
        The singular triplets of each expert's task vector.
    counts, factors
        How many of the triplets are added for each expert, and times what.
    squares
        The squared Frobenius norms of the experts' task vectors.
    """
    records, lefts, rights = [], [], []
    for leading, count, factor, square in zip(found, counts, factors, squares, strict=True):
        records.append(leading.record(count, square=square, factor=factor))
        if count and factor:
            parts = leading.parts
            scaled = (parts.sigma[:count] * factor).to(parts.left)
            lefts.append((parts.left[:, :count] * scaled).float())
            rights.append(parts.right[:, :count].T.float())
    if not lefts:
        return Decision(tuple(records))
    return Decision(tuple(records), LowRank(torch.cat(lefts, 1), torch.cat(rights, 0)))
