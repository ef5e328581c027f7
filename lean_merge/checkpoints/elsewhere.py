"""The seam to files whose bytes lie on other machines.

Such a file has a stand-in here: a file of the same name and length, of which only the header was
written. Everything that looks at headers reads stand-ins as it reads other files. Whoever wants the
bytes of a tensor finds the stand-in's path in `FAR`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from pathlib import Path

from lean_merge.checkpoints.header import TensorSpec

ON_THE_WAY = 64 << 20
"""The most bytes that are on their way here, or wait here for a later tensor."""
Tasks = Sequence[Sequence[TensorSpec]]
"""The parts of stored tensors that each of several tasks reads, in the order of the tasks."""


class Arrivals(abc.ABC):
    """Bytes from other machines, which come in the order of tasks and stay until a task is done."""

    @abc.abstractmethod
    def read(self, file: Path, ranges: Sequence[tuple[int, int]], out: memoryview) -> None:
        """Fill `out` with the bytes [start, stop) of each range, one after the other."""

    @abc.abstractmethod
    def done(self, index: int) -> None:
        """Take note that task `index` needs its bytes no longer."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let nothing more arrive."""


class FarFile(abc.ABC):
    """A file on another machine.

    Attributes
    ----------
    etag
        The mark of its content that the other machine gives.
    opened
        The bytes that were fetched to read its header.
    """

    etag: str
    opened = 0

    @abc.abstractmethod
    def read(self, ranges: Sequence[tuple[int, int]], out: memoryview) -> None:
        """Fill `out` with the bytes [start, stop) of each range at once. Raises CheckpointError."""

    @abc.abstractmethod
    def arrivals(self, tasks: Tasks, room: int) -> Arrivals:
        """Begin to bring what the tasks read, from this file and others, into `room` bytes."""


FAR: dict[Path, FarFile] = {}
"""The far files by their stand-ins."""


def far_bytes(specs: Iterable[TensorSpec]) -> int:
    """Return how many bytes of these parts of tensors lie on other machines."""
    return sum(spec.nbytes for spec in specs if spec.file in FAR)
