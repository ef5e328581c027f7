"""What looking at one weight tells before any decision: numbers, and factors to decide with."""

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
        Leading singular values, and bounds on the sine of the right vectors' errors.
    rank : int
        Numerical, of the whole.
    gap : float
        (sigma_1 - sigma_2) / sigma_1.
    nuclear : float or None
        Sum of all singular values; None before any was estimated.
    doubt : float
        Share of `nuclear` that may be rounding.
    is_faint : bool
        Not zero, but its products underflow; the rank is then 0.
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
    """The numbers of one weight before any parameter has touched them.

    Attributes
    ----------
    shape : (int, int)
        out, in.
    roles : tuple of RoleFacts
        The MLLM's, then each expert's.
    similarity : tuple of Tensor [min(r, q)], float64
        Of each expert: cosines between the corresponding right vectors and the MLLM's.
    leading : tuple of (float, float) or None
        Of each expert: sums of the q leading singular values, the MLLM's and its own.
    squared_norms : tuple of float
        Of all task vectors.
    is_whole : bool
        Whether whole spectra were computed, so that no direction is unknown.
    is_exhausted : bool
        Whether the sketches went as deep as they go, so that no better look is to be had.
    stored : int
        How many of the MLLM's leading directions the evidence has vectors and images of.
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
    """The MLLM's directions of one weight, and what the experts' task vectors make of them."""

    @property
    def bytes_read(self) -> int:
        """How many bytes of them were read so far."""

    def vectors(self, kept: Tensor) -> Tensor:
        """Right singular vectors [in, n] float32 of the directions with these indices [n]."""

    def images(self, expert: int, kept: Tensor) -> Tensor:
        """dM v_i [out, n] float32 of the expert of that number, from 0."""


@dataclass(frozen=True, slots=True)
class FactorsInMemory:
    """All `stored` directions: right [in, r], and for each expert its images [out, r]."""

    right: Tensor
    of_experts: tuple[Tensor, ...]

    @property
    def bytes_read(self) -> int:
        """None."""
        return 0

    def vectors(self, kept: Tensor) -> Tensor:
        """As `Factors` has it."""
        return self.right[:, kept]

    def images(self, expert: int, kept: Tensor) -> Tensor:
        """As `Factors` has it."""
        return self.of_experts[expert][:, kept]


@dataclass(frozen=True, slots=True)
class Portrait:
    """What the parameters make of one expert's task vector, were it selected with all stages.

    Attributes
    ----------
    gamma : Tensor [n], float64
        Importance of the computed directions.
    update_norm : float
        Of the update at scale 1.
    update_relative : float
        Against the norm of the rescaled task vector.
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
    """Facts and factors of one weight; `portraits` of its experts where they were asked for."""

    facts: Facts
    factors: Factors
    portraits: tuple[Portrait | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Compared:
    """What of one weight and expert is held against the threshold, and what chance does to it.

    Attributes
    ----------
    similarity
        Which is compared.
    directions
        Of how many cosines it is the largest.
    bearable
        The similarity from which directions that align by chance carry little of the update; 0 if
        they always carry most.
    threshold
        In force.
    """

    similarity: float
    directions: int
    bearable: float
    threshold: float
