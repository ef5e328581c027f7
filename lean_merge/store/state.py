"""Tell what an output folder holds, and whether a run may begin, continue or replace it."""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.weightfiles import INDEX
from lean_merge.errors import OutputError
from lean_merge.store.journal import JOURNAL, Journal, JournalWriter, read_journal

PARTIAL = ".partial"
UNSEALED = f"{JOURNAL}{PARTIAL}"
"""The journal of an unfinished output."""
PARTS = f"lean_merge_journal.*.jsonl{PARTIAL}"
"""The journals of other processes that write the same output; their lines belong to that one."""
OWN_ANALYSIS = f"lean_merge_analysis{PARTIAL}"
"""The folder of the analysis that an unfinished output makes for itself."""
DISCARDED = f"lean_merge_discarded{PARTIAL}"
"""The name of that folder while it is deleted."""
_OURS = frozenset({"additional_chat_templates", ".cache", OWN_ANALYSIS, DISCARDED})
_START_OVER = "start over with --no-resume, or choose another folder"


class State(enum.Enum):
    """The state of a folder.

    An output is complete once its journal is sealed and the unsealed one is gone, and its files are
    there in their lengths. A crash may leave some of them with the names that they had before.
    """

    EMPTY = "empty"
    UNFINISHED = "unfinished"
    COMPLETE = "complete"
    OTHER = "other"


class Step(enum.Enum):
    """The step that a run takes with a folder."""

    BEGIN = "begin"
    GO_ON = "go on"
    START_OVER = "start over"
    REPLACE = "replace"


def look(folder: Path) -> tuple[State, Journal | None]:
    """Return what `folder` holds, and its journal where that can be read. Raises OSError."""
    if not folder.is_dir():
        return State.EMPTY, None
    names = {each.name for each in folder.iterdir()}
    journal = read_journal(folder / UNSEALED)
    # A run that is cut at its very beginning leaves a journal without a first line.
    if not names or (journal is None and names == {UNSEALED}):
        return State.EMPTY, None
    if UNSEALED in names:
        return State.UNFINISHED, journal
    journal = read_journal(folder / JOURNAL)
    if journal is not None and journal.sealed and _has_all(folder, journal):
        return State.COMPLETE, journal
    if any(name.endswith((".safetensors" + PARTIAL, INDEX + PARTIAL)) for name in names):
        return State.UNFINISHED, None
    return State.OTHER, journal


def join_parts(folder: Path) -> None:
    """Move the lines of other processes' journals to the end of the output's. Raises OSError."""
    for part in sorted(folder.glob(PARTS)):
        whole, own = read_journal(folder / UNSEALED), read_journal(part)
        if whole is not None and own is not None and own.start == whole.start:
            journal = JournalWriter(folder / UNSEALED, whole.start)
            journal.open(whole.length)
            journal.save([part.read_bytes()[: own.length].partition(b"\n")[2]])
            journal.close()
        part.unlink()


