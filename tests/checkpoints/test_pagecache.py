"""What the page cache holds of a file, what is brought there, and what is dropped."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from lean_merge.checkpoints import TensorReader, TensorSpec, pagecache, reader
from lean_merge.checkpoints.pagecache import cached_share, fetch
from lean_merge.errors import CheckpointError

PAGE = mmap.PAGESIZE
LARGE = 2 << 20
SIZE = 12 << 20
FIRST = 3 * PAGE + 17
"""Where the tensor begins, in the middle of a page."""


@pytest.fixture
def cold(tmp_path: Path) -> TensorSpec:
    """A tensor in a file of which nothing is in memory."""
    file = tmp_path / "weights"
    # Pages go only once they are on the disk; tests/conftest.py lets fsync do nothing.
    written_at_once = getattr(os, "O_DSYNC", 0)
    opener = lambda path, flags: os.open(path, flags | written_at_once)  # noqa: E731
    with open(file, "wb", buffering=0, opener=opener) as stream:
        assert stream.write(os.urandom(SIZE)) == SIZE
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    spec = TensorSpec("x", "U8", (SIZE - FIRST,), file, FIRST, SIZE - FIRST)
    if share(spec, 0, SIZE) > 0:
        pytest.skip("this file system keeps what it is told to drop")
    return spec


def share(spec: TensorSpec, start: int, length: int) -> float:
    """Share of a range of the file in memory."""
    with open(spec.file, "rb") as stream:
        return cached_share(stream.fileno(), start, length)


def test_both_calls_count_the_same_pages(cold: TensorSpec, monkeypatch: pytest.MonkeyPatch):
    ranges = [
        (0, SIZE),
        (0, PAGE),
        (4 * PAGE, 8 * PAGE),
        (SIZE // 2, SIZE // 2),
        (9 << 20, 1 << 20),
    ]
    with open(cold.file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(stream.fileno(), 6 * PAGE, 2 * PAGE)
        fast = [cached_share(stream.fileno(), *each) for each in ranges]
        monkeypatch.setattr(pagecache, "_cachestat", lambda *_: None)
        assert [cached_share(stream.fileno(), *each) for each in ranges] == fast
    assert fast[0] > 0.0 and fast[2] >= 0.5 and fast[4] == 0.0


def test_nothing_is_said_of_what_cannot_be_told(monkeypatch: pytest.MonkeyPatch):
    """Pipes are mapped by no one, and other systems have neither call."""
    assert cached_share(0, 0, 0) == 1.0
    monkeypatch.setattr(pagecache, "_library", lambda: None)
    assert cached_share(0, 0, 100) == 1.0
    assert not fetch(0, 0, 100)


@pytest.mark.parametrize("how", ["populated", "read", "read bit by bit"])
def test_what_is_asked_for_comes_and_goes(
    cold: TensorSpec, monkeypatch: pytest.MonkeyPatch, how: str
):
    if how == "populated":
        with open(cold.file, "rb") as stream:
            if not fetch(stream.fileno(), 0, PAGE):
                pytest.skip("this system populates no mappings")
        monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("nothing needs to be read"))
    else:
        monkeypatch.setattr(reader, "fetch", lambda *_: False)
    if how == "read bit by bit":
        whole = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, count, at: whole(fd, min(count, 7000), at))
    with TensorReader() as own:
        own.prefetch(cold, 1 << 20, 4 << 20)
        assert share(cold, FIRST + (1 << 20), 4 << 20) == 1.0
        assert own.is_cached(cold, 1 << 20, 4 << 20)
        own.prefetch(cold, 8 << 20, SIZE)
        assert share(cold, FIRST + (8 << 20), SIZE - FIRST - (8 << 20)) == 1.0
        own.drop(cold, 0, SIZE)
        assert not own.is_cached(cold, 0, cold.nbytes)
        assert share(cold, 0, SIZE) == 0.0
        assert own.bytes_read == 0


def test_what_precedes_in_a_large_page_goes_too(cold: TensorSpec):
    with TensorReader() as own:
        own.prefetch(cold, 0, cold.nbytes)
        own.drop(cold, 3 * LARGE - FIRST + LARGE // 2, cold.nbytes)
    assert share(cold, 3 * LARGE, SIZE - 3 * LARGE) == 0.0
    assert share(cold, FIRST, 3 * LARGE - FIRST) == 1.0


@pytest.mark.parametrize("lacking", ["posix_fadvise", "pread"])
def test_without_the_calls_nothing_happens(
    cold: TensorSpec, monkeypatch: pytest.MonkeyPatch, lacking: Any
):
    monkeypatch.setattr(pagecache, "_library", lambda: None)
    with TensorReader() as own:
        if lacking == "pread":
            monkeypatch.delattr(os, lacking)
        own.prefetch(cold, 0, cold.nbytes)
        monkeypatch.delattr(os, "posix_fadvise")
        own.drop(cold, 0, cold.nbytes)
        # Where nothing tells, nothing is to be fetched, and so nothing dropped.
        assert own.is_cached(cold, 0, cold.nbytes)
    monkeypatch.undo()
    assert share(cold, FIRST, cold.nbytes) == (0.0 if lacking == "pread" else 1.0)


def test_a_file_that_has_become_shorter_is_no_error(cold: TensorSpec):
    """Nor is it dropped with one; the read that follows says what is wrong with it."""
    os.truncate(cold.file, 2 << 20)
    with TensorReader() as own:
        own.prefetch(cold, 0, cold.nbytes)
        own.prefetch(cold, 4 << 20, 1 << 20)
        own.drop(cold, 0, cold.nbytes)
        with pytest.raises(CheckpointError, match="truncated while reading tensor 'x'"):
            own.read_into(cold, 4 << 20, memoryview(bytearray(1 << 20)))
