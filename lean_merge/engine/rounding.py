"""Round float32 results to the output dtype stochastically, so that small updates count."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def rounding_generator(seed: int, name: str, index: int) -> torch.Generator:
    """Return a CPU generator for tile `index` of weight `name`.

    Its numbers depend neither on the order in which tiles are written nor on the device.
    """
    digest = hashlib.sha256(f"{seed}\0{name}\0rounding {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def round_stochastic(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each of `values` (float32, CPU) to one of its two neighbours in `dtype` at random.

    The farther neighbour is taken with the probability |error of the nearest| / spacing, so that
    the mean is exact.
    """
    nearest = values.to(dtype)
    if dtype == torch.float32:
        return nearest
    error = values - nearest.float()
    neighbour = _next_towards(nearest, error)
    spacing = (neighbour.float() - nearest.float()).abs()
    draw = torch.rand(values.shape, generator=generator, dtype=torch.float32)
    take = (draw * spacing < error.abs()) & torch.isfinite(neighbour)
    return torch.where(take, neighbour, nearest)


def _next_towards(values: Tensor, direction: Tensor) -> Tensor:
    """Return each value's next neighbour in its 16-bit float dtype, towards `direction`'s sign."""
    bits = values.view(torch.int16).int() & 0xFFFF
    negative = bits >= 0x8000
    outward = (direction > 0) != negative
    stepped = torch.where(outward, bits + 1, bits - 1)
    at_zero = (bits & 0x7FFF) == 0
    from_zero = torch.where(direction > 0, 0x0001, 0x8001)
    stepped = torch.where(at_zero, from_zero.int(), stepped)
    stepped = torch.where(direction == 0, bits, stepped)
    signed = torch.where(stepped >= 0x8000, stepped - 0x10000, stepped)
    return signed.to(torch.int16).view(values.dtype)
