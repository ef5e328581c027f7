"""Digests of bytes that arrive in parts, in any order, against zlib's of the whole."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_merge.store import digest
from lean_merge.store.digest import RangeDigests, combine_crc32, crc32


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.binary(max_size=5000))
def test_two_parts_combine_to_the_whole(first: bytes, second: bytes):
    whole = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert whole == zlib.crc32(first + second)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=9000), st.binary(max_size=9000))
def test_digests_are_zlibs_and_go_on_from_a_former_one(first: bytes, second: bytes):
    assert crc32(memoryview(second), crc32(first)) == zlib.crc32(first + second)


def test_zlib_stands_in_where_the_faster_library_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    spec = importlib.util.spec_from_file_location("slower", digest.__file__)
    assert spec is not None and spec.loader is not None
    slower = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slower)
    assert slower.crc32 is zlib.crc32


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 360), max_size=30),
    seed=st.integers(0, 2**20),
)
def test_ranges_have_the_digest_of_their_bytes_however_cut(
    sizes: list[int], cuts: list[int], seed: int
):
    seeded = random.Random(seed)
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    data = seeded.randbytes(sum(sizes))
    edges = sorted({0, len(data), *starts, *(cut for cut in cuts if cut < len(data))})
    parts = list(itertools.pairwise(edges))
    seeded.shuffle(parts)
    digests = RangeDigests(starts)
    for first, last in parts:
        digests.add(first, memoryview(data)[first:last])
    # What touches is one run at once, so that memory does not grow with the parts.
    assert len(digests._runs) == sum(size > 0 for size in sizes)
    for start, size in zip(starts, sizes, strict=True):
        assert digests.take(start, size) == zlib.crc32(data[start : start + size])
    assert not digests._runs and not digests._begins


def test_bytes_that_are_missing_or_written_twice_are_told():
    digests = RangeDigests([0])
    digests.add(0, memoryview(b"abcd"))
    digests.add(6, memoryview(b"gh"))
    with pytest.raises(ValueError, match="not written once"):
        digests.take(0, 8)
    with pytest.raises(ValueError, match="twice"):
        digests.add(0, memoryview(b"ab"))
    digests.add(4, memoryview(b"ef"))
    assert digests.take(0, 8) == zlib.crc32(b"abcdefgh")
