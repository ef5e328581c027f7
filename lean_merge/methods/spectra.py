"""Spectra of all task vectors of one weight, in step: whole, or sketched until a verdict is clear.

A pass over the rows serves every task vector at once, so their sketches advance together. How far
they may go is fixed beforehand by `Effort`, and with that what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lean_merge.linalg import (
    Deflation,
    Pass,
    Products,
    SingularSums,
    Sketch,
    exact_spectrum,
    numerical_rank,
)
from lean_merge.methods.base import AnalysisCost, WeightContext

MAX_SUBSPACE = 1024
"""The largest subspace size q that the paper uses."""
EXACT_BELOW = 512
"""Weights with min(out, in) up to this are decomposed whole: as cheap as a sketch, and exact."""
LOOK_DEPTH, MIN_DEPTH, MAX_DEPTH = 2, 4, 8
"""Krylov blocks before the first look, before the rank may be found too small, and at most."""
GROWN_DEPTH = MIN_DEPTH + 1
"""Krylov blocks at most once the rank has grown: its wider blocks need fewer."""
GROWN_BELOW = 8192
"""Columns of a weight up to which the rank may grow. Beyond, random directions weigh so little that
only a structured tail could ask for it, which `omitted_share` tells."""
QUADRATURE_BLOCK, QUADRATURE_DEPTHS, GROWN_QUADRATURE = 32, (3, 6), 4
"""Probes for the sums of singular values, fewest and most quadrature nodes of each, and most where
the rank has grown."""
SPREAD = 0.05
"""Spread of the sums above which more nodes are asked for."""
ANGLE = 0.02
"""Sine of the angle error that directions which carry the update may have."""
FAINT = 1e-30
"""Squared norm below which float32 no longer holds the products of a sketch."""
GAP = 0.05
"""Relative distance of sigma_1 and sigma_2 below which the first direction is ill-defined."""

T = TypeVar("T")
PassesOf = Generator[Sequence[Pass | None], Sequence[Products | None], T]
"""Asks each task vector for a pass, and returns a T."""


class Verdict(Enum):
    """What a look at the spectra says of the next step."""

    MORE = "more passes"
    GROW = "more directions"
    DONE = "done"
    LEFT = "no expert has anything to give"


Judge = Callable[[list["Spectrum"], int, bool], Verdict]
"""Judges spectra from so many Krylov blocks; the flag says whether the rank may still grow."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of one task vector.

    sigma [r] float64 and vectors [in, r] float32 are the leading right singular pairs, angles [r]
    bounds the sine of the vectors' errors, rank is numerical, and sums those of the whole spectrum.
    """

    sigma: Tensor
    vectors: Tensor
    angles: Tensor
    rank: int
    gap: float
    """(sigma_1 - sigma_2) / sigma_1."""
    sums: SingularSums | None = None
    is_faint: bool = False
    """Not zero, but so small that its products underflow; its rank is then 0."""
    settled: Deflation | None = None
    """What a second sketch may leave out, where `sums` need one."""

    @property
    def has_gap(self) -> bool:
        """Whether the first direction is well separated from the second."""
        return self.gap >= GAP


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to look at one weight.

    Attributes
    ----------
    shape : (int, int)
        out, in.
    roles : int
        Task vectors.
    exact : bool
        Whether whole spectra are computed.
    start, largest : int
        Directions to compute at first, and at most.
    """

    shape: tuple[int, int]
    roles: int
    exact: bool
    start: int
    largest: int

    @classmethod
    def of(
        cls, shape: tuple[int, int], *, roles: int, start: int, forced: bool, whole: bool
    ) -> Effort:
        """The effort for `start` directions; more only if not `forced`, all if `whole`."""
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
        """Krylov blocks at most for sketches of `rank` directions."""
        return MAX_DEPTH if rank == self.start else GROWN_DEPTH

    def most_nodes(self, rank: int) -> int:
        """Quadrature nodes of each probe at most, where sketches are of `rank` directions."""
        return max(QUADRATURE_DEPTHS) if rank <= self.start else GROWN_QUADRATURE

    def _most_passes(self) -> int:
        """Passes where every sketch goes as deep as it may, and the sums need one of their own.

        That one brings the images along.
        """
        count = self._sketch(MAX_DEPTH) + self._sketch(self.most_nodes(self.start))
        if self.largest > self.start:
            # The rank grows at the first look that may tell so, or never.
            grown = self._sketch(MIN_DEPTH) + self._sketch(self.depth_limit(self.largest))
            count = max(count, grown + self._sketch(self.most_nodes(self.largest)))
        return count

    def _sketch(self, depth: int) -> int:
        """Passes of a sketch: that of a wide weight starts with a preliminary one."""
        return depth + (self.shape[1] > self.shape[0])

    def cost(self, *, item: int, images: bool, usual_depth: int) -> AnalysisCost:
        """Bytes, which the comments name, and passes: at most, and usually.

        A usual sketch has `usual_depth` Krylov blocks. `images` tells whether the experts' images
        are wanted, which may take one more pass.
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
        # q and y in the arithmetic dtype, z in float32
        krylov = columns * (in_features * (item + 4) + out_features * item)
        # orthonormalisation: the probes, the block, one of the basis in float32 or QR's result, and
        # that rounded
        temporary = 4 * max(self.shape) * block * 4
        vectors = 3 * in_features * rank * 4
        carried = out_features * 2 * rank * 4
        small = 10 * columns**2 * 8
        each = krylov + temporary + vectors + carried + small
        usual = self._sketch(usual_depth) + images
        return AnalysisCost(self.roles * each, block, self._most_passes(), usual)


def find_spectra(weight: WeightContext, effort: Effort, judge: Judge) -> PassesOf[list[Spectrum]]:
    """Leading directions of every task vector; their sums too where the effort is exact."""
    if effort.exact:
        return (yield from _exact(weight, effort))
    return (yield from _sketched(weight, effort, judge))


def finish_spectra(
    weight: WeightContext, effort: Effort, spectra: list[Spectrum], carried: Tensor | None
) -> PassesOf[tuple[list[Spectrum], list[Tensor]]]:
    """Spectra with accurate sums, and dM_k X [out, r] for each expert where X is `carried`."""
    if any(spectrum.sums is None for spectrum in spectra):
        most = effort.most_nodes(spectra[0].sigma.numel())
        return (yield from _deflated_sums(weight, spectra, carried, most))
    if carried is None:
        return spectra, []
    wanted = Pass(times=carried.to(weight.dtype))
    got = yield [None, *[wanted] * (len(spectra) - 1)]
    return spectra, [_times(products) for products in got[1:]]


def _exact(weight: WeightContext, effort: Effort) -> PassesOf[list[Spectrum]]:
    """Whole spectra, one after another so that one float64 Gram matrix lives at a time."""
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


def _sketched(weight: WeightContext, effort: Effort, judge: Judge) -> PassesOf[list[Spectrum]]:
    """Block Krylov sketches of all task vectors in step, until the verdict is clear."""
    rank = effort.start
    while True:
        sketches = _sketches(weight, [None] * effort.roles, _block(rank), "directions")
        verdict = Verdict.MORE
        while verdict is Verdict.MORE and _depth(sketches) < effort.depth_limit(rank):
            yield from _one_pass(weight, sketches)
            if _depth(sketches) >= LOOK_DEPTH:
                found = weight.parallel(partial(_spectrum, rank, weight.shape), sketches)
                spectra = _without_faint(found, weight.squared_norms())
                may_grow = rank < effort.largest and _depth(sketches) == MIN_DEPTH
                verdict = judge(spectra, _depth(sketches), may_grow)
        if verdict is Verdict.LEFT:
            return spectra
        if verdict is not Verdict.GROW:
            return (yield from _own_sums(weight, spectra, sketches, effort.most_nodes(rank)))
        rank = min(2 * rank, effort.largest)


def _own_sums(
    weight: WeightContext, spectra: list[Spectrum], sketches: list[Sketch], most: int
) -> PassesOf[list[Spectrum]]:
    """With sums from the sketches themselves, carried on if need be; else with what is settled."""
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
    weight: WeightContext, spectra: list[Spectrum], carried: Tensor | None, most: int
) -> PassesOf[tuple[list[Spectrum], list[Tensor]]]:
    """A second sketch of each task vector, outside the directions that are settled."""
    settled = [spectrum.settled for spectrum in spectra]
    sketches = _sketches(weight, settled, QUADRATURE_BLOCK, "sums")
    doubted = [
        sketch.doubted(norm) for sketch, norm in zip(sketches, weight.squared_norms(), strict=True)
    ]
    wanted = [None, *[carried] * (len(sketches) - 1)]
    got = yield [
        replace(sketch.next_pass(), times=_side_by_side(columns, again, weight.dtype))
        for sketch, columns, again in zip(sketches, wanted, doubted, strict=True)
    ]
    width = 0 if carried is None else carried.shape[1]
    images = [] if carried is None else [_times(products)[:, :width] for products in got[1:]]
    for sketch, columns, again, products in zip(sketches, wanted, doubted, got, strict=True):
        if again is not None:
            sketch.recheck(_times(products)[:, 0 if columns is None else width :])
    weight.parallel(_absorb, list(zip(sketches, got, strict=True)))
    while True:
        if _depth(sketches) >= min(QUADRATURE_DEPTHS):
            spectra = _with_sums(weight, spectra, sketches)
            if _depth(sketches) >= most or max(_spreads(spectra)) <= SPREAD:
                return spectra, images
        yield from _one_pass(weight, sketches)


def _one_pass(weight: WeightContext, sketches: Sequence[Sketch]) -> PassesOf[None]:
    """One pass over the rows, shared by all sketches."""
    got = yield [sketch.next_pass() for sketch in sketches]
    weight.parallel(_absorb, list(zip(sketches, got, strict=True)))


def _absorb(pair: tuple[Sketch, Products | None]) -> None:
    sketch, products = pair
    assert products is not None
    sketch.absorb(products)


def _sketches(
    weight: WeightContext, deflate: Sequence[Deflation | None], block: int, purpose: str
) -> list[Sketch]:
    """A fresh sketch of each task vector, kept off the directions in `deflate`."""

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
    """Columns of a Krylov block whose first look sees 2 * rank directions."""
    return max(8, -(-2 * rank // MIN_DEPTH))


def _depth(sketches: Sequence[Sketch]) -> int:
    return min(sketch.depth for sketch in sketches)


def _spectrum(rank: int, shape: tuple[int, int], sketch: Sketch) -> Spectrum:
    """The leading `rank` triplets of a sketch; a rank below the subspace's size is the matrix's."""
    found = sketch.krylov.singular_triplets(max(rank, 2))
    numerical = numerical_rank(found.all_values, shape)
    return Spectrum(
        sigma=found.sigma[:rank],
        vectors=found.vectors[:, :rank],
        angles=found.angles[:rank],
        rank=min(shape) if numerical == sketch.krylov.columns else numerical,
        gap=_gap(found.sigma),
    )


def _without_faint(spectra: Sequence[Spectrum], norms: Sequence[float]) -> list[Spectrum]:
    """The spectra; those whose products underflowed have no rank."""
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
    """How many leading directions have a small angle error, so that they need no further look."""
    if not spectrum.rank:
        return 0
    good = (spectrum.angles < 5 * ANGLE) & (spectrum.sigma > 1e-5 * spectrum.sigma[0])
    return int(good.long().cumprod(0).sum())


def _side_by_side(
    carried: Tensor | None, again: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """What to multiply by in one pass: in float32 where something is doubted, else in `dtype`."""
    if again is None:
        return None if carried is None else carried.to(dtype)
    return again if carried is None else torch.cat([carried.float(), again], dim=1)


def _times(products: Products | None) -> Tensor:
    assert products is not None and products.times is not None
    return products.times
