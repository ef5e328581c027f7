"""Convert facts to plain data for JSON and back: numbers are kept bit for bit, and are checked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lean_merge.methods.facts import Facts, Portrait, RoleFacts
from lean_merge.methods.spectra import MAX_SUBSPACE, SMALL_GAP

_MOST = 1 << 31
"""Every count in a model is smaller than this."""


def to_plain(facts: Facts) -> dict[str, Any]:
    """Return `facts` in the form that docs/formats.md gives for a weight of analysis.json."""
    mllm, *experts = (
        _plain_role(role, square)
        for role, square in zip(facts.roles, facts.squared_norms, strict=True)
    )
    pairs = zip(experts, facts.similarity, facts.leading, strict=True)
    return {
        "shape": list(facts.shape),
        "stored": facts.stored,
        "whole": facts.is_whole,
        "exhausted": facts.is_exhausted,
        "mllm": mllm,
        "experts": [
            {**expert, "similarity": similarity.tolist(), "leading_sums": leading and [*leading]}
            for expert, similarity, leading in pairs
        ],
    }


def _plain_role(role: RoleFacts, square: float) -> dict[str, Any]:
    return {
        "norm": math.sqrt(square),
        "squared_norm": square,
        "nuclear": role.nuclear,
        "nuclear_doubt": role.doubt,
        "rank": role.rank,
        "faint": role.is_faint,
        "gap": role.gap < SMALL_GAP,
        "separation": role.gap,
        "sigma": role.sigma.tolist(),
        "angles": role.angles.tolist(),
    }


def plain_portrait(portrait: Portrait | None) -> dict[str, Any]:
    """Return the report's other entries of an expert; they are null if its task vector is zero."""
    return {
        "gamma": None if portrait is None else portrait.gamma.tolist(),
        "update_norm": portrait and portrait.update_norm,
        "update_relative": portrait and portrait.update_relative,
        "effective_rank": portrait and portrait.effective_rank,
        "energy_kept": portrait and portrait.energy_kept,
        "energy_inside": portrait and portrait.energy_inside,
    }


def from_plain(data: Any) -> Facts:
    """Return the facts that `to_plain` was given; other keys are ignored.

    Raises
    ------
    ValueError
        Something is missing, of a wrong type, or out of its range; the message says what.
    """
    shape = [_count(side, "shape") for side in _list(data, "shape")]
    if len(shape) != 2 or 0 in shape:
        raise ValueError("shape is not that of a matrix")
    entries = [_of(data, "mllm", dict), *_list(data, "experts")]
    roles = tuple(map(_role, entries))
    stored = _count(_of(data, "stored", int), "stored")
    if stored > roles[0].sigma.numel():
        raise ValueError("more directions are stored than computed")
    similarity = tuple(_numbers(entry, "similarity", most=1.0) for entry in entries[1:])
    for cosines, expert in zip(similarity, roles[1:], strict=True):
        if cosines.numel() > min(roles[0].sigma.numel(), expert.sigma.numel()):
            raise ValueError("more similarities than directions")
        if (cosines.numel() > 0) != (min(roles[0].rank, expert.rank) > 0):
            raise ValueError("similarities do not fit the ranks")
    return Facts(
        shape=(shape[0], shape[1]),
        roles=roles,
        similarity=similarity,
        leading=tuple(_pair(entry) for entry in entries[1:]),
        squared_norms=tuple(_number(_get(entry, "squared_norm"), "norm") for entry in entries),
        is_whole=_of(data, "whole", bool),
        is_exhausted=_of(data, "exhausted", bool),
        stored=stored,
    )


def _role(entry: Any) -> RoleFacts:
    sigma, angles = _numbers(entry, "sigma"), _numbers(entry, "angles", most=1.0)
    if sigma.numel() != angles.numel() or sigma.numel() > MAX_SUBSPACE:
        raise ValueError("sigma and angles differ in length, or are too long")
    return RoleFacts(
        sigma=sigma,
        angles=angles,
        rank=_count(_of(entry, "rank", int), "rank"),
        gap=_number(_get(entry, "separation"), "separation"),
        nuclear=None if _get(entry, "nuclear") is None else _number(entry["nuclear"], "nuclear"),
        doubt=_number(_get(entry, "nuclear_doubt"), "nuclear_doubt"),
        is_faint=_of(entry, "faint", bool),
    )


def _pair(entry: Any) -> tuple[float, float] | None:
    if _get(entry, "leading_sums") is None:
        return None
    pair = [_number(each, "leading_sums") for each in _list(entry, "leading_sums")]
    if len(pair) != 2:
        raise ValueError("leading_sums are not two")
    return pair[0], pair[1]


def _get(data: Any, key: str) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"{key} is missing")
    return data[key]


def _of(data: Any, key: str, kind: type) -> Any:
    value = _get(data, key)
    if type(value) is not kind:
        raise ValueError(f"{key} is no {kind.__name__}")
    return value


def _list(data: Any, key: str) -> list[Any]:
    value: list[Any] = _of(data, key, list)
    return value


def _count(value: Any, key: str) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{key} is no count")
    return value


def _number(value: Any, key: str, *, most: float = math.inf) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most or math.isinf(value):
        raise ValueError(f"{key} is no number in its range")
    return float(value)


def _numbers(entry: Any, key: str, *, most: float = math.inf) -> Tensor:
    values = [_number(value, key, most=most) for value in _list(entry, key)]
    return torch.tensor(values, dtype=torch.float64)


__all__ = ["from_plain", "plain_portrait", "to_plain"]
