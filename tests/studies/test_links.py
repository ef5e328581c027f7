"""Outputs of a sweep that share weight files: linked where possible, never at each other's cost."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.families import contents
from support.faults import Recorder, everything, nothing_more, write_tree

from lean_merge.checkpoints import as_bytes, open_checkpoint
from lean_merge.errors import OutputError
from lean_merge.store import OutputFolder, OutputTensor, Shard, plan_shards
from lean_merge.store.check import check_folder
from lean_merge.store.storage import lock_folder
from lean_merge.studies.sweep.links import SPARE, EqualFiles

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the tests look at inodes")

COUNT, LENGTH = 4, 16
"""Tensors, each in a shard of its own, and their numbers."""
RUN = {"environment": {"machine": "this"}, "inputs": []}
SIZE = 4 * LENGTH

Values = tuple[int, ...]
"""What fills each tensor."""


def layout() -> tuple[Shard, ...]:
    tensors = [OutputTensor(f"t{n}", "F32", (LENGTH,), SIZE) for n in range(COUNT)]
    return plan_shards(tensors, shard_size=SIZE)


def create(out: Path, values: Values, **options: Any) -> OutputFolder:
    run = {**RUN, "recipe": {"values": list(values)}}
    options = {"inputs": (), "overwrite": False, "run": run} | options
    return OutputFolder.create(out, layout(), **options)


def fill(folder: OutputFolder, values: Values) -> int:
    """Write what is not there yet; how many tensors that were."""
    written = 0
    for n, shard in enumerate(folder.shards):
        if f"t{n}" not in folder.finished:
            data = as_bytes(torch.full((LENGTH,), float(values[n])))
            folder.writer(shard, f"t{n}")(0, data)
            folder.finish_tensor(shard, f"t{n}", f"own t{n}")
            written += 1
    return written


def make(out: Path, values: Values, **options: Any) -> int:
    with create(out, values, **options) as folder:
        written = fill(folder, values)
        folder.write_file("config.json", b"{}")
        folder.seal()
    return written


def decisions(values: Values) -> dict[str, bytes]:
    """One for each tensor that is in scope, which the first is not."""
    return {f"t{n}": bytes([value]) for n, value in enumerate(values) if n}


def link(*outputs: tuple[Path, Values]) -> list[int]:
    """How many files of each are shared with those before it."""
    files = EqualFiles()
    shared = [files.add(folder, decisions(values)) for folder, values in outputs]
    return [each // layout()[0].size for each in shared]


def assert_holds(folder: Path, values: Values) -> None:
    """The folder is complete, its journal agrees, and its numbers are these."""
    assert check_folder(folder, lambda count: None).differences == []
    files = open_checkpoint(folder).files
    found = {name: float(t[0]) for file in files for name, t in load_file(file).items()}
    assert found == {f"t{n}": float(value) for n, value in enumerate(values)}


def same_files(one: Path, other: Path) -> list[bool]:
    return [
        (one / shard.file_name).samefile(other / shard.file_name)
        for shard in layout()
        if (one / shard.file_name).exists()
    ]


FIRST, SECOND = (4, 1, 2, 3), (4, 1, 9, 3)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two outputs that differ in one file."""
    make(tmp_path / "a", FIRST)
    make(tmp_path / "b", SECOND)
    return tmp_path / "a", tmp_path / "b"


# --- linked -----------------------------------------------------------------------------------


def test_equal_files_become_one_and_nothing_else_changes(pair: tuple[Path, Path]):
    before = [contents(folder) for folder in pair]
    assert link((pair[0], FIRST), (pair[1], SECOND)) == [0, 3]
    assert same_files(*pair) == [True, True, False, True]
    assert [contents(folder) for folder in pair] == before
    assert_holds(pair[0], FIRST)
    assert_holds(pair[1], SECOND)
    assert {each.name for each in pair[0].parent.iterdir()} == {"a", "b"}
    # Linked already, and told of again.
    assert link((pair[0], FIRST), (pair[1], SECOND)) == [0, 3]


def test_of_several_the_first_is_taken(tmp_path: Path):
    for name in "abc":
        make(tmp_path / name, FIRST)
    assert link(*((tmp_path / name, FIRST) for name in "abc")) == [0, 4, 4]
    assert same_files(tmp_path / "a", tmp_path / "c") == [True] * 4


def test_what_a_run_left_that_was_cut_amid_linking_goes(pair: tuple[Path, Path]):
    spare = pair[0].parent / SPARE
    os.link(pair[0] / layout()[2].file_name, spare)
    assert link((pair[0], FIRST), (pair[1], SECOND)) == [0, 3]
    assert not spare.exists()
    assert_holds(pair[1], SECOND)


@pytest.mark.parametrize("which", [0, 1])
def test_replacing_or_removing_one_leaves_the_other(pair: tuple[Path, Path], which: int):
    link((pair[0], FIRST), (pair[1], SECOND))
    other, values = pair[1 - which], (SECOND, FIRST)[which]
    make(pair[which], (5, 5, 5, 5), overwrite=True)
    assert_holds(other, values)
    assert not any(same_files(*pair))
    shutil.rmtree(pair[which])
    assert_holds(other, values)


