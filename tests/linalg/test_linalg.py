"""Krylov subspaces, quadrature, similarity and importance, by regime, against numpy in float64."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bars, bfloat16
from support.drive import products
from support.spectra import NOISE, orthonormal, spectrum

from lean_merge.linalg import Pass, random_block
from lean_merge.linalg.krylov import BlockKrylov, Deflation
from lean_merge.linalg.similarity import (
    corresponding_cosines,
    importance,
    log_omitted,
    omitted_errors,
)
from lean_merge.linalg.sketch import SingularSums, Sketch
from lean_merge.linalg.spectrum import exact_spectrum, numerical_rank
from lean_merge.methods.spectra import SPREAD


def matrix_of(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    values = spectrum(kind, min(shape)).float()
    left = orthonormal(out_features, min(shape), generator)
    right = orthonormal(in_features, min(shape), generator)
    noise = torch.randn(shape, generator=generator) * (NOISE[kind] / math.sqrt(max(shape)))
    return (left * values) @ right.T + noise


def sketched(
    matrix: torch.Tensor,
    depth: int,
    *,
    dtype: torch.dtype = torch.float32,
    deflate: Deflation | None = None,
    multiply: bfloat16.Multiply = bfloat16.multiply,
) -> Sketch:
    sketch = Sketch(
        (matrix.shape[0], matrix.shape[1]),
        block=32,
        dtype=dtype,
        device=torch.device("cpu"),
        seed=0,
        name="w",
        role="test",
        deflate=deflate,
    )
    while sketch.depth < depth:
        go_on(sketch, matrix, dtype, multiply)
    return sketch


def go_on(
    sketch: Sketch,
    matrix: torch.Tensor,
    dtype: torch.dtype,
    multiply: bfloat16.Multiply = bfloat16.multiply,
) -> None:
    got = products(matrix, sketch.next_pass(), dtype, multiply=multiply)
    assert got is not None
    sketch.absorb(got)


def settled_count(sketch: Sketch) -> int:
    """How many leading directions a method would leave to no quadrature."""
    found = sketch.krylov.singular_triplets(64)
    sound = (found.angles < 0.1) & (found.sigma > 1e-5 * found.sigma[0])
    return int(sound.long().cumprod(0).sum())


@pytest.mark.parametrize("shape", [(300, 300), (500, 200), (200, 500)], ids=str)
@pytest.mark.parametrize("kind", list(NOISE))
def test_leading_triplets_match_numpy(kind: str, shape: tuple[int, int]) -> None:
    """Values to 1e-3, vectors to an angle of 0.01: four blocks of 32 beat the bars by far."""
    matrix = matrix_of(kind, shape)
    _, sigma, right = np.linalg.svd(matrix.double().numpy())
    found = sketched(matrix, 4).krylov.singular_triplets(6)
    for value, true in zip(found.sigma.tolist(), sigma, strict=False):
        bars.hold("singular value, float32", bars.relative(value, true), 1e-3)
    for index in range(3):
        sine = sine_between(found.vectors[:, index], right[index])
        angle = float(found.angles[index])
        bars.hold("angle, float32, over what is estimated or 0.01", sine / max(0.01, angle), 1)


def sine_between(found: torch.Tensor, true: np.ndarray) -> float:
    cosine = abs(float(found.double().numpy() @ true))
    return math.sqrt(max(0.0, 1 - cosine**2))


@pytest.mark.parametrize("arithmetic", bfloat16.KINDS)
def test_bfloat16_products_move_angles_by_about_their_rounding(arithmetic: str) -> None:
    matrix = matrix_of("power law", (300, 300)).bfloat16().float()
    right = np.linalg.svd(matrix.double().numpy())[2]
    sketch = sketched(matrix, 5, dtype=torch.bfloat16, multiply=bfloat16.KINDS[arithmetic])
    vectors = sketch.krylov.singular_triplets(4).vectors
    for index in range(4):
        bars.hold("angle, bfloat16", sine_between(vectors[:, index], right[index]), 0.01)


@pytest.mark.parametrize("shape", [(300, 300), (500, 200), (200, 500)], ids=str)
@pytest.mark.parametrize("kind", list(NOISE))
def test_deflated_quadrature_gives_the_nuclear_norm(kind: str, shape: tuple[int, int]) -> None:
    """Each norm by itself within 1 %, so that the ratio of two is within its bars."""
    matrix = matrix_of(kind, shape)
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    square = float(matrix.double().square().sum())
    found = sketched(matrix, 4).krylov
    count = int((found.singular_triplets(48).angles < 0.1).long().cumprod(0).sum())
    settled = found.settled(count)
    sums = sketched(matrix, 4, deflate=settled).sums(square)
    bars.hold("nuclear norm by two sketches", bars.relative(sums.nuclear, sigma.sum()), 0.01)
    assert float(sums.counts.sum()) == pytest.approx(min(shape), rel=0.1)
    for count in (16, 100):
        error = bars.relative(sums.leading(count), sigma[:count].sum())
        bars.hold("sum of leading singular values", error, 0.02)
    assert sums.leading(10_000) == pytest.approx(sums.nuclear, rel=1e-9)


def hard_matrix(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """Of half the full rank, or with 128 singular values that are the same."""
    generator = torch.Generator().manual_seed(3)
    if kind == "half of full rank":
        values, noise = torch.arange(1.0, min(shape) // 2 + 1) ** -0.2, 0.0
    else:
        values, noise = torch.ones(128), 0.05
    left, right = (orthonormal(side, len(values), generator) for side in shape)
    white = torch.randn(shape, generator=generator) * (noise / math.sqrt(max(shape)))
    return (left * values) @ right.T + white


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(640, 600), (600, 640)], ids=str)
@pytest.mark.parametrize("kind", [*NOISE, "half of full rank", "many alike"])
def test_a_sketch_knows_the_nuclear_norm_or_that_it_does_not(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Within 1.5 % where its two rules agree; where singular values are alike it does not guess."""
    matrix = matrix_of(kind, shape) if kind in NOISE else hard_matrix(kind, shape)
    matrix = matrix.to(dtype).float()
    nuclear = np.linalg.svd(matrix.double().numpy(), compute_uv=False).sum()
    square = float(matrix.double().square().sum())
    known = 0
    sketch = sketched(matrix, 2, dtype=dtype)
    for _ in (3, 4, 5, 6):
        go_on(sketch, matrix, dtype)
        sums = sketch.own_sums(square, settled_count(sketch))
        if sums is not None and sums.spread <= SPREAD:
            known += 1
            error = bars.relative(sums.nuclear, nuclear)
            bars.hold("nuclear norm by one sketch", error, 0.015, sketch.depth)
    assert known or kind in ("exponential", "many alike"), "nothing was tested"


