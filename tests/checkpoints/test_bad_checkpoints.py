"""Every way in which a checkpoint can be wrong ends in one CheckpointError that names the file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from support.checkpoint_files import entry, raw_file, save_checkpoint, write_index

from lean_merge.checkpoints import open_checkpoint, read_header
from lean_merge.errors import CheckpointError

GOOD = entry("F32", [2], 0, 8)
DATA = bytes(8)


def refused(path: Path, *words: str, opener: Any = read_header) -> None:
    with pytest.raises(CheckpointError) as caught:
        opener(path)
    message = str(caught.value)
    for word in (*words, path.name):
        assert word in message, message
    assert message.endswith("."), message


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry("F33", [2], 0, 8)}, DATA, ["'a'", "dtype", "F33"]),
        ({"a": entry([], [2], 0, 8)}, DATA, ["'a'", "dtype"]),
        ({"a": entry("F32", [-2], 0, 8)}, DATA, ["'a'", "shape"]),
        ({"a": entry("F32", [2.0], 0, 8)}, DATA, ["'a'", "shape"]),
        ({"a": entry("F32", [True, 2], 0, 8)}, DATA, ["'a'", "shape"]),
        ({"a": entry("F32", [10**30, 2], 0, 8)}, DATA, ["'a'", "shape"]),
        ({"a": entry("F32", [2**62, 2**62], 0, 8)}, DATA, ["'a'", "too large"]),
        ({"a": entry("F32", [2**62, 0], 0, 8)}, DATA, ["'a'", "needs 0 bytes"]),
        ({"a": entry("F32", [1] * 65, 0, 4)}, DATA[:4], ["'a'", "dimensions"]),
        ({"a": entry("F32", "2", 0, 8)}, DATA, ["'a'", "shape"]),
        ({"a": entry("F4", [3], 0, 1)}, DATA[:1], ["'a'", "whole bytes"]),
        ({"a": {**GOOD, "data_offsets": [0, "8"]}}, DATA, ["'a'", "data_offsets"]),
        ({"a": {**GOOD, "data_offsets": [0, 8.0]}}, DATA, ["'a'", "data_offsets"]),
        ({"a": {**GOOD, "data_offsets": [False, 8]}}, DATA, ["'a'", "data_offsets"]),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, DATA, ["'a'", "data_offsets"]),
        ({"a": {**GOOD, "data_offsets": [0]}}, DATA, ["'a'", "data_offsets"]),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, DATA, ["'a'", "before it begins"]),
        ({"a": entry("F32", [3], 0, 8)}, DATA, ["'a'", "needs 12 bytes, not 8"]),
        ({"a": entry("F32", [4], 0, 16)}, DATA, ["'a'", "truncated"]),
        ({"a": GOOD, "b": entry("F32", [2], 4, 12)}, bytes(12), ["'b'", "overlaps"]),
        ({"a": GOOD, "b": GOOD}, DATA, ["'b'", "overlaps"]),
        ({"a": GOOD, "b": entry("F32", [1], 12, 16)}, bytes(16), ["'b'", "hole"]),
        ({"a": entry("F32", [1], 4, 8)}, DATA, ["'a'", "hole"]),
        ({"a": GOOD}, bytes(9), ["1 bytes after its last tensor"]),
        ({}, DATA, ["8 bytes after its last tensor"]),
        ({"a": 3}, b"", ["'a'", "dtype, shape and data_offsets"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, DATA, ["'a'", "dtype, shape and data_offsets"]),
        ({"a": {**GOOD, "x": 1}}, DATA, ["'a'", "dtype, shape and data_offsets"]),
        ({"__metadata__": {"format": 1}}, b"", ["__metadata__"]),
        ({"__metadata__": "pt"}, b"", ["__metadata__"]),
        (b'{"a":1,"a":2}', b"", ["'a'", "twice"]),
        (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", ["'dtype'", "twice"]),
        (b'{"\xff":1}', b"", ["UTF-8"]),
        (b'{"a":', b"", ["not JSON"]),
        (b"{" + b'"a":{' * 100_000, b"", ["nested"]),
        (b'{"a":' + b"9" * 5000 + b"}", b"", ["not JSON"]),
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", ["Unicode"]),
        (b"[1, 2]", b"", ["not a safetensors file"]),
        (b"   {}", b"", ["not a safetensors file"]),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: Any, data: bytes, words: list[str]):
    refused(raw_file(tmp_path / "model.safetensors", header, data), *words)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (0, ["unfinished lean-merge output"]),
        (100_000_001, ["beyond the format's limit"]),
        (2**64 - 1, ["beyond the format's limit"]),
        (1000, ["truncated"]),
    ],
)
def test_a_header_length_that_cannot_be_is_refused(tmp_path: Path, length: int, words: list[str]):
    refused(raw_file(tmp_path / "model.safetensors", {"a": GOOD}, DATA, length=length), *words)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    refused(path, f"has {size} bytes")


def test_every_truncation_of_a_file_is_refused(tmp_path: Path):
    whole = save({"a": torch.arange(6.0), "b": torch.zeros(0), "c": torch.ones(3)})
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path)


def test_a_header_is_refused_before_memory_is_taken_for_its_length(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", 2**40))
        stream.truncate(2**41)  # sparse
    refused(path, "beyond the format's limit")


WHOLE = save({"a.weight": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)})


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_file_parses_or_is_refused(tmp_path: Path, data: st.DataObject):
    mutated = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        new = data.draw(st.binary(max_size=3))
        mutated[where : where + data.draw(st.integers(0, 3))] = new
        if not mutated:
            break
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(mutated))
    check_parses_or_refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "F4"]) | JSON,
                "shape": st.lists(st.integers(-1, 5), max_size=2) | JSON,
                "data_offsets": st.tuples(st.integers(-1, 20), st.integers(-1, 20)) | JSON,
            }
        ),
    ),
    size=st.integers(0, 30),
)
@example(header={}, size=0)
def test_any_json_header_parses_or_is_refused(tmp_path: Path, header: Any, size: int):
    check_parses_or_refused(raw_file(tmp_path / "model.safetensors", header, bytes(size)))


def check_parses_or_refused(path: Path) -> None:
    try:
        specs, metadata = read_header(path)
    except CheckpointError as error:
        assert path.name in str(error)
        return
    size = path.stat().st_size
    assert all(isinstance(value, str) for value in metadata.values())
    assert all(8 <= each.offset <= each.offset + each.nbytes <= size for each in specs.values())


SHAPES = {f"model.layers.{n}.w.weight": (2, 3) for n in range(4)}


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    save_checkpoint(folder, SHAPES, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder, index["weight_map"]


def test_an_index_that_names_an_absent_file_is_refused(tmp_path: Path):
    folder, _ = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors", "missing", opener=open_checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "..",
        "config.json",
        3,
        None,
    ],
)
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: Any):
    folder, weight_map = sharded(tmp_path)
    tensor = next(iter(weight_map))
    write_index(folder, weight_map | {tensor: name})
    refused(folder, repr(tensor), "index.json", opener=open_checkpoint)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{"])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str):
    folder, _ = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, "index.json", opener=open_checkpoint)


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path: Path):
    folder, weight_map = sharded(tmp_path)
    write_index(folder, weight_map | {"ghost": "model-00001-of-00002.safetensors"})
    refused(folder, "'ghost'", "model-00001-of-00002", opener=open_checkpoint)


def test_an_index_that_puts_a_tensor_into_the_wrong_shard_is_refused(tmp_path: Path):
    folder, weight_map = sharded(tmp_path)
    name, other = (next(n for n, f in weight_map.items() if f"0000{k}-of" in f) for k in (1, 2))
    write_index(folder, weight_map | {name: weight_map[other]})
    refused(folder, repr(name), opener=open_checkpoint)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path):
    folder, weight_map = sharded(tmp_path)
    name = weight_map.popitem()[0]
    write_index(folder, weight_map)
    refused(folder, repr(name), "does not name", opener=open_checkpoint)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    folder, weight_map = sharded(tmp_path)
    first = folder / "model-00001-of-00002.safetensors"
    (folder / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())
    write_index(folder, weight_map)
    refused(folder, "model-00002-of-00002", "model-00001-of-00002", opener=open_checkpoint)


def test_a_single_file_beside_a_foreign_index_is_refused(tmp_path: Path):
    folder, _ = sharded(tmp_path)
    save_checkpoint(folder, SHAPES)
    refused(folder, "left over", opener=open_checkpoint)


def test_shards_without_index_must_be_complete(tmp_path: Path):
    folder, _ = sharded(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(folder).tensors) == set(SHAPES)
    (folder / "model-00001-of-00002.safetensors").unlink()
    refused(folder, "1 of the 2 shards", opener=open_checkpoint)


def test_several_unrelated_files_without_index_are_refused(tmp_path: Path):
    save_checkpoint(tmp_path, SHAPES)
    file = tmp_path / "model.safetensors"
    file.rename(tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    refused(tmp_path, "several weight files", opener=open_checkpoint)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str):
    folder = save_checkpoint(tmp_path / "model", SHAPES, config={})
    target = (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(target)
    refused(folder, name, "link out of its folder", opener=open_checkpoint)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_in_a_folder_that_only_looks_like_the_cache_is_refused(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "models--o--n" / "snapshots" / "abc", SHAPES)
    outside = (folder / "model.safetensors").rename(tmp_path / "models--o--n" / "secret")
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "link out of its folder", opener=open_checkpoint)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_broken_link_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, "model.safetensors", "missing", opener=open_checkpoint)


def test_what_is_not_there_is_refused(tmp_path: Path):
    refused(tmp_path / "absent", "no such folder", opener=open_checkpoint)
    refused(tmp_path / ("x" * 5000), opener=open_checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    (tmp_path / "notes.md").write_text("hello")
    refused(tmp_path, "no .safetensors weights", opener=open_checkpoint)


@pytest.mark.parametrize("name", ["model.pt", "consolidated.00.pth", "tf_model.h5"])
def test_weights_in_other_files_are_refused_with_the_mend(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, name, "save_pretrained", opener=open_checkpoint)


def test_gguf_is_refused(tmp_path: Path):
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"GGUF")
    refused(tmp_path, "quantised", opener=open_checkpoint)
    refused(file, "quantised", opener=open_checkpoint)


def test_an_adapter_is_refused(tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter", opener=open_checkpoint)


def test_another_kind_of_file_is_refused(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("base: x")
    refused(file, "not a .safetensors file", opener=open_checkpoint)


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors.partial"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors.partial"],
        ["model-00001-of-00001.safetensors", "model.safetensors.index.json.partial"],
    ],
)
def test_an_unfinished_output_is_refused(tmp_path: Path, names: list[str]):
    for name in names:
        raw_file(tmp_path / name, {"a": GOOD}, DATA, length=0)
    refused(tmp_path, "unfinished lean-merge output", opener=open_checkpoint)
    partial = tmp_path / names[-1]
    if partial.name.endswith(".safetensors.partial"):
        refused(partial, "unfinished lean-merge output", opener=open_checkpoint)


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, "\ud800"])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str):
    save_checkpoint(tmp_path, SHAPES)
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(tmp_path, "config.json", opener=open_checkpoint)
