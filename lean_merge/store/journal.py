"""The journal tells which tensors are on the disk, their digests, and what they were made from.

docs/durability.md specifies the format. Lines are only ever appended; one that does not match its
CRC-32, and all after it, do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.jsonfile import MAX_PARSED, parsed_bytes
from lean_merge.checkpoints.safepaths import open_regular
from lean_merge.checkpoints.weightfiles import INDEX
from lean_merge.store.layout import Shard
from lean_merge.store.storage import open_own, sync_data, write_all

JOURNAL = "lean_merge_journal.jsonl"
_FORMAT = 1
_MAX_LINE = 64 << 20
_MAX_TOTAL = 2 << 30
"""Bytes that all lines together may take at most, several times what they do take."""
_SEAL = re.compile(rb',"crc32":"([0-9a-f]{8})"}\n', re.ASCII)
_OUTSIDE = re.compile(r"(^|/)\.\.(/|$)|[\\\0]")
_SEAL_LENGTH = len(b',"crc32":"00000000"}\n')
_SEALED_ONLY = frozenset({"analysis", "file", "end"})

Record = Mapping[str, Any]
"""One line of a journal."""


def encode_line(record: Record) -> bytes:
    """Return a record as a line with its own digest."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return b'%s,"crc32":"%08x"}\n' % (body, zlib.crc32(body))


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None if the line is torn, changed, or no record of ours.

    The journal may come from a stranger, so nothing is parsed that could take much memory.
    """
    body, seal = line[:-_SEAL_LENGTH], _SEAL.fullmatch(line[-_SEAL_LENGTH:])
    if seal is None or int(seal[1], 16) != zlib.crc32(body) or parsed_bytes(line) > MAX_PARSED:
        return None
    try:
        record = json.loads(body + b"}")
    except (ValueError, RecursionError):
        return None
    return record if _makes_sense(record) else None


_FIELDS: Mapping[str, Mapping[str, type]] = {
    "start": {"format": int, "run": dict, "shards": list},
    "shard": {"file": str, "size": int, "header_sha256": str},
    "tensor": {"name": str, "shard": str, "crc32_data": int},
    "blocks": {"name": str, "blocks": list},
    "block": {"name": str, "shape": list, "crc32_data": int},
    "analysis": {"found": dict},
    "file": {"name": str, "size": int, "sha256": str},
    "end": {"records": int, "sha256": str},
}
"""What the records of each kind hold; docs/durability.md explains it."""


def _makes_sense(record: Any, kind: Any = None) -> bool:
    """Tell whether a record has the fields of its kind, and names no file outside the folder."""
    if not isinstance(record, dict):
        return False
    kind = record.get("record") if kind is None else kind
    fields = _FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None or not all(type(record.get(key)) is each for key, each in fields.items()):
        return False
    file = record.get({"file": "name", "tensor": "shard"}.get(kind, "file"), "")
    if not isinstance(file, str) or file.startswith("/") or _OUTSIDE.search(file):
        return False
    inner = {"start": ("shards", "shard"), "blocks": ("blocks", "block")}.get(kind)
    return inner is None or all(_makes_sense(each, inner[1]) for each in record[inner[0]])


def start_record(run: Mapping[str, Any], shards: Sequence[Shard]) -> dict[str, Any]:
    """Return the first record: what must be the same for bytes to be reused."""
    described = [_described(shard) for shard in shards]
    return {"record": "start", "format": _FORMAT, "run": dict(run), "shards": described}


def _described(shard: Shard) -> dict[str, Any]:
    return {
        "file": shard.file_name,
        "size": shard.size,
        "header_sha256": hashlib.sha256(shard.header).hexdigest(),
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """A file, or one tensor of it, that is not as the journal says, and what is wrong with it."""

    file: str
    tensor: str | None
    fault: str

    def __str__(self) -> str:
        return f"{self.file}{f': {self.tensor}' if self.tensor else ''}: {self.fault}"


@dataclass(frozen=True, slots=True)
class Journal:
    """The content of a journal.

    Attributes
    ----------
    start
        The first record.
    shards, tensors, groups, files
        The records of weight files, tensors, groups of blocks, and other files, by name; the last
        record of each counts.
    analysis
        What a merge found in an analysis that it made itself; only sealed journals have it.
    sealed
        Whether it ends in a matching `end` record, as that of a complete output does.
    length
        Bytes of all lines that count, except for those that only sealed journals have.
    """

    start: dict[str, Any]
    shards: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    analysis: dict[str, Any] | None = None
    sealed: bool = False
    length: int = 0


def commit_mark(names: Sequence[str]) -> str | None:
    """Return the file that is renamed last: the only weight file, or the index of several.

    Without weights it is the removal of the unsealed journal that makes an output complete.
    """
    if len(names) > 1:
        return INDEX
    return names[0] if names else None


def read_journal(file: Path) -> Journal | None:
    """Return the journal in `file`; None if its first line is absent or torn. Raises OSError."""
    if file.is_symlink() or not file.is_file():
        return None
    records: list[dict[str, Any]] = []
    sealed, length, parsed, whole = False, 0, 0, hashlib.sha256()
    with open_regular(file) as stream:
        while not sealed and (line := stream.readline(_MAX_LINE)):
            record = decode_line(line)
            parsed += parsed_bytes(line) - parsed_bytes(b"")
            if (
                record is None
                or parsed > _MAX_TOTAL
                or (record["record"] == "start") != (not records)
            ):
                break
            if record["record"] == "end":
                if (record["records"], record["sha256"]) != (len(records), whole.hexdigest()):
                    break
                sealed = not stream.read(1)
            whole.update(line)
            length += len(line) if record["record"] not in _SEALED_ONLY else 0
            records.append(record)
    if not records or records[0]["format"] != _FORMAT:
        return None
    return _journal(records, sealed, length)


def _journal(records: Sequence[dict[str, Any]], sealed: bool, length: int) -> Journal:
    start, analysis = records[0], None
    shards = {each["file"]: each for each in start["shards"]}
    named: dict[str, dict[str, dict[str, Any]]] = {"tensor": {}, "blocks": {}, "file": {}}
    for record in records[1:]:
        if record["record"] == "shard":
            shards[record["file"]] = record
        elif record["record"] == "analysis":
            analysis = record["found"]
        elif record["record"] in named:
            named[record["record"]][record["name"]] = record
    return Journal(
        start=start,
        shards=shards,
        tensors=named["tensor"],
        groups=named["blocks"],
        files=named["file"],
        analysis=analysis,
        sealed=sealed,
        length=length,
    )


def sealed_lines(records: Iterable[Record]) -> bytes:
    """Return a sealed journal of `records`, the end added."""
    return b"".join(_ended(map(encode_line, records)))


def _ended(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a sealed journal, the end added."""
    digest, count = hashlib.sha256(), 0
    for line in lines:
        digest.update(line)
        count += 1
        yield line
    yield encode_line({"record": "end", "records": count, "sha256": digest.hexdigest()})


