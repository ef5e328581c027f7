"""A device other than the CPU, with its queues and the memory that it lends to weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lean_merge.engine.transfer import Done, Mark, Queues, Uploader
from lean_merge.engine.workers import Workers
from lean_merge.plan import formulas


class BlockingQueues:
    """The queues of any device on which `Tensor.copy_` works.

    Copies are made at once and the device itself orders products, so nothing overlaps and there is
    nothing to wait for.
    """

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def copied(self) -> Mark:
        return Done()

    def computed(self) -> Mark:
        return Done()

    def copy_after(self, mark: Mark) -> None:
        pass

    def compute_after(self, mark: Mark) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaQueues:
    """A copy stream, beside the default stream on which every thread makes its products.

    Copies are asynchronous, because the memory that they come from is pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._products = torch.cuda.default_stream(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Mark:
        return _recorded(self._copies)

    def computed(self) -> Mark:
        return _recorded(self._products)

    def copy_after(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        self._copies.wait_event(mark)

    def compute_after(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        self._products.wait_event(mark)

    def synchronize(self) -> None:
        self._copies.synchronize()
        self._products.synchronize()


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Threads sleep while they wait, because a machine may have few cores and needs them for work.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    stream.record_event(event)
    return event


def queues_of(device: torch.device) -> Queues | None:
    """Return the queues of a device; None for the CPU, which needs no copies."""
    if device.type == "cpu":
        return None
    return CudaQueues(device) if device.type == "cuda" else BlockingQueues()


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Let the calling thread make its products on the stream that all other threads use too.

    A stream of the caller's own would not wait for theirs.
    """
    on_cuda = device.type == "cuda"
    with torch.cuda.stream(torch.cuda.default_stream(device)) if on_cuda else nullcontext():
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, of torch or of a library below it, says that a device is full."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "CUDA error: out of memory" in text or "STATUS_ALLOC_FAILED" in text
    )


@dataclass(frozen=True, slots=True)
class Lent:
    """Device memory for one weight.

    Attributes
    ----------
    resident : Tensor, uint8, 1-D
        Memory for the tiles that stay.
    landing : tuple of Tensor, uint8, 1-D
        The places where other tiles land.
    uploader
        The uploader that brings tiles to either.
    """

    resident: Tensor
    landing: tuple[Tensor, ...]
    uploader: Uploader


class Accelerator:
    """A device that lends memory to one weight after another.

    Before the first `lend` nothing is allocated there, and no host memory is pinned.

    Parameters
    ----------
    device, queues
        The device and its queues.
    workers
        The threads that form the tiles that go there.
    largest_tile : int
        Bytes that one tile of all task vectors takes, in the weight where it takes most.
    peak : int
        Bytes that the analysis of a weight takes there at most.
    limit : int
        Bytes that may be taken there; 0 for no limit.
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
        self._slots = formulas.ring_slots(workers.count)
        self._ring_bytes = formulas.ring_bytes(largest_tile, self._slots)
        self._peak, self._limit = peak, limit
        self._uploader: Uploader | None = None

    @property
    def pinned(self) -> int:
        """Return the bytes of pinned host memory, from which copies are made."""
        return 0 if self._uploader is None else self._ring_bytes

    def lend(self, tile: int, resident: int) -> Lent:
        """Lend memory to a weight whose tiles have at most `tile` bytes, `resident` of which stay.

        Raises
        ------
        RuntimeError
            The device has not enough memory; `is_out_of_memory` is true for the error.
        """
        self._make_room()
        if self._uploader is None:
            # Torch pins memory in powers of two, so that size is asked for, and only once.
            host = torch.empty(
                self._ring_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
            )
            self._uploader = Uploader(self._queues, self._workers, host, slots=self._slots)
        return Lent(
            resident=self._empty(resident * tile),
            landing=tuple(self._empty(tile) for _ in range(formulas.LANDINGS)),
            uploader=self._uploader,
        )

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _make_room(self) -> None:
        """Release memory that torch keeps from earlier weights if this one may not fit beside it.

        Weights of other shapes leave pieces that do not fit. If there is room for both, releasing
        the pieces would only take time.
        """
        if self.device.type == "cuda" and self._limit:
            reserved = torch.cuda.memory_reserved(self.device)
            if reserved + self._peak > self._limit:
                torch.cuda.empty_cache()

    def release(self) -> None:
        """Release all memory that is not in use; this works after an error too."""
        self._queues.synchronize()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Wait until no copy to the device is under way."""
        self._queues.synchronize()
