"""Replacing a folder so that a crash at any moment leaves the old one or the new one whole.

    .out.lean-merge-new          the new one, while it is written
    .out.lean-merge-old          the old one, between two renames and while it is deleted

Between those two renames alone `out` itself is missing; the next run then ends the switch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lean_merge.checkpoints.checkpoint import INDEX, SINGLE
from lean_merge.errors import OutputError
from lean_merge.output.layout import ADAPTER
from lean_merge.output.storage import lock_folder, sync_folder

_REPORTS = frozenset({"lean_merge_report.json", "lean_merge_recipe.yml"})
"""What the output of an analysis alone is made of."""
_OURS = frozenset({"additional_chat_templates", ".cache"})


def refuse_to_lose(folder: Path, *, overwrite: bool) -> None:
    """Raises OutputError unless the content of `folder`, which is not empty, may be replaced.

    Only a model, or part of one, with nothing else beneath, may be: overwriting deletes the old
    folder, and a home folder passed by mistake must survive that.
    """
    if not overwrite:
        unfinished = any(folder.glob("*.partial"))
        state = "holds an unfinished lean-merge output" if unfinished else "is not empty"
        raise OutputError(
            f"{folder}: {state}; allow replacing it with --overwrite, or choose another folder."
        )
    lock = lock_folder(folder)
    if lock is not None:
        os.close(lock)
    names = {each.name for each in folder.iterdir()}
    model = any(name.endswith((".safetensors", ".safetensors.partial")) for name in names)
    if not model and not names <= _REPORTS:
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


class Replacement:
    """The neighbours through which a folder is replaced.

    Parameters
    ----------
    final
        The folder, resolved.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.new = final.parent / f".{final.name}.lean-merge-new"
        self.old = final.parent / f".{final.name}.lean-merge-old"

    def recover(self) -> None:
        """Ends what a crash left between the renames of `switch`. Raises OSError, OutputError."""
        if not _is_folder(self.old):
            return
        if not self.final.exists():
            # Both are whole here; the newer one is what that run was asked for.
            complete = any((self.new / name).exists() for name in (INDEX, SINGLE, ADAPTER))
            os.replace(self.new if complete else self.old, self.final)
        self._delete(self.old)

    def discard_new(self) -> None:
        """Deletes what a crash left half written. Raises OSError, OutputError."""
        self._delete(self.new)

    def switch(self) -> None:
        """Puts the new folder in the old one's place. Raises OSError; then the old one is back."""
        os.replace(self.final, self.old)
        try:
            os.replace(self.new, self.final)
        except BaseException:
            os.replace(self.old, self.final)
            raise
        sync_folder(self.final.parent)
        # The output is whole; what cannot be deleted now is deleted by the next run.
        shutil.rmtree(self.old, ignore_errors=True)

    @staticmethod
    def _delete(folder: Path) -> None:
        if _is_folder(folder):
            lock = lock_folder(folder)
            try:
                shutil.rmtree(folder)
            finally:
                if lock is not None:
                    os.close(lock)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
