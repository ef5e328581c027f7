"""Find and lock the folder in which an output is written, and rename it when it is sealed.

An output that replaces another is written beside it, so that a crash at any moment leaves the old
folder or the new one whole:

    .out.lean-merge-new          the new one, while it is written
    .out.lean-merge-old          the old one, between two renames and while it is deleted

Only between those two renames is `out` itself missing; the next run then completes the switch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.safepaths import resolved
from lean_merge.checkpoints.weightfiles import INDEX
from lean_merge.errors import OutputError
from lean_merge.store.blocks import BLOCKS
from lean_merge.store.journal import JOURNAL, Journal, commit_mark, start_record
from lean_merge.store.layout import Shard
from lean_merge.store.state import (
    DISCARDED,
    OWN_ANALYSIS,
    PARTIAL,
    PARTS,
    UNSEALED,
    State,
    Step,
    choose,
    difference,
    is_complete,
    join_parts,
    look,
)
from lean_merge.store.storage import (
    TRIES,
    FolderLock,
    check_free_space,
    explain,
    folder_bytes,
    hold_folder,
    lock_folder,
    sync_folder,
)


@dataclass(slots=True)
class Workplace:
    """The folder in which an output is written until it is sealed.

    Attributes
    ----------
    final
        Where the output belongs.
    path
        The folder: `final`, or one beside it if the output replaces another.
    journal
        The journal of the unfinished output to go on with, if there is one.
    locks, made
        What holds the folders; folders that were made, the highest first.
    """

    final: Path
    path: Path
    journal: Journal | None = None
    locks: list[FolderLock] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)

    def hold(self, folder: Path) -> None:
        """Hold `folder`, made if it is missing, until `release`. Raises OSError, OutputError."""
        lock, made = hold_folder(folder)
        self.made += made
        if lock is not None:
            self.locks.append(lock)

    def hold_final(self) -> None:
        """Hold the folder where the output belongs. Raises OSError, OutputError.

        Between the two renames by which another run replaces it, that place is empty. A folder that
        is made there at that moment is given up again.
        """
        old = beside(self.final)[1]
        for _ in range(TRIES):
            # What vanishes at a look is another run's, and then the lock says so.
            with suppress(FileNotFoundError):
                recover(self.final)
            self.hold(self.final)
            if not self.locks or (not old.is_dir() and self.locks[-1].is_at(self.final)):
                return
            self.undo()
            self.release()
        raise OutputError(f"{self.final}: others replace it again and again; try again later.")

    def switch(self) -> None:
        """Put the folder that was written in the place of the old one. Raises OSError, OutputError.

        The old one is still held unless somebody removed it meanwhile.
        """
        if not any(lock.is_at(self.final) for lock in self.locks):
            self.hold(self.final)
        switch(self.final)

    def release(self) -> None:
        """Let go of the folders; may be called twice."""
        while self.locks:
            self.locks.pop().release()

    def undo(self) -> None:
        """Remove the folders that were made, if they are empty, while they are still held."""
        while self.made:
            with suppress(OSError):
                self.made.pop().rmdir()


def checked_place(out: Path, inputs: Sequence[Path]) -> Path:
    """Return `out`, resolved; OutputError if it is a file, an input, inside or around one."""
    final = resolved(out, OutputError)
    if final.exists() and not final.is_dir():
        raise OutputError(f"{final}: is a file; choose a folder.")
    # The folders beside it may be deleted, so they must be no inputs either.
    places = [(place, _upward(place)) for place in (final, *beside(final))]
    for given in inputs:
        source = _upward(given.resolve())
        for place, own in places:
            _refuse_input(place, own, given, source)
    return final


def beside(final: Path) -> tuple[Path, Path]:
    """Return the folders through which `final` is replaced: the new one's, and the old one's."""
    hidden = f".{final.name}.lean-merge"
    return final.parent / f"{hidden}-new", final.parent / f"{hidden}-old"


def _upward(path: Path) -> list[Any]:
    """Return what tells `path` and each folder around it from others, from within outwards.

    That is the inode, because names mislead on file systems that ignore case; or the path, if
    nothing is there.
    """
    found: list[Any] = []
    for each in (path, *path.parents):
        try:
            status = each.stat()
            found.append((status.st_dev, status.st_ino))
        except OSError:
            found.append(each)
    return found


def _refuse_input(out: Path, own: Sequence[Any], given: Path, source: Sequence[Any]) -> None:
    for one, other, where in ((own, source, "inside"), (source, own, "around")):
        if other[0] in one:
            place = "is" if other[0] == one[0] else f"lies {where}"
            raise OutputError(
                f"{out}: {place} the input {given}, which must not change; choose an output "
                "folder elsewhere."
            )


def find_workplace(
    final: Path, start: Mapping[str, Any], *, overwrite: bool, resume: bool, disk: int = 0
) -> Workplace:
    """Return where a run whose journal begins with `start` writes, locked and cleared.

    `disk` is the most that it takes, where that is more than the weight files that `start` lists.
    Raises OSError, LeanMergeError.
    """
    place, (new, _) = Workplace(final, final), beside(final)
    try:
        place.hold_final()
        step = choose(final, start, overwrite=overwrite, resume=resume)
        if step is Step.REPLACE:
            place.path = new
            place.hold(new)
            step = _step_beside(new, start, resume=resume)
        if step is Step.GO_ON:
            join_parts(place.path)
            place.journal = look(place.path)[1]
        else:
            check_disk(place, start, disk)
            _clear(place)
        if place.path == final:
            _delete(new)
    except BaseException:
        place.undo()
        place.release()
        raise
    return place


def _step_beside(folder: Path, start: Mapping[str, Any], *, resume: bool) -> Step:
    state, journal = look(folder)
    if not resume or state is not State.UNFINISHED or journal is None:
        return Step.START_OVER
    return Step.START_OVER if difference(journal.start, start) else Step.GO_ON


def check_disk(place: Workplace, start: Mapping[str, Any], disk: int) -> None:
    """Raise BudgetError where the disk lacks the space for a whole new output. Raises OSError.

    An unfinished output that is continued is not checked: its weight files have their space
    already, and how much of the rest is still to be written is not known.
    """
    needed = max(disk, sum(each["size"] for each in start["shards"]))
    leftovers = {place.path, beside(place.final)[0]}
    check_free_space(place.path, needed, freed=sum(map(folder_bytes, leftovers)))


def _clear(place: Workplace) -> None:
    """Remove what an unfinished run left, but no files of anyone else. Raises OSError.

    The unsealed journal is removed last, because it tells whose the other files are.
    """
    folder = place.path
    if folder != place.final:
        if any(folder.iterdir()):
            _remove(folder)
            place.hold(folder)
        return
    _, journal = look(folder)
    # The journal may come from a stranger, so nothing outside the folder is removed.
    ours = {INDEX, *(Path(name).name for name in (journal.shards if journal else ()))}
    parts = (each.name for each in folder.glob(PARTS))
    for name in (*(f"{name}{PARTIAL}" for name in sorted(ours)), BLOCKS, JOURNAL, *parts):
        (folder / name).unlink(missing_ok=True)
    discard_analysis(folder)
    sync_folder(folder)
    (folder / UNSEALED).unlink(missing_ok=True)
    sync_folder(folder)


def discard_analysis(path: Path) -> None:
    """Delete the analysis that an unfinished output made for itself, if any. Raises OSError.

    It is renamed first, so that an analysis under its own name is never half deleted.
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


