"""Write the output folder at known offsets; it is whole or visibly unfinished, never in between.

Shards are named *.partial and state a header of length 0, which every loader refuses, until all
bytes are on the disk. The last rename, of the index or of the only shard, makes the output whole.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from lean_merge.checkpoints.descriptors import DescriptorPool
from lean_merge.checkpoints.weightfiles import INDEX, SINGLE
from lean_merge.errors import LeanMergeError, OutputError
from lean_merge.store.blocks import BLOCKS, BlockStore, intact_groups
from lean_merge.store.digest import RangeDigests, range_digest
from lean_merge.store.journal import (
    JOURNAL,
    Journal,
    JournalWriter,
    Record,
    commit_mark,
    encode_line,
    start_record,
)
from lean_merge.store.layout import Shard, extents, index_json
from lean_merge.store.state import OWN_ANALYSIS, PARTIAL, UNSEALED
from lean_merge.store.storage import (
    explain,
    forget,
    open_own,
    set_length,
    sync_data,
    sync_folder,
    write_all,
    write_new,
)
from lean_merge.store.workplace import (
    Workplace,
    checked_place,
    discard_analysis,
    find_workplace,
    publish,
)

_STEP = 4 << 20
_SIDE_FOLDERS = frozenset({"", "additional_chat_templates"})


Spans = Sequence[tuple[int, int]]
"""(start, length) in bytes of each part of what is written."""


class WriteBytes(Protocol):
    """A function that writes bytes of one tensor; any thread may call it."""

    def __call__(self, offset: int, data: memoryview, spans: Spans | None = None) -> None:
        """Write `data` at `offset` from the tensor's start, or in parts at `spans` from there."""


