"""How a weight is stored decides nothing: fused, interleaved or stacked, the numbers are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.adapters import updates
from support.families import as_matrix, load, relative_error, rows_of
from support.layouts import Layout, Where
from support.storage import COLUMNS, EACH, FUSED, INTERN, ROWS, SPLIT, write_stored

from lean_merge import RecipeError, open_checkpoint
from lean_merge.checkpoints import TensorReader
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.rows import Place
from lean_merge.mapping import map_roles
from lean_merge.mapping.placement import Heads, places, stack_places


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("base", "mllm", "expert", "options"),
    [
        (FUSED, FUSED, FUSED, {}),
        (INTERN, INTERN, INTERN, {"threads": 3}),
        (INTERN, FUSED, SPLIT, {"out_dtype": "bfloat16", "rounding": "stochastic"}),
        (SPLIT, INTERN, FUSED, {"out_dtype": "bfloat16"}),
        (ROWS, ROWS, ROWS, {}),
        (COLUMNS, COLUMNS, COLUMNS, {"threads": 3}),
        (EACH, COLUMNS, ROWS, {"out_dtype": "bfloat16", "rounding": "stochastic"}),
        (COLUMNS, EACH, COLUMNS, {"experts": 2}),
        (ROWS, COLUMNS, EACH, {"merge_method": "task_arithmetic", "scale": 0.3}),
        (EACH, COLUMNS, EACH, {"threshold": 1.0, "out_dtype": "float16"}),
        (EACH, COLUMNS, COLUMNS, {"dtype": torch.bfloat16}),
    ],
    ids=lambda value: f"{value.qkv}-{value.mlp}" if isinstance(value, Layout) else "",
)
def test_storage_decides_nothing(
    tmp_path: Path, base: Layout, mllm: Layout, expert: Layout, options: dict[str, Any]
):
    made = {key: options.pop(key) for key in ("experts", "dtype") if key in options}
    plain = EACH if base.mlp in ("each", "rows", "columns") else SPLIT
    one = write_stored(tmp_path / "one", plain, plain, plain, **made)
    other = write_stored(tmp_path / "other", base, mllm, expert, **made)
    wanted = one.merge(tmp_path / "out one", **options)
    found = other.merge(tmp_path / "out other", **options)
    same, ours = load(wanted.path), load(found.path)
    for first, second in zip(one.slots, other.slots, strict=True):
        expected, merged = first.in_mllm.get(same), second.in_mllm.get(ours)
        assert torch.equal(merged.contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(same["model.norm.weight"], ours["model.norm.weight"])
    for path, twin in zip(other.experts, one.experts, strict=True):
        rows, twins = rows_of(found, path), rows_of(wanted, twin)
        for canonical, row in rows.items():
            differing = {key for key in row if row[key] != twins[canonical][key]}
            assert differing <= {"name", "expert"}
    figures = found.report["bytes"]
    if figures["read_predicted"] == figures["read_most"]:
        assert figures["read"] == figures["read_predicted"]


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_an_adapter_knows_interleaved_rows_and_refuses_stacks(tmp_path: Path, threshold: float):
    triple = write_stored(tmp_path / "in", INTERN, INTERN, INTERN)
    whole = triple.merge(tmp_path / "whole", threshold=threshold)
    adapter = triple.merge(tmp_path / "adapter", threshold=threshold, output="lora")
    before, after = load(triple.mllm), load(whole.path)
    name = "model.layers.0.attention.wqkv"
    change = as_matrix(after[f"{name}.weight"]) - as_matrix(before[f"{name}.weight"])
    assert relative_error(updates(adapter.path)[name], change) < 1e-3
    with pytest.raises(RecipeError, match=r"An adapter cannot hold .*experts\."):
        write_stored(tmp_path / "stack", ROWS, ROWS, ROWS).merge(tmp_path / "no", output="lora")


# --- where the rows are -------------------------------------------------------------------


def spec(shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec("t", "F32", shape, Path("f"), 0, 4 * int(np.prod(shape)))


def gathered(place: Place, stored: np.ndarray, rows: slice) -> np.ndarray:
    """The rows that the spans of a place lead to, in order."""
    flat = stored.reshape(-1)
    parts = [flat[first : first + count] for first, count in place.spans(rows)]
    count, width = rows.stop - rows.start, place.shape[1]
    numbers = np.concatenate(parts) if parts else flat[:0]
    return numbers.reshape(width, count).T if place.width else numbers.reshape(count, width)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_spans_lead_to_the_rows_of_interleaved_heads(
    data: st.DataObject, pairs: int, group: int, size: int, width: int
):
    heads = Heads(pairs * group, pairs, size)
    stored = np.arange(heads.rows * width).reshape(heads.rows, width)
    grid = stored.reshape(pairs, group + 2, size, width)
    wanted = {
        "a.q_proj": grid[:, :group].reshape(-1, width),
        "a.k_proj": grid[:, group].reshape(-1, width),
        "a.v_proj": grid[:, group + 1].reshape(-1, width),
    }
    found = places("a.wqkv", spec(stored.shape), [heads])
    assert found.keys() == wanted.keys()
    for leaf, place in found.items():
        assert place.shape == wanted[leaf].shape
        start = data.draw(st.integers(0, place.shape[0]))
        rows = slice(start, data.draw(st.integers(start, place.shape[0])))
        assert np.array_equal(gathered(place, stored, rows), wanted[leaf][rows])
        first, count = place.extent
        whole = wanted[leaf]
        assert (whole.min(), whole.max()) == (first, first + count - 1)


@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_spans_lead_to_the_rows_of_stacked_experts(
    data: st.DataObject, experts: int, inner: int, hidden: int, turned: bool
):
    matrices = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    stored = {
        leaf: np.arange(experts * out * into).reshape(
            (experts, into, out) if turned else (experts, out, into)
        )
        for leaf, (out, into) in matrices.items()
    }
    found = stack_places({leaf: spec(each.shape) for leaf, each in stored.items()}, hidden)
    assert found is not None
    for leaf, of_leaf in found.items():
        for name, place in of_leaf.items():
            number, _, part = name.partition(".")
            member = stored[leaf][int(number)]
            wanted = member.T if turned else member
            if leaf == "gate_up_proj":
                wanted = wanted[:inner] if part == "gate_proj" else wanted[inner:]
            start = data.draw(st.integers(0, place.shape[0]))
            rows = slice(start, data.draw(st.integers(start, place.shape[0])))
            assert np.array_equal(gathered(place, stored[leaf], rows), wanted[rows])
            first, count = place.extent
            assert (wanted.min(), wanted.max()) == (first, first + count - 1)


def test_what_is_read_ahead_covers_what_is_read_and_no_byte_twice(tmp_path: Path):
    triple = write_stored(tmp_path, ROWS, EACH, COLUMNS)
    base, mllm, expert = (open_checkpoint(p) for p in (triple.base, triple.mllm, *triple.experts))
    seen: dict[Path, int] = {}
    for weight in map_roles(base, mllm, [expert]).weights:
        parts = sorted(weight.extents, key=lambda each: (str(each.file), each.offset))
        for one, other in pairwise(parts):
            assert one.file != other.file or one.offset + one.nbytes < other.offset
        for part in parts:
            seen[part.file] = seen.get(part.file, 0) + part.nbytes
    scope = {each.file: 0 for each in base.tensors.values()}
    scope = sum(each.nbytes for each in base.tensors.values() if len(each.shape) > 1)
    assert seen[triple.base / "model.safetensors"] == scope
    assert seen[triple.mllm / "model.safetensors"] == scope


def test_rows_stored_as_columns_are_read_without_what_lies_between(tmp_path: Path):
    triple = write_stored(tmp_path, COLUMNS, COLUMNS, COLUMNS)
    mllm = open_checkpoint(triple.mllm)
    tensors = load(triple.mllm)
    for mapped in map_roles(open_checkpoint(triple.base), mllm, []).weights:
        for weight in mapped.slices:
            where: Where = COLUMNS.weights()[weight.canonical]
            with TensorReader() as reader:
                read = mllm.rows(weight.place).read(
                    slice(3, 11),
                    reader,
                    lambda _, shape, dtype: torch.empty(shape, dtype=dtype),
                    "x",
                )
                assert torch.equal(read, where.get(tensors)[3:11])
                assert reader.bytes_read == weight.mllm.nbytes(slice(3, 11)) == read.nbytes


# --- memory -------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_memory_of_rows_stored_as_columns_is_predicted(tmp_path: Path, dtype: torch.dtype):
    hidden, inner = 640, 1536
    for number, role in enumerate(("base", "mllm", "expert")):
        generator = torch.Generator().manual_seed(0)
        noise = torch.Generator().manual_seed(number)
        tensors = {}
        for leaf, shape in (("gate_up", (2, hidden, 2 * inner)), ("down", (2, inner, hidden))):
            weight = 0.02 * torch.randn(shape, generator=generator)
            weight += 0.002 * torch.randn(shape, generator=noise)
            tensors[f"model.layers.0.mlp.experts.{leaf}_proj"] = weight.to(dtype)
            if dtype != torch.bfloat16:
                tensors[f"model.layers.0.mlp.experts.{leaf}_proj_scale"] = torch.ones(2, 1, 1)
        tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, hidden)
        (tmp_path / role).mkdir()
        save_file(tensors, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / role / "config.json").write_text("{}")
    probe = Path(__file__).parents[2] / "bench" / "probe.py"
    done = subprocess.run(
        [sys.executable, str(probe), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["memory"]["peak_anonymous"] <= report["memory"]["predicted_anonymous"]
    assert report["bytes"]["read"] == report["bytes"]["read_predicted"]
