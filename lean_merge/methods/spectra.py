"""Compute the spectra of all task vectors of one weight, either whole or by sketches.

A pass over the rows serves every task vector at once, so their sketches advance together, until a
verdict is clear. `Effort` fixes beforehand how far they may go, and so what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.linalg.krylov import Deflation
from lean_merge.linalg.sketch import SingularSums, Sketch
from lean_merge.linalg.spectrum import exact_spectrum, numerical_rank
from lean_merge.methods.base import AnalysisCost, WeightContext

MAX_SUBSPACE = 1024
"""The largest subspace size q that the paper uses."""
EXACT_BELOW = 512
"""Weights with min(out, in) up to this are decomposed whole, which costs no more than a sketch."""
LOOK_DEPTH, MIN_DEPTH, MAX_DEPTH = 2, 4, 8
"""A sketch is first judged after 2 Krylov blocks, its rank may grow after 4, and it ends at 8."""
GROWN_DEPTH = MIN_DEPTH + 1
"""A sketch whose rank has grown ends at this many Krylov blocks; wider blocks need fewer."""
GROWN_BELOW = 8192
"""The rank may grow for weights with up to this many columns. With more, random directions weigh so
little that only a structured tail could need a larger rank; `omitted_share` reports that."""
QUADRATURE_BLOCK, QUADRATURE_DEPTHS, GROWN_QUADRATURE = 32, (3, 6), 4
"""The sums of singular values use 32 probes. Each probe has 3 to 6 quadrature nodes, or at most 4
if the rank has grown."""
SPREAD = 0.05
"""More quadrature nodes are computed while the sums' relative spread is larger than this."""
ANGLE = 0.02
"""Directions that carry the update may have an angle error with at most this sine."""
FAINT = 1e-30
"""Float32 cannot hold the products of a sketch if the squared norm is smaller than this."""
SMALL_GAP = 0.05
"""The first direction is ill-defined if (sigma_1 - sigma_2) / sigma_1 is smaller than this."""

T = TypeVar("T")
PassesOf = Generator[Sequence[Pass | None], Sequence[Products | None], T]
"""A generator that asks each task vector for a pass, and finally returns a T."""


class Verdict(Enum):
    """The next step, as judged from the spectra found so far."""

    MORE = "more passes"
    GROW = "more directions"
    DONE = "done"
    LEFT = "no expert has anything to give"


Judge = Callable[[list["Spectrum"], int, bool], Verdict]
"""A function that judges the spectra.

It is given the spectra, the number of Krylov blocks, and whether the rank may still grow.
"""
Leaves = Callable[[list["Spectrum"]], bool]
"""A function that tells from the first Krylov block whether no expert has anything to give."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The spectrum of one task vector, as far as it is known.

    `sigma` [r] float64 are the leading singular values, and `vectors` [in, r] float32 their right
    singular vectors. `angles` [r] bounds the sine of the vectors' angle errors, `rank` is the
    numerical rank, and `sums` are the sums of the whole spectrum.
    """

    sigma: Tensor
    vectors: Tensor
    angles: Tensor
    rank: int
    gap: float
    """(sigma_1 - sigma_2) / sigma_1."""
    sums: SingularSums | None = None
    is_faint: bool = False
    """True if the task vector is not zero, but its products underflow; its rank is then 0."""
    settled: Deflation | None = None
    """The directions that a second sketch may leave out, if `sums` needs one."""

    @property
    def has_gap(self) -> bool:
        """Return whether the first direction is well separated from the second."""
        return self.gap >= SMALL_GAP


