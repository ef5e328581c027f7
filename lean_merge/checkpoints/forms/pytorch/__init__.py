"""Find the tensors of a PyTorch file (pytorch_model.bin) without unpickling it.

    zip archive, entries stored uncompressed:  root/data.pkl | root/data/KEY ... | root/version ...

data.pkl is a pickle that names for each tensor the entry with its bytes, and its place there. Its
operations are followed on plain data: no function that it names is ever called, and no object of
its classes is made, so it can run nothing. Fewer operations and names are understood than
`torch.load(weights_only=True)` lets through.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.dtypes import ITEM_BITS
from lean_merge.checkpoints.forms import Form
from lean_merge.checkpoints.forms.pytorch.pickleops import PickledTensor, PickleError, follow
from lean_merge.checkpoints.header import TensorSpec, name_fault
from lean_merge.checkpoints.safepaths import regular
from lean_merge.checkpoints.weightfiles import WeightNames
from lean_merge.errors import CheckpointError, plain, shown

# The most bytes of the directory, and of data.pkl; real ones have about 100 for each tensor.
_MAX_PART = 16_000_000
_LOCAL_HEADER = 30
_LEGACY = (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", b"\x80\x02c", b"\x80\x02}")
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
_MEND = "download or save the file again"
_RESAVE = (
    "save it again with torch.save of a plain state_dict, or with transformers' save_pretrained"
)


class PyTorch(Form):
    """The form of files that torch.save wrote; they are read if a folder holds no safetensors."""

    suffixes = (".bin", ".pt", ".pth")
    names = WeightNames("pytorch_model.bin", only_these=True)

    def read(self, file: Path) -> dict[str, TensorSpec]:
        return read_pickle_header(file)


FORM = PyTorch()


def read_pickle_header(file: Path) -> dict[str, TensorSpec]:
    """Return the tensors of a PyTorch file by name, in the order of their offsets.

    Only the archive's directory and data.pkl are read, but no tensors. Names that share their bytes
    are all returned.

    Raises
    ------
    CheckpointError
        The file cannot be read, is damaged, is of an older or another kind (TorchScript,
        compressed), names what is not needed for weights, or holds tensors that are no plain
        contiguous block of numbers.
    """
    try:
        with _BoundedFile(file, "rb", opener=regular) as stream:
            return _read(file, stream)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}); check the path and its rights."
        ) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: is a damaged PyTorch archive ({plain(str(error))[:200]}); {_MEND}."
        ) from error


class _BoundedFile(io.FileIO):
    """A file that refuses to be read in large pieces, whatever sizes it states for its parts."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > _MAX_PART:
            raise ValueError("it states parts of impossible size")
        return super().read(size) or b""


@dataclass(frozen=True, slots=True)
class _Entry:
    """The bytes [offset, offset + size) of the file."""

    offset: int
    size: int


def _read(file: Path, stream: _BoundedFile) -> dict[str, TensorSpec]:
    start = stream.read(16)
    if not start.startswith(b"PK"):
        if start.startswith(_LEGACY):
            raise CheckpointError(
                f"{file}: is in PyTorch's format from before version 1.6, whose tensors cannot be "
                "located without unpickling; load it with torch.load(weights_only=True) and save "
                "it again with torch.save."
            )
        raise CheckpointError(f"{file}: is no PyTorch archive; {_MEND}.")
    with zipfile.ZipFile(stream) as archive:
        root, entries = _entries(file, stream, archive)
        data = archive.read(f"{root}/data.pkl")
    storages = {name[5:]: entry for name, entry in entries.items() if name.startswith("data/")}
    try:
        content = follow(data)
    except PickleError as error:
        raise CheckpointError(f"{file}: data.pkl {error}; {_RESAVE}.") from error
    tensors = _state_dict(content, file)
    specs = [_spec(name, tensor, storages, file) for name, tensor in tensors.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes, spec.name))
    return {spec.name: spec for spec in specs}


