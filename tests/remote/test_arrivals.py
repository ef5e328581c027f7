"""The window over coming bytes: right bytes, each once, in the room that it was given."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_merge.checkpoints import TensorSpec
from lean_merge.checkpoints.elsewhere import FAR_FILES, Room, Tasks
from lean_merge.checkpoints.remote import arrivals, diskcache
from lean_merge.checkpoints.remote.arrivals import MovingWindow
from lean_merge.checkpoints.remote.client import ClosedError, Location, RangedFile
from lean_merge.checkpoints.remote.diskcache import DiskCache
from lean_merge.errors import CheckpointError

AHEAD, BLOCK = 64, 16
LENGTH = 400


class Recorded(RangedFile):
    """A file of `LENGTH` bytes in memory, which notes what is fetched."""

    def __init__(self, number: int) -> None:
        super().__init__(f"file {number}", LENGTH, "", lambda: Location(""))
        self.content = bytes((number * 7 + n * 13) % 251 for n in range(LENGTH))
        self.fetched: list[tuple[int, int]] = []
        self.fails = self.waits = False

    def fetch(
        self,
        start: int,
        parts: Sequence[memoryview],
        closed: threading.Event = threading.Event(),  # noqa: B008
    ) -> None:
        if self.waits:
            closed.wait()
            raise ClosedError
        if self.fails:
            raise CheckpointError("gone")
        stop = start + sum(part.nbytes for part in parts)
        self.fetched.append((start, stop))
        for part in parts:
            part[:] = self.content[start : start + part.nbytes]
            start += part.nbytes


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    found = [Path("first"), Path("second")]
    monkeypatch.setattr(arrivals, "BLOCK", BLOCK)
    monkeypatch.setattr(arrivals, "ON_THE_WAY", AHEAD)
    for number, path in enumerate(found):
        monkeypatch.setitem(FAR_FILES, path, Recorded(number))
    yield found
    diskcache._caches.clear()


def recorded(path: Path) -> Recorded:
    found = FAR_FILES[path]
    assert isinstance(found, Recorded)
    return found


def spec(path: Path, start: int, stop: int) -> TensorSpec:
    return TensorSpec("w", "U8", (stop - start,), path, start, stop - start)


def read_all(window: MovingWindow, each: TensorSpec, step: int) -> bytes:
    """Read a part in steps, from several threads."""
    out, stop = bytearray(each.nbytes), each.offset + each.nbytes

    def read(start: int) -> None:
        end = min(start + step, stop)
        place = memoryview(out)[start - each.offset : end - each.offset]
        window.read(each.file, [(start, end)], place)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(each.offset, stop, step)))
    return bytes(out)


def passed(tasks: Tasks, room: Room, *, looks: int, step: int, again: bool = False) -> int:
    """Read every task so often, check the bytes, and return the most that was held."""
    window, most = MovingWindow(tasks, room, again=again), 0
    try:
        for index, parts in enumerate(tasks):
            for _ in range(looks):
                for each in parts:
                    expected = recorded(each.file).content[each.offset : each.offset + each.nbytes]
                    assert read_all(window, each, step) == expected
                    most = max(most, window._held)
            window.done(index)
    finally:
        window.close()
    assert window._held == 0
    return most


_cuts = st.lists(st.integers(0, LENGTH), min_size=2, max_size=7, unique=True).map(sorted)


@given(_cuts, _cuts, st.integers(1, 3), st.integers(3, 40))
@settings(max_examples=30, deadline=None)
def test_bytes_that_fit_travel_once(cuts: list[int], others: list[int], looks: int, step: int):
    """Tasks of two files, with extents that touch or leave holes, in room for the largest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrivals, "BLOCK", BLOCK)
        patch.setattr(arrivals, "ON_THE_WAY", AHEAD)
        tasks: list[list[TensorSpec]] = [[] for _ in range(6)]
        for number, each in enumerate((cuts, others)):
            path = Path(str(number))
            patch.setitem(FAR_FILES, path, Recorded(number))
            for index, (start, stop) in enumerate(itertools.pairwise(each)):
                tasks[index].append(spec(path, start, stop))
        largest = max(sum(part.nbytes for part in parts) for parts in tasks)
        most = passed(tasks, Room(largest + AHEAD), looks=looks, step=step)
        assert most <= largest + AHEAD
        for path in (Path("0"), Path("1")):
            fetched = sorted(recorded(path).fetched)
            every = (each for parts in tasks for each in parts if each.file == path)
            assert sum(stop - start for start, stop in fetched) == sum(e.nbytes for e in every)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(fetched))
            assert all(stop - start <= BLOCK for start, stop in fetched)


