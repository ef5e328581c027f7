"""Block Krylov subspaces of B^T B and their Ritz pairs, in few passes over B.

Musco and Musco 2015 (arXiv:1504.05477) prove the accuracy of block Krylov subspaces; Golub and
Kahan 1965 introduce the two sides. The subspace is built with products in a cheap dtype (bfloat16
where it pays). The small problems are solved in float64 and use the rounded basis as it is, so that
rounding moves the subspace a little (second order in every angle) but not the projected matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.linalg.passes import Pass, Products, gram64, orthonormalize, remove_components

_INDEPENDENT = 1e-12
"""Directions of a scaled basis are dropped if their squared norm falls below this share."""
_DISTINCT = 1e-2
"""This is the same share for right blocks. They are orthonormal except for rounding, unless nothing
new was left to find."""
_NEARLY = 0.9
"""A scaled metric that is closer to the identity than this has no direction to leave out."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """The leading singular triplets of a sketch.

    Attributes
    ----------
    sigma : Tensor [k], float64
        Singular values, descending.
    vectors : Tensor [in, k], float32
        Right singular vectors.
    angles : Tensor [k], float64
        Sine of the angle between each vector and its estimate half an iteration earlier.
    all_values : Tensor [m], float64
        Square roots of all Ritz values, from products that are accurate far below sigma_1.
    """

    sigma: Tensor
    vectors: Tensor
    angles: Tensor
    all_values: Tensor


@dataclass(frozen=True, slots=True)
class Deflation:
    """The settled directions, which a later sketch leaves out.

    `vectors` [in, c] float32 are orthonormal, `images` [out, c] float32 are B times them and
    orthogonal, and `sigma` [c] float64 are the images' lengths, descending.
    """

    vectors: Tensor
    images: Tensor
    sigma: Tensor


@dataclass(frozen=True, slots=True)
class Ritz:
    """Ritz values `theta` [k], descending, and Ritz vectors as `coefficients` [m, k] in a basis.

    The Ritz values approximate sigma^2.
    """

    theta: Tensor
    coefficients: Tensor


class BlockKrylov:
    """The Krylov subspace span{Q, A Q, A^2 Q, ...} of A = B^T B; each pass adds a block.

    Parameters
    ----------
    start : Tensor [in, b], float32
        Any full-rank start block; it is orthonormalised here.
    dtype : torch.dtype
        Arithmetic dtype of the products with B.
    deflate : Tensor [in, c], optional
        Orthonormal right singular vectors that are kept out of the subspace.

    Attributes
    ----------
    q, y, z : list of Tensor
        Right blocks Q [in, b], left blocks y = B Q [out, b], and z = B^T y [in, b].
    qq, yy, zz : Tensor [m, m]
        Their Gram matrices over all blocks, float64 on the CPU.
    rounding : float
        The share of such a matrix's largest eigenvalue below which y or z hold only rounding.
    """

    def __init__(self, start: Tensor, *, dtype: torch.dtype, deflate: Tensor | None = None) -> None:
        self._dtype = dtype
        self._rounded = dtype.itemsize < 4
        self.rounding = max(_INDEPENDENT, (torch.finfo(dtype).eps / 2) ** 2)
        self._deflate = deflate
        self.q: list[Tensor] = []
        self.y: list[Tensor] = []
        self.z: list[Tensor] = []
        empty = torch.zeros(0, 0, dtype=torch.float64)
        self.qq, self.yy, self.zz = empty, empty, empty
        self._right: Ritz | None = None
        self._next = self._orthonormal(start.clone())

    @property
    def depth(self) -> int:
        """Return how many blocks were absorbed so far."""
        return len(self.z)

    @property
    def columns(self) -> int:
        """Return how many columns the subspace has; fewer Ritz values mean a smaller rank."""
        return self.qq.shape[0]

    def next_pass(self) -> Pass:
        """Return the pass whose products the next `absorb` expects."""
        return Pass(gram=self._next)

    def absorb(self, products: Products) -> None:
        """Extend the subspace by y = B Q and z = B^T y, the products of the last `next_pass`."""
        assert products.y is not None and products.z is not None
        z = products.z
        if self._deflate is not None:
            remove_components(z, self._deflate)
        self.qq = grow_gram(self.qq, self.q, self._next, rounded=self._rounded)
        self.yy = grow_gram(self.yy, self.y, products.y, rounded=self._rounded)
        self.zz = grow_gram(self.zz, self.z, z, rounded=self._rounded)
        self._right = None
        self.q.append(self._next)
        self.y.append(products.y)
        self.z.append(z)
        self._next = self._orthonormal(z.clone())

    def _orthonormal(self, block: Tensor) -> Tensor:
        for _ in range(1 if self._rounded else 2):
            if self._deflate is not None:
                remove_components(block, self._deflate)
            if self._rounded:
                self._remove_span(block)
                continue
            for q in self.q:
                remove_components(block, q)
        return orthonormalize(block).to(self._dtype)

    def _remove_span(self, block: Tensor) -> None:
        """Subtract from `block` [in, b], in place, its projection on the span of all right blocks.

        Rounded blocks are orthonormal only to about 1e-3. Their metric keeps this from growing.
        """
        if self.q:
            dual = self.right().coefficients
            inner = torch.cat([q.float().T @ block for q in self.q]).double().cpu()
            block.sub_(combine(self.q, dual @ (dual.T @ inner)))

    def right(self) -> Ritz:
        """Return the Ritz pairs of B^T B on the span of the right blocks `q`."""
        if self._right is None:
            # The result is kept until the next pass, because several callers ask for it.
            self._right = generalized_ritz(self.yy, self.qq, independent=_DISTINCT)
        return self._right

    def left(self) -> Ritz:
        """Return the Ritz pairs of B B^T on the span of the left blocks `y`.

        They are half an iteration ahead of those of the right blocks.
        """
        return generalized_ritz(self.zz, self.yy, independent=self.rounding)

    def settled(self, count: int) -> Deflation:
        """Return the leading `count` directions in the right blocks' span, and their images."""
        right = self.right()
        weights = right.coefficients[:, :count].float()
        return Deflation(
            vectors=combine(self.q, weights),
            images=combine(self.y, weights),
            sigma=right.theta[:count].sqrt(),
        )

    def singular_triplets(self, count: int) -> Triplets:
        """Return the leading `count` singular triplets.

        V is computed from the left Ritz vectors: V = B^T U / sigma. Its angle is measured to the
        right Ritz vector of the same index, which is half an iteration older. Where the iteration
        converges, this angle bounds V's own error from above.

        Columns of y that share one large direction cancel it only down to their rounding, where z
        is no longer B^T y. Left vectors of so small a size would pass for large ones. The left
        problem is therefore solved only for directions above the rounding. Those below keep their
        right Ritz vector, and the sine of their angle is given as 1.
        """
        right = self.right()
        # z has an error of eps sigma_1^2, which a direction of size sigma_i divides by sigma_i.
        floor = torch.finfo(self._dtype).eps / 2
        sound = right.coefficients[:, right.theta > floor * right.theta[:1]]
        left = generalized_ritz(sound.T @ self.zz @ sound, sound.T @ self.yy @ sound)
        coefficients = sound @ left.coefficients
        above = min(count, left.theta.numel())
        sigma = left.theta[:above].sqrt()
        inverse = torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))
        cosines = (right.coefficients[:, :above] * (self.yy @ coefficients[:, :above])).sum(0)
        cosines = (cosines * inverse).abs().clamp(max=1.0)
        vectors = combine(self.z, (coefficients[:, :above] * inverse).float())
        angles = (1 - cosines**2).sqrt()
        below = slice(above, min(count, int((right.theta > 0).sum())))
        rest = right.theta[below].sqrt()
        if rest.numel():
            # These are capped at the left problem's smallest value, so that all stay in order.
            sigma = torch.cat([sigma, rest.minimum(sigma[-1:]) if above else rest])
            vectors = torch.cat([vectors, combine(self.q, right.coefficients[:, below])], dim=1)
            angles = torch.cat([angles, torch.ones_like(rest)])
        return Triplets(sigma, vectors, angles, all_values=right.theta.sqrt())


