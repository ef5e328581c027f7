"""Write one output from several processes: one makes and seals the folder, the others join it.

Each process writes the bytes of its own tensors at their places, and puts its blocks into a region
of its own. Who joins keeps a journal of its own, whose lines the one that made the folder takes
over once all are done; if any of them dies, the next run on the folder does so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from lean_merge.errors import OutputError
from lean_merge.store.blocks import BLOCKS, BlockStore, stored_groups
from lean_merge.store.digest import RangeDigests
from lean_merge.store.folder import OutputFolder
from lean_merge.store.journal import JournalWriter, Record, decode_line, encode_line, read_journal
from lean_merge.store.layout import Shard, extents
from lean_merge.store.state import PARTS, UNSEALED, join_parts
from lean_merge.store.storage import FolderLock, explain, open_own
from lean_merge.store.workplace import Workplace

_APART = 1 << 20
"""Regions of blocks begin at multiples of this, so that no page of memory holds two of them."""


class _Region(BlockStore):
    """Blocks in a part of a file that other processes write to."""

    def __init__(self, file: Path, finished: Callable[[Record], None], start: int) -> None:
        super().__init__(file, finished)
        self._end = start

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_own(self._file)
        return self._descriptor


class JoinedFolder(OutputFolder):
    """The folder of an output that another process has made, and will seal.

    Parameters
    ----------
    path
        Where it is now.
    shards, start
        Its weight files, and the first record of its journal.
    part
        This process's number, by which its journal is named.
    blocks_from
        The offset at which its region of blocks begins.

    Raises
    ------
    OutputError
        The folder is gone, or another run has it.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[Shard],
        start: Mapping[str, Any],
        *,
        part: int,
        blocks_from: int,
    ) -> None:
        place = Workplace(path, path)
        super().__init__(place, shards, start)
        self._journal = JournalWriter(path / PARTS.replace("*", f"part-{part:05d}"), start)
        self.blocks = _Region(path / BLOCKS, self._journal.finish, blocks_from)
        try:
            lock = _locked(path)
            place.locks += [] if lock is None else [lock]
            self._journal.open(0)
        except OSError as error:
            self._close()
            raise explain(path, error) from error
        for shard in shards:
            self._extents[shard.file_name] = extents(shard)
            self._digests[shard.file_name] = RangeDigests(shard.offsets.values())


def share(folder: OutputFolder, largest: int, size: int) -> tuple[Record, list[int]]:
    """Let `size` processes write to `folder`, which is held as long as one of them lives.

    Return the first record of its journal, and where the region of blocks of each process begins.
    `largest` is the most bytes that the blocks can take. Raises OutputError.
    """
    for lock in folder._place.locks:
        _lock_with_others(lock, folder.path)
    try:
        if not folder.shards:
            # Whoever opens it first cuts off what no finished group holds.
            folder.blocks._opened()
    except OSError as error:
        raise explain(folder.path, error) from error
    begin, step = folder.blocks._end, -(-largest // _APART) * _APART + _APART
    first = -(-begin // _APART) * _APART
    start = decode_line(folder._journal._start)
    assert start is not None
    return start, [begin, *(first + rank * step for rank in range(1, size))]


def take_over(folder: OutputFolder, again: Set[str]) -> None:
    """Take over what the processes that joined `folder` have finished.

    The tensors in `again` are read once more, and count only if their bytes are intact. Raises
    OutputError, BudgetError.
    """
    folder.flush()
    folder._journal.close()
    folder.blocks.close()
    try:
        join_parts(folder.path)
        journal = read_journal(folder.path / UNSEALED)
        if journal is None:
            raise OutputError(f"{folder.path}: has lost its journal; run the merge again.")
        folder._journal.open(journal.length)
        doubted = {name: each for name, each in journal.tensors.items() if name in again}
        found = folder._intact_tensors(replace(journal, tensors=doubted))
    except OSError as error:
        raise explain(folder.path, error) from error
    found |= {name: each for name, each in journal.tensors.items() if name not in again}
    folder._journal.tensors.update((name, encode_line(each)) for name, each in found.items())
    folder.finished = {name: each.get("result") for name, each in found.items()}
    folder.blocks.restore(stored_groups(journal.groups))


def _locked(folder: Path) -> FolderLock | None:
    if os.name == "nt":
        return None
    lock = FolderLock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY))
    try:
        _lock_with_others(lock, folder)
    except BaseException:
        lock.release()
        raise
    return lock


def _lock_with_others(lock: FolderLock, folder: Path) -> None:
    """Hold a folder so that the other processes of this job can hold it too, and nobody else."""
    import fcntl

    try:
        fcntl.flock(lock._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{folder}: another lean-merge is writing there; wait for it or choose another folder."
        ) from None
    except OSError:
        # The file system has no locks, so go on without one.
        return
