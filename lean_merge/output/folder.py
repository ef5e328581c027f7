"""The output folder: written at known offsets, whole or visibly unfinished, never in between.

Shards are named *.partial and state a header of length 0, which every loader refuses, until all
bytes are on the disk. The last rename, of the index or of the only shard, makes the output whole.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from lean_merge.checkpoints.checkpoint import INDEX, SINGLE
from lean_merge.checkpoints.descriptors import DescriptorPool
from lean_merge.errors import OutputError
from lean_merge.output.layout import Shard, index_json
from lean_merge.output.replace import Replacement, refuse_to_lose
from lean_merge.output.storage import (
    check_free_space,
    explain,
    folder_bytes,
    forget,
    lock_folder,
    preallocate,
    refuse_inputs,
    side_name,
    sync_data,
    sync_folder,
    write_all,
)

PARTIAL = ".partial"


class OutputFolder:
    """Receives the bytes of the output; threads may share one.

    As a context manager it aborts on leaving the block, unless it was sealed.

    Attributes
    ----------
    final
        The folder that the user asked for.
    shards
        Its weight files.
    bytes_written
        Bytes of tensors so far.
    sealed
        Whether it is whole.
    """

    def __init__(
        self,
        final: Path,
        shards: tuple[Shard, ...],
        replacement: Replacement | None,
        lock: int | None,
    ) -> None:
        self.final = final
        self.shards = shards
        self.bytes_written = 0
        self.sealed = False
        self._replacement = replacement
        self._lock_descriptor = lock
        self._closed = False
        self._counter = threading.Lock()
        self._files = DescriptorPool(os.O_RDWR, sync=True)

    @classmethod
    def create(
        cls, out: Path, shards: Sequence[Shard], *, inputs: Sequence[Path], overwrite: bool
    ) -> OutputFolder:
        """Checks that the output may be written, then reserves its files.

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

        Raises
        ------
        OutputError
            `out` is a file, an input, inside or around one, is not empty without `overwrite`,
            holds what is no model, or cannot be written.
        BudgetError
            The disk lacks the space.
        """
        final = _checked_place(out, inputs)
        try:
            return cls._create(final, tuple(shards), overwrite=overwrite)
        except OSError as error:
            raise explain(final, error) from error

    @classmethod
    def _create(cls, final: Path, shards: tuple[Shard, ...], *, overwrite: bool) -> OutputFolder:
        replacement = Replacement(final)
        replacement.recover()
        filled = final.is_dir() and any(final.iterdir())
        if filled:
            refuse_to_lose(final, overwrite=overwrite)
        needed = sum(shard.size for shard in shards)
        check_free_space(final, needed, freed=folder_bytes(replacement.new))
        replacement.discard_new()
        path = replacement.new if filled else final
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
        folder = cls(final, shards, replacement if filled else None, lock)
        try:
            for shard in shards:
                folder._reserve(shard)
        except BaseException:
            folder._close()
            for shard in shards:
                folder._partial(shard.file_name).unlink(missing_ok=True)
            if made:
                with suppress(OSError):
                    path.rmdir()
            raise
        return folder

    def add(self, shard: Shard) -> None:
        """Reserves one more weight file, whose layout only the run could tell.

        Raises
        ------
        BudgetError
            The disk lacks the space.
        OutputError
            The file cannot be made.
        """
        if self._closed:
            raise ValueError("The output folder is closed.")
        check_free_space(self.path, shard.size, freed=0)
        try:
            self._reserve(shard)
        except OSError as error:
            raise explain(self.path, error) from error
        self.shards = (*self.shards, shard)

    def _reserve(self, shard: Shard) -> None:
        file = self._partial(shard.file_name)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        with self._files.use(file) as descriptor:
            preallocate(descriptor, shard.size)
            # The length before it stays 0 until all data is on the disk.
            write_all(descriptor, memoryview(shard.header)[8:], 8)

    @property
    def path(self) -> Path:
        """Where the files are now: beside `final` while that still holds what is replaced."""
        if self._replacement is None or self.sealed:
            return self.final
        return self._replacement.new

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
                write_all(descriptor, data[done : done + length], offset + start)
                done += length
        with self._counter:
            self.bytes_written += data.nbytes

    def flush(self, shard: Shard) -> None:
        """Waits until what was written to `shard` is on the disk. Raises as `write_at`."""
        with self._open(shard) as descriptor:
            sync_data(descriptor)
            forget(descriptor)

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
        taken = {INDEX, SINGLE, *(shard.file_name for shard in self.shards)}
        file = self.path / side_name(name, taken=taken)
        try:
            file.parent.mkdir(exist_ok=True)
            with open(file, "wb") as stream:
                stream.writelines([data] if isinstance(data, bytes) else data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise explain(file, error) from error

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
            self.flush(shard)
        for shard in self.shards:
            with self._open(shard) as descriptor:
                write_all(descriptor, memoryview(shard.header)[:8], 0)
                os.fsync(descriptor)
                size = os.fstat(descriptor).st_size
            if size != shard.size:
                raise OutputError(
                    f"{self._partial(shard.file_name)}: has {size} bytes instead of {shard.size}, "
                    "so something else wrote to it; run the merge again."
                )
        names = [shard.file_name for shard in self.shards]
        if len(names) > 1:
            self.write_file(f"{INDEX}{PARTIAL}", index_json(self.shards))
            names.append(INDEX)
        # Windows renames no open file.
        self._files.close()
        path = self.path
        for name in names:
            if name == names[-1]:
                sync_folder(path)
            os.replace(self._partial(name), path / name)
        sync_folder(path)
        if self._replacement is not None:
            self._replacement.switch()
        self.sealed = True
        self._close()

    def abort(self) -> None:
        """Closes the files and leaves the output visibly unfinished; may be called twice.

        What was being written beside a folder to replace is removed, and that folder left whole.
        """
        self._close()
        if self._replacement is not None and not self.sealed:
            shutil.rmtree(self._replacement.new, ignore_errors=True)

    def _close(self) -> None:
        self._closed = True
        self._files.close()
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None


def check_output(
    out: Path, shards: Sequence[Shard], *, inputs: Sequence[Path], overwrite: bool
) -> None:
    """Raises what `OutputFolder.create` would, and touches nothing; for plans."""
    final = _checked_place(out, inputs)
    if final.is_dir() and any(final.iterdir()):
        refuse_to_lose(final, overwrite=overwrite)
    check_free_space(final, sum(shard.size for shard in shards), freed=0)


def _checked_place(out: Path, inputs: Sequence[Path]) -> Path:
    final = out.expanduser().resolve()
    if final.exists() and not final.is_dir():
        raise OutputError(f"{final}: is a file; choose a folder.")
    refuse_inputs(final, inputs)
    return final
