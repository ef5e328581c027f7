"""A merge on a GPU against the floor of the disk, with its memory against the plan's.

    python bench/gpu.py [--size 7b] [--layers 2] [--vram 2GiB] [--threads 2] [--folder FOLDER]

The floor is reading every byte of the inputs once, one after another, then writing as much as the
output has, with fsync: same disk, same run, and a cold page cache both times. Writes a synthetic
triple first (about 3 GB for two layers of 7B widths) and removes it in the end. Asserts that every
decision is the CPU's, and the bars of memory; prints the figures for bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from synthetic import SIZES, write_triple

import lean_merge
from lean_merge.sizes import parse_size

MIB = 1 << 20
BLOCK = 8 * MIB


def forget(folder: Path) -> None:
    """Drop the cached pages of all files below a folder."""
    os.sync()
    for file in folder.rglob("*.safetensors"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def floor(folder: Path, output: int) -> float:
    """Seconds to read the inputs and to write `output` bytes."""
    forget(folder)
    buffer = memoryview(bytearray(os.urandom(BLOCK)))
    start = time.perf_counter()
    for role in ("base", "mllm", "expert"):
        for file in sorted((folder / role).glob("*.safetensors")):
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
    scratch = folder / "floor"
    with open(scratch, "wb", buffering=0) as opened:
        for done in range(0, output, BLOCK):
            opened.write(buffer[: min(BLOCK, output - done)])
        os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    scratch.unlink()
    return seconds


def merge(folder: Path, resources: lean_merge.Resources) -> tuple[float, dict[str, Any], int]:
    """Seconds from a cold cache, the report, and the bytes of the output, which is removed."""
    recipe = lean_merge.MergeRecipe(
        base_model=str(folder / "base"),
        mllm_model=str(folder / "mllm"),
        experts=(lean_merge.Expert(str(folder / "expert")),),
    )
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    forget(folder)
    start = time.perf_counter()
    report = lean_merge.merge(recipe, out, resources=resources).report
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return seconds, report, size


def decisions(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a report by weight."""
    return {row["weight"]: row for row in report["weights"]}


def check(report: dict[str, Any], by_cpu: dict[str, Any], vram: int) -> None:
    """The bars: the CPU's decisions, and memory within plan and ceiling."""
    assert report["device"].startswith("cuda") and not report["fallbacks"], report["fallbacks"]
    expected = decisions(by_cpu)
    assert any(row["selected"] for row in expected.values())
    for name, row in decisions(report).items():
        other = expected[name]
        assert row["selected"] is other["selected"], name
        assert abs(row["similarity_first"] - other["similarity_first"]) <= 0.02, name
        if row["selected"]:
            assert abs(row["lambda"] / other["lambda"] - 1) <= 0.015, name
            assert abs(row["update_norm"] / other["update_norm"] - 1) <= 0.03, name
    memory, count = report["memory"], report["bytes"]
    assert memory["peak_vram_used"] <= memory["predicted_vram"] <= vram
    assert memory["peak_vram"] <= vram
    assert memory["peak_anonymous"] + memory["pinned"] <= memory["predicted_anonymous"]
    assert count["read"] == count["read_predicted"] == count["read_most"]


def main(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure three times each, by turns; check; print."""
    shapes = dataclasses.replace(SIZES[arguments.size], layers=arguments.layers, vocab=1000)
    write_triple(folder, shapes)
    vram, threads = arguments.vram, arguments.threads
    resources = lean_merge.Resources(device="cuda", vram=vram, threads=threads)
    _, by_cpu, size = merge(folder, lean_merge.Resources(device="cpu", threads=threads))
    merge(folder, resources)  # Libraries are loaded, and kernels chosen, in the first.
    times, floors = [], []
    for _ in range(3):
        floors.append(floor(folder, size))
        seconds, report, _ = merge(folder, resources)
        times.append(seconds)
        check(report, by_cpu, vram)
    memory = report["memory"]
    ratios = ", ".join(f"{t / f:.2f}" for t, f in zip(times, floors, strict=True))
    print(f"device          {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"shape           {arguments.size}, {arguments.layers} layers, {threads} threads")
    print(f"time / floor    {ratios}   (merge {min(times):.2f} s, floor {min(floors):.2f} s)")
    print(f"phases          {report['seconds']}")
    for name in ("predicted_vram", "peak_vram", "peak_vram_used", "pinned"):
        print(f"{name:<15} {memory[name] / MIB:.0f} MiB")
    print(f"anonymous       {memory['peak_anonymous'] / MIB:.0f} MiB", end=" ")
    print(f"of {memory['predicted_anonymous'] / MIB:.0f} predicted")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vram", type=parse_size, default=2048 * MIB)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device on this machine.")
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        main(given, Path(scratch))
