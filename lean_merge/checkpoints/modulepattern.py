"""The keys of PEFT's rank_pattern and alpha_pattern, matched without backtracking.

PEFT takes each key for a regular expression of the end of a module's name. They come with the
adapter, and Python's own matching may take for ever on what strangers write, so it is not used: a
pattern is followed for all places in the name at once, one bit for each.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

MAX_PATTERN = 512
"""Characters of a key that is more than a name."""
_MAX_DEPTH = 20
_PLAIN = re.compile(r"[\w.-]*")
_PARSER = "re._parser" if sys.version_info >= (3, 11) else "sre_parse"


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """One key, read.

    Attributes
    ----------
    text
        As it is written.
    tree
        What Python's parser makes of it; None for a plain name.
    """

    text: str
    tree: Any = None

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
    parser = importlib.import_module(_PARSER)
    try:
        # The parser warns of odd brackets, which is no concern of the user's.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parser.parse(rf"(.*\.)?({text})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError("is no regular expression") from error
    if tree.state.flags & ~re.UNICODE:
        raise ValueError("sets flags")
    _check(tree, depth=0, repeated=False)
    return ModulePattern(text, tree)


def _check(tree: Any, *, depth: int, repeated: bool) -> None:
    """Raises ValueError for what is more than a regular language, or slow."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"has more than {_MAX_DEPTH} groups inside each other")
    for operation, argument in tree:
        inner: list[Any] = []
        again = repeated
        match operation.name:
            case "BRANCH":
                inner = argument[1]
            case "SUBPATTERN" if not argument[1] and not argument[2]:
                inner = [argument[3]]
            case "MAX_REPEAT" | "MIN_REPEAT":
                again = repeated or argument[1] > 1
                if repeated and argument[1] > 1:
                    raise ValueError("repeats what is itself a repetition")
                inner = [argument[2]]
            case "AT" if argument.name in _ENDS:
                pass
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                pass
            case _:
                raise ValueError(
                    "looks back, looks ahead or sets flags, which modules' names do not need"
                )
        for each in inner:
            _check(each, depth=depth + 1, repeated=again)


_ENDS = frozenset({"AT_BEGINNING", "AT_BEGINNING_STRING", "AT_END", "AT_END_STRING"})
_CATEGORIES: MappingProxyType[str, Callable[[str], bool]] = MappingProxyType(
    {
        "CATEGORY_DIGIT": str.isdecimal,
        "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
        "CATEGORY_SPACE": str.isspace,
        "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
        "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
        "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
    }
)


class _Places:
    """Sets of places in a text, bit n for the place before character n."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._known: dict[str, int] = {}

    def after(self, tree: Any, places: int) -> int:
        """Where what `tree` describes may end if it begins at one of `places`."""
        for operation, argument in tree:
            if not places:
                break
            places = self._step(operation.name, argument, places)
        return places

    def _step(self, name: str, argument: Any, places: int) -> int:
        if name == "BRANCH":
            ends = 0
            for each in argument[1]:
                ends |= self.after(each, places)
            return ends
        if name == "SUBPATTERN":
            return self.after(argument[3], places)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, tree = argument
            return self._repeat(low, high, tree, places)
        if name == "AT":
            return places & (1 if "BEGINNING" in argument.name else 1 << len(self._text))
        return (places & self._where(name, argument)) << 1

    def _repeat(self, low: int, high: int, tree: Any, places: int) -> int:
        for _ in range(low):
            before, places = places, self.after(tree, places)
            if places == before:
                break
        found = places
        for _ in range(low, high):
            places = self.after(tree, places) & ~found
            if not places:
                break
            found |= places
        return found

    def _where(self, name: str, argument: Any) -> int:
        """The places before a character of that kind."""
        key = f"{name} {argument}"
        if key not in self._known:
            kind = {c: _is(name, argument, c) for c in set(self._text)}
            self._known[key] = sum(1 << n for n, c in enumerate(self._text) if kind[c])
        return self._known[key]


def _is(name: str, argument: Any, char: str) -> bool:
    """Whether one character is of a kind."""
    match name:
        case "LITERAL":
            return ord(char) == int(argument)
        case "NOT_LITERAL":
            return ord(char) != int(argument)
        case "ANY":
            return char != "\n"
        case "RANGE":
            return bool(argument[0] <= ord(char) <= argument[1])
        case "CATEGORY":
            return bool(_CATEGORIES[argument.name](char))
    assert name == "IN"
    negated = argument[0][0].name == "NEGATE"
    found = any(_is(kind.name, of, char) for kind, of in argument[negated:])
    return found is not bool(negated)
