"""The keys of PEFT's rank_pattern and alpha_pattern, matched without backtracking.

PEFT takes each key for a regular expression of the end of a module's name. They come with the
adapter, and Python's own matching may take for ever on what strangers write, so it is not used: a
pattern is followed for all places in the name at once, one bit for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lean_merge.checkpoints.patternreader import (
    Choice,
    Edge,
    Node,
    OneOf,
    Repeat,
    Sequence,
    read_pattern,
)

MAX_PATTERN = 512
"""Characters of a key that is more than a name."""
_PLAIN = re.compile(r"[\w.-]*")


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """One key, read.

    Attributes
    ----------
    text
        As it is written.
    tree
        What it describes, with what PEFT puts around it; None for a plain name.
    """

    text: str
    tree: Sequence | None = None

    def matches(self, module: str) -> bool:
        r"""Whether `re.match(rf"(.*\.)?({text})$", module)` finds something.

        In time proportional to both lengths for a name, and to the square of the module's at most
        for anything else.
        """
        if self.tree is not None:
            return _Places(module).after(self.tree, 1) != 0
        start = len(module) - len(self.text)
        if start < 0 or (start > 0 and module[start - 1] != "."):
            return False
        return all(ours in (".", c) for ours, c in zip(self.text, module[start:], strict=True))


def module_pattern(text: str) -> ModulePattern:
    """Reads a key. Raises ValueError, with a predicate, for what cannot be matched as above."""
    if _PLAIN.fullmatch(text):
        return ModulePattern(text)
    if len(text) > MAX_PATTERN:
        raise ValueError(f"has {len(text)} characters, more than {MAX_PATTERN}")
    return ModulePattern(text, read_pattern(rf"(.*\.)?({text})$"))


class _Places:
    """Sets of places in a text, bit n for the place before character n."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._known: dict[OneOf, int] = {}

    def after(self, sequence: Sequence, places: int) -> int:
        """Where what `sequence` describes may end if it begins at one of `places`."""
        for node in sequence:
            if not places:
                break
            places = self._step(node, places)
        return places

    def _step(self, node: Node, places: int) -> int:
        if isinstance(node, Choice):
            ends = 0
            for each in node.options:
                ends |= self.after(each, places)
            return ends
        if isinstance(node, Repeat):
            return self._repeat(node, places)
        if isinstance(node, Edge):
            return places & (1 << len(self._text) if node.at_end else 1)
        return (places & self._where(node)) << 1

    def _repeat(self, node: Repeat, places: int) -> int:
        for _ in range(node.low):
            before, places = places, self._step(node.item, places)
            if places == before:
                break
        found = places
        for _ in range(node.low, node.high):
            places = self._step(node.item, places) & ~found
            if not places:
                break
            found |= places
        return found

    def _where(self, node: OneOf) -> int:
        """The places before a character of that kind."""
        if node not in self._known:
            fits = {c for c in set(self._text) if node.has(c)}
            self._known[node] = sum(1 << n for n, c in enumerate(self._text) if c in fits)
        return self._known[node]
