"""Count how far stored numbers are from those that a merge gives."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_apart(one: Tensor, other: Tensor) -> int:
    """Count the bytes of two uint8 tensors that differ."""
    return int((one != other).sum())


def numbers_apart(one: Tensor, other: Tensor) -> int:
    """Count the floating-point numbers of two tensors that differ by more than one last place.

    Numbers of one byte are counted if they differ at all.
    """
    if one.dtype == torch.uint8:
        return bytes_apart(one, other)
    return int(((rank_of(one) - rank_of(other)).abs() > 1).sum())


def rank_of(numbers: Tensor) -> Tensor:
    """Return each number's place among all numbers of its dtype, as int64; both zeros are 0."""
    width = numbers.element_size() * 8
    kind = {16: torch.int16, 32: torch.int32, 64: torch.int64}[width]
    bits = numbers.view(kind).long()
    return torch.where(bits < 0, -(bits + (1 << (width - 1))), bits)
