"""Define what one pass over a matrix's rows can compute, and helpers for its products."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2048
"""So many rows are widened to float64 at a time, which keeps the temporaries small."""


Reduction = Callable[[slice, Tensor], Tensor]
"""A function of some rows' indices and numbers [t, in], in B's own dtype, that returns a summand.

All summands have the same shape and dtype, int64 or float64. They are added over all rows in a
fixed order, but the reduction cannot choose which rows it is given together.
"""


@dataclass(frozen=True, slots=True)
class Pass:
    """A request for what one pass over the rows of B [out, in] computes.

    A field that is None or False asks for nothing.

    gram : Q [in, b]     -> Products.y = B Q [out, b] and Products.z = B^T y [in, b]
    project : P [out, b] -> Products.projected = B^T P [in, b]
    times : X [in, r]    -> Products.times = B X [out, r]; computed in float32 if X is float32
    dense : True         -> Products.dense = B [out, in] in float32
    reduce : Reduction   -> Products.reduced = the sum of its results
    inner : True         -> Products.inner [n] = <B, B_j> of all matrices that ask for it in this
                            pass, NaN for the others
    """

    gram: Tensor | None = None
    project: Tensor | None = None
    times: Tensor | None = None
    dense: bool = False
    reduce: Reduction | None = None
    inner: bool = False


@dataclass(frozen=True, slots=True)
class Products:
    """The results of a `Pass`.

    `y` has the arithmetic dtype, and `reduced` has that of the reduction. `inner` is float64 on the
    CPU, and all other results are float32.
    """

    y: Tensor | None = None
    z: Tensor | None = None
    projected: Tensor | None = None
    times: Tensor | None = None
    dense: Tensor | None = None
    reduced: Tensor | None = None
    inner: Tensor | None = None

    def is_finite(self) -> bool:
        """Return whether none of the products that are summed over all rows overflowed."""
        return all(_is_finite(one) for one in (self.z, self.projected) if one is not None)

    def __add__(self, other: Products) -> Products:
        """Add the reductions and the inner products of two matrices; other products are dropped."""
        return Products(
            reduced=_added(self.reduced, other.reduced), inner=_added(self.inner, other.inner)
        )


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first + second


def _is_finite(values: Tensor) -> bool:
    # A sum takes no memory; it is finite unless a term is not, or very many are huge.
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def random_block(rows: int, columns: int, *, seed: int, name: str, role: str) -> Tensor:
    """Return Gaussian random numbers [rows, columns] in float32 on the CPU.

    The generator is seeded by SHA-256 of (seed, name, role), so that the numbers are the same on
    every machine and in any order of calls. Each matrix needs its own start, because a shared one
    would make unconverged subspaces look aligned.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32)


def gram64(a: Tensor, b: Tensor, *, rounded: bool = False) -> Tensor:
    """Return a^T b [m, n] in float64 for a [k, m] and b [k, n] of any floating dtype.

    The result is on the CPU, where small problems are solved faster than on any device. A device
    that lacks float64 sends its chunks there too.

    Parameters
    ----------
    rounded
        Whether the blocks are products rounded to 16 bits. Their own error of 4e-3 hides that of
        float32 sums over a chunk, which are then used because they are three times as fast.
    """
    if not has_float64(a.device):
        a, b = a.cpu(), b.cpu()
    dtype = torch.float32 if rounded else torch.float64
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        total += a[rows].to(dtype).T @ b[rows].to(dtype)
    return total.cpu()


def has_float64(device: torch.device) -> bool:
    """Return whether a device can compute in float64; Apple's cannot."""
    return device.type != "mps"


def remove_components(block: Tensor, basis: Tensor) -> None:
    """Subtract basis (basis^T block) from the float32 `block` [in, b] in place.

    The columns of `basis` [in, c] must be nearly orthonormal.
    """
    wide = basis.float()
    block.addmm_(wide, wide.T @ block, alpha=-1.0)


def orthonormalize(block: Tensor) -> Tensor:
    """Return the factor Q [n, b], float32, of the thin QR decomposition of `block` [n, b]."""
    q: Tensor = torch.linalg.qr(block)[0]
    return q
