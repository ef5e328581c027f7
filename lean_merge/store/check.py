"""Read a complete output again, and compare all of it with its journal."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.header import TensorSpec, read_header
from lean_merge.checkpoints.identity import header_digest
from lean_merge.checkpoints.safepaths import open_regular
from lean_merge.checkpoints.weightfiles import INDEX, read_index
from lean_merge.errors import CheckpointError
from lean_merge.store.digest import range_digest
from lean_merge.store.journal import JOURNAL, Difference, Journal, commit_mark, read_journal
from lean_merge.store.state import UNSEALED

_STEP = 4 << 20
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|msgpack|h5|keras|ot|npz|npy|pkl"
    r"|pickle|tflite|pdparams|partial)(\.index(\.\w+)?\.json)?|adapter_config\.json",
    re.IGNORECASE,
)
_MEND = "pass the folder of a complete lean-merge output"


@dataclass
class FolderCheck:
    """The result of reading a complete output again.

    Attributes
    ----------
    journal
        The journal; None if it is damaged, and then nothing else was compared.
    differences
        The differences in the order in which they were found.
    tensors
        The tensors whose digests agree, by name.
    files
        How many files were compared, the journal among them.
    """

    journal: Journal | None = None
    differences: list[Difference] = field(default_factory=list)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    files: int = 0

    def add(self, file: str, fault: str, tensor: str | None = None) -> None:
        """Note a difference."""
        self.differences.append(Difference(file, tensor, fault))


def check_folder(folder: Path, on_bytes: Callable[[int], None]) -> FolderCheck:
    """Compare a complete output with its journal: every byte, through one small buffer.

    Parameters
    ----------
    folder
        The output.
    on_bytes
        A function that is called with the number of the tensors' bytes that were read.

    Raises
    ------
    CheckpointError
        There is no such output, it is unfinished, or a file cannot be read.
    """
    try:
        names = {each.name for each in folder.iterdir()} if folder.is_dir() else None
        if names is None:
            raise CheckpointError(f"{folder}: is no folder; {_MEND}.")
        if UNSEALED in names:
            raise CheckpointError(
                f"{folder}: is an unfinished lean-merge output; run the merge again to finish it."
            )
        if JOURNAL not in names:
            raise CheckpointError(f"{folder}: has no {JOURNAL} to compare with; {_MEND}.")
        return _check(folder, names, on_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be read ({error.strerror or error}); check its "
            "rights and the disk."
        ) from error


def _check(folder: Path, names: set[str], on_bytes: Callable[[int], None]) -> FolderCheck:
    check = FolderCheck(files=1)
    journal = read_journal(folder / JOURNAL)
    if journal is None or not journal.sealed:
        check.add(JOURNAL, "is damaged, so there is nothing to compare with")
        return check
    check.journal = journal
    known: dict[str, dict[str, Any]] = {name: {} for name in journal.shards}
    for tensor, record in journal.tensors.items():
        known.setdefault(record["shard"], {})[tensor] = record
    for name, record in journal.shards.items():
        _check_shard(folder / name, record, known[name], check, on_bytes)
    for name, record in journal.files.items():
        check.files += 1
        file = folder / name
        if not file.is_file():
            check.add(name, "is missing")
        elif _sha256(file) != (record["size"], record["sha256"]):
            check.add(name, "has changed")
    if commit_mark(list(journal.shards)) == INDEX and (folder / INDEX).is_file():
        _check_index(folder / INDEX, journal, check)
    ours = {JOURNAL, *journal.shards, *journal.files}
    for name in sorted(names - ours):
        if _OTHER_WEIGHTS.fullmatch(name):
            check.add(name, "is not part of this output")
    return check


def _check_shard(
    file: Path,
    record: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]],
    check: FolderCheck,
    on_bytes: Callable[[int], None],
) -> None:
    name = file.name
    check.files += 1
    if not file.is_file():
        check.add(name, "is missing")
        return
    size = file.stat().st_size
    if size != record["size"]:
        check.add(name, f"has {size} bytes instead of {record['size']}")
        return
    if header_digest(file) != record["header_sha256"]:
        check.add(name, "the header has changed, so its tensors were not compared")
        return
    specs, _ = read_header(file)
    for tensor in sorted(known.keys() ^ specs.keys()):
        check.add(name, "is in the header or in the journal only", tensor)
    buffer = memoryview(bytearray(_STEP))
    with open_regular(file) as stream:
        for spec in specs.values():
            digest = range_digest(stream.fileno(), spec.offset, spec.nbytes, buffer)
            on_bytes(spec.nbytes)
            if spec.name not in known:
                continue
            if digest == known[spec.name]["crc32_data"]:
                check.tensors[spec.name] = spec
            else:
                check.add(name, "its bytes have changed", spec.name)


def _sha256(file: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open_regular(file) as stream:
        while part := stream.read(_STEP):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def _check_index(index: Path, journal: Journal, check: FolderCheck) -> None:
    """Compare the index with the headers of the undamaged shards."""
    try:
        named = read_index(index)
    except CheckpointError:
        check.add(INDEX, "cannot be read")
        return
    for name, spec in check.tensors.items():
        if named.get(name) != spec.file.name:
            check.add(INDEX, f"says {named.get(name)!r} instead of {spec.file.name!r}", name)
    for name in sorted(named.keys() - journal.tensors.keys()):
        check.add(INDEX, "names a tensor that is in no shard", name)
