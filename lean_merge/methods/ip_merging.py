"""IP-Merging: identify, rescale, project, merge (Hu et al., NeurIPS 2025, arXiv:2510.14387).

The steps in the comments are those of docs/method.md. The leading directions of every task vector
come from a block Krylov sketch that stops as soon as the decision is clear; weights that are
selected get a second, deflated sketch for their nuclear norms.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lean_merge.errors import RecipeError
from lean_merge.linalg import (
    Pass,
    Products,
    SingularSums,
    Sketch,
    corresponding_cosines,
    exact_spectrum,
    importance,
    log_omitted,
    numerical_rank,
    omitted_share,
)
from lean_merge.methods.base import (
    AnalysisCost,
    Decision,
    ExpertRecord,
    Method,
    WeightContext,
    per_expert,
)
from lean_merge.methods.registry import register

MAX_SUBSPACE = 1024
"""The largest subspace size q that the paper uses."""
EXACT_BELOW = 512
"""Weights with min(out, in) up to this are decomposed whole: as cheap as a sketch, and exact."""
START_RANK = 64
MIN_DEPTH, MAX_DEPTH = 4, 10
"""Krylov blocks before the first look, and the last one allowed."""
QUADRATURE_BLOCK, QUADRATURE_DEPTH = 32, 4
OMITTED = 3e-3
"""Modelled share of the update beyond the computed rank that asks for a larger one."""
DROPPED = 2e-4
"""Share of the importance gamma^2 whose directions are left out of the stored update."""
ANGLE = 0.03
"""Sine of the angle error that directions which carry the update may have."""
CLEAR = 0.02
"""How far from the threshold a similarity must be to count as decided."""
GAP = 0.05
"""Relative distance of sigma_1 and sigma_2 below which the first direction is ill-defined."""

STAGES = ("select", "rescale", "project")
_STAGE_SETS = (
    frozenset({"select"}),
    frozenset({"select", "rescale"}),
    frozenset({"select", "project"}),
    frozenset(STAGES),
)
_CHOICES = {
    "select_by": ("first", "max"),
    "nuclear": ("full", "top_q"),
    "importance": ("softmax", "relative"),
    "similarity_weight": ("none", "sigma"),
    "svd": ("randomized", "exact"),
}

PassesOf = Generator[Sequence[Pass | None], Sequence[Products | None], "list[_Spectrum]"]


@dataclass(frozen=True, slots=True)
class IPMergingParameters:
    """Parameters of IP-Merging; steps as in docs/method.md.

    threshold : S_alpha of step 4, in 0 .. 1, of each expert by itself.
    scale : factor of the update in step 8, of each expert by itself.
    select_by : compare `first`, s_1, or `max`, the largest computed s_i, with the threshold.
    temperature : tau of step 6.
    importance : `softmax`, or `relative`, gamma_i = exp(tau (s_i - max s)).
    nuclear : sum `full` spectra in step 5, or `top_q` leading singular values.
    similarity_weight : `none`, or `sigma`, weigh s_i by the geometric mean of relative sigmas.
    stages : select; select,rescale; select,project; or all three (the paper's Table 5).
    rank : `auto`, or the number of directions to compute.
    svd : `randomized`, or `exact` for small models and as a reference.
    """

    threshold: float = per_expert(0.4)
    scale: float = per_expert(1.0)
    select_by: str = "first"
    temperature: float = 32.0
    importance: str = "softmax"
    nuclear: str = "full"
    similarity_weight: str = "none"
    stages: tuple[str, ...] = STAGES
    rank: int | str = "auto"
    svd: str = "randomized"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise RecipeError(f"threshold must lie in 0 .. 1, not {self.threshold}.")
        if not -100 <= self.scale <= 100:
            raise RecipeError(f"scale must lie in -100 .. 100, not {self.scale}.")
        if not 0 <= self.temperature <= 10_000:
            raise RecipeError(f"temperature must lie in 0 .. 10000, not {self.temperature}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}."
                )
        if frozenset(self.stages) not in _STAGE_SETS or len(set(self.stages)) != len(self.stages):
            raise RecipeError(
                f"stages {','.join(self.stages)!r} is not defined; choose select; select,rescale; "
                "select,project; or select,rescale,project."
            )
        if self.rank != "auto" and not (isinstance(self.rank, int) and self.rank >= 1):
            raise RecipeError(f"rank must be 'auto' or a whole number from 1, not {self.rank!r}.")


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """What is known of one task vector: leading sigma [r], V [in, r], angle errors [r], rank."""

    sigma: Tensor
    vectors: Tensor
    angles: Tensor
    rank: int
    sums: SingularSums | None = None

    @property
    def has_gap(self) -> bool:
        """Whether the first direction is well separated from the second."""
        if self.sigma.numel() < 2 or float(self.sigma[0]) == 0.0:
            return True
        return float((self.sigma[0] - self.sigma[1]) / self.sigma[0]) >= GAP


@dataclass(frozen=True, slots=True)
class _Alignment:
    """How one expert's directions lie to the MLLM's (steps 2, 3, 4 and 6)."""

    similarity: Tensor
    gamma: Tensor
    compared: float
    selected: bool
    subspace: int
    omitted: float
    angle_error: float


@register
class IPMerging(Method[IPMergingParameters]):
    """Merge the experts' task vectors inside the subspace that the MLLM's own tuning spans."""

    name: ClassVar[str] = "ip_merging"
    reference: ClassVar[str] = "arXiv:2510.14387"
    parameters_type = IPMergingParameters

    def _is_exact(self, shape: tuple[int, int]) -> bool:
        wanted = self.common.svd == "exact" or self.common.nuclear == "top_q"
        rank = self._start_rank(shape)
        return wanted or min(shape) <= EXACT_BELOW or 8 * rank > 3 * min(shape)

    def _start_rank(self, shape: tuple[int, int]) -> int:
        """The forced rank, or the one that suffices if only s_1 stands out, at its threshold."""
        largest = min(MAX_SUBSPACE, *shape)
        if self.common.rank != "auto":
            return min(int(self.common.rank), largest)
        rank = min(START_RANK, largest)
        while rank < largest:
            law = torch.full((rank,), 1 / math.sqrt(shape[1]), dtype=torch.float64)
            law[0] = max(min(p.threshold for p in self.parameters), float(law[0]))
            share = omitted_share(
                law,
                omitted=largest - rank,
                in_features=shape[1],
                temperature=self.common.temperature,
                relative=self.common.importance == "relative",
            )
            if share <= OMITTED:
                break
            rank = min(2 * rank, largest)
        return rank

    def _largest_rank(self, shape: tuple[int, int]) -> int:
        """Where growth ends; fixed by shape and parameters, so that memory is known beforehand."""
        rank = self._start_rank(shape)
        if self.common.rank != "auto":
            return rank
        return min(2 * rank, MAX_SUBSPACE, min(shape) // 4)

    def _depth_limit(self, shape: tuple[int, int], rank: int) -> int:
        """Krylov blocks at most; a grown rank's wider blocks need, and may hold, fewer."""
        return MAX_DEPTH if rank == self._start_rank(shape) else MIN_DEPTH + 1

    def cost(self, shape: tuple[int, int], *, item: int) -> AnalysisCost:
        """Bytes as the comments name them; passes up to the deepest sketch and the last look."""
        out_features, in_features = shape
        roles, smaller = len(self.parameters) + 1, min(shape)
        if self._is_exact(shape):
            count = min(MAX_SUBSPACE, smaller)
            dense = out_features * in_features * 4
            eigen = 5 * smaller**2 * 8  # Gram matrix, eigenvectors, LAPACK's workspace
            chunk = 3 * min(2048, max(shape)) * smaller * 8
            vectors = (roles + 1) * in_features * count * 4
            images = roles * out_features * count * 4
            return AnalysisCost(dense + eigen + chunk + vectors + images, 0, roles + 1)
        rank = self._largest_rank(shape)
        block = _block(rank)
        columns = self._depth_limit(shape, rank) * block
        # q and y in the arithmetic dtype, z in float32
        krylov = roles * columns * (in_features * (item + 4) + out_features * item)
        # orthonormalisation: the block, its float32 basis block, and QR's copies
        temporary = 6 * max(shape) * block * 4
        vectors = 3 * roles * in_features * rank * 4
        images = roles * out_features * 2 * rank * 4
        small = 8 * columns**2 * 8
        passes = 2 + MAX_DEPTH + QUADRATURE_DEPTH
        return AnalysisCost(krylov + temporary + vectors + images + small, block, passes)

    def reads_task_vectors(self) -> tuple[bool, ...]:
        """The experts' without projection; with it, everything is in the factors."""
        whole = "project" not in self.common.stages
        return False, *(whole and p.scale != 0.0 for p in self.parameters)

    def analyze(
        self, weight: WeightContext
    ) -> Generator[Sequence[Pass | None], Sequence[Products | None], Decision]:
        """Steps 1 to 7 for one logical weight; step 8, the sum, is the engine's."""
        smaller = min(weight.shape)
        if self._is_exact(weight.shape):
            spectra = yield from self._exact(weight)
        else:
            spectra = yield from self._sketched(weight)
        aligned = [self._align(weight, spectra, k) for k in range(len(spectra) - 1)]
        if not any(alignment.selected for alignment in aligned):
            return Decision(experts=self._records(weight, spectra, aligned, None))
        project = "project" in self.common.stages
        kept = _kept_directions([a for a in aligned if a.selected]) if project else None
        carried = None if kept is None else spectra[0].vectors[:, kept]
        if spectra[0].sums is None or not self._is_whole(spectra[0], smaller):
            spectra, images = yield from self._deflated_sums(weight, spectra, carried)
        elif carried is not None:
            got = yield [None] + [Pass(times=carried.to(weight.dtype))] * len(aligned)
            images = [_times(products) for products in got[1:]]
        else:
            images = []
        return self._decide(weight, spectra, aligned, kept, images)

    @staticmethod
    def _is_whole(spectrum: _Spectrum, smaller: int) -> bool:
        assert spectrum.sums is not None
        counts = spectrum.sums.counts
        return counts.numel() == smaller and bool((counts == 1).all())

    def _exact(self, weight: WeightContext) -> PassesOf:
        """Whole spectra, one after another so that one float64 Gram matrix lives at a time."""
        count = min(MAX_SUBSPACE, *weight.shape)
        if self.common.rank != "auto":
            count = min(count, int(self.common.rank))
        roles = len(self.parameters) + 1
        spectra = []
        for role in range(roles):
            products = yield [Pass(dense=True) if r == role else None for r in range(roles)]
            got = products[role]
            assert got is not None and got.dense is not None
            sigma, vectors = exact_spectrum(got.dense, count)
            spectra.append(
                _Spectrum(
                    sigma=sigma[:count],
                    vectors=vectors,
                    angles=torch.zeros(count, dtype=torch.float64),
                    rank=numerical_rank(sigma, weight.shape),
                    sums=SingularSums.of_spectrum(sigma),
                )
            )
        return spectra

    def _sketched(self, weight: WeightContext) -> PassesOf:
        """Block Krylov sketches of all task vectors in step, until the decision is clear."""
        rank, largest = self._start_rank(weight.shape), self._largest_rank(weight.shape)
        while True:
            limit = self._depth_limit(weight.shape, rank)
            sketches = [
                self._sketch(weight, role, block=_block(rank), purpose="directions")
                for role in range(len(self.parameters) + 1)
            ]
            while True:
                yield from _one_pass(sketches)
                if sketches[0].depth < MIN_DEPTH:
                    continue
                spectra = [_spectrum(sketch, rank, weight.shape) for sketch in sketches]
                aligned = [self._align(weight, spectra, k) for k in range(len(spectra) - 1)]
                grows = rank < largest and any(a.selected and a.omitted > OMITTED for a in aligned)
                if grows or sketches[0].depth >= limit or self._is_clear(spectra, aligned):
                    break
            if not grows:
                norms = weight.squared_norms()
                return [
                    replace(spectrum, sums=sketch.sums(norm))
                    for spectrum, sketch, norm in zip(spectra, sketches, norms, strict=True)
                ]
            rank = min(2 * rank, largest)

    def _sketch(
        self,
        weight: WeightContext,
        role: int,
        *,
        block: int,
        purpose: str,
        deflate: Tensor | None = None,
    ) -> Sketch:
        return Sketch(
            weight.shape,
            block=block,
            dtype=weight.dtype,
            device=weight.device,
            seed=weight.seed,
            name=weight.name,
            role=f"{'mllm' if role == 0 else f'expert {role}'}: {purpose}",
            deflate=deflate,
        )

    def _deflated_sums(
        self, weight: WeightContext, spectra: list[_Spectrum], carried: Tensor | None
    ) -> Generator[
        Sequence[Pass | None], Sequence[Products | None], tuple[list[_Spectrum], list[Tensor]]
    ]:
        """Spectra with accurate sums, and dM_k V_V for each expert where V_V is `carried`."""
        sketches = [
            self._sketch(
                weight, role, block=QUADRATURE_BLOCK, purpose="sums", deflate=_settled(spectrum)
            )
            for role, spectrum in enumerate(spectra)
        ]
        got = yield [
            sketch.next_pass(times=carried if role else None)
            for role, sketch in enumerate(sketches)
        ]
        images = []
        for role, (sketch, products) in enumerate(zip(sketches, got, strict=True)):
            assert products is not None
            sketch.absorb(products)
            if role and carried is not None:
                images.append(_times(products)[:, -carried.shape[1] :])
        while sketches[0].depth < QUADRATURE_DEPTH:
            yield from _one_pass(sketches)
        norms = weight.squared_norms()
        updated = [
            replace(spectrum, sums=sketch.sums(norm))
            for spectrum, sketch, norm in zip(spectra, sketches, norms, strict=True)
        ]
        return updated, images

    def _align(self, weight: WeightContext, spectra: list[_Spectrum], k: int) -> _Alignment:
        """Steps 2 to 4 and 6 for expert k."""
        mllm, expert = spectra[0], spectra[k + 1]
        subspace = min(MAX_SUBSPACE, mllm.rank, expert.rank)
        if subspace == 0:
            empty = torch.zeros(0, dtype=torch.float64)
            return _Alignment(empty, empty, 0.0, False, 0, 0.0, 0.0)
        similarity = corresponding_cosines(mllm.vectors, expert.vectors)[:subspace]
        computed = similarity.numel()
        if self.common.similarity_weight == "sigma":
            relative = (
                (mllm.sigma[:computed] * expert.sigma[:computed])
                / (mllm.sigma[0] * expert.sigma[0])
            ).cpu()
            similarity = similarity * relative.sqrt()
        compared = float(similarity[0] if self.common.select_by == "first" else similarity.max())
        relative_importance = self.common.importance == "relative"
        omitted = subspace - computed
        law = {"omitted": omitted, "in_features": weight.shape[1]}
        tail = log_omitted(similarity, temperature=self.common.temperature, **law)
        gamma = importance(
            similarity,
            temperature=self.common.temperature,
            relative=relative_importance,
            log_tail=tail,
        )
        angles = torch.maximum(mllm.angles[:computed].cpu(), expert.angles[:computed].cpu())
        return _Alignment(
            similarity=similarity,
            gamma=gamma,
            compared=compared,
            selected=compared >= self.parameters[k].threshold,
            subspace=subspace,
            omitted=omitted_share(
                similarity,
                omitted=omitted,
                in_features=weight.shape[1],
                temperature=self.common.temperature,
                relative=relative_importance,
            ),
            angle_error=float(angles[gamma**2 >= 0.02 * (gamma**2).max()].max()),
        )

    def _is_clear(self, spectra: list[_Spectrum], aligned: list[_Alignment]) -> bool:
        """Whether no more passes could change any expert's selection, or its update much."""
        for k, alignment in enumerate(aligned):
            if alignment.subspace == 0:
                continue
            below = self.parameters[k].threshold - CLEAR
            first = float(max(spectra[0].angles[0], spectra[k + 1].angles[0]))
            if alignment.compared + first < below:
                continue
            if _largest_principal_cosine(spectra[0], spectra[k + 1]) < below - 4 * CLEAR:
                continue
            if max(alignment.angle_error, first) > ANGLE:
                return False
        return True

    def _decide(
        self,
        weight: WeightContext,
        spectra: list[_Spectrum],
        aligned: list[_Alignment],
        kept: Tensor | None,
        images: list[Tensor],
    ) -> Decision:
        """Steps 5, 7 and 8, in factors."""
        scales = []
        for k, alignment in enumerate(aligned):
            ratio = self._ratio(spectra, alignment, k) if "rescale" in self.common.stages else 1.0
            scales.append(self.parameters[k].scale * ratio if alignment.selected else 0.0)
        if kept is None:
            norms = [
                abs(s) * math.sqrt(n)
                for s, n in zip(scales, weight.squared_norms()[1:], strict=True)
            ]
            return Decision(
                experts=self._records(weight, spectra, aligned, norms),
                coefficients=(0.0, *scales),
            )
        left = torch.zeros(weight.shape[0], kept.numel(), device=weight.device)
        norms = []
        for scale, alignment, image in zip(scales, aligned, images, strict=True):
            if not alignment.selected:
                norms.append(0.0)
                continue
            gamma = _padded(alignment.gamma, kept)
            part = image * (scale * gamma**2).float().to(weight.device)
            norms.append(float(part.double().norm()))
            left += part
        right = spectra[0].vectors[:, kept].T.contiguous()
        return Decision(
            experts=self._records(weight, spectra, aligned, norms), left=left, right=right
        )

    def _ratio(self, spectra: list[_Spectrum], alignment: _Alignment, k: int) -> float:
        """lambda of step 5, as the `nuclear` parameter wants it."""
        full, top_q = _ratios(spectra, alignment, k)
        chosen = full if self.common.nuclear == "full" else top_q
        assert chosen is not None
        return chosen

    def _records(
        self,
        weight: WeightContext,
        spectra: list[_Spectrum],
        aligned: list[_Alignment],
        norms: list[float] | None,
    ) -> tuple[ExpertRecord, ...]:
        records = []
        for k, alignment in enumerate(aligned):
            if alignment.subspace == 0:
                of = "MLLM" if spectra[0].rank == 0 else "expert"
                records.append(
                    ExpertRecord(False, f"the {of}'s task vector is zero", rank=0, update_norm=0.0)
                )
                continue
            full, top_q = _ratios(spectra, alignment, k)
            sign = ">=" if alignment.selected else "<"
            threshold = self.parameters[k].threshold
            records.append(
                ExpertRecord(
                    selected=alignment.selected,
                    reason=f"similarity {alignment.compared:.4f} {sign} threshold {threshold:g}",
                    similarity_first=float(alignment.similarity[0]),
                    similarity_max=float(alignment.similarity.max()),
                    lambda_=full,
                    lambda_top_q=top_q,
                    rank=alignment.subspace,
                    computed_rank=alignment.similarity.numel(),
                    omitted_share=alignment.omitted if alignment.selected else None,
                    angle_error=alignment.angle_error if alignment.selected else None,
                    gap=not (spectra[0].has_gap and spectra[k + 1].has_gap),
                    update_norm=norms[k] if norms is not None else 0.0,
                )
            )
        return tuple(records)


def _block(rank: int) -> int:
    """Columns of a Krylov block whose first look sees 2 * rank directions."""
    return max(8, -(-2 * rank // MIN_DEPTH))


def _one_pass(
    sketches: Sequence[Sketch],
) -> Generator[Sequence[Pass | None], Sequence[Products | None], None]:
    """One pass over the rows, shared by all sketches."""
    got = yield [sketch.next_pass() for sketch in sketches]
    for sketch, products in zip(sketches, got, strict=True):
        assert products is not None
        sketch.absorb(products)


def _spectrum(sketch: Sketch, rank: int, shape: tuple[int, int]) -> _Spectrum:
    """The leading `rank` triplets of a sketch; a rank below the subspace's size is the matrix's."""
    values, vectors, angles = sketch.krylov.singular_triplets(rank)
    found = numerical_rank(values, shape)
    whole = min(shape) if found == sketch.krylov.columns else found
    return _Spectrum(values[: vectors.shape[1]], vectors, angles, whole)


def _settled(spectrum: _Spectrum) -> Tensor:
    """Leading right vectors whose angle error is small, for deflation."""
    good = (spectrum.angles < 5 * ANGLE) & (spectrum.sigma > 1e-5 * spectrum.sigma[0])
    return spectrum.vectors[:, : int(good.long().cumprod(0).sum())]


def _largest_principal_cosine(first: _Spectrum, second: _Spectrum) -> float:
    """Cosine of the smallest angle between the two computed subspaces: no s_1 can be larger."""
    return float(torch.linalg.matrix_norm(first.vectors.T @ second.vectors, ord=2))


def _kept_directions(selected: Sequence[_Alignment]) -> Tensor:
    """Indices that carry all but `DROPPED` of some selected expert's importance."""
    kept: set[int] = set()
    for alignment in selected:
        fourth = alignment.gamma**4
        order = torch.argsort(fourth, descending=True)
        missing = fourth.sum() - torch.cumsum(fourth[order], 0)
        count = int((missing > DROPPED**2 * fourth.sum()).sum()) + 1
        kept.update(order[:count].tolist())
    return torch.tensor(sorted(kept))


def _padded(gamma: Tensor, kept: Tensor) -> Tensor:
    """gamma at the kept directions, zero where this expert computed fewer."""
    padded = torch.zeros(max(int(kept.max()) + 1, gamma.numel()), dtype=gamma.dtype)
    padded[: gamma.numel()] = gamma
    return padded[kept]


def _ratios(
    spectra: list[_Spectrum], alignment: _Alignment, k: int
) -> tuple[float | None, float | None]:
    mllm, expert = spectra[0].sums, spectra[k + 1].sums
    if mllm is None or expert is None or expert.nuclear == 0.0:
        return None, None
    top = expert.leading(alignment.subspace)
    return mllm.nuclear / expert.nuclear, mllm.leading(alignment.subspace) / top


def _times(products: Products | None) -> Tensor:
    assert products is not None and products.times is not None
    return products.times
