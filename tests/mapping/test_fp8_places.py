"""fp8 weights wherever they are stored: interleaved, or as columns of stacked experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.families import Triple, load
from support.fp8 import CONFIGS, E4M3, E5M2, expand, quantise, read_rows, same_bytes
from support.layouts import Layout
from support.storage import COLUMNS, CONFIG, EACH, FUSED, INTERN, ROWS, write_stored
from torch import Tensor

from lean_merge import MergeRecipe, open_checkpoint
from lean_merge.checkpoints import Place, read_header
from lean_merge.checkpoints.forms.fp8 import Scale, ScaledRows
from lean_merge.mapping import map_roles
from lean_merge.mapping.placement import stack_places
from lean_merge.outputs import Request
from lean_merge.outputs.checkpoint import CheckpointOutput
from lean_merge.plan import fitting

Block = tuple[int, int]


def in_blocks(tensor: Tensor, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(fp8 numbers, scales, the numbers that they mean in float32) of a matrix or a stack."""
    matrices = tensor.reshape(-1, *tensor.shape[-2:])
    parts = [quantise(matrix, block, dtype) for matrix in matrices]
    meant = [(v.double() * expand(s, block, v.shape)).float() for v, s in parts]
    values, scales = torch.stack([v for v, _ in parts]), torch.stack([s for _, s in parts])
    stack = tensor.shape[:-2]
    return (
        values.view(tensor.shape),
        scales.view(*stack, *scales.shape[1:]),
        torch.stack(meant).view(tensor.shape),
    )


# --- rows -----------------------------------------------------------------------------------


def stored_tensor(folder: Path, shape: tuple[int, ...], data: st.DataObject) -> Any:
    """(tensor and scale as they are stored, the numbers that they mean), in blocks of any size."""
    block = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))
    dtype = data.draw(st.sampled_from([E4M3, E5M2]))
    generator = torch.Generator().manual_seed(sum(shape))
    numbers, scales, meant = in_blocks(torch.randn(shape, generator=generator), block, dtype)
    save_file({"w": numbers, "s": scales}, folder / "x.safetensors")
    specs = read_header(folder / "x.safetensors")[0]
    return specs["w"], Scale(specs["s"], block), meant


def some_rows(data: st.DataObject, count: int) -> slice:
    start = data.draw(st.integers(0, count - 1))
    return slice(start, data.draw(st.integers(start + 1, count)))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_columns_of_any_blocks_are_decoded(tmp_path: Path, data: st.DataObject):
    count, into, width = (data.draw(st.integers(1, most)) for most in (3, 40, 40))
    tensor, scale, meant = stored_tensor(tmp_path, (count, into, width), data)
    matrix, columns = data.draw(st.integers(0, count - 1)), some_rows(data, width)
    out = columns.stop - columns.start
    first = matrix * into * width + columns.start
    place = Place(tensor, (out, into), first, out, out, width)
    rows = some_rows(data, out)
    found = read_rows(ScaledRows(place, scale), rows)
    assert torch.equal(found, meant[matrix, :, columns].T[rows])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_interleaved_rows_of_any_blocks_are_decoded(tmp_path: Path, data: st.DataObject):
    groups, run, gap, width = (data.draw(st.integers(1, most)) for most in (4, 9, 9, 40))
    before = data.draw(st.integers(0, gap))
    tensor, scale, meant = stored_tensor(tmp_path, (groups * (run + gap), width), data)
    place = Place(tensor, (groups * run, width), before * width, run, run + gap)
    rows = some_rows(data, groups * run)
    found = read_rows(ScaledRows(place, scale), rows)
    wanted = meant.view(groups, run + gap, width)[:, before : before + run]
    assert torch.equal(found, wanted.reshape(-1, width)[rows])


# --- whole merges ---------------------------------------------------------------------------


def to_fp8(folder: Path, twin: Path, kind: str) -> None:
    """Quantise every weight of `folder` in place, as it is stored; `twin` gets what it means."""
    stored, meant = {}, {}
    twin.mkdir(parents=True)
    for name, tensor in load(folder).items():
        if tensor.dim() < 2:
            stored[name] = meant[name] = tensor
            continue
        stacked = tensor.dim() == 3
        high, wide = tensor.shape[-2:]
        block = {"block": (16, 24), "fbgemm": (high, 1) if stacked else (1, wide)}[kind]
        stored[name], scale, meant[name] = in_blocks(tensor.float(), block, E4M3)
        if kind == "fbgemm" and name.endswith("down_proj"):
            scale = scale.transpose(1, 2).contiguous()
        stored[f"{name}_scale{'_inv' if kind == 'block' else ''}"] = scale
    settings_ = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    settings_ = settings_ if kind == "block" else CONFIGS["channel"]
    for place, tensors in ((folder, stored), (twin, meant)):
        save_file(tensors, place / "model.safetensors")
        quantised = {"quantization_config": settings_} if tensors is stored else {}
        (place / "config.json").write_text(json.dumps(CONFIG | quantised))


