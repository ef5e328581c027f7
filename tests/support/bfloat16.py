"""Products in bfloat16 as several kinds of processor make them, computed with float32 kernels.

All of them multiply numbers that were rounded to bfloat16, and differ in the order of their sums
and in where these are rounded. The kernels of this processor are among them if it has instructions
for them; if it has none, torch's bfloat16 kernels are slow, and none of these calls them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lean_merge.plan.resources import arithmetic_dtype

Multiply = Callable[[Tensor, Tensor], Tensor]
"""The product of a [m, k] and b [k, n] in bfloat16, in bfloat16 or float32."""


def rounded_once(a: Tensor, b: Tensor) -> Tensor:
    """Add in float32, and round each sum once."""
    return (a.float() @ b.float()).to(a.dtype)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """Add in float64, and round each sum once."""
    return (a.double() @ b.double()).to(a.dtype)


def kept(a: Tensor, b: Tensor) -> Tensor:
    """Add in float32, and leave the sums so."""
    return a.float() @ b.float()


def in_blocks(width: int, *, rounded: bool) -> Multiply:
    """Add blocks of `width` terms one after another in float32, or in bfloat16 if `rounded`."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(a.shape[0], b.shape[1])
        for left, right in zip(a.split(width, 1), b.split(width), strict=True):
            total += left.float() @ right.float()
            if rounded:
                total = total.to(a.dtype).float()
        return total.to(a.dtype)

    return multiply


KINDS: dict[str, Multiply] = {
    "rounded once": rounded_once,
    "exact sums": exact,
    "float32 results": kept,
    "sums of 32": in_blocks(32, rounded=False),
    "rounded sums of 256": in_blocks(256, rounded=True),
}
"""AMX adds 32 terms at a time. Sums of parts are rounded where a kernel cuts a long sum, as CUDA
does if it may, and where a matrix is cut into tiles."""
IS_FAST = arithmetic_dtype(torch.bfloat16, "cpu") is torch.bfloat16
if IS_FAST:
    KINDS["this processor"] = torch.matmul
multiply: Multiply = torch.matmul if IS_FAST else rounded_once
"""What tests use that try one kind only."""
