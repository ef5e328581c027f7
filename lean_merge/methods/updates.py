"""What a method adds to the MLLM's rows of one weight: an `Update`, in one of four kinds.

Every kind is local to rows: row i of the update needs row i of the task vectors and nothing else
of them. So the engine reads, adds, rounds and writes a few rows at a time, and asks no update
which kind it is.
"""

from __future__ import annotations

import abc
import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Update(abc.ABC):
    """The update of one weight [out, in]: `W = W_mllm + update`, rounded once by the engine."""

    @property
    def reads(self) -> tuple[bool, ...]:
        """Which task vectors' rows `rows` needs: the MLLM's, then each expert's; empty for none."""
        return ()

    @property
    def scratch(self) -> int:
        """How many blocks of the size of `out` each worker lends to `rows`."""
        return 0

    @abc.abstractmethod
    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """Write the update's `rows` to `out` [t, in] float32; several threads may do so at once.

        Parameters
        ----------
        task_vectors : sequence of Tensor [t, in] or None
            These rows of the task vectors, in their own dtype; None where `reads` is False.
        scratch : Tensor [k, t, in], float32
            Memory to work with, `scratch` blocks of it, with anything in it.
        """

    @abc.abstractmethod
    def digest(self) -> bytes:
        """SHA-256 that is equal for two updates of one weight only if they write equal rows."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Left [out, r] and right [r, in], float32, whose product is the update; None if there
        are none, because its rank is full or unknown."""
        return None

    def norms(self, squared_norms: Sequence[float]) -> tuple[float, ...]:
        """Frobenius norms of what each expert adds; empty where the task vectors' do not tell.

        Parameters
        ----------
        squared_norms
            The squared Frobenius norms of the task vectors, the MLLM's first.
        """
        del squared_norms
        return ()

    def on_cpu(self) -> Update:
        """This update with everything that it holds on the CPU, where rows are written."""
        return self


@dataclass(frozen=True, slots=True)
class Combined(Update):
    """sum_j coefficients[j] * task_vector_j, the MLLM's task vector first."""

    coefficients: tuple[float, ...]

    @property
    def reads(self) -> tuple[bool, ...]:
        """Those whose coefficient is not zero."""
        return tuple(coefficient != 0.0 for coefficient in self.coefficients)

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """The sum, in the order of the task vectors."""
        out.zero_()
        for coefficient, task_vector in zip(self.coefficients, task_vectors, strict=True):
            if coefficient and task_vector is not None:
                out.add_(task_vector, alpha=coefficient)

    def digest(self) -> bytes:
        """The digest of the coefficients."""
        packed = struct.pack(f"<{len(self.coefficients)}d", *self.coefficients)
        return hashlib.sha256(packed).digest()

    def norms(self, squared_norms: Sequence[float]) -> tuple[float, ...]:
        """|coefficient| times the task vector's norm."""
        pairs = zip(self.coefficients[1:], squared_norms[1:], strict=True)
        return tuple(abs(c) * math.sqrt(square) if c else 0.0 for c, square in pairs)


@dataclass(frozen=True, slots=True)
class LowRank(Update):
    """left @ right, with left [out, r] and right [r, in] in float32."""

    left: Tensor
    right: Tensor

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """These rows of the product."""
        torch.mm(self.left[rows], self.right, out=out)

    def digest(self) -> bytes:
        """The digest of both factors."""
        return _digest_of(self.left, self.right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors."""
        return self.left, self.right

    def on_cpu(self) -> LowRank:
        """The same factors on the CPU."""
        return LowRank(self.left.cpu(), self.right.cpu())


@dataclass(frozen=True, slots=True)
class Dense(Update):
    """A matrix [out, in] in float32, which the method computed whole.

    `Method.cost` counts it as workspace.
    """

    matrix: Tensor

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """These rows of the matrix."""
        out.copy_(self.matrix[rows])

    def digest(self) -> bytes:
        """The digest of the matrix."""
        return _digest_of(self.matrix)

    def on_cpu(self) -> Dense:
        """The same matrix on the CPU."""
        return Dense(self.matrix.cpu())


def _digest_of(*tensors: Tensor) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.digest()


__all__ = ["Combined", "Dense", "LowRank", "Update"]
