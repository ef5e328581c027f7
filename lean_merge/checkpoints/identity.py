"""Tell whether files are still those that were opened, without reading their weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from lean_merge.checkpoints.elsewhere import FAR_FILES
from lean_merge.checkpoints.header import MAX_HEADER
from lean_merge.checkpoints.safepaths import open_regular
from lean_merge.errors import CheckpointError

_END, _STEP = 1 << 20, 1 << 16


class Opened(Protocol):
    """Files of one folder that were looked at before they were opened."""

    @property
    def path(self) -> Path:
        """Return the folder."""

    @property
    def seen(self) -> Mapping[Path, Mapping[str, Any]]:
        """Return what `look_at` told of each file."""


def look_at(folder: Path, weights: Sequence[Path], others: Sequence[Path] = ()) -> dict[Path, Any]:
    """Tell each file's name in its folder, its length and its times, as JSON has them.

    A file from another machine has the mark of its content in place of the times.
    A weight file also has the SHA-256 of its header. If it is no safetensors file, and may keep its
    directory at its end, it has that of both its ends.

    Raises
    ------
    CheckpointError
        A file cannot be read.
    """
    found: dict[Path, Any] = {}
    try:
        for file in (*weights, *others):
            status, far = file.stat(), FAR_FILES.get(file)
            times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
            found[file] = {
                "name": Path(os.path.relpath(file, folder)).as_posix(),
                "size": status.st_size,
                **(times if far is None else {"etag": far.etag}),
            }
        for file in weights:
            plain = file.suffix == ".safetensors"
            found[file]["header_sha256"] = header_digest(file) if plain else _ends_digest(file)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror or error}); check the path."
        ) from error
    return found


def identify(opened: Opened) -> list[Mapping[str, Any]]:
    """Tell what was seen of all files, in the order of their names."""
    return sorted(opened.seen.values(), key=lambda entry: str(entry["name"]))


def changed(file: Path, role: str) -> CheckpointError:
    """Return the error for a file of a role that is no longer what it was when it was opened."""
    return CheckpointError(
        f"{file}: this file of {role} has changed since it was opened, so what was read may be a "
        "mixture; once nothing changes it any more, plan and merge again with --no-resume."
    )


def check_unchanged(opened: Mapping[str, Opened]) -> None:
    """Raise CheckpointError if a file is no longer what it was when it was opened, by its role."""
    for role, each in opened.items():
        for file, before in each.seen.items():
            is_weights = "header_sha256" in before
            now = look_at(each.path, [file] * is_weights, [file] * (not is_weights))
            if now[file] != before:
                raise changed(file, f"the {role}")


def changed_weights(then: Any, roles: Mapping[str, Opened]) -> str | None:
    """Tell what has changed in the inputs that decides numbers, wherever they lie; None if nothing.

    Parameters
    ----------
    then
        A list of roles and files, as it was recorded for the inputs before.
    roles
        The inputs now.
    """
    now = [{"role": role, "files": identify(each)} for role, each in roles.items()]
    old, new = ([_deciding(entry) for entry in entries] for entries in (then, now))
    if old == new:
        return None
    if [entry["role"] for entry in old] != list(roles):
        return f"the roles were {len(old)}, are {len(new)}"
    for before, entry in zip(old, new, strict=True):
        was = {file["name"]: file for file in before["files"]}
        # Weights come first, because a folder that was copied has new dates everywhere.
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
    """Return the SHA-256 of a safetensors file's header, its length included. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(file) as stream:
        head = stream.read(8)
        digest.update(head)
        _add(digest, stream, min(int.from_bytes(head, "little"), MAX_HEADER))
    return digest.hexdigest()


def _ends_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(file) as stream:
        _add(digest, stream, _END)
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _END))
        _add(digest, stream, _END)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, stream: IO[bytes], count: int) -> None:
    while count > 0 and (part := stream.read(min(count, _STEP))):
        digest.update(part)
        count -= len(part)
