"""What two task vectors look like, matrix by matrix, from whole spectra in float64.

Nothing here uses lean_merge's own linear algebra, so that it can be held against its reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEADING = 16
"""Singular values and similarities kept of every matrix."""
DEPTHS = (1, 4, 16, 64, 256)
"""Numbers of leading directions at which energy is told."""
TEMPERATURES = (1.0, 8.0, 32.0)
GAP = 0.05
FAINT = 1e-5


@dataclass(frozen=True, eq=False)
class Parts:
    """A task vector's singular values [r], descending, and right singular vectors [in, r]."""

    sigma: Tensor
    right: Tensor


def decompose(matrix: Tensor) -> Parts:
    """Decompose [out, in] through the smaller Gram matrix, all of it in float64.

    Singular values below `FAINT` of the largest are left out: a Gram matrix cannot tell them well,
    and rounding to bf16 puts a stored task vector's smallest far above.
    """
    task_vector = matrix.double()
    wide = matrix.shape[0] < matrix.shape[1]
    gram = task_vector @ task_vector.T if wide else task_vector.T @ task_vector
    squares, vectors = torch.linalg.eigh(gram)
    sigma, vectors = squares.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    rank = int((sigma > FAINT * sigma[0]).sum())
    sigma, vectors = sigma[:rank], vectors[:, :rank]
    return Parts(sigma, task_vector.T @ vectors / sigma if wide else vectors)


def dominant_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The direction in which each matrix's inputs are largest, for a text: name to [in], float64.

    It is the leading right singular vector of the inputs [tokens, in], not centred.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().flatten(0, -2).double()
            found[name] = torch.linalg.svd(seen, full_matrices=False).Vh[0]

        return hook

    watched = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model.model(input_ids=ids, use_cache=False)
    for handle in watched:
        handle.remove()
    return found


def anatomy(base: Tensor, mllm: Tensor, expert: Tensor, inputs: Tensor) -> dict[str, Any]:
    """Measure one matrix [out, in] of the three models.

    `inputs` [in] is the direction in which its inputs are largest.

    Returns
    -------
    dict
        ``relative``: task vectors' norms over the base's. ``sigma``: leading singular values over
        the base's Frobenius norm. ``energy``: their shares of the squared norm at `DEPTHS`.
        ``s``: leading similarities; ``s_max`` and where. ``random``: 1/sqrt(in), the scale of s
        for unrelated directions. ``subspace``: largest principal cosine of the two leading
        subspaces. ``gap``: (sigma_1 - sigma_2) / sigma_1. ``lambda_full``, ``lambda_64``: ratios
        of nuclear norms. ``inside``: share of dM's energy in the MLLM's leading directions.
        ``update``: norm of dM V diag(gamma^2) over that of dM, for each importance.
        ``input``: |cosine| of each task vector's v_1 with `inputs`.
    """
    norm = float(base.double().norm())
    first, second = mllm.double() - base.double(), expert.double() - base.double()
    seen, taught = decompose(first), decompose(second)
    count = min(seen.sigma.numel(), taught.sigma.numel())
    s = (seen.right[:, :count] * taught.right[:, :count]).sum(dim=0).abs()
    images = (second @ seen.right).square().sum(dim=0)  # energy of dM along each v_V,i
    whole = float(second.square().sum())

    def share(gamma: Tensor) -> float:
        return math.sqrt(float((gamma**4 * images[:count]).sum()) / whole)

    update = {f"softmax {tau:g}": share(torch.softmax(tau * s, dim=0)) for tau in TEMPERATURES} | {
        f"relative {tau:g}": share(torch.exp(tau * (s - s.max()))) for tau in TEMPERATURES
    }
    parts = {"mllm": seen, "expert": taught}
    return {
        "shape": list(base.shape),
        "relative": {name: float(p.sigma.norm()) / norm for name, p in parts.items()},
        "sigma": {name: (p.sigma[:LEADING] / norm).tolist() for name, p in parts.items()},
        "energy": {name: _shares(p.sigma.square(), DEPTHS) for name, p in parts.items()},
        "effective_rank": {name: _effective_rank(p.sigma) for name, p in parts.items()},
        "gap": {name: float(1 - p.sigma[1] / p.sigma[0]) for name, p in parts.items()},
        "s": s[:LEADING].tolist(),
        "s_max": float(s.max()),
        "s_max_at": int(s.argmax()) + 1,
        "directions": count,
        "random": base.shape[1] ** -0.5,
        "subspace": float(
            torch.linalg.matrix_norm(seen.right[:, :LEADING].T @ taught.right[:, :LEADING], ord=2)
        ),
        "lambda_full": float(seen.sigma.sum() / taught.sigma.sum()),
        "lambda_64": float(seen.sigma[:64].sum() / taught.sigma[:64].sum()),
        "inside": {str(k): float(images[:k].sum()) / whole for k in DEPTHS},
        "update": update,
        "input": {name: float((p.right[:, 0] @ inputs).abs()) for name, p in parts.items()},
    }


