"""Lay out every byte of the output before the first is written.

Shards are cut as transformers cuts them, and each is laid out as `safetensors.torch.save_file`
would, so that the same tensors give the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lean_merge.checkpoints.dtypes import LAYOUT_RANK, tensor_nbytes
from lean_merge.checkpoints.header import MAX_HEADER
from lean_merge.checkpoints.weightfiles import SINGLE
from lean_merge.errors import OutputError


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written; `dtype` is a safetensors dtype, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file of the output.

    Attributes
    ----------
    file_name
        Its final name.
    header
        Everything before the data: u64 little-endian length, then JSON padded with spaces.
    offsets
        The offset of each tensor's first byte in the file, by name and in file order.
    size
        Length of the whole file in bytes.
    """

    file_name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def extents(shard: Shard) -> dict[str, tuple[int, int]]:
    """Return where each tensor begins in the file and its length, in bytes and in file order."""
    starts = list(shard.offsets.values())
    ends = [*starts[1:], shard.size]
    return {
        name: (start, end - start)
        for name, start, end in zip(shard.offsets, starts, ends, strict=False)
    }


def plan_shards(tensors: Sequence[OutputTensor], *, shard_size: int) -> tuple[Shard, ...]:
    """Distribute tensors over files.

    Parameters
    ----------
    tensors
        The tensors in the order in which to fill the shards.
    shard_size
        Most bytes of data in a shard; a tensor that is larger has a shard of its own, and the
        shard before it is filled further, as transformers does.

    Returns
    -------
    tuple of Shard
        One, "model.safetensors", or several, named "model-00001-of-0000N.safetensors" and so on.

    Raises
    ------
    OutputError
        A tensor's name cannot be stored, or a file's header would be too long.
    ValueError
        A name occurs twice, a dtype is unknown, or a tensor's `nbytes` does not fit its shape.
    """
    groups: list[list[OutputTensor]] = []
    current: list[OutputTensor] = []
    filled = 0
    for tensor in tensors:
        if tensor.dtype not in LAYOUT_RANK:
            raise ValueError(f"The safetensors format has no dtype {tensor.dtype!r}.")
        if tensor_nbytes(tensor.dtype, tensor.shape) != tensor.nbytes:
            raise ValueError(f"{tensor} has a length that does not fit its dtype and shape.")
        if tensor.nbytes > shard_size:
            groups.append([tensor])
            continue
        if filled + tensor.nbytes > shard_size:
            groups.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += tensor.nbytes
    if current or not groups:
        groups.append(current)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("Two output tensors have the same name.")
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    return tuple(
        single_file(name, group)
        for name, group in zip([SINGLE] if count == 1 else names, groups, strict=True)
    )


def single_file(file_name: str, tensors: Sequence[OutputTensor]) -> Shard:
    """Lay out all tensors in one file of that name. Raises OutputError as `plan_shards` does."""
    # Rust, which writes save_file's header, compares names as UTF-8 bytes.
    ordered = sorted(tensors, key=lambda each: (-LAYOUT_RANK[each.dtype], _utf8(each.name)))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        starts[tensor.name] = position
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OutputError(
            f"{file_name}: its header would have {len(text)} bytes, beyond the format's limit of "
            f"{MAX_HEADER}; choose a smaller shard size."
        )
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(file_name, header, MappingProxyType(offsets), len(header) + position)


def _utf8(name: str) -> bytes:
    try:
        data = name.encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError(
            f"The tensor name {name!r} is not valid Unicode; rename it in the MLLM."
        ) from None
    if name == "__metadata__":
        raise OutputError("A tensor cannot be named '__metadata__'; rename it in the MLLM.")
    return data


def index_json(shards: Sequence[Shard]) -> bytes:
    """Return the content of model.safetensors.index.json, as transformers writes it."""
    total = sum(shard.size - len(shard.header) for shard in shards)
    weight_map = {name: shard.file_name for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")
