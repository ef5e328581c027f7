"""What waits on the disk until it is laid out: an interrupted adapter or analysis goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import Triple, contents
from support.faults import Recorder, everything, nothing_more, write_tree
from support.scenes import (
    LORA,
    Scene,
    Stop,
    assert_never_half_done,
    assert_same,
    make_scene,
    often,
    stopping,
)

from lean_merge import OutputError
from lean_merge.store import JOURNAL, BlockStore, Journal, read_journal
from lean_merge.store.blocks import BLOCKS, intact_groups
from lean_merge.store.journal import decode_line, encode_line

PARTIAL = f"{JOURNAL}.partial"
TASKS = 5
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("blocks"), LORA)


@pytest.fixture
def out(scene: Scene) -> Path:
    """Where the scene's adapter goes."""
    folder = scene.folder / "here"
    shutil.rmtree(folder, ignore_errors=True)
    return folder / "out"


def interrupt(scene: Scene, out: Path, after: int, **options: Any) -> None:
    with pytest.raises(Stop):
        scene.merge(out, on_event=stopping(after), **options)


def told(out: Path) -> Journal:
    """The journal of an unfinished output."""
    journal = read_journal(out / PARTIAL)
    assert journal is not None
    return journal


def end_of_blocks(out: Path) -> int:
    """Where the last block ends that the journal tells of."""
    blocks = [block for group in told(out).groups.values() for block in group["blocks"]]
    return max(block["start"] + 4 * math.prod(block["shape"]) for block in blocks)


# --- adapters ---------------------------------------------------------------------------------


@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    runs=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 3])), max_size=2),
    overwrite=st.booleans(),
)
def test_an_adapter_interrupted_anywhere_ends_in_the_same_bytes(
    scene: Scene, runs: list[tuple[int, int]], overwrite: bool
):
    """After any number of weights, any number of times; none of them is computed again."""
    folder = scene.folder / "any"
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    if overwrite:
        shutil.copytree(scene.folder / "old" / "out", out)
    done = 0
    for after, threads in runs:
        if done == TASKS:
            break
        try:
            scene.merge(out, threads=threads, overwrite=overwrite, on_event=stopping(after))
        except Stop:
            state = assert_never_half_done(folder, scene)
            assert state == ("old" if overwrite else "unfinished")
        done += after
        if done > TASKS:
            break
    if done <= TASKS:
        assert scene.merge(out, overwrite=overwrite).reused == done
    assert_same(contents(out), scene.expected)
    assert [each.name for each in folder.iterdir()] == ["out"]


def test_what_a_resumed_adapter_reports_is_what_an_uninterrupted_one_does(scene: Scene, out: Path):
    interrupt(scene, out, 3)
    report = scene.merge(out).report
    expected = json.loads(scene.expected["lean_merge_report.json"])
    for field in ("weights", "counts", "warnings", "bytes", "recipe"):
        assert report[field] == expected[field], field


def all_reused(scene: Scene, survives: Callable[..., bool], *, last: int | None = None) -> int:
    """Cut a run where all weights are noted, or at its last changes; how often it had no name."""
    root = scene.folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    recorder = Recorder(root)
    with often(), recorder.recording():
        scene.merge(root / "out")
    lines = [
        index
        for index, change in enumerate(recorder.changes)
        if change.kind == "write"
        for _ in range(change.data[1].count(b'"record":"blocks"'))
    ]
    first = lines[TASKS - 1] + 2
    assert recorder.changes[first - 1].kind == "sync"
    if last is not None:
        first = len(recorder.changes) - last
    tried = 0
    for cut in range(first, len(recorder.changes) + 1):
        folder = scene.folder / "disk"
        write_tree(recorder.after(cut, survives), folder)
        tried += not (folder / "out" / ADAPTER).exists()
        assert scene.merge(folder / "out").reused == TASKS, cut
        assert_same(contents(folder / "out"), scene.expected)
        shutil.rmtree(folder)
    return tried


@pytest.mark.parametrize("survives", [nothing_more, everything])
def test_a_sealed_adapter_gets_its_name_from_the_next_run(
    scene: Scene, survives: Callable[..., bool]
):
    """The blocks go before that."""
    assert all_reused(scene, survives, last=6) > 1


@pytest.mark.durability
@pytest.mark.parametrize("survives", [nothing_more, everything])
def test_no_weight_is_computed_again_once_all_are_on_the_disk(
    scene: Scene, survives: Callable[..., bool], capsys: pytest.CaptureFixture[str]
):
    """Wherever the run is cut while the adapter is laid out, written and sealed."""
    tried = all_reused(scene, survives)
    with capsys.disabled():
        print(f"\n{tried} cuts of an adapter's writing, {survives.__name__}: nothing made again")
    assert tried > 25


def test_a_bit_that_flipped_in_a_block_costs_its_weight_alone(scene: Scene, out: Path):
    interrupt(scene, out, 4)
    data = bytearray((out / BLOCKS).read_bytes())
    data[0] ^= 1
    (out / BLOCKS).write_bytes(data)
    assert scene.merge(out).reused == 3
    assert_same(contents(out), scene.expected)


