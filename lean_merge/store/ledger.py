"""What the journal of one run is told, in memory: digests of bytes, finished tensors, files."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from lean_merge.store.digest import RangeDigests
from lean_merge.store.journal import JournalWriter, Record, sealed_lines, shard_record
from lean_merge.store.layout import Shard, extents


class Ledger:
    """Keeps count of an output's parts; threads may share one.

    Parameters
    ----------
    start
        The journal's first record.
    shards
        The weight files that it lists.
    """

    def __init__(self, start: Record, shards: Sequence[Shard]) -> None:
        self._start = start
        self._journal: JournalWriter | None = None
        self._added: list[Record] = []
        self._digests = {each.file_name: RangeDigests(each.offsets.values()) for each in shards}
        self._tensors: dict[str, Record] = {}
        self._unsaved: list[Record] = []
        self._files: dict[str, Record] = {}
        self._analysis: list[Record] = []
        self._lock = threading.Lock()

    def open(self, journal: JournalWriter, *, new: bool) -> None:
        """Begin with `journal`, or go on with it. OSError."""
        self._journal = journal
        if new:
            journal.append([self._start])

    def restore(self, finished: Mapping[str, Record]) -> None:
        """These tensors are on the disk, and the journal tells of them."""
        self._tensors.update(finished)

    def add_shard(self, shard: Shard, *, known: bool) -> None:
        """One more weight file, which the journal may tell of already. OSError."""
        record = shard_record(shard)
        if not known:
            self._append([record])
        self._added.append(record)
        self._digests[shard.file_name] = RangeDigests(shard.offsets.values())

    def add_bytes(self, shard: Shard, offset: int, data: memoryview) -> None:
        """`data` goes to `offset` of `shard`."""
        self._digests[shard.file_name].add(offset, data)

    def finish_tensor(self, shard: Shard, name: str, result: Any) -> None:
        """All bytes of a tensor were added. Raises ValueError if they were not, once each."""
        start, length = extents(shard)[name]
        record = {
            "record": "tensor",
            "name": name,
            "shard": shard.file_name,
            "crc32_data": self._digests[shard.file_name].take(start, length),
            "result": result,
        }
        with self._lock:
            self._tensors[name] = record
            self._unsaved.append(record)

    def finish_blocks(self, record: Record) -> None:
        """All bytes of a group of blocks were written."""
        with self._lock:
            self._unsaved.append(record)

    def is_finished(self, name: str) -> bool:
        """Whether the tensor is."""
        return name in self._tensors

    @property
    def has_unsaved(self) -> bool:
        """Whether `take_unsaved` would give any."""
        return bool(self._unsaved)

    def take_unsaved(self) -> list[Record]:
        """What is finished and the journal does not tell of; once its bytes are synced, `save`.

        Whoever fails to sync them must not try again: some systems report a failure once only.
        """
        with self._lock:
            taken, self._unsaved = self._unsaved, []
        return taken

    def save(self, records: Sequence[Record]) -> None:
        """The bytes of these are on the disk; so are the records when this returns. OSError."""
        if records:
            self._append(records)

    def _append(self, records: Sequence[Record]) -> None:
        if self._journal is None:
            raise ValueError("The journal is not open.")
        self._journal.append(records)

    def add_file(self, name: str, size: int, sha256: str) -> None:
        """A file that is not a shard was written."""
        self._files[name] = {"record": "file", "name": name, "size": size, "sha256": sha256}

    def add_analysis(self, found: Mapping[str, Any]) -> None:
        """What the output's own analysis found; for the sealed journal."""
        self._analysis = [{"record": "analysis", "found": dict(found)}]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of files that are not shards."""
        return tuple(self._files)

    def sealed(self, shards: Sequence[Shard], groups: Sequence[Record]) -> bytes:
        """The sealed journal, in the order of the output."""
        tensors = [self._tensors[name] for shard in shards for name in shard.offsets]
        files = [self._files[name] for name in sorted(self._files)]
        records = [self._start, *self._added, *groups, *tensors, *self._analysis, *files]
        return sealed_lines(records)

    def close(self) -> None:
        """May be called twice."""
        if self._journal is not None:
            self._journal.close()
