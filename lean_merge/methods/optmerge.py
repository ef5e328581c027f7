"""OptMerge: WUDI on the leading singular directions of every task vector (arXiv:2505.19892)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lean_merge.linalg import gram64
from lean_merge.methods.base import Decision, Passes, WeightContext
from lean_merge.methods.joint import JointParameters, by_strips, multiplied, side_by_side
from lean_merge.methods.leading import find_leading
from lean_merge.methods.ranges import check_rank
from lean_merge.methods.registry import register
from lean_merge.methods.truncating import TruncatingMethod
from lean_merge.methods.wudi import check_descent, mixture


@dataclass(frozen=True, slots=True)
class OptMergeParameters(JointParameters):
    """Parameters of OptMerge.

    scale : factor of the merged task vector.
    weight : factor of the expert's task vector, of each expert by itself.
    mllm_weight : factor of the MLLM's task vector.
    steps : T, twice the learning rate times the number of iterations of the descent.
    start : t_0, the `sum` or the `mean` of all task vectors after they are cut.
    rank : how many directions of each task vector are kept; `auto`, min(out, in) / N of N models.
    """

    steps: float = 300.0
    start: str = "mean"
    rank: int | str = "auto"

    def __post_init__(self) -> None:
        JointParameters.__post_init__(self)
        check_descent(self.steps, self.start)
        check_rank(self.rank)


@register
class OptMerge(TruncatingMethod[OptMergeParameters]):
    """W = W_0 + scale * t, the task vector that interferes least with the cut ones of all models.

    Every task vector is cut to its leading singular directions; t is then that of WUDI with all
    eigenvalues kept, worked out in the factors.
    """

    name: ClassVar[str] = "optmerge"
    reference: ClassVar[str] = "arXiv:2505.19892"
    evidence: ClassVar[str] = "published and here"
    parameters_type = OptMergeParameters

    def rank(self, shape: tuple[int, int]) -> int:
        """Return how many directions of each task vector are kept at most."""
        most = min(shape) // self.models
        return most if self.common.rank == "auto" else min(int(self.common.rank), *shape)

    def analyze(self, weight: WeightContext) -> Passes:
        """Find the leading directions of all task vectors, and solve for the merged one."""
        rank = self.rank(weight.shape)
        found = yield from find_leading(weight, roles=self.roles, rank=rank)
        records = self.records(weight, found)
        live = [
            (each.parts, own)
            for each, own in zip(found, self.weights, strict=True)
            if each.parts.sigma.numel() and own > 0
        ]
        del found
        if not live:
            zero = (
                torch.zeros(weight.shape[0], 0, dtype=torch.float32),
                torch.zeros(0, weight.shape[1], dtype=torch.float32),
            )
            return Decision(records, self.in_place_of_mllm(multiplied(weight, *zero)))
        norms = [float(parts.sigma.norm()) for parts, _ in live]
        right = side_by_side(
            [
                parts.right * (parts.sigma / norm).to(parts.right)
                for (parts, _), norm in zip(live, norms, strict=True)
            ]
        )
        left = side_by_side([parts.left for parts, _ in live])
        mixed = mixture(
            weight,
            gram64(right, right),
            [parts.sigma.numel() for parts, _ in live],
            [own * norm for (_, own), norm in zip(live, norms, strict=True)],
            1.0 if self.common.start == "sum" else 1 / self.models,
            steps=self.common.steps,
            kept=right.shape[1],
        )
        mixed *= self.common.scale
        left = by_strips(weight, left, mixed.to(left), dtype=left.dtype)
        return Decision(records, self.in_place_of_mllm(multiplied(weight, left, right.T)))
