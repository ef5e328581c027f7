"""Outputs that share weight files: linked where possible, and never at each other's cost."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from support.families import contents
from support.faults import Recorder, everything, nothing_more, write_tree

from lean_merge.checkpoints import as_bytes, open_checkpoint, safetensors_dtype
from lean_merge.errors import BudgetError, CheckpointError, LeanMergeError, OutputError
from lean_merge.store import (
    JOURNAL,
    EqualShard,
    OutputFolder,
    OutputTensor,
    Shard,
    Sharing,
    check_folder,
    plan_shards,
)
from lean_merge.store import sharing as sharing_module
from lean_merge.store.storage import lock_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the tests look at inodes")

COUNT, LENGTH = 4, 16
"""Tensors, each in a shard of its own, and their numbers."""
RUN = {"environment": {"machine": "this"}, "inputs": []}

Values = tuple[int, ...]
"""What fills each tensor."""


def layout(length: int = LENGTH) -> tuple[Shard, ...]:
    size = 4 * length
    tensors = [OutputTensor(f"t{n}", "F32", (length,), size) for n in range(COUNT)]
    assert safetensors_dtype(torch.float32) == "F32"
    return plan_shards(tensors, shard_size=size)


def equal_shards(folder: Path, values: Values, wanted: Values) -> list[EqualShard]:
    """The shards of `folder`, which holds `values`, that hold what is wanted."""
    return [
        EqualShard(shard.file_name, folder, {f"t{n}": f"shared t{n}"})
        for n, shard in enumerate(layout())
        if values[n] == wanted[n]
    ]


def create(out: Path, values: Values, **options: Any) -> OutputFolder:
    run = {**RUN, "recipe": {"values": list(values)}} | options.pop("run", {})
    options = {"inputs": (), "overwrite": False, "run": run} | options
    return OutputFolder.create(out, layout(options.pop("length", LENGTH)), **options)


def fill(folder: OutputFolder, values: Values) -> int:
    """Write what is not there yet; how many tensors that were."""
    written = 0
    for n, shard in enumerate(folder.shards):
        if f"t{n}" not in folder.finished:
            length = (shard.size - len(shard.header)) // 4
            folder.write_at(
                shard, shard.offsets[f"t{n}"], as_bytes(torch.full((length,), float(values[n])))
            )
            folder.finish_tensor(shard, f"t{n}", f"own t{n}")
            written += 1
    return written


def make(out: Path, values: Values, **options: Any) -> int:
    with create(out, values, **options) as folder:
        written = fill(folder, values)
        folder.write_file("config.json", b"{}")
        folder.seal()
    return written


def assert_holds(folder: Path, values: Values) -> None:
    """The folder is complete, its journal agrees, and its numbers are these."""
    assert check_folder(folder, lambda count: None).differences == []
    files = open_checkpoint(folder).files
    found = {name: float(t[0]) for file in files for name, t in load_file(file).items()}
    assert found == {f"t{n}": float(value) for n, value in enumerate(values)}


def inodes(folder: Path) -> list[int]:
    return [(folder / shard.file_name).stat().st_ino for shard in layout()]


# --- linked -----------------------------------------------------------------------------------

FIRST, SECOND = (4, 1, 2, 3), (4, 1, 9, 3)


def test_equal_shards_are_linked_and_the_rest_is_written(tmp_path: Path):
    make(tmp_path / "a", FIRST)
    equal = equal_shards(tmp_path / "a", FIRST, SECOND)
    with create(tmp_path / "b", SECOND, equal=equal) as folder:
        assert dict(folder.finished) == {f"t{n}": f"shared t{n}" for n in (0, 1, 3)}
        assert folder.sharing == Sharing(linked=3 * layout()[0].size)
        assert fill(folder, SECOND) == 1
        folder.write_file("config.json", b"{}")
        folder.seal()
    assert_holds(tmp_path / "b", SECOND)
    one, other = inodes(tmp_path / "a"), inodes(tmp_path / "b")
    assert [x == y for x, y in zip(one, other, strict=True)] == [True, True, False, True]
    make(tmp_path / "alone", SECOND)
    found, wanted = contents(tmp_path / "b"), contents(tmp_path / "alone")
    notes = [json.loads(line) for line in found.pop(JOURNAL).splitlines()[:-1]]
    plain = [json.loads(line) for line in wanted.pop(JOURNAL).splitlines()[:-1]]
    assert found == wanted
    for note, other_note in zip(notes, plain, strict=True):
        for each in (note, other_note):
            each.pop("result", None), each.pop("crc32")
        assert note == other_note


def test_an_output_of_equal_shards_alone_is_whole(tmp_path: Path):
    make(tmp_path / "a", FIRST)
    assert make(tmp_path / "b", FIRST, equal=equal_shards(tmp_path / "a", FIRST, FIRST)) == 0
    assert_holds(tmp_path / "b", FIRST)
    assert inodes(tmp_path / "a") == inodes(tmp_path / "b")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("second_has", [1, COUNT])
def test_of_several_that_hold_a_file_one_is_taken(
    tmp_path: Path, links: bool, second_has: int, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a", "b"):
        make(tmp_path / name, FIRST)
    equal = equal_shards(tmp_path / "a", FIRST, FIRST)
    equal += equal_shards(tmp_path / "b", FIRST, FIRST)[-second_has:]
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    bytes_of_all = COUNT * layout()[0].size
    with create(tmp_path / "c", FIRST, equal=equal) as folder:
        shared = folder.sharing.linked if links else folder.sharing.copied
        assert shared == bytes_of_all == folder.sharing.linked + folder.sharing.copied
        assert fill(folder, FIRST) == 0
        folder.write_file("config.json", b"{}")
        folder.seal()
    assert_holds(tmp_path / "c", FIRST)


def test_an_unfinished_output_shows_no_loader_what_is_linked(tmp_path: Path):
    make(tmp_path / "a", FIRST)
    folder = create(tmp_path / "b", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND))
    with folder:
        names = sorted(each.name for each in (tmp_path / "b").iterdir())
        assert [n for n in names if n.endswith(".linked.partial")] and all(
            name.endswith(".partial") for name in names
        )
        with pytest.raises(CheckpointError, match="unfinished"):
            open_checkpoint(tmp_path / "b")
    assert_holds(tmp_path / "a", FIRST)


@pytest.mark.parametrize("give_again", [True, False])
def test_an_interrupted_output_goes_on_with_or_without_the_other(tmp_path: Path, give_again: bool):
    make(tmp_path / "a", FIRST)
    equal = equal_shards(tmp_path / "a", FIRST, SECOND)
    with create(tmp_path / "b", SECOND, equal=equal) as folder:
        fill(folder, SECOND)
    written = make(tmp_path / "b", SECOND, equal=equal if give_again else ())
    assert written == (0 if give_again else 3)
    assert_holds(tmp_path / "b", SECOND)
    assert_holds(tmp_path / "a", FIRST)


def test_starting_over_leaves_the_other_alone(tmp_path: Path):
    make(tmp_path / "a", FIRST)
    with create(tmp_path / "b", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND)):
        pass
    assert make(tmp_path / "b", (5, 5, 5, 5), resume=False) == 4
    assert_holds(tmp_path / "a", FIRST)
    assert_holds(tmp_path / "b", (5, 5, 5, 5))


@pytest.mark.parametrize("lost", ["model.safetensors.index.json", "config.json"])
def test_a_complete_output_that_lost_a_file_is_mended_beside_those_that_share(
    tmp_path: Path, lost: str
):
    """Its files get their unfinished names back and are written to; those of others never."""
    make(tmp_path / "a", FIRST)
    make(tmp_path / "b", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND))
    (tmp_path / "a" / lost).unlink()
    if lost == "config.json":
        make(tmp_path / "a", FIRST, overwrite=True)
    else:
        assert make(tmp_path / "a", FIRST) == 3
    assert_holds(tmp_path / "a", FIRST)
    assert_holds(tmp_path / "b", SECOND)


operations = st.lists(
    st.tuples(
        st.sampled_from(["make", "overwrite", "interrupt", "interrupt overwrite", "lose index"]),
        st.integers(0, 2),
        st.tuples(*[st.integers(0, 1)] * COUNT),
        st.booleans(),
    ),
    min_size=2,
    max_size=7,
)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations)
def test_whatever_becomes_of_one_output_the_others_stay(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, Values, bool]]
):
    """Made, replaced, interrupted, damaged and mended in any order, by links or by copies."""
    root = tmp_path_factory.mktemp("any")
    complete: dict[Path, Values] = {}
    for action, which, values, links in steps:
        out = root / f"out{which}"
        equal = [
            each
            for folder, held in complete.items()
            if folder != out
            for each in equal_shards(folder, held, values)
        ]
        overwrite, cut = "overwrite" in action, action.startswith("interrupt")
        with pytest.MonkeyPatch.context() as patch:
            if not links:
                patch.setattr(os, "link", refuse)
            try:
                if action == "lose index":
                    (out / "model.safetensors.index.json").unlink(missing_ok=True)
                    complete.pop(out, None)
                    continue
                with create(out, values, equal=equal, overwrite=overwrite) as folder:
                    fill(folder, values)
                    if not cut:
                        folder.seal()
                        complete[out] = values
            except OutputError as error:
                assert not overwrite, error
        for each, held in complete.items():
            assert_holds(each, held)


def refuse(*args: Any, **options: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


# --- where no link can be made ----------------------------------------------------------------


@pytest.mark.parametrize("system", ["copies", "copies in parts", "cannot copy", "knows no copying"])
@pytest.mark.parametrize("length", [LENGTH, 40_000])
def test_without_links_files_are_copied_and_it_is_said(
    tmp_path: Path, system: str, length: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "link", refuse)
    real = getattr(os, "copy_file_range", None)
    if system == "cannot copy":
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    elif real is None or system == "knows no copying":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif system == "copies in parts":
        monkeypatch.setattr(
            os, "copy_file_range", lambda s, t, n, at, to: real(s, t, min(n, 999), at, to)
        )
    shards = layout(length)
    equal = [
        EqualShard(shard.file_name, tmp_path / "a", {f"t{n}": "shared"})
        for n, shard in enumerate(shards)
        if n != 2
    ]
    make(tmp_path / "a", FIRST, length=length)
    with create(tmp_path / "b", SECOND, equal=equal, length=length) as folder:
        assert folder.sharing == Sharing(0, 3 * shards[0].size, "Operation not permitted")
        for partial in (tmp_path / "b").glob("*.safetensors.partial"):
            with pytest.raises(SafetensorError), safe_open(partial, "pt"):
                pass
        assert fill(folder, SECOND) == 1
        folder.write_file("config.json", b"{}")
        folder.seal()
    assert_holds(tmp_path / "b", SECOND)
    assert not {*inodes(tmp_path / "a")} & {*inodes(tmp_path / "b")}
    make(tmp_path / "alone", SECOND, length=length)
    for shard in shards:
        found, wanted = (tmp_path / each / shard.file_name for each in ("b", "alone"))
        assert found.read_bytes() == wanted.read_bytes()


def test_copies_of_an_interrupted_run_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", refuse)
    make(tmp_path / "a", FIRST)
    with create(tmp_path / "b", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND)):
        pass
    shutil.rmtree(tmp_path / "a")
    assert make(tmp_path / "b", SECOND) == 1
    assert_holds(tmp_path / "b", SECOND)


def test_a_disk_too_full_for_copies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "a", FIRST)
    monkeypatch.setattr(os, "link", refuse)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BudgetError, match="disk is full"):
        create(tmp_path / "b", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND))
    assert not (tmp_path / "b").exists()
    assert_holds(tmp_path / "a", FIRST)


# --- what is not taken ------------------------------------------------------------------------


def unfinished(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def cut(folder: Path) -> None:
    with open(folder / layout()[0].file_name, "r+b") as stream:
        stream.truncate(100)


def other_header(folder: Path) -> None:
    file = folder / layout()[0].file_name
    file.write_bytes(file.read_bytes().replace(b"t0", b"x0"))


def a_link_itself(folder: Path) -> None:
    file = folder / layout()[0].file_name
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "written"),
    [(unfinished, 4), (gone, 4), (cut, 2), (other_header, 2), (a_link_itself, 2)],
)
def test_what_is_not_as_it_was_sealed_is_not_taken(
    tmp_path: Path, harm: Callable[[Path], None], written: int
):
    make(tmp_path / "a", FIRST)
    equal = equal_shards(tmp_path / "a", FIRST, SECOND)
    harm(tmp_path / "a")
    assert make(tmp_path / "b", SECOND, equal=equal) == written
    assert_holds(tmp_path / "b", SECOND)


@pytest.mark.parametrize("key", ["environment", "inputs"])
def test_what_was_made_elsewhere_or_of_other_inputs_is_not_taken(tmp_path: Path, key: str):
    run = {"environment": {"machine": "other"}} if key == "environment" else {"inputs": [ENTRY]}
    make(tmp_path / "a", FIRST, run=run)
    assert make(tmp_path / "b", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND)) == 4


ENTRY = {"role": "base", "path": "x", "files": []}


def test_an_output_that_is_being_replaced_is_not_taken(tmp_path: Path):
    make(tmp_path / "a", FIRST)
    lock = lock_folder(tmp_path / "a")
    assert lock is not None
    try:
        equal = equal_shards(tmp_path / "a", FIRST, SECOND)
        assert make(tmp_path / "b", SECOND, equal=equal) == 4
    finally:
        os.close(lock)


def test_a_source_that_is_cut_short_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path / "a", FIRST)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0, raising=False)
    monkeypatch.setattr(sharing_module, "_is_whole", lambda file, described: cut(tmp_path / "a"))
    make(tmp_path / "b", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND))
    monkeypatch.setattr(sharing_module, "_is_whole", lambda file, described: True)
    with pytest.raises(LeanMergeError, match="cut short"):
        make(tmp_path / "c", SECOND, equal=equal_shards(tmp_path / "a", FIRST, SECOND))


# --- power failures ---------------------------------------------------------------------------


@pytest.fixture(params=["links", "copies"])
def recorder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorder]:
    """Every change to the disk of an output that shares three of its four files."""
    root = tmp_path / "root"
    root.mkdir()
    make(root / "a", FIRST)
    if request.param == "copies":
        monkeypatch.setattr(os, "link", refuse)
    recorder = Recorder(root)
    with recorder.recording():
        make(root / "b", SECOND, equal=equal_shards(root / "a", FIRST, SECOND))
    yield recorder


def by_chance(seed: int) -> Any:
    return lambda index, change, part: random.Random(f"{seed} {index} {part}").random() < 0.5


def test_power_may_fail_now_and_then(recorder: Recorder, tmp_path: Path):
    cut_everywhere(recorder, tmp_path / "disk", every=4)


@pytest.mark.durability
def test_power_may_fail_after_any_change(recorder: Recorder, tmp_path: Path):
    cut_everywhere(recorder, tmp_path / "disk", every=1)


def cut_everywhere(recorder: Recorder, disk: Path, *, every: int) -> None:
    """The first output is as it was; the second is unfinished or whole, and can be ended."""
    found: dict[str, int] = {"absent": 0, "unfinished": 0, "complete": 0}
    cuts = {0, *range(len(recorder.changes), -1, -every)}
    for cut, survives in itertools.product(cuts, (nothing_more, everything, by_chance(1))):
        write_tree(recorder.after(cut, survives), disk)
        assert_holds(disk / "a", FIRST)
        state = "complete" if (disk / "b").exists() else "absent"
        try:
            open_checkpoint(disk / "b")
        except CheckpointError:
            if state == "complete":
                state = "unfinished"
                assert_nothing_wrong_opens(disk / "b", recorder)
        else:
            assert_holds(disk / "b", SECOND)
        found[state] += 1
        if state != "complete":
            make(disk / "b", SECOND, equal=equal_shards(disk / "a", FIRST, SECOND))
        assert_holds(disk / "a", FIRST)
        assert_holds(disk / "b", SECOND)
        assert not list(disk.rglob("*.partial"))
        shutil.rmtree(disk)
    assert min(found.values()) > 0, found


def assert_nothing_wrong_opens(folder: Path, recorder: Recorder) -> None:
    for file in folder.rglob("*.safetensors*"):
        try:
            with safe_open(file, "pt") as opened:
                assert list(opened.keys()) is not None
        except SafetensorError:
            continue
        name = file.name.removesuffix(".partial").removesuffix(".linked")
        whole: Mapping[str, bytes] = contents(recorder.root / "b")
        assert file.read_bytes() == whole[name], file
