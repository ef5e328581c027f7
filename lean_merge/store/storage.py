"""System calls of the output folder, with what stands in for them where they are lacking."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from pathlib import Path, PurePosixPath

from lean_merge.errors import BudgetError, LeanMergeError, OutputError
from lean_merge.sizes import format_size

_LARGEST_WRITE = 1 << 30
_SIDE_FOLDERS = frozenset({"", "additional_chat_templates"})
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})
_seek_lock = threading.Lock()


def explain(path: Path, error: OSError) -> LeanMergeError:
    """The package's error for a failed write: BudgetError if space ran out, else OutputError."""
    if error.errno in _FULL:
        return BudgetError(f"{path}: the disk is full or over quota; free space or pass another.")
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); check the rights and the disk."
    )


def preallocate(descriptor: int, size: int) -> None:
    """Makes a file `size` bytes long, its space reserved where the file system can. OSError."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
    os.ftruncate(descriptor, size)


def shorten(descriptor: int, size: int) -> None:
    """Cuts off what a file has beyond `size` bytes. OSError."""
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, size)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes `data` at `offset`, without moving any file position that others rely on. OSError."""
    done = 0
    while done < data.nbytes:
        part = data[done : done + _LARGEST_WRITE]
        if hasattr(os, "pwrite"):
            done += os.pwrite(descriptor, part, offset + done)
        else:
            with _seek_lock:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                done += os.write(descriptor, part)


def read_all(descriptor: int, out: memoryview, offset: int) -> int:
    """Fills `out` from `offset` on; returns how many bytes there were. OSError."""
    done = 0
    while done < out.nbytes:
        part = out[done : done + _LARGEST_WRITE]
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [part], offset + done)
        else:
            with _seek_lock:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                data = os.read(descriptor, part.nbytes)
            count = len(data)
            part[:count] = data
        if count == 0:
            break
        done += count
    return done


def open_own(file: Path) -> int:
    """A descriptor of a file to be written in place, made if absent. OSError.

    A link is refused: through it a file elsewhere would change, an input perhaps.
    """
    flags = os.O_RDWR | os.O_CREAT
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(file, flags, 0o666)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(
            errno.EMLINK, "it is a hard link, so another file would change too", str(file)
        )
    return descriptor


def write_new(file: Path, parts: Iterable[bytes]) -> tuple[int, str]:
    """Makes or replaces a small file, whose bytes are on the disk when this returns.

    Returns its length and SHA-256. Raises OSError.
    """
    # Never through a link: what it leads to stays as it is.
    with suppress(FileNotFoundError):
        os.unlink(file)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(file, flags, 0o666)
    size, digest = 0, hashlib.sha256()
    try:
        for part in parts:
            write_all(descriptor, memoryview(part), size)
            size += len(part)
            digest.update(part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those above it that are missing; they are on the disk when this returns.

    Returns those that were made, the highest first. Raises OSError.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        os.mkdir(each)
        sync_folder(each.parent)
    return missing[::-1]


def sync_data(descriptor: int) -> None:
    """Waits until a file's bytes are on the disk. OSError."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def forget(descriptor: int) -> None:
    """Asks the system to give up its cached pages of a file that are on the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on the disk, where the system can. OSError."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        # A folder that may be entered and written but not listed cannot be synced.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, and then need not.
        if error.errno not in _NO_FALLOCATE:
            raise
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """Takes the folder for this process until the returned descriptor is closed.

    Returns None where the system has no such locks. Raises OSError if there is no such folder, and
    OutputError if another process, or another writer in this one, has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"{folder}: another lean-merge is writing there; wait for it or choose another folder."
        ) from None
    except OSError:
        # A file system without locks: go on without.
        pass
    # Meanwhile the one who had it may have put another folder in this one's place.
    if not _is_at(descriptor, folder):
        os.close(descriptor)
        raise OutputError(f"{folder}: another lean-merge has just replaced it; try again.")
    return descriptor


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except OSError:
        return False


def check_free_space(folder: Path, needed: int, *, freed: int) -> None:
    """Raises BudgetError unless `folder`'s disk has `needed` bytes free.

    Parameters
    ----------
    folder
        Perhaps not there yet.
    needed, freed
        Bytes to be written, and bytes of leftovers that go before.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free + freed
    if needed > free:
        raise BudgetError(
            f"{folder}: the output needs {format_size(needed)} and the disk has "
            f"{format_size(free)} free; free some or choose a folder on another disk."
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of the disk that the files beneath `folder` occupy; 0 if there is none. OSError."""
    if folder.is_symlink():
        return 0
    files = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(map(_occupied, files))


def _occupied(file: str) -> int:
    status = os.lstat(file)
    if stat.S_ISLNK(status.st_mode) or status.st_nlink > 1:
        return 0
    # A sparse file occupies less than its length, which others may have taken meanwhile.
    return min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)


def refuse_inputs(out: Path, inputs: Sequence[Path]) -> None:
    """Raises OutputError if `out`, resolved, is an input, inside one, or around one."""
    for each in inputs:
        source = each.resolve()
        # Compared by inode too: names alone lie on file systems that fold case.
        for one, other, where in ((out, source, "inside"), (source, out, "around")):
            for parent in (one, *one.parents):
                if parent == other or _same(parent, other):
                    place = "is" if parent == one else f"lies {where}"
                    raise OutputError(
                        f"{out}: {place} the input {each}, which must not change; choose an output "
                        "folder elsewhere."
                    )


def side_name(name: str, *, taken: Set[str]) -> PurePosixPath:
    """`name` as a path in the output. Raises OutputError if it leads elsewhere or is `taken`."""
    parent, _, last = name.replace("\\", "/").rpartition("/")
    if parent not in _SIDE_FOLDERS or last in {"", ".", ".."} or last in taken:
        raise OutputError(f"{name!r} cannot be the name of a side file; rename it in the MLLM.")
    return PurePosixPath(parent, last)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
