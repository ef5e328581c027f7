"""What is read lies within the plan's bound, and is its estimate where every tile stays."""

from __future__ import annotations

import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import by_hand
from support.families import SKETCHED, Triple, check_reads, rows_of, write_triple
from support.fp8 import to_fp8
from support.invariance import METHODS, ONE_PASS, exact_smallest_memory
from support.scenes import Stop, stopping

from lean_merge import Plan, Resources, analyze, merge
from lean_merge.checkpoints import TensorReader, TensorSpec
from lean_merge.engine import judging
from lean_merge.methods.spectra import EXACT_BELOW

SHAPES = {**SKETCHED, "layers.0.mlp.down_proj": (96, 400), "layers.0.mlp.up_proj": (400, 96)}
"""Wide and tall weights, sketched and decomposed whole; q_proj and down_proj are aligned."""
ROOM = 700_000
"""Bytes in which some tiles of these stay and some do not."""


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """Of two experts, which are not selected for the same weights."""
    return write_triple(tmp_path_factory.mktemp("triple") / "in", SHAPES, experts=2)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[Path, str]]]:
    """Bytes that are read inside the block, by file and tensor, but for those of the early look."""
    found: Counter[tuple[Path, str]] = Counter()
    read_spans = TensorReader.read_spans
    lock = threading.Lock()

    def counting(
        self: TensorReader, spec: TensorSpec, spans: Sequence[tuple[int, int]], out: memoryview
    ) -> None:
        with lock:
            found[spec.file, spec.name] += out.nbytes
        read_spans(self, spec, spans, out)

    def uncounted(plan: Plan, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(TensorReader, "read_spans", read_spans)
            return early_look(plan, **options)

    early_look = judging.early_look
    with monkeypatch.context() as patch:
        patch.setattr(TensorReader, "read_spans", counting)
        for module in sys.modules.values():
            if getattr(module, "early_look", None) is early_look:
                patch.setattr(module, "early_look", uncounted)
        yield found


def memories(triple: Triple, **options: Any) -> list[int | None]:
    """From no tile resident over some to all."""
    least = exact_smallest_memory(triple, **options)
    return [least, least + ROOM, None]


# --- merges ---------------------------------------------------------------------------------

OPTIONS = {
    **METHODS,
    "none-selected": {"threshold": 1.0},
    "all-selected": {"threshold": 0.0},
    "largest": {"select_by": "max"},
    "whole-spectra": {"svd": "exact"},
    "report": {"output": "none"},
    "fixed-rank": {"rank": 32},
}


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_stays_resident(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
):
    """The more tiles stay, the less may be read; the estimate is exact where all do.

    Some stay in the middle, where tests/engine/test_determinism.py merges by every method.
    """
    # Methods that make no pass over a weight, or one before any is decided, keep no tile.
    looks = all(options is not METHODS[name] for name in ONE_PASS)
    if options.get("merge_method") == "slerp":
        triple = replace(triple, experts=triple.experts[:1])
    estimates, bounds = [], []
    every = memories(triple, **options)
    given = every[::2] if options and options in METHODS.values() else every
    for number, given_bytes in enumerate(given):
        out = tmp_path / str(number)
        with counted(monkeypatch) as read:
            # Triple.merge asserts that this is within the bound.
            result = triple.merge(out, memory=given_bytes, threads=2, **options)
        count = result.report["bytes"]
        assert count["read"] == sum(read.values())
        estimates.append(count["read_predicted"])
        bounds.append(count["read_most"])
    assert count["read"] == estimates[-1] == bounds[-1]
    for found in (estimates, bounds):
        assert all((more > less) is looks for more, less in pairwise(found))


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("threshold", [0.4, 0.6, 1.0])
def test_each_tensor_is_read_once_a_pass(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float
):
    """Counted for every tensor, against the number of passes that the report tells."""
    least = exact_smallest_memory(triple, threshold=threshold)
    with counted(monkeypatch) as read:
        result = triple.merge(tmp_path / "out", memory=least, threads=2, threshold=threshold)
    for name, rows in _by_weight(triple, result).items():
        passes = {row["passes"] for row in rows}
        assert len(passes) == 1
        selected = any(row["selected"] for row in rows)
        size = 4 * SHAPES[name][0] * SHAPES[name][1]
        folders = (triple.base, triple.mllm, *triple.experts)
        times = [
            read[folder / "model.safetensors", f"model.{name}.weight"] / size for folder in folders
        ]
        of_base, of_mllm, *of_experts = times
        if min(SHAPES[name]) <= EXACT_BELOW:
            # One role in each pass; the selected experts' images in one more, of all experts.
            assert passes == {3 + selected}
            assert (of_base, of_mllm) == (3 + selected, 1 + 1)
            assert of_experts == [1 + selected] * 2
        else:
            # The last pass over a selected weight may be for the experts' images alone.
            assert of_experts == [of_base] * 2 and passes == {of_base}
            assert 0 <= of_base + 1 - of_mllm <= selected


def _by_weight(triple: Triple, result: Any) -> dict[str, list[dict[str, Any]]]:
    of_experts = [rows_of(result, path) for path in triple.experts]
    return {slot.canonical: [rows[slot.canonical] for rows in of_experts] for slot in triple.slots}


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("options", [{}, {"stages": ("select",)}], ids=["projected", "whole"])
def test_adapters_and_whole_experts(triple: Triple, tmp_path: Path, options: dict[str, Any]):
    """An adapter's factors are read once, and the base is not, where nothing is subtracted."""
    adapter, _ = by_hand(triple, tmp_path / "adapter", rank=8)
    for experts in [(adapter,), (triple.experts[0], adapter)]:
        check_resident(replace(triple, experts=experts), tmp_path / str(len(experts)), **options)


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("stages", [("select", "rescale"), ("select", "rescale", "project")])
def test_numbers_with_scales(triple: Triple, tmp_path: Path, stages: tuple[str, ...]):
    """Scales are read once for each weight, however often its rows are."""
    folders = []
    for role in (triple.base, triple.mllm, *triple.experts):
        stored = tmp_path / role.name
        shutil.copytree(role, stored)
        to_fp8(stored, tmp_path / f"{role.name} twin", "block", dtype=torch.float8_e4m3fn)
        folders.append(stored)
    work = Triple(folders[0], folders[1], tuple(folders[2:]), triple.slots)
    check_resident(work, tmp_path, stages=stages)


def check_resident(triple: Triple, folder: Path, **options: Any) -> None:
    """As estimated where every tile stays, within the bound where none does."""
    least, *_ = memories(triple, **options)
    triple.merge(folder / "tight", memory=least, threads=2, **options)
    count = triple.merge(folder / "free", threads=2, **options).report["bytes"]
    assert count["read"] == count["read_predicted"] == count["read_most"]


@pytest.mark.usefixtures("many_tiles")
def test_what_an_interrupted_run_with_other_memory_read(triple: Triple, tmp_path: Path):
    """Each tensor as the run that merged it had planned it."""
    least = exact_smallest_memory(triple)
    recipe = triple.recipe(shard_size=10_000)
    with pytest.raises(Stop):
        tight = Resources(device="cpu", threads=2, memory=least)
        merge(recipe, tmp_path / "out", resources=tight, on_event=stopping(2))
    result = merge(recipe, tmp_path / "out", resources=Resources(device="cpu", threads=2))
    assert result.reused
    count = result.report["bytes"]
    assert count["read"] > count["read_most"]


# --- analyses -------------------------------------------------------------------------------


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("select_by", ["first", "max"])
def test_analyses(triple: Triple, tmp_path: Path, select_by: str):
    recipe = triple.recipe(select_by=select_by)
    for number, given_bytes in enumerate(memories(triple, select_by=select_by)[::2]):
        # What is gathered takes more memory than one decision.
        memory = None if given_bytes is None else given_bytes + (8 << 20)
        resources = Resources(device="cpu", threads=2, memory=memory)
        document = analyze(recipe, tmp_path / str(number), resources=resources).analysis.document
        check_reads(document["bytes"])


MERGES: dict[str, dict[str, Any]] = {
    "as-analysed": {},
    "some": {"threshold": 0.5, "own": [{}, {"threshold": 0.9}]},
    "whole": {"stages": ("select",)},
    "anew": {"rank": 80, "threshold": 0.0},
    "adapter": {"output": "lora"},
    "report": {"output": "none"},
}


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("options", MERGES.values(), ids=MERGES)
def test_merges_from_an_analysis_count_its_factors(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
):
    found = analyze(triple.recipe(), tmp_path / "analysis", resources=Resources(device="cpu"))
    recipe = triple.recipe(**options)
    for number, given_bytes in enumerate(memories(triple, **options)[::2]):
        resources = Resources(device="cpu", threads=2, memory=given_bytes)
        out = None if options.get("output") == "none" else tmp_path / str(number)
        with counted(monkeypatch) as read:
            result = merge(recipe, out, analysis=found.analysis, resources=resources)
        count = result.report["bytes"]
        check_reads(count)
        assert count["read"] == sum(read.values())
        factors = sum(n for (file, _), n in read.items() if file.name == "analysis.safetensors")
        projects = "project" in options.get("stages", ("project",))
        recalled = result.report["analysis"]["recalled"]
        assert (factors > 0) is (projects and recalled > 0)
        if "rank" not in options:
            assert recalled == len(SHAPES)
            assert count["read"] == count["read_predicted"] == count["read_most"]
