"""Make the output folder's system calls, with substitutes where a system lacks one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from lean_merge.errors import BudgetError, LeanMergeError, OutputError
from lean_merge.sizes import format_size

_LARGEST_WRITE = 1 << 30
_SMALLEST_WRITE = 1 << 20
_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS})
_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_seek_lock = threading.Lock()
TRIES = 100
"""How often a folder is made again that other runs give up at the same time."""


def explain(path: Path, error: OSError) -> LeanMergeError:
    """Return the error for a failed write: BudgetError if space ran out, else OutputError."""
    if error.errno in _FULL:
        return BudgetError(f"{path}: the disk is full or over quota; free space or pass another.")
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); check the rights and the disk."
    )


def set_length(descriptor: int, size: int) -> None:
    """Make a file `size` bytes long, and reserve the space if possible. Raises OSError."""
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.ftruncate(descriptor, size)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write `data` at `offset`, and move no file position that others rely on. Raises OSError."""
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
    """Fill `out` from `offset` on; return how many bytes there were. Raises OSError."""
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
    """Open a file to be written in place, and make it if it is absent. Raises OSError.

    A link, symbolic or hard, is refused: a file elsewhere would change, an input perhaps.
    """
    flags = os.O_RDWR | os.O_CREAT | _PLAIN | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(file, flags, 0o666)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(
            errno.EMLINK, "it is a hard link, so another file would change too", str(file)
        )
    return descriptor


def write_new(file: Path, parts: Iterable[bytes]) -> tuple[int, str]:
    """Make or replace a small file, whose bytes are on the disk when this returns.

    Return its length and SHA-256. Raises OSError.
    """
    # A link is not followed, so that the file that it leads to stays as it is.
    with suppress(FileNotFoundError):
        os.unlink(file)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
    size, digest = 0, hashlib.sha256()
    try:
        for part in _joined(parts):
            write_all(descriptor, memoryview(part), size)
            size += len(part)
            digest.update(part)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size, digest.hexdigest()


def _joined(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in parts that are worth a system call each."""
    held, size = [], 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= _SMALLEST_WRITE:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it that are missing; they are on the disk when this returns.

    Return those that were made here and not by another at the same time, the highest first. Raises
    OSError.
    """
    made = []
    for each in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        with suppress(FileExistsError):
            os.mkdir(each)
            made.append(each)
            sync_folder(each.parent)
    return made


def sync_data(descriptor: int) -> None:
    """Wait until a file's bytes are on the disk. Raises OSError."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def forget(descriptor: int) -> None:
    """Ask the system to give up its cached pages of a file that are on the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk, where the system can. Raises OSError."""
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
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


class FolderLock:
    """The hold that this process has on a folder until it is released; its forks have none."""

    held: ClassVar[set[FolderLock]] = set()

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.held.add(self)

    def is_at(self, folder: Path) -> bool:
        """Tell whether the folder that is held is the one that has this path now."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(folder))
        except OSError:
            return False

    def release(self) -> None:
        """Let go of the folder; may be called twice."""
        if self in self.held:
            self.held.remove(self)
            os.close(self._descriptor)


def _forget_locks() -> None:
    # A lock lasts until its last descriptor is closed, and a child has copies of all of them.
    for lock in [*FolderLock.held]:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def lock_folder(folder: Path) -> FolderLock | None:
    """Take the folder for this process until the lock is released.

    Return None where the system has no such locks. Raises OSError if there is no such folder, and
    OutputError if another process, or another writer in this one, has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        lock = FolderLock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY))
        try:
            fcntl.flock(lock._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.release()
            raise OutputError(
                f"{folder}: another lean-merge is writing there; wait for it or choose another "
                "folder."
            ) from None
        except OSError:
            # The file system has no locks, so go on without one.
            return lock
        # Meanwhile the one who had it may have put another folder in this one's place.
        if lock.is_at(folder):
            return lock
        lock.release()


def hold_folder(folder: Path) -> tuple[FolderLock | None, list[Path]]:
    """Lock a folder, which is made if it is missing; return the folders that were made as well.

    Raises as `lock_folder`.
    """
    for left in reversed(range(TRIES)):
        try:
            made = make_folder(folder)
            return lock_folder(folder), made
        except FileNotFoundError:
            # Another run has just given up what it had made.
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def check_free_space(folder: Path, needed: int, *, freed: int) -> None:
    """Raise BudgetError unless `folder`'s disk has `needed` bytes free.

    `folder` need not exist yet. Before the write, `freed` bytes of leftovers are removed.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free + freed
    if needed > free:
        raise BudgetError(
            f"{folder}: the output needs {format_size(needed)} and the disk has "
            f"{format_size(free)} free; free some or choose a folder on another disk."
        )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the disk that the files beneath `folder` occupy. Raises OSError."""
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
