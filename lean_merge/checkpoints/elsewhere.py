"""The seam to files whose bytes lie on other machines.

Such a file has a stand-in here: a file of the same name and length, of which only the header was
written. Whoever wants the bytes of a tensor finds the stand-in's path in `FAR_FILES`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lean_merge.checkpoints.header import TensorSpec

ON_THE_WAY = 64 << 20
"""The most bytes that are on their way here, or wait here for a later tensor."""
Tasks = Sequence[Sequence[TensorSpec]]
"""The parts of stored tensors that each of several tasks reads, in the order of the tasks."""
Ranges = Sequence[tuple[int, int]]
"""The first byte of each range in its file, and the one after its last."""


@dataclass(frozen=True, slots=True)
class Room:
    """The bytes of memory and of disk that may hold what comes from other machines."""

    memory: int = 0
    disk: int = 0


class Arrivals:
    """Bytes from other machines; here they come as they are asked for, and elsewhere before."""

    def read(self, file: Path, ranges: Ranges, out: memoryview) -> None:
        """Fill `out` with the bytes of each range, one after the other. Raises CheckpointError."""
        FAR_FILES[file].read(ranges, out)

    def done(self, index: int) -> None:
        """Take note that a task needs its bytes no longer."""

    def close(self) -> None:
        """Let nothing more come."""


class FarFile(abc.ABC):
    """A file on another machine: the mark of its content, and the bytes fetched to open it."""

    etag: str
    opened = 0

    @abc.abstractmethod
    def read(self, ranges: Ranges, out: memoryview) -> None:
        """Fetch the bytes of each range into `out`. Raises CheckpointError."""

    @abc.abstractmethod
    def arrivals(self, tasks: Tasks, room: Room, *, again: bool) -> Arrivals:
        """Begin to bring what tasks read, from all far files; they will be read `again` or not."""


FAR_FILES: dict[Path, FarFile] = {}
"""The far files by their stand-ins."""


def far_bytes(specs: Iterable[TensorSpec]) -> int:
    """Return how many bytes of these parts of tensors lie on other machines."""
    return sum(spec.nbytes for spec in specs if spec.file in FAR_FILES)
