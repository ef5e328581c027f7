"""Regular expressions of strangers, matched in a time that both lengths bound, or refused."""

from __future__ import annotations

import re
from typing import Protocol

_MOST_CHARACTERS = 1024  # as in a tensor's name
# Such a pattern repeats nothing but at most one single character, and has no groups, so `re` tries
# at most as many ways as the text has pairs of places.
_SIMPLE = re.compile(r"(?:[\w.|^$ -]|\\[.dw-])*(?:(?:[\w.]|\\[.dw])[*+](?:[\w.|^$ -]|\\[.dw-])*)?")
# This syntax means the same to `re` and to RE2. No two tokens begin alike, so that this pattern
# itself matches in linear time.
_READ_ALIKE = re.compile(
    r"""(?: [^\\\[\](){}]                   # any character but these; also . ^ $ | * + ?
          | \\[dDwWsSb] | \\[^\w\s]          # a class, an escape
          | \[\^? (?: \\[dDwWsS] | \\[^\w\s] | [\w.](?:-[\w.])? )+ \]
          | \((?:\?:|(?!\?)) | \)            # a group
          | \{\d+(?:,\d*)?\}                 # a number of times
        )*""",
    re.VERBOSE,
)


class BoundedPattern(Protocol):
    """A compiled pattern."""

    def match(self, text: str, /) -> object:
        """Return a true value if the text begins with what fits."""

    def search(self, text: str, /) -> object:
        """Return a true value if what fits is anywhere in the text."""


def bounded_pattern(
    text: str, whole: str | None = None, *, is_plain: bool | None = None
) -> BoundedPattern:
    """Compile a pattern that somebody else wrote.

    Parameters
    ----------
    text
        The pattern.
    whole
        The pattern with what stands around it; by default it stands alone.
    is_plain
        Whether `re` matches it in a bounded time. By default this is told by the pattern. RE2
        matches any other, if it certainly reads it as `re` does.

    Raises
    ------
    ValueError
        It cannot be matched so; the message is a predicate with the mend.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"has {len(text)} characters, more than {_MOST_CHARACTERS}")
    whole = text if whole is None else whole
    if _SIMPLE.fullmatch(text) if is_plain is None else is_plain:
        return re.compile(whole)
    try:
        import re2
    except ImportError as error:
        raise ValueError(
            "is a regular expression, so google-re2 has to be installed "
            "(pip install 'lean-merge[patterns]')"
        ) from error
    if not _READ_ALIKE.fullmatch(text):
        raise ValueError("is more of a regular expression than modules' names need")
    options = re2.Options()
    options.log_errors = False
    try:
        re.compile(whole)  # RE2 takes "(?)" and the like, which PEFT could not load
        compiled: BoundedPattern = re2.compile(whole, options)
    except (re.error, re2.error, RecursionError, OverflowError) as error:
        raise ValueError("is no regular expression that can be matched in linear time") from error
    return compiled