@cache
def rounded(kind: str, shape: tuple[int, int]) -> tuple[torch.Tensor, float]:
    """A matrix in bfloat16 and its nuclear norm."""
    matrix = matrix_of(kind, shape) if kind in NOISE else hard_matrix(kind, shape)
    matrix = matrix.bfloat16().float()
    return matrix, torch.linalg.svdvals(matrix.double()).sum().item()


@pytest.mark.parametrize("arithmetic", bfloat16.KINDS)
@pytest.mark.parametrize("shape", [(640, 600), (600, 640)], ids=str)
@pytest.mark.parametrize("kind", ["flat power law", "half of full rank"])
def test_a_sketch_that_goes_on_gets_better_whatever_rounds_its_products(
    kind: str, shape: tuple[int, int], arithmetic: str
) -> None:
    """Directions in which only rounding is left do not pass for small singular values."""
    matrix, nuclear = rounded(kind, shape)
    square = float(matrix.double().square().sum())
    multiply = bfloat16.KINDS[arithmetic]
    sketch = sketched(matrix, 5, dtype=torch.bfloat16, multiply=multiply)
    for _ in (6, 7, 8):
        go_on(sketch, matrix, torch.bfloat16, multiply)
        sums = sketch.own_sums(square, settled_count(sketch))
        if sums is None:
            # The null space is all that is left, and its nodes are known to be unsound.
            assert sketch.depth > 6
            continue
        bars.hold("nuclear norm after six blocks", bars.relative(sums.nuclear, nuclear), 5e-3)
        bars.hold("spread after six blocks", sums.spread, 0.01)
        identity = torch.eye(sketch.krylov.columns, dtype=torch.float64)
        bars.hold("orthogonality of blocks", float((sketch.krylov.qq - identity).norm()), 0.1)
        assert len(sketch.krylov.right().theta) == sketch.krylov.columns


def test_a_krylov_space_of_a_low_rank_matrix_stops_at_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 7, generator=generator) @ torch.randn(7, 200, generator=generator)
    krylov = sketched(matrix, 4).krylov
    values = krylov.singular_triplets(64).all_values
    assert numerical_rank(values, (300, 200)) == 7 < krylov.columns
    np.testing.assert_allclose(
        values[:7].numpy(), np.linalg.svd(matrix.double().numpy())[1][:7], rtol=1e-5
    )


def test_a_zero_matrix_has_no_directions() -> None:
    found = sketched(torch.zeros(60, 40), 2).krylov.singular_triplets(5)
    assert numerical_rank(found.all_values, (60, 40)) == 0
    assert found.vectors.shape == (40, 0)
    assert sketched(torch.zeros(60, 40), 2).sums(0.0).nuclear == 0.0


@pytest.mark.parametrize("shape", [(50, 50), (90, 40), (40, 90), (5, 3000), (1, 7)], ids=str)
def test_exact_spectrum_matches_numpy(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    _, sigma, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values, vectors = exact_spectrum(matrix, 3)
    np.testing.assert_allclose(values.numpy(), sigma, rtol=1e-9)
    count = vectors.shape[1]
    assert count == min(3, *shape)
    cosines = np.abs((vectors.double().numpy() * right[:count].T).sum(0))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-6)


