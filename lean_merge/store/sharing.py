"""Weight files that another complete output holds already, byte for byte: linked, or copied.

A link waits as X.linked.partial, a name that nothing opens for writing, until the output is sealed.
Whatever replaces or removes an output unlinks its files and never writes into them, so outputs that
share a file do not depend on each other. docs/durability.md tells the rest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.identity import header_digest
from lean_merge.errors import OutputError
from lean_merge.store.journal import Journal, Record, start_record
from lean_merge.store.layout import Shard
from lean_merge.store.state import PARTIAL, State, look
from lean_merge.store.storage import lock_folder, open_own, read_all, write_all

_LINKED = ".linked"
_ALIGNED = 64 << 10
"""Where copying by the system begins: a multiple of any file system's blocks, to share them."""
_STEP = 4 << 20
_NO_COPY = frozenset(
    {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}
)


@dataclass(frozen=True, slots=True)
class EqualShard:
    """A weight file whose bytes are known to be those of the same file of a complete output.

    Attributes
    ----------
    file_name
        Of the file in both.
    folder
        The complete output.
    results
        What `OutputFolder.finished` is to tell of each of its tensors.
    """

    file_name: str
    folder: Path
    results: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sharing:
    """What an output has from others.

    Attributes
    ----------
    linked, copied
        Bytes of its weight files that are links to those of others, or copies of them.
    refusal
        Why the file system made no link, in its words; None if it was not asked, or did.
    """

    linked: int = 0
    copied: int = 0
    refusal: str | None = None


@dataclass(slots=True)
class Taken:
    """Records of tensors by name, by file, of the files that could be taken; see `Sharing`."""

    linked: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    copied: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    refusal: str | None = None

    def sharing(self, shards: Sequence[Shard]) -> Sharing:
        """The same in bytes."""
        linked = sum(each.size for each in shards if each.file_name in self.linked)
        copied = sum(each.size for each in shards if each.file_name in self.copied)
        return Sharing(linked, copied, self.refusal)


def linked_name(name: str) -> str:
    """What the link of a weight file is called while the output is unfinished."""
    return f"{name}{_LINKED}{PARTIAL}"


def take_equal(
    path: Path,
    shards: Sequence[Shard],
    equal: Sequence[EqualShard],
    start: Record,
    reserve: Callable[[Shard], None],
) -> Taken:
    """Link or copy into an unfinished output what other outputs hold of it.

    Parameters
    ----------
    path
        The unfinished output, whose lock is held.
    shards
        Its weight files.
    equal
        Those of them that others hold; of several that hold the same file, the first that can be
        taken is. One whose output is not complete any more, is being replaced, or was made of other
        inputs or on another machine is not taken.
    start
        The first record of its journal.
    reserve
        Makes a weight file to be written.

    Raises OSError.
    """
    named, taken = {shard.file_name: shard for shard in shards}, Taken()
    for folder in dict.fromkeys(each.folder for each in equal):
        with _held(folder, start) as journal:
            if journal is None:
                continue
            for each in equal:
                done = each.file_name in taken.linked or each.file_name in taken.copied
                if each.folder == folder and each.file_name in named and not done:
                    _take(path, named[each.file_name], each, journal, taken, reserve)
    return taken


def discard_links(path: Path, names: Sequence[str]) -> None:
    """Removes the links that an interrupted run made for these files. OSError."""
    for name in names:
        (path / linked_name(name)).unlink(missing_ok=True)


@contextmanager
def _held(folder: Path, start: Record) -> Iterator[Journal | None]:
    """The journal of a complete output, which nobody replaces meanwhile; None if it is of no use.

    OSError.
    """
    descriptor = None
    try:
        try:
            descriptor = lock_folder(folder)
            found = look(folder)
        except (OutputError, FileNotFoundError, NotADirectoryError):
            yield None
            return
        usable = found.state is State.COMPLETE and found.journal is not None
        if usable and found.journal is not None:
            usable = _origin(found.journal.start) == _origin(start)
        yield found.journal if usable else None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _origin(start: Record) -> dict[str, Any]:
    """What two outputs must have in common so that equal decisions mean equal bytes."""
    return {k: v for k, v in start["run"].items() if k not in ("recipe", "recipe_sha256")}


def _take(
    path: Path,
    shard: Shard,
    equal: EqualShard,
    journal: Journal,
    taken: Taken,
    reserve: Callable[[Shard], None],
) -> None:
    name, source = shard.file_name, equal.folder / shard.file_name
    (described,) = start_record({}, [shard])["shards"]
    known = journal.shards.get(name, {})
    records = {
        tensor: {**journal.tensors[tensor], "result": equal.results[tensor]}
        for tensor in shard.offsets
        if tensor in equal.results and journal.tensors.get(tensor, {}).get("shard") == name
    }
    same = all(known.get(key) == value for key, value in described.items())
    if not same or len(records) != len(shard.offsets) or not _is_whole(source, described):
        return
    link = path / linked_name(name)
    try:
        os.link(source, link)
    except OSError as error:
        taken.refusal = taken.refusal or (error.strerror or str(error))
        reserve(shard)
        _copy(source, path / f"{name}{PARTIAL}", shard.size)
        taken.copied[name] = records
        return
    # From an earlier run of this output: written by that run, and linked no more.
    with suppress(FileNotFoundError):
        os.unlink(path / f"{name}{PARTIAL}")
    taken.linked[name] = records


def _is_whole(file: Path, described: Mapping[str, Any]) -> bool:
    if file.is_symlink() or not file.is_file() or file.stat().st_size != described["size"]:
        return False
    return header_digest(file) == str(described["header_sha256"])


def _copy(source: Path, target: Path, size: int) -> None:
    """All but the first 8 bytes, the header's length, which a file that is not sealed states as 0.

    The system may let both files share the blocks. OSError.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    reading = os.open(source, flags)
    try:
        writing = open_own(target)
        try:
            position = _copy_through(reading, writing, 8, min(size, _ALIGNED))
            position = _copy_inside(reading, writing, position, size)
            _copy_through(reading, writing, position, size)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy_inside(reading: int, writing: int, position: int, size: int) -> int:
    """Copies in the system, as far as it can; returns how far that was."""
    while hasattr(os, "copy_file_range") and position < size:
        try:
            count = os.copy_file_range(reading, writing, size - position, position, position)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            break
        if count == 0:
            break
        position += count
    return position


def _copy_through(reading: int, writing: int, position: int, size: int) -> int:
    """Copies through a small buffer; returns `size`."""
    buffer = memoryview(bytearray(min(_STEP, max(0, size - position))))
    while position < size:
        part = buffer[: size - position]
        if read_all(reading, part, position) != part.nbytes:
            raise OSError(errno.EIO, "the file that it is copied from was cut short")
        write_all(writing, part, position)
        position += part.nbytes
    return size
