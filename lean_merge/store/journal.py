"""The journal: which tensors are on the disk, with which digests, and what they were made from.

docs/durability.md specifies the format. Lines are only ever appended; one that does not match its
CRC-32, and all after it, do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.checkpoint import INDEX
from lean_merge.store.layout import Shard
from lean_merge.store.storage import open_own, sync_data, write_all

JOURNAL = "lean_merge_journal.jsonl"
FORMAT = 1
_MAX_LINE = 64 << 20
_SEAL = re.compile(rb',"crc32":"([0-9a-f]{8})"}\n', re.ASCII)
_SEAL_LENGTH = len(b',"crc32":"00000000"}\n')
_SEALED_ONLY = frozenset({"analysis", "file", "end"})

Record = Mapping[str, Any]


def encode(record: Record) -> bytes:
    """A record as a line with its own digest."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return b'%s,"crc32":"%08x"}\n' % (body, zlib.crc32(body))


def decode(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is torn or changed."""
    body, seal = line[:-_SEAL_LENGTH], _SEAL.fullmatch(line[-_SEAL_LENGTH:])
    if seal is None or int(seal[1], 16) != zlib.crc32(body):
        return None
    record: dict[str, Any] = json.loads(body + b"}")
    return record


def start_record(run: Mapping[str, Any], shards: Sequence[Shard]) -> dict[str, Any]:
    """The first record: what must be the same for bytes to be reused."""
    return {
        "record": "start",
        "format": FORMAT,
        "run": dict(run),
        "shards": [_described(shard) for shard in shards],
    }


def shard_record(shard: Shard) -> dict[str, Any]:
    """A record of a weight file whose layout was not known at the start."""
    return {"record": "shard", **_described(shard)}


def _described(shard: Shard) -> dict[str, Any]:
    return {
        "file": shard.file_name,
        "size": shard.size,
        "header_sha256": hashlib.sha256(shard.header).hexdigest(),
    }


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says.

    Attributes
    ----------
    start
        The first record.
    shards, tensors, groups, files
        Weight files, tensors, groups of blocks, and other files, by name; the last record of each
        counts.
    analysis
        What a merge that made its analysis itself found by it; sealed journals only.
    sealed
        Whether it ends in a matching `end` record, as that of a complete output does.
    length
        Bytes of the first lines that count, up to those that only sealed journals have.
    """

    start: dict[str, Any]
    shards: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    analysis: dict[str, Any] | None
    sealed: bool
    length: int

    @property
    def added(self) -> dict[str, dict[str, Any]]:
        """The weight files whose layout only the run could tell."""
        known = {each["file"] for each in self.start["shards"]}
        return {name: record for name, record in self.shards.items() if name not in known}

    @property
    def mark(self) -> str | None:
        """The file whose name makes the output complete."""
        return commit_mark(list(self.shards))


def commit_mark(names: Sequence[str]) -> str | None:
    """The weight file that is renamed last: the only one, or the index of several.

    Without weights it is the removal of the unsealed journal that makes an output complete.
    """
    if len(names) > 1:
        return INDEX
    return names[0] if names else None


def read_journal(file: Path) -> Journal | None:
    """What `file` says; None if there is none, or its first line does not count. OSError."""
    shards: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    start: dict[str, Any] | None = None
    analysis: dict[str, Any] | None = None
    sealed, length, count = False, 0, 0
    whole = hashlib.sha256()
    if file.is_symlink() or not file.is_file():
        return None
    with open(file, "rb") as stream:
        while line := stream.readline(_MAX_LINE):
            record = decode(line)
            if record is None or sealed or (record["record"] == "start") != (count == 0):
                sealed = False
                break
            if record["record"] == "start":
                if record["format"] != FORMAT:
                    return None
                start, shards = record, {each["file"]: each for each in record["shards"]}
            elif record["record"] == "shard":
                shards[record["file"]] = record
            elif record["record"] == "tensor":
                tensors[record["name"]] = record
            elif record["record"] == "blocks":
                groups[record["name"]] = record
            elif record["record"] == "analysis":
                analysis = record["found"]
            elif record["record"] == "file":
                files[record["name"]] = record
            else:
                sealed = record["records"] == count and record["sha256"] == whole.hexdigest()
                if not sealed:
                    break
            whole.update(line)
            length += len(line) if record["record"] not in _SEALED_ONLY else 0
            count += 1
    if start is None:
        return None
    return Journal(start, shards, tensors, groups, files, analysis, sealed, length)


def sealed_lines(records: Iterable[Record]) -> bytes:
    """A sealed journal of `records`, the end added."""
    lines = [encode(record) for record in records]
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    return b"".join([*lines, encode({"record": "end", "records": len(lines), "sha256": digest})])


class JournalWriter:
    """Appends to a journal, each time until it is on the disk.

    Parameters
    ----------
    file
        Made if absent.
    length
        Where to go on; what stands after it is cut off.
    """

    def __init__(self, file: Path, length: int) -> None:
        self._descriptor: int | None = open_own(file)
        self._length = length
        os.ftruncate(self._descriptor, length)

    def append(self, records: Iterable[Record]) -> None:
        """Adds `records`; they are on the disk when this returns. OSError."""
        if self._descriptor is None:
            raise ValueError("The journal is closed.")
        data = b"".join(map(encode, records))
        write_all(self._descriptor, memoryview(data), self._length)
        sync_data(self._descriptor)
        self._length += len(data)

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
