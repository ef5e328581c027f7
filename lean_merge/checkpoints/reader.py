"""Positional reads of tensors' bytes into buffers that the caller reuses."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import torch

from lean_merge.checkpoints.descriptors import DescriptorPool
from lean_merge.checkpoints.header import TensorSpec
from lean_merge.checkpoints.pagecache import cached_share, fetch
from lean_merge.errors import CheckpointError, shown

# One read of more than 2 GiB - 4 KiB is cut short by Linux and refused by macOS.
_LARGEST_READ = 1 << 30
_LARGEST_PAGE = 2 << 20
# Read at a time only to bring it into the page cache: enough that the system reads ahead by itself.
_FETCHED = 1 << 20


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The writable bytes of `tensor`, without a copy.

    Parameters
    ----------
    tensor
        Contiguous, on the CPU, of any dtype and shape. The view keeps its memory alive.

    Raises
    ------
    ValueError
        The tensor is elsewhere or not contiguous.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("Only a contiguous tensor on the CPU has bytes to view.")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class TensorReader:
    """Reads row blocks of stored tensors; threads may share one.

    Nothing that is read is mapped, so resident memory is the caller's buffers and no more. At
    most `max_files` files are held open.

    Attributes
    ----------
    bytes_read
        How many bytes it has read so far.
    """

    def __init__(self, *, max_files: int = 64, files: DescriptorPool | None = None) -> None:
        self._files = DescriptorPool(os.O_RDONLY, limit=max_files) if files is None else files
        self._lock = threading.Lock()
        self._seek_lock = threading.Lock()
        self.bytes_read = 0

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def counting(self) -> TensorReader:
        """A reader of the same open files with a count of its own; not to be closed."""
        return TensorReader(files=self._files)

    def count(self, nbytes: int) -> None:
        """Adds what was read for the same purpose elsewhere."""
        with self._lock:
            self.bytes_read += nbytes

    def close(self) -> None:
        """Closes its files; it cannot read any more."""
        self._files.close()

    def read_into(self, spec: TensorSpec, start: int, out: memoryview) -> None:
        """Fills `out` with the bytes [start, start + len(out)) of a tensor.

        Parameters
        ----------
        spec
            The tensor.
        start
            First byte, counted from the tensor's own first.
        out
            Writable, contiguous, of bytes; see `as_bytes`.

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
        """Fills `out` with the bytes [start, start + length) of every span, one after the other.

        Raises as `read_into`.
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
        except OSError as error:
            raise CheckpointError(
                f"{spec.file}: cannot read tensor {shown(spec.name)} "
                f"({error.strerror or error}); check the disk and the path."
            ) from error
        finally:
            self.count(done)

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
        """Brings bytes of a tensor into the page cache, as far as it can.

        Parameters
        ----------
        spec
            The tensor.
        start, length
            The bytes [start, start + length), as far as the tensor has them.
        """
        stop = min(start + length, spec.nbytes)
        # Whatever is wrong, the read that follows reports it.
        with suppress(OSError, ValueError), self._files.use(spec.file) as descriptor:
            if fetch(descriptor, spec.offset + start, stop - start) or not hasattr(os, "pread"):
                return
            while start < stop:
                count = len(os.pread(descriptor, min(_FETCHED, stop - start), spec.offset + start))
                if count == 0:
                    return
                start += count

    def drop(self, spec: TensorSpec, start: int, length: int) -> None:
        """Asks the system to forget its cached pages of a tensor; does nothing where it cannot.

        A large page is given up only as a whole, so what precedes `start` in its page goes too.
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
        """Whether most of a tensor's bytes [start, start + length) wait in the page cache.

        True where the system does not tell.
        """
        try:
            with self._files.use(spec.file) as descriptor:
                return cached_share(descriptor, spec.offset + start, length) > 0.5
        except (OSError, ValueError):
            # A ValueError is a file that has become shorter: the read that follows says so.
            return True
