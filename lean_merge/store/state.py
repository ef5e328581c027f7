"""What an output folder holds, and what that allows: nothing, going on, or only replacing it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.checkpoint import INDEX
from lean_merge.errors import OutputError
from lean_merge.store.journal import JOURNAL, Journal, read_journal

PARTIAL = ".partial"
OWN_ANALYSIS = f"lean_merge_analysis{PARTIAL}"
"""Folder of the analysis that an unfinished output makes for itself."""
DISCARDED = f"lean_merge_discarded{PARTIAL}"
"""What that is called while it is deleted."""
_OURS = frozenset({"additional_chat_templates", ".cache", OWN_ANALYSIS, DISCARDED})
_START_OVER = "start over with --no-resume, or choose another folder"


class State(enum.Enum):
    """What a folder is."""

    EMPTY = "empty"
    UNFINISHED = "unfinished"
    COMPLETE = "complete"
    OTHER = "other"


class Step(enum.Enum):
    """What may be done with it."""

    BEGIN = "begin"
    GO_ON = "go on"
    START_OVER = "start over"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class Found:
    """A folder's state, and its journal where that is readable."""

    state: State
    journal: Journal | None = None


def look(folder: Path) -> Found:
    """What `folder` holds, by names and journal alone. Raises OSError."""
    if not folder.is_dir():
        return Found(State.EMPTY)
    names = {each.name for each in folder.iterdir()}
    # A journal without a first line is all that a run cut at its very beginning leaves.
    journal = read_journal(folder / f"{JOURNAL}{PARTIAL}")
    if not names or (journal is None and names == {f"{JOURNAL}{PARTIAL}"}):
        return Found(State.EMPTY)
    journal = journal or read_journal(folder / JOURNAL)
    if journal is not None:
        whole = journal.sealed and (journal.mark or JOURNAL) in names
        return Found(State.COMPLETE if whole else State.UNFINISHED, journal)
    if any(name.endswith((".safetensors" + PARTIAL, INDEX + PARTIAL)) for name in names):
        return Found(State.UNFINISHED)
    return Found(State.OTHER)


def choose(folder: Path, start: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Step:
    """What a run that begins with `start` may do with `folder`.

    Raises
    ------
    OutputError
        Nothing, for the reason given. OSError if it cannot be read.
    """
    found = look(folder)
    if found.state is State.EMPTY:
        return Step.BEGIN
    if found.state is State.UNFINISHED and found.journal is not None:
        reason = difference(found.journal.start, start)
        if reason is None and resume:
            return Step.GO_ON
        if not resume:
            return Step.START_OVER
        if not overwrite:
            raise OutputError(f"{folder}: cannot be resumed, because {reason}; {_START_OVER}.")
    elif found.state is State.UNFINISHED and not overwrite:
        raise OutputError(
            f"{folder}: holds an unfinished lean-merge output without a journal, which cannot be "
            "resumed; allow replacing it with --overwrite, or choose another folder."
        )
    known = ""
    if found.state is State.COMPLETE and found.journal is not None:
        reason = difference(found.journal.start, start, machine=False) or "files are missing"
        known = f" (it holds a complete lean-merge output, but {reason})"
    refuse_to_lose(folder, overwrite=overwrite, known=known)
    return Step.REPLACE


def refuse_to_lose(folder: Path, *, overwrite: bool, known: str = "") -> None:
    """Raises OutputError unless the content of `folder`, which is not empty, may be replaced.

    `known` is what else is to be said of it.

    Only a model, or part of one, with nothing else beneath, may be: overwriting deletes the old
    folder, and a home folder passed by mistake must survive that.
    """
    if not overwrite:
        raise OutputError(
            f"{folder}: is not empty{known}; allow replacing it with --overwrite, or choose "
            "another folder."
        )
    names = {each.name for each in folder.iterdir()}
    model = any(name.endswith((".safetensors", ".safetensors.partial")) for name in names)
    # A folder with a journal is an output too: that of an analysis holds no weights.
    if not model and not names & {JOURNAL, f"{JOURNAL}{PARTIAL}"}:
        raise OutputError(
            f"{folder}: is not empty and holds no model that could be overwritten; choose another "
            "folder, or empty it yourself."
        )
    deep = sorted(
        each.name for each in folder.iterdir() if each.is_dir() and each.name not in _OURS
    )
    if deep:
        raise OutputError(
            f"{folder}: holds the folder {deep[0]}, which overwriting would delete; move it "
            "away or choose another output folder."
        )


def is_complete(folder: Path, start: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the complete output of a run that begins with `start`.

    The machine may be another; every file must be there in its length. Raises OSError.
    """
    found = look(folder)
    if found.state is not State.COMPLETE or found.journal is None:
        return False
    if difference(found.journal.start, start, machine=False) is not None:
        return False
    records = {**found.journal.shards, **found.journal.files}
    sizes = {name: record["size"] for name, record in records.items()}
    return all(_size(folder / name) == size for name, size in sizes.items())


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], *, machine: bool = True
) -> str | None:
    """Why bytes of a run that began with `old` are of no use to one with `new`; None if they are.

    `machine` tells whether library versions and machine matter too.
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
    if {**before, "environment": 0} != {**now, "environment": 0} or old["shards"] != new["shards"]:
        return "its files are laid out differently"
    return None


def _changed(old: Any, new: Any) -> str:
    """The first key in which two mappings differ, and how."""
    old, new = old if isinstance(old, dict) else {}, new if isinstance(new, dict) else {}
    for key in [*old, *(each for each in new if each not in old)]:
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
    return "in the order of its keys"


def changed_input(old: Any, new: Any) -> str:
    """Which input differs, and in what."""
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