def test_small_neighbours_come_together(files: list[Path]):
    tasks = [[spec(files[0], 4 * n, 4 * n + 4)] for n in range(8)]
    passed(tasks, Room(AHEAD + 4), looks=1, step=4)
    assert sorted(recorded(files[0]).fetched) == [(0, 16), (16, 32)]


@pytest.mark.parametrize("looks", [1, 2])
def test_a_copy_larger_than_the_room_streams(files: list[Path], looks: int):
    """It travels once if it is read once, as copies are."""
    tasks = [[spec(files[0], 0, 8)], [spec(files[1], 0, LENGTH)], [spec(files[0], 8, 20)]]
    assert passed(tasks, Room(AHEAD + 12), looks=looks, step=10) <= AHEAD + 12
    assert sum(stop - start for start, stop in recorded(files[1]).fetched) == looks * LENGTH


def test_a_weight_larger_than_the_memory_goes_to_the_disk(files: list[Path]):
    tasks = [[spec(files[1], 0, LENGTH)], [spec(files[0], 8, 300)]]
    assert passed(tasks, Room(AHEAD, LENGTH), looks=3, step=10) <= AHEAD
    for file, expected in zip(files, (292, LENGTH), strict=True):
        assert sum(stop - start for start, stop in recorded(file).fetched) == expected
    cache = diskcache.disk_cache(LENGTH)
    assert cache is not None and cache.used == 0


@pytest.mark.parametrize("disk", [0, 64, 2 * LENGTH])
def test_what_is_read_again_comes_from_the_disk(files: list[Path], disk: int):
    tasks = [[spec(files[0], 0, 160)], [spec(files[1], 16, 176)]]
    for again in (True, True, False):
        passed(tasks, Room(AHEAD + 160, disk), looks=2, step=10, again=again)
    fetched = sum(stop - start for file in files for start, stop in recorded(file).fetched)
    assert fetched == 3 * 320 - 2 * min(disk, 320)


def test_what_no_task_names_is_fetched_at_once(files: list[Path]):
    window = MovingWindow([[spec(files[0], 100, 200)]], Room(AHEAD + 100), again=False)
    out = bytearray(150)
    window.read(files[0], [(80, 230)], memoryview(out))
    window.read(files[1], [(3, 5)], memoryview(bytearray(2)))
    assert bytes(out) == recorded(files[0]).content[80:230]
    window.close()


def test_an_error_reaches_whoever_reads(files: list[Path]):
    recorded(files[0]).fails = True
    window = MovingWindow([[spec(files[0], 0, 100)]], Room(AHEAD + 100), again=False)
    with pytest.raises(CheckpointError, match="gone"):
        window.read(files[0], [(0, 10)], memoryview(bytearray(10)))
    window.close()


def test_closing_ends_whoever_waits(files: list[Path]):
    recorded(files[0]).waits = True
    window = MovingWindow([[spec(files[0], 0, 100)]], Room(AHEAD + 100), again=False)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(window.read, files[0], [(0, 10)], memoryview(bytearray(10)))
        window.close()
        with pytest.raises(ClosedError):
            job.result()


def test_the_cache_keeps_what_it_has_room_for():
    cache = DiskCache(100)
    assert cache.put(Path("a"), 10, memoryview(b"x" * 60))
    assert not cache.put(Path("a"), 70, memoryview(b"y" * 50))
    assert cache.put(Path("a"), 70, memoryview(b"z" * 40))
    out = bytearray(20)
    assert cache.get(Path("a"), 60, memoryview(out)) and bytes(out) == b"x" * 10 + b"z" * 10
    assert not cache.get(Path("a"), 100, memoryview(out))
    assert not cache.get(Path("a"), 0, memoryview(out))
    assert not cache.get(Path("b"), 60, memoryview(out))
    cache.forget(Path("a"), 0, 70)
    assert cache.used == 40 and cache.put(Path("b"), 0, memoryview(b"w" * 60))
    assert cache.get(Path("b"), 3, memoryview(out)) and bytes(out) == b"w" * 20
