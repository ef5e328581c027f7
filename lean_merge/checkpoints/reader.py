"""Read tensors' bytes at given positions into buffers that the caller reuses."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lean_merge.checkpoints.descriptors import DescriptorPool
from lean_merge.checkpoints.elsewhere import FAR_FILES, Arrivals, Room, Tasks
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.identity import changed
from lean_merge.checkpoints.pagecache import cached_share, fetch
from lean_merge.errors import CheckpointError, shown

# A read of more than 2 GiB - 4 KiB is cut short by Linux and refused by macOS.
_LARGEST_READ = 1 << 30
_LARGEST_PAGE = 2 << 20
# This much is read at a time into the page cache, enough for the system to read ahead by itself.
_FETCHED = 1 << 20


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the writable bytes of `tensor`, without a copy.

    Parameters
    ----------
    tensor
        A contiguous tensor on the CPU, of any dtype and shape. The view keeps its memory alive.

    Raises
    ------
    ValueError
        The tensor is elsewhere or not contiguous.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("Only a contiguous tensor on the CPU has bytes to view.")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class TensorReader:
    """A reader of stored tensors, which several threads may use.

    Files are not mapped, so reading takes no resident memory beyond the caller's buffers. At most
    `max_files` files are held open.

    Parameters
    ----------
    max_files, files
        How many files may be open, or the open files of another reader.
    seen
        What `look_at` told of files before they were opened, which must still hold when they are
        read; a file that is not named may be any.
    room
        The memory and disk for what comes from other machines before it is read.

    Attributes
    ----------
    bytes_read
        The number of bytes that it has read so far.
    """

    def __init__(
        self,
        *,
        max_files: int = 64,
        files: DescriptorPool | None = None,
        seen: Mapping[Path, Mapping[str, Any]] | None = None,
        room: Room | None = None,
    ) -> None:
        # Where a pipe has taken the place of a file, reading fails and does not wait.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        self._files = DescriptorPool(flags, limit=max_files) if files is None else files
        self._seen = seen or {}
        self._arrivals, self._room = Arrivals(), room or Room()
        self._lock = threading.Lock()
        self._seek_lock = threading.Lock()
        self.bytes_read = 0

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def counting(self) -> TensorReader:
        """Return a reader of the same open files with its own count; it must not be closed."""
        found = TensorReader(files=self._files, seen=self._seen)
        found._arrivals = self._arrivals
        return found

    @contextmanager
    def expecting(self, tasks: Tasks, *, again: bool = False) -> Iterator[None]:
        """Let bytes from other machines come ahead of the tasks; `again` as `FarFile.arrivals`."""
        far = next(
            (FAR_FILES[each.file] for task in tasks for each in task if each.file in FAR_FILES),
            None,
        )
        if far is not None:
            self._arrivals = far.arrivals(tasks, self._room, again=again)
        try:
            yield
        finally:
            self._arrivals.close()

    def done(self, index: int) -> None:
        """Take note that what was expected for a task is needed no longer."""
        self._arrivals.done(index)

    def count(self, nbytes: int) -> None:
        """Add bytes that were read elsewhere for the same purpose."""
        with self._lock:
            self.bytes_read += nbytes

    def close(self) -> None:
        """Close the files; the reader cannot read any more."""
        self._files.close()

    def read_into(self, spec: TensorSpec, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes [start, start + len(out)) of a tensor.

        Parameters
        ----------
        spec
            The tensor.
        start
            The first byte, counted from the tensor's start.
        out
            A writable, contiguous view of bytes; see `as_bytes`.

        Raises
        ------
        CheckpointError
            The file has become shorter or cannot be read.
        ValueError
            The range is not inside the tensor.
        """
        self.read_spans(spec, [(start, out.nbytes)], out)

    def read_spans(
        self, spec: TensorSpec, spans: Sequence[tuple[int, int]], out: memoryview
    ) -> None:
        """Fill `out` with the bytes [start, start + length) of every span, one after the other.

        The errors are those of `read_into`.
        """
        for start, length in spans:
            if start < 0 or length < 0 or start + length > spec.nbytes:
                raise ValueError(
                    f"{spec.name} has {spec.nbytes} bytes, not [{start}, {start + length})."
                )
        if sum(length for _, length in spans) != out.nbytes:
            raise ValueError(f"The spans of {spec.name} do not fill {out.nbytes} bytes.")
        if out.nbytes == 0:
            return
        out = out.cast("B")
        done = 0
        if spec.file in FAR_FILES:
            ranges = [(spec.offset + start, spec.offset + start + count) for start, count in spans]
            self._arrivals.read(spec.file, ranges, out)
            self.count(out.nbytes)
            return
        try:
            with self._files.use(spec.file) as descriptor:
                for start, length in spans:
                    position, stop = spec.offset + start - done, done + length
                    while done < stop:
                        part = out[done : min(stop, done + _LARGEST_READ)]
                        count = self._read(descriptor, part, position + done)
                        if count == 0:
                            raise CheckpointError(
                                f"{spec.file}: truncated while reading tensor "
                                f"{shown(spec.name)}; the file has changed since its header was "
                                "read, so restore it."
                            )
                        done += count
                self._check_unchanged(spec, os.fstat(descriptor))
        except OSError as error:
            raise CheckpointError(
                f"{spec.file}: cannot read tensor {shown(spec.name)} "
                f"({error.strerror or error}); check the disk and the path."
            ) from error
        finally:
            self.count(done)

    def _check_unchanged(self, spec: TensorSpec, now: os.stat_result) -> None:
        """Raise CheckpointError if the file that was just read is not the one that was opened."""
        seen, times = self._seen.get(spec.file), (now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        if seen is not None and (seen["size"], seen["mtime_ns"], seen["ctime_ns"]) != times:
            raise changed(spec.file, "an input")

    def _read(self, descriptor: int, out: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [out], position)
        if hasattr(os, "pread"):
            data = os.pread(descriptor, out.nbytes, position)
        else:
            with self._seek_lock:
                os.lseek(descriptor, position, os.SEEK_SET)
                data = os.read(descriptor, out.nbytes)
        out[: len(data)] = data
        return len(data)

    def prefetch(self, spec: TensorSpec, start: int, length: int) -> None:
        """Bring bytes of a tensor into the page cache, as far as possible.

        Parameters
        ----------
        spec
            The tensor.
        start, length
            The bytes [start, start + length), as far as the tensor has them.
        """
        stop = min(start + length, spec.nbytes)
        # If anything is wrong, the read that follows reports it.
        with suppress(OSError, ValueError), self._files.use(spec.file) as descriptor:
            if fetch(descriptor, spec.offset + start, stop - start) or not hasattr(os, "pread"):
                return
            while start < stop:
                count = len(os.pread(descriptor, min(_FETCHED, stop - start), spec.offset + start))
                if count == 0:
                    return
                start += count

    def drop(self, spec: TensorSpec, start: int, length: int) -> None:
        """Ask the system to drop its cached pages of a tensor, if it can.

        A large page is dropped only as a whole, so bytes before `start` in its page are dropped
        too.
        """
        count = min(length, spec.nbytes - start)
        # A length of 0 would mean the rest of the file.
        if count <= 0 or not hasattr(os, "posix_fadvise"):
            return
        first = (spec.offset + start) // _LARGEST_PAGE * _LARGEST_PAGE
        count = spec.offset + start + count - first
        with suppress(OSError), self._files.use(spec.file) as descriptor:
            os.posix_fadvise(descriptor, first, count, os.POSIX_FADV_DONTNEED)

    def is_cached(self, spec: TensorSpec, start: int, length: int) -> bool:
        """Return whether most of a tensor's bytes [start, start + length) are in the page cache.

        If the system does not tell, the result is True.
        """
        try:
            if spec.file in FAR_FILES:
                return True
            with self._files.use(spec.file) as descriptor:
                return cached_share(descriptor, spec.offset + start, length) > 0.5
        except (OSError, ValueError):
            # A ValueError means that the file has become shorter; the read that follows says so.
            return True