def generalized_ritz(
    numerator: Tensor, metric: Tensor, *, independent: float = _INDEPENDENT
) -> Ritz:
    """Solve N s = theta M s for symmetric N and semidefinite M [m, m] in float64, on M's range.

    Eigenvalues of the scaled M that are below `independent` times its largest are left out.
    """
    if not metric.numel():
        return Ritz(metric.new_zeros(0), metric)
    scale = metric.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    scaled = (metric + metric.T) / 2 * inverse[:, None] * inverse
    if float((scaled - torch.eye(len(scaled), dtype=scaled.dtype)).norm()) < _NEARLY:
        # All eigenvalues lie within 1 +- _NEARLY, so none is left out.
        whiten = inverse[:, None] * _inverse_root(scaled)
    else:
        values, vectors = torch.linalg.eigh(scaled)
        kept = values > independent * values[-1]
        whiten = inverse[:, None] * vectors[:, kept] / values[kept].sqrt()
    theta, small = torch.linalg.eigh(whiten.T @ ((numerator + numerator.T) / 2) @ whiten)
    return Ritz(theta.flip(0).clamp_min(0), (whiten @ small).flip(1))


def _inverse_root(metric: Tensor) -> Tensor:
    """Return X [m, m] with X^T M X = 1 for a positive definite M [m, m].

    It uses Cholesky's decomposition, which takes a sixteenth of the time of an eigenproblem.
    """
    lower = torch.linalg.cholesky(metric)
    identity = torch.eye(len(metric), dtype=metric.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.T


def combine(blocks: list[Tensor], coefficients: Tensor) -> Tensor:
    """Return [n, k] float32: the blocks, side by side, times `coefficients` [m, k]."""
    out = torch.zeros(
        blocks[0].shape[0], coefficients.shape[1], dtype=torch.float32, device=blocks[0].device
    )
    coefficients = coefficients.float().to(out.device)
    row = 0
    for block in blocks:
        out.addmm_(block.float(), coefficients[row : row + block.shape[1]])
        row += block.shape[1]
    return out


def grow_gram(gram: Tensor, old: list[Tensor], new: Tensor, *, rounded: bool) -> Tensor:
    """Extend `gram`, the Gram matrix of the `old` blocks, by the block `new`.

    `gram64` explains `rounded`.
    """
    size, width = gram.shape[0], new.shape[1]
    grown = gram.new_zeros(size + width, size + width)
    grown[:size, :size] = gram
    row = 0
    for block in old:
        cross = gram64(block, new, rounded=rounded)
        grown[row : row + block.shape[1], size:] = cross
        grown[size:, row : row + block.shape[1]] = cross.T
        row += block.shape[1]
    grown[size:, size:] = gram64(new, new, rounded=rounded)
    return grown
