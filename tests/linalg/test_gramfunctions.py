"""Functions of a Gram matrix: the ways to apply them agree, and with the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_merge.linalg.decomposition import decompose, decompose_product, inverse_root
from lean_merge.linalg.gramfunctions import (
    apply_function,
    by_series,
    chebyshev,
    decay_integral,
    through_eigenvectors,
)


def problem(spectrum: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix to multiply, and a Gram matrix of this spectrum."""
    generator = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    return torch.randn(7, size, generator=generator).double(), (basis * spectrum) @ basis.T


SPECTRA = {
    "flat": torch.full((80,), 0.01, dtype=torch.float64),
    "decaying": 0.8 ** torch.arange(80, dtype=torch.float64),
    "a few above noise": torch.cat(
        [torch.tensor([1.2, 0.5, 0.2]), torch.full((77,), 1e-3)]
    ).double(),
    "singular": torch.cat([torch.rand(20), torch.zeros(60)]).double(),
    "zero": torch.zeros(80, dtype=torch.float64),
}


@pytest.mark.parametrize("steps", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_all_ways_agree(name: str, steps: float):
    left, gram = problem(SPECTRA[name])
    function = decay_integral(steps)
    exact = left @ through_eigenvectors(gram, function, count=80)
    size = max(float(exact.norm()), 1e-300)
    series = chebyshev(function, 1.5, tolerance=1e-7)
    assert float((by_series(left, gram, series, 1.5, torch.mm) - exact).norm()) <= 1e-5 * size
    start = torch.randn(80, 8, generator=torch.Generator().manual_seed(1)).double()
    found = apply_function(left, gram, function, start, torch.mm, tolerance=1e-7)
    assert float((found - exact).norm()) <= 1e-5 * size


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 2000.0), st.floats(0.01, 3.0))
def test_a_series_is_as_near_as_it_says(steps: float, bound: float):
    function = decay_integral(steps)
    series = chebyshev(function, bound, tolerance=1e-8)
    at = torch.linspace(0, bound, 101, dtype=torch.float64)
    values = by_series(torch.ones(1, 101).double(), torch.diag(at), series, bound, torch.mm)
    assert float((values[0] - function(at)).abs().max()) <= 1e-6 * steps


def test_only_the_largest_eigenvalues_count_if_that_is_asked_for():
    left, gram = problem(SPECTRA["decaying"])
    values, vectors = torch.linalg.eigh(gram)
    function = decay_integral(5.0)
    kept = vectors[:, -10:]
    expected = left @ (kept * function(values[-10:])) @ kept.T
    torch.testing.assert_close(left @ through_eigenvectors(gram, function, count=10), expected)
    assert not through_eigenvectors(gram, function, count=0).any()


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=str)
def test_a_decomposition_gives_the_triplets_of_the_numerical_rank(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(2)
    left, right = (
        torch.randn(shape[0], 6, generator=generator),
        torch.randn(6, shape[1], generator=generator),
    )
    matrix = left @ right
    found = decompose(matrix, 10, dtype=torch.float64)
    assert found.rank == 6 and found.sigma.numel() == 6 and found.spectrum.numel() == 20
    product = (found.left * found.sigma) @ found.right.T
    torch.testing.assert_close(product, matrix.double(), rtol=0, atol=1e-5)
    for vectors in (found.left, found.right):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(6).double(), rtol=0, atol=1e-9)
    again = decompose_product(left, torch.linalg.qr(right.T)[0], count=4, rank=6)
    assert again.sigma.numel() == 4 and again.rank == 6


def test_a_polar_factor_is_the_nearest_orthogonal_matrix():
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(20, 6, generator=generator).double()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(matrix @ inverse_root(matrix.T @ matrix), left @ right)
    twice = torch.cat([matrix, matrix], dim=1)
    factor = twice @ inverse_root(twice.T @ twice)
    torch.testing.assert_close(factor[:, :6], left @ right / 2**0.5)
