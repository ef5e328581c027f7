"""Drives a method's analysis over whole matrices in memory, as the engine does over tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.methods import Decision, Method, Update, WeightContext
from support import bfloat16


def products(
    matrix: Tensor,
    request: Pass | None,
    dtype: torch.dtype,
    others: Sequence[Tensor] = (),
    *,
    multiply: bfloat16.Multiply = bfloat16.multiply,
) -> Products | None:
    """What one pass over `matrix` [out, in] brings back; `others` are all matrices of the pass.

    Products in bfloat16 are made by `multiply`.
    """
    if request is None:
        return None

    def product(left: Tensor, right: Tensor) -> Tensor:
        return multiply(left, right) if right.dtype is torch.bfloat16 else left @ right

    low = matrix.to(dtype)
    y = None if request.gram is None else product(low, request.gram).to(dtype)
    return Products(
        y=y,
        z=None if y is None else product(low.T, y).float(),
        projected=None if request.project is None else product(low.T, request.project).float(),
        times=None
        if request.times is None
        else product(matrix.to(request.times.dtype), request.times).float(),
        dense=matrix.float() if request.dense else None,
        reduced=None if request.reduce is None else request.reduce(slice(0, len(matrix)), matrix),
        inner=torch.stack([(matrix.double() * other.double()).sum() for other in others])
        if request.inner
        else None,
    )


def drive(
    method: Method[Any],
    task_vectors: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    name: str = "layers.0.w",
    seed: int = 0,
    surveyed: Any = None,
    multiply: bfloat16.Multiply = bfloat16.multiply,
) -> tuple[Decision, int]:
    """The decision for one weight, and how many passes it took."""
    norms = [float(t.double().square().sum()) for t in task_vectors]
    rows, columns = task_vectors[0].shape
    analysis = method.analyze(
        WeightContext(
            name=name,
            shape=(rows, columns),
            seed=seed,
            dtype=dtype,
            device=torch.device("cpu"),
            squared_norms=lambda: norms,
            parallel=lambda function, items: [function(item) for item in items],
            surveyed=surveyed,
        )
    )
    passes = 0
    try:
        wanted = next(analysis)
        while True:
            passes += 1
            pairs = zip(task_vectors, wanted, strict=True)
            wanted = analysis.send(
                [
                    products(matrix, request, dtype, task_vectors, multiply=multiply)
                    for matrix, request in pairs
                ]
            )
    except StopIteration as end:
        return end.value, passes


def rows_of(update: Update, task_vectors: Sequence[Tensor], rows: slice = slice(None)) -> Tensor:
    """Rows of an update, worked out in buffers that are full of NaN before."""
    rows = slice(*rows.indices(len(task_vectors[0])))
    shape = rows.stop - rows.start, task_vectors[0].shape[1]
    wanted = update.reads or (False,) * len(task_vectors)
    given = [t[rows] if one else None for t, one in zip(task_vectors, wanted, strict=True)]
    out, scratch = torch.full(shape, torch.nan), torch.full((update.scratch, *shape), torch.nan)
    update.rows(rows, given, scratch, out)
    return out
