"""The vocabulary between mathematics and data: what one pass over a matrix's rows computes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2048
"""Rows widened to float64 at a time, so that the temporaries stay small."""


Reduction = Callable[[slice, Tensor], Tensor]
"""Given some rows and their numbers [t, in] in B's own dtype, returns what they add to a sum.

All results have one shape and dtype, int64 or float64. The sum over all rows is made in a fixed
order, but which rows come together is not the reduction's to choose.
"""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one trip over the rows of B [out, in] shall compute; None and False ask for nothing.

    gram : Q [in, b]     -> Products.y = B Q [out, b] and Products.z = B^T y [in, b]
    project : P [out, b] -> Products.projected = B^T P [in, b]
    times : X [in, r]    -> Products.times = B X [out, r]; in float32 where X is, whatever the rest
    dense : True         -> Products.dense = B [out, in] in float32
    reduce : Reduction   -> Products.reduced = the sum of its results
    inner : True         -> Products.inner [n] = <B, B_j> of all matrices that ask for it in this
                            trip, NaN for the others
    """

    gram: Tensor | None = None
    project: Tensor | None = None
    times: Tensor | None = None
    dense: bool = False
    reduce: Reduction | None = None
    inner: bool = False


@dataclass(frozen=True, slots=True)
class Products:
    """What a `Pass` brought back.

    `y` has the arithmetic dtype, `reduced` that of the reduction, `inner` is float64 on the CPU,
    and all else is float32.
    """

    y: Tensor | None = None
    z: Tensor | None = None
    projected: Tensor | None = None
    times: Tensor | None = None
    dense: Tensor | None = None
    reduced: Tensor | None = None
    inner: Tensor | None = None

    def is_finite(self) -> bool:
        """Whether no product, summed over all rows, overflowed."""
        return all(_is_finite(one) for one in (self.z, self.projected) if one is not None)

    def __add__(self, other: Products) -> Products:
        """The sums over two matrices' rows: of what was reduced, and of inner products."""
        return Products(
            reduced=_added(self.reduced, other.reduced), inner=_added(self.inner, other.inner)
        )


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first + second


def _is_finite(values: Tensor) -> bool:
    # A sum takes no memory; it is finite unless a term is not, or very many are huge.
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def random_block(rows: int, columns: int, *, seed: int, name: str, role: str) -> Tensor:
    """Gaussian [rows, columns] in float32 on the CPU, the same on every machine and in any order.

    The generator is seeded by SHA-256 of (seed, name, role): a start shared by two matrices would
    make unconverged subspaces look aligned.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0{role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(rows, columns, generator=generator)


def gram64(a: Tensor, b: Tensor, *, rounded: bool = False) -> Tensor:
    """a^T b [m, n] in float64 for a [k, m] and b [k, n] of any floating dtype.

    The result is on the CPU, where small problems are solved faster than on any device. A device
    that lacks float64 sends its chunks there too.

    Parameters
    ----------
    rounded
        The blocks are products rounded to 16 bits, whose own error of 4e-3 hides that of float32
        sums over a chunk; three times as fast.
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
    """Whether a device computes in float64; Apple's does not."""
    return device.type != "mps"


def remove_components(block: Tensor, basis: Tensor) -> None:
    """block -= basis (basis^T block), in place, float32; `basis` [in, c] nearly orthonormal."""
    wide = basis.float()
    block.addmm_(wide, wide.T @ block, alpha=-1.0)


def orthonormalize(block: Tensor) -> Tensor:
    """Q [n, b] of the thin QR of `block` [n, b], float32."""
    q: Tensor = torch.linalg.qr(block)[0]
    return q
