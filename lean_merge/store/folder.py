"""The output folder: written at known offsets, whole or visibly unfinished, never in between.

Shards are named *.partial and state a header of length 0, which every loader refuses, until all
bytes are on the disk. The last rename, of the index or of the only shard, makes the output whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lean_merge.checkpoints.checkpoint import INDEX, SINGLE
from lean_merge.checkpoints.descriptors import DescriptorPool
from lean_merge.errors import LeanMergeError, OutputError
from lean_merge.store.blocks import BLOCKS, BlockStore, kept_groups
from lean_merge.store.journal import (
    JOURNAL,
    JournalWriter,
    Record,
    commit_mark,
    shard_record,
    start_record,
)
from lean_merge.store.layout import Shard, extents, index_json
from lean_merge.store.ledger import Ledger
from lean_merge.store.opening import (
    Place,
    checked_place,
    discard_analysis,
    find_place,
    finished_tensors,
    unseal,
    whole_shards,
)
from lean_merge.store.state import OWN_ANALYSIS, PARTIAL
from lean_merge.store.storage import (
    explain,
    forget,
    open_own,
    preallocate,
    shorten,
    side_name,
    sync_data,
    sync_folder,
    write_all,
    write_new,
)


class OutputFolder:
    """Receives the bytes of the output; threads may share one.

    As a context manager it aborts on leaving the block, unless it was sealed.

    Attributes
    ----------
    final
        The folder that the user asked for.
    shards
        Its weight files.
    finished
        What `finish_tensor` was told of the tensors that an interrupted run had written, by name:
        they are on the disk, were read again, and need not be written.
    blocks
        Numbers that wait until a file's layout is known; an interrupted run's are among them.
    bytes_written
        Bytes of tensors so far, without those.
    sealed
        Whether it is whole.
    """

    def __init__(
        self, final: Path, shards: tuple[Shard, ...], place: Place, start: Mapping[str, Any]
    ) -> None:
        self.final = final
        self.shards = shards
        self.finished: Mapping[str, Any] = {}
        self.bytes_written = 0
        self.sealed = False
        self._place = place
        self._ledger = Ledger(start, shards)
        self._whole: Mapping[str, Mapping[str, Record]] = {}
        self.blocks = BlockStore(place.path / BLOCKS, self._ledger.finish_blocks)
        self._closed = False
        self._failed = False
        self._counter = threading.Lock()
        self._flushing = threading.Lock()
        self._files = DescriptorPool(os.O_RDWR, sync=True)

    @classmethod
    def create(
        cls,
        out: Path,
        shards: Sequence[Shard],
        *,
        inputs: Sequence[Path],
        overwrite: bool,
        run: Mapping[str, Any] | None = None,
        resume: bool = True,
        disk: int = 0,
    ) -> OutputFolder:
        """Checks that the output may be written, then reserves its files or takes up its own.

        Parameters
        ----------
        out
            The folder; made if absent.
        shards
            From `plan_shards`.
        inputs
            Folders or files of the run's checkpoints.
        overwrite
            Whether to replace what `out` holds; that stays whole until the new is complete.
        run
            What must be the same for bytes of an interrupted run to be used, as JSON has it;
            docs/durability.md lists its keys.
        resume
            Whether to use such bytes; else what an interrupted run left in `out` is removed.
        disk
            The most bytes that it takes of the disk, if that is more than `shards` do. Whether they
            are free is looked at once, before anything is made.

        Raises
        ------
        OutputError
            `out` is a file, an input, inside or around one, holds the unfinished output of another
            run, is not empty without `overwrite`, holds what is no model, or cannot be written.
        BudgetError
            The disk lacks the space.
        """
        final = checked_place(out, inputs)
        start = start_record(run or {}, shards)
        try:
            place = find_place(final, start, overwrite=overwrite, resume=resume, disk=disk)
            folder = cls(final, tuple(shards), place, start)
            try:
                folder._begin()
            except BaseException:
                folder._close()
                if place.journal is None:
                    folder._remove()
                raise
        except OSError as error:
            raise explain(final, error) from error
        return folder

    def _begin(self) -> None:
        path, journal = self._place.path, self._place.journal
        if journal is not None:
            unseal(path, journal)
        writer = JournalWriter(self._partial(JOURNAL), journal.length if journal else 0)
        self._ledger.open(writer, new=journal is None)
        # No shard is there without a journal that tells whose it is.
        sync_folder(path)
        for shard in self.shards:
            self._reserve(shard)
        sync_folder(path)
        found = {} if journal is None else finished_tensors(self.shards, journal, path)
        self._ledger.restore(found)
        self.finished = {name: record.get("result") for name, record in found.items()}
        if journal is not None:
            self._whole = whole_shards(journal, path)
            needed = not journal.added or self._whole.keys() != journal.added.keys()
            self.blocks.restore(kept_groups(journal.groups, path / BLOCKS, needed=needed))

    def add(self, shard: Shard) -> None:
        """Reserves one more weight file, whose layout only the run could tell.

        All that is finished is on the disk before. Where an interrupted run has written the very
        same, all of it, its tensors are finished.

        Raises
        ------
        BudgetError
            The disk lacks the space.
        OutputError
            The file cannot be made.
        """
        if self._closed:
            raise ValueError("The output folder is closed.")
        # What it is laid out from must not be lost with it.
        self.flush()
        file = self._partial(shard.file_name)
        records = self._whole.get(shard.file_name)
        journal = self._place.journal
        if journal is None or journal.added.get(shard.file_name) != shard_record(shard):
            records = None
        try:
            self._ledger.add_shard(shard, known=records is not None)
            if records is None:
                self._reserve(shard)
                sync_folder(self.path)
            else:
                self._ledger.restore(records)
        except OSError as error:
            raise explain(file, error) from error
        self.shards = (*self.shards, shard)

    def _reserve(self, shard: Shard) -> None:
        descriptor = open_own(self._partial(shard.file_name))
        try:
            shorten(descriptor, shard.size)
            preallocate(descriptor, shard.size)
            # The length before it stays 0 until all data is on the disk.
            write_all(descriptor, memoryview(bytes(8) + shard.header[8:]), 0)
        finally:
            os.close(descriptor)

    def _remove(self) -> None:
        """Leaves nothing of an output that was not even begun."""
        with suppress(OSError):
            names = [shard.file_name for shard in self.shards]
            for name in (*names, JOURNAL):
                self._partial(name).unlink(missing_ok=True)
            (self.path / BLOCKS).unlink(missing_ok=True)
        self._place.undo()

    @property
    def path(self) -> Path:
        """Where the files are now: beside `final` while that still holds what is replaced."""
        return self.final if self.sealed else self._place.path

    def own_analysis(self) -> Path:
        """The folder in which this output may keep an analysis of its own until it is sealed.

        Raises OutputError if a link is in its place: what that leads to is not to be written.
        """
        folder = self.path / OWN_ANALYSIS
        if folder.is_symlink():
            raise OutputError(f"{folder}: is a link to another folder; remove it.")
        return folder

    def note_analysis(self, found: Mapping[str, Any]) -> None:
        """What that found, as JSON has it; the sealed journal will tell."""
        self._ledger.add_analysis(found)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.sealed:
            self.abort()

    def _partial(self, name: str) -> Path:
        return self.path / f"{name}{PARTIAL}"

    def write_at(
        self,
        shard: Shard,
        offset: int,
        data: memoryview,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Writes bytes of tensors; returns before they are on the disk.

        Parameters
        ----------
        shard
            One of `shards`.
        offset
            Counted from the start of the file, as in `Shard.offsets`.
        data
            Contiguous bytes.
        spans
            Where they go, as (start, length) of each part counted from `offset`; by default all
            together. They lie inside the shard's data.

        Raises
        ------
        BudgetError
            The disk is full.
        OutputError
            The disk refuses otherwise.
        ValueError
            The range is not in the shard's data.
        """
        spans = [(0, data.nbytes)] if spans is None else spans
        for start, length in spans:
            if offset + start < len(shard.header) or offset + start + length > shard.size:
                raise ValueError(
                    f"{shard.file_name} has no data at {offset + start}, {length} bytes."
                )
        if data.nbytes == 0:
            return
        data, done = data.cast("B"), 0
        with self._open(shard) as descriptor:
            for start, length in spans:
                part = data[done : done + length]
                self._ledger.add_bytes(shard, offset + start, part)
                write_all(descriptor, part, offset + start)
                done += length
        with self._counter:
            self.bytes_written += data.nbytes

    def is_finished(self, name: str) -> bool:
        """Whether all of a tensor is written."""
        return self._ledger.is_finished(name)

    def finish_tensor(self, shard: Shard, name: str, result: Any = None) -> None:
        """A tensor's bytes were all written, so that an interrupted run need not write them again.

        Parameters
        ----------
        shard, name
            Which tensor.
        result
            What `finished` tells of it then, as JSON has it.

        Raises ValueError if not every byte of it was written, or some were twice.
        """
        self._ledger.finish_tensor(shard, name, result)

    def flush(self, shard: Shard | None = None) -> None:
        """Waits until what was written is on the disk: that of `shard`, and all that is finished.

        Raises as `write_at`.
        """
        with self._flushing:
            ready = self._ledger.take_unsaved()
            named = {each.file_name: each for each in self.shards}
            due = {str(record["shard"]) for record in ready if record["record"] == "tensor"}
            due |= {shard.file_name} if shard is not None else set()
            try:
                if any(record["record"] == "blocks" for record in ready):
                    self.blocks.sync()
                for name in due:
                    with self._open(named[name]) as descriptor:
                        sync_data(descriptor)
                        forget(descriptor)
                self._ledger.save(ready)
            except BaseException as error:
                self._failed = True
                if isinstance(error, OSError):
                    raise explain(self._partial(JOURNAL), error) from error
                raise

    @contextmanager
    def _open(self, shard: Shard) -> Iterator[int]:
        file = self._partial(shard.file_name)
        try:
            with self._files.use(file) as descriptor:
                yield descriptor
        except OSError as error:
            raise explain(file, error) from error

    def write_file(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Writes a side file, replacing one of the same name.

        Parameters
        ----------
        name
            A plain file name, or one in additional_chat_templates/; not that of a weight file.
        data
            Its content, at once or by parts.

        Raises
        ------
        OutputError
            The name is not such a name, or the disk refuses.
        BudgetError
            The disk is full.
        """
        if self._closed:
            raise ValueError("The output folder is closed.")
        taken = {INDEX, SINGLE, JOURNAL, *(shard.file_name for shard in self.shards)}
        file = self.path / side_name(name, taken=taken)
        try:
            file.parent.mkdir(exist_ok=True)
            if file.parent != self.path and file.parent.is_symlink():
                raise OutputError(f"{file.parent}: is a link to another folder; remove it.")
            self._write_new(file, name, data)
        except OSError as error:
            raise explain(file, error) from error

    def _write_new(self, file: Path, name: str, data: bytes | Iterable[bytes]) -> None:
        size, digest = write_new(file, [data] if isinstance(data, bytes) else data)
        self._ledger.add_file(name, size, digest)

    def seal(self) -> None:
        """Makes the output whole; everything must have been written.

        Raises
        ------
        OutputError, BudgetError
            The disk refuses; the output stays visibly unfinished, and what was to be replaced
            stays whole.
        """
        if self._closed:
            raise ValueError("The output folder is closed.")
        try:
            self._seal()
        except OSError as error:
            raise explain(self.final, error) from error

    def _seal(self) -> None:
        for shard in self.shards:
            for name in extents(shard):
                if not self._ledger.is_finished(name):
                    self.finish_tensor(shard, name)
            self.flush(shard)
        for shard in self.shards:
            self._complete(shard)
        path, names = self.path, [shard.file_name for shard in self.shards]
        mark = commit_mark(names)
        if mark is not None and mark not in names:
            self._write_new(self._partial(mark), mark, index_json(self.shards))
            names.append(mark)
        write_new(path / JOURNAL, [self._ledger.sealed(self.shards, self.blocks.sealed())])
        # Windows renames no open file.
        self._close_files()
        discard_analysis(path)
        for folder in {(path / name).parent for name in self._ledger.files} | {path}:
            sync_folder(folder)
        self._partial(JOURNAL).unlink()
        (path / BLOCKS).unlink(missing_ok=True)
        for name in names:
            if name == mark:
                sync_folder(path)
            os.replace(self._partial(name), path / name)
        sync_folder(path)
        if self._place.replacement is not None:
            self._place.replacement.switch()
        self.sealed = True
        self._close()

    def _complete(self, shard: Shard) -> None:
        """Gives a shard, whose data is on the disk, its header length."""
        with self._open(shard) as descriptor:
            write_all(descriptor, memoryview(shard.header)[:8], 0)
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
        if size != shard.size:
            raise OutputError(
                f"{self._partial(shard.file_name)}: has {size} bytes instead of {shard.size}, so "
                "something else wrote to it; run the merge again."
            )

    def abort(self) -> None:
        """Closes the files and leaves the output visibly unfinished; may be called twice.

        What is finished of it is noted, so that the next run goes on from there.
        """
        try:
            if self._ledger.has_unsaved and not (self._failed or self._closed):
                with suppress(LeanMergeError):
                    self.flush()
        finally:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._close_files()
        self._place.release()

    def _close_files(self) -> None:
        self._files.close()
        self._ledger.close()
        self.blocks.close()
