"""Small checkpoints, made once a session and never written to, and small tiles to merge them in."""

from __future__ import annotations

import functools
import os
import sys

# One thread for each matrix product, here and in processes that tests start, which NumPy asks for
# as it is loaded: several workers share the processors, and threads spin while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.families import SKETCHED, SMALL, Triple, write_triple
from support.family_table import build
from support.family_table import family as entry
from support.invariance import cut_tiles

from lean_merge import MergeResult
from lean_merge.engine import sums, taskvectors, update
from lean_merge.plan import runfacts
from lean_merge.tasks import tiles


def pytest_configure() -> None:
    """Let tests share what every merge and every process would do again.

    The digest of what the kernels compute is made once, but in tests/plan/test_probe.py. Nothing is
    synced, since no power fails here: tests/store asserts syncs by the calls. What processes import
    is compiled once. No example of hypothesis is judged by its time, which a busy machine decides.
    """
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")
    torch.set_num_threads(1)
    runfacts._probe = functools.cache(runfacts._probe)
    for name in ("fsync", "fdatasync"):
        if hasattr(os, name):
            setattr(os, name, os.fstat)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Triple]:
    """Families as transformers saves them, by name and options of `build`."""
    made: dict[Any, Triple] = {}

    def get(name: str, **options: Any) -> Triple:
        key = (name, tuple(options.items()))
        if key not in made:
            made[key] = build(entry(name), tmp_path_factory.mktemp("family"), **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def merged(
    family: Callable[..., Triple], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Triple, MergeResult]]:
    """Merges of families with default parameters, for tests that only look."""
    made: dict[Any, tuple[Triple, MergeResult]] = {}

    def get(name: str, *, out_dtype: str = "auto", **options: Any) -> tuple[Triple, MergeResult]:
        key = (name, out_dtype, tuple(options.items()))
        if key not in made:
            triple = family(name, **options)
            out = tmp_path_factory.mktemp("merged") / "out"
            made[key] = triple, triple.merge(out, out_dtype=out_dtype)
        return made[key]

    return get


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """A float32 triple by hand of two weights, analysed exactly."""
    return write_triple(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """The same in float32 with two experts; the second is aligned on q_proj alone."""
    return write_triple(tmp_path_factory.mktemp("two"), SMALL, experts=2)


@pytest.fixture(scope="session")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Triple]:
    """Triples by hand with weights too large to be decomposed whole, by dtype."""
    made: dict[torch.dtype, Triple] = {}

    def get(dtype: torch.dtype = torch.float32) -> Triple:
        if dtype not in made:
            made[dtype] = write_triple(tmp_path_factory.mktemp("sketched"), SKETCHED, dtype=dtype)
        return made[dtype]

    return get


@pytest.fixture
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows or a little more, cut into strips; and a process that holds no memory.

    Without the latter, which tiles are resident would depend on what ran before.
    """
    cut_tiles(monkeypatch, tile=1 << 14, strip=1 << 12)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows, read in strips of 8 and written in strips of 4."""
    monkeypatch.setattr(tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 16 * 64)
    for module in (tiles, sums, update):
        monkeypatch.setattr(module, "READ_ELEMENTS", 8 * 64)
    for module in (tiles, sums, taskvectors):
        monkeypatch.setattr(module, "STRIP_ELEMENTS", 4 * 64)
