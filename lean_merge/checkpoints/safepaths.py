"""Refuse links that lead out of a checkpoint folder, except those of the hub's cache.

A downloaded folder is untrusted: if its config.json were a link to a private file, that file would
be copied into the output, which is then published.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

from lean_merge.errors import CheckpointError, LeanMergeError, shown


def resolved(path: str | Path, kind: type[LeanMergeError] = CheckpointError) -> Path:
    """Return a path that a user named, absolute and without links.

    Raises an error of a `kind` for what no path can be: an unknown user's home, a loop of links, a
    name that is too long.
    """
    try:
        found = Path(path).expanduser().resolve()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise kind(f"{shown(str(path))}: is no path ({reason}); check it.") from error
    return found


def open_regular(file: Path) -> IO[bytes]:
    """Open a regular file to be read; OSError for anything else, such as a pipe that never ends."""
    return open(file, "rb", opener=regular)


def regular(file: str, flags: int) -> int:
    """Open a regular file as `os.open` does, and never wait for a writer of a pipe. OSError."""
    descriptor = os.open(file, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", file)
    return descriptor


def checked_file(folder: Path, file: Path) -> Path:
    """Return `file`, after checking that it is a regular file whose bytes belong to `folder`.

    Parameters
    ----------
    folder
        The checkpoint's folder.
    file
        A path inside it, perhaps a link. In the Hugging Face cache, links lead from
        models--*/snapshots/REVISION/ to models--*/blobs/, and from there to blobs/ of the whole
        cache; no other link may leave `folder`.

    Raises
    ------
    CheckpointError
        The file is absent or no regular file, or a link leads out of the folder.
    """
    try:
        home = folder.resolve(strict=True)
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: is missing or a broken link; download the checkpoint again."
        ) from error
    if not target.is_file():
        raise CheckpointError(f"{file}: is not a regular file; remove it or pass another folder.")
    if target.is_relative_to(home) or any(map(target.is_relative_to, _blobs(home))):
        return file
    raise CheckpointError(
        f"{file}: is a link out of its folder, to {target}; put a copy of the file there, or pass "
        "the folder that it points to."
    )


def _blobs(folder: Path) -> list[Path]:
    for parent in folder.parents:
        repository = parent.parent
        if parent.name == "snapshots" and repository.name.startswith("models--"):
            return [repository / "blobs", repository.parent / "blobs"]
    return []
