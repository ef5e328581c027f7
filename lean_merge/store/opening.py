"""Where an output goes, under whose lock, and what of it is on the disk already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.checkpoint import INDEX
from lean_merge.checkpoints.header import read_header
from lean_merge.checkpoints.identity import header_digest
from lean_merge.errors import CheckpointError, OutputError
from lean_merge.store.blocks import BLOCKS
from lean_merge.store.digest import range_digest
from lean_merge.store.journal import JOURNAL, Journal, start_record
from lean_merge.store.layout import Shard, extents
from lean_merge.store.replace import Replacement
from lean_merge.store.state import (
    DISCARDED,
    OWN_ANALYSIS,
    PARTIAL,
    Step,
    choose,
    difference,
    is_complete,
    look,
)
from lean_merge.store.storage import (
    check_free_space,
    explain,
    folder_bytes,
    lock_folder,
    make_folder,
    refuse_inputs,
    sync_folder,
)

_STEP = 4 << 20


@dataclass(slots=True)
class Place:
    """Where an output is written.

    Attributes
    ----------
    path
        The folder of its files while it is unfinished.
    replacement
        How it gets to where it belongs, if that is elsewhere.
    journal
        Of the unfinished output to go on with, if there is one.
    locks, made
        Descriptors that hold folders; folders that were made, the highest first.
    """

    path: Path
    replacement: Replacement | None = None
    journal: Journal | None = None
    locks: list[int] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)

    def lock(self, folder: Path) -> None:
        """Hold `folder` until `release`. Raises OSError, OutputError."""
        descriptor = lock_folder(folder)
        if descriptor is not None:
            self.locks.append(descriptor)

    def release(self) -> None:
        """Lets go of the folders; may be called twice."""
        while self.locks:
            os.close(self.locks.pop())

    def undo(self) -> None:
        """Removes the folders that were made, if they are empty."""
        for each in reversed(self.made):
            with suppress(OSError):
                each.rmdir()


def checked_place(out: Path, inputs: Sequence[Path]) -> Path:
    """`out`, resolved. Raises OutputError if it is a file, an input, inside or around one."""
    final = out.expanduser().resolve()
    if final.exists() and not final.is_dir():
        raise OutputError(f"{final}: is a file; choose a folder.")
    replacement = Replacement(final)
    # What lies beside may be deleted, so it must be no input either.
    for place in (final, replacement.new, replacement.old):
        refuse_inputs(place, inputs)
    return final


def find_place(
    final: Path,
    start: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool,
    disk: int = 0,
) -> Place:
    """Where a run that begins with `start` writes, locked and cleared. OSError, LeanMergeError.

    `disk` is the most that it takes, where that is more than the weight files that `start` lists.
    """
    replacement = Replacement(final)
    replacement.recover()
    place = Place(final)
    try:
        if final.exists():
            place.lock(final)
        step = choose(final, start, overwrite=overwrite, resume=resume)
        if step is Step.REPLACE:
            place.path, place.replacement = replacement.new, replacement
            if replacement.new.exists():
                place.lock(replacement.new)
            step = _step_beside(replacement.new, start, resume=resume)
        if step is not Step.GO_ON:
            _check_disk(place, replacement, start, disk=disk)
        if place.replacement is None:
            replacement.discard_new()
        if step is Step.GO_ON:
            place.journal = look(place.path).journal
        elif place.replacement is None:
            _clear(final)
        elif place.path.exists():
            shutil.rmtree(place.path)
        if not place.path.exists():
            place.made = make_folder(place.path)
            place.lock(place.path)
    except BaseException:
        place.release()
        place.undo()
        raise
    return place


def _check_disk(
    place: Place, replacement: Replacement, start: Mapping[str, Any], *, disk: int
) -> None:
    """Raises BudgetError where the disk lacks the space for a whole new output. OSError.

    An output that goes on is not asked: its weight files have their space already, and how much of
    the rest is still to be written is not known.
    """
    needed = max(disk, sum(each["size"] for each in start["shards"]))
    freed = folder_bytes(replacement.new)
    if place.replacement is None:
        freed += folder_bytes(place.path)
    check_free_space(place.path, needed, freed=freed)


def _step_beside(folder: Path, start: Mapping[str, Any], *, resume: bool) -> Step:
    journal = look(folder).journal
    same = journal is not None and difference(journal.start, start) is None
    return Step.GO_ON if resume and same else Step.BEGIN


def _clear(folder: Path) -> None:
    """Removes what an unfinished run left in `folder`, files of others never. OSError.

    The journal goes last: as long as anything else is there, so is what tells whose it is.
    """
    if not folder.is_dir():
        return
    journal = look(folder).journal
    # The journal may be a stranger's: nothing outside the folder is removed.
    ours = {INDEX, *(Path(name).name for name in (journal.shards if journal else ()))}
    for name in sorted(ours):
        for each in (folder / name, folder / f"{name}{PARTIAL}"):
            each.unlink(missing_ok=True)
    (folder / BLOCKS).unlink(missing_ok=True)
    discard_analysis(folder)
    sync_folder(folder)
    for each in (folder / JOURNAL, folder / f"{JOURNAL}{PARTIAL}"):
        each.unlink(missing_ok=True)
    sync_folder(folder)


def discard_analysis(path: Path) -> None:
    """Deletes the analysis that an unfinished output made for itself, if there is one. OSError.

    Under its own name it is always what a run of it left, never half deleted.
    """
    analysis, gone = path / OWN_ANALYSIS, path / DISCARDED
    if gone.is_dir():
        shutil.rmtree(gone)
    if analysis.is_symlink():
        analysis.unlink()
    elif analysis.is_dir():
        os.replace(analysis, gone)
        sync_folder(path)
        shutil.rmtree(gone)


def unseal(path: Path, journal: Journal) -> None:
    """Gives the files of an unfinished output the names back that they had before sealing. OSError.

    At every moment one whole journal is there. A file that another output has too is only let go
    of: under its old name it would be written to.
    """
    # The commit mark goes first: complete folders come here too, which wait for their switch.
    for name in [journal.mark, *journal.shards] if journal.mark else []:
        if (path / name).exists():
            if (path / name).stat().st_nlink > 1:
                os.unlink(path / name)
            else:
                os.replace(path / name, path / f"{name}{PARTIAL}")
            sync_folder(path)
    (path / f"{INDEX}{PARTIAL}").unlink(missing_ok=True)
    sealed, partial = path / JOURNAL, path / f"{JOURNAL}{PARTIAL}"
    if not partial.exists():
        os.replace(sealed, partial)
    sealed.unlink(missing_ok=True)
    sync_folder(path)


def finished_tensors(
    shards: Sequence[Shard], journal: Journal, path: Path
) -> dict[str, dict[str, Any]]:
    """The records of tensors whose bytes, read again, are those that were written. OSError."""
    found = {}
    buffer = memoryview(bytearray(_STEP))
    for shard in shards:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path / f"{shard.file_name}{PARTIAL}", flags)
        try:
            for name, (start, length) in extents(shard).items():
                record = journal.tensors.get(name)
                if record is None or record["shard"] != shard.file_name:
                    continue
                if range_digest(descriptor, start, length, buffer) == record["crc32_data"]:
                    found[name] = record
        finally:
            os.close(descriptor)
    return found


def whole_shards(journal: Journal, path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The records of tensors by weight file, of files that only the run could lay out.

    Of those alone that are whole under their partial names, header and every byte. OSError.
    """
    found = {}
    buffer = memoryview(bytearray(_STEP))
    for name, record in journal.added.items():
        file = path / f"{name}{PARTIAL}"
        if file.is_symlink() or not file.is_file() or file.stat().st_size != record["size"]:
            continue
        if header_digest(file) != record["header_sha256"]:
            continue
        try:
            specs, _ = read_header(file)
        except CheckpointError:
            continue
        records = {n: r for n, r in journal.tensors.items() if r["shard"] == name}
        with open(file, "rb", buffering=0) as stream:
            digests = {
                spec.name: range_digest(stream.fileno(), spec.offset, spec.nbytes, buffer)
                for spec in specs.values()
            }
        if digests == {n: r["crc32_data"] for n, r in records.items()}:
            found[name] = records
    return found


def check_output(
    out: Path,
    shards: Sequence[Shard],
    *,
    inputs: Sequence[Path],
    overwrite: bool,
    run: Mapping[str, Any] | None = None,
    resume: bool = True,
    disk: int = 0,
) -> None:
    """Raises what `OutputFolder.create` would, and touches nothing; for plans."""
    final = checked_place(out, inputs)
    start = start_record(run or {}, shards)
    try:
        if is_complete(final, start):
            return
        step = choose(final, start, overwrite=overwrite, resume=resume)
        replacement = Replacement(final)
        place = Place(final, replacement if step is Step.REPLACE else None)
        if step is not Step.GO_ON:
            _check_disk(place, replacement, start, disk=disk)
    except OSError as error:
        raise explain(final, error) from error


def find_complete(
    out: Path, shards: Sequence[Shard], *, inputs: Sequence[Path], run: Mapping[str, Any]
) -> Path | None:
    """The folder, if `out` holds the complete output of `run` already. Raises OutputError.

    What a crash left of replacing it is ended first.
    """
    final = checked_place(out, inputs)
    try:
        Replacement(final).recover()
        return final if is_complete(final, start_record(run, shards)) else None
    except OSError as error:
        raise explain(final, error) from error