@pytest.mark.parametrize("harm", ["gone", "short", "long", "link", "journal"])
def test_blocks_that_were_tampered_with_are_made_again(scene: Scene, out: Path, harm: str):
    interrupt(scene, out, 4)
    # Of the four one is not selected and has none.
    file, reused = out / BLOCKS, 1
    if harm == "gone":
        file.unlink()
    elif harm == "link":
        file.rename(out.parent / "elsewhere")
        file.symlink_to(out.parent / "elsewhere")
    elif harm == "journal":
        os.truncate(out / PARTIAL, told(out).length - 3)
        reused = 3
    elif harm == "short":
        os.truncate(file, end_of_blocks(out) - 4)
        reused = 3
    else:
        os.truncate(file, file.stat().st_size + 100)
        reused = 4
    if harm == "link":
        with pytest.raises(OutputError, match="cannot be written"):
            scene.merge(out)
        file.unlink()
    assert scene.merge(out).reused == reused
    assert_same(contents(out), scene.expected)


def test_starting_over_uses_no_block(scene: Scene, out: Path):
    interrupt(scene, out, 4)
    assert scene.merge(out, resume=False).reused == 0
    assert_same(contents(out), scene.expected)


def test_parts_of_fused_weights_and_several_experts_go_on(
    family: Callable[..., Triple], two_experts: Triple, tmp_path: Path
):
    for name, triple in (("fused", family("phi3")), ("two", two_experts)):
        whole = triple.merge(tmp_path / name / "whole", output="lora")
        out = tmp_path / name / "out"
        with pytest.raises(Stop):
            triple.merge(out, output="lora", on_event=stopping(1))
        assert triple.merge(out, output="lora").reused == 1
        assert whole.path is not None
        assert_same(contents(out), contents(whole.path))


def test_an_analysis_alone_goes_on(small: Triple, tmp_path: Path):
    whole = small.merge(tmp_path / "whole", output="none")
    out = tmp_path / "out"
    with pytest.raises(Stop):
        small.merge(out, output="none", on_event=stopping(1))
    assert {each.name for each in out.iterdir()} == {PARTIAL}
    assert small.merge(out, output="none").reused == 1
    assert whole.path is not None
    assert_same(contents(out), contents(whole.path))
    assert small.merge(out, output="none").was_complete


# --- the store --------------------------------------------------------------------------------

Groups = dict[str, dict[str, list[int]]]


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    groups=st.dictionaries(
        st.text(max_size=3),
        st.dictionaries(st.text(max_size=2), st.lists(st.integers(0, 5), max_size=3), max_size=3),
        min_size=1,
        max_size=5,
    ),
    runs=st.integers(1, 3),
    flip=st.integers(0, 10**6),
    parts=st.integers(1, 4),
)
def test_what_was_put_comes_back_or_is_said_to_be_gone(
    tmp_path: Path,
    groups: Groups,
    runs: int,
    flip: int,
    parts: int,
):
    """Over any number of runs; a flipped bit takes the groups that hold it, and no other."""
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    records: dict[str, Any] = {}
    numbers = {
        (name, key): torch.randn(shape)
        for name, blocks in groups.items()
        for key, shape in blocks.items()
    }

    def opened() -> BlockStore:
        store = BlockStore(file, lambda record: records.__setitem__(record["name"], record))
        store.restore(intact_groups(records, file))
        return store

    names = list(groups)
    for run in range(runs):
        store = opened()
        for name in names[run::runs]:
            for key, shape in groups[name].items():
                store.put(key, tuple(shape), numbers[name, key].reshape(-1).chunk(parts))
            store.finish(name, {"of": name})
        store.sync()
        store.close()
    # As the journal has them, line by line.
    records = {name: decode_line(encode_line(record)) for name, record in records.items()}
    store = opened()
    assert store.groups.keys() == groups.keys()
    for (name, key), wanted in numbers.items():
        block, found = store.groups[name].blocks[key], torch.empty_like(wanted)
        assert block.shape == tuple(wanted.shape)
        store.read(block, 0, found)
        assert torch.equal(found, wanted)
        if found.numel() > 1:
            rest = torch.empty(found.numel() - 1)
            store.read(block, 1, rest)
            assert torch.equal(rest, wanted.reshape(-1)[1:])
    assert all(group.result == {"of": name} for name, group in store.groups.items())
    for each in store.sealed():
        assert all("start" not in block for block in each["blocks"])
    data = bytearray(file.read_bytes()) if file.exists() else bytearray()
    store.close()
    if data:
        place = flip % len(data)
        data[place] ^= 1 << flip % 8
        file.write_bytes(data)
        blocks = [block for record in records.values() for block in record["blocks"]]
        hit = {
            name
            for name, record in records.items()
            for block in record["blocks"]
            if block["start"] <= place < block["start"] + 4 * torch.Size(block["shape"]).numel()
        }
        last = max((b["start"] + 4 * math.prod(b["shape"]) for b in blocks), default=0)
        assert len(hit) == (place < last)
        assert intact_groups(records, file).keys() == groups.keys() - hit


def test_a_block_of_another_length_is_refused(tmp_path: Path):
    store = BlockStore(tmp_path / BLOCKS, lambda record: None)
    with pytest.raises(ValueError, match="not block 'x' of shape"):
        store.put("x", (2, 2), [torch.zeros(3)])
    store.put("y", (3,), [torch.zeros(3)])
    with pytest.raises(ValueError, match="not block 'y'"):
        store.put("y", (3,), [torch.zeros(3)])
    store.close()
