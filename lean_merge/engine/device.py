"""The seam to devices other than the CPU, whose code is found by the type of the plan's device."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lean_merge.engine.workers import Workers


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
class Parcel:
    """Tensors of one shape and dtype that go over together.

    Attributes
    ----------
    fill
        A function that writes the given tensors on the host, in a worker thread.
    count, shape, dtype
        How many tensors there are, and of what kind.
    targets
        The tensors on the device where they stay; empty if they only pass through a landing place.
    """

    fill: Callable[[Sequence[Tensor]], None]
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    targets: Sequence[Tensor] = ()


class Sender(Protocol):
    """Sends tiles to a device; `devices.transfer.Uploader` is one."""

    def send(
        self, parcels: Sequence[Parcel], landing: Sequence[Tensor]
    ) -> Generator[Sequence[Tensor], None, None]:
        """Yield the tensors of each parcel on the device, one parcel after the other."""


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
    uploader: Sender


class Accelerator(abc.ABC):
    """A device that lends memory to one weight after another."""

    device: torch.device

    @property
    @abc.abstractmethod
    def pinned(self) -> int:
        """Return the bytes of pinned host memory, from which copies are made."""

    @abc.abstractmethod
    def lend(self, tile: int, resident: int) -> Lent:
        """Lend memory to a weight whose tiles have at most `tile` bytes, `resident` of which stay.

        Raises
        ------
        RuntimeError
            The device has not enough memory; `is_out_of_memory` is true for the error.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """Release all memory that is not in use; this works after an error too."""

    @abc.abstractmethod
    def close(self) -> None:
        """Wait until no copy to the device is under way."""


def accelerator_of(
    device: torch.device, workers: Workers, *, largest_tile: int, peak: int, limit: int
) -> Accelerator | None:
    """Return a device that computes; None if that is the CPU, which needs no copies.

    The parameters are those of `devices.accelerator.TorchAccelerator`.
    """
    if device.type == "cpu":
        return None
    module = importlib.import_module("lean_merge.engine.devices.accelerator")
    found: Accelerator = module.TorchAccelerator(
        device, workers, largest_tile=largest_tile, peak=peak, limit=limit
    )
    return found
