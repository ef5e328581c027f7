"""Marks that are kept in a folder, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import os
import time
from collections import UserDict
from pathlib import Path

import numpy as np

from reproduction.exam import Marks


class KeptMarks(UserDict[str, dict[str, Marks]]):
    """Marks by a text that says which weights were asked what; each entry is one file as well.

    Parameters
    ----------
    folder : Path
        Where the files lie; it is made if it does not exist.
    family : str
        What tells this family and its questions from others.

    Attributes
    ----------
    seconds : float
        The processor time that marks read from files took when they were made.
    """

    def __init__(self, folder: Path, family: str) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._family = folder, family
        self._began = time.process_time()
        self.seconds = 0.0

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._family} {key}".encode()).hexdigest()
        return self._folder / f"{name}.npz"

    def __contains__(self, key: object) -> bool:
        if key in self.data:
            return True
        file = self._file(str(key))
        if not file.exists():
            self._began = time.process_time()
            return False
        with np.load(file) as held:
            tasks = sorted({name.partition("/")[0] for name in held.files} - {"seconds"})
            self.data[str(key)] = {
                task: Marks(held[f"{task}/right"], held[f"{task}/loss"]) for task in tasks
            }
            self.seconds += float(held["seconds"])
        return True

    def __setitem__(self, key: str, marks: dict[str, Marks]) -> None:
        self.data[key] = marks
        arrays = {f"{task}/right": mark.right for task, mark in marks.items()}
        arrays |= {f"{task}/loss": mark.loss for task, mark in marks.items()}
        file = self._file(key)
        part = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, seconds=np.array(time.process_time() - self._began), **arrays)
        part.replace(file)