def publish(folder: Path, names: Sequence[str]) -> None:
    """Give the files of a sealed output their names, and drop what only unfinished ones have.

    `names` are those of its weight files. A file that has its name already keeps it, so that a
    later run can complete what a crash interrupted. Raises OSError.
    """
    (folder / BLOCKS).unlink(missing_ok=True)
    mark = commit_mark(names)
    for name in [name for name in names if name != mark]:
        _rename(folder, name)
    sync_folder(folder)
    if mark is not None:
        _rename(folder, mark)
        sync_folder(folder)


def _rename(folder: Path, name: str) -> None:
    with suppress(FileNotFoundError):
        os.replace(folder / f"{name}{PARTIAL}", folder / name)


def switch(final: Path) -> None:
    """Put the new folder in the old one's place. Raises OSError; then the old one is back."""
    new, old = beside(final)
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(new, final)
    except BaseException:
        os.replace(old, final)
        raise
    sync_folder(final.parent)
    # The output is whole; what cannot be deleted now is deleted by the next run.
    shutil.rmtree(old, ignore_errors=True)


def recover(final: Path) -> bool:
    """Complete what a crash interrupted between renames of `publish` and `switch`; tell if it did.

    Raises OSError, and OutputError if the run that renames is still alive.
    """
    new, old = beside(final)
    ended = False
    for folder in (final, new):
        state, journal = look(folder)
        if state is State.COMPLETE and journal is not None and _is_half_named(folder):
            with _held(folder):
                publish(folder, list(journal.shards))
            ended = True
    whole = not new.is_symlink() and look(new)[0] is State.COMPLETE
    if old.is_dir() and not old.is_symlink():
        if not final.exists() and not whole:
            # Its run may be alive, between the two renames.
            with _held(old):
                os.replace(old, final)
                sync_folder(final.parent)
        elif final.exists():
            _delete(old)
            ended = True
    if whole:
        with _held(new), _held(final):
            switch(final)
    return ended or whole


def _is_half_named(folder: Path) -> bool:
    return any(each.name.endswith(PARTIAL) for each in folder.iterdir())


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder, if it is there, inside the block. Raises OSError, OutputError."""
    lock = lock_folder(folder) if folder.exists() else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _delete(folder: Path) -> None:
    """Delete what a crash left half written, or half deleted. Raises OSError, OutputError."""
    if folder.is_dir() and not folder.is_symlink():
        with _held(folder):
            _remove(folder)


def _remove(folder: Path) -> None:
    # A half-deleted folder must not look like a sealed one.
    (folder / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(folder)


def find_complete(
    out: Path,
    shards: Sequence[Shard],
    *,
    inputs: Sequence[Path],
    run: Mapping[str, Any],
    overwrite: bool = False,
) -> Path | None:
    """Return the folder, if `out` holds the complete output of `run` already. Raises OutputError.

    If a crash interrupted the sealing or replacing of it, that is completed first. With `overwrite`
    only an output counts that was completed now, because any other is to be replaced.
    """
    final = checked_place(out, inputs)
    try:
        ended = recover(final)
        wanted = ended or not overwrite
        return final if wanted and is_complete(final, start_record(run, shards)) else None
    except FileNotFoundError:
        # Another run is at work there, which the lock will tell.
        return None
    except OSError as error:
        raise explain(final, error) from error
