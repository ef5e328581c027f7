"""Tell whether a checkpoint is still the same as before, without reading its weights."""

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
    """Return name, length and times of a checkpoint's weight files and configs, sorted by name.

    A weight file also has the SHA-256 of its header. If it is no safetensors file, and may keep its
    directory at its end, it has that of both its ends.

    Parameters
    ----------
    checkpoint
        The checkpoint, of which only the headers are read again.
    others
        More files of its folder.

    Returns
    -------
    list of dict
        Plain data for JSON, an entry for each file.

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
    """Return the checkpoints by role: "base", "mllm" if it is not the base, "expert 1", ..."""
    numbered = {f"expert {number}": each for number, each in enumerate(experts, 1)}
    return {"base": base, **({} if mllm is base else {"mllm": mllm}), **numbered}


def changed_weights(then: Any, roles: Mapping[str, Checkpoint]) -> str | None:
    """Return a sentence on what has changed in the inputs' numbers; None if nothing has.

    Parameters
    ----------
    then
        A list of roles and files, as it was recorded for the inputs before.
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
        # Weights are compared first, because a copied folder has new dates everywhere.
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
    """Return the SHA-256 of a safetensors header, its length included. Raises OSError."""
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
