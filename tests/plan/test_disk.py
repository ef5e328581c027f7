"""The disk that adapters, analyses and reports take: told before the start, held, given back."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import Triple, contents, write_triple
from support.faults import Recorder, apply, read_tree
from support.scenes import SHAPES, Stop, assert_same, often, stopping

from lean_merge import BudgetError, OutputError, Resources, analyze
from lean_merge.engine.run import run
from lean_merge.plan import Plan, disk, plan, plan_analysis
from lean_merge.sizes import format_size
from lean_merge.store import (
    JOURNAL,
    BlockStore,
    OutputFolder,
    Reserve,
    check_output,
    read_journal,
    storage,
)
from lean_merge.store.blocks import BLOCKS, kept_groups

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the layer stands for POSIX calls")

CPU = Resources(device="cpu", threads=1)
PARTIAL = f"{JOURNAL}.partial"
KINDS = ("lora", "none", "analysis", "auto")
"""The last is an adapter that makes an analysis for itself first."""
WIDE = {"layers.0.mlp.gate_proj": (96, 64), "layers.1.mlp.gate_proj": (96, 64)}
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("in"), SHAPES)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """Weights with more directions than the rank that errors name."""
    return write_triple(tmp_path_factory.mktemp("wide"), WIDE)


def options_of(kind: str) -> dict[str, Any]:
    return {"output": "lora", "threshold": "auto"} if kind == "auto" else {"output": kind}


def planned(triple: Triple, kind: str, **options: Any) -> Plan:
    if kind == "analysis":
        return plan_analysis(triple.recipe(**options), CPU)
    return plan(triple.recipe(**{**options, **options_of(kind)}), CPU)


def make(triple: Triple, kind: str, out: Path, **options: Any) -> Any:
    """The output, and how much of it an interrupted run had made."""
    how = {name: options.pop(name) for name in ("on_event", "overwrite") if name in options}
    if kind == "analysis":
        # Its page is made once it is complete, is no part of it, and takes a second to make.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["lean_merge.studies.analyze"], "add_page", lambda *_: None)
            return analyze(triple.recipe(**options), out, resources=CPU, **how)
    return triple.merge(out, **{**how, **options, **options_of(kind)})


def sealed(out: Path) -> dict[str, bytes]:
    """What interruptions must not change: a report's times do, and the journal's digest of it."""
    return {
        name: data
        for name, data in contents(out).items()
        if name.endswith((".safetensors", ".yml", "adapter_config.json"))
    }


def taken(file: Path) -> int:
    """Bytes of the disk, counted by the system."""
    return file.stat().st_blocks * 512


@pytest.fixture
def reserving(tmp_path: Path) -> None:
    """Skips where the test's own disk reserves nothing."""
    with open(tmp_path / "probe", "wb") as probe:
        storage.reserve(probe.fileno(), 1 << 16)
    size = taken(tmp_path / "probe")
    (tmp_path / "probe").unlink()
    if size < 1 << 16:
        pytest.skip("this file system reserves nothing")


@contextmanager
def disk_with(free: int) -> Iterator[None]:
    """A disk that says it has so many bytes free."""

    class Usage:
        pass

    usage = Usage()
    usage.free = free  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.shutil, "disk_usage", lambda path: usage)
        yield


