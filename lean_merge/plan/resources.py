"""Choose the part of the machine that a merge may use: device, memory, threads, fast dtype."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from lean_merge import memory
from lean_merge.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Resources:
    """The part of the machine that a merge may use. It decides the speed, never the numbers.

    Parameters
    ----------
    device : str
        `auto`, `cpu`, `cuda`, `cuda:N`, or another torch device.
    memory, vram : int, optional
        Ceilings in bytes on the process's anonymous memory and on device memory. By default half of
        what is available.
    threads : int, optional
        By default as many as the processors that this process may use.
    remote_cache : int
        Bytes of disk that may keep what comes from other machines; none by default.
    """

    device: str = "auto"
    memory: int | None = None
    vram: int | None = None
    threads: int | None = None
    remote_cache: int = 0


@dataclass(frozen=True, slots=True)
class ResolvedResources:
    """The part of this machine that a merge uses.

    Attributes
    ----------
    device : str
        The torch device that computes.
    threads : int
        The number of threads.
    memory, vram : int
        Ceilings in bytes on the process's anonymous memory and on device memory, 0 for none.
    is_default : bool
        Whether neither a device nor its ceiling was asked for, so that the CPU will do as well.
    notes : tuple of str
        Sentences for people.
    remote_cache : int
        Bytes of disk that may keep what comes from other machines.
    """

    device: str
    threads: int
    memory: int
    vram: int
    is_default: bool
    notes: tuple[str, ...]
    remote_cache: int = 0


def resolve_resources(resources: Resources) -> ResolvedResources:
    """Find the device, memory and threads of this machine that `resources` ask for.

    Where a device that was not asked for cannot be used, the CPU takes its place.

    Raises
    ------
    RecipeError
        The device or the number of threads makes no sense, or the device cannot be used.
    """
    device, notes = _resolved(resources.device)
    threads, vram = threads_of(resources), resources.vram or 0
    if torch.device(device).type == "cuda":
        try:
            # This is the first call that takes memory there, and a good deal of the host's.
            free = torch.cuda.mem_get_info(torch.device(device))[0]
            vram = vram or free // 2
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            if resources.device != "auto":
                raise RecipeError(
                    f"{device} cannot be used ({reason}); free it, or use --device cpu."
                ) from error
            notes = [*notes, f"{device} cannot be used ({reason}), so the CPU is"]
            device, vram = "cpu", 0
    is_default = resources.device == "auto" and resources.vram is None
    memory, cache = memory_of(resources), resources.remote_cache
    return ResolvedResources(device, threads, memory, vram, is_default, tuple(notes), cache)


def threads_of(resources: Resources) -> int:
    """Return the number of threads: as wanted, or one for each processor of this process."""
    if resources.threads is not None:
        if resources.threads < 1:
            raise RecipeError(f"threads must be 1 or more, not {resources.threads}.")
        return resources.threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_of(resources: Resources) -> int:
    """Return the ceiling on anonymous bytes: as wanted, or half of what is free on top."""
    return resources.memory or memory.usage().anonymous + memory.available() // 2


def _resolved(wanted: str) -> tuple[str, list[str]]:
    """Return the torch device for `wanted`, and sentences for people. Raises RecipeError."""
    if wanted == "auto":
        return ("cuda" if torch.cuda.is_available() else "cpu"), []
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise RecipeError(f"{wanted!r} is not a torch device; use auto, cpu or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("No CUDA device is available; use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"{wanted} does not exist; there are {torch.cuda.device_count()} devices."
        )
    if device.type not in ("cpu", "cuda"):
        return wanted, [f"device {wanted} is untested; compare a few weights with --device cpu"]
    return wanted, []


def arithmetic_dtype(task: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype of products on `device` with task vectors of dtype `task`.

    It is bfloat16 where the task vectors are and the machine is fast at it, and float32 elsewhere.
    """
    if task is not torch.bfloat16:
        return torch.float32
    if torch.device(device).type == "cuda":
        modern = torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
        return task if modern else torch.float32
    if torch.device(device).type == "cpu":
        return task if _multiplies_bfloat16() else torch.float32
    return torch.float32


def _multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16 products, and oneDNN uses them.

    oneDNN supports these products on every AVX-512 processor. Without instructions for them it
    converts every number first, and float32 is faster.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or not (supported() and torch.backends.mkldnn.enabled):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    emulated = limit in ("AVX512_CORE", "AVX512_CORE_VNNI")
    return torch.cpu._is_avx512_bf16_supported() and not emulated
