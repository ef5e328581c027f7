"""Methods that move the MLLM's weights toward the experts' by shares, without a base."""

from __future__ import annotations

import abc
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lean_merge.methods.elementwise import Block, ElementwiseMethod

P = TypeVar("P")

Shares = tuple[tuple[float, ...], float]
"""The share of each expert, and what the MLLM's weight is multiplied by beside."""


class InterpolatingMethod(ElementwiseMethod[P], abc.ABC):
    """The update sum_k share_k (W_k - W_mllm) + more * W_mllm, of the weights themselves.

    What `statistics` returns are the shares and `more`, which is 0 on a straight line.
    """

    differences: ClassVar[bool] = False

    @property
    def scratch(self) -> int:
        """Return how many blocks `fill` needs: one, for the distance to an expert."""
        return 1

    def fill(self, block: Block, out: Tensor) -> None:
        """Write these rows of the update to `out`."""
        mllm, *experts = block.task_vectors
        shares, more = block.statistics
        (apart,) = block.scratch
        torch.mul(mllm, more, out=out)
        # The weights are close, so that their differences are all but exact.
        for share, expert in zip(shares, experts, strict=True):
            if share:
                out.add_(torch.sub(expert, mllm, out=apart), alpha=share)


__all__ = ["InterpolatingMethod", "Shares"]
