"""An update that is the sum of task vectors with coefficients and of a computed part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lean_merge.methods.updates import Combined, Dense, LowRank, Update


@dataclass(frozen=True, slots=True)
class Joined(Update):
    """The sum of task vectors with coefficients and of a low-rank or dense part."""

    combined: Combined
    part: LowRank | Dense

    @property
    def reads(self) -> tuple[bool, ...]:
        """Tell for each task vector whether its coefficient is not zero."""
        return self.combined.reads

    @property
    def scratch(self) -> int:
        """Return one block, for the rows of the part."""
        return 1

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """Write these rows of the sum to `out`."""
        self.combined.rows(rows, task_vectors, scratch, out)
        self.part.rows(rows, task_vectors, scratch, scratch[0])
        out.add_(scratch[0])

    def digest(self) -> bytes:
        """Return SHA-256 of the digests of both."""
        return hashlib.sha256(self.combined.digest() + self.part.digest()).digest()

    def on_cpu(self) -> Joined:
        """Return the same update with the part on the CPU."""
        return Joined(self.combined, self.part.on_cpu())
