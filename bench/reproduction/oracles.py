"""Updates that no method makes: they tell which step of IP-Merging costs what.

All work on the exact float64 decompositions of the task vectors, weight by weight, and return
updates [out, in] by the weights' names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from reproduction.exam import Weights
from reproduction.family import Svd, TaskVectors

Updates = dict[str, Tensor]


def truncated(svd: Svd, rank: int) -> Tensor:
    """The best approximation of a rank (Eckart and Young)."""
    return (svd.left[:, :rank] * svd.sigma[:rank]) @ svd.right[:, :rank].T


def projected(matrix: Tensor, directions: Tensor) -> Tensor:
    """`matrix` on the span of orthonormal columns on its input side."""
    return matrix.double() @ directions @ directions.T


def random_directions(name: str, width: int, count: int, seed: int = 0) -> Tensor:
    """Orthonormal columns [width, count] that know of no weight, fixed by the name and seed."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    start = torch.randn(width, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(start)[0]


def leading(family: TaskVectors, rank: int) -> Updates:
    """dM cut to its leading directions."""
    return {name: truncated(svd, rank) for name, svd in family.svd_of_expert.items()}


def trailing(family: TaskVectors, rank: int) -> Updates:
    """dM without its leading directions."""
    return {
        name: family.of_expert[name].double() - truncated(svd, rank)
        for name, svd in family.svd_of_expert.items()
    }


def inside(family: TaskVectors, count: int) -> Updates:
    """dM on the leading directions of the MLLM's own tuning, all with importance 1."""
    return {
        name: projected(family.of_expert[name], svd.right[:, :count])
        for name, svd in family.svd_of_mllm.items()
    }


def inside_random(family: TaskVectors, count: int) -> Updates:
    """dM on as many random directions."""
    return {
        name: projected(matrix, random_directions(name, matrix.shape[1], count))
        for name, matrix in family.of_expert.items()
    }


def rescaled(family: TaskVectors, names: Iterable[str]) -> Updates:
    """lambda dM of some weights."""
    return {name: family.ratio[name] * family.of_expert[name] for name in names}


def as_long_as(updates: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Updates:
    """Each update scaled to the norm of `model`'s of the same name; a zero stays."""
    longer = {}
    for name, update in updates.items():
        norm = float(update.norm())
        longer[name] = update * (float(model[name].norm()) / norm) if norm else update
    return longer


def difference(weights: Weights, start: Weights) -> Updates:
    """What a merge added to every weight."""
    return {name: weights[name].double() - start[name].double() for name in start}


def norm(updates: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of all updates together."""
    return float(sum(float(update.double().square().sum()) for update in updates.values()) ** 0.5)


def energy_inside(matrix: Tensor, directions: Tensor) -> Tensor:
    """Share of ||matrix||_F^2 within the first k of the columns [in, r], for k = 1..r."""
    found = (matrix.double() @ directions).square().sum(0).cumsum(0)
    return found / matrix.double().square().sum()
