"""Opening checkpoints of every layout, and reading their bytes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoint_files import save_checkpoint

from lean_merge.checkpoints import (
    ITEM_BITS,
    TensorReader,
    as_bytes,
    open_checkpoint,
    read_header,
    safetensors_dtype,
    torch_dtype,
)
from lean_merge.checkpoints.descriptors import DescriptorPool
from lean_merge.errors import CheckpointError, is_plain

SHAPES = {"b": (2, 3), "a": (4,), "c": (), "d": (0, 5)}
DTYPES = [torch_dtype(name) for name in ITEM_BITS if name not in {"F4", "F6_E2M3", "F6_E3M2"}]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of arbitrary bits."""
    tensor = torch.empty(shape, dtype=dtype)
    view = tensor.reshape(-1).view(torch.uint8)
    view.copy_(torch.randint(0, 2 if dtype == torch.bool else 256, view.shape))
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_go_both_ways_and_are_read_as_save_file_wrote_them(
    tmp_path: Path, dtype: torch.dtype
):
    tensor = random_tensor((3, 5), dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    spec = read_header(tmp_path / "x.safetensors")[0]["x"]
    assert spec.dtype == safetensors_dtype(dtype)
    assert torch_dtype(spec.dtype) == dtype
    assert spec.nbytes * 8 == 15 * ITEM_BITS[spec.dtype]
    copy = torch.empty_like(tensor)
    with TensorReader() as reader:
        reader.read_into(spec, 0, as_bytes(copy))
    assert bytes(as_bytes(copy)) == bytes(as_bytes(tensor))


def test_dtypes_without_a_twin_are_errors():
    with pytest.raises(ValueError, match="F4"):
        torch_dtype("F4")
    with pytest.raises(ValueError, match="complex128"):
        safetensors_dtype(torch.complex128)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=6).filter(is_plain),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=5,
    ),
    # With no metadata and no tensors safetensors 0.8 writes a file that it cannot read itself.
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.text(st.characters(codec="utf-8")),
        min_size=1,
        max_size=2,
    ),
)
def test_a_header_says_what_save_file_was_given(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str]
):
    path = tmp_path / "x.safetensors"
    values = {name: random_tensor(tuple(s), dtype) for name, (s, dtype) in tensors.items()}
    save_file(values, path, metadata=metadata)
    specs, found = read_header(path)
    content = path.read_bytes()
    assert specs.keys() == values.keys()
    assert found == metadata
    for name, value in values.items():
        spec = specs[name]
        assert (spec.name, spec.shape, spec.file) == (name, tuple(value.shape), path)
        stored = content[spec.offset : spec.offset + spec.nbytes]
        assert stored == bytes(as_bytes(value))
    offsets = [spec.offset for spec in specs.values()]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_opened_in_the_order_of_its_bytes(tmp_path: Path, shards: int):
    save_checkpoint(tmp_path, SHAPES, config={"model_type": "llama"}, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.source == str(tmp_path)
    assert checkpoint.path == tmp_path
    assert {name: spec.shape for name, spec in checkpoint.tensors.items()} == SHAPES
    places = [(spec.file.name, spec.offset) for spec in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert len(checkpoint.files) == shards
    assert checkpoint.config == {"model_type": "llama"}


def test_a_single_file_of_any_name_is_opened(tmp_path: Path):
    save_checkpoint(tmp_path, SHAPES, config={"a": 1})
    file = (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    for source in (file, tmp_path):
        checkpoint = open_checkpoint(source)
        assert checkpoint.path == tmp_path
        assert checkpoint.files == (file,)
        assert checkpoint.config == {"a": 1}


def test_a_checkpoint_without_config_has_none(tmp_path: Path):
    assert open_checkpoint(save_checkpoint(tmp_path, SHAPES)).config is None


def test_model_safetensors_wins_over_other_weights(tmp_path: Path):
    save_checkpoint(tmp_path, SHAPES)
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == set(SHAPES)


def test_a_computed_buffer_missing_from_the_index_is_left_out(tmp_path: Path):
    save_checkpoint(tmp_path, SHAPES, shards=2)
    file = tmp_path / "model-00001-of-00002.safetensors"
    kept = {n: torch.zeros(s.shape) for n, s in read_header(file)[0].items()}
    save_file({**kept, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, file)
    assert set(open_checkpoint(tmp_path).tensors) == set(SHAPES)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_cache_are_followed(tmp_path: Path, shared: bool):
    repository = tmp_path / "models--org--name"
    snapshot = save_checkpoint(repository / "snapshots" / "0123", SHAPES, config={})
    (repository / "blobs").mkdir()
    for number, file in enumerate(list(snapshot.iterdir())):
        blob = file.rename(repository / "blobs" / f"{number:040x}")
        if shared:
            (tmp_path / "blobs").mkdir(exist_ok=True)
            target = blob.rename(tmp_path / "blobs" / blob.name)
            blob.symlink_to(os.path.relpath(target, blob.parent))
        file.symlink_to(os.path.relpath(blob, snapshot))
    assert set(open_checkpoint(snapshot).tensors) == set(SHAPES)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_that_the_user_names_are_followed(tmp_path: Path):
    folder = save_checkpoint(tmp_path / "real", SHAPES)
    (tmp_path / "folder").symlink_to(folder)
    (tmp_path / "file.safetensors").symlink_to(folder / "model.safetensors")
    assert set(open_checkpoint(tmp_path / "folder").tensors) == set(SHAPES)
    assert set(open_checkpoint(tmp_path / "file.safetensors").tensors) == set(SHAPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_as_bytes_shares_memory(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = torch.zeros(shape, dtype=dtype)
    view = as_bytes(tensor)
    assert view.nbytes == tensor.numel() * tensor.element_size()
    if view.nbytes and dtype != torch.bool:
        view[0] = 255
        assert tensor.reshape(-1).view(torch.uint8)[0] == 255


def test_as_bytes_wants_contiguous_memory():
    assert as_bytes(torch.ones(2, requires_grad=True)).nbytes == 8
    with pytest.raises(ValueError, match="contiguous"):
        as_bytes(torch.zeros(2, 3).T)


@pytest.fixture
def stored(tmp_path: Path):
    """A file whose tensor x holds the bytes 0..255 forty times over, and another before it."""
    values = torch.arange(256, dtype=torch.uint8).repeat(40)
    save_file({"w": torch.ones(7), "x": values}, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")[0]["x"], bytes(values.numpy())


@pytest.mark.parametrize("lacking", [(), ("preadv",), ("preadv", "pread")])
def test_any_range_is_read_on_any_system(stored, monkeypatch: pytest.MonkeyPatch, lacking: Any):
    for name in lacking:
        monkeypatch.delattr(os, name, raising=False)
    spec, content = stored
    with TensorReader() as reader:
        total = 0
        for start, length in [(0, 10240), (0, 0), (10240, 0), (1, 1), (5000, 5240), (255, 513)]:
            out = bytearray(length)
            reader.read_into(spec, start, memoryview(out))
            assert bytes(out) == content[start : start + length]
            total += length
        assert reader.bytes_read == total


def test_short_reads_are_continued(stored, monkeypatch: pytest.MonkeyPatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, out, at: whole(fd, [out[0][:100]], at))
    spec, content = stored
    out = bytearray(spec.nbytes)
    with TensorReader() as reader:
        reader.read_into(spec, 0, memoryview(out))
    assert bytes(out) == content


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (0, 10241), (10240, 1)])
def test_a_range_outside_the_tensor_is_an_error(stored, start: int, length: int):
    with TensorReader() as reader, pytest.raises(ValueError, match="x has 10240 bytes"):
        reader.read_into(stored[0], start, memoryview(bytearray(length)))


def test_a_file_that_shrinks_is_reported(stored):
    spec, _ = stored
    os.truncate(spec.file, spec.offset + 100)
    with TensorReader() as reader:
        with pytest.raises(CheckpointError, match="truncated while reading tensor 'x'"):
            reader.read_into(spec, 0, memoryview(bytearray(spec.nbytes)))
        assert reader.bytes_read == 100


def test_a_file_that_vanishes_is_reported(stored):
    spec, _ = stored
    spec.file.unlink()
    with TensorReader() as reader:
        with pytest.raises(CheckpointError, match="cannot read tensor 'x'"):
            reader.read_into(spec, 0, memoryview(bytearray(1)))
        reader.prefetch(spec, 0, spec.nbytes)
        reader.drop(spec, 0, spec.nbytes)
        assert reader.bytes_read == 0


def test_threads_share_a_reader_with_few_files(tmp_path: Path):
    specs = []
    for number in range(12):
        file = tmp_path / f"{number}.safetensors"
        save_file({"x": torch.full((1000,), number, dtype=torch.uint8)}, file)
        specs.append(read_header(file)[0]["x"])
    wrong: list[int] = []
    with TensorReader(max_files=3) as reader:

        def read(seed: int) -> None:
            for step in range(200):
                number = (seed * 7 + step * 5) % 12
                out = bytearray(100)
                reader.read_into(specs[number], step, memoryview(out))
                if out != bytes([number]) * 100:
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reader.bytes_read == 6 * 200 * 100
    assert wrong == []
    with pytest.raises(ValueError, match="closed"):
        reader.read_into(specs[0], 0, memoryview(bytearray(1)))


def test_the_pool_closes_the_idle_first_and_never_one_in_use(tmp_path: Path):
    files = [tmp_path / name for name in "abcd"]
    for file in files:
        file.touch()
    pool = DescriptorPool(os.O_RDONLY, limit=2)
    with pool.use(files[0]) as first:
        for file in files[1:]:
            with pool.use(file):
                pass
        assert len(pool) == 2
        os.fstat(first)
        with pool.use(files[1]), pool.use(files[2]):
            assert len(pool) == 3
        pool.close()
        os.fstat(first)
    with pytest.raises(OSError):
        os.fstat(first)
    pool.close()
