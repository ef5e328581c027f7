"""Power failures after any change to the disk, failing disks, and full ones."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.families import contents
from support.faults import Change, Recorder, Survives, everything, nothing_more, write_tree
from support.scenes import (
    SCENES,
    Scene,
    assert_never_half_done,
    assert_same,
    make_scene,
    often,
    try_disk,
)

from lean_merge.errors import BudgetError, OutputError
from lean_merge.store import JOURNAL

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the layer stands for POSIX calls")


@pytest.fixture(scope="module", params=list(SCENES))
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """A merge whose every byte is followed by a sync and a line in the journal."""
    with often():
        yield make_scene(tmp_path_factory.mktemp("crashes"), SCENES[request.param])


def record(scene: Scene, *, overwrite: bool = False, start: Path | None = None) -> Recorder:
    """One merge, from an empty folder, onto an old output, or from what is in `start`."""
    root = scene.folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    if start is not None:
        shutil.copytree(start, root)
    else:
        root.mkdir()
        if overwrite:
            shutil.copytree(scene.folder / "old" / "out", root / "out")
    recorder = Recorder(root)
    with recorder.recording():
        scene.merge(root / "out", overwrite=overwrite)
    assert_same(contents(root / "out"), scene.expected)
    return recorder


def by_chance(seed: int) -> Survives:
    """Each part of each unsynced change survives or not, by the toss of a coin."""
    salt = random.Random(seed).random()

    def survives(index: int, change: Change, part: int) -> bool:
        return random.Random(f"{salt} {index} {part}").random() < 0.5

    return survives


def cut_everywhere(
    recorder: Recorder, scene: Scene, *, overwrite: bool, every: int, chances: int
) -> Counter[str]:
    """Try the disks after every so many changes; what `out` was in them."""
    found: Counter[str] = Counter()
    for cut in range(len(recorder.changes), -1, -every):
        choices = [nothing_more, everything, *(by_chance(cut + n * 1009) for n in range(chances))]
        for survives in choices:
            found[try_disk(recorder.after(cut, survives), scene, overwrite=overwrite)] += 1
    return found


@pytest.mark.parametrize("overwrite", [False, True])
def test_power_may_fail_now_and_then(scene: Scene, overwrite: bool):
    recorder = record(scene, overwrite=overwrite)
    every = len(recorder.changes) // 6
    found = cut_everywhere(recorder, scene, overwrite=overwrite, every=every, chances=1)
    assert found["old" if overwrite else "unfinished"] > 5
    assert found["complete"] > 0


@pytest.mark.durability
@pytest.mark.parametrize("overwrite", [False, True])
def test_power_may_fail_after_any_change(scene: Scene, overwrite: bool, capsys):
    """Every write, growth, sync, creation, renaming and removal of a merge."""
    recorder = record(scene, overwrite=overwrite)
    found = cut_everywhere(recorder, scene, overwrite=overwrite, every=1, chances=3)
    with capsys.disabled():
        kinds = dict(Counter(change.kind for change in recorder.changes))
        print(
            f"\npower failures, overwrite={overwrite}: {len(recorder.changes) + 1} cut points "
            f"{kinds}, {found.total()} disks, found {dict(found)}, none lost"
        )
    assert set(found) >= ({"old", "complete"} if overwrite else {"absent", "unfinished"})


@pytest.mark.durability
@pytest.mark.parametrize("overwrite", [False, True])
def test_power_may_fail_again_while_going_on(scene: Scene, overwrite: bool, capsys):
    """Cuts of a run that goes on from a cut: amid the weights, and amid the sealing."""
    first = record(scene, overwrite=overwrite)
    count = len(first.changes)
    cuts, disks = 0, 0
    for share in (0.3, 0.6, 0.8, 0.9, 0.96):
        start = scene.folder / "start"
        shutil.rmtree(start, ignore_errors=True)
        write_tree(first.after(int(count * share), everything), start)
        again = record(scene, overwrite=overwrite, start=start)
        found = cut_everywhere(again, scene, overwrite=overwrite, every=2, chances=1)
        cuts, disks = cuts + len(again.changes) // 2 + 1, disks + found.total()
    with capsys.disabled():
        print(f"\nagain, overwrite={overwrite}: {cuts} cut points, {disks} disks, none lost")


def go_on_nearly_sealed(scene: Scene, *, overwrite: bool) -> Recorder:
    """A run that goes on from one that was cut just before its unsealed journal went."""
    first = record(scene, overwrite=overwrite)
    unsealed = f"{JOURNAL}.partial"
    cut = max(n for n, c in enumerate(first.changes) if c.kind == "remove" and unsealed in c.data)
    start = scene.folder / "start"
    shutil.rmtree(start, ignore_errors=True)
    write_tree(first.after(cut, everything), start)
    place = start / (".out.lean-merge-new" if overwrite else "out")
    assert {JOURNAL, unsealed} <= {each.name for each in place.iterdir()}
    return record(scene, overwrite=overwrite, start=start)


@pytest.mark.parametrize("overwrite", [False, True])
def test_power_may_fail_beside_a_sealed_journal_now_and_then(scene: Scene, overwrite: bool):
    again = go_on_nearly_sealed(scene, overwrite=overwrite)
    every = len(again.changes) // 3
    found = cut_everywhere(again, scene, overwrite=overwrite, every=every, chances=0)
    assert found["complete"] > 0


@pytest.mark.durability
@pytest.mark.parametrize("overwrite", [False, True])
def test_power_may_fail_beside_a_sealed_journal_after_any_change(scene: Scene, overwrite: bool):
    again = go_on_nearly_sealed(scene, overwrite=overwrite)
    cut_everywhere(again, scene, overwrite=overwrite, every=1, chances=1)


def test_the_layer_tells_a_writer_that_does_not_sync(tmp_path: Path):
    """The layer itself: what is not synced is lost, by sector and by entry."""
    root = tmp_path / "root"
    root.mkdir()
    recorder = Recorder(root)
    with recorder.recording():
        descriptor = os.open(root / "a", os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, b"x" * 1024, 0)
        os.fsync(descriptor)
        os.pwrite(descriptor, b"y" * 1024, 0)
        os.close(descriptor)
        os.replace(root / "a", root / "b")
        folder = os.open(root, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def disk(cut: int, survives: Survives) -> dict[str, bytes]:
        write_tree(recorder.after(cut, survives), tmp_path / "disk")
        found = contents(tmp_path / "disk")
        shutil.rmtree(tmp_path / "disk")
        return found

    assert len(recorder.changes) == 6
    assert disk(5, nothing_more) == {}
    assert disk(6, nothing_more) == {"b": b"x" * 1024}
    assert disk(6, everything) == {"b": b"y" * 1024}
    assert disk(4, everything) == {"a": b"y" * 1024}
    torn = disk(6, lambda index, change, part: part == 1)["b"]
    assert torn == b"x" * 512 + b"y" * 512


# --- disks that refuse ------------------------------------------------------------------------


def refuse(scene: Scene, at: int, number: int, *, overwrite: bool) -> bool:
    """A merge whose disk fails from its `at`-th change on; whether it came so far."""
    root = scene.folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    if overwrite:
        shutil.copytree(scene.folder / "old" / "out", root / "out")
    # A full disk still syncs, renames and removes.
    kinds = {"write", "size", "create"} if number == errno.ENOSPC else None

    def fail(index: int, kind: str) -> OSError | None:
        hit = index >= at and (kinds is None or kind in kinds)
        return OSError(number, os.strerror(number)) if hit else None

    recorder = Recorder(root, fail=fail)
    with recorder.recording():
        try:
            scene.merge(root / "out", overwrite=overwrite)
        except (BudgetError, OutputError) as error:
            full = number == errno.ENOSPC
            assert isinstance(error, BudgetError) is full
            assert ("disk is full" in str(error)) is full
            assert str(root) in str(error)
            failed = True
        else:
            failed = False
    state = assert_never_half_done(root, scene)
    assert state == "complete" or failed
    scene.merge(root / "out", overwrite=overwrite)
    assert_same(contents(root / "out"), scene.expected)
    assert [each.name for each in root.iterdir()] == ["out"]
    return failed


def interrupt(scene: Scene, at: int, *, overwrite: bool) -> bool:
    """A merge that is interrupted when it would change the disk; whether it came so far."""
    root = scene.folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    if overwrite:
        shutil.copytree(scene.folder / "old" / "out", root / "out")
    left = [at]

    def fail(index: int, kind: str) -> BaseException | None:
        # Signals reach the main thread alone, and once.
        if threading.current_thread() is not threading.main_thread():
            return None
        left[0] -= 1
        return KeyboardInterrupt() if left[0] == -1 else None

    try:
        with Recorder(root, fail=fail).recording():
            scene.merge(root / "out", overwrite=overwrite)
    except KeyboardInterrupt:
        interrupted = True
    else:
        interrupted = False
    assert_never_half_done(root, scene)
    scene.merge(root / "out", overwrite=overwrite)
    assert_same(contents(root / "out"), scene.expected)
    assert [each.name for each in root.iterdir()] == ["out"]
    return interrupted


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_may_come_now_and_then(scene: Scene, overwrite: bool):
    places = (0, 4, 21, 33, 10**6)
    found = [interrupt(scene, at, overwrite=overwrite) for at in places]
    assert found == [True, True, True, True, False]


@pytest.mark.durability
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupt_may_come_at_any_change(scene: Scene, overwrite: bool, capsys):
    """Amid opening, writing, laying out, sealing and switching."""
    at = 0
    while interrupt(scene, at, overwrite=overwrite):
        at += 1
    with capsys.disabled():
        print(f"\ninterrupts, overwrite={overwrite}: {at} points, none lost")
    assert at > 30


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_may_refuse_now_and_then(scene: Scene, number: int, overwrite: bool):
    places = (0, 9, 31, 58, 10**6)
    failed = [refuse(scene, at, number, overwrite=overwrite) for at in places]
    assert failed == [True, True, True, True, False]


@pytest.mark.durability
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_may_refuse_from_any_change_on(scene: Scene, number: int, overwrite: bool, capsys):
    at = 0
    while refuse(scene, at, number, overwrite=overwrite):
        at += 1
    with capsys.disabled():
        print(f"\n{errno.errorcode[number]}, overwrite={overwrite}: {at} points, none lost")
    assert at > 60
