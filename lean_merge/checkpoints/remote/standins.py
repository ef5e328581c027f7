"""Make folders here that stand for models elsewhere: small files, and stand-ins of the weights.

A stand-in has the length of its file and its header; the rest is a hole that takes no disk space.
Whatever reads headers and configs reads the folder as it reads others.
"""

from __future__ import annotations

import atexit
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir, mkdtemp

from lean_merge.checkpoints.elsewhere import FAR_FILES
from lean_merge.checkpoints.forms import Origin
from lean_merge.checkpoints.header import MAX_HEADER
from lean_merge.checkpoints.remote.addresses import Listing
from lean_merge.checkpoints.remote.client import Location, RangedFile
from lean_merge.errors import CheckpointError

_FIRST = 100 << 10
"""Bytes that are fetched at first; they hold most headers."""
_AT_A_TIME = 8
_lock = threading.Lock()
_made: dict[tuple[str, ...], Origin] = {}
"""The folders of this process, by address and marks; they go when it ends."""


def opened(listing: Listing) -> Origin:
    """Return the folder that stands for the listed files; it is made once in a process.

    Raises
    ------
    CheckpointError
        A header cannot be read, or the folder cannot be written.
    """
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        sizes = [*pool.map(RangedFile.learn_size, listing.weights.values())]
        marks = [each.etag for each in listing.weights.values()]
        key = (listing.address, *marks, *map(str, sizes), *(m for _, m in listing.small.values()))
        with _lock:
            if key in _made:
                return _made[key]
            try:
                home = Path(mkdtemp(prefix="lean-merge-")).resolve()
                atexit.register(rmtree, home, ignore_errors=True)
                # An adapter tells its base by the last part of its name.
                folder = home / listing.name.rpartition("/")[2]
                folder.mkdir()
                for name, (content, mark) in listing.small.items():
                    place = folder / name
                    place.parent.mkdir(exist_ok=True)
                    place.write_bytes(content)
                    FAR_FILES[place] = RangedFile(f"{listing.address}/{name}", 0, mark, _nowhere)
                places = [folder / name for name in listing.weights]
                for _ in pool.map(_stand_in, places, listing.weights.values()):
                    pass
            except OSError as error:
                raise CheckpointError(
                    f"{gettempdir()}: cannot be written ({error.strerror}); set TMPDIR to another "
                    "folder."
                ) from error
            FAR_FILES.update(zip(places, listing.weights.values(), strict=True))
            origin = Origin(folder, listing.name, listing.revision, listing.address)
            _made[key] = origin
            return origin


def _stand_in(place: Path, file: RangedFile) -> None:
    """Write a file's header to its stand-in, and nothing else."""
    size = file.learn_size()
    header = bytearray(min(_FIRST, size))
    file.fetch(0, [memoryview(header)])
    length = 8 + int.from_bytes(header[:8], "little")
    if len(header) < length <= min(size, MAX_HEADER + 8):
        rest = bytearray(length - len(header))
        file.fetch(len(header), [memoryview(rest)])
        header += rest
    file.opened = len(header)
    with place.open("wb") as stand_in:
        stand_in.write(header[:length])
        stand_in.truncate(size)


def _nowhere() -> Location:
    raise AssertionError("a small file is read from its folder")