def _has_all(folder: Path, journal: Journal) -> bool:
    """Return whether every file has its length, under its name or the one that it had before."""
    sizes = {name: record["size"] for name, record in (journal.shards | journal.files).items()}
    return all(
        size in (_size(folder / name), _size(folder / f"{name}{PARTIAL}"))
        for name, size in sizes.items()
    )


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def choose(folder: Path, start: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Step:
    """Return what a run whose journal begins with `start` may do with `folder`.

    Raises OutputError if that is nothing, and OSError if the folder cannot be read.
    """
    state, journal = look(folder)
    if state is State.EMPTY:
        return Step.BEGIN
    if state is State.UNFINISHED and journal is not None:
        reason = difference(journal.start, start)
        if reason is None and resume:
            return Step.GO_ON
        if not resume:
            return Step.START_OVER
        if not overwrite:
            raise OutputError(f"{folder}: cannot be resumed, because {reason}; {_START_OVER}.")
    elif state is State.UNFINISHED and not overwrite:
        _refuse_to_lose(folder, overwrite=True, known="")
        raise OutputError(
            f"{folder}: holds an unfinished lean-merge output without a journal, which cannot be "
            "resumed; allow replacing it with --overwrite, or choose another folder."
        )
    known = ""
    if journal is not None and journal.sealed:
        reason = difference(journal.start, start, machine=False)
        if reason is not None or state is not State.COMPLETE:
            known = f" (it holds a complete lean-merge output, but {reason or 'files are missing'})"
        elif added := _added(folder, journal):
            known = f" (it holds the complete output of this very merge, and {added})"
        else:
            # What is replaced is made again, so that nothing can be lost.
            overwrite = overwrite or not resume
            known = " (it holds the complete output of this very merge)"
    _refuse_to_lose(folder, overwrite=overwrite, known=known)
    return Step.REPLACE


def _added(folder: Path, journal: Journal) -> str:
    """Name a file that somebody put into a complete output; empty if there is none."""
    ours = {JOURNAL, INDEX, *journal.shards, *(name.split("/")[0] for name in journal.files)}
    return min({each.name for each in folder.iterdir()} - ours, default="")


def _refuse_to_lose(folder: Path, *, overwrite: bool, known: str) -> None:
    """Raise OutputError unless the content of `folder`, which is not empty, may be replaced.

    Only a model, or part of one, with nothing else beneath, may be: overwriting deletes the old
    folder, and a home folder passed by mistake must survive that. --overwrite is advised only
    where it would help.
    """
    entries = sorted(folder.iterdir())
    names = {each.name for each in entries}
    model = any(name.endswith((".safetensors", ".safetensors" + PARTIAL)) for name in names)
    # A folder with a journal is an output too: that of an analysis holds no weights.
    if not model and not names & {JOURNAL, UNSEALED}:
        raise OutputError(
            f"{folder}: is not empty and holds no model that could be overwritten; choose another "
            "folder, or empty it yourself."
        )
    deep = [each.name for each in entries if each.is_dir() and each.name not in _OURS]
    if deep:
        raise OutputError(
            f"{folder}: holds the folder {deep[0]}, which overwriting would delete; move it "
            "away or choose another output folder."
        )
    sticky = folder.parent.stat().st_mode & stat.S_ISVTX and hasattr(os, "getuid")
    if os.path.ismount(folder) or (sticky and os.getuid() not in {0, folder.stat().st_uid}):
        raise OutputError(
            f"{folder}: cannot be renamed, because a disk is mounted there or it is another user's "
            "in a shared folder, and so it cannot be replaced; choose a folder inside it."
        )
    if not overwrite:
        raise OutputError(
            f"{folder}: is not empty{known}; allow replacing it with --overwrite, or choose "
            "another folder."
        )


def is_complete(folder: Path, start: Mapping[str, Any]) -> bool:
    """Return whether `folder` holds the complete output of a run whose journal begins with `start`.

    The machine may be another. Raises OSError.
    """
    state, journal = look(folder)
    if state is not State.COMPLETE or journal is None:
        return False
    return difference(journal.start, start, machine=False) is None


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], *, machine: bool = True
) -> str | None:
    """Return why the bytes of a run that began with `old` are of no use to one with `new`.

    None means that they are of use. `machine` tells whether library versions and machine matter.
    """
    if old["format"] != new["format"]:
        return "its journal has another format"
    before, now = dict(old["run"]), dict(new["run"])
    if before.get("kind") != now.get("kind"):
        return f"it is of {before.get('kind', 'a merge')}, not of {now.get('kind', 'a merge')}"
    if before.get("recipe") != now.get("recipe"):
        return f"the recipe has changed ({_changed(before.get('recipe'), now.get('recipe'))})"
    if before.get("inputs") != now.get("inputs"):
        return changed_input(before.get("inputs"), now.get("inputs"))
    if machine and before.get("environment") != now.get("environment"):
        changed = _changed(before.get("environment"), now.get("environment"))
        return f"the bytes could differ from those already written ({changed})"
    if before.get("analysis") != now.get("analysis"):
        return "it was decided from another analysis, or from none"
    if before.get("modules") != now.get("modules"):
        return "the installed transformers gives the MLLM's modules other names"
    if {**before, "environment": 0} != {**now, "environment": 0} or old["shards"] != new["shards"]:
        return "its files are laid out differently"
    return None


def _changed(old: Any, new: Any) -> str:
    """Return the first key in which two mappings differ, and how."""
    old, new = old if isinstance(old, dict) else {}, new if isinstance(new, dict) else {}
    for key in [*old, *(each for each in new if each not in old)]:
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
    return "in the order of its keys"


def changed_input(old: Any, new: Any) -> str:
    """Return which input differs, and in what."""
    then = {each["role"]: each for each in old or ()}
    for each in new or ():
        before = then.get(each["role"], {})
        if before.get("path") != each["path"]:
            return f"the {each['role']} was {before.get('path')!r}, is {each['path']!r}"
        files = {file["name"]: file for file in before.get("files", ())}
        for file in each["files"]:
            if file != files.pop(file["name"], None):
                return f"{file['name']} of the {each['role']} has changed since ({each['path']})"
        if files:
            return f"{next(iter(files))} of the {each['role']} is gone ({each['path']})"
    return "the roles are others"
