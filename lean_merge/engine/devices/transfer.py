"""Bring tiles to a device; one is copied while another is used.

A device has two queues, one of copies and one of products, and both run behind the program. The
memory that they use is written in turn: a few slots on the host, from which copies are made, and a
few landing places on the device. Each may be written again only when a `Mark` in a queue says that
the work that uses it is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from lean_merge.engine.device import Parcel
from lean_merge.engine.workers import Workers, settle

SLOT_ALIGNMENT = 256
"""Bytes to which slots are aligned: copies from aligned memory are faster."""


class Mark(Protocol):
    """A point in one of the device's queues."""

    def synchronize(self) -> None:
        """Block the calling thread until everything before the point is done."""


class Queues(Protocol):
    """A device's queue of copies and its queue of products; each does its work in order."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Ask for a copy from the host to the device; the call may return before it is made."""

    def copied(self) -> Mark:
        """Mark the present end of the queue of copies."""

    def computed(self) -> Mark:
        """Mark the present end of the queue of products."""

    def copy_after(self, mark: Mark) -> None:
        """Let copies that are asked for later wait for the mark."""

    def compute_after(self, mark: Mark) -> None:
        """Let products that are asked for later wait for the mark."""

    def synchronize(self) -> None:
        """Block until both queues are empty."""


class Done:
    """The mark of work that is done before the call returns."""

    def synchronize(self) -> None:
        return


class _Slot:
    """Memory on the host, and the mark after which what it holds is copied."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.copied: Mark = Done()

    def fill(self, parcel: Parcel) -> list[Tensor]:
        views = _cut(self.memory, parcel)
        parcel.fill(views)
        return views


class Uploader:
    """Sends parcels to a device in order, from host slots used in turn.

    Parameters
    ----------
    queues
        The device's queues.
    workers
        The threads that fill the slots.
    host : Tensor, uint8, 1-D
        Pinned memory, which is cut into `slots` equal slots.
    slots : int
        How many slots there are, two at least.
    """

    def __init__(self, queues: Queues, workers: Workers, host: Tensor, *, slots: int) -> None:
        self._queues = queues
        self._workers = workers
        size = host.numel() // slots // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        self._slots = [_Slot(host[n * size : (n + 1) * size]) for n in range(slots)]

    def send(
        self, parcels: Sequence[Parcel], landing: Sequence[Tensor]
    ) -> Generator[Sequence[Tensor], None, None]:
        """Yield the tensors of each parcel on the device, one parcel after the other.

        The caller asks for the products that use a parcel before it asks for the next parcel; after
        that, a parcel without targets of its own may be overwritten. While one parcel is used, the
        next one is copied and those after it are filled.

        Parameters
        ----------
        parcels
            The parcels in the order in which they are wanted.
        landing : sequence of Tensor, uint8, 1-D
            The places on the device that parcels without targets use in turn.
        """
        queues, slots = self._queues, self._slots
        # What lies in the landing places and targets may still be in use by earlier products.
        used = [queues.computed()] * max(1, len(landing))
        queues.copy_after(used[0])
        filling: deque[Future[list[Tensor]]] = deque()
        asked = landed = 0
        try:
            for position, parcel in enumerate(parcels):
                while asked < min(len(parcels), position + len(slots)):
                    slot = slots[asked % len(slots)]
                    slot.copied.synchronize()
                    filling.extend(self._workers.submit(slot.fill, [parcels[asked]]))
                    asked += 1
                filled = filling[0].result()
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
            # No thread may write into a slot any more; the first error has said why.
            settle(filling)
            filling.clear()

    def close(self) -> None:
        """Wait until no copy to the device is under way."""
        self._queues.synchronize()


def _cut(memory: Tensor, parcel: Parcel) -> list[Tensor]:
    size = parcel.dtype.itemsize
    for length in parcel.shape:
        size *= length
    return [
        memory[n * size : (n + 1) * size].view(parcel.dtype).view(parcel.shape)
        for n in range(parcel.count)
    ]
