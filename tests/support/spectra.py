"""Triples of weights whose task vectors have a stated spectrum and stated angles."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

COSINES = (0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.3, 0.2)
"""Planted cosines of the leading corresponding directions."""


def spectrum(kind: str, count: int) -> Tensor:
    """Singular values [count]; every kind has a leading gap of at least 0.05."""
    index = torch.arange(1, count + 1, dtype=torch.float64)
    if kind == "low rank plus noise":
        values = torch.zeros(count, dtype=torch.float64)
        values[:16] = 4 * 0.93 ** torch.arange(16)
        return values
    if kind == "power law":
        return index**-0.5
    if kind == "flat power law":
        return index**-0.1
    if kind == "exponential":
        return torch.exp(-index / 18)
    raise ValueError(kind)


NOISE = {
    "low rank plus noise": 0.5,
    "power law": 0.0,
    "flat power law": 0.0,
    "exponential": 0.01,
}
"""Standard deviation of white noise added to each kind, times sqrt(max(out, in))."""


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] with orthonormal columns, Haar distributed."""
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    return q


def triple(
    shape: tuple[int, int],
    kind: str,
    *,
    seed: int,
    dtype: torch.dtype,
    cosines: tuple[float, ...] = COSINES,
    relative_norm: float = 0.02,
    expert_ratio: float = 1.7,
) -> tuple[Tensor, Tensor, Tensor]:
    """base, MLLM, expert [out, in] in `dtype`, task vectors of `relative_norm` of the weight."""
    made = _triple(shape, kind, seed, cosines, relative_norm, expert_ratio)
    base, mllm, expert = (weight.to(dtype, copy=True) for weight in made)
    return base, mllm, expert


@lru_cache(maxsize=16)
def _triple(
    shape: tuple[int, int],
    kind: str,
    seed: int,
    cosines: tuple[float, ...],
    relative_norm: float,
    expert_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float32; many tests ask for the same ones."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    count = min(shape)
    values = spectrum(kind, count).float()
    right = orthonormal(in_features, count, generator)
    planted = torch.zeros(count)
    planted[: len(cosines)] = torch.tensor(cosines)
    fresh = orthonormal(in_features, count, generator)
    other = torch.linalg.qr(right * planted + fresh * (1 - planted**2).sqrt())[0]
    tasks = []
    for vectors in (right, other):
        task = (orthonormal(out_features, count, generator) * values) @ vectors.T
        noise = torch.randn(shape, generator=generator)
        tasks.append(task + noise * (NOISE[kind] / math.sqrt(max(shape))))
    weight = 0.02 * torch.randn(shape, generator=generator)
    scale = relative_norm * float(weight.norm() / tasks[0].norm())
    mllm, expert = weight + scale * tasks[0], weight + scale * expert_ratio * tasks[1]
    return weight, mllm, expert
