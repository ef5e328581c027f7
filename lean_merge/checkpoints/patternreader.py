"""Reading of regular expressions: those of Python's syntax that describe a regular language.

Python's own parser is private to it and changes between versions, and what strangers write is
better read by what refuses the rest.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

MAX_DEPTH = 20
"""Groups inside each other."""
MANY = (1 << 32) - 1
"""What `*` and `+` repeat at most, and the bound of what a repetition may say."""
_MORE = "looks back, looks ahead or sets flags, which modules' names do not need"
_CATEGORIES: MappingProxyType[str, Callable[[str], bool]] = MappingProxyType(
    {
        "d": str.isdecimal,
        "D": lambda c: not c.isdecimal(),
        "s": str.isspace,
        "S": lambda c: not c.isspace(),
        "w": lambda c: c.isalnum() or c == "_",
        "W": lambda c: not (c.isalnum() or c == "_"),
    }
)
_ESCAPES = MappingProxyType(
    {"a": 7, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "\\": ord("\\")}
)
_CODES = MappingProxyType({"x": 2, "u": 4, "U": 8})
_HEX = re.compile(r"[0-9a-fA-F]+")
_OCTAL = re.compile(r"0[0-7]{0,2}|[1-3][0-7]{2}")
_OCTAL_OF_SET = re.compile(r"[0-3]?[0-7]{1,2}(?![0-7])|[0-3][0-7]{2}")
_BOUNDS = re.compile(r"\{(?=[0-9,])([0-9]*)(,?)([0-9]*)\}")
_GROUP = re.compile(r"\((?:\?(?:(:)|P<([^>]*)>|(#)|([aiLmsux-]+[:)])|(.?)))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class OneOf:
    """One character, inside `ranges` or of a `categories`; `negated` any other."""

    ranges: tuple[tuple[int, int], ...]
    categories: str = ""
    negated: bool = False

    def has(self, char: str) -> bool:
        """Whether it may be this one."""
        inside = any(low <= ord(char) <= high for low, high in self.ranges)
        return (inside or any(_CATEGORIES[c](char) for c in self.categories)) is not self.negated


@dataclass(frozen=True, slots=True)
class Edge:
    """No character: the beginning of the text, or its end."""

    at_end: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some sequences."""

    options: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`item`, from `low` to `high` times."""

    low: int
    high: int
    item: Node


Node = OneOf | Edge | Choice | Repeat
Sequence = tuple[Node, ...]


def read_pattern(text: str) -> Sequence:
    """What a regular expression describes, its groups by their content alone.

    Raises ValueError, with a predicate, for what Python refuses, and for what is more than a
    regular language or repeats a repetition.
    """
    reader = _Reader(text)
    found = reader.choice(0)
    if reader.rest():
        raise _wrong()
    for node in found:
        _check(node, repeated=False)
    return found


def _wrong() -> ValueError:
    return ValueError("is no regular expression")


def _check(node: Node, *, repeated: bool) -> None:
    if isinstance(node, Choice):
        for each in (item for option in node.options for item in option):
            _check(each, repeated=repeated)
    elif isinstance(node, Repeat):
        if repeated and node.high > 1:
            raise ValueError("repeats what is itself a repetition")
        _check(node.item, repeated=repeated or node.high > 1)


class _Reader:
    """Reads from left to right; each method takes what it is named for."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._names: set[str] = set()

    def rest(self) -> str:
        """What is not read yet."""
        return self._text[self._at :]

    def _next(self) -> str:
        if self._at == len(self._text):
            raise _wrong()
        self._at += 1
        return self._text[self._at - 1]

    def _sees(self, char: str) -> bool:
        return self._text.startswith(char, self._at)

    def _takes(self, char: str) -> bool:
        """Whether `char` came next, and is read."""
        seen = self._sees(char)
        self._at += len(char) if seen else 0
        return seen

    def _match(self, kind: re.Pattern[str]) -> re.Match[str] | None:
        found = kind.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found

    def choice(self, depth: int) -> Sequence:
        """Sequences between bars."""
        if depth > MAX_DEPTH:
            raise ValueError(f"has more than {MAX_DEPTH} groups inside each other")
        options = [self._sequence(depth)]
        while self._takes("|"):
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else (Choice(tuple(options)),)

    def _sequence(self, depth: int) -> Sequence:
        items: list[Node] = []
        while self.rest() and not self._sees("|") and not self._sees(")"):
            bounds = self._bounds()
            if bounds is not None:
                if not items or isinstance(items[-1], (Edge, Repeat)):
                    raise _wrong()
                items[-1] = Repeat(*bounds, items[-1])
            elif self._sees("("):
                items.extend(self._group(depth))
            else:
                items.append(self._single())
        return tuple(items)

    def _bounds(self) -> tuple[int, int] | None:
        """How often what comes before is repeated; None if what comes next does not tell."""
        stated = self._match(_BOUNDS)
        if stated is not None:
            low, comma, high = stated.groups()
            least = int(low or 0)
            most = int(high) if high else MANY if comma else least
            # Of braces with nothing but a comma Python makes any number, too.
            if least > most or max(least, int(high or 0)) >= MANY:
                raise _wrong()
        elif self._takes("*"):
            least, most = 0, MANY
        elif self._takes("+"):
            least, most = 1, MANY
        elif self._takes("?"):
            least, most = 0, 1
        else:
            return None
        if self._takes("+"):
            raise ValueError("repeats possessively, which modules' names do not need")
        # A lazy repetition ends in the same places.
        self._takes("?")
        return least, most

    def _group(self, depth: int) -> Sequence:
        found = self._match(_GROUP)
        assert found is not None
        _, name, comment, flags, other = found.groups()
        if comment:
            while (char := self._next()) != ")":
                if char == "\\":
                    self._next()
            return ()
        if flags is not None:
            raise ValueError("sets flags")
        if other is not None:
            raise ValueError(_MORE) if other in tuple("=!<>(P") else _wrong()
        if name is not None:
            if not name.isidentifier() or name in self._names:
                raise _wrong()
            self._names.add(name)
        inner = self.choice(depth + 1)
        if not self._takes(")"):
            raise _wrong()
        return (Choice((inner,)),)

    def _single(self) -> Node:
        char = self._next()
        if char == ".":
            return OneOf(((10, 10),), negated=True)
        if char in "^$":
            return Edge(char == "$")
        if char == "[":
            return self._set()
        if char != "\\":
            return _one(ord(char))
        if self._takes("A"):
            return Edge(False)
        if self._takes("Z"):
            return Edge(True)
        if self._sees("b") or self._sees("B") or re.match(r"[1-9]", self.rest()):
            # Three octal digits are a character, else it is a group.
            octal = self._match(_OCTAL)
            if octal is None:
                raise ValueError(_MORE)
            return _one(int(octal[0], 8))
        code = self._escaped(_OCTAL)
        return OneOf((), code) if isinstance(code, str) else _one(code)

    def _escaped(self, digits: re.Pattern[str]) -> int | str:
        """What stands behind a backslash: a character's number, or a category."""
        octal = self._match(digits)
        if octal is not None:
            return int(octal[0], 8)
        char = self._next()
        if char in _CATEGORIES:
            return char
        if char in _CODES:
            number = self._text[self._at : self._at + _CODES[char]]
            self._at += len(number)
            if len(number) < _CODES[char] or not _HEX.fullmatch(number):
                raise _wrong()
            if int(number, 16) > sys.maxunicode:
                raise _wrong()
            return int(number, 16)
        if char in _ESCAPES:
            return _ESCAPES[char]
        # Python keeps all other letters and digits for itself.
        if char.isascii() and char.isalnum():
            raise _wrong()
        return ord(char)

    def _set(self) -> OneOf:
        negated = self._takes("^")
        ranges: list[tuple[int, int]] = []
        categories = ""
        while not (ranges or categories) or not self._sees("]"):
            low = self._of_set()
            if self._sees("-") and not self.rest().startswith("-]"):
                self._at += 1
                high = self._of_set()
                if isinstance(low, str) or isinstance(high, str) or low > high:
                    raise _wrong()
                ranges.append((low, high))
            elif isinstance(low, str):
                categories += low
            else:
                ranges.append((low, low))
        self._at += 1
        return OneOf(tuple(ranges), categories, negated)

    def _of_set(self) -> int | str:
        char = self._next()
        return self._escaped(_OCTAL_OF_SET) if char == "\\" else ord(char)


def _one(code: int) -> OneOf:
    return OneOf(((code, code),))