def triples(tmp_path: Path, layouts: tuple[Layout, Layout, Layout], kind: str) -> list[Triple]:
    """Roles in fp8 in their layouts, and the same numbers in float32."""
    stored = write_stored(tmp_path / "fp8", *layouts)
    roots = {}
    for path in (stored.base, stored.mllm, *stored.experts):
        roots[path] = tmp_path / "twin" / path.name
        to_fp8(path, roots[path], kind)
    twin = Triple(
        roots[stored.base],
        roots[stored.mllm],
        tuple(roots[path] for path in stored.experts),
        stored.slots,
    )
    return [stored, twin]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["block", "fbgemm"])
@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        ((COLUMNS, COLUMNS, COLUMNS), {"threads": 3}),
        ((EACH, COLUMNS, ROWS), {}),
        ((COLUMNS, EACH, COLUMNS), {"threshold": 0.0}),
        ((INTERN, INTERN, INTERN), {"threads": 3}),
        ((FUSED, INTERN, FUSED), {"merge_method": "task_arithmetic", "scale": 0.3}),
    ],
    ids=["columns", "each-columns-rows", "columns-each-columns", "interleaved", "fused"],
)
def test_fp8_merges_as_the_same_numbers_do_wherever_it_is_stored(
    tmp_path: Path,
    layouts: tuple[Layout, Layout, Layout],
    kind: str,
    options: dict[str, Any],
):
    stored, twin = triples(tmp_path, layouts, kind)
    found = stored.merge(tmp_path / "out", out_dtype="float32", **options)
    expected = twin.merge(tmp_path / "expected", out_dtype="float32", **options)
    assert found.report["counts"] == expected.report["counts"]
    assert found.report["counts"]["merged"] > 0
    ours, theirs = load(found.path), load(expected.path)
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("small_tiles")
def test_the_codes_of_whole_tiles_are_counted_where_rows_are_columns(tmp_path: Path):
    """Of base, one role and the MLLM when it is written; strips where rows are rows."""
    stored, _ = triples(tmp_path, (COLUMNS, COLUMNS, COLUMNS), "block")
    paths = (stored.base, stored.mllm, *stored.experts)
    base, mllm, expert = (open_checkpoint(path) for path in paths)
    recipe = MergeRecipe("base", "mllm", ("expert",))
    output = CheckpointOutput(Request(recipe, mllm, "", (), {}))
    layout = fitting.Footprint(output, "cpu", 1, 1 << 40, 0, 0)
    mapped = map_roles(base, mllm, [expert]).weights
    seen = set()
    for weight in (part for each in mapped for part in each.slices):
        out, into = weight.shape
        columns = weight.mllm.in_columns
        rows = min(out, 16 if columns else 8 * 64 // into // 4 * 4)
        assert layout.shape(weight).scratch == 3 * rows * into, weight.canonical
        # The scales are read ahead with the numbers.
        scale = mllm.encodings[weight.place.tensor.name]
        assert isinstance(scale, Scale)
        names = {each.name for each in weight.mllm.extents}
        assert names == {weight.mllm.name, scale.tensor.name}
        seen.add(columns)
    assert seen == {True, False}


def test_a_factor_of_other_columns_does_not_count(tmp_path: Path):
    """Each weight's scales go with it: the gate's are not the up's, nor the next expert's."""
    tensors = {}
    for leaf, shape in (("gate_up_proj", (2, 8, 12)), ("down_proj", (2, 6, 8))):
        tensors[leaf] = torch.ones(shape).to(E4M3)
        columns = torch.arange(1.0, 2 * shape[2] + 1).view(2, 1, shape[2])
        tensors[f"{leaf}_scale"] = columns if leaf == "gate_up_proj" else columns.transpose(1, 2)
    at = "model.layers.0.mlp.experts."
    save_file({f"{at}{n}": t.contiguous() for n, t in tensors.items()}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fbgemm_fp8"}})
    )
    checkpoint = open_checkpoint(tmp_path)
    found = stack_places(
        {leaf: checkpoint.tensors[f"{at}{leaf}"] for leaf in ("gate_up_proj", "down_proj")}, None
    )
    assert found is not None
    values = {}
    for of_leaf in found.values():
        for name, place in of_leaf.items():
            source = checkpoint.rows(place)
            values[name] = read_rows(source, slice(0, place.shape[0]))[:, 0].tolist()
    assert values == {
        "0.gate_proj": [1, 2, 3, 4, 5, 6],
        "0.up_proj": [7, 8, 9, 10, 11, 12],
        "1.gate_proj": [13, 14, 15, 16, 17, 18],
        "1.up_proj": [19, 20, 21, 22, 23, 24],
        "0.down_proj": [1, 2, 3, 4, 5, 6, 7, 8],
        "1.down_proj": [9, 10, 11, 12, 13, 14, 15, 16],
    }
