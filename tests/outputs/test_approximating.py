"""Adapters of updates that have full rank, against the singular value decomposition of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.drive import products, rows_of
from support.families import Triple, as_matrix, contents, load, write_triple
from support.invariance import smallest_memory
from support.oracle import Matrix, ties
from torch import Tensor

from lean_merge import MergeResult, RecipeError, Resources, plan, verify
from lean_merge.linalg import Pass, Products
from lean_merge.methods import Dense, Update, WeightContext
from lean_merge.outputs import approximating
from lean_merge.plan.parameters import build_method

SHAPES = {
    "layers.0.self_attn.q_proj": (96, 64),
    "layers.0.self_attn.v_proj": (48, 112),
    "layers.1.mlp.gate_proj": (64, 64),
}
RANK = 4
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scale": 0.5},
    "ties": {"density": 0.3},
    "ip_merging": {"stages": ("select", "rescale"), "threshold": 0.0},
}
CPU = Resources(device="cpu", threads=2)


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("full-rank"), SHAPES)


def wanted(method: str, mllm: Matrix, expert: Matrix) -> Matrix:
    """The update by the book, from both task vectors."""
    if method == "ties":
        return ties([mllm, expert], weights=(1.0, 1.0), density=0.3)
    nuclear = np.linalg.norm(mllm, "nuc") / np.linalg.norm(expert, "nuc")
    return (0.5 if method == "task_arithmetic" else nuclear) * expert


def best(update: Matrix, rank: int) -> tuple[Matrix, float]:
    """The best approximation of a rank, and its relative error."""
    left, sigma, right = np.linalg.svd(update, full_matrices=False)
    error = float(np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()))
    return (left[:, :rank] * sigma[:rank]) @ right[:rank], error


def product_of(folder: Path, canonical: str) -> Matrix:
    """What an adapter adds to a weight."""
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.model.{canonical}"
    b, a = (as_matrix(tensors[f"{key}.lora_{factor}.weight"]) for factor in "BA")
    return b @ a


def adapter(triple: Triple, out: Path, method: str, **options: Any) -> MergeResult:
    given = {"output": "lora", "lora_rank": RANK, "merge_method": method, **METHODS[method]}
    return triple.merge(out, **{**given, **options})


def errors(result: MergeResult) -> dict[str, float]:
    return {row["weight"]: row["lora_error"] for row in result.report["weights"]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", ["whole", "sketched"])
def test_an_adapter_is_the_best_of_its_rank_and_tells_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triple: Triple, method: str, way: str
):
    if way == "sketched":
        monkeypatch.setattr(approximating, "WHOLE_UP_TO", 16)
        monkeypatch.setattr(approximating, "_OVERSAMPLED", 4)
        assert not any(approximating._CutPlan(shape, RANK).is_whole for shape in SHAPES.values())
    result = adapter(triple, tmp_path / "out", method)
    base, mllm, expert = (load(folder) for folder in (triple.base, triple.mllm, triple.experts[0]))
    for canonical in SHAPES:
        name = f"model.{canonical}.weight"
        start = as_matrix(base[name])
        update = wanted(method, as_matrix(mllm[name]) - start, as_matrix(expert[name]) - start)
        found, (ideal, least) = product_of(result.path, canonical), best(update, RANK)
        size = np.linalg.norm(update)
        apart = float(np.linalg.norm(update - found) / size)
        told = errors(result)[canonical]
        assert abs(told - apart) <= 1e-5
        if way == "whole":
            assert np.linalg.norm(found - ideal) <= 1e-5 * size
            assert abs(told - least) <= 1e-5
        else:
            assert least - 1e-6 <= apart <= 1.01 * least
    assert "a larger --lora-rank keeps more" in "\n".join(result.report["warnings"])
    row = result.report["weights"][0]
    assert row["lora_rank"] == RANK and row["update_norm"] != 0
    assert verify(result.path, full=True, resources=CPU).ok


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_memory_threads_and_resuming_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tiles: None, triple: Triple, method: str
):
    monkeypatch.setattr(approximating, "WHOLE_UP_TO", 16)
    monkeypatch.setattr(approximating, "_OVERSAMPLED", 4)
    options: dict[str, Any] = {"output": "lora", "lora_rank": RANK, "merge_method": method}
    options |= METHODS[method]
    least = smallest_memory(triple, **options)
    given = [{"threads": 1}, {"threads": 3}, {"threads": 2, "memory": least + (64 << 20)}]
    files = [
        contents(adapter(triple, tmp_path / str(n) / "out", method, **each).path)
        for n, each in enumerate(given)
    ]
    for name, data in files[0].items():
        if name.startswith("adapter"):
            assert all(each[name] == data for each in files)


def test_a_rank_is_needed_and_none_is_too_large(tmp_path: Path, triple: Triple):
    with pytest.raises(RecipeError, match="Give --lora-rank N for the best approximation"):
        plan(triple.recipe(output="lora", merge_method="ties"), CPU)
    result = adapter(triple, tmp_path / "out", "task_arithmetic", lora_rank=1000)
    assert max(errors(result).values()) <= 1e-6
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["r"] == 64


def test_updates_that_have_factors_are_cut_as_before(tmp_path: Path, triple: Triple):
    work = plan(triple.recipe(output="lora", lora_rank=2), CPU)
    methods = [method for task in work.weights for method in task.methods]
    assert not any(isinstance(method, approximating.Approximating) for method in methods)


# --- one weight, without files ----------------------------------------------------------------


def approximated(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """The approximation that is made of a matrix, by its products alone, and its error."""

    def over(update: Update, request: Pass) -> Products:
        found = products(rows_of(update, [matrix]), request, torch.float32)
        assert found is not None
        return found

    rows, columns = matrix.shape
    weight = WeightContext(
        name="w",
        shape=(rows, columns),
        seed=0,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        squared_norms=lambda: [0.0],
        parallel=lambda function, items: [function(item) for item in items],
        over_update=over,
    )
    cut = approximating.approximate(weight, Dense(matrix), rank)
    return cut.left @ cut.right, cut.omitted


@pytest.mark.parametrize("shape", [(80, 72), (72, 120)])
@pytest.mark.parametrize("values", ["low rank", "zero", "steep", "flat"])
def test_spectra_of_every_kind(monkeypatch: pytest.MonkeyPatch, shape: Sequence[int], values: str):
    monkeypatch.setattr(approximating, "WHOLE_UP_TO", 16)
    seeded = torch.Generator().manual_seed(3)
    rows, columns = shape
    matrix = torch.randn(rows, columns, generator=seeded)
    if values == "low rank":
        matrix = matrix[:, :3] @ torch.randn(3, columns, generator=seeded)
    elif values == "zero":
        matrix = torch.zeros(rows, columns)
    elif values == "steep":
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left * 0.1 ** torch.arange(min(rows, columns)) @ right
    found, error = approximated(matrix, 8)
    _, least = best(as_matrix(matrix), 8) if values != "zero" else (None, 0.0)
    apart = float((matrix - found).norm() / max(float(matrix.norm()), 1e-30))
    assert apart <= 1.01 * least + 1e-5
    assert abs(error - apart) <= 1e-3


def test_a_method_that_decides_without_looking_still_does(triple: Triple):
    """Symmetric task arithmetic changes weights for the MLLM's sake, without a pass of its own."""
    recipe = triple.recipe(merge_method="task_arithmetic", symmetric=True, scale=0.5)
    method = approximating.Approximating(build_method(recipe), 2)
    assert method.changes_by_itself
    assert method.cost((96, 64), item=4).passes == 1
