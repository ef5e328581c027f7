"""Torch's settings while merges compute, whatever those of the caller are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_SMALLEST, _ONE = float.fromhex("0x1p-1074"), float("1")
_PRODUCTS = ("cuda", "mkldnn")
"""The backends whose precision of float32 products torch keeps apart."""


class _ProcessSettings:
    """Torch's settings of the whole process, which are ours as long as any merge computes.

    Merges in several threads share them, so they are counted: the first puts ours in force, and the
    last puts those of the caller back.

    Attributes
    ----------
    threads
        How many threads a kernel used in the thread that came first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._callers: tuple[Any, ...] = ()
        self.threads = 1

    def enter(self) -> None:
        """Put our settings in force, unless they are."""
        with self._lock:
            if not self._users:
                self._callers = _process_settings()
                self.threads = torch.get_num_threads()
                torch.set_float32_matmul_precision("highest")
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            self._users += 1

    def leave(self) -> None:
        """Put the caller's settings back if nobody else needs ours."""
        with self._lock:
            self._users -= 1
            if not self._users:
                float32, products, bfloat16_sums = self._callers
                torch.set_float32_matmul_precision(float32)
                for backend, precision in products.items():
                    torch._C._set_fp32_precision_setter(backend, "matmul", precision)
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = bfloat16_sums


def _process_settings() -> tuple[str, dict[str, str], bool]:
    """Return the precision of float32 products, also by backend, and of sums of bfloat16 on CUDA.

    Torch has an old and a new way to set the first, and the old one cannot be read once the new one
    was used; what it said before was "highest" then, unless both were used.
    """
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    try:
        float32 = torch.get_float32_matmul_precision()
    except RuntimeError:
        float32 = "highest"
    return (
        float32,
        {} if get is None else {backend: get(backend, "matmul") for backend in _PRODUCTS},
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )


_PROCESS = _ProcessSettings()


@contextmanager
def _plain_thread() -> Iterator[None]:
    """Let the calling thread compute as a new thread would, on the CPU and by itself.

    The small dense problems between passes lose more to waking threads than they gain, and with one
    thread everywhere no result depends on how many there are.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        # A new thread begins with what another merge has set for itself.
        threads = _PROCESS.threads
    # Torch does not tell whether the processor takes the smallest numbers for zero, but it shows.
    flushes = _SMALLEST * _ONE == 0.0
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(flushes)


class Computing:
    """A context in which the calling thread, and threads that it starts, compute as merges do.

    One thread for every kernel, full precision, the CPU where no device is named, no autocast, and
    no number flushed to zero: none of the caller's settings decides a bit.
    """

    def __init__(self) -> None:
        self._thread = ExitStack()

    def __enter__(self) -> Computing:
        _PROCESS.enter()
        self._thread.enter_context(_plain_thread())
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.close()
        _PROCESS.leave()

    @contextmanager
    def paused(self, *, idle: bool) -> Iterator[None]:
        """Let the block have the caller's settings: the thread's, and if `idle` the process's."""
        self._thread.close()
        if idle:
            _PROCESS.leave()
        try:
            yield
        finally:
            if idle:
                _PROCESS.enter()
            self._thread.enter_context(_plain_thread())
