"""The evidence about one weight from which a method decides: numbers, and low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoleFacts:
    """The spectrum of one task vector.

    Attributes
    ----------
    sigma, angles : Tensor [r], float64
        Leading singular values, and bounds on the sine of the right vectors' angle errors.
    rank : int
        Numerical rank of the whole task vector.
    gap : float
        (sigma_1 - sigma_2) / sigma_1.
    nuclear : float or None
        Sum of all singular values; None until it is estimated.
    doubt : float
        Share of `nuclear` that may be rounding error.
    is_faint : bool
        Whether the task vector is not zero, but its products underflow; the rank is then 0.
    """

    sigma: Tensor
    angles: Tensor
    rank: int
    gap: float
    nuclear: float | None = None
    doubt: float = 0.0
    is_faint: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """The numbers measured on one weight, before any parameter is applied to them.

    Attributes
    ----------
    shape : (int, int)
        The numbers of rows (out) and columns (in).
    roles : tuple of RoleFacts
        The spectrum of the MLLM's task vector, then of each expert's.
    similarity : tuple of Tensor [min(r, q)], float64
        For each expert, the cosines between its right vectors and the MLLM's corresponding ones.
    leading : tuple of (float, float) or None
        For each expert, the sums of the q leading singular values: the MLLM's, then its own.
    squared_norms : tuple of float
        The squared Frobenius norms of all task vectors, the MLLM's first.
    is_whole : bool
        Whether whole spectra were computed, so that no direction is unknown.
    is_exhausted : bool
        Whether the sketches reached their largest depth, so that another would tell no more.
    stored : int
        For how many of the MLLM's leading directions the evidence stores vectors and images.
    """

    shape: tuple[int, int]
    roles: tuple[RoleFacts, ...]
    similarity: tuple[Tensor, ...]
    leading: tuple[tuple[float, float] | None, ...]
    squared_norms: tuple[float, ...] = ()
    is_whole: bool = False
    is_exhausted: bool = False
    stored: int = 0


class Factors(Protocol):
    """The MLLM's right singular vectors of one weight, and each expert's images of them."""

    @property
    def bytes_read(self) -> int:
        """Return how many bytes of the factors were read from files so far."""

    def vectors(self, kept: Tensor) -> Tensor:
        """Return the right singular vectors [in, n] float32 with the indices `kept` [n]."""

    def images(self, expert: int, kept: Tensor) -> Tensor:
        """Return dM v_i [out, n] float32 for i in `kept` [n]; experts are numbered from 0."""


@dataclass(frozen=True, slots=True)
class FactorsInMemory:
    """Factors of all stored directions, held in memory.

    `right` is [in, r], and `of_experts` holds the images [out, r] of each expert.
    """

    right: Tensor
    of_experts: tuple[Tensor, ...]

    @property
    def bytes_read(self) -> int:
        """Return 0, because nothing is read from files."""
        return 0

    def vectors(self, kept: Tensor) -> Tensor:
        """Return the right singular vectors [in, n] float32 with the indices `kept` [n]."""
        return self.right[:, kept]

    def images(self, expert: int, kept: Tensor) -> Tensor:
        """Return dM v_i [out, n] float32 for i in `kept` [n]; experts are numbered from 0."""
        return self.of_experts[expert][:, kept]


@dataclass(frozen=True, slots=True)
class Portrait:
    """The update that one expert would give if it were selected with all stages.

    Attributes
    ----------
    gamma : Tensor [n], float64
        Importance of the computed directions.
    update_norm : float
        Frobenius norm of the update at scale 1.
    update_relative : float
        That norm divided by the norm of the rescaled task vector.
    effective_rank : float
        (sum w)^2 / sum w^2 of the update's squared singular values w.
    energy_kept, energy_inside : float
        Shares of the task vector's squared norm that the update keeps, before it is rescaled, and
        that lie in the stored directions at all.
    """

    gamma: Tensor
    update_norm: float
    update_relative: float
    effective_rank: float
    energy_kept: float
    energy_inside: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts and factors of one weight; `portraits` is empty unless it was asked for."""

    facts: Facts
    factors: Factors
    portraits: tuple[Portrait | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Compared:
    """The similarity of one weight and expert that is compared with the expert's threshold.

    Attributes
    ----------
    similarity
        The similarity that is compared.
    directions
        The number of cosines of which `similarity` is the largest.
    bearable
        The similarity from which directions that align by chance carry little of the update; 0 if
        they always carry most.
    threshold
        The threshold that applies.
    """

    similarity: float
    directions: int
    bearable: float
    threshold: float
