"""Keep named blocks of numbers in an unfinished output until their file can be laid out.

A safetensors file begins with all shapes, but how large an adapter or an analysis becomes is known
only when every weight has been analysed. Until then the numbers wait in a file of their own, which
is removed when the output is sealed. docs/durability.md specifies it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    sync_data,
    sync_folder,
    write_all,
)

BLOCKS = "lean_merge_blocks.partial"
ITEM = 4
"""Bytes of a float32."""
_STEP = 4 << 20


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block of float32 numbers in a `BlockStore`.

    Attributes
    ----------
    shape
        The lengths of its dimensions.
    crc32
        The CRC-32 of its bytes.
    start
        The offset of its first byte in the store's file.
    """

    shape: tuple[int, ...]
    crc32: int
    start: int

    @property
    def nbytes(self) -> int:
        """Return the block's length in bytes."""
        return math.prod(self.shape) * ITEM


@dataclass(frozen=True, slots=True)
class BlockGroup:
    """Blocks, by name, that were finished together, and the `result` that `finish` was given."""

    blocks: Mapping[str, StoredBlock]
    result: Any


class BlockStore:
    """The blocks of an unfinished output, in a file. One thread uses it; any may call `sync`.

    Parameters
    ----------
    file
        The file, which is made when the first block comes.
    finished
        A function that is called with the journal's record of each finished group.

    Attributes
    ----------
    groups
        The finished groups by name. Those of an interrupted run are among them if their bytes, when
        read again, were intact.
    """

    def __init__(self, file: Path, finished: Callable[[Record], None]) -> None:
        self.groups: dict[str, BlockGroup] = {}
        self._file = file
        self._finished = finished
        self._descriptor: int | None = None
        self._end = 0
        self._open_group: dict[str, StoredBlock] = {}

    def restore(self, groups: Mapping[str, BlockGroup]) -> None:
        """Count `groups` as finished; this must be called before any other method."""
        self.groups.update(groups)
        blocks = [block for group in groups.values() for block in group.blocks.values()]
        self._end = max((block.start + block.nbytes for block in blocks), default=0)

    def put(self, name: str, shape: tuple[int, ...], parts: Iterable[Tensor]) -> StoredBlock:
        """Write a block of the group that the next call of `finish` names.

        Parameters
        ----------
        name
            The block's name in that group.
        shape
            The lengths of its dimensions.
        parts
            Its numbers in order: contiguous float32 tensors on the CPU.

        Raises
        ------
        OutputError, BudgetError
            The disk refuses.
        ValueError
            The parts have too few or too many numbers, or the group has a block of that name.
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
        block = StoredBlock(shape, digest, start)
        if self._end - start != block.nbytes or name in self._open_group:
            raise ValueError(f"{self._end - start} bytes are not block {name!r} of shape {shape}.")
        self._open_group[name] = block
        return block

    def finish(self, name: str, result: Any) -> None:
        """Finish the group of the blocks put so far; no later run has to put them again.

        `groups` keeps the `result`, which must be plain data for JSON. A group may have no blocks.
        """
        group = BlockGroup(self._open_group, result)
        self._open_group = {}
        self.groups[name] = group
        self._finished(to_record(name, group))

    def read(self, block: StoredBlock, first: int, out: Tensor) -> None:
        """Fill a contiguous float32 CPU tensor with a block's numbers from `first` on.

        Raises OutputError or BudgetError where the disk refuses.
        """
        try:
            count = read_all(self._opened(), as_bytes(out), block.start + first * ITEM)
        except OSError as error:
            raise explain(self._file, error) from error
        if count != out.nbytes:
            raise OutputError(
                f"{self._file}: was cut short on the disk; run the merge again with --no-resume."
            )

    def sync(self) -> None:
        """Wait until the blocks are on the disk. Raises OSError."""
        if self._descriptor is not None:
            sync_data(self._descriptor)

    def sealed(self) -> Iterator[Record]:
        """Yield the records of all groups, by name, as a sealed journal has them."""
        return (to_record(name, self.groups[name], sealed=True) for name in sorted(self.groups))

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_own(self._file)
            # Bytes after the end belong to no finished group.
            os.ftruncate(self._descriptor, self._end)
            sync_folder(self._file.parent)
        return self._descriptor


def to_record(name: str, group: BlockGroup, *, sealed: bool = False) -> dict[str, Any]:
    """Return a group as the journal has it; a sealed one does not say where blocks were."""
    blocks = []
    for key, block in group.blocks.items():
        entry = {"name": key, "shape": list(block.shape), "crc32_data": block.crc32}
        blocks.append(entry if sealed else {**entry, "start": block.start})
    return {"record": "blocks", "name": name, "blocks": blocks, "result": group.result}


def stored_groups(records: Mapping[str, Record]) -> dict[str, BlockGroup]:
    """Return the groups that the records of an unsealed journal tell of."""
    groups = {}
    for name, record in records.items():
        blocks = {
            each["name"]: StoredBlock(
                tuple(each["shape"]), each["crc32_data"], each.get("start", 0)
            )
            for each in record["blocks"]
        }
        groups[name] = BlockGroup(blocks, record.get("result"))
    return groups


def intact_groups(records: Mapping[str, Record], file: Path) -> dict[str, BlockGroup]:
    """Return the groups whose blocks in `file` still have their digests. Raises OSError."""
    groups = stored_groups(records)
    if file.is_symlink() or not file.is_file():
        return {name: group for name, group in groups.items() if not group.blocks}
    buffer = memoryview(bytearray(_STEP))
    with open(file, "rb", buffering=0) as stream:

        def intact(block: StoredBlock) -> bool:
            digest = range_digest(stream.fileno(), block.start, block.nbytes, buffer)
            return digest == block.crc32

        return {n: g for n, g in groups.items() if all(map(intact, g.blocks.values()))}