@dataclass(frozen=True, slots=True)
class Effort:
    """The number of directions of one weight that are computed, and the means to do it.

    Attributes
    ----------
    shape : (int, int)
        The numbers of rows (out) and columns (in).
    roles : int
        Number of task vectors.
    exact : bool
        Whether whole spectra are computed.
    start, largest : int
        Numbers of directions to compute at first, and at most.
    sums : bool
        Whether the sums of the sketched spectra are wanted too.
    """

    shape: tuple[int, int]
    roles: int
    exact: bool
    start: int
    largest: int
    sums: bool = True

    @classmethod
    def of(
        cls, shape: tuple[int, int], *, roles: int, start: int, forced: bool, whole: bool
    ) -> Effort:
        """Return the effort for `start` directions.

        The number may grow unless it is `forced`. Spectra are computed whole if `whole`.
        """
        smaller = min(shape)
        start = min(start, smaller, MAX_SUBSPACE)
        # A sketch's last subspace has MAX_DEPTH / 2 * start columns.
        exact = whole or smaller <= EXACT_BELOW or MAX_DEPTH * _block(start) > smaller
        if exact:
            start = start if forced else min(smaller, MAX_SUBSPACE)
        fixed = forced or exact or shape[1] > GROWN_BELOW
        largest = start if fixed else min(2 * start, MAX_SUBSPACE)
        return cls(shape, roles, exact, start, max(start, largest))

    def depth_limit(self, rank: int) -> int:
        """Return how many Krylov blocks a sketch of `rank` directions has at most."""
        return MAX_DEPTH if rank == self.start else GROWN_DEPTH

    def most_nodes(self, rank: int) -> int:
        """Return how many quadrature nodes each probe has at most with `rank` directions."""
        return max(QUADRATURE_DEPTHS) if rank <= self.start else GROWN_QUADRATURE

    def _most_passes(self) -> int:
        """Return the passes when every sketch is as deep as allowed and the sums need a second one.

        The second sketch computes the images in one of its passes.
        """
        if not self.sums:
            return self._sketch(MAX_DEPTH) + 1
        count = self._sketch(MAX_DEPTH) + self._sketch(self.most_nodes(self.start))
        if self.largest > self.start:
            # The rank grows after MIN_DEPTH blocks or never.
            grown = self._sketch(MIN_DEPTH) + self._sketch(self.depth_limit(self.largest))
            count = max(count, grown + self._sketch(self.most_nodes(self.largest)))
        return count

    def _sketch(self, depth: int) -> int:
        """Return the passes of a sketch; a wide weight's sketch has a preliminary one more."""
        return depth + (self.shape[1] > self.shape[0])

    def cost(self, *, item: int, images: bool, usual_depth: int) -> AnalysisCost:
        """Return the largest number of bytes, and the largest and the usual number of passes.

        A product takes `item` bytes an entry. A usual sketch has `usual_depth` Krylov blocks.
        `images` tells whether the experts' images are wanted, which may take one more pass.
        """
        out_features, in_features = self.shape
        if self.exact:
            smaller, larger = min(self.shape), max(self.shape)
            dense = out_features * in_features * 4
            eigen = 5 * smaller**2 * 8  # Gram matrix, eigenvectors, LAPACK's workspace
            chunk = 3 * min(2048, larger) * smaller * 8
            vectors = (self.roles + 1) * in_features * self.start * 4
            carried = self.roles * out_features * self.start * 4
            passes = self.roles + images
            return AnalysisCost(dense + eigen + chunk + vectors + carried, 0, passes, passes)
        rank = self.largest
        block = max(_block(rank), QUADRATURE_BLOCK)
        columns = max(
            MAX_DEPTH * _block(self.start),
            self.depth_limit(rank) * _block(rank),
            max(QUADRATURE_DEPTHS) * QUADRATURE_BLOCK,
        )
        # The blocks q and y are in the arithmetic dtype, and z is in float32.
        krylov = columns * (in_features * (item + 4) + out_features * item)
        # Orthonormalisation holds the probes, the block, a basis block in float32 or QR's result,
        # and the rounded result.
        temporary = 4 * max(self.shape) * block * 4
        vectors = 3 * in_features * rank * 4
        carried = out_features * 2 * rank * 4
        small = 10 * columns**2 * 8
        each = krylov + temporary + vectors + carried + small
        usual = self._sketch(usual_depth) + images
        return AnalysisCost(self.roles * each, block, self._most_passes(), usual)


def find_spectra(
    weight: WeightContext, effort: Effort, judge: Judge, *, leaves: Leaves | None = None
) -> PassesOf[list[Spectrum]]:
    """Find the leading directions of every task vector, and the sums if the effort is exact.

    `leaves`, if given, is asked after the first Krylov block; where it agrees, nothing more is
    computed.
    """
    if effort.exact:
        return (yield from _exact(weight, effort))
    return (yield from _sketched(weight, effort, judge, leaves))


def finish_spectra(
    weight: WeightContext,
    effort: Effort,
    spectra: list[Spectrum],
    carried: Sequence[Tensor | None],
) -> PassesOf[tuple[list[Spectrum], list[Tensor | None]]]:
    """Complete the spectra with accurate sums, and return them with each task vector's images.

    The images are B X [out, r] of a task vector B for its X in `carried` [in, r]; they are None
    where that is.
    """
    if effort.sums and any(spectrum.sums is None for spectrum in spectra):
        most = effort.most_nodes(spectra[0].sigma.numel())
        return (yield from _deflated_sums(weight, spectra, carried, most))
    if all(columns is None for columns in carried):
        return spectra, [*carried]
    got = yield [
        None if columns is None else Pass(times=columns.to(weight.dtype)) for columns in carried
    ]
    return spectra, [None if products is None else _times(products) for products in got]


