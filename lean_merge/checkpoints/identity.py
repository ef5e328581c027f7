"""What tells whether a checkpoint is still the one that it was, without reading its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.checkpoint import Checkpoint
from lean_merge.errors import CheckpointError

_STEP = 1 << 20


def identify(checkpoint: Checkpoint, *, others: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Name, length and times of a checkpoint's weight files and configs, sorted by name.

    For a weight file there is also the SHA-256 of its header or, where it is no safetensors and
    may keep its directory at the end, that of both its ends.

    Parameters
    ----------
    checkpoint
        It is not read again, but for the headers.
    others
        More files of its folder.

    Returns
    -------
    list of dict
        What JSON will hold of each file.

    Raises
    ------
    CheckpointError
        A file cannot be read.
    """
    found = []
    for file in {*checkpoint.files, *checkpoint.configs, *others}:
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


def by_role(
    base: Checkpoint, mllm: Checkpoint, experts: Sequence[Checkpoint]
) -> dict[str, Checkpoint]:
    """Name checkpoints by their roles: "base", "mllm", "expert 1", and so on."""
    numbered = {f"expert {number}": each for number, each in enumerate(experts, 1)}
    return {"base": base, "mllm": mllm, **numbered}


def changed_weights(then: Any, roles: Mapping[str, Checkpoint]) -> str | None:
    """Say what has changed in the inputs that decides numbers, wherever they lie; None if nothing.

    Parameters
    ----------
    then
        A list of roles and files, as it was told of the inputs before.
    roles
        The inputs now.

    Raises
    ------
    CheckpointError
        An input cannot be read.
    """
    now = [{"role": role, "files": identify(each)} for role, each in roles.items()]
    old, new = ([_deciding(entry) for entry in entries] for entries in (then, now))
    if old == new:
        return None
    if [entry["role"] for entry in old] != list(roles):
        return f"the roles were {len(old)}, are {len(new)}"
    for before, entry in zip(old, new, strict=True):
        was = {file["name"]: file for file in before["files"]}
        # Weights first: a folder that was copied has new dates everywhere.
        for file in sorted(entry["files"], key=lambda each: "header_sha256" not in each):
            if file != was.pop(file["name"], None):
                return f"{file['name']} of the {entry['role']} is not the same file"
        if was:
            return f"{next(iter(was))} of the {entry['role']} is gone"
    return None


def _deciding(entry: dict[str, Any]) -> dict[str, Any]:
    files = [
        file
        for file in entry.get("files", ())
        if "header_sha256" in file or file.get("name") in ("config.json", "adapter_config.json")
    ]
    return {"role": entry.get("role"), "files": files}


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
