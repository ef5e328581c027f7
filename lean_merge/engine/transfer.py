"""Bringing tiles to a device: host slots and landing places used in turn, copies beside products.

A device works off two queues, of copies and of products, and both run behind the program. So a
place may be written again only after an `Event` says that what was asked of it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lean_merge.engine.workers import Batch, Workers

ALIGNMENT = 256
"""Bytes to which slots are aligned, as copies like it."""


class Event(Protocol):
    """A point in one of the device's queues."""

    def synchronize(self) -> None:
        """Block the calling thread until everything before the point is done."""


class Queues(Protocol):
    """A device's queue of copies and its queue of products; each does its work in order."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Ask for a copy from the host to the device; the call need not wait for it."""

    def copied(self) -> Event:
        """The end, so far, of the queue of copies."""

    def computed(self) -> Event:
        """The end, so far, of the queue of products."""

    def copy_after(self, event: Event) -> None:
        """Later copies wait for the event."""

    def compute_after(self, event: Event) -> None:
        """Later products wait for the event."""

    def synchronize(self) -> None:
        """Block until both queues are empty."""


class Done:
    """The event of what is done before the call returns."""

    def synchronize(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class Parcel:
    """What goes over at once: tensors of one shape and dtype.

    Attributes
    ----------
    fill
        Writes all of them on the host, in a worker thread.
    count, shape, dtype
        How many, and of what kind.
    targets
        Where they stay on the device; empty for a landing place that is used again.
    """

    fill: Callable[[Sequence[Tensor]], None]
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    targets: Sequence[Tensor] = ()


class _Slot:
    """A place on the host, and when the copy of what it holds is done."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.copied: Event = Done()

    def fill(self, parcel: Parcel) -> list[Tensor]:
        views = _cut(self.memory, parcel)
        parcel.fill(views)
        return views


class Uploader:
    """Sends parcels to a device in order, from host slots used in turn.

    Parameters
    ----------
    queues
        Of the device.
    workers
        Who fills the slots.
    host : Tensor, uint8, 1-D
        Pinned memory that is cut into `slots` equal ones, two at least.
    """

    def __init__(self, queues: Queues, workers: Workers, host: Tensor, *, slots: int) -> None:
        self._queues = queues
        self._workers = workers
        size = host.numel() // slots // ALIGNMENT * ALIGNMENT
        self._slots = [_Slot(host[n * size : (n + 1) * size]) for n in range(slots)]

    def send(
        self, parcels: Sequence[Parcel], landing: Sequence[Tensor]
    ) -> Generator[Sequence[Tensor], None, None]:
        """The parcels' tensors on the device, one parcel after the other.

        They are to be used by products that are asked for before the next parcel is: after that,
        one that has no targets of its own may be overwritten. While one parcel is used, the next
        is copied and those after it are filled.

        Parameters
        ----------
        parcels
            In the order in which they are wanted.
        landing : sequence of Tensor, uint8, 1-D
            Places on the device for parcels without targets, used in turn.
        """
        queues, slots = self._queues, self._slots
        # What lies in the landing places and targets may still be in use by earlier products.
        used = [queues.computed()] * max(1, len(landing))
        queues.copy_after(used[0])
        filling: deque[Batch[list[Tensor]]] = deque()
        asked = landed = 0
        try:
            for position, parcel in enumerate(parcels):
                while asked < min(len(parcels), position + len(slots)):
                    slot = slots[asked % len(slots)]
                    slot.copied.synchronize()
                    filling.append(self._workers.start(slot.fill, [parcels[asked]]))
                    asked += 1
                filled = filling[0].results()[0]
                filling.popleft()
                targets, place = parcel.targets, landed % len(used)
                if not targets:
                    queues.copy_after(used[place])
                    targets = _cut(landing[place], parcel)
                try:
                    for source, target in zip(filled, targets, strict=True):
                        queues.copy(source, target)
                finally:
                    arrived = slots[position % len(slots)].copied = queues.copied()
                    queues.compute_after(arrived)
                try:
                    yield targets
                finally:
                    if not parcel.targets:
                        used[place] = queues.computed()
                        landed += 1
        finally:
            self._settle(filling)

    @staticmethod
    def _settle(filling: Sequence[Batch[list[Tensor]]]) -> None:
        """Let no thread write into a slot any more; why was told by the first that failed."""
        for batch in filling:
            batch.cancel()
        for batch in filling:
            with suppress(Exception):
                batch.wait()

    def close(self) -> None:
        """Wait until nothing is on its way."""
        self._queues.synchronize()


def _cut(memory: Tensor, parcel: Parcel) -> list[Tensor]:
    size = parcel.dtype.itemsize
    for length in parcel.shape:
        size *= length
    return [
        memory[n * size : (n + 1) * size].view(parcel.dtype).view(parcel.shape)
        for n in range(parcel.count)
    ]