def _exact(weight: WeightContext, effort: Effort) -> PassesOf[list[Spectrum]]:
    """Compute whole spectra, one after another, so that only one float64 Gram matrix is held."""
    spectra = []
    for role in range(effort.roles):
        products = yield [Pass(dense=True) if r == role else None for r in range(effort.roles)]
        got = products[role]
        assert got is not None and got.dense is not None
        sigma, vectors = exact_spectrum(got.dense, effort.start)
        del products, got  # the next role's matrix takes their place
        spectra.append(
            Spectrum(
                sigma=sigma[: effort.start],
                vectors=vectors,
                angles=torch.zeros(effort.start, dtype=torch.float64),
                rank=numerical_rank(sigma, weight.shape),
                gap=_gap(sigma),
                sums=SingularSums.of_spectrum(sigma),
            )
        )
    return spectra


def _sketched(
    weight: WeightContext, effort: Effort, judge: Judge, leaves: Leaves | None
) -> PassesOf[list[Spectrum]]:
    """Advance block Krylov sketches of all task vectors together until the verdict is clear."""
    rank = effort.start
    while True:
        sketches = _sketches(weight, [None] * effort.roles, _block(rank), "directions")
        verdict = Verdict.MORE
        while verdict is Verdict.MORE and _depth(sketches) < effort.depth_limit(rank):
            yield from _one_pass(weight, sketches)
            looks = leaves if _depth(sketches) == 1 else None
            if looks is not None or _depth(sketches) >= LOOK_DEPTH:
                found = weight.parallel(partial(_spectrum, rank, weight.shape), sketches)
                spectra = _without_faint(found, weight.squared_norms())
                if looks is not None:
                    verdict = Verdict.LEFT if looks(spectra) else Verdict.MORE
                    continue
                may_grow = rank < effort.largest and _depth(sketches) == MIN_DEPTH
                verdict = judge(spectra, _depth(sketches), may_grow)
        if verdict is Verdict.LEFT:
            return spectra
        if verdict is not Verdict.GROW and not effort.sums:
            return spectra
        if verdict is not Verdict.GROW:
            return (yield from _own_sums(weight, spectra, sketches, effort.most_nodes(rank)))
        rank = min(2 * rank, effort.largest)


def _own_sums(
    weight: WeightContext, spectra: list[Spectrum], sketches: list[Sketch], most: int
) -> PassesOf[list[Spectrum]]:
    """Add sums to the spectra from the sketches themselves, with more passes if need be.

    If a sketch cannot give the sums, add the settled directions for a second sketch instead.
    """
    counts = [_settled_count(spectrum) for spectrum in spectra]
    norms = weight.squared_norms()
    while True:
        if _depth(sketches) >= min(QUADRATURE_DEPTHS):
            sums = weight.parallel(
                lambda role: sketches[role].own_sums(norms[role], counts[role]),
                range(len(sketches)),
            )
            if None in sums:
                settled = weight.parallel(
                    lambda role: sketches[role].krylov.settled(counts[role]), range(len(sketches))
                )
                return [
                    replace(spectrum, settled=one)
                    for spectrum, one in zip(spectra, settled, strict=True)
                ]
            summed = [
                replace(spectrum, sums=one) for spectrum, one in zip(spectra, sums, strict=True)
            ]
            if _depth(sketches) >= most or max(_spreads(summed)) <= SPREAD:
                return summed
        yield from _one_pass(weight, sketches)


def _deflated_sums(
    weight: WeightContext,
    spectra: list[Spectrum],
    carried: Sequence[Tensor | None],
    most: int,
) -> PassesOf[tuple[list[Spectrum], list[Tensor | None]]]:
    """Compute the sums and images with a second sketch that leaves out the settled directions."""
    settled = [spectrum.settled for spectrum in spectra]
    sketches = _sketches(weight, settled, QUADRATURE_BLOCK, "sums")
    doubted = [
        sketch.doubted(norm) for sketch, norm in zip(sketches, weight.squared_norms(), strict=True)
    ]
    got = yield [
        replace(sketch.next_pass(), times=_side_by_side(columns, again, weight.dtype))
        for sketch, columns, again in zip(sketches, carried, doubted, strict=True)
    ]
    images: list[Tensor | None] = []
    for sketch, columns, again, products in zip(sketches, carried, doubted, got, strict=True):
        width = 0 if columns is None else columns.shape[1]
        images.append(None if columns is None else _times(products)[:, :width])
        if again is not None:
            sketch.recheck(_times(products)[:, width:])
    weight.parallel(_absorb, list(zip(sketches, got, strict=True)))
    while True:
        if _depth(sketches) >= min(QUADRATURE_DEPTHS):
            spectra = _with_sums(weight, spectra, sketches)
            if _depth(sketches) >= most or max(_spreads(spectra)) <= SPREAD:
                return spectra, images
        yield from _one_pass(weight, sketches)


