"""Read JSON from untrusted files: strictly, within bounds, and with expected errors only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lean_merge.checkpoints.safepaths import open_regular
from lean_merge.errors import CheckpointError, shown
from lean_merge.sizes import format_size

MAX_PARSED = 512 << 20
"""The most bytes that parsing one file may take; this is checked before it is parsed."""
MAX_NESTING = 64
"""The most objects and lists inside each other; real files have at most ten."""


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


def parsed_bytes(data: bytes) -> int:
    """Return the most bytes that parsing `data` can take, from counts of its punctuation.

    Python's objects are up to 26 times as large as their text: `[]` takes two bytes of JSON and 72
    bytes of memory. The constants are the most that CPython needs for an object or list, a pair, an
    item and a string. Punctuation inside strings only makes the bound larger.
    """
    wide = 1 if data.isascii() else 5  # bytes for each byte and its text
    escaped = 9 if b"\\u" in data else 4  # strings of the widest characters, built by parts
    contents = 1 if wide == 1 and escaped == 4 else escaped
    return (
        (64 << 10)
        + (wide + contents) * len(data)
        + 104 * (data.count(b"{") + data.count(b"["))
        + 300 * data.count(b":")
        + 42 * data.count(b",")
        + 30 * data.count(b'"')
    )


def parse_object(
    data: bytes,
    *,
    file: Path,
    what: str,
    mend: str,
    unique: bool = True,
    memory: int = MAX_PARSED,
) -> dict[str, Any]:
    """Return the JSON object that `data` holds in UTF-8.

    Parameters
    ----------
    memory
        The most bytes that parsing may take; see `parsed_bytes`.
    unique
        Whether it is an error if an object has a key twice; else the last one counts, as it does
        for the libraries that read the same file.

    Raises
    ------
    CheckpointError
        There is no such object; the message names the `file`, `what` was read, and the `mend`.
    """
    if (needed := parsed_bytes(data)) > memory:
        raise CheckpointError(
            f"{file}: {what} could take {format_size(needed)} to parse, beyond the limit of "
            f"{format_size(memory)}; no real file of its kind comes near, so {mend}."
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except DuplicateKeyError as error:
        fault = f"has the key {shown(str(error))} twice"
    except UnicodeDecodeError:
        fault = "is not UTF-8"
    except RecursionError:
        fault = "is nested too deeply"
    except ValueError as error:
        fault = f"is not JSON ({error})"
    else:
        if not isinstance(value, dict):
            fault = f"is a {type(value).__name__}, not an object"
        elif _is_deep(value):
            fault = f"is nested more than {MAX_NESTING} deep"
        else:
            return value
    raise CheckpointError(f"{file}: {what} {fault}; {mend}.")


def _is_deep(value: dict[str, Any]) -> bool:
    """Return whether `value` is nested too deeply for recursion."""
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def read_object(
    file: Path,
    *,
    limit: int,
    what: str,
    mend: str,
    unique: bool = True,
    memory: int = MAX_PARSED,
) -> dict[str, Any]:
    """Return the JSON object in `file`, which has at most `limit` bytes; see `parse_object`."""
    try:
        with open_regular(file) as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot read {what} ({error.strerror}); {mend}.") from error
    if len(data) > limit:
        raise CheckpointError(f"{file}: {what} exceeds {format_size(limit)}; {mend}.")
    return parse_object(data, file=file, what=what, mend=mend, unique=unique, memory=memory)


def to_json(content: dict[str, Any]) -> Iterator[bytes]:
    """Write readable JSON, with null for NaN and infinity, which it cannot express.

    It comes in parts, so that of a long list only one item at a time is in memory as text.
    """
    before = "{\n"
    for name, value in content.items():
        before += f" {json.dumps(name, ensure_ascii=False)}: "
        if isinstance(value, list) and value:
            before += "[\n  "
            for item in value:
                yield (before + _written(item, 2)).encode()
                before = ",\n  "
            before = "\n ],\n"
        else:
            yield (before + _written(value, 1)).encode()
            before = ",\n"
    yield before.removesuffix(",\n").encode() + b"\n}\n"


def _written(value: Any, depth: int) -> str:
    """Write a value that stands so deep inside of others."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False, ensure_ascii=False)
    return text.replace("\n", "\n" + " " * depth)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
