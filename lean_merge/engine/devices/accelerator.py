"""Lend the memory of a device to one weight after another."""

from __future__ import annotations

import gc
import importlib
import pkgutil

import torch
from torch import Tensor

from lean_merge.engine import devices
from lean_merge.engine.device import Accelerator, Lent
from lean_merge.engine.devices.transfer import Queues, Uploader
from lean_merge.engine.workers import Workers
from lean_merge.plan import formulas


def queues_of(device: torch.device) -> Queues:
    """Return the queues of a device.

    The module `devices.cuda` has `CudaQueues`; types without a module get those of `devices.plain`.
    """
    known = {module.name for module in pkgutil.iter_modules(devices.__path__)}
    name = device.type if device.type in known else "plain"
    module = importlib.import_module(f"{devices.__name__}.{name}")
    found: Queues = getattr(module, f"{name.capitalize()}Queues")(device)
    return found


class TorchAccelerator(Accelerator):
    """Any device of torch, with its queues.

    Before the first `lend` nothing is allocated there, and no host memory is pinned.

    Parameters
    ----------
    device
        The device.
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
        workers: Workers,
        *,
        largest_tile: int,
        peak: int,
        limit: int,
    ) -> None:
        self.device = device
        self._queues = queues_of(device)
        self._workers = workers
        self._slots = formulas.ring_slots(workers.count)
        self._ring_bytes = formulas.ring_bytes(largest_tile, self._slots)
        self._peak, self._limit = peak, limit
        self._uploader: Uploader | None = None

    @property
    def pinned(self) -> int:
        return 0 if self._uploader is None else self._ring_bytes

    def lend(self, tile: int, resident: int) -> Lent:
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
        self._queues.synchronize()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._queues.synchronize()
