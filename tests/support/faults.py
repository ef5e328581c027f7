"""A file layer that notes every change beneath a folder, fails on demand, and loses power.

`Recorder` stands between the program and the calls of `os` that change files: it carries each out
and notes it. `Recorder.after(cut, survives)` then builds the disk as a power failure after `cut`
changes leaves it: what was synced is there; of the rest, each write (sector by sector), growth,
creation, renaming and removal is there or not, as `survives` decides.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SECTOR = 512
PATCHED = (
    *("open", "close", "write", "pwrite", "ftruncate", "truncate", "posix_fallocate"),
    *("fsync", "fdatasync", "mkdir", "rmdir", "unlink", "remove", "rename", "replace"),
    "link",
)
_ACCESSOR = getattr(pathlib, "_normal_accessor", None)


@dataclass
class Node:
    """A file with content, or a folder with entries."""

    content: bytearray | None = None
    entries: dict[str, int] = field(default_factory=dict)


Tree = dict[int, Node]
ROOT = 0


@dataclass(frozen=True)
class Change:
    """One change; `nodes` are those whose syncing makes it last."""

    kind: str
    nodes: tuple[int, ...]
    data: tuple[Any, ...] = ()


Survives = Callable[[int, Change, int], bool]
"""Whether sector `part` of change `index` is on the disk although nothing synced it."""


def nothing_more(index: int, change: Change, part: int) -> bool:
    """Only what was synced survives."""
    return False


def everything(index: int, change: Change, part: int) -> bool:
    """All survives, as it does when only the process dies."""
    return True


def read_tree(folder: Path) -> Tree:
    """A folder and all beneath it."""
    tree: Tree = {ROOT: Node()}
    numbers = itertools.count(1)

    known: dict[int, int] = {}

    def add(path: Path, parent: int) -> None:
        for each in sorted(path.iterdir()):
            inode = each.stat().st_ino
            if not each.is_dir() and inode in known:
                tree[parent].entries[each.name] = known[inode]
                continue
            number = known[inode] = next(numbers)
            tree[parent].entries[each.name] = number
            tree[number] = Node(None if each.is_dir() else bytearray(each.read_bytes()))
            if each.is_dir():
                add(each, number)

    add(folder, ROOT)
    return tree


def write_tree(tree: Tree, folder: Path) -> None:
    """The opposite of `read_tree`, hard links included; `folder` must not be there."""
    known: dict[int, Path] = {}

    def add(number: int, folder: Path) -> None:
        folder.mkdir()
        for name, child in tree[number].entries.items():
            content = tree[child].content
            if content is None:
                add(child, folder / name)
            elif child in known:
                os.link(known[child], folder / name)
            else:
                known[child] = folder / name
                (folder / name).write_bytes(content)

    add(ROOT, folder)


def flat(tree: Tree, number: int = ROOT, prefix: str = "") -> dict[str, bytes | None]:
    """Every path, with the bytes of a file and None for a folder."""
    found: dict[str, bytes | None] = {}
    for name, child in tree[number].entries.items():
        content = tree[child].content
        found[prefix + name] = None if content is None else bytes(content)
        if content is None:
            found |= flat(tree, child, f"{prefix}{name}/")
    return found


class Recorder:
    """Notes what happens beneath `root`.

    `fail` is asked before each change, by its number and kind; an exception that it gives is
    raised instead.
    """

    def __init__(
        self, root: Path, *, fail: Callable[[int, str], BaseException | None] | None = None
    ) -> None:
        self.root = root.resolve()
        self.changes: list[Change] = []
        self._before = read_tree(root)
        self._live = read_tree(root)
        self._numbers = itertools.count(len(self._live))
        self._descriptors: dict[int, int] = {}
        self._fail = fail
        self._asked = itertools.count()
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in PATCHED if hasattr(os, name)}

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Watches inside the block, and checks at its end that nothing went past it."""
        with pytest.MonkeyPatch.context() as patch:
            for name in self._real:
                patch.setattr(os, name, getattr(self, f"call_{name}"))
                # Python 3.10's paths keep functions of their own.
                if hasattr(_ACCESSOR, name) and name != "open":
                    patch.setattr(_ACCESSOR, name, getattr(self, f"call_{name}"))
            yield self
        assert flat(self._live) == flat(read_tree(self.root))

    def after(self, cut: int, survives: Survives) -> Tree:
        """The disk after a power failure that follows the first `cut` changes."""
        tree: Tree = {
            number: Node(
                None if node.content is None else bytearray(node.content), {**node.entries}
            )
            for number, node in self._before.items()
        }
        synced: dict[int, int] = {}
        for index, change in enumerate(self.changes[:cut]):
            if change.kind == "sync":
                synced[change.nodes[0]] = index
        for index, change in enumerate(self.changes[:cut]):
            lasting = all(synced.get(node, -1) > index for node in change.nodes)
            apply(
                tree, change, lambda part, i=index, c=change, s=lasting: s or survives(i, c, part)
            )
        return tree

    # --- the calls ---------------------------------------------------------------------------

    def _note(self, kind: str, *nodes: int, data: tuple[Any, ...] = ()) -> None:
        change = Change(kind, nodes, data)
        self.changes.append(change)
        apply(self._live, change, lambda part: True)

    def _may(self, kind: str) -> None:
        if self._fail is not None and (error := self._fail(next(self._asked), kind)) is not None:
            raise error

    def _find(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """The folder and the name of a path beneath the root."""
        if dir_fd is not None:
            there = self._descriptors.get(dir_fd)
            return None if there is None else (there, os.fspath(path))
        if isinstance(path, int):
            return None
        whole = Path(os.path.abspath(os.fspath(path)))
        if not whole.is_relative_to(self.root) or whole == self.root:
            return None
        number = ROOT
        *folders, name = whole.relative_to(self.root).parts
        for folder in folders:
            number = self._live[number].entries.get(folder, -1)
            if number < 0:
                return None
        return number, name

    def _node(self, path: Any, dir_fd: int | None = None) -> int | None:
        if not isinstance(path, int) and Path(os.path.abspath(os.fspath(path))) == self.root:
            return ROOT if dir_fd is None else None
        place = self._find(path, dir_fd)
        return None if place is None else self._live[place[0]].entries.get(place[1])

    def _create(self, place: tuple[int, str], node: Node) -> int:
        number = next(self._numbers)
        self._note("create", place[0], data=(place[1], number, node.content is None))
        return number

    def call_open(
        self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        with self._lock:
            place, node = self._find(path, dir_fd), self._node(path, dir_fd)
            if place is not None and node is None and flags & os.O_CREAT:
                self._may("create")
            descriptor: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
            if place is not None and node is None:
                node = self._create(place, Node(bytearray()))
            elif node is not None and flags & os.O_TRUNC:
                self._note("size", node, data=(0, True))
            if node is not None:
                self._descriptors[descriptor] = node
            return descriptor

    def call_close(self, descriptor: int) -> None:
        with self._lock:
            self._descriptors.pop(descriptor, None)
            self._real["close"](descriptor)

    def call_write(self, descriptor: int, data: Any) -> int:
        assert descriptor not in self._descriptors, "a write without a position"
        written: int = self._real["write"](descriptor, data)
        return written

    def call_pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        with self._lock:
            node = self._descriptors.get(descriptor)
            if node is not None:
                self._may("write")
            written: int = self._real["pwrite"](descriptor, data, offset)
            if node is not None:
                self._note("write", node, data=(offset, bytes(data)[:written]))
            return written

    def call_link(self, source: Any, target: Any) -> None:
        with self._lock:
            node, new = self._node(source), self._find(target)
            if new is not None:
                self._may("create")
            self._real["link"](source, target)
            if new is not None:
                assert node is not None, "a link to a file outside"
                self._note("create", new[0], data=(new[1], node, False))

    def _resize(self, name: str, descriptor: int, *args: int, size: int, cut: bool) -> None:
        with self._lock:
            node = self._descriptors.get(descriptor)
            if node is not None:
                self._may("size")
            self._real[name](descriptor, *args)
            if node is not None:
                self._note("size", node, data=(size, cut))

    def call_ftruncate(self, descriptor: int, size: int) -> None:
        self._resize("ftruncate", descriptor, size, size=size, cut=True)

    def call_truncate(self, path: Any, size: int) -> None:
        assert self._find(path) is None, "a truncation by name"
        self._real["truncate"](path, size)

    def call_posix_fallocate(self, descriptor: int, offset: int, size: int) -> None:
        self._resize("posix_fallocate", descriptor, offset, size, size=offset + size, cut=False)

    def _sync(self, name: str, descriptor: int) -> None:
        with self._lock:
            node = self._descriptors.get(descriptor)
            if node is not None:
                self._may("sync")
            self._real[name](descriptor)
            if node is not None:
                self._note("sync", node)

    def call_fsync(self, descriptor: int) -> None:
        self._sync("fsync", descriptor)

    def call_fdatasync(self, descriptor: int) -> None:
        self._sync("fdatasync", descriptor)

    def call_mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._lock:
            place = self._find(path, dir_fd)
            if place is not None and self._node(path, dir_fd) is None:
                self._may("create")
            self._real["mkdir"](path, mode, dir_fd=dir_fd)
            if place is not None:
                self._create(place, Node())

    def _remove(self, name: str, path: Any, dir_fd: int | None) -> None:
        with self._lock:
            place, node = self._find(path, dir_fd), self._node(path, dir_fd)
            if node is not None:
                self._may("remove")
            self._real[name](path, dir_fd=dir_fd)
            if place is not None:
                self._note("remove", place[0], data=(place[1],))

    def call_rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def call_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def call_remove(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("remove", path, dir_fd)

    def _move(self, name: str, source: Any, target: Any) -> None:
        with self._lock:
            old, new = self._find(source), self._find(target)
            if old is not None:
                self._may("rename")
            self._real[name](source, target)
            if old is not None:
                assert new is not None, "a file that leaves the folder"
                self._note("rename", old[0], new[0], data=(old[1], new[1]))

    def call_rename(self, source: Any, target: Any) -> None:
        self._move("rename", source, target)

    def call_replace(self, source: Any, target: Any) -> None:
        self._move("replace", source, target)


def apply(tree: Tree, change: Change, survives: Callable[[int], bool]) -> None:
    """Carries out the parts of a change that survive, as far as what it needs is there."""
    data = change.data
    if change.kind == "write":
        node, (offset, text) = tree.get(change.nodes[0]), data
        assert node is None or node.content is not None
        for start in range(offset // SECTOR * SECTOR, offset + len(text), SECTOR):
            if node is None or not survives(start // SECTOR):
                continue
            first, last = max(start, offset), min(start + SECTOR, offset + len(text))
            content = node.content
            assert content is not None
            content.extend(bytes(max(0, last - len(content))))
            content[first:last] = text[first - offset : last - offset]
    elif change.kind == "sync" or not survives(0):
        return
    elif change.kind == "size":
        node = tree.get(change.nodes[0])
        if node is not None and node.content is not None:
            size, cut = data
            if cut:
                del node.content[size:]
            node.content.extend(bytes(max(0, size - len(node.content))))
    elif change.kind == "create":
        name, number, is_folder = data
        tree.setdefault(number, Node(None if is_folder else bytearray()))
        if change.nodes[0] in tree:
            tree[change.nodes[0]].entries[name] = number
    elif change.kind == "remove":
        if change.nodes[0] in tree:
            tree[change.nodes[0]].entries.pop(data[0], None)
    elif change.kind == "rename":
        source, target = (tree[node].entries for node in change.nodes)
        old, new = data
        if old in source:
            there = tree[target[new]] if new in target else None
            if there is None or not there.entries:
                target[new] = source.pop(old)