@pytest.mark.parametrize("lost", ["model.safetensors.index.json", "config.json"])
def test_a_complete_output_that_lost_a_file_is_replaced_beside_those_that_share(
    pair: tuple[Path, Path], lost: str
):
    link((pair[0], FIRST), (pair[1], SECOND))
    (pair[0] / lost).unlink()
    with pytest.raises(OutputError, match=r"complete .* but files are missing\); .*--overwrite"):
        make(pair[0], FIRST)
    make(pair[0], FIRST, overwrite=True)
    assert_holds(pair[0], FIRST)
    assert_holds(pair[1], SECOND)
    assert not any(same_files(*pair))


operations = st.lists(
    st.tuples(
        st.sampled_from(
            ["make", "overwrite", "interrupt", "interrupt overwrite", "lose index", "link"]
        ),
        st.integers(0, 2),
        st.tuples(*[st.integers(0, 1)] * COUNT),
    ),
    min_size=2,
    max_size=8,
)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations)
def test_whatever_becomes_of_one_output_the_others_stay(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, Values]]
):
    """Made, replaced, interrupted, damaged, mended and linked in any order."""
    root = tmp_path_factory.mktemp("any")
    complete: dict[Path, Values] = {}
    files = EqualFiles()
    for action, which, values in steps:
        out = root / f"out{which}"
        overwrite, cut = "overwrite" in action, action.startswith("interrupt")
        if action == "lose index":
            (out / "model.safetensors.index.json").unlink(missing_ok=True)
            complete.pop(out, None)
        elif action == "link":
            files.add(out, decisions(complete.get(out, values)))
        else:
            try:
                with create(out, values, overwrite=overwrite) as folder:
                    fill(folder, values)
                    if not cut:
                        folder.seal()
                        complete[out] = values
            except OutputError as error:
                assert not overwrite, error
        for each, held in complete.items():
            assert_holds(each, held)


# --- not linked -------------------------------------------------------------------------------


def refuse(*args: Any, **options: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("call", ["link", "replace"])
def test_where_no_link_can_be_made_files_stay_apart(
    pair: tuple[Path, Path], call: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, call, refuse)
    assert link((pair[0], FIRST), (pair[1], SECOND)) == [0, 0]
    assert not any(same_files(*pair))
    assert_holds(pair[1], SECOND)
    assert {each.name for each in pair[0].parent.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_is_being_replaced_is_left_alone(pair: tuple[Path, Path], which: int):
    files = EqualFiles()
    assert files.add(pair[0], decisions(FIRST)) == 0
    lock = lock_folder(pair[which])
    assert lock is not None
    try:
        assert files.add(pair[1], decisions(SECOND)) == 0
    finally:
        lock.release()
    assert not any(same_files(*pair))


def test_other_decisions_are_other_files_whatever_the_digests_say(pair: tuple[Path, Path]):
    files = EqualFiles()
    files.add(pair[0], decisions(FIRST))
    assert files.add(pair[1], decisions((4, 7, 9, 3))) == 2 * layout()[0].size
    assert same_files(*pair) == [True, False, False, True]


def unfinished(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def replaced(folder: Path) -> None:
    make(folder, (8, 1, 2, 3), overwrite=True)


def cut(folder: Path) -> None:
    with open(folder / layout()[0].file_name, "r+b") as stream:
        stream.truncate(100)


def a_link_itself(folder: Path) -> None:
    file = folder / layout()[0].file_name
    file.rename(folder / "elsewhere")
    file.symlink_to(folder / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "linked"),
    [(unfinished, 0), (shutil.rmtree, 0), (replaced, 2), (cut, 0), (a_link_itself, 2)],
)
def test_what_is_not_as_it_was_is_not_linked_to(
    pair: tuple[Path, Path], harm: Callable[[Path], None], linked: int
):
    files = EqualFiles()
    files.add(pair[0], decisions(FIRST))
    harm(pair[0])
    assert files.add(pair[1], decisions(SECOND)) == linked * layout()[0].size
    assert_holds(pair[1], SECOND)
    # A later output is linked to the one that is still there.
    make(pair[1].parent / "c", SECOND)
    assert files.add(pair[1].parent / "c", decisions(SECOND)) == 4 * layout()[0].size


# --- power failures ---------------------------------------------------------------------------


def by_chance(seed: int) -> Any:
    return lambda index, change, part: random.Random(f"{seed} {index} {part}").random() < 0.5


def test_power_may_fail_after_any_change(pair: tuple[Path, Path], tmp_path_factory: Any):
    """Both outputs are whole on every disk, and can be linked there."""
    recorder = Recorder(pair[0].parent)
    with recorder.recording():
        assert link((pair[0], FIRST), (pair[1], SECOND)) == [0, 3]
    disk = tmp_path_factory.mktemp("disks") / "disk"
    cuts = range(len(recorder.changes) + 1)
    for cut_at, survives in itertools.product(cuts, (nothing_more, everything, by_chance(1))):
        write_tree(recorder.after(cut_at, survives), disk)
        assert_holds(disk / "a", FIRST)
        assert_holds(disk / "b", SECOND)
        assert link((disk / "a", FIRST), (disk / "b", SECOND)) == [0, 3]
        assert_holds(disk / "b", SECOND)
        assert {each.name for each in disk.iterdir()} == {"a", "b"}
        shutil.rmtree(disk)
