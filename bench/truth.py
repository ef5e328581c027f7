"""What a merge should have given: the naive oracle of the tests, applied to files.

Everything is whole and in float64, computed by `tests/support/oracle.py`, which shares nothing
with the package. One weight of 4096 x 4096 takes about two minutes on two cores.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT
from safetensors import safe_open
from torch import Tensor

from lean_merge.checkpoints import open_checkpoint

UPDATE, RATIO, CLEAR = 0.03, 0.015, 0.02
"""Bars: error of an update, of lambda, and how near the threshold a selection may differ."""
SAME = 0.999
"""Share of numbers that must be stored exactly as the update, added and rounded once."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of one weight; `update` and `ratio` are 0 where nothing was selected."""

    name: str
    selected: bool
    update: float
    ratio: float


def tensor(folder: Path, name: str) -> Tensor:
    """A tensor of a checkpoint or an adapter."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            if name in content.keys():
                found: Tensor = content.get_tensor(name)
                return found
    raise KeyError(name)


def expected(triple: Path, name: str, threshold: float = 0.4) -> Any:
    """The oracle's account of the weight `name`, by the base's names."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from support import oracle
    finally:
        sys.path.remove(str(ROOT / "tests"))
    roles = (("base", name), ("mllm", f"language_model.{name}"), ("expert", name))
    weights = [tensor(triple / role, stored).double().numpy() for role, stored in roles]
    return oracle.ip_merging(*weights, threshold=threshold)


def canonical(name: str) -> str:
    """How a report names the weight `name` of the base."""
    return name.removeprefix("model.").removesuffix(".weight")


def compare(
    truth: Any, row: dict[str, Any], update: Tensor | None, threshold: float = 0.4
) -> Accuracy:
    """Assert the bars for one weight, given its row of the report and its update [out, in]."""
    name = row["weight"]
    first = float(truth.similarity[0])
    if abs(first - threshold) >= CLEAR:
        assert row["selected"] == truth.selected, (name, first, row["reason"])
    if not (row["selected"] and truth.selected):
        return Accuracy(name, row["selected"], 0.0, 0.0)
    assert update is not None, name
    difference = np.linalg.norm(update.double().numpy() - truth.update)
    error = float(difference / np.linalg.norm(truth.update))
    ratio = abs(row["lambda"] / truth.ratio - 1)
    assert error <= UPDATE, (name, error)
    assert ratio <= RATIO, (name, ratio)
    return Accuracy(name, True, error, ratio)


def adapter_update(folder: Path, name: str) -> Tensor | None:
    """B A of the module that adapts the weight `name` of the base; None if there is none."""
    layer = canonical(name)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for key in content.keys():
                if key.endswith(f"{layer}.lora_A.weight"):
                    left = content.get_tensor(key.replace("lora_A", "lora_B"))
                    return left.double() @ content.get_tensor(key).double()
    return None


def check_stored(triple: Path, out: Path, name: str, update: Tensor | None) -> None:
    """Assert that a weight is stored as the MLLM's plus its update, rounded once."""
    stored, before = (tensor(f, f"language_model.{name}") for f in (out, triple / "mllm"))
    if update is None:
        assert torch.equal(stored, before), name
        return
    rounded = (before.double() + update).to(stored.dtype)
    # The adapter's factors are cut and rounded, so a sum on the edge may fall to either side.
    same = float((stored == rounded).double().mean())
    assert same >= SAME, (name, same)
    step = (stored.double() - before.double()).norm() / update.norm()
    assert not math.isclose(float(step), 0.0, abs_tol=1e-3), name


def check_rest(triple: Path, out: Path, scope: Iterable[str]) -> int:
    """Assert that every tensor out of scope is the MLLM's byte for byte; how many there are."""
    in_scope = {f"language_model.{name}" for name in scope}
    before, after = open_checkpoint(str(triple / "mllm")), open_checkpoint(str(out))
    assert before.tensors.keys() == after.tensors.keys()
    count = 0
    for name in before.tensors.keys() - in_scope:
        first, second = tensor(triple / "mllm", name), tensor(out, name)
        assert first.dtype == second.dtype, name
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), name
        count += 1
    return count
