"""JSON from files that nobody vouches for: bounded, strict, and never a surprise exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lean_merge.errors import CheckpointError
from lean_merge.sizes import format_size


class DuplicateKeyError(ValueError):
    """A JSON object has one key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return result


def parse_object(
    data: bytes, *, file: Path, what: str, mend: str, unique: bool = True
) -> dict[str, Any]:
    """The JSON object that `data` holds, as UTF-8.

    Parameters
    ----------
    unique
        Whether a key that an object has twice is an error; else the last one counts, as it does
        for the libraries that read the same file.

    Raises
    ------
    CheckpointError
        Anything else; the message names `file`, `what` was read of it, and the `mend`.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except DuplicateKeyError as error:
        fault = f"has the key {shorten(str(error))} twice"
    except UnicodeDecodeError:
        fault = "is not UTF-8"
    except RecursionError:
        fault = "is nested too deeply"
    except ValueError as error:
        fault = f"is not JSON ({error})"
    else:
        if isinstance(value, dict):
            return value
        fault = f"is a {type(value).__name__}, not an object"
    raise CheckpointError(f"{file}: {what} {fault}; {mend}.")


def read_object(
    file: Path, *, limit: int, what: str, mend: str, unique: bool = True
) -> dict[str, Any]:
    """The JSON object in `file`, which may have at most `limit` bytes; see `parse_object`."""
    try:
        with open(file, "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read {what} ({error.strerror}); {mend}.") from error
    if len(data) > limit:
        raise CheckpointError(f"{file}: {what} exceeds {format_size(limit)}; {mend}.")
    return parse_object(data, file=file, what=what, mend=mend, unique=unique)


def shorten(text: str) -> str:
    """`text` as a literal that is safe and short enough for a message."""
    literal = repr(text)
    return literal if len(literal) <= 120 else f"{literal[:100]}...{literal[-10:]}"