class JournalWriter:
    """The journal of an unfinished output, and what its sealed form will say.

    Several threads may share one. Records wait as lines, which take a fifth of their memory.

    Parameters
    ----------
    file
        The journal of an interrupted run, or a file to be made.
    start
        The first record.

    Attributes
    ----------
    tensors, files
        The lines of finished tensors and of written files, by name.
    """

    def __init__(self, file: Path, start: Record) -> None:
        self.tensors: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self._start = encode_line(start)
        self._added: list[bytes] = []
        self._analysis: list[bytes] = []
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()
        self._file = file
        self._descriptor: int | None = None
        self._length = 0

    def open(self, length: int) -> None:
        """Continue after `length` bytes of a journal, or begin at 0. Raises OSError."""
        self._descriptor = open_own(self._file)
        self._length = length
        os.ftruncate(self._descriptor, length)
        if length == 0:
            self.save([self._start])

    def add_shard(self, shard: Shard) -> None:
        """Add a weight file whose layout was not known at the start. Raises OSError."""
        line = encode_line({"record": "shard", **_described(shard)})
        self.save([line])
        self._added.append(line)

    def finish(self, record: Record) -> None:
        """Add a tensor or a group of blocks whose bytes were all written, by the next `save`."""
        line = encode_line(record)
        with self._lock:
            if record["record"] == "tensor":
                self.tensors[record["name"]] = line
            self._waiting.append(line)

    @property
    def has_waiting(self) -> bool:
        """Return whether any finished record is not yet in the file."""
        return bool(self._waiting)

    def take_waiting(self) -> list[bytes]:
        """Take the finished lines that are not in the file; they are saved once bytes are synced.

        Whoever fails to sync them must not try again: some systems report a failure once only.
        """
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken

    def save(self, lines: Sequence[bytes]) -> None:
        """Add lines, whose bytes are on the disk; so are the lines after it. Raises OSError."""
        if not lines:
            return
        if self._descriptor is None:
            raise ValueError("The journal is closed.")
        data = b"".join(lines)
        write_all(self._descriptor, memoryview(data), self._length)
        sync_data(self._descriptor)
        self._length += len(data)

    def add_file(self, name: str, size: int, sha256: str) -> None:
        """Note for the sealed journal that a file other than a shard was written."""
        record = {"record": "file", "name": name, "size": size, "sha256": sha256}
        self.files[name] = encode_line(record)

    def add_analysis(self, found: Mapping[str, Any]) -> None:
        """Note for the sealed journal what the output's own analysis found."""
        self._analysis = [encode_line({"record": "analysis", "found": dict(found)})]

    def sealed(self, shards: Sequence[Shard], groups: Iterable[Record]) -> Iterator[bytes]:
        """Yield the lines of the sealed journal, in the order of the output."""
        tensors = (self.tensors[name] for shard in shards for name in shard.offsets)
        files = (self.files[name] for name in sorted(self.files))
        begin = [self._start, *self._added]
        return _ended(chain(begin, map(encode_line, groups), tensors, self._analysis, files))

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
