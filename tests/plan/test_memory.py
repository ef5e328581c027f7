"""Memory of whole runs in fresh processes: bounded, predicted, and flat in the number of layers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.families import check_reads

from lean_merge import Expert, MergeRecipe, Plan, Resources, memory, plan
from lean_merge.memory import usage

BENCH = Path(__file__).parents[2] / "bench"
MIB = 1 << 20


def write(folder: Path, layers: int, *, wide: tuple[int, int], **recipe: Any) -> Path:
    """A synthetic triple of so many layers and of these two widths."""
    sys.path.insert(0, str(BENCH))
    try:
        from synthetic import Recipe, Shapes, write_triple
    finally:
        sys.path.remove(str(BENCH))
    shapes = Shapes(*wide, layers, 256, vocab=100, vision_layers=1)
    write_triple(folder, shapes, Recipe(**recipe), classes=False)
    return folder


@pytest.fixture(scope="module")
def triples(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two triples, of 2 and 4 layers."""
    wide = (1024, 2560)
    return {n: write(tmp_path_factory.mktemp(f"layers{n}"), n, wide=wide) for n in (2, 4)}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spectra so flat that sketches go as deep as they may, for weights that are all selected."""
    spectrum = {"rank": 400, "slope": 0.2, "noise": 0.3, "cosine": 0.97, "aligned": 1.0}
    return write(tmp_path_factory.mktemp("deep"), 1, wide=(1536, 4096), **spectrum)


def probe(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One weight of each shape is merged in every layer; the others are copied."""
    one_of_each = ("--include", "q_proj|gate_proj|down_proj")
    command = [sys.executable, str(BENCH / "probe.py"), str(folder), *one_of_each, *options]
    return subprocess.run(command, capture_output=True, text=True)


def predicted(folder: Path, output: str) -> int:
    """The most anonymous bytes that a merge by two threads is said to take."""
    base, mllm, expert = (str(folder / role) for role in ("base", "mllm", "expert"))
    recipe = MergeRecipe(base_model=base, mllm_model=mllm, experts=(Expert(expert),), output=output)
    return plan(recipe, Resources(device="cpu", threads=2)).prediction.peak_memory


def test_as_many_threads_are_used_as_fit_beside_the_tiles(triples: dict[int, Path]) -> None:
    """Four need no room; the note names the memory in which all of them fit, and no less does."""
    base, mllm, expert = (str(triples[2] / role) for role in ("base", "mllm", "expert"))
    recipe = MergeRecipe(base_model=base, mllm_model=mllm, experts=(Expert(expert),))

    def planned(threads: int, limit: int) -> Plan:
        return plan(recipe, Resources(device="cpu", threads=threads, memory=limit))

    roomy, four = planned(12, 4096 * MIB), planned(4, 4096 * MIB)
    assert (roomy.workers, four.workers) == (12, 4)
    assert not any("threads fit" in note for note in roomy.notes)
    assert roomy.prediction.peak_memory > four.prediction.peak_memory
    assert planned(1000, 4096 * MIB).workers == 16
    limit = (roomy.prediction.peak_memory + four.prediction.peak_memory) // 2
    tight = planned(12, limit)
    assert 4 <= tight.workers < 12
    assert tight.prediction.peak_memory <= limit
    [note] = [note for note in tight.notes if "threads fit" in note]
    named = re.search(r"^(\d+) of 12 threads fit; --memory (\d+)MiB", note)
    assert named is not None and int(named[1]) == tight.workers, note
    assert planned(12, (int(named[2]) + 4) * MIB).workers == 12


def smallest(folder: Path, *options: str) -> int:
    """The MiB that a refusal names as the smallest that works."""
    refused = probe(folder, *options, "--memory", "160MiB")
    assert refused.returncode != 0
    found = re.search(r"--memory (\d+)MiB", refused.stderr)
    assert found is not None, refused.stderr
    # A few MiB for what differs between two starts of the interpreter.
    return int(found[1]) + 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_what_is_used_is_what_the_system_says():
    def told() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        parts = [line.split() for line in lines if line.startswith("Rss")]
        return {name: int(count) * 1024 for name, count, _ in parts}

    before = usage()
    held = bytearray(64 * MIB)
    now, expected = usage(), told()
    assert now.anonymous - before.anonymous > 60 * MIB < len(held)
    assert abs(now.anonymous - expected["RssAnon:"]) < 4 * MIB
    assert abs(now.file_backed - expected["RssFile:"] - expected["RssShmem:"]) < 4 * MIB


def test_without_the_systems_word_all_counts_as_anonymous(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_STATM", "/nowhere/statm")
    found, whole = usage(), psutil.Process().memory_info().rss
    assert found.file_backed == 0 and abs(found.anonymous - whole) < 4 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
@pytest.mark.parametrize(("output", "threads"), [("checkpoint", "1"), ("lora", "2")])
def test_memory_is_bounded_by_a_prediction_that_is_flat_in_layers(
    triples: dict[int, Path], output: str, threads: str
) -> None:
    """Predictions are compared, since which threads meet differs from run to run."""
    done = probe(triples[2], "--output", output, "--threads", threads)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    memory = report["memory"]
    assert memory["peak_anonymous"] <= memory["predicted_anonymous"]
    assert report["bytes"]["read"] == report["bytes"]["read_predicted"]
    written, most = report["bytes"]["written"], report["bytes"]["written_predicted"]
    assert written == most if output == "checkpoint" else written < most / 2
    few, many = (predicted(folder, output) for folder in triples.values())
    assert abs(many - few) < MIB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
@pytest.mark.parametrize(("output", "least"), [("checkpoint", False), ("lora", True)])
@pytest.mark.long
def test_the_prediction_holds_where_sketches_go_deep(deep: Path, output: str, least: bool) -> None:
    """With all the memory that is wanted, and with the least."""
    options = ("--memory", f"{smallest(deep, '--output', output)}MiB") if least else ()
    done = probe(deep, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # Where spectra fall off, five or six are enough.
    assert max(weight["passes"] for weight in report["weights"]) >= 9
    memory = report["memory"]
    assert memory["peak_anonymous"] <= memory["predicted_anonymous"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells anonymous memory apart")
def test_the_smallest_memory_that_is_named_works_and_holds(triples: dict[int, Path]) -> None:
    """Refused below it with its figure; at it, rows are read again and the ceiling is kept."""
    least = smallest(triples[2])
    done = probe(triples[2], "--memory", f"{least}MiB")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["memory"]["peak_anonymous"] <= least * MIB
    assert report["bytes"]["read_predicted"] < report["bytes"]["read_most"]
    check_reads(report["bytes"])