def _one_pass(weight: WeightContext, sketches: Sequence[Sketch]) -> PassesOf[None]:
    """Make one pass over the rows for all sketches together."""
    got = yield [sketch.next_pass() for sketch in sketches]
    weight.parallel(_absorb, list(zip(sketches, got, strict=True)))


def _absorb(pair: tuple[Sketch, Products | None]) -> None:
    sketch, products = pair
    assert products is not None
    sketch.absorb(products)


def _sketches(
    weight: WeightContext, deflate: Sequence[Deflation | None], block: int, purpose: str
) -> list[Sketch]:
    """Begin a sketch of each task vector that leaves out the directions in `deflate`."""

    def make(role: int) -> Sketch:
        return Sketch(
            weight.shape,
            block=block,
            dtype=weight.dtype,
            device=weight.device,
            seed=weight.seed,
            name=weight.name,
            role=f"{'mllm' if role == 0 else f'expert {role}'}: {purpose}",
            deflate=deflate[role],
        )

    return weight.parallel(make, range(len(deflate)))


def _block(rank: int) -> int:
    """Return how many columns a Krylov block has, so that MIN_DEPTH blocks span 2 * rank."""
    return max(8, -(-2 * rank // MIN_DEPTH))


def _depth(sketches: Sequence[Sketch]) -> int:
    return min(sketch.depth for sketch in sketches)


def _spectrum(rank: int, shape: tuple[int, int], sketch: Sketch) -> Spectrum:
    """Return the leading `rank` singular triplets of a sketch.

    If the subspace's numerical rank is below its size, it is the rank of the whole matrix.
    """
    found = sketch.krylov.singular_triplets(max(rank, 2))
    numerical = numerical_rank(found.all_values, shape)
    return Spectrum(
        sigma=found.sigma[:rank],
        vectors=found.vectors[:, :rank],
        angles=found.angles[:rank],
        rank=min(shape) if numerical == sketch.krylov.columns else numerical,
        gap=_gap(found.sigma),
    )


def outside(spectrum: Spectrum, squared_norm: float) -> float:
    """Estimate the sine of the angle between the first direction and one Krylov block, from above.

    A block of b random vectors holds v_1 but for a tangent whose square is about
    sum_(j > k) sigma_j^4 / (sigma_1^4 (b - k)), for any k < b (Halko, Martinsson and Tropp 2011).
    The sum is at most sigma_k^2 times the rest of the squared norm, which is known exactly.
    """
    theta = spectrum.sigma**2
    count = theta.numel()
    if count < 2 or float(theta[0]) == 0.0:
        return 1.0
    rest = (squared_norm - theta.cumsum(0)).clamp_min(0)
    tangents = theta * rest / theta[0] ** 2
    return math.sqrt(min(1.0, float((tangents[:-1] / torch.arange(count - 1, 0, -1)).min())))


def _without_faint(spectra: Sequence[Spectrum], norms: Sequence[float]) -> list[Spectrum]:
    """Return the spectra, with rank 0 for those whose products underflowed."""
    return [
        replace(spectrum, rank=0, is_faint=True) if 0 < norm < FAINT else spectrum
        for spectrum, norm in zip(spectra, norms, strict=True)
    ]


def _gap(sigma: Tensor) -> float:
    if sigma.numel() < 2 or float(sigma[0]) == 0.0:
        return 1.0
    return float((sigma[0] - sigma[1]) / sigma[0])


def _with_sums(
    weight: WeightContext, spectra: list[Spectrum], sketches: list[Sketch]
) -> list[Spectrum]:
    def with_sums(role: int) -> Spectrum:
        return replace(spectra[role], sums=sketches[role].sums(norms[role]))

    norms = weight.squared_norms()
    return weight.parallel(with_sums, range(len(spectra)))


def _spreads(spectra: Sequence[Spectrum]) -> list[float]:
    return [spectrum.sums.spread for spectrum in spectra if spectrum.sums is not None]


def _settled_count(spectrum: Spectrum) -> int:
    """Count the leading directions whose angle errors are small enough to leave them out later."""
    if not spectrum.rank:
        return 0
    good = (spectrum.angles < 5 * ANGLE) & (spectrum.sigma > 1e-5 * spectrum.sigma[0])
    return int(good.long().cumprod(0).sum())


def _side_by_side(
    carried: Tensor | None, again: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Join the matrices to multiply by in one pass; the result is float32 if `again` is given."""
    if again is None:
        return None if carried is None else carried.to(dtype)
    return again if carried is None else torch.cat([carried.float(), again], dim=1)


def _times(products: Products | None) -> Tensor:
    assert products is not None and products.times is not None
    return products.times
