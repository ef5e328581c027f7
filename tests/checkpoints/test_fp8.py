"""fp8 weights: decoded with their scales for arithmetic, written as plain numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoint_files import save_checkpoint
from support.families import SMALL, Triple, cases, load, relative_error, rows_of, write_triple
from support.fp8 import (
    CONFIGS,
    E4M3,
    E5M2,
    block_of,
    expand,
    quantise,
    read_rows,
    same_bytes,
    to_fp8,
)
from torch import Tensor

from lean_merge import Resources, open_checkpoint, stream, verify
from lean_merge.checkpoints import Place, TensorSpec, read_header
from lean_merge.checkpoints.forms.fp8 import Scale, ScaledRows
from lean_merge.checkpoints.forms.lora import LoraRows
from lean_merge.checkpoints.rows import StoredRows, row_block
from lean_merge.errors import CheckpointError, CoverageError, DataError, LeanMergeError

Family = Callable[..., Triple]


def fp8_copy(
    triple: Triple, folder: Path, layout: str, *, dtype: torch.dtype = E4M3, roles: str = "bme"
) -> tuple[Triple, Triple]:
    """(the triple with some roles in fp8, its twin with the same numbers in float32)."""
    stored, twins = {}, {}
    paths = {"b": triple.base, "m": triple.mllm, "e": triple.experts[0]}
    for role, path in paths.items():
        stored[role], twins[role] = folder / role, folder / f"{role}-twin"
        shutil.copytree(path, stored[role])
        if role in roles:
            to_fp8(stored[role], twins[role], layout, dtype=dtype)
        else:
            twins[role] = stored[role]
    return tuple(
        Triple(each["b"], each["m"], (each["e"],), triple.slots, triple.loader)
        for each in (stored, twins)
    )


# --- rows -----------------------------------------------------------------------------------


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_rows_of_any_blocks_are_decoded(tmp_path: Path, data: st.DataObject):
    count = data.draw(st.integers(1, 3))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 45))
    dtype = data.draw(st.sampled_from([E4M3, E5M2]))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    stack = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(rows))
    numbers, scales, wanted = [], [], []
    for matrix in stack:
        values, scale = quantise(matrix, block, dtype)
        scale = scale.to(kind).clamp(min=1e-7)
        numbers.append(values)
        scales.append(scale)
        wanted.append((values.double() * expand(scale, block, matrix.shape)).float())
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.stack(numbers), "s": torch.stack(scales)}, file)
    specs = read_header(file)[0]
    matrix = data.draw(st.integers(0, count - 1))
    first = data.draw(st.integers(0, rows - 1))
    height = data.draw(st.integers(1, rows - first))
    at = (matrix * rows + first) * columns
    place = Place(specs["w"], (height, columns), at, height, height)
    source = ScaledRows(place, Scale(specs["s"], block))
    start = data.draw(st.integers(0, height - 1))
    part = slice(start, data.draw(st.integers(start + 1, height)))
    found = read_rows(source, part)
    assert torch.equal(found, wanted[matrix][first + part.start : first + part.stop])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_rows_of_a_product_of_factors_are_formed(tmp_path: Path, data: st.DataObject):
    rows, columns, rank = (data.draw(st.integers(1, 40)) for _ in range(3))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    b = torch.randn(rows, rank, generator=torch.Generator().manual_seed(1)).to(kind)
    a = torch.randn(rank, columns, generator=torch.Generator().manual_seed(2)).to(kind)
    file = tmp_path / "x.safetensors"
    save_file({"a": a, "b": b}, file)
    specs = read_header(file)[0]
    first = data.draw(st.integers(0, rows - 1))
    left = StoredRows(row_block(specs["b"], first, rows - first))
    source = LoraRows(left, StoredRows(row_block(specs["a"])), 1.7)
    start = data.draw(st.integers(0, rows - first - 1))
    part = slice(start, data.draw(st.integers(start + 1, rows - first)))
    wanted = 1.7 * b.double() @ a.double()
    found = read_rows(source, part).double()
    assert torch.allclose(found, wanted[first + part.start : first + part.stop], atol=1e-4)


def test_scales_may_be_powers_of_two_in_eight_bits(tmp_path: Path):
    numbers = torch.randn(4, 6).to(E4M3)
    scale = torch.tensor([[0.5, 4.0], [2.0**-20, 1.0]])
    tensors = {"w.weight": numbers, "w.weight_scale_inv": scale.to(torch.float8_e8m0fnu)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 3]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    (source,) = checkpoint.decoded(checkpoint.tensors["w.weight"])
    wanted = (numbers.double() * expand(scale, (2, 3), (4, 6))).float()
    assert torch.equal(read_rows(source, slice(0, 4)), wanted)


def test_plain_rows_are_read_as_they_are(tmp_path: Path):
    values = torch.randn(9, 4).half()
    save_file({"w": values}, tmp_path / "x.safetensors")
    spec: TensorSpec = read_header(tmp_path / "x.safetensors")[0]["w"]
    assert torch.equal(read_rows(StoredRows(row_block(spec, 2, 5)), slice(1, 4)), values[3:6])


# --- whole merges ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "dtype", "roles"),
    [
        ("block", E4M3, "bme"),
        ("tensor", E4M3, "bme"),
        ("channel", E4M3, "me"),
        ("group", E5M2, "m"),
        ("block", E5M2, "b"),
        ("tensor", E4M3, "e"),
    ],
)
def test_fp8_weights_merge_as_the_same_numbers_in_float32_do(
    family: Family, tmp_path: Path, layout: str, dtype: torch.dtype, roles: str
):
    import transformers as tf

    plain = family("llava", dtype=torch.float32)
    stored, twin = fp8_copy(plain, tmp_path, layout, dtype=dtype, roles=roles)
    result = stored.merge(tmp_path / "out", out_dtype="float32")
    expected = twin.merge(tmp_path / "expected", out_dtype="float32")
    assert result.report["counts"] == expected.report["counts"]
    assert result.report["counts"]["merged"] > 0
    found, wanted = load(result.path), load(expected.path)
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[name], wanted[name]) for name in wanted)
    read = result.report["bytes"]
    assert read["read"] == read["read_predicted"] == read["read_most"]
    config = json.loads((result.path / "config.json").read_text())
    assert "quantization_config" not in config
    _, info = tf.LlavaForConditionalGeneration.from_pretrained(
        result.path, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    _agrees_with_the_oracle(twin, result)


def _agrees_with_the_oracle(twin: Triple, result: Any) -> None:
    rows = rows_of(result)
    errors = []
    for case in cases(twin, result):
        oracle = case.oracle()
        row = rows[case.slot.canonical]
        assert row["similarity_first"] == pytest.approx(float(oracle.similarity[0]), abs=0.02)
        if row["selected"]:
            errors.append(relative_error(case.update, oracle.update))
    assert errors and max(errors) <= 2e-3


def test_the_output_is_bfloat16_unless_the_user_says_otherwise(family: Family, tmp_path: Path):
    import transformers as tf

    plain = family("llava", dtype=torch.bfloat16)
    stored, twin = fp8_copy(plain, tmp_path, "block")
    result = stored.merge(tmp_path / "out")
    found = load(result.path)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    decoded = load(twin.mllm)
    in_scope = {slot.mllm for slot in stored.slots}
    out_of_scope = [n for n, t in decoded.items() if t.dtype == torch.float32 and n not in in_scope]
    assert any("vision_tower" in name for name in out_of_scope)
    assert any("linear_1" in name for name in out_of_scope)
    for name, tensor in decoded.items():
        if name not in in_scope:
            assert same_bytes(found[name], tensor.to(torch.bfloat16)), name
    for row in rows_of(result).values():
        if not row["selected"]:
            assert same_bytes(found[row["name"]], decoded[row["name"]].to(torch.bfloat16))
    _, info = tf.LlavaForConditionalGeneration.from_pretrained(
        result.path, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = json.loads((result.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config


@pytest.mark.parametrize("out_dtype", ["auto", "float16"])
def test_no_side_file_says_any_longer_that_weights_are_fp8(tmp_path: Path, out_dtype: str):
    triple = write_triple(tmp_path / "in", SMALL, dtype=torch.bfloat16)
    stored, _ = fp8_copy(triple, tmp_path, "tensor", roles="m")
    quantised = {key: CONFIGS["tensor"] for key in ("quantization_config", "compression_config")}
    text = {"model_type": "llama", "dtype": "float8_e4m3fn"}
    config = {"torch_dtype": "bfloat16", "text_config": text | quantised} | quantised
    (stored.mllm / "config.json").write_text(json.dumps(config))
    (stored.mllm / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    result = stored.merge(tmp_path / "out", out_dtype=out_dtype)
    written = json.loads((result.path / "config.json").read_text())
    dtype = "bfloat16" if out_dtype == "auto" else out_dtype
    assert written == {"torch_dtype": dtype, "text_config": text | {"dtype": dtype}}
    assert not (result.path / "hf_quant_config.json").exists()
    assert not verify(result.path).differences


def test_what_plain_weights_bring_of_quantised_caches_stays(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    text = '{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}'
    (triple.mllm / "hf_quant_config.json").write_text(text)
    result = triple.merge(tmp_path / "out")
    assert (result.path / "hf_quant_config.json").read_text() == text


def test_blocks_of_128_are_the_default_and_tiles_may_cut_them(tmp_path: Path):
    shapes = {"layers.0.self_attn.q_proj": (300, 4200), "layers.0.mlp.up_proj": (129, 257)}
    plain = write_triple(tmp_path / "in", shapes)
    stored, twin = fp8_copy(plain, tmp_path, "default")
    result = stored.merge(tmp_path / "out", out_dtype="float32", threads=2)
    expected = twin.merge(tmp_path / "expected", out_dtype="float32")
    wanted = load(expected.path)
    assert all(same_bytes(tensor, wanted[name]) for name, tensor in load(result.path).items())
    read = result.report["bytes"]
    assert read["read"] == read["read_predicted"]
    memory = result.report["memory"]
    assert memory["peak_anonymous"] <= memory["predicted_anonymous"]


def test_a_stack_out_of_scope_is_decoded_matrix_by_matrix(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    stack = torch.randn(3, 40, 50)
    parts = [quantise(matrix, (32, 24)) for matrix in stack]
    tensors = load(triple.mllm) | {
        "tower.experts.up": torch.stack([values for values, _ in parts]),
        "tower.experts.up_scale_inv": torch.stack([scale for _, scale in parts]),
    }
    save_file(tensors, triple.mllm / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": CONFIGS["block"]}
    (triple.mllm / "config.json").write_text(json.dumps(config))
    result = triple.merge(tmp_path / "out")
    found = load(result.path)["tower.experts.up"]
    for matrix, (values, scale) in zip(found, parts, strict=True):
        wanted = (values.double() * expand(scale, (32, 24), values.shape)).float()
        assert same_bytes(matrix, wanted.bfloat16())
    assert result.report["bytes"]["read"] == result.report["bytes"]["read_predicted"]


def test_stacked_experts_in_fp8_merge_as_the_same_numbers_do(tmp_path: Path):
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (48, 40),
        "model.layers.0.mlp.experts.gate_up_proj": (3, 64, 40),
        "model.layers.0.mlp.experts.down_proj": (3, 40, 32),
    }
    places: dict[str, list[Path]] = {"fp8": [], "twin": []}
    base = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    shared = {name: torch.randn(1, shape[-1]) for name, shape in shapes.items()}
    for role in ("base", "mllm", "math"):
        stored, plain = {}, {}
        for name, weight in base.items():
            if role != "base":
                weight = weight + 0.01 * torch.randn(*weight.shape[:-1], 1) * shared[name]
            matrices = weight if weight.dim() == 3 else weight[None]
            parts = [quantise(matrix, (32, 24)) for matrix in matrices]
            wide = [(v.double() * expand(s, (32, 24), v.shape)).float() for v, s in parts]
            stored[name] = torch.stack([values for values, _ in parts]).reshape(weight.shape)
            scale = torch.stack([scale for _, scale in parts])
            stored[f"{name}_scale_inv"] = scale if weight.dim() == 3 else scale[0]
            plain[name] = torch.stack(wide).reshape(weight.shape)
        for kind, tensors in (("fp8", stored), ("twin", plain)):
            folder = tmp_path / kind / role
            folder.mkdir(parents=True)
            save_file(tensors, folder / "model.safetensors")
            settings_ = {"quantization_config": CONFIGS["block"]} if kind == "fp8" else {}
            (folder / "config.json").write_text(json.dumps(settings_))
            places[kind].append(folder)
    merged = {}
    for kind, (first, second, third) in places.items():
        triple = Triple(first, second, (third,), ())
        result = triple.merge(tmp_path / kind / "out", out_dtype="float32", threshold=0.0)
        assert result.report["counts"]["logical_weights"] == 10
        assert result.report["bytes"]["read"] == result.report["bytes"]["read_predicted"]
        merged[kind] = load(result.path)
    assert merged["fp8"].keys() == merged["twin"].keys() == shapes.keys()
    before = load(places["twin"][1])
    for name, tensor in merged["fp8"].items():
        assert same_bytes(tensor, merged["twin"][name])
        assert not torch.equal(tensor, before[name])


def test_a_stream_gives_what_the_checkpoint_holds(tmp_path: Path):
    triple = write_triple(tmp_path / "in", SMALL)
    stored, _ = fp8_copy(triple, tmp_path, "block", roles="m")
    change(
        stored.mllm,
        lambda tensors: tensors.update(
            zip(
                ("tower.weight", "tower.weight_scale_inv"),
                quantise(torch.randn(70, 50), (32, 24)),
                strict=True,
            )
        ),
    )
    expected = load(stored.merge(tmp_path / "out").path)
    resources = Resources(device="cpu", threads=1)
    found = {name: tensor.clone() for name, tensor in stream(stored.recipe(), resources=resources)}
    assert found.keys() == expected.keys()
    assert found["tower.weight"].dtype == torch.bfloat16
    assert all(same_bytes(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dtypes", [("F32", "BF16", "F16"), ("BF16", "F16", "F32")])
def test_roles_of_different_dtypes_merge(tmp_path: Path, dtypes: tuple[str, str, str]):
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    plain = write_triple(tmp_path / "in", SMALL)
    for folder, name in zip((plain.base, plain.mllm, plain.experts[0]), dtypes, strict=True):
        tensors = {n: t.to(kinds[name]) for n, t in load(folder).items()}
        save_file(tensors, folder / "model.safetensors")
    result = plain.merge(tmp_path / "out", out_dtype="float32")
    _agrees_with_the_oracle(plain, result)
    memory = result.report["memory"]
    assert memory["peak_anonymous"] <= memory["predicted_anonymous"]


# --- what is refused ------------------------------------------------------------------------


@pytest.fixture
def roles(tmp_path: Path) -> Triple:
    """A small triple whose MLLM is fp8 in blocks."""
    triple = write_triple(tmp_path / "in", SMALL)
    return fp8_copy(triple, tmp_path, "block", roles="m")[0]


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("at", [(0, 0), (2, 2)])
def test_a_scale_that_is_none_is_refused(
    roles: Triple, tmp_path: Path, value: float, at: tuple[int, int]
):
    change(roles.mllm, lambda tensors: tensors[f"{Q_PROJ}_scale_inv"].__setitem__(at, value))
    with pytest.raises(DataError) as caught:
        roles.merge(tmp_path / "out")
    message = str(caught.value)
    assert f"{Q_PROJ}_scale_inv" in message and "zero, negative, NaN or Inf" in message
    assert str(roles.mllm) in message


@pytest.mark.parametrize("name", [Q_PROJ, "tower.linear_1.weight"])
def test_a_number_that_is_none_is_refused(roles: Triple, tmp_path: Path, name: str):
    def edit(tensors: dict[str, Tensor]) -> None:
        values, scale = quantise(torch.randn(96, 64), (32, 24))
        tensors |= {name: values, f"{name}_scale_inv": scale}
        tensors[name].view(torch.uint8)[5, 7] = 0x7F

    change(roles.mllm, edit)
    with pytest.raises(DataError, match="NaN or Inf") as caught:
        roles.merge(tmp_path / "out", force=True)
    assert name in str(caught.value)


def _without_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q_PROJ}_scale_inv"]


def _misfit(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}_scale_inv"] = torch.ones(5, 5)


def _integer_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}_scale_inv"] = torch.ones(3, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_without_scale, "has no scales"),
        (_misfit, "do not fit"),
        (_integer_scale, "have the dtype I32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(roles: Triple, edit: Any, words: str):
    change(roles.mllm, edit)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(roles.mllm)
    assert Q_PROJ in str(caught.value) and str(roles.mllm) in str(caught.value)


def test_fp8_without_scales_or_config_cannot_be_merged(roles: Triple, tmp_path: Path):
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "scale" in name]:
            del tensors[name]

    change(roles.mllm, edit)
    (roles.mllm / "config.json").write_text("{}")
    with pytest.raises(CoverageError, match="dtype F8_E4M3, which cannot be merged"):
        roles.merge(tmp_path / "out")


def test_a_result_beyond_the_output_dtype_is_refused(roles: Triple, tmp_path: Path):
    def edit(tensors: dict[str, Tensor]) -> None:
        values, scale = quantise(torch.full((32, 24), 1e6), (32, 24))
        tensors |= {"tower.weight": values, "tower.weight_scale_inv": scale}

    change(roles.mllm, edit)
    with pytest.raises(LeanMergeError, match=r"tower.weight .*overflows float16"):
        roles.merge(tmp_path / "out", out_dtype="float16")


def test_scales_are_no_tensors_of_the_model(roles: Triple):
    checkpoint = open_checkpoint(roles.mllm)
    assert not [name for name in checkpoint.tensors if "scale" in name]
    scale = checkpoint.encodings[Q_PROJ]
    assert isinstance(scale, Scale) and scale.block == block_of("block", (96, 64))
    (source,) = checkpoint.decoded(checkpoint.tensors[Q_PROJ])
    assert source.dtype == "F32"


def test_activation_scales_of_a_plain_model_stay(tmp_path: Path):
    save_checkpoint(tmp_path, {"x.weight": (2, 2), "x.input_scale": (1,)})
    assert set(open_checkpoint(tmp_path).tensors) == {"x.weight", "x.input_scale"}
