"""A device beside the CPU: its queues, memory that it lends to one weight, and how it runs out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.engine.transfer import Done, Event, Queues, Uploader
from lean_merge.engine.workers import Workers
from lean_merge.plan import budget


class CudaQueues:
    """A copy stream beside the default stream, which is that of the products in every thread."""

    def __init__(self, device: torch.device) -> None:
        self._products = torch.cuda.default_stream(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Asynchronous, for `source` is pinned."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Event:
        """As `Queues` has it."""
        return _recorded(self._copies)

    def computed(self) -> Event:
        """As `Queues` has it."""
        return _recorded(self._products)

    def copy_after(self, event: Event) -> None:
        """As `Queues` has it."""
        assert isinstance(event, torch.cuda.Event)
        self._copies.wait_event(event)

    def compute_after(self, event: Event) -> None:
        """As `Queues` has it."""
        assert isinstance(event, torch.cuda.Event)
        self._products.wait_event(event)

    def synchronize(self) -> None:
        """As `Queues` has it."""
        self._copies.synchronize()
        self._products.synchronize()


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Threads sleep while they wait: a machine may have few cores, and they are at work.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    stream.record_event(event)
    return event


class BlockingQueues:
    """A device of which no more is known than that `Tensor.copy_` works: nothing overlaps."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Done on return."""
        target.copy_(source)

    def copied(self) -> Event:
        """Always past."""
        return Done()

    def computed(self) -> Event:
        """Always past, or ordered by the device itself."""
        return Done()

    def copy_after(self, event: Event) -> None:
        """There is nothing to wait for."""

    def compute_after(self, event: Event) -> None:
        """There is nothing to wait for."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""


def queues_of(device: torch.device) -> Queues | None:
    """The queues of a device; None for the CPU, to which nothing needs to be brought."""
    if device.type == "cpu":
        return None
    return CudaQueues(device) if device.type == "cuda" else BlockingQueues()


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Products of the calling thread go to the stream that all other threads use too.

    The caller's own stream would not wait for theirs.
    """
    on_cuda = device.type == "cuda"
    with torch.cuda.stream(torch.cuda.default_stream(device)) if on_cuda else nullcontext():
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left: torch's own error, or that of a library below it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "CUDA error: out of memory" in text or "STATUS_ALLOC_FAILED" in text
    )


@dataclass(frozen=True, slots=True)
class Lent:
    """Device memory for one weight: uint8 for tiles that stay, and places where others land."""

    resident: Tensor
    landing: tuple[Tensor, ...]
    uploader: Uploader


class Accelerator:
    """A device other than the CPU.

    Nothing is allocated there, and no host memory is pinned, before the first `lend`.

    Parameters
    ----------
    device, queues
        The device and its queues.
    workers
        Who forms the tiles that go there.
    largest_tile : int
        Bytes of the largest tile of all task vectors of a weight.
    peak, limit : int
        Bytes that a weight's analysis takes there at most, and that are allowed; 0 for no limit.
    """

    def __init__(
        self,
        device: torch.device,
        queues: Queues,
        workers: Workers,
        *,
        largest_tile: int,
        peak: int,
        limit: int,
    ) -> None:
        self.device = device
        self._queues = queues
        self._workers = workers
        self._slots = budget.ring_slots(workers.count)
        self._ring_bytes = budget.ring_bytes(largest_tile, self._slots)
        self._peak, self._limit = peak, limit
        self._uploader: Uploader | None = None

    @property
    def pinned(self) -> int:
        """Bytes of host memory that copies go from."""
        return 0 if self._uploader is None else self._ring_bytes

    def lend(self, tile: int, resident: int) -> Lent:
        """Memory for a weight whose tiles have at most `tile` bytes, `resident` of which stay.

        Raises
        ------
        RuntimeError
            One for which `is_out_of_memory` holds, if there is not enough.
        """
        self._make_room()
        if self._uploader is None:
            # Pinned memory comes in powers of two; so that is what is asked for, once.
            host = torch.empty(
                self._ring_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
            )
            self._uploader = Uploader(self._queues, self._workers, host, slots=self._slots)
        return Lent(
            resident=self._empty(resident * tile),
            landing=tuple(self._empty(tile) for _ in range(budget.LANDINGS)),
            uploader=self._uploader,
        )

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _make_room(self) -> None:
        """Give back what torch keeps of earlier weights if this one may not fit beside it.

        Weights of other shapes leave pieces that do not fit; but giving them back takes time.
        """
        if self.device.type == "cuda" and self._limit:
            reserved = torch.cuda.memory_reserved(self.device)
            if reserved + self._peak > self._limit:
                torch.cuda.empty_cache()

    def release(self) -> None:
        """Give back all that nobody uses, after an error too."""
        self._queues.synchronize()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Wait until nothing is on its way to the device."""
        self._queues.synchronize()
