"""Turn equal weight files of a sweep's outputs into one file under several names.

An output is linked when it is complete, and stays complete, because each of its files is replaced
by one rename. Whatever replaces or removes an output unlinks its files and never writes into them,
so outputs that share a file do not depend on each other. docs/durability.md explains the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lean_merge.errors import OutputError
from lean_merge.store import Journal
from lean_merge.store.state import State, look
from lean_merge.store.storage import lock_folder, sync_folder

SPARE = "link.partial"
"""The name that a link has in the sweep's folder before it replaces a file."""


class EqualFiles:
    """The weight files of a sweep's complete outputs, by their content."""

    def __init__(self) -> None:
        self._first: dict[str, Path] = {}

    def add(self, folder: Path, decisions: Mapping[str, Any]) -> int:
        """Turn weight files of a complete output into links to equal ones that were added before.

        Equal files have the same header, and for each tensor the same digest in the journal and
        the same decision. They stay apart where the file system makes no hard links, and while
        another process writes to one of the outputs.

        Parameters
        ----------
        folder
            The output, in the sweep's folder.
        decisions
            The decisions on each tensor in scope, by its name.

        Returns
        -------
        int
            The bytes of the files that `folder` shares with outputs that were added before.
        """
        shared = 0
        with _held(folder) as journal:
            for name, record in journal.shards.items() if journal is not None else ():
                assert journal is not None
                held = _held_by(journal, name)
                decided = [(tensor, decisions.get(tensor)) for tensor in held[1]]
                key, file = repr((held, decided)), folder / name
                if (first := self._first.get(key)) is not None and _link(first, file, held):
                    shared += int(record["size"])
                else:
                    self._first[key] = file
        return shared


def _held_by(journal: Journal, name: str) -> tuple[str, dict[str, int]]:
    """Return the digests that identify a weight file: that of its header, and its tensors'."""
    tensors = {t: r["crc32_data"] for t, r in journal.tensors.items() if r["shard"] == name}
    return journal.shards[name]["header_sha256"], tensors


def _link(source: Path, file: Path, held: tuple[str, dict[str, int]]) -> bool:
    """Make `file` a link to `source` if both hold the same; return whether it is one now."""
    spare = file.parent.parent / SPARE
    with _held(source.parent) as journal:
        if journal is None or source.name not in journal.shards:
            return False
        try:
            if source.is_symlink() or _held_by(journal, source.name) != held:
                return False
            if source.samefile(file):
                return True
            # An interrupted run may have left it.
            spare.unlink(missing_ok=True)
            os.link(source, spare)
            try:
                os.replace(spare, file)
            finally:
                spare.unlink(missing_ok=True)
            sync_folder(file.parent)
        except OSError:
            return False
    return True


@contextmanager
def _held(folder: Path) -> Iterator[Journal | None]:
    """Keep others from replacing an output inside the block; give its journal if complete."""
    lock = journal = None
    try:
        try:
            lock = lock_folder(folder)
            state, found = look(folder)
            journal = found if state is State.COMPLETE else None
        except (OutputError, OSError):
            pass
        yield journal
    finally:
        if lock is not None:
            lock.release()
