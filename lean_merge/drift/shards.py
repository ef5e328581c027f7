"""Parameters that are spread over processes: their local parts, and sums over all of them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from lean_merge.drift.rectangles import Box

_DTENSOR = "torch.distributed.tensor"


def is_spread(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as those of FSDP2 are."""
    # A program that has such a tensor has imported the module, and it takes long to import.
    module = sys.modules.get(_DTENSOR)
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, which shares its memory."""
    if not is_spread(tensor):
        return tensor
    spread: Any = tensor
    found: Tensor = spread.to_local()
    return found


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one; all processes that hold parts of it must ask together."""
    if not is_spread(tensor):
        return tensor
    spread: Any = tensor
    found: Tensor = spread.full_tensor()
    return found


def box_of(tensor: Tensor) -> Box:
    """Return which part of the whole tensor this process holds."""
    if not is_spread(tensor):
        return [(0, length) for length in tensor.shape]
    spread: Any = tensor
    where = importlib.import_module(f"{_DTENSOR}._utils").compute_local_shape_and_global_offset
    shape, offset = where(spread.shape, spread.device_mesh, spread.placements)
    return [(start, start + length) for start, length in zip(offset, shape, strict=True)]


def add_up(sums: Tensor, like: Tensor) -> Tensor:
    """Return sums of local parts, added up over the processes that hold the parts of `like`.

    All of them must ask together, also those that hold none of the numbers.
    """
    if not is_spread(like):
        return sums
    spread: Any = like
    mesh = spread.device_mesh
    here = sums.to(mesh.device_type)
    for dim, placement in enumerate(spread.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(here, group=mesh.get_group(dim))
    return here.to(sums.device)
