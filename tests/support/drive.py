"""Drives a method's analysis over whole matrices in memory, as the engine does over tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lean_merge.linalg import Pass, Products
from lean_merge.methods import Decision, Method, WeightContext


def products(matrix: Tensor, request: Pass | None, dtype: torch.dtype) -> Products | None:
    """What one pass over `matrix` [out, in] brings back."""
    if request is None:
        return None
    low = matrix.to(dtype)
    y = None if request.gram is None else low @ request.gram
    return Products(
        y=y,
        z=None if y is None else (low.T @ y).float(),
        projected=None if request.project is None else (low.T @ request.project).float(),
        times=None
        if request.times is None
        else (matrix.to(request.times.dtype) @ request.times).float(),
        dense=matrix.float() if request.dense else None,
    )


def drive(
    method: Method[Any],
    task_vectors: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    name: str = "layers.0.w",
    seed: int = 0,
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
        )
    )
    passes = 0
    try:
        wanted = next(analysis)
        while True:
            passes += 1
            pairs = zip(task_vectors, wanted, strict=True)
            wanted = analysis.send([products(matrix, request, dtype) for matrix, request in pairs])
    except StopIteration as end:
        return end.value, passes