def silenced(norms: Tensor, task_vectors: Sequence[Tensor]) -> dict[str, Any]:
    """Whether the spectra of both task vectors [out, in] end in the channel that is silent.

    Parameters
    ----------
    norms : Tensor, shape [in]
        The weights of the norm before them; the silent channel is that of the smallest.

    Returns
    -------
    dict
        ``at``: the channel that is largest in each task vector's last right singular vector.
        ``ends_there``: all are the silent one. ``weight``: its norm's weight over the median.
    """
    at = []
    for task_vector in task_vectors:
        gram = task_vector.double().T @ task_vector.double()
        at.append(int(torch.linalg.eigh(gram).eigenvectors[:, 0].abs().argmax()))
    size = norms.detach().double().abs()
    silent = int(size.argmin())
    return {
        "at": at,
        "ends_there": all(each == silent for each in at),
        "weight": float(size[silent] / size.median()),
    }


def summarise(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Medians and extremes over all matrices, and over those of each module."""
    modules = sorted({name.split(".")[-2] for name in rows})
    groups = {"all": list(rows.values())}
    groups |= {m: [row for n, row in rows.items() if n.split(".")[-2] == m] for m in modules}
    return {name: _summary(group) for name, group in groups.items()}


def _summary(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        middle = float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
        return {"low": min(values), "median": middle, "high": max(values)}

    def chance(row: Mapping[str, Any]) -> float:
        """The share of unrelated pairs whose s_1 is at least this one."""
        return math.erfc(row["s"][0] / row["random"] / math.sqrt(2))

    by_role = {
        f"{fact}_{role}": spread([row[fact][role] for row in rows])
        for role in ("mllm", "expert")
        for fact in ("relative", "effective_rank", "gap", "input")
    }
    return {
        "matrices": len(rows),
        **by_role,
        "energy": {
            role: {
                str(k): spread([row["energy"][role][str(k)] for row in rows])["median"]
                for k in DEPTHS
            }
            for role in ("mllm", "expert")
        },
        "s_1": spread([row["s"][0] for row in rows]),
        "s_1_beyond_chance": sum(chance(row) < 1e-3 for row in rows),
        "s_max": spread([row["s_max"] for row in rows]),
        "s_max_is_s_1": sum(row["s_max_at"] == 1 for row in rows),
        "s_max_within_16": sum(row["s_max_at"] <= LEADING for row in rows),
        "s_max_is_the_last": sum(row["s_max_at"] == row["directions"] for row in rows),
        "subspace": spread([row["subspace"] for row in rows]),
        "no_gap": sum(min(row["gap"].values()) < GAP for row in rows),
        "lambda_full": spread([row["lambda_full"] for row in rows]),
        "lambda_64": spread([row["lambda_64"] for row in rows]),
        "inside": {str(k): spread([row["inside"][str(k)] for row in rows]) for k in DEPTHS},
        "update": {
            kind: spread([row["update"][kind] for row in rows]) for kind in rows[0]["update"]
        },
        "selected": {
            f"{t / 10:g}": {
                "first": sum(row["s"][0] >= t / 10 for row in rows),
                "max": sum(row["s_max"] >= t / 10 for row in rows),
            }
            for t in range(1, 10)
        },
    }


def _shares(energy: Tensor, depths: tuple[int, ...]) -> dict[str, float]:
    return {str(k): float(energy[:k].sum() / energy.sum()) for k in depths}


def _effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007)."""
    share = sigma / sigma.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))
