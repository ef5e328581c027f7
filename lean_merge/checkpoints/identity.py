"""What tells whether a checkpoint is still the one that it was, without reading its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.errors import CheckpointError

_STEP = 1 << 20


def identify(checkpoint: Checkpoint, *, others: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Name, length and times of a checkpoint's files, as JSON has them, sorted by name.

    Parameters
    ----------
    checkpoint
        Of its weight files the header's SHA-256 is taken too; of PyTorch's archives, whose
        directory is at the end, that of both ends.
    others
        More files of its folder; config.json and adapter_config.json need not be named.

    Raises
    ------
    CheckpointError
        A file cannot be read.
    """
    configs = [checkpoint.path / name for name in ("config.json", "adapter_config.json")]
    files = {*checkpoint.files, *others, *(file for file in configs if file.exists())}
    found = []
    for file in files:
        try:
            status = file.stat()
            entry: dict[str, Any] = {
                "name": Path(os.path.relpath(file, checkpoint.path)).as_posix(),
                "size": status.st_size,
                "mtime_ns": status.st_mtime_ns,
                "ctime_ns": status.st_ctime_ns,
            }
            if file in checkpoint.files:
                plain = file.suffix == ".safetensors"
                entry["header_sha256"] = header_digest(file) if plain else _ends_digest(file)
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error.strerror or error}); check the path."
            ) from error
        found.append(entry)
    return sorted(found, key=lambda entry: str(entry["name"]))


def header_digest(file: Path) -> str:
    """SHA-256 of a safetensors file's header, its length included. Raises OSError."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        head = stream.read(8)
        digest.update(head)
        left = int.from_bytes(head, "little")
        while left > 0 and (part := stream.read(min(left, _STEP))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def _ends_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        digest.update(stream.read(_STEP))
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _STEP))
        digest.update(stream.read(_STEP))
    return digest.hexdigest()
