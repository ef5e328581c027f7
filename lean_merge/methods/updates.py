"""An `Update` is the matrix that a method adds to the MLLM's rows of one weight.

Every kind is local to rows: row i of the update needs row i of the task vectors and nothing
else of them. So the engine reads, adds, rounds and writes a few rows at a time, and asks no update
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

    omitted: float = 0.0
    """The relative Frobenius norm of what it leaves of the update that it approximates, if any."""

    @property
    def reads(self) -> tuple[bool, ...]:
        """Tell for each task vector, the MLLM's first, whether `rows` needs it; empty for none."""
        return ()

    @property
    def scratch(self) -> int:
        """Return how many blocks of the size of `out` each worker lends to `rows`."""
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
            Memory to work with; its contents are arbitrary, and k is the property `scratch`.
        """

    @abc.abstractmethod
    def digest(self) -> bytes:
        """Return a SHA-256 that two updates of one weight share only if they write equal rows."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return the factors left [out, r] and right [r, in], float32, whose product is the update.

        The result is None if the update's rank is full or unknown.
        """
        return None

    def norms(self, squared_norms: Sequence[float]) -> tuple[float, ...]:
        """Return the Frobenius norm of what each expert adds.

        The result is empty if it does not follow from the task vectors' norms.

        Parameters
        ----------
        squared_norms
            The squared Frobenius norms of the task vectors, the MLLM's first.
        """
        del squared_norms
        return ()

    def on_cpu(self) -> Update:
        """Return this update with all its tensors on the CPU, where rows are written."""
        return self


@dataclass(frozen=True, slots=True)
class Combined(Update):
    """The update sum_j coefficients[j] * task_vector_j, in which the MLLM's is the first."""

    coefficients: tuple[float, ...]

    @property
    def reads(self) -> tuple[bool, ...]:
        """Tell for each task vector whether its coefficient is not zero."""
        return tuple(coefficient != 0.0 for coefficient in self.coefficients)

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """Write these rows of the sum to `out`, added in the order of the task vectors."""
        pairs = zip(self.coefficients, task_vectors, strict=True)
        terms = [(c, each) for c, each in pairs if c and each is not None]
        if not terms:
            out.zero_()
        for number, (coefficient, task_vector) in enumerate(terms):
            if number:
                out.add_(task_vector, alpha=coefficient)
            else:
                out.copy_(task_vector).mul_(coefficient)

    def digest(self) -> bytes:
        """Return SHA-256 of the coefficients."""
        packed = struct.pack(f"<{len(self.coefficients)}d", *self.coefficients)
        return hashlib.sha256(packed).digest()

    def norms(self, squared_norms: Sequence[float]) -> tuple[float, ...]:
        """Return |coefficient| times the task vector's norm for each expert."""
        pairs = zip(self.coefficients[1:], squared_norms[1:], strict=True)
        return tuple(abs(c) * math.sqrt(square) if c else 0.0 for c, square in pairs)


@dataclass(frozen=True, slots=True)
class LowRank(Update):
    """The update left @ right, with left [out, r] and right [r, in] in float32."""

    left: Tensor
    right: Tensor
    omitted: float = 0.0

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """Write these rows of the product to `out`."""
        torch.mm(self.left[rows], self.right, out=out)

    def digest(self) -> bytes:
        """Return SHA-256 of both factors."""
        return _digest_of(self.left, self.right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return both factors."""
        return self.left, self.right

    def on_cpu(self) -> LowRank:
        """Return the same update with its factors on the CPU."""
        return LowRank(self.left.cpu(), self.right.cpu(), self.omitted)


@dataclass(frozen=True, slots=True)
class Dense(Update):
    """The update as a whole matrix [out, in] in float32, which the method computed.

    `Method.cost` counts the matrix as workspace.
    """

    matrix: Tensor

    def rows(
        self, rows: slice, task_vectors: Sequence[Tensor | None], scratch: Tensor, out: Tensor
    ) -> None:
        """Write these rows of the matrix to `out`."""
        out.copy_(self.matrix[rows])

    def digest(self) -> bytes:
        """Return SHA-256 of the matrix."""
        return _digest_of(self.matrix)

    def on_cpu(self) -> Dense:
        """Return the same update with its matrix on the CPU."""
        return Dense(self.matrix.cpu())


def _digest_of(*tensors: Tensor) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.digest()


__all__ = ["Combined", "Dense", "LowRank", "Update"]
