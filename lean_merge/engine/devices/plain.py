"""The queues of devices of no special type."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_merge.engine.devices.transfer import Done, Mark


class PlainQueues:
    """The queues of any device on which `Tensor.copy_` works.

    Copies are made at once and the device itself orders products, so nothing overlaps and there is
    nothing to wait for.
    """

    def __init__(self, device: torch.device) -> None:
        del device

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
