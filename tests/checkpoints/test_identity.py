"""An input that is saved again after it was opened is noticed, whatever is made of it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.families import SMALL, Triple, write_triple

from lean_merge import CheckpointError, Resources, analyze, merge, open_analysis, plan, stream
from lean_merge.checkpoints import TensorReader, open_checkpoint

CPU = Resources(device="cpu", threads=1)


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    return write_triple(tmp_path / "in", SMALL)


def save_in_another_order(file: Path) -> None:
    """The same tensors at other places, in a file of the same length."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__")
    written, entries = b"", {"__metadata__": metadata}
    for name in reversed(sorted(header, key=lambda each: header[each]["data_offsets"])):
        first, last = header[name]["data_offsets"]
        place = [len(written), len(written) + last - first]
        entries[name] = {**header[name], "data_offsets": place}
        written += numbers[first:last]
    text = json.dumps(entries, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    file.write_bytes(struct.pack("<Q", length) + text + written)


def replace_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


CHANGES: list[Callable[[Path], Any]] = [save_in_another_order, os.utime, Path.unlink]
CHANGES += [] if os.name == "nt" else [replace_by_a_pipe]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["base", "mllm", "expert1"])
def test_between_plan_and_merge(triple: Triple, tmp_path: Path, role: str, change: Any):
    written, unwritten = (
        plan(triple.recipe(threshold=0.0, output=kind), CPU) for kind in ("checkpoint", "none")
    )
    change(triple.base.parent / role / "model.safetensors")
    for work, out in ((written, tmp_path / "out"), (unwritten, None)):
        with pytest.raises(CheckpointError, match=rf"{role}/model\.safetensors"):
            merge(work, out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "README.md", "vocab.txt"])
def test_what_is_copied_or_read_beside_the_weights_counts_too(
    triple: Triple, tmp_path: Path, name: str
):
    file = triple.mllm / name
    file.write_text(file.read_text() if file.exists() else "one")
    work = plan(triple.recipe(), CPU)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(CheckpointError, match=rf"{name}: this file of the mllm has changed"):
        merge(work, tmp_path / "out")


@pytest.mark.parametrize("role", ["base", "mllm", "expert1"])
def test_while_a_stream_is_read(triple: Triple, role: str):
    """No tensor is given that may be a mixture, and the end does not pass for whole."""
    expected = load_file(merge_beside(triple) / "model.safetensors")
    tensors = stream(triple.recipe(threshold=0.0), resources=CPU)
    given = [next(tensors)]
    save_in_another_order(triple.base.parent / role / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{role}/model\.safetensors: this file of .* has"):
        given += tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in given)


def merge_beside(triple: Triple) -> Path:
    out = triple.base.parent / "expected"
    merge(triple.recipe(threshold=0.0), out, resources=CPU)
    return out


def test_an_analysis_that_is_made_again_is_not_the_one_that_was_opened(
    triple: Triple, tmp_path: Path
):
    recipe = triple.recipe(threshold=0.1)
    analyze(recipe, tmp_path / "analysis", resources=CPU)
    opened = open_analysis(tmp_path / "analysis")
    work = plan(recipe, CPU, analysis=opened)
    analyze(triple.recipe(threshold=0.1, seed=7), opened.path, resources=CPU, overwrite=True)
    with pytest.raises(CheckpointError, match="this file of the analysis has changed"):
        merge(work, tmp_path / "out")


def test_a_reader_notices_at_once(triple: Triple):
    checkpoint = open_checkpoint(triple.base)
    spec = next(each for each in checkpoint.tensors.values() if each.nbytes)
    buffer = memoryview(bytearray(spec.nbytes))
    with TensorReader(seen=checkpoint.seen) as reader:
        reader.read_into(spec, 0, buffer)
        os.utime(spec.file, ns=(1, 1))
        with pytest.raises(CheckpointError, match="this file of an input has changed"):
            reader.read_into(spec, 0, buffer)
    with TensorReader() as reader:
        reader.read_into(spec, 0, buffer)
