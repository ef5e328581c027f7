"""Read the header of a safetensors file as untrusted input.

    u64 little-endian length | JSON of that length | data, without holes

Loaders disagree on what they accept. This one accepts only what every loader does, so that whatever
was planned from a header can also be read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.dtypes import ITEM_BITS, tensor_nbytes
from lean_merge.checkpoints.jsonfile import parse_object
from lean_merge.checkpoints.safepaths import open_regular
from lean_merge.errors import CheckpointError, is_plain, shown
from lean_merge.sizes import format_size

MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 64
_MAX_NAME = 1024
_MEND = "download or save the file again"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The name, dtype, shape and place of a stored tensor.

    Attributes
    ----------
    name
        Its name in the checkpoint.
    dtype
        Its safetensors dtype, such as "BF16".
    shape
        Its lengths; () for a scalar.
    file
        The file that holds it.
    offset
        The offset of its first byte from the start of the file.
    nbytes
        Its length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Return a safetensors file's tensors by name, in the order of offsets, and its metadata.

    Only the header is read. Memory is bounded by the header's true length, which is at most 100 MB,
    and by `MAX_PARSED` for parsing it, but never by a number that the file states.

    Raises
    ------
    CheckpointError
        The file cannot be read, is truncated or unfinished, or breaks the format in any way.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = _header_length(stream.read(8), size=size, file=file)
            data = stream.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}); check the path and its rights."
        ) from error
    if len(data) < length:
        raise CheckpointError(f"{file}: is truncated inside its header; {_MEND}.")
    if not data.startswith(b"{"):
        raise CheckpointError(f"{file}: is not a safetensors file (no JSON header); {_MEND}.")
    header = parse_object(data, file=file, what="the safetensors header", mend=_MEND)
    metadata = _metadata(header.pop("__metadata__", None), file)
    specs = [_spec(name, entry, file=file, start=8 + length) for name, entry in header.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
    _check_layout(specs, start=8 + length, size=size, file=file)
    return {spec.name: spec for spec in specs}, metadata


def _header_length(head: bytes, *, size: int, file: Path) -> int:
    if len(head) < 8:
        raise CheckpointError(
            f"{file}: has {size} bytes and is no safetensors file, which begins with 8; {_MEND}."
        )
    length = int.from_bytes(head, "little")
    if length == 0:
        raise CheckpointError(
            f"{file}: states a header of length 0, the mark of an unfinished lean-merge output; "
            "run the merge again."
        )
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{file}: states a header of {length} bytes, beyond the format's limit of "
            f"{MAX_HEADER}, so it is no safetensors file or is corrupt; {_MEND}."
        )
    if length > size - 8:
        raise CheckpointError(
            f"{file}: states a header of {length} bytes but has only {size - 8} after its length, "
            f"so it is truncated; {_MEND}."
        )
    return length


def _metadata(value: Any, file: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(
            f"{file}: the header's __metadata__ is not an object of strings; {_MEND}."
        )
    return value


def _is_count(value: Any) -> bool:
    # A bool is an int in Python. No file system or tensor library can address 2**63 or more.
    return type(value) is int and 0 <= value < 2**63


def name_fault(name: str) -> str | None:
    """Return why a tensor may not have this name, as a predicate; None if it may."""
    # These are lone surrogates, control characters, and those that reorder a terminal's text.
    if not is_plain(name):
        return "has a name with control characters, or that is not valid Unicode"
    if len(name) > _MAX_NAME:
        return f"has a name of {len(name)} characters, more than {_MAX_NAME}"
    return None


def _spec(name: str, entry: Any, *, file: Path, start: int) -> TensorSpec:
    def fail(fault: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {shown(name)} {fault}; {_MEND}.")

    if fault := name_fault(name):
        raise fail(fault)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise fail(f"has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise fail("has a shape that is not a list of non-negative integers")
    if len(shape) > _MAX_DIMENSIONS:
        raise fail(f"has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fail("has data_offsets that are not two non-negative integers")
    begin, end = offsets
    if begin > end:
        raise fail(f"ends at {end} before it begins at {begin}")
    nbytes = tensor_nbytes(dtype, tuple(shape))
    if nbytes is None:
        raise fail(f"of dtype {dtype} and shape {shown(shape)} does not fill whole bytes")
    if nbytes >= 2**63:
        raise fail(f"has a shape too large for any file: {shown(shape)}")
    if nbytes != end - begin:
        raise fail(
            f"of dtype {dtype} and shape {shown(shape)} needs {nbytes} bytes, not {end - begin}"
        )
    return TensorSpec(name, dtype, tuple(shape), file, start + begin, nbytes)


def _check_layout(specs: list[TensorSpec], *, start: int, size: int, file: Path) -> None:
    position = start
    for spec in specs:
        if spec.offset + spec.nbytes > size:
            raise CheckpointError(
                f"{file}: tensor {shown(spec.name)} lies beyond the end of the file, which is "
                f"truncated by at least {format_size(spec.offset + spec.nbytes - size)}; {_MEND}."
            )
        if spec.offset != position:
            fault = "overlaps the one before it" if spec.offset < position else "follows a hole"
            raise CheckpointError(f"{file}: tensor {shown(spec.name)} {fault}; {_MEND}.")
        position += spec.nbytes
    if position != size:
        raise CheckpointError(
            f"{file}: has {size - position} bytes after its last tensor, which the header does "
            f"not explain; {_MEND}."
        )