class OutputFolder:
    """The folder of an output, to which several threads may write.

    As a context manager it calls `abort` on leaving the block, unless it was sealed.

    Attributes
    ----------
    final
        The folder that the user asked for.
    shards
        Its weight files.
    finished
        The tensors that an interrupted run had written, by name, each with the result that
        `finish_tensor` was given. They are on the disk, were read again, and need not be written.
    blocks
        Numbers that wait until a file's layout is known, those of an interrupted run included.
    sealed
        Whether the output is whole.
    """

    def __init__(self, place: Workplace, shards: Sequence[Shard], start: Record) -> None:
        self.final = place.final
        self.shards = tuple(shards)
        self.finished: Mapping[str, Any] = {}
        self.sealed = False
        self._place = place
        self._closed = False
        self._failed = False
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._files = DescriptorPool(os.O_RDWR, sync=True)
        self._extents: dict[str, dict[str, tuple[int, int]]] = {}
        self._digests: dict[str, RangeDigests] = {}
        self._unsynced: set[Path] = set()
        self._journal = JournalWriter(place.path / UNSEALED, start)
        self.blocks = BlockStore(place.path / BLOCKS, self._journal.finish)

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
        """Check that the output may be written, then make its files or continue with its own.

        Parameters
        ----------
        out
            The folder, which is made if it is absent.
        shards
            The weight files, from `plan_shards`.
        inputs
            Folders or files of the run's checkpoints.
        overwrite
            Whether to replace what `out` holds; that stays whole until the new is complete.
        run
            The facts that must agree for bytes of an interrupted run to be used, as plain data for
            JSON; docs/durability.md lists the keys.
        resume
            Whether to use an interrupted run's bytes; else what it left in `out` is removed.
        disk
            The most bytes that the output takes on the disk, if that is more than `shards` take. A
            new output is refused before anything is made if they are not free.

        Raises
        ------
        OutputError
            `out` is a file, or is an input, or lies inside or around one; or it holds the
            unfinished output of another run, or what is no model; or it is not empty and
            `overwrite` is not set; or it cannot be written.
        BudgetError
            The disk has too little space.
        """
        final = checked_place(out, inputs)
        start = start_record(run or {}, shards)
        try:
            place = find_workplace(final, start, overwrite=overwrite, resume=resume, disk=disk)
            folder = cls(place, shards, start)
            try:
                folder._begin(place.journal)
            except BaseException:
                folder._close_files()
                if place.journal is None:
                    folder._remove()
                folder._close()
                raise
        except OSError as error:
            raise explain(final, error) from error
        return folder

    def _begin(self, journal: Journal | None) -> None:
        self._journal.open(0 if journal is None else journal.length)
        # A shard must never be there without a journal that tells whose it is, nor beside a sealed
        # journal, which an interrupted run may have written.
        (self.path / JOURNAL).unlink(missing_ok=True)
        sync_folder(self.path)
        for shard in self.shards:
            self._make(shard)
        sync_folder(self.path)
        if journal is not None:
            found = self._intact_tensors(journal)
            self._journal.tensors.update((name, encode_line(each)) for name, each in found.items())
            self.finished = {name: each.get("result") for name, each in found.items()}
            self.blocks.restore(intact_groups(journal.groups, self.path / BLOCKS))

    def _make(self, shard: Shard) -> None:
        """Make a weight file of full length whose header has the length 0. Raises OSError."""
        file = self._partial(shard.file_name)
        descriptor = open_own(file)
        try:
            set_length(descriptor, shard.size)
            write_all(descriptor, memoryview(bytes(8) + shard.header[8:]), 0)
        finally:
            os.close(descriptor)
        self._unsynced.add(file)
        self._extents[shard.file_name] = extents(shard)
        self._digests[shard.file_name] = RangeDigests(shard.offsets.values())

    def _intact_tensors(self, journal: Journal) -> dict[str, Record]:
        """Return the records of tensors whose bytes still have their digests. Raises OSError."""
        found: dict[str, Record] = {}
        buffer = memoryview(bytearray(_STEP))
        for shard in self.shards:
            with open(self._partial(shard.file_name), "rb", buffering=0) as stream:
                for name, (start, length) in self._extents[shard.file_name].items():
                    record = journal.tensors.get(name)
                    if record is None or record["shard"] != shard.file_name:
                        continue
                    digest = range_digest(stream.fileno(), start, length, buffer)
                    if digest == record["crc32_data"]:
                        found[name] = record
        return found

    def _remove(self) -> None:
        """Remove all of an output that could not even be begun."""
        with suppress(OSError):
            for name in (*(shard.file_name for shard in self.shards), JOURNAL):
                self._partial(name).unlink(missing_ok=True)
        self._place.undo()

    @property
    def path(self) -> Path:
        """Return where the files are now: beside `final` while that holds an old output."""
        return self.final if self.sealed else self._place.path

    def _partial(self, name: str) -> Path:
        return self.path / f"{name}{PARTIAL}"

    def own_analysis(self) -> Path:
        """Return the folder in which this output may keep an analysis until it is sealed.

        Raises OutputError if a link is in its place, since nothing may be written where that leads.
        """
        folder = self.path / OWN_ANALYSIS
        if folder.is_symlink():
            raise OutputError(f"{folder}: is a link to another folder; remove it.")
        return folder

    def note_analysis(self, found: Mapping[str, Any]) -> None:
        """Note for the sealed journal what the output's own analysis found, as JSON has it."""
        self._journal.add_analysis(found)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.sealed:
            self.abort()

    def add(self, shard: Shard) -> None:
        """Make one more weight file, whose layout only the run could tell.

        Before it is made, all that is finished is brought to the disk. Raises OutputError or
        BudgetError where the disk refuses.
        """
        self._check_open()
        # The blocks from which it is laid out must be on the disk before it is begun.
        self.flush()
        with self._explained(self._partial(shard.file_name)):
            self._journal.add_shard(shard)
            self._make(shard)
            sync_folder(self.path)
        self.shards = (*self.shards, shard)

    def writer(self, shard: Shard, name: str) -> WriteBytes:
        """Return the function that writes the bytes of a tensor; each byte must be written once.

        That function returns before they are on the disk, and raises BudgetError where the disk is
        full, OutputError where it refuses otherwise, and ValueError for bytes outside the tensor.

        Parameters
        ----------
        shard
            One of `shards`.
        name
            One of its tensors.
        """
        file = self._partial(shard.file_name)
        begin, size = self._extents[shard.file_name][name]
        digests = self._digests[shard.file_name]

        def write(offset: int, data: memoryview, spans: Spans | None = None) -> None:
            if data.nbytes == 0:
                return
            data, done = data.cast("B"), 0
            with self._explained(file), self._files.use(file) as descriptor:
                for start, length in [(0, data.nbytes)] if spans is None else spans:
                    first = offset + start
                    if first < 0 or first + length > size:
                        raise ValueError(f"{name} has no data at {first}, {length} bytes.")
                    part = data[done : done + length]
                    digests.add(begin + first, part)
                    write_all(descriptor, part, begin + first)
                    done += length
            with self._lock:
                self._unsynced.add(file)

        return write

    def finish_tensor(self, shard: Shard, name: str, result: Any = None) -> None:
        """Note that a tensor's bytes were all written, so that no later run need write them again.

        `result`, as JSON has it, is what a later run finds for it in `finished`. Raises ValueError
        if some byte of the tensor was not written, or was written twice.
        """
        start, length = self._extents[shard.file_name][name]
        self._journal.finish(
            {
                "record": "tensor",
                "name": name,
                "shard": shard.file_name,
                "crc32_data": self._digests[shard.file_name].take(start, length),
                "result": result,
            }
        )

    def flush(self) -> None:
        """Wait until what was written is on the disk, and the journal tells what is finished.

        Raises OutputError or BudgetError where the disk refuses.
        """
        with self._flushing:
            ready = self._journal.take_waiting()
            with self._lock:
                unsynced, self._unsynced = self._unsynced, set()
            try:
                with self._explained(self._partial(JOURNAL)):
                    self.blocks.sync()
                    for file in unsynced:
                        with self._explained(file), self._files.use(file) as descriptor:
                            sync_data(descriptor)
                            forget(descriptor)
                    self._journal.save(ready)
            except BaseException:
                self._failed = True
                raise

    @contextmanager
    def _explained(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain(file, error) from error

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("The output folder is closed.")

    def write_file(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Write a side file, replacing one of the same name.

        Parameters
        ----------
        name
            A plain file name, or one in additional_chat_templates/; not that of a weight file.
        data
            Its content, whole or in parts.

        Raises
        ------
        OutputError
            The name is none of these, or the disk refuses.
        BudgetError
            The disk is full.
        """
        self._check_open()
        file = self.side_file(name)
        with self._explained(file):
            file.parent.mkdir(exist_ok=True)
            self._write_new(file, name, data)

    def side_file(self, name: str) -> Path:
        """Return the path of a side file. Raises OutputError where it could not be written."""
        parent, _, last = name.replace("\\", "/").rpartition("/")
        taken = {"", ".", "..", INDEX, SINGLE, JOURNAL, *(shard.file_name for shard in self.shards)}
        if parent not in _SIDE_FOLDERS or last in taken:
            raise OutputError(f"{name!r} cannot be the name of a side file; rename it in the MLLM.")
        file = self.path / PurePosixPath(parent, last)
        if file.parent != self.path and file.parent.is_symlink():
            raise OutputError(f"{file.parent}: is a link to another folder; remove it.")
        with self._explained(file), suppress(FileNotFoundError):
            # This fails for a name that is too long, too, and for one inside of a file.
            if stat.S_ISDIR(os.lstat(file).st_mode):
                raise OutputError(f"{file}: is a folder, where a file is to be; remove it.")
        return file

    def _write_new(self, file: Path, name: str, data: bytes | Iterable[bytes]) -> None:
        size, digest = write_new(file, [data] if isinstance(data, bytes) else data)
        self._journal.add_file(name, size, digest)

    def seal(self) -> None:
        """Make the output whole; everything must have been written.

        Raises
        ------
        OutputError, BudgetError
            The disk refuses; the output stays visibly unfinished, and what was to be replaced
            stays whole.
        """
        self._check_open()
        with self._explained(self.final):
            self._seal()

    def _seal(self) -> None:
        for shard in self.shards:
            for name in shard.offsets:
                if name not in self._journal.tensors:
                    self.finish_tensor(shard, name)
        self.flush()
        for shard in self.shards:
            self._complete(shard)
        path, names = self.path, [shard.file_name for shard in self.shards]
        mark = commit_mark(names)
        if mark is not None and mark not in names:
            self._write_new(self._partial(mark), mark, index_json(self.shards))
        write_new(path / JOURNAL, self._journal.sealed(self.shards, self.blocks.sealed()))
        # Windows cannot rename an open file.
        self._close_files()
        discard_analysis(path)
        for folder in {(path / name).parent for name in self._journal.files} | {path}:
            sync_folder(folder)
        # From here on the output is sealed: if this run is interrupted, the next one does the rest.
        self._partial(JOURNAL).unlink()
        sync_folder(path)
        publish(path, names)
        if path != self.final:
            self._place.switch()
        self.sealed = True
        self._close()

    def _complete(self, shard: Shard) -> None:
        """Write the header length of a shard whose data is on the disk. Raises OSError."""
        file = self._partial(shard.file_name)
        with self._files.use(file) as descriptor:
            write_all(descriptor, memoryview(shard.header)[:8], 0)
            os.fsync(descriptor)
            size = os.fstat(descriptor).st_size
        if size != shard.size:
            raise OutputError(
                f"{file}: has {size} bytes instead of {shard.size}, so something else wrote to it; "
                "run the merge again."
            )

    def abort(self) -> None:
        """Close the files and leave the output visibly unfinished; may be called twice.

        The journal notes the tensors that are finished, so that the next run goes on from there.
        """
        try:
            if self._journal.has_waiting and not (self._failed or self._closed):
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
        self._journal.close()
        self.blocks.close()
