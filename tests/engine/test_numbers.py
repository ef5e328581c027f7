"""Numbers that break arithmetic: NaN, Inf, overflow, underflow, and spectra of every odd kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import bars
from support.drive import drive
from support.families import (
    SMALL,
    Slot,
    Triple,
    as_matrix,
    cases,
    load,
    relative_error,
    rows_of,
    write_triple,
)
from support.layouts import Where
from support.oracle import ip_merging
from support.pairs import all_pairs
from torch import Tensor

from lean_merge import DataError
from lean_merge.methods.ip_merging import IPMerging, IPMergingParameters
from lean_merge.plan import formulas

NAME = "layers.0.self_attn.q_proj"
Q_PROJ = f"model.{NAME}.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARITHMETIC = dict.fromkeys(DTYPES, torch.float32) | {torch.bfloat16: torch.bfloat16}
"""In what products are made."""


# --- NaN and Inf --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "dtype", "streamed", "threshold"),
    all_pairs(["base", "mllm", "expert1"], DTYPES, [False, True], [0.0, 1.0]),
    ids=str,
)
def test_one_nan_stops_the_merge_and_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    dtype: torch.dtype,
    streamed: bool,
    threshold: float,
):
    def edit(of: str, tensors: dict[str, Tensor]) -> None:
        if of == role:
            tensors[GATE][-1, 7] = torch.nan if threshold else -torch.inf

    triple = write_triple(tmp_path / "in", SMALL, dtype=dtype, edit=edit)
    if streamed:
        monkeypatch.setattr(formulas, "resident_tiles", lambda shape, free: 0)
    with pytest.raises(DataError, match="holds NaN or Inf") as caught:
        triple.merge(tmp_path / "out", force=True, threshold=threshold)
    assert str(caught.value).startswith(f"{tmp_path / 'in' / role / 'model.safetensors'}: tensor ")
    assert GATE in str(caught.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_out_of_scope_is_copied_and_said(tmp_path: Path, dtype: torch.dtype, value: float):
    """A mask may well hold -Inf; the MLLM's own tensors are the MLLM's own affair."""

    def edit(of: str, tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(3_000_000, dtype=dtype)
        if of == "mllm":
            tensors["model.norm.weight"][2_999_999] = value

    triple = write_triple(tmp_path / "in", SMALL, edit=edit)
    result = triple.merge(tmp_path / "out", force=True)
    (line,) = [line for line in result.report["warnings"] if "NaN or Inf" in line]
    assert "model.norm.weight" in line
    before = load(triple.mllm)["model.norm.weight"].view(torch.uint8)
    assert torch.equal(load(result.path)["model.norm.weight"].view(torch.uint8), before)


def test_finite_tensors_out_of_scope_are_not_said(small: Triple, tmp_path: Path):
    report = small.merge(tmp_path / "out").report
    assert not [line for line in report["warnings"] if "NaN" in line]


# --- overflow -----------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("value", [65504.0, 65519.0, 65520.0, 1e6])
def test_overflow_of_fp16_is_caught_at_the_last_number_that_fits(
    tmp_path: Path, value: float, rounding: str
):
    """65519 rounds to the largest float16, 65504; from 65520 on, to infinity."""

    def edit(of: str, tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][3, 5] = value

    triple = write_triple(tmp_path / "in", {NAME: (24, 16)}, edit=edit)
    options: dict[str, Any] = dict(out_dtype="float16", rounding=rounding, threshold=1.0)
    if value < 65520:
        result = triple.merge(tmp_path / "out", force=True, **options)
        assert float(load(result.path)[Q_PROJ][3, 5]) == 65504.0
        return
    with pytest.raises(DataError, match=f"{Q_PROJ} overflows float16"):
        triple.merge(tmp_path / "out", force=True, **options)


def test_an_update_that_overflows_its_own_dtype_is_caught(tmp_path: Path):
    def edit(of: str, tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][0, 0] = {"base": 0.0, "mllm": 6e4, "expert1": 6e4}[of]

    triple = write_triple(tmp_path / "in", {NAME: (24, 16)}, dtype=torch.float16, edit=edit)
    with pytest.raises(DataError, match=f"{Q_PROJ} overflows float16"):
        triple.merge(tmp_path / "out", force=True, merge_method="task_arithmetic")


# --- odd task vectors ---------------------------------------------------------------------


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rank(count: int) -> Callable[[tuple[int, int], int], Tensor]:
    def make(shape: tuple[int, int], role: int) -> Tensor:
        shared = _randn(count, shape[1], seed=9) + 0.3 * _randn(count, shape[1], seed=10 + role)
        decay = 0.7 ** torch.arange(count)
        return 0.01 * (_randn(shape[0], count, seed=20 + role) * decay) @ shared

    return make


def _constant(shape: tuple[int, int], role: int) -> Tensor:
    return torch.full(shape, 0.01 * role)


def _single(shape: tuple[int, int], role: int) -> Tensor:
    task = torch.zeros(shape)
    task[shape[0] // 2, shape[1] // 3] = 0.5 * role
    return task


def _one_row(shape: tuple[int, int], role: int) -> Tensor:
    task = torch.zeros(shape)
    task[shape[0] // 3] = _rank(1)((1, shape[1]), role)[0]
    return task


def _one_column(shape: tuple[int, int], role: int) -> Tensor:
    task = torch.zeros(shape)
    task[:, shape[1] // 3] = 0.1 * _randn(shape[0], seed=30 + role)
    return task


ODD = {
    "rank 1": _rank(1),
    "rank 3": _rank(3),
    "rank 12": _rank(12),
    "constant": _constant,
    "single entry": _single,
    "one row": _one_row,
    "one column": _one_column,
}


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    all_pairs(list(ODD), [(48, 40), (640, 576), (576, 640)], DTYPES),
    ids=str,
)
def test_odd_task_vectors_agree_with_the_oracle(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
):
    """Exact path and sketches, in the dtype of the products; ranks below a Krylov block."""
    base = torch.zeros(shape)
    tasks = [ODD[kind](shape, role).to(dtype).float() for role in (1, 2)]
    method = IPMerging([IPMergingParameters(threshold=0.3)])
    decision, _ = drive(method, tasks, dtype=ARITHMETIC[dtype])
    expected = ip_merging(*(as_matrix(each) for each in (base, *tasks)), threshold=0.3)
    (record,) = decision.experts
    assert record.selected is expected.selected is True
    bars.hold("s_1, odd", abs(record.similarity_first - expected.similarity[0]), 0.01)
    # Roundings to 16 bits make these matrices full rank; lambda then hangs on their noise too.
    bars.hold("lambda, odd", bars.relative(record.lambda_, expected.ratio), 0.02)
    assert decision.update is not None
    left, right = decision.update.factors()
    update = as_matrix(left.double() @ right.double())
    bars.hold("update, odd", relative_error(update, expected.update), 0.03)
    if dtype == torch.float32 and kind != "constant":
        assert record.rank == expected.subspace


@pytest.mark.parametrize(
    ("rank", "noise", "shape", "dtype"),
    all_pairs(
        [1, 4, 16],
        [1e-4, 1e-3, 1e-2],
        [(640, 576), (576, 640)],
        [torch.float32, torch.bfloat16],
    ),
    ids=str,
)
def test_low_rank_tuning_under_storage_noise(
    rank: int, noise: float, shape: tuple[int, int], dtype: torch.dtype
):
    """Merged LoRA: a few strong directions over noise that is hundreds of times weaker.

    Products in 16 bits cancel the strong ones only down to their rounding, where once the noise
    passed for directions as strong as the first, and hid it.
    """
    tasks = []
    for role in (1, 2):
        task = _rank(rank)(shape, role)
        noisy = (
            task
            + noise * float(task.norm()) * _randn(*shape, seed=40 + role) / math.prod(shape) ** 0.5
        )
        tasks.append(noisy.to(dtype).float())
    method = IPMerging([IPMergingParameters(threshold=0.3)])
    decision, _ = drive(method, tasks, dtype=ARITHMETIC[dtype])
    expected = ip_merging(
        *(as_matrix(each) for each in (torch.zeros(shape), *tasks)), threshold=0.3
    )
    (record,) = decision.experts
    assert expected.selected
    bars.hold("s_1, low rank", abs(record.similarity_first - expected.similarity[0]), 0.01)
    bars.hold("lambda, low rank", bars.relative(record.lambda_, expected.ratio), 0.03)


@pytest.mark.parametrize("shape", [(40, 48), (640, 576)], ids=str)
@pytest.mark.parametrize("which", ["mllm", "expert1", "both"])
def test_a_role_that_is_the_base_is_said(tmp_path: Path, shape: tuple[int, int], which: str):
    def edit(of: str, tensors: dict[str, Tensor]) -> None:
        if of == "base" or which in (of, "both"):
            tensors[Q_PROJ] = 0.02 * _randn(*shape, seed=1)

    triple = write_triple(tmp_path / "in", {NAME: shape}, edit=edit)
    result = triple.merge(tmp_path / "out", force=True)
    row = rows_of(result)[NAME]
    word = "expert" if which == "expert1" else "MLLM"
    assert row["reason"] == f"the {word}'s task vector is zero"
    assert (row["selected"], row["rank"], row["update_norm"]) == (False, 0, 0.0)
    assert torch.equal(load(result.path)[Q_PROJ], load(triple.mllm)[Q_PROJ])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expert_that_is_the_mllm_agrees_with_the_oracle(tmp_path: Path, dtype: torch.dtype):
    """Every direction is aligned, so that the importance is spread evenly over all."""
    triple = write_triple(tmp_path / "in", SMALL, dtype=dtype)
    same = Triple(triple.base, triple.mllm, (triple.mllm,), triple.slots)
    result = same.merge(tmp_path / "out", force=True, out_dtype="float32")
    for case in cases(same, result):
        row, expected = rows_of(result)[case.slot.canonical], case.oracle()
        assert row["similarity_first"] == pytest.approx(1.0)
        assert row["lambda"] == pytest.approx(1.0)
        assert row["rank"] == expected.subspace
        assert row["update_norm"] == pytest.approx(np.linalg.norm(expected.update), rel=1e-3)


def plain_triple(folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> Triple:
    """One random weight a role."""
    for number, role in enumerate(("base", "mllm", "expert1")):
        (folder / role).mkdir(parents=True)
        weight = _randn(*shape, seed=50 + number).to(dtype)
        save_file({Q_PROJ: weight}, folder / role / "model.safetensors")
    slot = Slot(NAME, Where(Q_PROJ), Where(Q_PROJ))
    return Triple(folder / "base", folder / "mllm", (folder / "expert1",), (slot,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (1, 700), (700, 1), (2, 3), (3, 2)])
def test_tiny_and_thin_weights_agree_with_the_oracle(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
):
    triple = plain_triple(tmp_path / "in", shape, dtype)
    result = triple.merge(tmp_path / "out", force=True, threshold=0.0, out_dtype="float32")
    (case,) = cases(triple, result)
    expected, row = case.oracle(threshold=0.0), rows_of(result)[NAME]
    assert row["rank"] == expected.subspace
    # Numbers that are not close have differences that are rounded to their 16 bits.
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert row["similarity_first"] == pytest.approx(expected.similarity[0], abs=tolerance)
    assert row["lambda"] == pytest.approx(expected.ratio, rel=tolerance)
    assert relative_error(case.update, expected.update) <= tolerance


# --- very large and very small ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 40), (640, 576)], ids=str)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-20, 1e-12, 1e-6, 1e6, 1e12, 1e18, 1e30, 1e37])
def test_every_size_is_merged_as_the_oracle_does_or_said(
    tmp_path: Path, shape: tuple[int, int], size: float
):
    """Denormals and numbers near the largest: never a silent wrong answer."""

    def edit(of: str, tensors: dict[str, Tensor]) -> None:
        role = {"base": 0, "mllm": 1, "expert1": 2}[of]
        task = _rank(3)(shape, role) * 100 if role else torch.zeros(shape)
        tensors[Q_PROJ] = (task.double() * size).float()

    triple = write_triple(tmp_path / "in", {NAME: shape}, edit=edit)
    try:
        result = triple.merge(tmp_path / "out", force=True, threshold=0.3)
    except DataError as error:
        assert size >= 1e12
        assert Q_PROJ in str(error) and "overflow" in str(error)
        return
    (case,) = cases(triple, result)
    expected, row = case.oracle(threshold=0.3), rows_of(result)[NAME]
    norm = float(np.linalg.norm(as_matrix(load(triple.mllm)[Q_PROJ])))
    assert row["mllm_task_vector_norm"] == pytest.approx(norm, rel=1e-3)
    if "to within what a sketch can tell" in row["reason"]:
        assert size <= 1e-15 and min(shape) > 512
        return
    assert row["selected"] is expected.selected is True
    assert row["lambda"] == pytest.approx(expected.ratio, rel=1e-3)
    assert relative_error(case.update, expected.update) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.9, 1e-7])
def test_numbers_near_the_ends_of_16_bit_formats(tmp_path: Path, dtype: torch.dtype, factor: float):
    """The largest that float16 holds, and denormals of it; bfloat16's range is float32's."""

    def edit(of: str, tensors: dict[str, Tensor]) -> None:
        role = {"base": 0, "mllm": 1, "expert1": 2}[of]
        task = _rank(2)((48, 40), role) if role else torch.zeros(48, 40)
        scale = 65504 * factor / 0.2
        tensors[Q_PROJ] = (task * scale).clamp(-65504 * factor, 65504 * factor).to(dtype)

    triple = write_triple(tmp_path / "in", {NAME: (48, 40)}, dtype=dtype, edit=edit)
    result = triple.merge(tmp_path / "out", force=True, threshold=0.3, out_dtype="float32")
    (case,) = cases(triple, result)
    expected, row = case.oracle(threshold=0.3), rows_of(result)[NAME]
    assert row["selected"] is expected.selected is True
    assert row["lambda"] == pytest.approx(expected.ratio, rel=1e-4)
    # The last product with bfloat16 weights is in bfloat16.
    assert relative_error(case.update, expected.update) < 5e-3


def test_a_file_that_is_damaged_after_the_plan_is_noticed(small: Triple, tmp_path: Path):
    """NaN that comes in between planning and reading."""
    from lean_merge import CheckpointError, Resources, merge, plan

    copies = {}
    for role in ("base", "mllm", "expert1"):
        folder = tmp_path / "in" / role
        folder.mkdir(parents=True)
        for file in (small.base.parent / role).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        copies[role] = folder
    triple = Triple(copies["base"], copies["mllm"], (copies["expert1"],), small.slots)
    work = plan(triple.recipe(), Resources(device="cpu", threads=1))
    file = copies["expert1"] / "model.safetensors"
    tensors = load_file(file)
    tensors[Q_PROJ][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        merge(work, tmp_path / "out")