@contextmanager
def before_the_first_weight(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` when the folder is open and nothing is computed."""

    def looked(*args: Any) -> Any:
        look()
        return run(*args)

    with pytest.MonkeyPatch.context() as patch:
        for module in (sys.modules["lean_merge.merge"], sys.modules["lean_merge.studies.analyze"]):
            patch.setattr(module, "run", looked)
        yield


# --- before the start -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_lacks_a_byte_is_refused_before_anything_is_made(
    triple: Triple, tmp_path: Path, kind: str
):
    found = planned(triple, kind)
    need, out = found.prediction.disk, tmp_path / "out"
    place = {"inputs": found.inputs, "overwrite": False, "reserve": found.reserve}
    with disk_with(need - 1), pytest.raises(BudgetError, match="needs"):
        check_output(out, found.shards, **place)
    with disk_with(need):
        check_output(out, found.shards, **place)
    with disk_with(need - 1), pytest.raises(BudgetError) as refused:
        make(triple, kind, out)
    assert f"needs {format_size(need)} and the disk has" in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    with disk_with(need):
        make(triple, kind, out)
    assert out.is_dir()


def test_who_lacks_the_disk_for_an_adapter_is_told_of_a_rank_that_fits(
    wide: Triple, tmp_path: Path
):
    small = planned(wide, "lora", lora_rank=16).prediction.disk
    assert small < planned(wide, "lora").prediction.disk
    with disk_with(small):
        with pytest.raises(BudgetError, match=rf"--lora-rank \(16 needs {format_size(small)}\)"):
            make(wide, "lora", tmp_path / "out")
        make(wide, "lora", tmp_path / "out", lora_rank=16)
    # No rank is named where none is smaller.
    assert planned(wide, "lora", lora_rank=16).reserve.smaller == ""


def test_who_lacks_the_disk_for_an_analysis_is_told_of_the_rank(wide: Triple, tmp_path: Path):
    small = planned(wide, "analysis", rank=8).prediction.disk
    with disk_with(small):
        with pytest.raises(BudgetError, match="--rank"):
            make(wide, "analysis", tmp_path / "out")
        make(wide, "analysis", tmp_path / "out", rank=8)


@pytest.mark.parametrize("kind", ["lora", "checkpoint"])
def test_a_threshold_to_be_found_needs_the_disk_of_its_analysis_too(
    wide: Triple, tmp_path: Path, kind: str
):
    options = {"output": kind, "threshold": "auto"}
    whole = plan(wide.recipe(**options), CPU)
    first = planned(wide, "analysis", threshold="auto", output=kind).reserve
    # Its recipe is as long.
    known = plan(wide.recipe(output=kind, threshold=0.25), CPU)
    assert whole.prediction.disk == first.nbytes + known.prediction.disk
    with disk_with(whole.prediction.disk - 1), pytest.raises(BudgetError):
        wide.merge(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


# --- while it runs ----------------------------------------------------------------------------


@pytest.mark.usefixtures("reserving")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_all_is_reserved_before_the_first_weight_and_given_back(
    triple: Triple, tmp_path: Path, kind: str, overwrite: bool
):
    out, reserve = tmp_path / "out", planned(triple, kind).reserve
    place = out
    if overwrite:
        make(triple, kind, out, scale=0.5)
        place = tmp_path / ".out.lean-merge-new"
    seen = {}

    def look() -> None:
        seen["blocks"] = (place / BLOCKS).stat().st_size, taken(place / BLOCKS)
        seen["journal"] = (place / PARTIAL).stat().st_size, taken(place / PARTIAL)

    with before_the_first_weight(look):
        make(triple, kind, out, overwrite=overwrite)
    size, held = seen["blocks"]
    assert size == reserve.blocks + reserve.made <= held < size + (1 << 16)
    size, held = seen["journal"]
    assert reserve.journal <= size <= held < size + (1 << 16)
    names = {each.name for each in out.iterdir()}
    assert not any(name.endswith(".partial") for name in names)
    assert all(taken(out / name) < (out / name).stat().st_size + (1 << 16) for name in names)


def most_held(recorder: Recorder) -> int:
    """The most bytes that all files had together at any moment of what was recorded."""
    tree, most = recorder.after(0, lambda *_: True), 0
    for change in recorder.changes:
        apply(tree, change, lambda part: True)
        # A file is on the disk until it has no name.
        held = {number for node in tree.values() for number in node.entries.values()}
        most = max(most, sum(len(tree[n].content or b"") for n in held))
    return most


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    rank=st.one_of(st.just("auto"), st.integers(1, 40)),
    temperature=st.sampled_from([1.0, 32.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    threshold=st.sampled_from([0.0, 0.4]),
    reserves=st.booleans(),
)
def test_no_run_takes_more_than_was_told(
    triple: Triple,
    wide: Triple,
    tmp_path: Path,
    kind: str,
    rank: int | str,
    temperature: float,
    dtype: str,
    threshold: float,
    reserves: bool,
):
    """Counted after each change of the disk, with space reserved and without."""
    options: dict[str, Any] = {"temperature": temperature, "threshold": threshold}
    if kind in ("lora", "auto"):
        options |= {"lora_rank": rank, "out_dtype": dtype}
    for each in (triple, wide):
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        told = planned(each, kind, **options).prediction.disk
        recorder = Recorder(root)
        with pytest.MonkeyPatch.context() as patch:
            if not reserves:
                patch.delattr(os, "posix_fallocate", raising=False)
                recorder = Recorder(root)
            with often(), recorder.recording():
                make(each, kind, root / "out", **options)
        held = most_held(recorder)
        assert held <= told
        # All that was told of is reserved at once; without, far less is used.
        assert held == told if reserves else held < told / 2


@pytest.mark.parametrize("kind", ["lora", "none", "analysis"])
def test_journal_and_report_of_many_weights_fit_what_is_told_of_each(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Without the part that does not grow, which would hide too little for a weight."""
    monkeypatch.setattr(disk, "FIXED", 0)
    shapes = {f"layers.{n}.mlp.gate_proj": (96, 64) for n in range(24)}
    many = write_triple(tmp_path / "in", shapes)
    out, reserve = tmp_path / "out", planned(many, kind, threshold=0.0).reserve
    with pytest.raises(Stop):
        make(many, kind, out, threshold=0.0, on_event=stopping(len(shapes)))
    journal = read_journal(out / PARTIAL)
    assert journal is not None and reserve.journal / 10 < journal.length < reserve.journal
    make(many, kind, out, threshold=0.0)
    sizes = {each.name: each.stat().st_size for each in out.iterdir()}
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert weights + 2 * reserve.journal / 10 < sum(sizes.values()) < reserve.made


def test_an_adapter_of_fused_weights_and_several_experts_stays_within(
    family: Callable[..., Triple], two_experts: Triple, tmp_path: Path
):
    for name, each in (("fused", family("phi3")), ("two", two_experts)):
        for kind in KINDS:
            root = tmp_path / name / kind
            root.mkdir(parents=True)
            recorder = Recorder(root)
            with recorder.recording():
                make(each, kind, root / "out", threshold=0.0)
            assert most_held(recorder) <= planned(each, kind, threshold=0.0).prediction.disk


# --- going on ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("reserving")
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_in_the_space_it_has_though_the_disk_is_full(
    triple: Triple, tmp_path: Path, kind: str
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(triple, kind, whole)
    copied = tmp_path / "copied"

    def stop(event: Any) -> None:
        stopping_after(event)
        # What a kill would leave: nothing is closed, cut or noted after it.
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(out, copied)

    stopping_after = stopping(4)
    with often(), pytest.raises(Stop):
        make(triple, kind, out, on_event=stop)
    for left in (out, copied):
        held = taken(left / BLOCKS)
        with open(left / BLOCKS, "r+b") as blocks, open(left / PARTIAL, "r+b") as journal:
            # A copy has holes where nothing was written.
            storage.reserve(blocks.fileno(), (left / BLOCKS).stat().st_size)
            storage.reserve(journal.fileno(), (left / PARTIAL).stat().st_size)
        assert left == copied or taken(left / BLOCKS) == held
        with disk_with(0):
            result = make(triple, kind, left)
        assert result.reused >= 1
        assert sealed(left) == sealed(whole)


@pytest.mark.parametrize("kind", ["lora", "analysis"])
def test_what_is_laid_out_asks_for_no_more_than_its_length(
    triple: Triple, tmp_path: Path, kind: str
):
    """A run that stopped while its weight file was written."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(triple, kind, whole)

    def stop(*args: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFolder, "write_at", stop)
        with pytest.raises(Stop):
            make(triple, kind, out)
    blocks = (out / BLOCKS).stat().st_size
    weights = sum(len(data) for name, data in sealed(whole).items() if name.endswith("tensors"))
    assert blocks < weights < planned(triple, kind).prediction.disk / 3
    (out / f"{next(out.glob('*.safetensors.partial')).name}").unlink()
    with disk_with(weights - 1), pytest.raises(BudgetError):
        make(triple, kind, out)
    with disk_with(weights):
        assert make(triple, kind, out).reused == len(SHAPES)
    assert sealed(out) == sealed(whole)


def test_an_adapter_of_nothing_holds_no_space(triple: Triple, tmp_path: Path):
    with pytest.raises(OutputError, match="no weight was selected"):
        make(triple, "lora", tmp_path / "out", threshold=1.0)
    assert (tmp_path / "out" / BLOCKS).stat().st_size == 0


def test_a_disk_that_refuses_to_reserve_leaves_nothing(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A quota, perhaps, of which the disk's free space says nothing; a new run and an old one."""

    def full(*_: Any) -> None:
        raise NO_SPACE

    out = tmp_path / "out"
    for left in ([], ["out"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full, raising=False)
            with pytest.raises(BudgetError, match="disk is full"):
                make(triple, "lora", out)
        assert [each.name for each in tmp_path.iterdir()] == left
        if not left:
            with pytest.raises(Stop):
                make(triple, "lora", out, on_event=stopping(2))
    assert make(triple, "lora", out).reused == 2


# --- systems that reserve nothing -------------------------------------------------------------


@pytest.mark.parametrize("how", ["no such call", "refused", "glibc writes"])
def test_where_nothing_can_be_reserved_nothing_is_written_instead(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    import fcntl

    wanted = sealed_of(triple, tmp_path / "whole")

    def instead(descriptor: int, offset: int, size: int) -> None:
        if how == "refused":
            raise OSError(errno.EOPNOTSUPP, "not supported")
        # As glibc does where the file system cannot: posix_fallocate(3), notes.
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, "appends")
        os.pwrite(descriptor, bytes(size), offset)

    if how == "no such call":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", instead, raising=False)
    sizes = []
    out = tmp_path / "out"
    with before_the_first_weight(lambda: sizes.append((out / BLOCKS).stat().st_size)):
        make(triple, "lora", out)
    assert sizes == [0]
    assert sealed(out) == wanted


def sealed_of(triple: Triple, out: Path) -> dict[str, bytes]:
    make(triple, "lora", out)
    return sealed(out)


# --- the store, and the journal ---------------------------------------------------------------


@pytest.mark.usefixtures("reserving")
def test_damaged_groups_are_put_again_within_what_is_reserved(tmp_path: Path):
    file, records = tmp_path / BLOCKS, {}
    wanted = Reserve(blocks=4 * 3000, made=500)

    def opened() -> BlockStore:
        store = BlockStore(file, lambda record: records.__setitem__(record["name"], record))
        store.restore(kept_groups(records, file, needed=True))
        store.reserve(wanted)
        return store

    store = opened()
    for name in "abc":
        store.put("x", (1000,), [torch.full((1000,), 1.0)])
        store.finish(name, None)
    store.close()
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    store = opened()
    assert store.groups.keys() == set("bc")
    # 4,000 bytes are a gap.
    assert file.stat().st_size == 4 * 4000 + 500 <= taken(file)
    assert store.spare == 4000 + 500
    store.put("x", (1000,), [torch.full((1000,), 1.0)])
    store.finish("a", None)
    assert store.spare == 500
    store.release()
    assert (store.spare, file.stat().st_size) == (0, 4 * 4000)
    store.release()
    store.close()
    assert kept_groups(records, file, needed=True).keys() == set("abc")


def test_the_reserved_end_of_a_journal_counts_for_nothing(tmp_path: Path):
    folder = OutputFolder.create(
        tmp_path / "out", (), inputs=(), overwrite=False, reserve=Reserve(journal=5000)
    )
    file = tmp_path / "out" / PARTIAL
    folder.blocks.put("x", (2,), [torch.ones(2)])
    folder.blocks.finish("g", None)
    folder.flush()
    journal = read_journal(file)
    assert journal is not None and list(journal.groups) == ["g"]
    data = file.read_bytes()
    assert data[journal.length :] == bytes(len(data) - journal.length)
    folder.abort()
    assert read_journal(file) == journal


def test_the_layer_counts_what_is_held(tmp_path: Path):
    """The test's own count: a file that is replaced or removed is held no more."""
    root = tmp_path / "root"
    root.mkdir()
    recorder = Recorder(root)
    with recorder.recording():
        for name, size in (("a", 1000), ("b", 300)):
            descriptor = os.open(root / name, os.O_RDWR | os.O_CREAT)
            os.ftruncate(descriptor, size)
            os.close(descriptor)
        os.unlink(root / "a")
        os.replace(root / "b", root / "c")
    assert most_held(recorder) == 1300
    assert sum(len(node.content or b"") for node in read_tree(root).values()) == 300


def test_a_resumed_adapter_is_the_same_to_its_report(triple: Triple, tmp_path: Path):
    """Everything but times, the sealed journal included."""
    make(triple, "lora", tmp_path / "whole")
    with pytest.raises(Stop):
        make(triple, "lora", tmp_path / "out", on_event=stopping(3))
    make(triple, "lora", tmp_path / "out")
    assert_same(contents(tmp_path / "out"), contents(tmp_path / "whole"))
