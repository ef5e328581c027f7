"""TSV-Merge: merge the task vectors' leading singular directions, made orthogonal to each other.

Gargiulo et al., CVPR 2025 (arXiv:2412.00081).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lean_merge.linalg import gram64
from lean_merge.linalg.decomposition import inverse_root
from lean_merge.methods.base import Decision, Passes, WeightContext
from lean_merge.methods.joint import JointParameters, by_strips, multiplied, side_by_side
from lean_merge.methods.leading import find_leading
from lean_merge.methods.ranges import check_rank
from lean_merge.methods.registry import register
from lean_merge.methods.truncating import TruncatingMethod


@dataclass(frozen=True, slots=True)
class TsvParameters(JointParameters):
    """Parameters of TSV-Merge.

    scale : factor of the merged task vector.
    weight : factor of the expert's task vector, of each expert by itself.
    mllm_weight : factor of the MLLM's task vector.
    rank : how many directions of each task vector are kept; `auto`, min(out, in) / N of N models.
    """

    rank: int | str = "auto"

    def __post_init__(self) -> None:
        JointParameters.__post_init__(self)
        check_rank(self.rank)


@register
class TsvMerge(TruncatingMethod[TsvParameters]):
    """W = W_0 + scale * U S V^T, of all models' leading singular directions side by side.

    Of each of the N task vectors, the MLLM's among them, the leading min(out, in) / N singular
    triplets are kept, without those of singular value 0. U and V, which hold the vectors of all
    task vectors, are replaced by the nearest matrices with orthonormal columns.
    """

    name: ClassVar[str] = "tsv_m"
    reference: ClassVar[str] = "arXiv:2412.00081"
    evidence: ClassVar[str] = "published and here"
    parameters_type = TsvParameters

    def rank(self, shape: tuple[int, int]) -> int:
        """Return how many directions of each task vector are kept at most."""
        most = min(shape) // self.models
        return most if self.common.rank == "auto" else min(int(self.common.rank), most)

    def analyze(self, weight: WeightContext) -> Passes:
        """Find the leading directions of all task vectors, and merge them."""
        rank = self.rank(weight.shape)
        found = yield from find_leading(weight, roles=self.roles, rank=rank)
        records = self.records(weight, found)
        live = [(x.parts, own) for x, own in zip(found, self.weights, strict=True) if own > 0]
        sigma = side_by_side([parts.sigma * own for parts, own in live])
        left = side_by_side([parts.left for parts, _ in live])
        right = side_by_side([parts.right for parts, _ in live])
        del found, live
        core = inverse_root(gram64(left, left)) * (self.common.scale * sigma)
        core = core @ inverse_root(gram64(right, right))
        left = by_strips(weight, left, core.to(left), dtype=left.dtype)
        merged = multiplied(weight, left, right.T)
        return Decision(records, self.in_place_of_mllm(merged))