def _entries(
    file: Path, stream: _BoundedFile, archive: zipfile.ZipFile
) -> tuple[str, dict[str, _Entry]]:
    """Return the archive's root folder, and its other entries by their names below it."""
    names = [info.filename for info in archive.infolist()]
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise CheckpointError(
            f"{file}: is a zip archive but not one that torch.save wrote (no single data.pkl); "
            f"{_RESAVE}."
        )
    root = roots[0]
    if f"{root}/constants.pkl" in names:
        raise CheckpointError(
            f"{file}: is a TorchScript program, not a file of weights; pass the checkpoint that it "
            "was made from."
        )
    entries: dict[str, _Entry] = {}
    for info in archive.infolist():
        name = info.filename.removeprefix(f"{root}/")
        if name in entries:
            raise ValueError(f"entry {shown(name)} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(
                f"{file}: entry {shown(name)} is compressed, so its numbers cannot be read in "
                f"place; {_RESAVE}."
            )
        if info.flag_bits & 1:
            raise ValueError(f"entry {shown(name)} is encrypted")
        entries[name] = _Entry(_data_offset(stream, info), info.file_size)
    _check_extents(entries, archive.start_dir)
    if entries["data.pkl"].size > _MAX_PART:
        raise ValueError(f"data.pkl states {entries['data.pkl'].size} bytes")
    order = entries.get("byteorder")
    if order is not None and archive.read(f"{root}/byteorder") != b"little":
        raise CheckpointError(f"{file}: holds big-endian numbers; {_RESAVE} on a usual machine.")
    return root, entries


def _data_offset(stream: _BoundedFile, info: zipfile.ZipInfo) -> int:
    """Return the offset of an entry's bytes, which only its padded local header tells."""
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"entry {shown(info.filename)} has no header where the directory says")
    name = int.from_bytes(header[26:28], "little")
    extra = int.from_bytes(header[28:30], "little")
    if int.from_bytes(header[8:10], "little") != zipfile.ZIP_STORED:
        raise ValueError(f"entry {shown(info.filename)} has two kinds of compression")
    return info.header_offset + _LOCAL_HEADER + name + extra


def _check_extents(entries: Mapping[str, _Entry], end: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < position:
            raise ValueError(f"entry {shown(name)} overlaps the one before it")
        position = entry.offset + entry.size
        if position > end:
            raise ValueError(f"entry {shown(name)} lies beyond the end of the data")


def _state_dict(content: Any, file: Path) -> dict[str, PickledTensor]:
    """Return the tensors by name of a plain state_dict or of one in a training checkpoint."""
    if isinstance(content, dict) and not _tensors(content):
        inner = [key for key in _CONTAINERS if isinstance(content.get(key), dict)]
        filled = [key for key in inner if _tensors(content[key])]
        if len(filled) == 1:
            content = content[filled[0]]
    tensors = _tensors(content) if isinstance(content, dict) else {}
    if not tensors:
        keys = ", ".join(map(shown, list(content)[:4])) if isinstance(content, dict) else ""
        what = f"a dict of {keys or 'nothing'}" if isinstance(content, dict) else "no dict"
        raise CheckpointError(
            f"{file}: holds {what} where a state_dict of tensors is expected, plain or under one "
            f"of {', '.join(_CONTAINERS)}; {_RESAVE}."
        )
    return tensors


def _tensors(content: Mapping[Any, Any]) -> dict[str, PickledTensor]:
    """Return the entries that are tensors; counters and settings beside them are left out."""
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, PickledTensor)
    }


def _spec(
    name: str, tensor: PickledTensor, storages: Mapping[str, _Entry], file: Path
) -> TensorSpec:
    def fail(fault: str, mend: str = _MEND) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {shown(name)} {fault}; {mend}.")

    if fault := name_fault(name):
        raise fail(fault)
    entry = storages.get(tensor.key)
    if entry is None:
        raise fail(f"lies in entry data/{shown(tensor.key)}, which the archive lacks")
    item = ITEM_BITS[tensor.storage_dtype] // 8
    if entry.size != tensor.storage_items * item:
        raise fail(f"needs {tensor.storage_items * item} bytes stored, not {entry.size}")
    count = math.prod(tensor.shape)
    if not _is_contiguous(tensor.shape, tensor.stride):
        raise fail(
            f"of shape {shown(tensor.shape)} has strides {shown(tensor.stride)}, so its "
            "numbers are not one block",
            f"{_RESAVE}, after .contiguous()",
        )
    width = ITEM_BITS[tensor.dtype] // 8
    nbytes, begin = count * width, tensor.offset * width
    if begin + nbytes > entry.size:
        raise fail(f"lies beyond the end of its entry of {entry.size} bytes")
    return TensorSpec(name, tensor.dtype, tensor.shape, file, entry.offset + begin, nbytes)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    if 0 in shape:
        return True
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True
