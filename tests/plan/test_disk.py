"""The disk that outputs take: told and looked at before the start; what becomes of a full one."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import Triple, contents, write_triple
from support.faults import Recorder, apply
from support.scenes import SHAPES, Stop, assert_same, often, stopping

from lean_merge import BudgetError, Resources, analyze, cli
from lean_merge.outputs.analysis import AnalysisOutput
from lean_merge.plan import Plan, plan
from lean_merge.sizes import format_size
from lean_merge.store import storage
from lean_merge.store.beforehand import check_output

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the layer stands for POSIX calls")

CPU = Resources(device="cpu", threads=1)
KINDS = ("checkpoint", "lora", "analysis", "auto")
"""The last is an adapter that makes an analysis for itself first."""
WIDE = {"layers.0.mlp.gate_proj": (96, 64), "layers.1.mlp.gate_proj": (96, 64)}


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("in"), SHAPES)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """Weights with many directions."""
    return write_triple(tmp_path_factory.mktemp("wide"), WIDE)


def options_of(kind: str) -> dict[str, Any]:
    return {"output": "lora", "threshold": "auto"} if kind == "auto" else {"output": kind}


def planned(triple: Triple, kind: str, **options: Any) -> Plan:
    if kind == "analysis":
        return plan(triple.recipe(**options), CPU, output=AnalysisOutput)
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
def disk_that_takes(count: int) -> Iterator[None]:
    """A disk, or a quota, that refuses to write after so many writes, and to reserve."""
    real, left = os.pwrite, [count]

    def write(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        yield


# --- before the start -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_lacks_a_byte_is_refused_before_anything_is_made(
    triple: Triple, tmp_path: Path, kind: str
):
    found = planned(triple, kind)
    need, out = found.prediction.disk, tmp_path / "out"
    place = {"inputs": found.inputs, "overwrite": False, "disk": need}
    with disk_with(need - 1), pytest.raises(BudgetError, match="needs"):
        check_output(out, found.shards, **place)
    with disk_with(need):
        check_output(out, found.shards, **place)
    with disk_with(need - 1), pytest.raises(BudgetError) as refused:
        make(triple, kind, out)
    has = f"{format_size(need - 1)} free"
    assert f"needs {format_size(need)} and the disk has {has}" in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    with disk_with(need):
        make(triple, kind, out)
    assert out.is_dir()


@pytest.mark.parametrize("kind", ["lora", "checkpoint"])
def test_a_threshold_to_be_found_needs_the_disk_of_its_analysis_too(
    wide: Triple, tmp_path: Path, kind: str
):
    options = {"output": kind, "threshold": "auto"}
    need = plan(wide.recipe(**options), CPU).prediction.disk
    first = planned(wide, "analysis", threshold="auto", output=kind).prediction.disk
    known = plan(wide.recipe(output=kind, threshold=0.25), CPU).prediction.disk
    assert need == first + known
    with disk_with(need - 1), pytest.raises(BudgetError):
        wide.merge(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["lora", "analysis"])
def test_a_smaller_rank_needs_less(wide: Triple, kind: str):
    less = {"lora_rank": 8} if kind == "lora" else {"rank": 8}
    assert planned(wide, kind, **less).prediction.disk < planned(wide, kind).prediction.disk


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_before_counts_as_free(triple: Triple, tmp_path: Path, kind: str):
    """An unfinished output of another recipe, which is started over."""
    need, out = planned(triple, kind).prediction.disk, tmp_path / "out"
    with often(), pytest.raises(Stop):
        make(triple, kind, out, on_event=stopping(4), seed=5)
    taken = sum(each.lstat().st_size for each in out.rglob("*") if each.is_file())
    options = {"inputs": (), "overwrite": True, "resume": False, "disk": need}
    with disk_with(need - taken):
        check_output(out, planned(triple, kind).shards, **options)
    with disk_with(need - taken - 1), pytest.raises(BudgetError):
        check_output(out, planned(triple, kind).shards, **options)


# --- the estimate -----------------------------------------------------------------------------


def most_held(recorder: Recorder) -> int:
    """The most bytes that weights and blocks had together at any moment of what was recorded."""
    tree, most = recorder.after(0, lambda *_: True), 0
    for change in recorder.changes:
        apply(tree, change, lambda part: True)
        held = {
            number
            for node in tree.values()
            for name, number in node.entries.items()
            if name.endswith((".safetensors", ".safetensors.partial", "blocks.partial"))
        }
        most = max(most, sum(len(tree[n].content or b"") for n in held))
    return most


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    rank=st.one_of(st.just("auto"), st.integers(1, 40)),
    temperature=st.sampled_from([1.0, 32.0]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    threshold=st.sampled_from([0.0, 0.4]),
)
def test_weights_and_blocks_take_no_more_than_was_told(
    triple: Triple,
    wide: Triple,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    rank: int | str,
    temperature: float,
    dtype: str,
    threshold: float,
):
    """Counted after each change of the disk."""
    options: dict[str, Any] = {"temperature": temperature, "threshold": threshold}
    if kind in ("lora", "auto"):
        options |= {"lora_rank": rank, "out_dtype": dtype}
    for each in (triple, wide):
        root = tmp_path_factory.mktemp("root")
        recorder = Recorder(root)
        with often(), recorder.recording():
            make(each, kind, root / "out", **options)
        assert 0 < most_held(recorder) <= planned(each, kind, **options).prediction.disk


def test_an_adapter_of_fused_weights_and_several_experts_stays_within(
    family: Callable[..., Triple], two_experts: Triple, tmp_path: Path
):
    for name, each in (("fused", family("phi3")), ("two", two_experts)):
        for kind in ("lora", "analysis", "auto"):
            root = tmp_path / name / kind
            root.mkdir(parents=True)
            recorder = Recorder(root)
            with recorder.recording():
                make(each, kind, root / "out", threshold=0.0)
            assert most_held(recorder) <= planned(each, kind, threshold=0.0).prediction.disk


# --- a disk that fills up meanwhile -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_is_not_asked_for_space_again(triple: Triple, tmp_path: Path, kind: str):
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(triple, kind, whole)
    with often(), pytest.raises(Stop):
        make(triple, kind, out, on_event=stopping(4, of="lora" if kind == "auto" else ""))
    with disk_with(0):
        assert make(triple, kind, out).reused >= 1
    assert sealed(out) == sealed(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_leaves_what_can_go_on(triple: Triple, tmp_path: Path, kind: str):
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(triple, kind, whole)
    count = 0
    for count in range(4, 400, 7):
        with often(), disk_that_takes(count):
            try:
                make(triple, kind, out)
            except BudgetError as error:
                assert "the disk is full" in str(error) and str(out) in str(error)
                continue
        break
    assert count > 4
    assert sealed(out) == sealed(whole)


@pytest.mark.parametrize("output", ["checkpoint", "lora"])
def test_a_full_disk_ends_the_command_with_4_and_the_same_command_goes_on(
    triple: Triple, tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
):
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    recipe.write_text(triple.recipe(output=output, shard_size=2000).to_yaml())
    words = ["merge", str(recipe), "--out", str(out), "--device", "cpu"]
    with often(), disk_that_takes(20), pytest.raises(SystemExit) as left:
        cli.main([*words, "--quiet"])
    assert left.value.code == 4
    error = capsys.readouterr().err
    assert f"{out}" in error and "the disk is full or over quota; free space" in error
    cli.main(words)
    assert "tensors were on the disk" in capsys.readouterr().err
    triple.merge(tmp_path / "whole", output=output, shard_size=2000)
    assert sealed(out) == sealed(tmp_path / "whole")


def test_a_resumed_adapter_is_the_same_to_its_report(triple: Triple, tmp_path: Path):
    """Everything but times, the sealed journal included."""
    make(triple, "lora", tmp_path / "whole")
    with pytest.raises(Stop):
        make(triple, "lora", tmp_path / "out", on_event=stopping(3))
    make(triple, "lora", tmp_path / "out")
    assert_same(contents(tmp_path / "out"), contents(tmp_path / "whole"))
