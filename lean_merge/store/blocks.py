"""Named blocks of numbers that wait in an unfinished output until what they end up in is laid out.

How large an adapter or an analysis becomes is known only once every weight was analysed, and a
safetensors file begins with all shapes. So numbers wait in a file of their own, which goes when the
output is sealed. docs/durability.md specifies it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lean_merge.checkpoints.reader import as_bytes
from lean_merge.errors import OutputError
from lean_merge.store.digest import crc32, range_digest
from lean_merge.store.journal import Record
from lean_merge.store.storage import (
    explain,
    open_own,
    read_all,
    shorten,
    sync_data,
    sync_folder,
    write_all,
)

BLOCKS = "lean_merge_blocks.partial"
ITEM = 4
"""Bytes of a float32."""
_STEP = 4 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Float32 numbers of a `BlockStore`.

    Attributes
    ----------
    shape
        Their lengths.
    crc32
        Of their bytes.
    start
        Of their first byte in the store's file; None if they are there no more, because the file
        that they ended up in is whole.
    """

    shape: tuple[int, ...]
    crc32: int
    start: int | None

    @property
    def nbytes(self) -> int:
        """Their length in bytes."""
        return math.prod(self.shape) * ITEM


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks by name that are finished together, and what `BlockStore.finish` was told of them."""

    blocks: Mapping[str, Block]
    result: Any


class BlockStore:
    """Blocks on the disk of an unfinished output; for one thread, but for `sync`.

    Parameters
    ----------
    file
        Made when the first block comes.
    finished
        Called with the journal's record of every group that is finished.

    Attributes
    ----------
    groups
        What is finished, by name: by this run, and by interrupted ones whose bytes were read again.
    """

    def __init__(self, file: Path, finished: Callable[[Record], None]) -> None:
        self.groups: dict[str, Group] = {}
        self._file = file
        self._finished = finished
        self._descriptor: int | None = None
        self._end = 0
        self._open_group: dict[str, Block] = {}

    def restore(self, groups: Mapping[str, Group]) -> None:
        """These are finished already. To be called before anything else."""
        self.groups.update(groups)
        blocks = [block for group in groups.values() for block in group.blocks.values()]
        self._end = max((b.start + b.nbytes for b in blocks if b.start is not None), default=0)

    def put(self, name: str, shape: tuple[int, ...], parts: Iterable[Tensor]) -> Block:
        """Keeps a block of the group that `finish` will name.

        Parameters
        ----------
        name
            Its name in that group.
        shape
            Its lengths.
        parts
            Its numbers in order: contiguous float32 tensors on the CPU.

        Raises
        ------
        OutputError, BudgetError
            The disk refuses.
        ValueError
            The parts have not that many numbers, or the group has such a block.
        """
        start, digest = self._end, 0
        try:
            for part in parts:
                data = as_bytes(part)
                write_all(self._opened(), data, self._end)
                digest = crc32(data, digest)
                self._end += data.nbytes
        except OSError as error:
            raise explain(self._file, error) from error
        block = Block(shape, digest, start)
        if self._end - start != block.nbytes or name in self._open_group:
            raise ValueError(f"{self._end - start} bytes are not block {name!r} of shape {shape}.")
        self._open_group[name] = block
        return block

    def finish(self, name: str, result: Any) -> None:
        """All blocks of a group were put, if any, so that an interrupted run need not again.

        `result` is what `groups` tells of it then, as JSON has it.
        """
        group = Group(self._open_group, result)
        self._open_group = {}
        self.groups[name] = group
        self._finished(to_record(name, group))

    def read(self, block: Block, first: int, out: Tensor) -> None:
        """Fills a contiguous float32 CPU tensor with a block's numbers from `first` on.

        Raises OutputError, BudgetError where the disk refuses, or the block is not there.
        """
        count = -1
        try:
            if block.start is not None:
                count = read_all(self._opened(), as_bytes(out), block.start + first * ITEM)
        except OSError as error:
            raise explain(self._file, error) from error
        if count != out.nbytes:
            raise OutputError(
                f"{self._file}: was cut short on the disk; run the merge again with --no-resume."
            )

    def sync(self) -> None:
        """Waits until the blocks are on the disk. OSError."""
        if self._descriptor is not None:
            sync_data(self._descriptor)

    def sealed(self) -> list[Record]:
        """The records of all groups for a sealed journal, by name, for their blocks are to go."""
        return [to_record(name, _without_blocks(self.groups[name])) for name in sorted(self.groups)]

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_own(self._file)
            # What stands after the end belongs to no finished group.
            shorten(self._descriptor, self._end)
            sync_folder(self._file.parent)
        return self._descriptor


def _without_blocks(group: Group) -> Group:
    blocks = {name: Block(b.shape, b.crc32, None) for name, b in group.blocks.items()}
    return Group(blocks, group.result)


def to_record(name: str, group: Group) -> dict[str, Any]:
    """A group as the journal has it, with its blocks' places as long as they have some."""
    blocks = []
    for key, block in group.blocks.items():
        entry = {"name": key, "shape": list(block.shape), "crc32_data": block.crc32}
        blocks.append(entry if block.start is None else {**entry, "start": block.start})
    return {"record": "blocks", "name": name, "blocks": blocks, "result": group.result}


def from_record(record: Record) -> Group:
    """The group of a record that `to_record` made."""
    blocks = {
        each["name"]: Block(tuple(each["shape"]), each["crc32_data"], each.get("start"))
        for each in record["blocks"]
    }
    return Group(blocks, record.get("result"))


def kept_groups(records: Mapping[str, Record], file: Path, *, needed: bool) -> dict[str, Group]:
    """The groups whose blocks, read again from `file`, are those that were put there.

    Without `needed` all of them count: what they ended up in is whole. OSError.
    """
    groups = {name: from_record(record) for name, record in records.items()}
    if not needed:
        return {name: _without_blocks(group) for name, group in groups.items()}
    empty = {name: group for name, group in groups.items() if not group.blocks}
    if file.is_symlink() or not file.is_file():
        return empty
    buffer = memoryview(bytearray(_STEP))
    with open(file, "rb", buffering=0) as stream:

        def intact(block: Block) -> bool:
            if block.start is None:
                return False
            digest = range_digest(stream.fileno(), block.start, block.nbytes, buffer)
            return digest == block.crc32

        return {n: g for n, g in groups.items() if all(map(intact, g.blocks.values()))}


__all__ = ["BLOCKS", "Block", "BlockStore", "Group", "kept_groups", "to_record"]