def test_deflated_directions_stay_out_of_the_subspace() -> None:
    matrix = matrix_of("power law", (200, 150))
    right = torch.linalg.svd(matrix)[2][:5].T.contiguous()
    krylov = BlockKrylov(
        random_block(150, 8, seed=0, name="w", role="x"), dtype=torch.float32, deflate=right
    )
    for _ in range(3):
        got = products(matrix, krylov.next_pass(), torch.float32)
        assert got is not None
        krylov.absorb(got)
    for q in krylov.q:
        assert float((right.T @ q).abs().max()) < 1e-5
    assert float(krylov.singular_triplets(1).sigma[0]) == pytest.approx(
        float(torch.linalg.svdvals(matrix)[5]), rel=1e-3
    )


def test_random_blocks_depend_on_seed_name_and_role_alone() -> None:
    def block(seed: int, name: str, role: str) -> torch.Tensor:
        return random_block(4, 3, seed=seed, name=name, role=role)

    first = block(0, "layers.0.q", "mllm")
    torch.manual_seed(123)
    assert torch.equal(first, block(0, "layers.0.q", "mllm"))
    for other in (block(1, "layers.0.q", "mllm"), block(0, "layers.1.q", "mllm")):
        assert not torch.equal(first, other)
    assert not torch.equal(first, block(0, "layers.0.q", "expert 1"))


def test_a_pass_asks_for_nothing_by_default() -> None:
    assert Pass() == Pass(gram=None, project=None, times=None, dense=False)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40),
    st.floats(0, 200),
)
@settings(deadline=None, max_examples=60)
def test_importance_is_the_softmax(similarity: list[float], temperature: float) -> None:
    tensor = torch.tensor(similarity, dtype=torch.float64)
    gamma = importance(tensor, temperature=temperature, relative=False)
    logits = temperature * (np.array(similarity) - max(similarity))
    np.testing.assert_allclose(gamma.numpy(), np.exp(logits) / np.exp(logits).sum(), atol=1e-12)
    relative = importance(tensor, temperature=temperature, relative=True)
    np.testing.assert_allclose(relative.numpy(), np.exp(logits), atol=1e-12)


@pytest.mark.parametrize("in_features", [768, 4096])
def test_the_random_law_predicts_the_tail_of_the_denominator(in_features: int) -> None:
    """Exact in the mean; 960 draws scatter around it by their deviation."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 960, generator=generator, dtype=torch.float64) / in_features**0.5
    totals = torch.exp(32 * draws.abs()).sum(1)
    law = math.exp(log_omitted(960, in_features=in_features, temperature=32.0))
    assert law == pytest.approx(float(totals.mean()), rel=0.01)
    assert float((totals / law - 1).abs().median()) < 0.05


def test_the_omitted_share_is_the_error_that_random_directions_make() -> None:
    """Against a softmax over all q directions, of which the last q - r are left out."""
    generator = torch.Generator().manual_seed(0)
    in_features, q, r, temperature = 1024, 1024, 64, 4.0
    similarity = (torch.randn(q, generator=generator, dtype=torch.float64) / 32).abs()
    similarity[0] = 0.9
    whole = importance(similarity, temperature=temperature, relative=False) ** 2
    missing = float(whole[r:].norm() / whole[:r].norm())
    law = omitted_errors(
        similarity[:r],
        omitted=q - r,
        in_features=in_features,
        temperature=temperature,
        relative=False,
    )
    assert missing <= law.share <= 2 * missing + 0.02
    assert law.deviation < 0.02
    nothing = omitted_errors(
        similarity, omitted=0, in_features=in_features, temperature=4.0, relative=False
    )
    assert (nothing.share, nothing.deviation) == (0.0, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 32.0, 1000.0, 10_000.0])
def test_the_law_is_finite_and_bounded_at_every_temperature(temperature: float) -> None:
    """No draw of 960 reaches far beyond its expected maximum, however hot exp(tau s) is."""
    law = log_omitted(960, in_features=560, temperature=temperature)
    assert math.log(960) - 1e-9 <= law <= math.log(960) + temperature * 0.17
    similarity = torch.tensor([0.7, 0.1, 0.02], dtype=torch.float64)
    errors = omitted_errors(
        similarity, omitted=960, in_features=560, temperature=temperature, relative=False
    )
    assert 0 <= errors.share <= 1 and 0 <= errors.deviation <= 2


def test_cosines_ignore_sign_and_length() -> None:
    first = orthonormal(30, 4, torch.Generator().manual_seed(0))
    scaled = first * torch.tensor([-2.0, 0.5, 1.0, -1.0])
    torch.testing.assert_close(
        corresponding_cosines(first, scaled), torch.ones(4, dtype=torch.float64)
    )
    assert float(corresponding_cosines(first[:, :1], first[:, 1:2])) < 1e-6


def test_sums_of_a_known_spectrum_are_plain_sums() -> None:
    sums = SingularSums.of_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert sums.nuclear == 6.0
    assert [sums.leading(count) for count in (1, 2, 3, 9)] == [3.0, 5.0, 6.0, 6.0]
