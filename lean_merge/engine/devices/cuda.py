"""The queues of CUDA devices."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_merge.engine.devices.transfer import Mark


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
