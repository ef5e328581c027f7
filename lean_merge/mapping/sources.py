"""Which kind of source a stored logical weight has."""

from __future__ import annotations

import math

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.mapping.placement import Place
from lean_merge.mapping.rows import WeightSource, source
from lean_merge.mapping.scaledrows import ScaledRows


def stored_source(checkpoint: Checkpoint, place: Place) -> WeightSource:
    """How the rows of a weight of a checkpoint are had, with its scales if it has any."""
    scale = checkpoint.scales.get(place.tensor.name)
    return source(place) if scale is None else ScaledRows(place, scale)


def decoded_matrices(checkpoint: Checkpoint, tensor: TensorSpec) -> tuple[WeightSource, ...]:
    """The matrices [out, in] of a tensor that is stored with scales, in order; else nothing."""
    scale = checkpoint.scales.get(tensor.name)
    if scale is None or 0 in tensor.shape:
        return ()
    height, width = (1, *tensor.shape)[-2:]
    size = height * width
    return tuple(
        ScaledRows(Place(tensor, (height, width), first, height, height), scale)
        for first in range(0, math.prod(tensor.shape), size)
    )
