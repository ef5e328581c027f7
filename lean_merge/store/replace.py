"""Replacing a folder so that a crash at any moment leaves the old one or the new one whole.

    .out.lean-merge-new          the new one, while it is written
    .out.lean-merge-old          the old one, between two renames and while it is deleted

Between those two renames alone `out` itself is missing; the next run then ends the switch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lean_merge.store.state import State, look
from lean_merge.store.storage import lock_folder, sync_folder


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
            whole = _is_folder(self.new) and look(self.new).state is State.COMPLETE
            newer = self.new if whole else self.old
            # Its run may be alive, between the two renames.
            lock = lock_folder(newer)
            try:
                os.replace(newer, self.final)
                sync_folder(self.final.parent)
            finally:
                if lock is not None:
                    os.close(lock)
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
